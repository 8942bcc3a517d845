"""Ctrl-C and SIGTERM as exceptions, so that every block is left cleanly and no library can prevent the exit.

A signal handler's exception is raised wherever the program happens to be, which may be inside a library that swallows
it: in an import, or in a finalizer. So it is raised again until the program is unwinding.
"""

from __future__ import annotations

import _thread
import atexit
import contextlib
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any, NoReturn

_INSISTS = 1.0
"""Seconds after which a swallowed exception is raised again, and again."""

_asked: list[int] = []
_status: list[Any] = []
_again = threading.Event()
_ended = threading.Event()
_saying = threading.Lock()
"""Held while the signal is sent again, so that none is under way when the program stops listening."""


def raise_on_signals() -> None:
    """Make Ctrl-C raise KeyboardInterrupt, and SIGTERM and SIGHUP raise SystemExit, from now on."""
    signal.signal(signal.SIGINT, _hear)
    signal.signal(signal.SIGTERM, _hear)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # not so under nohup
        signal.signal(signal.SIGHUP, _hear)
    sys.unraisablehook = _unraisable
    atexit.register(_ignore)


def exit_now(status: Any) -> NoReturn:
    """Exit with ``status``; a signal during Python's clean-up cuts it short, with the same status."""
    _status.append(status)
    _ended.set()
    with _saying:  # none of ours is on its way any more
        sys.exit(status)


def _ignore() -> None:
    """Ignore Ctrl-C from here on: Python restores the default handlers and only then takes its modules apart."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _hear(number: int, _frame: FrameType | None) -> None:
    if _again.is_set():  # it is we who say it again
        _again.clear()
        if _ended.is_set() or _is_on_its_way():
            return
    elif _ended.is_set():
        with contextlib.suppress(OSError, ValueError, AttributeError, RuntimeError):  # closed, or being flushed
            sys.stdout.flush()
        os._exit(_status[0] if isinstance(_status[0], int) else int(_status[0] is not None))
    elif not _asked:
        _asked.append(number)
        threading.Thread(target=_insist, daemon=True, name="cogtune-ending").start()
    if _asked[0] == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + _asked[0])


def _insist() -> None:
    while not _ended.wait(_INSISTS):
        with _saying:
            if _ended.is_set():
                return
            _again.set()
            if hasattr(signal, "pthread_kill"):  # ends a wait, too
                signal.pthread_kill(threading.main_thread().ident or 0, _asked[0])
            else:
                _thread.interrupt_main()


def _is_on_its_way() -> bool:
    """Return whether the running code is part of the program's unwinding, such as a ``finally`` block."""
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, KeyboardInterrupt | SystemExit):
        error = error.__context__
    return error is not None


def _unraisable(what: Any) -> None:
    if not issubclass(what.exc_type, KeyboardInterrupt | SystemExit):  # those come again
        sys.__unraisablehook__(what)
