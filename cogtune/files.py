"""Files that are either whole or not there: written aside, synced, then renamed."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import glob
import hashlib
import json
import os
import re
import shutil
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

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
    errno.EISDIR: "give a file",
    errno.EINVAL: "give an ordinary file",
}

_WRITE_FAILURES = ("I/O error", "PytorchStreamWriter failed", "inline_container.cc", "iostream error")
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


MOST_JSON = 1 << 28
"""Bytes of the largest JSON file that is read: the list of half a million samples takes less."""


def open_regular(path: Path) -> BinaryIO:
    """Open an ordinary file to read its bytes.

    Raises:
        OSError: there is none, or something that may never end or answer stands in its place: a pipe, a device.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(number, "is a folder" if number == errno.EISDIR else "is not an ordinary file", str(path))
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, most: int) -> bytes:
    """The bytes of an ordinary file.

    Raises:
        CogtuneError: it cannot be read, or has more than ``most`` bytes.
    """
    with explained(path, "read"), open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise CogtuneError(f"{path} is too large: {most:,} bytes are the most that is read", "is it the right file?")
    return data


def read_json(path: Path) -> Any:
    """The JSON value in ``path``.

    Raises:
        CogtuneError: the file is missing, unreadable, too large, or not JSON.
    """
    data = read_bytes(path, MOST_JSON)
    try:
        value = json.loads(data.decode("utf-8-sig"))
        if _is_deep(value):
            raise RecursionError
        if b"\\ud" in data.lower():  # half a character can be read, and never be written again
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise CogtuneError(f"{path} is not valid JSON: it is nested too deeply", _RESTORE) from error
    except ValueError as error:
        raise CogtuneError(f"{path} is not valid JSON: {error}", _RESTORE) from error
    return value


_RESTORE = "restore the file or make it again"

CHECKSUM = "checksum"
"""The key under which a JSON object that cogtune wrote has the digest of all its other keys."""


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """``value`` with its own checksum, to be saved as JSON."""
    return {**value, CHECKSUM: _checksum(value)}


def is_sealed(value: Any) -> bool:
    """Whether a JSON value is an object that has the checksum it was saved with."""
    return isinstance(value, dict) and value.get(CHECKSUM) == _checksum(value)


def _checksum(value: Mapping[str, Any]) -> str:
    own = {key: item for key, item in value.items() if key != CHECKSUM}
    return digest(json.loads(json.dumps(own)))  # keys and lists as they come back from a file


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write ``value`` as JSON with its own checksum, for :func:`read_sealed`."""
    write_json(path, sealed(value))


def read_sealed(path: Path, hint: str = _RESTORE) -> dict[str, Any]:
    """The object that :func:`write_sealed` wrote to ``path``.

    Args:
        hint: what to do when it is not what was written.

    Raises:
        CogtuneError: the file is missing, unreadable, or was changed since.
    """
    value = read_json(path)
    if not is_sealed(value):
        raise CogtuneError(f"{path} is damaged: it is not what cogtune wrote there", hint)
    return {key: item for key, item in value.items() if key != CHECKSUM}


_MOST_LEVELS = 64


def _is_deep(value: Any) -> bool:
    """Whether lists and objects are nested beyond what any file of ours or of a model has."""
    boxes = [value] if isinstance(value, dict | list) else []
    for _ in range(_MOST_LEVELS):
        items = (item for box in boxes for item in (box.values() if isinstance(box, dict) else box))
        boxes = [item for item in items if isinstance(item, dict | list)]
        if not boxes:
            return False
    return True


def partial_path(target: Path) -> Path:
    """The name under which :func:`partial_folder` has a folder filled."""
    return target.with_name(f".{target.name}{PARTIAL_SUFFIX}")


def partial_folder(target: Path) -> Path:
    """A fresh folder beside ``target`` to fill; :func:`publish_folder` gives it its name.

    Separate from a context manager because several processes may fill one folder together.

    Raises:
        CogtuneError: it cannot be made, or no other folder can ever take ``target``'s place.
    """
    require_replaceable(target)
    aside = partial_path(target)
    with explained(target):
        _restore(_replaced(target))
        if aside.exists():
            _discard(aside, target)
        stale = re.compile(rf"\.{re.escape(target.name)}\.\d+-[0-9a-f]{{8}}{re.escape(PARTIAL_SUFFIX)}")
        for path in target.parent.glob(f".*{PARTIAL_SUFFIX}"):
            if stale.fullmatch(path.name) and path.is_dir():  # what a killed process had begun to delete
                shutil.rmtree(path, ignore_errors=True)
        aside.mkdir(parents=True)
    return aside


def require_replaceable(folder: Path) -> None:
    """See that another folder can take the place of ``folder``, if there is one.

    Raises:
        CogtuneError: another file system is mounted there, and such a folder keeps its place.
    """
    if folder.is_dir() and (folder.is_mount() or str(folder.resolve()) in _mount_points()):
        raise CogtuneError(
            f"{folder} is a mount point, which no other folder can take the place of",
            f"choose a folder inside it, such as {folder / 'merged'}",
        )


def _mount_points() -> set[str]:
    """Where file systems are mounted, folders of the same file system included; empty where Linux does not say."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return set()
    return {re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), line.split(" ")[4]) for line in lines}


