"""The nearest match of a missing file: read if it is unambiguous, else named in the hint."""

from __future__ import annotations

import difflib
import itertools
import os
import posixpath
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from cogtune.data.findings import listed
from cogtune.data.layouts.folder import Folder
from cogtune.data.layouts.media import is_clip, is_image, may_be_clip
from cogtune.data.layouts.spelling import nfc, normal, unquoted
from cogtune.data.video.numbered import as_clip, is_pattern

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")

_MOST_COMPARED = 5000
"""Most comparisons with missing names in all, since their number grows with the product."""

_MOST_ALIKE = 20
"""Most names of one spelling that are compared."""

_TABLES = {".xlsx", ".xls", ".ods", ".xml", ".yaml", ".yml", ".db", ".sqlite", ".feather"}
_WITH_TEXT = {".csv", ".json", ".jsonl", ".md", ".srt", ".toml", ".tsv", ".txt", ".vtt"}
_READ_AT_THE_TOP = {".csv", ".jsonl", ".parquet", ".tsv"}
_PACKED = {".zip", ".7z", ".rar", ".gz", ".tgz", ".bz2", ".xz", ".zst"}


class Nearest:
    """Finder of the nearest file to missing paths, cheap however many there are."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._prefixes: list[str] = []
        """Prefixes that paths lacked so far; the next path probably lacks them, too."""
        self._patience = _MOST_COMPARED

    def same_file(self, text: str, *, image: bool = False) -> tuple[PurePosixPath, str] | None:
        """Return the only file that a missing path can mean, and how it differs; None if it is ambiguous.

        Args:
            image: whether the file is an image, not a clip.
        """
        plain = unquoted(text)
        slashed = plain if "/" in plain else plain.replace("\\", "/")
        path = posixpath.normpath(slashed)
        there = self.folder.by_spelling.get(normal(path), [])
        alike = [file for file in there[:_MOST_ALIKE] if nfc(str(file)) == nfc(path)] or there
        if not there:
            named = [
                file
                for file in self.folder.by_stem.get(normal(path), [])[:_MOST_ALIKE]
                if (is_image(file) if image else may_be_clip(file))
            ]
            return (named[0], "names found with a suffix, such as a.mp4 for a") if len(named) == 1 else None
        if len(alike) != 1:
            return None
        if plain != text:
            return alike[0], "paths read without the quotes around them"
        if slashed != plain:
            return alike[0], "paths read with / in place of \\"
        if nfc(str(alike[0])) == nfc(path):
            return alike[0], "paths found in another Unicode form (NFC or NFD)"
        return alike[0], "paths found in different upper and lower case"

    def where_to_look(self, text: str, *, image: bool = False) -> str:
        """Return the hint about a missing path: the nearest file, or the folder that paths are relative to.

        Args:
            image: whether the file is an image, not a clip.
        """
        path = PurePosixPath(posixpath.normpath(unquoted(text).replace("\\", "/")))
        if not image and is_pattern(str(path)):
            return f"clips are videos, not numbered images; {as_clip(str(path))}"
        if not image and (images := self._images_in(path)):
            return f"clips are videos, not folders of images; {as_clip(str(images[0]))}"
        if found := self.elsewhere(text):
            return f"paths are relative to the dataset's folder; use {found}"
        if _URL.match(text):
            return "download it to the dataset's folder, and use its path there"
        if not path.is_absolute() and path.name:
            of_stem = self.folder.by_stem.get(normal(str(path.with_suffix(""))), [])
            if clips := [file for file in of_stem[:_MOST_ALIKE] if may_be_clip(file) == may_be_clip(path)]:
                return f"did you mean {listed(clips, 3)}?"
            if near := self._misspelt(path):
                return f"did you mean {near}?"
        return f"paths are relative to {self.folder.root}"

    def _images_in(self, path: PurePosixPath) -> list[PurePosixPath]:
        """Return the images in a folder of the dataset."""
        if path.is_absolute() or ".." in path.parts or not (self.folder.root / path).is_dir():
            return []
        return [path / name for name in self.folder.files_in(str(path)) if is_image(PurePosixPath(name))]

    def elsewhere(self, text: str) -> str:
        """Return the only file in another folder of the dataset that a path can mean; else empty."""
        path = posixpath.normpath(unquoted(text).replace("\\", "/"))
        wanted = normal(path).lstrip("/")
        for prefix in self._prefixes:
            if found := self.folder.by_spelling.get(prefix + wanted):
                return str(found[0])
        parts = wanted.split("/")
        for begin in range(len(parts)):  # a path of another machine: its end may be the same
            if found := self.folder.by_spelling.get("/".join(parts[begin:])):
                return str(found[0])
        of_name = self.folder.by_name.get(parts[-1], [])
        if len(of_name) > self._patience:
            return ""
        self._patience -= len(of_name)
        for file in of_name:
            if normal(str(file)).endswith(f"/{wanted}"):
                self._prefixes.append(normal(str(file)).removesuffix(wanted))
                return str(file)
        return str(of_name[0]) if len(of_name) == 1 else ""

    def _misspelt(self, path: PurePosixPath) -> str:
        if len(self.folder.files) > self._patience:
            return ""
        self._patience -= len(self.folder.files)
        names = [str(file) for file in self.folder.files if file.suffix.lower() == path.suffix.lower()]
        near = difflib.get_close_matches(str(path), names, n=1, cutoff=0.8)
        return near[0] if near else ""


def same_name(name: str, there: Iterable[str], others: Sequence[str] = ()) -> str | None:
    """Return the file in ``there`` called ``name``, ignoring case if necessary, or like one of ``others``."""
    known = sorted(there)
    if name in known:
        return name
    for wanted in (name, *others):
        alike = [other for other in known if normal(other) == normal(wanted)]
        if alike:
            return alike[0]
    return None


def look_alike(path: Path) -> str:
    """Return the hint about a missing file of the user: the nearest name in its folder, or empty."""
    if os.path.lexists(path):  # what is wrong with it is something else
        return ""
    try:
        names = [other.name for other in itertools.islice(path.parent.iterdir(), _MOST_COMPARED)]
    except OSError:
        return ""
    same = [name for name in names if normal(name) == normal(unquoted(path.name))]
    near = same or difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def in_place_of_folder(path: Path) -> str:
    """Return the hint about a path that is not a dataset's folder; empty if there is no near match."""
    suffix = path.suffix.lower()
    if path.is_file():
        if suffix in _PACKED:
            return "unpack it and pass the folder"
        how = ", with --format datasets" if suffix in (".tar", ".arrow") else ""
        return f"pass the folder that contains it: {path.absolute().parent}{how}"
    if _URL.match(str(path)):
        return "download it and pass the folder"
    meant = Path(unquoted(str(path).strip()).strip().replace("\\", "/"))
    return f"did you mean {meant}?" if meant.is_dir() else look_alike(meant).removeprefix("; ")


