"""The layout without lists: a folder of clips, each with its caption in a text file next to it."""

from __future__ import annotations

import contextlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import PurePosixPath

from cogtune.config.choices import DataFormat
from cogtune.data.findings import Finding, finding, listed
from cogtune.data.layouts.base import Layout, LayoutContent, Sample, ids
from cogtune.data.layouts.folder import Folder
from cogtune.data.layouts.lines import NotTextError, as_utf8, is_unicode
from cogtune.data.layouts.media import (
    CAPTION_FOLDERS,
    CAPTION_SUFFIX,
    OTHER_CAPTION_SUFFIXES,
    is_clip,
    is_image,
    may_be_clip,
)
from cogtune.data.layouts.own_files import is_generated, is_quarantine
from cogtune.data.layouts.rows import USUAL_NAMES
from cogtune.data.layouts.spelling import nfc, normal
from cogtune.system.errors import counted
from cogtune.system.files import os_errors_explained, read_regular


@dataclass(frozen=True)
class _Caption:
    """The file of a clip's caption, and how it differs from the documentation; empty if it does not."""

    file: PurePosixPath
    how: str = ""


class _Pairs:
    """The clips and captions of a folder, by name, ignoring Unicode form."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    @cached_property
    def texts(self) -> dict[str, dict[str, PurePosixPath]]:
        """Possible captions, by path without suffix, then by suffix in lower case."""
        found: defaultdict[str, dict[str, PurePosixPath]] = defaultdict(dict)
        for file in self.folder.files:
            suffix = file.suffix.lower()
            if suffix == CAPTION_SUFFIX or suffix in OTHER_CAPTION_SUFFIXES:
                exact = file.suffix == suffix
                if exact or suffix not in found[_key(file)]:
                    found[_key(file)][suffix] = file
        return dict(found)

    def caption_of(self, clip: PurePosixPath) -> _Caption | None:
        """Return the caption of a clip: next to it, under any suffix, or in a folder of captions."""
        if (beside := self._named(_key(clip))) is not None:
            return beside
        if (beside := self._named(nfc(str(clip)))) is not None:
            return _Caption(beside.file, "captions read from the full names of their clips, such as a.mp4.txt")
        for key, name in self._in_folders(clip):
            if (apart := self._named(key)) is not None:
                return _Caption(apart.file, f"captions read from {name}/, not from next to their clips")
        if (alike := self._in_another_case(clip)) is not None:
            return _Caption(alike, "captions found in other upper and lower case")
        described = clip.with_suffix(".json")
        if described in self.folder.files and not self.folder.leads_out(described):
            with contextlib.suppress(OSError, NotTextError):
                if _said_in(as_utf8((self.folder.root / described).read_bytes())[0]):
                    return _Caption(described, "captions read from .json files, not .txt")
        return None

    def _in_another_case(self, clip: PurePosixPath) -> PurePosixPath | None:
        """Return the one caption whose name differs from that of one clip in upper and lower case only."""
        alike = self.folder.by_stem.get(_normal_stem(clip), [])
        captions = [file for file in alike if file.suffix.lower() in (CAPTION_SUFFIX, *OTHER_CAPTION_SUFFIXES)]
        return captions[0] if len(captions) == 1 and [file for file in alike if may_be_clip(file)] == [clip] else None

    def _named(self, key: str) -> _Caption | None:
        there = self.texts.get(key)
        if there is None:
            return None
        if CAPTION_SUFFIX in there:
            file = there[CAPTION_SUFFIX]
            how = "" if file.suffix == CAPTION_SUFFIX else f"captions read from {file.suffix} files, not .txt"
            return _Caption(file, how)
        suffix = next(suffix for suffix in OTHER_CAPTION_SUFFIXES if suffix in there)
        return _Caption(there[suffix], f"captions read from {there[suffix].suffix} files, not .txt")

    @cached_property
    def _caption_folders(self) -> dict[str, str]:
        """The existing folders of captions, by their name in lower case."""
        there = {part for file in self.folder.files for part in file.parts[:-1]}
        return {name.lower(): name for name in sorted(there) if name.lower() in CAPTION_FOLDERS}

    def _in_folders(self, clip: PurePosixPath) -> Iterator[tuple[str, str]]:
        """Yield possible places of a caption: a folder of captions replaces, or is in, a folder of its clip's path."""
        stem = clip.with_suffix("")
        for name in CAPTION_FOLDERS:
            folder = self._caption_folders.get(name)
            if folder is None:
                continue
            for place in range(len(stem.parts)):
                yield nfc("/".join((*stem.parts[:place], folder, *stem.parts[place + 1 :]))), folder
                yield nfc("/".join((*stem.parts[:place], folder, *stem.parts[place:]))), folder

    @cached_property
    def clips(self) -> dict[PurePosixPath, _Caption | None]:
        """Every clip with its caption. A file that may be something else is a clip if it has a caption."""
        pairs = {file: self.caption_of(file) for file in self.folder.files if may_be_clip(file)}
        return {file: caption for file, caption in pairs.items() if caption is not None or is_clip(file)}


