"""What every layout of a dataset shares: the sample, how a folder is to be read, and which paths may be opened."""

from __future__ import annotations

import codecs
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cogtune.config import DataFormat
from cogtune.data.findings import Finding, finding
from cogtune.files import explained

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


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the user says about a folder; what is None is found out.

    Args:
        format: how the folder is laid out.
        caption_column, video_column, image_column: the columns of a table that hold captions and paths.
        allow_outside: whether paths may leave the folder.
        media: where clips that are stored inside a file are written out; ``.cogtune/media`` in the folder when None.
    """

    format: DataFormat | None = None
    caption_column: str | None = None
    video_column: str | None = None
    image_column: str | None = None
    allow_outside: bool = False
    media: Path | None = None


@dataclass(frozen=True)
class Content:
    """What was read from a folder: how it is laid out, in words for the user, and what is in it."""

    announced: str
    samples: list[Sample]
    findings: list[Finding]


@dataclass(frozen=True)
class Layout:
    """One way to lay out a dataset.

    Args:
        formats: what ``--format`` calls it.
        name: what it is called where it is announced.
        expects: the files it is made of, in words.
        detect: the one of ``formats`` that a folder is in, or None when it is laid out in another way.
        read: the folder's samples and findings.
    """

    formats: tuple[DataFormat, ...]
    name: str
    expects: str
    detect: Callable[[Path, Reading], DataFormat | None]
    read: Callable[[Path, Reading], Content]


# ------------------------------------------------------------------------------------------------ lists of paths


@dataclass(frozen=True)
class Place:
    """A path as a list has it, and where it stands there; None for one that could not be read, which is told.

    ``file`` is where the bytes are that came with it, if any did: the path is then no more than their name.
    """

    text: str | None
    where: str
    file: Path | None = None


@dataclass(frozen=True)
class Entry:
    """What a list or table says of one sample. A caption of None could not be read, which is told."""

    caption: str | None
    video: Place
    image: Place | None


def to_samples(root: Path, entries: Iterable[Entry], reading: Reading, findings: list[Finding]) -> list[Sample]:
    """A sample of every entry that is whole and whose paths may be opened; ``findings`` gets what is wrong."""
    inside = root.resolve()
    usable: list[tuple[Entry, PurePosixPath, PurePosixPath | None]] = []
    for entry in entries:
        video = _checked_path(inside, entry.video, reading, findings)
        image = None if entry.image is None else _checked_path(inside, entry.image, reading, findings)
        if entry.caption is not None and video is not None and (image is not None or entry.image is None):
            usable.append((entry, video, image))
    samples = []
    for identity, (entry, video, image) in zip(ids([video for _, video, _ in usable]), usable, strict=True):
        files = {"video": entry.video.file or root / video}
        if image is not None and entry.image is not None:
            files["image"] = entry.image.file or root / image
        samples.append(Sample(identity, files["video"], entry.caption or "", files.get("image")))
        for code, file in (("missing-video", video), ("missing-image", image)):
            if file is not None and not files[code.removeprefix("missing-")].is_file():
                findings.append(finding(code, identity, f"{file} is not there", _where_to_look(root, file)))
    return samples


def _where_to_look(root: Path, file: PurePosixPath) -> str:
    if "\\" in str(file):
        return "write / between folders, not \\"
    if (root / "videos" / file).is_file():
        return f"paths start at the dataset's folder: write videos/{file}"
    return f"paths start at {root}"


def _checked_path(inside: Path, place: Place, reading: Reading, findings: list[Finding]) -> PurePosixPath | None:
    """The path at a place, relative to the dataset, or None and a finding when it must not be opened."""
    if place.text is None:
        return None
    if place.file is not None:
        return PurePosixPath(place.text)
    plain = posixpath.normpath(place.text)
    try:
        target = (inside / plain).resolve()
        target.is_file()
        if target == inside:
            raise ValueError("it is the dataset's folder itself")
        if PurePosixPath(plain).name in ("", ".."):
            raise ValueError("it is a folder")
    except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, a NUL character
        reason = getattr(error, "strerror", None) or error
        message = f"{shortened(place.text)!r} is not a usable path: {reason}"
        findings.append(finding("bad-path", place.where, message, "name a file in the dataset's folder"))
        return None
    leaves = PurePosixPath(place.text).is_absolute() or not target.is_relative_to(inside)
    if leaves and not reading.allow_outside:
        findings.append(
            finding(
                "outside-folder",
                place.where,
                f"{shortened(place.text)} leaves the dataset's folder",
                "put the file in the dataset's folder and write its path relative to that, or give --allow-outside",
            )
        )
        return None
    return PurePosixPath(plain)


def shortened(text: str, most: int = 120) -> str:
    """``text``, or as much of it as fits into ``most`` characters."""
    return text if len(text) <= most else text[: most - 3] + "..."


# --------------------------------------------------------------------------------------------------------- files


def read_text_bytes(root: Path, name: str, findings: list[Finding]) -> bytes | None:
    """What is in a text file, without the byte order mark; None and a finding when it is UTF-16.

    Raises:
        CogtuneError: the file cannot be read.
    """
    with explained(root / name, "read"):
        data = (root / name).read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        findings.append(finding("not-utf8", name, f"{name} is UTF-16, not UTF-8", "save it again as UTF-8"))
        return None
    return data.removeprefix(codecs.BOM_UTF8)


def not_utf8(name: str, number: int, error: UnicodeDecodeError) -> Finding:
    """The finding about a line of ``name``, from the error of decoding that line."""
    return finding(
        "not-utf8",
        f"{name}:{number}",
        f"byte {error.start + 1} of line {number}, 0x{error.object[error.start]:02x}, is not UTF-8",
        f"save {name} again as UTF-8",
    )


def files_under(
    root: Path, *, follow: bool, refused: Callable[[OSError], None] | None = None
) -> dict[PurePosixPath, None]:
    """Every file under ``root``, sorted, hidden ones left out; linked folders too, unless they lead out and ``follow``.

    A linked folder that leads to another place in the dataset is never entered: its files are there already.
    A folder that cannot be read is passed by; ``refused`` gets its error.
    """
    found: list[PurePosixPath] = []
    inside = root.resolve()
    entered = {inside}
    for folder, folders, names in os.walk(root, onerror=refused, followlinks=follow):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if follow:
            folders[:] = [name for name in folders if _enter(Path(folder, name), inside, entered)]
        relative = PurePosixPath(Path(folder).relative_to(root).as_posix())
        found += [relative / name for name in names if not name.startswith(".")]
    return dict.fromkeys(sorted(found))


def _enter(folder: Path, inside: Path, entered: set[Path]) -> bool:
    """Whether to walk into a folder: not twice, which a loop of links would do without end."""
    target = Path(os.path.realpath(folder))
    if target in entered or (folder.is_symlink() and target.is_relative_to(inside)):
        return False
    entered.add(target)
    return True


def is_clip(file: PurePosixPath) -> bool:
    """Whether a file is a clip, by its name."""
    return file.suffix.lower() in VIDEO_SUFFIXES


def ids(videos: Sequence[PurePosixPath]) -> Iterator[str]:
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