def what_is_there(folder: Folder) -> str:
    """Return what a folder that is not a dataset contains, with how to make it one; else empty."""
    tables = [name for name in folder.top if PurePosixPath(name).suffix.lower() in _TABLES]
    deeper = [file for file in folder.files if len(file.parts) > 1 and file.suffix.lower() in _READ_AT_THE_TOP]
    objects = [name for name in folder.top if name.lower().endswith(".json")]
    packed = [name for name in folder.top if PurePosixPath(name).suffix.lower() in _PACKED]
    shards = [name for name in folder.top if name.lower().endswith((".tar", ".arrow"))]
    lists = [name for name in folder.subfolders if same_name("videos.txt", folder.files_in(name)) is not None]
    pictures = [file for file in folder.files if is_image(file)]
    others = [file for file in folder.files if file.suffix.lower() in _WITH_TEXT]
    if lists:
        return f"its folder {listed(lists, 3)} contains lists: pass that folder"
    if shards:
        return f"it contains {listed(shards, 3)}: use --format datasets if the datasets library can load it"
    if tables:
        return f"it contains {listed(tables, 3)}: save it as CSV"
    if objects:
        return f"it contains {listed(objects, 3)}, but not an array of objects, one for each sample"
    if deeper:
        return f"it contains {listed(deeper, 3)}: move the table to the folder itself, or pass its folder"
    if packed:
        return f"it contains {listed(packed, 3)}: unpack it first"
    if pictures and not any(is_clip(file) for file in folder.files):
        return f"it contains {listed(pictures, 3)}, but clips are videos; {as_clip(str(pictures[0]))}"
    return (
        f"it contains {listed(others, 3)}, {'which is' if len(others) == 1 else 'which are'} in no known format"
        if others
        else ""
    )
