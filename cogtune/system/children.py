"""Start and end of child processes: none imports from the working folder, and none outlives its command."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.context import ForkServerContext, SpawnContext
from typing import TYPE_CHECKING

from cogtune.system.safe_path import STANDARD_LIBRARY, search_path

if TYPE_CHECKING:
    import psutil

PARENT_PID = "COGTUNE_PARENT_PID"
"""Environment variable that tells a process which command it belongs to."""

FAMILY = "COGTUNE_FAMILY"
"""Environment variable shared by all processes of a job, whichever process started them."""

GRACE = 5.0
"""Seconds that a process has to shut down cleanly once its command is gone."""

_LOOKS = 0.5
"""Seconds between checks whether a process is still alive."""

KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # the only method on Windows
_PR_SET_PDEATHSIG = 1
_FOLDERS = ("_HOME", "_DIR", "_CACHE", "_BUNDLE", "TMPDIR")


Context = ForkServerContext | SpawnContext


# ------------------------------------------------------------------------------------------------ the start


def environment(defaults: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment for a child process that starts in :data:`STANDARD_LIBRARY`.

    Args:
        defaults: variables to set unless the user has set them.
    """
    variables = {**(defaults or {}), **os.environ}
    for name, value in variables.items():
        if name.endswith(_FOLDERS) and value and not value.startswith(("~", "$")):
            variables[name] = os.path.abspath(value)  # noqa: PTH100 (it starts in another folder)
    variables["PYTHONPATH"] = os.pathsep.join(search_path())
    variables["PYTHONSAFEPATH"] = "1"
    variables[PARENT_PID] = str(os.getpid())
    return variables


def forking(preload: Sequence[str], *, deaf: bool = False) -> Context:
    """Return a multiprocessing context that forks from a server without threads, which has imported ``preload``.

    Call it before starting threads: this process changes its working folder while the server starts.

    Args:
        deaf: whether the processes ignore Ctrl-C and SIGTERM, because this process ends them.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver, resource_tracker

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    with _in_standard_library():
        resource_tracker.ensure_running()  # otherwise the server starts it, and unblocks the signals
        with _signals_blocked() if deaf else contextlib.nullcontext():
            forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block Ctrl-C and SIGTERM, which reach a whole process group, for processes started inside the context.

    A signal that arrives in the meantime reaches this process when the context ends.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _in_standard_library() -> Iterator[None]:
    try:
        here = os.getcwd()  # noqa: PTH109
    except OSError:  # it was deleted
        here = STANDARD_LIBRARY
    if os.path.realpath(here) == os.path.realpath(STANDARD_LIBRARY):
        yield
        return
    os.chdir(STANDARD_LIBRARY)
    try:
        yield
    finally:
        os.chdir(here)


# -------------------------------------------------------------------------------------------------- the end


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process is running; a zombie is not."""
    import psutil

    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def find(pid: int) -> psutil.Process | None:
    """Return the process with this id, or None if it is not alive."""
    import psutil

    try:
        process = psutil.Process(pid)
    except (psutil.NoSuchProcess, psutil.AccessDenied, ValueError):
        return None
    return process if is_alive(process) else None


def end_with_command(ask: Callable[[], float] = lambda: 0.0) -> None:
    """End this process when its parent or its command ends.

    Args:
        ask: called in a thread to request a clean shutdown; returns the seconds after which this process and
            its children are killed.
    """
    parent, number = os.getppid(), int(os.environ.get(PARENT_PID, "0"))
    command = find(number) if number else None
    if number and command is None:
        _kill_this_with_children()

    def wait() -> None:
        while os.getppid() == parent and (command is None or is_alive(command)):
            time.sleep(_LOOKS)
        time.sleep(ask())
        _kill_this_with_children()

    threading.Thread(target=wait, daemon=True, name="cogtune-lifeline").start()


def end_with_creator() -> None:
    """Kill this :mod:`multiprocessing` process when the process that started it ends."""
    if sys.platform == "linux":  # works even while a library blocks Python's threads
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(KILL), 0, 0, 0)
    creator = multiprocessing.parent_process()
    if creator is None:
        return

    def wait() -> None:
        creator.join()
        os.kill(os.getpid(), KILL)

    threading.Thread(target=wait, daemon=True, name="cogtune-lifeline").start()


def _kill_this_with_children() -> None:
    import psutil

    with contextlib.suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
    os.kill(os.getpid(), KILL)


def members(name: str, value: str) -> list[psutil.Process]:
    """Return the live processes that were started with the environment variable ``name`` set to ``value``."""
    import psutil

    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(name) == value and is_alive(process):
                found.append(process)
    return found


def kill_family(family: str, *, grace: float = 0.0) -> None:
    """Kill the remaining processes of a job, whichever process started them or is their parent by now.

    Args:
        family: the value of :data:`FAMILY` that the processes share.
        grace: seconds to wait for them to end by themselves.
    """
    import psutil

    until = time.monotonic() + grace
    while left := members(FAMILY, family):
        if time.monotonic() >= until:
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
        if time.monotonic() > until + 10:  # stuck in a system call: nothing more can be done
            return
        time.sleep(0.05)
