"""A dataset's folder: its files, each walked over once, and which of them may be opened.

Nothing that a dataset names is read from outside its folder unless the user allows it: lists, tables, captions, clips
and images of every layout are asked about in one place, :meth:`Folder.leads_out`.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from cogtune.config.choices import DataFormat
from cogtune.data.findings import Finding, finding, listed
from cogtune.data.layouts import own_files
from cogtune.data.layouts.lines import NotTextError, as_utf8, is_unicode
from cogtune.data.layouts.spelling import normal
from cogtune.system.files import os_errors_explained, read_regular

_SHOWN = 5
"""How many names a note of several files shows."""


@dataclass(frozen=True, kw_only=True)
class LayoutOptions:
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


class Folder:
    """A dataset's folder under one way to read it.

    Args:
        root: the folder.
        reading: how the user wants it read.
        tell: called with how many entries of a list or table are done, and of how many.
    """

    def __init__(
        self, root: Path, reading: LayoutOptions, tell: Callable[[int, int], None] = lambda _done, _total: None
    ):
        self.root, self.reading, self.tell = root, reading, tell
        self.inside = root.resolve()
        self.refused: list[OSError] = []
        """What went wrong with folders that cannot be read; complete after :attr:`files`."""
        self.own: list[str] = []
        """What was passed by because cogtune wrote it; folders end in ``/``."""
        self._resolved: dict[str, bool] = {}
        self._taken: defaultdict[tuple[str, str], list[str]] = defaultdict(list)

    # -------------------------------------------------------------------------------------------- what may be opened

    def leads_out(self, path: str | PurePosixPath | Path) -> bool:
        """Return whether a path, relative to the folder, may not be opened: it leads out, by itself or by a link.

        Raises:
            OSError, RuntimeError, ValueError: it is not a usable path: too long, a loop of links, a NUL character.
        """
        return not self.reading.allow_outside and not self._is_inside(self.root / path)

    def _is_inside(self, path: Path) -> bool:
        parent = str(path.parent)
        if parent not in self._resolved:
            self._resolved[parent] = path.parent.resolve().is_relative_to(self.inside)
        try:
            linked = stat.S_ISLNK(os.lstat(path).st_mode)
        except FileNotFoundError:
            linked = False
        if linked or path.name in ("", ".."):
            return path.resolve().is_relative_to(self.inside)
        return self._resolved[parent]

    def outside(self, path: str | PurePosixPath, where: str, what: str = "") -> Finding | None:
        """Return the finding about a file of the dataset that is a link leading out; None when it may be opened."""
        try:
            if not self.leads_out(path):
                return None
        except (OSError, RuntimeError, ValueError) as error:
            return finding("bad-path", where, f"{path} is not a usable path: {error}", "replace the file")
        message = f"{what}{path} is a link that leaves the dataset's folder"
        return finding("outside-folder", where, message, "copy the file itself to this place, or give --allow-outside")

    def read_text(self, name: str, findings: list[Finding]) -> bytes | None:
        """Return what is in a list or table, in UTF-8; None and a finding when it may not be opened or is no text.

        Raises:
            CogtuneError: the file cannot be read.
        """
        if (problem := self.outside(name, name)) is not None:
            findings.append(problem)
            return None
        with os_errors_explained(self.root / name, "read"):
            data = read_regular(self.root / name)
        return self.in_utf8(data, name, name, findings)

    def in_utf8(self, data: bytes, name: str, where: str, findings: list[Finding]) -> bytes | None:
        """Return a text file's bytes in UTF-8, noted if they were not; None and a finding when they are no text.

        Args:
            where: the place in the dataset that ``name`` belongs to.
        """
        try:
            text, encoding = as_utf8(data)
        except NotTextError as error:
            findings.append(finding("not-utf8", where, f"{name} {error}", f"save {name} again as UTF-8"))
            return None
        if encoding:
            self.taken(str(self.root), f"read as {encoding}, not UTF-8", name)
        return text

    # ------------------------------------------------------------------------------------------------ what is there

    @cached_property
    def top(self) -> tuple[str, ...]:
        """The names of the files in the folder itself, sorted; hidden ones and cogtune's own left out."""
        return self._named(self.root)

    @cached_property
    def subfolders(self) -> tuple[str, ...]:
        """The names of the folders in the folder, sorted; hidden ones, links out and cogtune's own left out."""
        with os_errors_explained(self.root, "read"):
            folders, _ = _content(self.root)
        return tuple(name for name in sorted(folders) if not name.startswith(".") and not self._passed_by(name))

    def files_in(self, name: str) -> tuple[str, ...]:
        """Return the names of the files in a sub-folder, as :attr:`top`."""
        return self._named(self.root / name)

    def _passed_by(self, name: str) -> bool:
        if self.leads_out(name):
            return True
        try:
            folders, files = _content(self.root / name)
        except OSError:
            return True
        return own_files.is_own(name, folders, files)

    def _named(self, at: Path) -> tuple[str, ...]:
        with os_errors_explained(at, "read"):
            folders, files = _content(at)
        ours: frozenset[str] = own_files.RUN_FILES if own_files.is_run(folders, files) else frozenset()
        return tuple(sorted(name for name in files if name not in ours and not name.startswith(".")))

    @cached_property
    def files(self) -> dict[PurePosixPath, None]:
        """Every file, sorted; left out are hidden ones and what cogtune wrote.

        Linked folders too, if they lead out and the user allows that. One that leads to another place in the dataset
        is never entered: its files are there already. A folder that cannot be read is passed by.
        """
        found: list[PurePosixPath] = []
        follow = self.reading.allow_outside
        entered = {self.inside}
        for at, folders, names in os.walk(self.root, onerror=self.refused.append, followlinks=follow):
            relative = PurePosixPath(Path(at).relative_to(self.root).as_posix())
            top = relative == PurePosixPath(".")
            if not top and own_files.is_own(relative.name, folders, names):
                self.own.append(f"{relative}/")
                folders.clear()
                continue
            if own_files.is_run(folders, names):
                ours = [name for name in folders if own_files.of_run(name)]
                self.own += [*(f"{name}/" for name in sorted(ours)), *sorted(own_files.RUN_FILES.intersection(names))]
                folders[:] = [name for name in folders if name not in ours]
                names = [name for name in names if name not in own_files.RUN_FILES]
            folders[:] = [name for name in folders if not name.startswith(".")]
            if follow:
                folders[:] = [name for name in folders if self._enter(Path(at, name), entered)]
            found += [relative / name for name in names if not name.startswith(".")]
        found.sort(key=lambda file: file.parts)
        return dict.fromkeys(found)

    def _enter(self, folder: Path, entered: set[Path]) -> bool:
        """Return whether to walk into a folder: not twice, which a loop of links would do without end."""
        target = Path(os.path.realpath(folder))
        if target in entered or (folder.is_symlink() and target.is_relative_to(self.inside)):
            return False
        entered.add(target)
        return True

    @cached_property
    def by_spelling(self) -> dict[str, list[PurePosixPath]]:
        """The files by their path in one spelling: Unicode form and upper and lower case do not matter."""
        return self._grouped(lambda file: normal(str(file)))

    @cached_property
    def by_name(self) -> dict[str, list[PurePosixPath]]:
        """The files by their name alone, in one spelling."""
        return self._grouped(lambda file: normal(file.name))

    @cached_property
    def by_stem(self) -> dict[str, list[PurePosixPath]]:
        """The files by their path without suffix, in one spelling."""
        return self._grouped(lambda file: normal(str(file.with_suffix(""))))

    def _grouped(self, key: Callable[[PurePosixPath], str]) -> dict[str, list[PurePosixPath]]:
        groups: defaultdict[str, list[PurePosixPath]] = defaultdict(list)
        for file in self.files:
            if is_unicode(str(file)):
                groups[key(file)].append(file)
        return dict(groups)

    # -------------------------------------------------------------------------------------------------------- notes

    def taken(self, where: str, how: str, what: str = "") -> None:
        """Remember that something in ``where`` was read although it is not as documented.

        Args:
            how: the note's wording.
            what: one of the things that it is true of; left out when it is ``where`` itself.
        """
        self._taken[where, how].append(what)

    def notes(self) -> Iterator[Finding]:
        """Yield what was read although it is not as documented, a note for each way."""
        for (where, how), things in self._taken.items():
            named = [thing for thing in dict.fromkeys(things) if thing]
            yield finding("read-as", where, f"{how}: {listed(named, _SHOWN)}" if named else how)


def _content(at: Path) -> tuple[list[str], list[str]]:
    """Return the names of the folders and of the plain files in a folder."""
    folders, files = [], []
    with os.scandir(at) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # a loop of links
                if entry.is_dir():
                    folders.append(entry.name)
                elif entry.is_file():
                    files.append(entry.name)
    return folders, files