def publish_folder(aside: Path, target: Path) -> str:
    """Sync every file under ``aside`` and rename it to ``target``, replacing a folder that is there.

    At every moment ``target`` is the old folder or the new one. (Where the file system cannot exchange two names in one
    step there is a moment between two renames; killed in it, :func:`remove_partials` and :func:`partial_folder` put
    the old one back.)

    Returns:
        What is left of the old folder and could not be deleted, as a remark; empty when it is gone.

    Raises:
        CogtuneError: it cannot be published; ``target`` is as it was.
    """
    with explained(target):
        for path in sorted(aside.rglob("*")):
            if path.is_file() and not path.is_symlink():
                _finish(path)
            elif path.is_dir():
                _sync_folder(path)
        _sync_folder(aside)
        if not target.exists():
            aside.rename(target)
            doomed = None
        elif _exchange(aside, target):
            doomed = aside
        else:
            doomed = _replaced(target)
            target.rename(doomed)
            try:
                aside.rename(target)
            except BaseException:
                _restore(doomed)
                raise
    # From here on the new folder is whole under its name, whatever the disk refuses.
    with contextlib.suppress(OSError):
        _sync_folder(target.parent)
    return _discard(doomed, target) if doomed else ""


_EXCHANGE = 2
"""``RENAME_EXCHANGE`` of ``<linux/fs.h>``."""
_AT_FDCWD = -100


def _exchange(one: Path, other: Path) -> bool:
    """Let two names change their places in one step; False where the system or its file system has no such step.

    Raises:
        OSError: it has, and refused.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(number, os.strerror(number), str(other))


_REPLACED = f".replaced{PARTIAL_SUFFIX}"


def _replaced(target: Path) -> Path:
    """Where a folder stands while another takes its place in two steps."""
    return target.with_name(f".{target.name}{_REPLACED}")


def _restore(replaced: Path) -> None:
    """Put a folder back that was to be replaced when the process was killed."""
    target = replaced.with_name(replaced.name.removeprefix(".").removesuffix(_REPLACED))
    if replaced.is_dir() and not target.exists():
        replaced.rename(target)


def remove_folder(folder: Path) -> str:
    """Delete a folder so that, killed half-way, nothing incomplete stands under its name.

    Returns:
        What is left of it under another name and could not be deleted, as a remark; empty when it is gone.

    Raises:
        CogtuneError: it keeps its name.
    """
    doomed = _aside(folder)
    with explained(folder, "delete"):
        folder.rename(doomed)
    return _discard(doomed, folder)


def _discard(folder: Path, target: Path) -> str:
    """Delete what has a temporary name and was, or was to be, ``target``; what is left of it, as a remark."""
    with contextlib.suppress(OSError):  # another folder may be about to get this name
        doomed = _aside(target)
        folder.rename(doomed)
        folder = doomed
    try:
        shutil.rmtree(folder)
    except OSError as error:
        return f"{folder} could not be deleted ({error.strerror or error}): nothing needs it"
    return ""


@contextlib.contextmanager
def written_folder(target: Path, warn: Callable[[str], object] | None = None) -> Iterator[Path]:
    """Fill a folder under a temporary name; it becomes ``target`` when the block ends well.

    When the block raises, the temporary folder is removed and ``target`` stays as it was.

    Args:
        warn: told what is left of a folder that was there before, if that cannot be deleted.
    """
    aside = partial_folder(target)
    try:
        yield aside
        left = publish_folder(aside, target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if left and warn is not None:
        warn(left)


def remove_partials(folder: Path) -> None:
    """Delete what an earlier, killed process left unfinished directly inside ``folder``."""
    for path in folder.glob(f".*{PARTIAL_SUFFIX}"):
        if path.name.endswith(_REPLACED):
            with contextlib.suppress(OSError):
                _restore(path)
        if path.is_symlink() or not path.is_dir():
            with contextlib.suppress(OSError):
                path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Delete unfinished files that :func:`write_atomic` left in ``folder`` when its process was killed.

    Args:
        name: of the files that were being written; any by default.
    """
    for path in folder.glob(f".{glob.escape(name) if name != '*' else name}.*{PARTIAL_SUFFIX}"):
        made = re.search(r"\.(\d{1,10})-[0-9a-f]{8}\.partial$", path.name)
        if made and not _is_alive(int(made[1])):
            with contextlib.suppress(OSError):
                path.unlink()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


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


_PIECE = 1 << 24
_READERS = 4


def fingerprint_file(path: Path) -> str:
    """32 hexadecimal digits that stand for a file's bytes: of its size and the CRC-32 of every 16 MiB.

    Several threads read; a core takes 1 to 3 GB/s. It tells a damaged or another file apart, and is no proof against
    somebody who makes a file to fit.

    Raises:
        OSError: the file cannot be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size

        def checksum(start: int) -> int:
            crc, end = 0, start + _PIECE
            while start < end and (data := os.pread(file.fileno(), min(1 << 20, end - start), start)):
                crc, start = zlib.crc32(data, crc), start + len(data)
            return crc

        starts = range(0, size, _PIECE)
        if len(starts) < 2:
            return digest([size, *map(checksum, starts)])
        with ThreadPoolExecutor(_READERS) as pool:
            return digest([size, *pool.map(checksum, starts)])
