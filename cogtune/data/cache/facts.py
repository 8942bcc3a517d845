"""Facts about files, stored by path, size and modification time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from cogtune.data.video.clips import VideoInfo, probe
from cogtune.data.video.stamp import FileChanged, stamp_of
from cogtune.data.video.stamp import Stamp as FullStamp
from cogtune.system.digests import digest_file
from cogtune.system.errors import CogtuneError
from cogtune.system.files import os_errors_explained, write_text
from cogtune.system.folders import remove_leftovers
from cogtune.system.json_files import read_sealed, sealed

Stamp = tuple[int, int]
"""Size in bytes and modification time in nanoseconds; a fact is valid as long as both are the same."""


_TOLD = {field.name for field in fields(VideoInfo)}


class Facts:
    """Facts about files, kept in one JSON file so that an unchanged file is not opened twice.

    Threads may share one. Losing the file only costs time. Without a ``path`` facts are kept in memory.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._known: dict[str, dict[str, Any]] | None = None if path else {}
        self._learned = False

    def stamp(self, path: Path) -> Stamp:
        """Return a file's current stamp; call this before finding out a fact.

        Raises:
            CogtuneError: the file does not exist.
        """
        with os_errors_explained(path, "read"):
            stat = path.stat()
        return stat.st_size, stat.st_mtime_ns

    def known(self, path: Path, name: str, stamp: Stamp) -> Any:
        """Return the fact ``name`` about a file with this stamp; None if it is unknown."""
        known = self._all().get(str(path), {})
        return known.get(name) if known.get("stamp") == [*stamp] else None

    def learn(self, path: Path, name: str, value: Any, stamp: Stamp) -> None:
        """Store the JSON-able ``value`` as the fact ``name`` about a file with this stamp."""
        known = self._all().setdefault(str(path), {})
        if known.get("stamp") != [*stamp]:
            known.clear()
            known["stamp"] = [*stamp]
        known[name] = value
        self._learned = True

    def remembered(self, path: Path, name: str, find: Callable[[Path], Any]) -> Any:
        """Return the fact ``name`` about a file, from ``find`` if it is unknown; exceptions are not stored.

        Raises:
            FileChanged: the file changed in the meantime.
            CogtuneError: the file does not exist.
        """
        stamp = self.stamp(path)
        value = self.known(path, name, stamp)
        if value is None:
            value = find(path)
            if self.stamp(path) != stamp:
                raise FileChanged(path)
            self.learn(path, name, value, stamp)
        return value

    def current(self, path: Path) -> FullStamp:
        """Return the stamp of a file whose digest is known, for reading it later.

        Raises:
            FileChanged: the file has changed since.
            CogtuneError: the file does not exist.
        """
        stamp = stamp_of(path)
        if self.known(path, "digest", stamp[:2]) is None:
            raise FileChanged(path)
        return stamp

    def digest(self, path: Path) -> str:
        """Return a digest of the file's bytes.

        Raises:
            CogtuneError: the file cannot be read.
        """
        return str(self.remembered(path, "digest", digest_file))

    def probe(self, path: Path) -> VideoInfo:
        """Return a clip's properties like :func:`cogtune.data.video.clips.probe`, or raise ``FileChanged``."""
        if not path.is_file():
            return probe(path)
        stamp = self.stamp(path)
        info = self.known_probe(path, stamp)
        if info is None:
            info = probe(path)
            if self.stamp(path) != stamp:
                raise FileChanged(path)
            self.learn_probe(path, info, stamp)
        return info

    def known_probe(self, path: Path, stamp: Stamp) -> VideoInfo | None:
        """Return the properties of a clip with this stamp, if all of this version's are known."""
        known = self.known(path, "probe", stamp)
        return VideoInfo.from_dict(known) if isinstance(known, dict) and known.keys() == _TOLD else None

    def learn_probe(self, path: Path, info: VideoInfo, stamp: Stamp) -> None:
        """Store the properties of a clip with this stamp."""
        self.learn(path, "probe", asdict(info), stamp)

    def save(self) -> None:
        """Write new facts to the file, if there are any.

        Raises:
            CogtuneError: the file cannot be written.
        """
        if self._learned and self.path:
            remove_leftovers(self.path.parent, self.path.name, shared=True)
            write_text(self.path, json.dumps(sealed(self._all()), ensure_ascii=False) + "\n")
            self._learned = False

    def _all(self) -> dict[str, dict[str, Any]]:
        if self._known is None:
            assert self.path is not None  # else there would be no need to read
            try:
                read = read_sealed(self.path)
                self._known = {path: facts for path, facts in read.items() if isinstance(facts, dict)}
            except CogtuneError:  # absent or damaged
                self._known = {}
        return self._known
