"""A folder on disk becomes samples: which clip belongs to which caption, by whatever layout it is in."""

from __future__ import annotations

import codecs
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cogtune.data.findings import Finding, finding, listed
from cogtune.errors import CogtuneError
from cogtune.files import explained

CAPTIONS, VIDEOS, IMAGES = "prompts.txt", "videos.txt", "images.txt"

VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpg", ".webm"})
"""File names that are taken for clips in a layout without a list of them (compared in lower case)."""


@dataclass(frozen=True)
class Sample:
    """One training pair.

    Args:
        id: the clip's path in the dataset, with ``/`` and without suffix; unique in the dataset.
        video: the clip's file.
        caption: its text, without surrounding blanks.
        image: the conditioning image of an image-to-video sample, when the dataset has one.
    """

    id: str
    video: Path
    caption: str
    image: Path | None = None


@dataclass(frozen=True)
class Dataset:
    """What a folder holds: the pairs that could be made, and all that stood in the way of others.

    ``samples`` names some files that are missing (each has its finding), none that lies outside ``root``.
    """

    root: Path
    layout: str
    samples: tuple[Sample, ...]
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Layout:
    """One way to lay out a dataset.

    Args:
        name: what it is called where it is announced.
        expects: the files it is made of, in words.
        matches: whether a folder is laid out like this.
        read: the folder's samples and findings.
    """

    name: str
    expects: str
    matches: Callable[[Path], bool]
    read: Callable[[Path], tuple[list[Sample], list[Finding]]]


def read_dataset(root: Path) -> Dataset:
    """The dataset in the folder ``root``, in whichever of :data:`LAYOUTS` it is.

    No clip is opened: what is wrong with the lists, paths and missing files becomes findings, all of it.

    Raises:
        CogtuneError: there is no such folder, or it is in no known layout.
    """
    if not root.is_dir():
        state = "is a file, not a folder" if root.is_file() else "does not exist"
        raise CogtuneError(f"the dataset folder {root} {state}", f"a dataset is {_expected()}")
    for layout in LAYOUTS:
        if layout.matches(root):
            samples, findings = layout.read(root)
            if not samples and not findings:
                message = f"{root} lists no sample"
                findings.append(finding("no-samples", str(root), message, f"a dataset is {layout.expects}"))
            return Dataset(root, layout.name, tuple(samples), tuple(findings))
    clips = [path for path in _files(root) if _is_clip(path)]
    if clips:
        problem = f"{root} holds {len(clips)} clips ({listed(clips, 3)}), but nothing says what they show"
    else:
        problem = f"{root} holds no dataset: neither lists of clips nor captioned clips are in it"
    raise CogtuneError(problem, f"a dataset is {_expected()}")


def _expected() -> str:
    return "; or ".join(f"{layout.expects} ({layout.name})" for layout in LAYOUTS)


# ------------------------------------------------------------------------------------------- lists of lines


def _read_lists(root: Path) -> tuple[list[Sample], list[Finding]]:
    findings: list[Finding] = []
    lists: dict[str, list[str | None]] = {}
    complete = True
    for name, partner in ((CAPTIONS, VIDEOS), (VIDEOS, CAPTIONS), (IMAGES, "")):
        if (root / name).is_file():
            lines = _read_lines(root, name, findings)
            if lines is None:
                complete = False
            else:
                lists[name] = lines
        elif partner:
            complete = False
            message = f"{partner} is there, but {name} is not"
            findings.append(finding("missing-list", name, message, f"a dataset is {LISTS.expects}"))
    if not complete:
        return [], findings
    unpaired = [*_blank_lines(lists), *_unequal_counts(lists)]
    if unpaired:
        return [], findings + unpaired
    return _pair(root, lists, findings), findings