def _said_in(data: bytes) -> str:
    """Return the caption in a JSON object about one clip, under a usual name; empty if there is none."""
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return ""
    said = [value.get(name) for name in USUAL_NAMES["caption"]] if isinstance(value, dict) else []
    return next((text.strip() for text in said if isinstance(text, str) and is_unicode(text)), "")


@lru_cache(maxsize=1)
def _pairs(folder: Folder) -> _Pairs:
    """Return the pairs of a folder, computed once for detecting its layout and for reading it."""
    return _Pairs(folder)


def _key(file: PurePosixPath) -> str:
    return nfc(str(file.with_suffix("")))


def _read(folder: Folder) -> LayoutContent:
    pairs, findings = _pairs(folder), list[Finding]()
    _pairs.cache_clear()
    clips = [clip for clip in pairs.clips if _is_usable(folder, clip, findings)]
    for error in folder.refused:
        name = os.path.relpath(error.filename, folder.root)
        message = f"cannot read the folder {name}: {error.strerror}"
        findings.append(finding("bad-path", name, message, "check its permissions, or move it out of the dataset"))
    generated = {clip for clip in clips if pairs.clips[clip] is None and is_generated(folder.root / clip)}
    clips = [clip for clip in clips if clip not in generated]
    samples = []
    names = ids([PurePosixPath(nfc(str(clip))) for clip in clips])
    for number, (sample_id, clip) in enumerate(zip(names, clips, strict=True), start=1):
        text = _read_caption(folder, sample_id, clip, pairs.clips[clip], findings)
        samples.append(Sample(sample_id, folder.root / clip, text))
        if number % 1000 == 0:
            folder.tell(number, len(clips))
    own = [*folder.own, *sorted(map(str, generated)), *_check_strays(pairs, findings)]
    if own:
        message = f"cogtune wrote {listed(own, 5)}: not read as data"
        findings.append(finding("own-files", str(folder.root), message))
    findings += _left_out(pairs)
    return LayoutContent(SIDECAR.name, samples, findings)


def _is_usable(folder: Folder, clip: PurePosixPath, findings: list[Finding]) -> bool:
    shown = str(clip).encode(errors="backslashreplace").decode()
    if not is_unicode(str(clip)):
        findings.append(finding("bad-path", shown, f"the file name {shown} is not UTF-8", "rename the file"))
        return False
    if (problem := folder.outside(clip, shown)) is not None:
        findings.append(problem)
        return False
    return True


