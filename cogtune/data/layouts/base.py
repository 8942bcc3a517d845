"""What every layout of a dataset shares: the sample, what a layout is, and how its paths become samples."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

from cogtune.config.choices import DataFormat
from cogtune.data.findings import Finding, finding
from cogtune.data.layouts.folder import Folder, LayoutOptions
from cogtune.data.layouts.nearest import Nearest
from cogtune.data.layouts.spelling import nfc, unquoted

__all__ = [
    "DatasetEntry",
    "Folder",
    "Layout",
    "LayoutContent",
    "LayoutOptions",
    "ListedPath",
    "Sample",
    "ids",
    "shortened",
    "to_samples",
]

_TOP = PurePosixPath()

_TOLD_EVERY = 1000
"""The number of entries after which reading reports its progress."""


@dataclass(frozen=True)
class Sample:
    """One training pair.

    Args:
        id: the clip's path in the dataset, with ``/`` and without suffix, in composed Unicode; unique in the dataset.
        video: the clip's file.
        caption: its text, without surrounding blanks.
        image: the conditioning image of an image-to-video sample, when the dataset has one.
    """

    id: str
    video: Path
    caption: str
    image: Path | None = None


@dataclass(frozen=True)
class Unpaired:
    """What a dataset lists that could not be paired: it is checked as well, so that all problems are reported.

    Args:
        clips: samples without a caption.
        captions: samples without a clip, each with its list and line for an id.
    """

    clips: tuple[Sample, ...] = ()
    captions: tuple[Sample, ...] = ()


@dataclass(frozen=True)
class LayoutContent:
    """The contents of a folder, and a description of its layout."""

    announced: str
    samples: list[Sample]
    findings: list[Finding]
    unpaired: Unpaired = field(default_factory=Unpaired)


@dataclass(frozen=True)
class Layout:
    """One way to lay out a dataset.

    Args:
        formats: what ``--format`` calls it.
        name: what it is called where it is announced.
        expects: a description of its files.
        detect: the one of ``formats`` that a folder is in, or None when it is laid out in another way.
        read: the folder's samples and findings.
        almost: as ``detect``, for a folder that is in no layout as documented, but plainly meant to be in this one.
        has_columns: whether the user may say which columns hold what.
        names_clips: whether its files name each clip, so that others in the folder are left out.
    """

    formats: tuple[DataFormat, ...]
    name: str
    expects: str
    detect: Callable[[Folder], DataFormat | None]
    read: Callable[[Folder], LayoutContent]
    almost: Callable[[Folder], DataFormat | None] = lambda _folder: None
    has_columns: bool = False
    names_clips: bool = False


# ------------------------------------------------------------------------------------------------ lists of paths


@dataclass(frozen=True)
class ListedPath:
    """A path as a list has it, and where it stands there; None for one that could not be read, which is a finding.

    ``file`` is where the bytes are that came with it, if any did: the path is then no more than their name.
    """

    text: str | None
    where: str
    file: Path | None = None


@dataclass(frozen=True)
class DatasetEntry:
    """A sample's entry in a list or table. A caption of None could not be read, which is a finding."""

    caption: str | None
    video: ListedPath
    image: ListedPath | None


@dataclass(frozen=True)
class _Located:
    """A file that an entry names: its path in the dataset, where it is, and the hint if it is not there."""

    path: PurePosixPath
    file: Path
    hint: str = ""


def to_samples(
    folder: Folder,
    entries: Sequence[DatasetEntry],
    findings: list[Finding],
    *,
    base: PurePosixPath = _TOP,
    role: Literal["video", "image"] = "video",
) -> list[Sample]:
    """Return a sample of every entry that is whole and whose paths may be opened; ``findings`` gets what is wrong.

    Args:
        base: the folder that paths start at, relative to the dataset's.
        role: what the entries' ``video`` is, in lists that are looked at one by one.
    """
    paths = _Paths(folder, base)
    usable: list[tuple[DatasetEntry, _Located, _Located | None]] = []
    for number, entry in enumerate(entries, start=1):
        video = paths.locate(entry.video, findings, image=role == "image")
        image = None if entry.image is None else paths.locate(entry.image, findings, image=True)
        if entry.caption is not None and video is not None and (image is not None or entry.image is None):
            usable.append((entry, video, image))
        if number % _TOLD_EVERY == 0 or number == len(entries):
            folder.tell(number, len(entries))
    samples = []
    names = ids([PurePosixPath(nfc(str(video.path))) for _, video, _ in usable])
    for sample_id, (entry, video, image) in zip(names, usable, strict=True):
        samples.append(Sample(sample_id, video.file, entry.caption or "", image.file if image else None))
        for code, located in ((f"missing-{role}", video), ("missing-image", image)):
            if located is not None and located.hint:
                where = sample_id if role == "video" else entry.video.where
                findings.append(finding(code, where, f"{located.path} is not there", located.hint))
    return samples