def _read_lines(root: Path, name: str, findings: list[Finding]) -> list[str | None] | None:
    """The stripped lines of a list, blank ones at its end left out; None for a line that is not UTF-8.

    None in place of the list when the whole file is in another encoding.
    """
    with explained(root / name, "read"):
        data = (root / name).read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        findings.append(finding("not-utf8", name, f"{name} is UTF-16, not UTF-8", "save it again as UTF-8"))
        return None
    lines: list[str | None] = []
    for number, raw in enumerate(data.removeprefix(codecs.BOM_UTF8).splitlines(), start=1):
        try:
            lines.append(raw.decode().strip())
        except UnicodeDecodeError as error:
            lines.append(None)
            findings.append(
                finding(
                    "not-utf8",
                    f"{name}:{number}",
                    f"byte {error.start + 1} of line {number}, 0x{raw[error.start]:02x}, is not UTF-8",
                    f"save {name} again as UTF-8",
                )
            )
    while lines and lines[-1] == "":
        lines.pop()
    return lines


def _blank_lines(lists: dict[str, list[str | None]]) -> list[Finding]:
    findings = []
    for name, lines in lists.items():
        blank = [number for number, line in enumerate(lines, start=1) if line == ""]
        if blank:
            lines_are = f"line {blank[0]} is" if len(blank) == 1 else f"lines {listed(blank)} are"
            findings.append(
                finding(
                    "blank-line",
                    f"{name}:{blank[0]}",
                    f"{lines_are} blank in {name}: lines may have shifted, so nothing is paired",
                    "line N of each list is one sample: fill the line in, or delete it from every list",
                )
            )
    return findings


def _unequal_counts(lists: dict[str, list[str | None]]) -> list[Finding]:
    counts = {name: len(lines) for name, lines in lists.items()}
    if len(set(counts.values())) <= 1:
        return []
    longest = max(counts, key=lambda name: counts[name])
    alone = min(counts.values()) + 1
    shown = [f"{name} has {count} line{'' if count == 1 else 's'}" for name, count in counts.items()]
    return [
        finding(
            "line-counts",
            f"{longest}:{alone}",
            f"{listed(shown)}: line {alone} of {longest} has no partner, so nothing is paired",
            "line N of each list is one sample: find the line that is missing or too many",
        )
    ]


def _pair(root: Path, lists: dict[str, list[str | None]], findings: list[Finding]) -> list[Sample]:
    """Line N of every list becomes one sample, unless a line is unreadable or its path must not be opened."""
    inside = root.resolve()
    videos: list[PurePosixPath] = []
    images: list[PurePosixPath | None] = []
    captions: list[str] = []
    for number, caption in enumerate(lists[CAPTIONS], start=1):
        video = _checked_path(inside, lists[VIDEOS][number - 1], VIDEOS, number, findings)
        image = None
        if IMAGES in lists:
            image = _checked_path(inside, lists[IMAGES][number - 1], IMAGES, number, findings)
        if video is not None and caption is not None and (image is not None or IMAGES not in lists):
            videos.append(video)
            images.append(image)
            captions.append(caption)
    samples = []
    for identity, video, image, caption in zip(_ids(videos), videos, images, captions, strict=True):
        sample = Sample(identity, root / video, caption, root / image if image else None)
        samples.append(sample)
        for code, file in (("missing-video", video), ("missing-image", image)):
            if file is not None and not (root / file).is_file():
                findings.append(finding(code, identity, f"{file} is not there", _where_to_look(root, file)))
    return samples


def _where_to_look(root: Path, file: PurePosixPath) -> str:
    if "\\" in str(file):
        return "write / between folders, not \\"
    if (root / "videos" / file).is_file():
        return f"paths start at the dataset's folder: write videos/{file}"
    return f"paths start at {root}"


def _checked_path(
    inside: Path, line: str | None, name: str, number: int, findings: list[Finding]
) -> PurePosixPath | None:
    """The path on a line, relative to the dataset, or None and a finding when it must not be opened."""
    if line is None:
        return None
    where = f"{name}:{number}"
    plain = posixpath.normpath(line)
    try:
        target = (inside / plain).resolve()
        target.is_file()
        if target == inside:
            raise ValueError("it is the dataset's folder itself")
    except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, a NUL character
        reason = getattr(error, "strerror", None) or error
        message = f"{_shortened(line)!r} is not a usable path: {reason}"
        findings.append(finding("bad-path", where, message, "name a file in the dataset's folder"))
        return None
    if PurePosixPath(line).is_absolute() or not target.is_relative_to(inside):
        findings.append(
            finding(
                "outside-folder",
                where,
                f"{_shortened(line)} leaves the dataset's folder",
                "put the file in the dataset's folder, and write its path relative to that",
            )
        )
        return None
    return PurePosixPath(plain)


