"""Files that are either whole or not there: written aside, synced, then renamed."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cogtune.errors import CogtuneError

PARTIAL_SUFFIX = ".partial"
"""What the name of an unfinished file or folder ends in; such a leftover is safe to delete."""


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows opens no folders, and writes down a rename by itself
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems refuse to sync a folder; the rename itself still holds
        pass
    finally:
        os.close(descriptor)


AGAIN = "run the same command again"
"""How the hint of a :class:`DiskFull` ends; who knows better what to run says that instead."""


class DiskFull(CogtuneError):
    """There is no room to write."""


_FULL = {
    errno.ENOSPC: f"free some space on that disk, then {AGAIN}",
    errno.EDQUOT: f"your disk quota is used up: free some space, then {AGAIN}",
}

_HINTS = {
    errno.EFBIG: "that file system or a limit of your shell forbids files of this size: choose another place",
    errno.EACCES: "check who owns it and its permissions",
    errno.EROFS: "that file system is read-only: choose another place",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a file stands where a folder is needed: choose another path",
}

_WRITE_FAILURES = ("I/O error", "PytorchStreamWriter failed", "inline_container.cc")
"""What safetensors and torch say, in errors of their own kinds, when the disk takes no more."""


@contextlib.contextmanager
def explained(path: Path, doing: str = "write") -> Iterator[None]:
    """Turn an ``OSError`` about ``path``, in whatever form, into a :class:`CogtuneError` that says what to do.

    Raises:
        CogtuneError: in place of any OSError, and of a library's own error for a failed write; a :class:`DiskFull`
            where there is no room.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise _failure(f"cannot {doing} {path}: {reason}", error.errno or 0) from error
    except CogtuneError:
        raise
    except Exception as error:
        if not any(sign in str(error) for sign in _WRITE_FAILURES):
            raise
        number = int(found[1]) if (found := re.search(r"os error (\d+)", str(error))) else errno.ENOSPC
        raise _failure(f"cannot {doing} {path}: {os.strerror(number)}", number) from error


def _failure(message: str, number: int) -> CogtuneError:
    return DiskFull(message, _FULL[number]) if number in _FULL else CogtuneError(message, _HINTS.get(number, ""))


@functools.cache
def _ordinary_mode() -> int:
    """Permissions of a file that a program makes without asking for special ones."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _finish(path: Path) -> None:
    """Give a written file ordinary permissions (safetensors makes it private) and see that it is on the disk."""
    path.chmod(_ordinary_mode())
    with path.open("r+b") as handle:  # Windows syncs what may be written alone
        os.fsync(handle.fileno())


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}{PARTIAL_SUFFIX}")


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file under a temporary name beside ``path``, then move it into place.

    The file is synced to disk before the rename, so after a crash ``path`` is the old file or the new one.

    Raises:
        CogtuneError: the file cannot be written (full disk, permissions); nothing is left behind.
    """
    aside = _aside(path)
    with explained(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(aside)
            _finish(aside)
            aside.replace(path)
            _sync_folder(path.parent)
        finally:
            aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``, whole or not at all."""
    write_atomic(path, lambda aside: aside.write_bytes(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON to ``path``, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON value in ``path``.

    Raises:
        CogtuneError: the file is missing, unreadable, or not JSON.
    """
    with explained(path, "read"):
        data = path.read_bytes()
    try:
        return json.loads(data)
    except ValueError as error:
        raise CogtuneError(f"{path} is not valid JSON: {error}", "restore the file or make it again") from error


def partial_path(target: Path) -> Path:
    """The name under which :func:`partial_folder` has a folder filled."""
    return target.with_name(f".{target.name}{PARTIAL_SUFFIX}")


def partial_folder(target: Path) -> Path:
    """A fresh folder beside ``target`` to fill; :func:`publish_folder` gives it its name.

    Separate from a context manager because several processes may fill one folder together.
    """
    aside = partial_path(target)
    with explained(target):
        if aside.exists():
            shutil.rmtree(aside)
        aside.mkdir(parents=True)
    return aside


def publish_folder(aside: Path, target: Path) -> None:
    """Sync every file under ``aside`` and rename it to ``target``, replacing a folder that is there."""
    with explained(target):
        for path in sorted(aside.rglob("*")):
            if path.is_file() and not path.is_symlink():
                _finish(path)
            elif path.is_dir():
                _sync_folder(path)
        _sync_folder(aside)
        if target.exists():
            remove_folder(target)
        aside.rename(target)
        _sync_folder(target.parent)


def remove_folder(folder: Path) -> None:
    """Delete a folder so that, killed half-way, nothing incomplete stands under its name."""
    doomed = folder.with_name(f".{folder.name}.old{PARTIAL_SUFFIX}")
    if doomed.exists():
        shutil.rmtree(doomed)
    folder.rename(doomed)
    shutil.rmtree(doomed)


@contextlib.contextmanager
def written_folder(target: Path) -> Iterator[Path]:
    """Fill a folder under a temporary name; it becomes ``target`` when the block ends well.

    When the block raises, the temporary folder is removed and ``target`` stays as it was.
    """
    aside = partial_folder(target)
    try:
        yield aside
        publish_folder(aside, target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def remove_partials(folder: Path) -> None:
    """Delete what an earlier, killed process left unfinished directly inside ``folder``."""
    for path in folder.glob(f".*{PARTIAL_SUFFIX}"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def digest(value: Any) -> str:
    """32 hexadecimal digits that stand for a JSON-able value (BLAKE2b of its canonical JSON)."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


def digest_file(path: Path) -> str:
    """32 hexadecimal digits that stand for a file's bytes (BLAKE2b)."""
    hasher = hashlib.blake2b(digest_size=16)
    with explained(path, "read"), path.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            hasher.update(chunk)
    return hasher.hexdigest()
