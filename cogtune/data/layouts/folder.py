"""A dataset's folder: its files, listed once, and which of them may be opened.

Nothing that a dataset names is read from outside its folder unless the user allows it: lists, tables, captions, clips
and images of every layout are checked in one place, :meth:`Folder.leads_out`.
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
"""Most names that a note about several files shows."""


@dataclass(frozen=True, kw_only=True)
class LayoutOptions:
    """The user's options for reading a folder; None for what is detected.

    Args:
        format: the folder's layout.
        caption_column, video_column, image_column: the columns of a table that hold captions and paths.
        allow_outside: whether paths may lead out of the folder.
        media: where clips that are stored in a file are written to; by default ``.cogtune/media`` in the folder.
    """

    format: DataFormat | None = None
    caption_column: str | None = None
    video_column: str | None = None
    image_column: str | None = None
    allow_outside: bool = False
    media: Path | None = None


class Folder:
    """A dataset's folder, with the options to read it by.

    Args:
        root: the folder.
        reading: the user's options.
        tell: called with the number of entries of a list or table that are done, and the total.
    """

    def __init__(
        self, root: Path, reading: LayoutOptions, tell: Callable[[int, int], None] = lambda _done, _total: None
    ):
        self.root, self.reading, self.tell = root, reading, tell
        self.inside = root.resolve()
        self.refused: list[OSError] = []
        """Findings about folders that cannot be read; complete after :attr:`files`."""
        self.own: list[str] = []
        """Files and folders skipped because cogtune wrote them; folders end in ``/``."""
        self._resolved: dict[str, bool] = {}
        self._taken: defaultdict[tuple[str, str], list[str]] = defaultdict(list)

    # -------------------------------------------------------------------------------------------- what may be opened

    def leads_out(self, path: str | PurePosixPath | Path) -> bool:
        """Return whether a path, relative to the folder, may not be opened: it leads out, by itself or by a link.

        Raises:
            OSError, RuntimeError, ValueError: it is not a valid path: too long, a loop of links, a NUL character.
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
        """Return the finding about a file of the dataset that is a link leading out; None if it may be opened."""
        try:
            if not self.leads_out(path):
                return None
        except (OSError, RuntimeError, ValueError) as error:
            return finding("bad-path", where, f"{path} is not a valid path: {error}", "replace the file")
        message = f"{what}{path} is a link that leads out of the dataset's folder"
        return finding(
            "outside-folder", where, message, "replace the link by a copy of the file, or use --allow-outside"
        )

    def read_text(self, name: str, findings: list[Finding]) -> bytes | None:
        """Return the content of a list or table in UTF-8; None and a finding if it may not be opened or is not text.

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
        """Return a text file's bytes in UTF-8, with a note if they were not; None and a finding if they are not text.

        Args:
            where: the place in the dataset that ``name`` belongs to.
        """
        try:
            text, encoding = as_utf8(data)
        except NotTextError as error:
            findings.append(finding("not-utf8", where, f"{name} {error}", f"save {name} as UTF-8"))
            return None
        if encoding:
            self.taken(str(self.root), f"read as {encoding}, not UTF-8", name)
        return text

    # ------------------------------------------------------------------------------------------------ what is there

    @cached_property
    def top(self) -> tuple[str, ...]:
        """The names of the files in the folder itself, sorted, without hidden files and those of cogtune."""
        return self._named(self.root)

    @cached_property
    def subfolders(self) -> tuple[str, ...]:
        """The names of the folders in the folder, sorted, without hidden folders, links out and those of cogtune."""
        with os_errors_explained(self.root, "read"):
            folders, _ = _content(self.root)
        return tuple(name for name in sorted(folders) if not name.startswith(".") and not self._passed_by(name))

    def files_in(self, name: str) -> tuple[str, ...]:
        """Return the names of the files in a subfolder, like :attr:`top`."""
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
        """Every file, sorted, without hidden files and those of cogtune.

        Includes linked folders that lead out if the user allows it. A link to another place in the dataset is not
        followed, since its files are listed already. A folder that cannot be read is skipped.
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
        """Return whether to enter a folder: never twice, as a loop of links would."""
        target = Path(os.path.realpath(folder))
        if target in entered or (folder.is_symlink() and target.is_relative_to(self.inside)):
            return False
        entered.add(target)
        return True

    @cached_property
    def by_spelling(self) -> dict[str, list[PurePosixPath]]:
        """The files by normalized path, ignoring Unicode form and case."""
        return self._grouped(lambda file: normal(str(file)))

    @cached_property
    def by_name(self) -> dict[str, list[PurePosixPath]]:
        """The files by normalized name."""
        return self._grouped(lambda file: normal(file.name))

    @cached_property
    def by_stem(self) -> dict[str, list[PurePosixPath]]:
        """The files by normalized path without suffix."""
        return self._grouped(lambda file: normal(str(file.with_suffix(""))))

    def _grouped(self, key: Callable[[PurePosixPath], str]) -> dict[str, list[PurePosixPath]]:
        groups: defaultdict[str, list[PurePosixPath]] = defaultdict(list)
        for file in self.files:
            if is_unicode(str(file)):
                groups[key(file)].append(file)
        return dict(groups)

    # -------------------------------------------------------------------------------------------------------- notes

    def taken(self, where: str, how: str, what: str = "") -> None:
        """Note that something in ``where`` was read although it differs from the documentation.

        Args:
            how: the note's wording.
            what: one of the items that it applies to; omitted for ``where`` itself.
        """
        self._taken[where, how].append(what)

    def notes(self) -> Iterator[Finding]:
        """Yield a note for each kind of difference from the documentation."""
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