def _shortened(line: str, most: int = 120) -> str:
    return line if len(line) <= most else line[: most - 3] + "..."


# ------------------------------------------------------------------------------- captions beside their clips


def _read_beside(root: Path) -> tuple[list[Sample], list[Finding]]:
    inside = root.resolve()
    findings: list[Finding] = []
    files = _files(root)
    clips = []
    for file in filter(_is_clip, files):
        shown = str(file).encode(errors="backslashreplace").decode()
        if shown != str(file):
            message = f"the file name {shown} is not UTF-8"
            findings.append(finding("bad-path", shown, message, "rename the file"))
        elif (root / file).resolve().is_relative_to(inside):
            clips.append(file)
        else:
            message = f"{file} is a link that leaves the dataset's folder"
            findings.append(finding("outside-folder", shown, message, "copy the file itself to this place"))
    samples = []
    for identity, clip in zip(_ids(clips), clips, strict=True):
        caption = clip.with_suffix(".txt")
        text = ""
        if caption in files:
            text = _read_caption(root, caption, findings)
        else:
            message = f"{clip} has no caption: {caption} is not there"
            findings.append(finding("missing-caption", identity, message, f"describe the clip in {caption}"))
        samples.append(Sample(identity, root / clip, text))
    captioned = {clip.with_suffix(".txt") for clip in clips}
    for file in files:
        if file.suffix == ".txt" and file not in captioned:
            message = f"{file} has no clip beside it"
            findings.append(finding("stray-caption", str(file), message, "add its clip, or remove the file"))
    return samples, findings


def _read_caption(root: Path, file: PurePosixPath, findings: list[Finding]) -> str:
    """The whole text of a caption file; empty, with a finding, when it is not UTF-8."""
    with explained(root / file, "read"):
        data = (root / file).read_bytes()
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = error.start - data.rfind(b"\n", 0, error.start)
        message = f"byte {byte} of line {line}, 0x{data[error.start]:02x}, is not UTF-8"
        findings.append(finding("not-utf8", f"{file}:{line}", message, f"save {file} again as UTF-8"))
        return ""


def _has_captioned_clip(root: Path) -> bool:
    files = _files(root)
    return any(_is_clip(file) and file.with_suffix(".txt") in files for file in files)


# ---------------------------------------------------------------------------------------------- what both use


def _files(root: Path) -> dict[PurePosixPath, None]:
    """Every file under ``root``, sorted, hidden ones and linked folders left out."""
    found: list[PurePosixPath] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = PurePosixPath(Path(folder).relative_to(root).as_posix())
        found += [relative / name for name in names if not name.startswith(".")]
    return dict.fromkeys(sorted(found))


def _is_clip(file: PurePosixPath) -> bool:
    return file.suffix.lower() in VIDEO_SUFFIXES


def _ids(videos: Sequence[PurePosixPath]) -> Iterator[str]:
    """A unique id each: the path without suffix, unless that tells two clips apart; ``#2`` on a repeat."""
    stems = Counter(video.with_suffix("") for video in set(videos))
    taken: set[str] = set()
    for video in videos:
        plain = str(video if stems[video.with_suffix("")] > 1 else video.with_suffix(""))
        identity, count = plain, 1
        while identity in taken:
            count += 1
            identity = f"{plain}#{count}"
        taken.add(identity)
        yield identity


LISTS = Layout(
    "lists",
    f"{CAPTIONS} and {VIDEOS}, with {IMAGES} if each clip has an image: line N of each is one sample",
    lambda root: (root / CAPTIONS).is_file() or (root / VIDEOS).is_file(),
    _read_lists,
)

BESIDE = Layout(
    "captions beside clips",
    "a folder of clips, each with a text file of the same name beside it (a.mp4, a.txt)",
    _has_captioned_clip,
    _read_beside,
)

LAYOUTS: tuple[Layout, ...] = (LISTS, BESIDE)
"""The known layouts; the first that matches a folder is used."""