class _Paths:
    """Paths as lists and tables have them become files of the dataset."""

    def __init__(self, folder: Folder, base: PurePosixPath) -> None:
        self.folder, self.base = folder, base
        self._roots = (str(folder.root.absolute()), str(folder.inside))
        self._nearest = Nearest(folder)

    def locate(self, place: ListedPath, findings: list[Finding], *, image: bool) -> _Located | None:
        """Return the file at a place, or None and a finding when it must not be opened."""
        if place.text is None:
            return None
        if place.file is not None:
            return _Located(PurePosixPath(nfc(place.text)), place.file)
        try:
            path, leaves, there = self._found(place.text, place.where, image=image)
        except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, a NUL character
            reason = getattr(error, "strerror", None) or error
            message = f"{shortened(place.text)!r} is not a usable path: {reason}"
            findings.append(finding("bad-path", place.where, message, "name a file in the dataset's folder"))
            return None
        if leaves:
            findings.append(self._outside(place, path))
            return None
        hint = "" if there else self._nearest.where_to_look(path)
        return _Located(PurePosixPath(path), self.folder.root / path, hint)

    def _found(self, text: str, where: str, *, image: bool) -> tuple[str, bool, bool]:
        """Return the path that is meant, whether it leaves the dataset, and whether there is a file.

        Raises:
            OSError, RuntimeError, ValueError: it is not a usable path.
        """
        paths = [self._inside(text, base) for base in dict.fromkeys((self.base, _TOP))]
        looks = [(path, *self._look(path)) for path in paths]
        for path, leaves, there in looks:
            if there:
                return path, leaves, there
        for path in paths:
            if (same := self._nearest.same_file(path, image=image)) is not None:
                self.folder.taken(where.rpartition(":")[0], same[1], str(same[0]))
                return (str(same[0]), *self._look(str(same[0])))
        return looks[0]

    def _inside(self, text: str, base: PurePosixPath) -> str:
        """Return a path from the dataset's folder on, also when it is written as an absolute one of a file in it."""
        path = posixpath.normpath(text)
        bare = path if path.startswith("/") else posixpath.normpath(unquoted(text))
        for root in self._roots if bare.startswith("/") else ():
            if bare == root or bare.startswith(f"{root}/"):
                return bare[len(root) + 1 :]
        return path if path.startswith("/") or not base.parts else posixpath.normpath(f"{base}/{path}")

    def _look(self, path: str) -> tuple[bool, bool]:
        """Return whether a path leaves the dataset, and whether there is a file; what leaves is not looked at."""
        if path in ("", "."):
            raise ValueError("it is the dataset's folder itself")
        if PurePosixPath(path).name in ("", ".."):
            raise ValueError("it is a folder")
        if self.folder.leads_out(path):
            return True, not path.startswith(("/", "../"))
        return False, (self.folder.root / path).is_file()

    def _outside(self, place: ListedPath, path: str) -> Finding:
        hint = "put the file in the dataset's folder and write its path relative to that, or give --allow-outside"
        if near := self._nearest.elsewhere(path):
            hint = f"{near} is in the dataset's folder: write that, or give --allow-outside"
        message = f"{shortened(place.text or '')} leaves the dataset's folder"
        return finding("outside-folder", place.where, message, hint)


def shortened(text: str, most: int = 120) -> str:
    """Return ``text``, or as much of it as fits into ``most`` characters."""
    return text if len(text) <= most else text[: most - 3] + "..."


def ids(videos: Sequence[PurePosixPath]) -> Iterator[str]:
    """Yield a unique id each: the path without suffix, unless that tells two clips apart; ``#2`` on a repeat."""
    stems = Counter(video.with_suffix("") for video in set(videos))
    taken: set[str] = set()
    counts: dict[str, int] = {}
    for video in videos:
        stem = video.with_suffix("")
        plain = str(video if stems[stem] > 1 else stem)
        sample_id, count = plain, counts.get(plain, 1)
        while sample_id in taken:
            count += 1
            sample_id = f"{plain}#{count}"
        counts[plain] = count
        taken.add(sample_id)
        yield sample_id