def _read_caption(
    folder: Folder, sample_id: str, clip: PurePosixPath, caption: _Caption | None, findings: list[Finding]
) -> str:
    """Return the text of a sample's caption file; empty, with a finding, if it cannot be read."""
    file = clip.with_suffix(CAPTION_SUFFIX) if caption is None else caption.file
    path = folder.root / file
    if caption is not None and (problem := folder.outside(file, sample_id, "its caption ")) is not None:
        findings.append(problem)
    elif caption is None or not path.is_file():  # a pipe would be waited for without end
        state = "is not a regular file" if path.exists() else "does not exist"
        other = _almost(folder, clip) if caption is None else ""
        message = f"{clip} has no caption: {file} {state}{other}"
        findings.append(finding("missing-caption", sample_id, message, f"describe the clip in {file}"))
    else:
        with os_errors_explained(path, "read"):
            data = folder.in_utf8(read_regular(path), str(file), sample_id, findings)
        if data is None:
            return ""
        try:
            text = _said_in(data) if file.suffix == ".json" else data.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            byte = error.start - data.rfind(b"\n", 0, error.start)
            message = f"byte {byte} of line {line} of {file}, 0x{data[error.start]:02x}, is not UTF-8"
            findings.append(finding("not-utf8", sample_id, message, f"save {file} as UTF-8"))
        else:
            if caption.how:
                folder.taken(str(folder.root), caption.how, str(file))
            return text
    return ""


def _almost(folder: Folder, clip: PurePosixPath) -> str:
    """Describe files with a clip's name that cannot be read as its caption."""
    alike = folder.by_stem.get(_normal_stem(clip), [])
    others = [file.name for file in alike if not may_be_clip(file) and not is_image(file)]
    return f"; {listed(others, 3)} exists, but is not read as a caption" if others else ""


def _normal_stem(file: PurePosixPath) -> str:
    return normal(str(file.with_suffix("")))


def _check_strays(pairs: _Pairs, findings: list[Finding]) -> list[str]:
    """Report captions without a clip; return the quarantine files among them."""
    folder = pairs.folder
    used = {caption.file for caption in pairs.clips.values() if caption is not None}
    quarantines: list[str] = []
    passed_over: list[PurePosixPath] = []
    for file in folder.files:
        if file.suffix.lower() not in (CAPTION_SUFFIX, *OTHER_CAPTION_SUFFIXES) or file in used:
            continue
        if used.intersection(pairs.texts.get(_key(file), {}).values()):
            passed_over.append(file)  # a.caption where a.txt was read
            continue
        if not folder.leads_out(file) and is_quarantine(folder.root / file):
            quarantines.append(str(file))
            continue
        alike = [
            other for other in folder.by_stem.get(_normal_stem(file), []) if other != file and not may_be_clip(other)
        ]
        there = f"; {listed([other.name for other in alike], 3)} is not a known video format" if alike else ""
        message = f"{file} has no clip next to it{there}"
        findings.append(finding("stray-caption", str(file), message, "add its clip, or remove the file"))
    if passed_over:
        message = f"{listed(passed_over, 3)} not read, since its clip has another caption"
        findings.append(finding("left-out", str(folder.root), message, "keep one caption for each clip"))
    return quarantines


def _left_out(pairs: _Pairs) -> Iterator[Finding]:
    """Yield notes about images, and about possible clips, without a caption."""
    root = str(pairs.folder.root)
    images = [file for file in pairs.folder.files if is_image(file)]
    others = [file for file in pairs.folder.files if may_be_clip(file) and file not in pairs.clips]
    if images:
        message = f"{counted(len(images), 'image')} not read: {listed(images, 3)}"
        yield finding("left-out", root, message, "use images.txt or a table to give clips images")
    if others:
        message = f"{counted(len(others), 'possible clip')} without a caption, not read: {listed(others, 3)}"
        yield finding("left-out", root, message, "add a caption for each that is a clip")


def _detect(folder: Folder) -> DataFormat | None:
    pairs = _pairs(folder).clips.values()
    return "sidecar" if any(caption is not None and not caption.how for caption in pairs) else None


def _almost_detect(folder: Folder) -> DataFormat | None:
    return "sidecar" if any(caption is not None for caption in _pairs(folder).clips.values()) else None


SIDECAR = Layout(
    ("sidecar",),
    "sidecar captions",
    "a folder of clips, each with a text file of the same name next to it (a.mp4, a.txt)",
    _detect,
    _read,
    _almost_detect,
)
