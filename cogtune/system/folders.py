"""Atomic folders: filled under a temporary name, then renamed, replacing an existing folder."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cogtune.system.errors import CogtuneError
from cogtune.system.files import PARTIAL_SUFFIX, finish_file, os_errors_explained, sync_folder, temporary_path


def partial_path(target: Path) -> Path:
    """Return the temporary name that :func:`partial_folder` uses for a folder."""
    return target.with_name(f".{target.name}{PARTIAL_SUFFIX}")


def partial_folder(target: Path) -> Path:
    """Create a new folder next to ``target`` to fill; :func:`publish_folder` gives it its final name.

    Separate from a context manager because several processes may fill one folder together.

    Raises:
        CogtuneError: it cannot be created, or ``target`` cannot be replaced.
    """
    require_replaceable(target)
    aside = partial_path(target)
    with os_errors_explained(target):
        _restore(_replaced(target))
        if aside.exists():
            _discard(aside, target)
        stale = re.compile(rf"\.{re.escape(target.name)}\.\d+-[0-9a-f]{{8}}{re.escape(PARTIAL_SUFFIX)}")
        for path in target.parent.glob(f".*{PARTIAL_SUFFIX}"):
            if stale.fullmatch(path.name) and path.is_dir():  # a deletion that a killed process had started
                shutil.rmtree(path, ignore_errors=True)
        aside.mkdir(parents=True)
    return aside


def require_replaceable(folder: Path) -> None:
    """Check that ``folder`` can be replaced, if it exists.

    Raises:
        CogtuneError: it is a mount point, which cannot be replaced.
    """
    if folder.is_dir() and (folder.is_mount() or str(folder.resolve()) in _mount_points()):
        raise CogtuneError(
            f"{folder} is a mount point, which no other folder can take the place of",
            f"choose a folder inside it, such as {folder / 'merged'}",
        )


def _mount_points() -> set[str]:
    """Return all mount points, including bind mounts; empty if Linux does not list them."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return set()
    return {re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), line.split(" ")[4]) for line in lines}


def publish_folder(aside: Path, target: Path) -> str:
    """Sync every file under ``aside`` and rename it to ``target``, replacing an existing folder.

    ``target`` is always either the old folder or the new one. (If the file system cannot exchange two names in one
    step, there is a moment between two renames. If the process is killed then, :func:`remove_partials` and
    :func:`partial_folder` restore the old one.)

    Returns:
        A remark if parts of the old folder could not be deleted; empty otherwise.

    Raises:
        CogtuneError: it cannot be published; ``target`` is unchanged.
    """
    with os_errors_explained(target):
        for path in sorted(aside.rglob("*")):
            if path.is_file() and not path.is_symlink():
                finish_file(path)
            elif path.is_dir():
                sync_folder(path)
        sync_folder(aside)
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
    # From here on the new folder is complete under its final name, even if the rest fails.
    with contextlib.suppress(OSError):
        sync_folder(target.parent)
    return _discard(doomed, target) if doomed else ""


_EXCHANGE = 2
"""``RENAME_EXCHANGE`` of ``<linux/fs.h>``."""


_AT_FDCWD = -100


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; return False if the system or file system does not support it.

    Raises:
        OSError: it is supported, but failed.
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
    """Return the name of an old folder while it is being replaced in two steps."""
    return target.with_name(f".{target.name}{_REPLACED}")


def _restore(replaced: Path) -> None:
    """Restore a folder whose replacement was interrupted."""
    target = replaced.with_name(replaced.name.removeprefix(".").removesuffix(_REPLACED))
    if replaced.is_dir() and not target.exists():
        replaced.rename(target)


def remove_folder(folder: Path) -> str:
    """Delete a folder such that an interruption leaves nothing incomplete under its name.

    Returns:
        A remark if parts of it, under another name, could not be deleted; empty otherwise.

    Raises:
        CogtuneError: it cannot be renamed.
    """
    doomed = temporary_path(folder)
    with os_errors_explained(folder, "delete"):
        folder.rename(doomed)
    return _discard(doomed, folder)


def _discard(folder: Path, target: Path) -> str:
    """Delete a temporary folder that was, or should have become, ``target``; return a remark if parts remain."""
    with contextlib.suppress(OSError):  # another folder may be about to get this name
        doomed = temporary_path(target)
        folder.rename(doomed)
        folder = doomed
    try:
        shutil.rmtree(folder)
    except OSError as error:
        return f"cannot delete {folder} ({error.strerror or error}); it is no longer needed"
    return ""


@contextlib.contextmanager
def written_folder(target: Path, warn: Callable[[str], object] | None = None) -> Iterator[Path]:
    """Fill a folder under a temporary name, and rename it to ``target`` if the block succeeds.

    If the block raises, the temporary folder is removed and ``target`` is unchanged.

    Args:
        warn: called with a remark if the previous folder could not be deleted completely.
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
    """Delete unfinished files and folders that a killed process left directly in ``folder``."""
    for path in folder.glob(f".*{PARTIAL_SUFFIX}"):
        if path.name.endswith(_REPLACED):
            with contextlib.suppress(OSError):
                _restore(path)
        if path.is_symlink() or not path.is_dir():
            with contextlib.suppress(OSError):
                path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)


SETTLED = 60.0
"""Seconds after which a file that another machine writes to a shared disk has its final name."""


def remove_leftovers(folder: Path, name: str = "*", *, shared: bool = False) -> None:
    """Delete unfinished files that :func:`write_atomic` left in ``folder`` when its process was killed.

    Args:
        name: final name of the files; any by default.
        shared: whether other machines write there as well; whether their processes are alive cannot be known here.
    """
    for path in folder.glob(f".{glob.escape(name) if name != '*' else name}.*{PARTIAL_SUFFIX}"):
        made = re.search(r"\.(\d{1,10})-[0-9a-f]{8}\.partial$", path.name)
        if made and not _is_alive(int(made[1])):
            with contextlib.suppress(OSError):
                if not shared or time.time() - path.lstat().st_mtime > SETTLED:
                    path.unlink()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
