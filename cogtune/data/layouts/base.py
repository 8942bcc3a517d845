"""The base of all dataset layouts: samples, the layout type, and how listed paths become samples."""

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
        id: the clip's path in the dataset, with ``/``, without suffix and in composed Unicode; unique.
        video: the clip's file.
        caption: its text, without surrounding whitespace.
        image: the conditioning image of an image-to-video sample, if the dataset has one.
    """

    id: str
    video: Path
    caption: str
    image: Path | None = None


@dataclass(frozen=True)
class Unpaired:
    """Listed clips and captions that could not be paired; they are checked, too, so that all problems are reported.

    Args:
        clips: samples without a caption.
        captions: samples without a clip, each with its list and line as its id.
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
        formats: its names for ``--format``.
        name: its name in messages.
        expects: a description of its files.
        detect: returns the one of ``formats`` that a folder is in, or None for another layout.
        read: returns the folder's samples and findings.
        almost: like ``detect``, for a folder that matches no documented layout but is clearly meant to be this one.
        has_columns: whether the user may choose columns.
        names_clips: whether its files name each clip, so that other clips in the folder are ignored.
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
    """A path in a list, and its place there; None for one that could not be read, which is a finding.

    ``file`` holds the bytes that came with it, if any: the path is then only their name.
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
    """A file that an entry names: its path in the dataset, where it is, and the hint if it does not exist."""

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
    """Return a sample for every complete entry whose paths may be opened, and add problems to ``findings``.

    Args:
        base: the folder that paths are relative to, within the dataset's.
        role: what the entries' ``video`` is, in lists that are checked one by one.
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
                findings.append(finding(code, where, f"{located.path} {_state(located.file)}", located.hint))
    return samples


def _state(file: Path) -> str:
    """Return why a listed file is missing."""
    return "is a folder, not a file" if file.is_dir() else "does not exist"


class _Paths:
    """Resolver of listed paths to files of the dataset."""

    def __init__(self, folder: Folder, base: PurePosixPath) -> None:
        self.folder, self.base = folder, base
        self._roots = (str(folder.root.absolute()), str(folder.inside))
        self._nearest = Nearest(folder)

    def locate(self, place: ListedPath, findings: list[Finding], *, image: bool) -> _Located | None:
        """Return the file of a listed path, or None and a finding if it must not be opened."""
        if place.text is None:
            return None
        if place.file is not None:
            return _Located(PurePosixPath(nfc(place.text)), place.file)
        try:
            path, leaves, there = self._found(place.text, place.where, image=image)
        except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, a NUL character
            reason = getattr(error, "strerror", None) or error
            message = f"{shortened(place.text)!r} is not a valid path: {reason}"
            findings.append(finding("bad-path", place.where, message, "use the path of a file in the dataset's folder"))
            return None
        if leaves:
            findings.append(self._outside(place, path))
            return None
        hint = "" if there else self._nearest.where_to_look(path, image=image)
        return _Located(PurePosixPath(path), self.folder.root / path, hint)

    def _found(self, text: str, where: str, *, image: bool) -> tuple[str, bool, bool]:
        """Return the intended path, whether it leads out of the dataset, and whether the file exists.

        Raises:
            OSError, RuntimeError, ValueError: it is not a valid path.
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
        """Return a path relative to the dataset's folder, also for an absolute path in it."""
        path = posixpath.normpath(text)
        bare = path if path.startswith("/") else posixpath.normpath(unquoted(text))
        for root in self._roots if bare.startswith("/") else ():
            if bare == root or bare.startswith(f"{root}/"):
                return bare[len(root) + 1 :]
        return path if path.startswith("/") or not base.parts else posixpath.normpath(f"{base}/{path}")

    def _look(self, path: str) -> tuple[bool, bool]:
        """Return whether a path leads out of the dataset, and whether the file exists, which is not checked outside."""
        if path in ("", "."):
            raise ValueError("it is the dataset's folder itself")
        if PurePosixPath(path).name in ("", ".."):
            raise ValueError("it is a folder")
        if self.folder.leads_out(path):
            return True, not path.startswith(("/", "../"))
        return False, (self.folder.root / path).is_file()

    def _outside(self, place: ListedPath, path: str) -> Finding:
        hint = "move the file to the dataset's folder and use its path relative to that, or use --allow-outside"
        if near := self._nearest.elsewhere(path):
            hint = f"use {near}, which is in the dataset's folder, or use --allow-outside"
        message = f"{shortened(place.text or '')} leads out of the dataset's folder"
        return finding("outside-folder", place.where, message, hint)


def shortened(text: str, most: int = 120) -> str:
    """Return ``text``, truncated to ``most`` characters."""
    return text if len(text) <= most else text[: most - 3] + "..."


def ids(videos: Sequence[PurePosixPath]) -> Iterator[str]:
    """Yield unique ids: paths without suffix, unless only the suffix differs; a repeated one gets ``#2``."""
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
