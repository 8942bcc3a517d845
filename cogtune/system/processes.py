"""Worker processes, from both sides: watching them, and reporting from them.

A worker process writes a small report file: that it is running, and how it ended. Its own messages go to stdout, which
the watching process forwards to its stderr. Output of libraries and launchers goes to a log file.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from cogtune.system import children, console
from cogtune.system.children import GRACE, PARENT_PID
from cogtune.system.errors import EXIT_FAILURE, CogtuneError, StoppedError, said_by
from cogtune.system.files import os_errors_explained, write_text
from cogtune.system.first_death import FIRST_DEATH, Death, read_death
from cogtune.system.out_of_memory import is_out_of_memory, out_of_memory
from cogtune.system.safe_path import STANDARD_LIBRARY

_QUIET = "COGTUNE_QUIET"

Status = Literal["starting", "running", "done", "stopped", "failed"]
"""The state of a process. While it is starting, nothing can be lost, so it is killed and not asked to stop."""

_REPORT_BYTES = 4096
_TAIL_LINES = 20


@dataclass(frozen=True)
class WorkerReport:
    """The file in which a worker process reports its state."""

    path: Path

    def reserve(self) -> None:
        """Reserve the disk space for a report, without writing one yet.

        Raises:
            CogtuneError: there is no space, or the file cannot be written.
        """
        write_text(self.path, " " * _REPORT_BYTES)

    def write(self, status: Status, error: CogtuneError | None = None, *, foreseen: bool = True) -> bool:
        """Write the state, and for ``failed`` the error; return False if it could not be written.

        Args:
            foreseen: whether the error is one of cogtune's own. Failures that follow from it are not.
        """
        value: dict[str, Any] = {"pid": os.getpid(), "status": status}
        if error is not None:
            value |= {
                "message": error.message,
                "hint": error.hint,
                "details": list(error.details),
                "exit_code": error.exit_code,
                "foreseen": foreseen,
            }
        text = json.dumps(value).ljust(_REPORT_BYTES)
        try:
            write_text(self.path, text)
        except CogtuneError:
            try:
                with self.path.open("r+b") as file:  # overwritten in place, which needs no space on a full disk
                    file.write(text.encode())
                    file.truncate()
            except OSError:
                return False
        return True

    def read(self) -> dict[str, Any] | None:
        """Return the last report; None if there is none."""
        try:
            return dict(json.loads(self.path.read_bytes()))
        except (OSError, ValueError):
            return None


class StopRequest:
    """A request to stop this process: by SIGTERM or SIGINT, or because its command died.

    Until :meth:`begins` is called, a signal ends the process at once.

    Args:
        on_begin: called when work begins that could be lost.
    """

    def __init__(self, on_begin: Callable[[], None] = lambda: None) -> None:
        self._asked = False
        self._patience = 0.0
        self._on_begin = on_begin

    def begins(self) -> None:
        """Mark the beginning of work that could be lost."""
        self._patience = GRACE
        self._on_begin()

    def ask(self) -> float:
        """Ask this process to stop; return the seconds to wait for it once its command is gone."""
        self._asked = True
        return self._patience

    def __bool__(self) -> bool:
        return self._asked


_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run_worker(report: WorkerReport, log: Path, job: Callable[[StopRequest], bool]) -> int:
    """Run ``job`` in a worker process, handle its signals, and report how it ended; return the exit status.

    Args:
        job: does the work; returns False if it was asked to stop before the end.
    """
    rank = int(os.environ.get("RANK", "0"))
    logging.captureWarnings(True)

    def begin() -> None:
        for number in _SIGNALS:
            signal.signal(number, lambda _number, _frame: stop.ask())
        report.write("running")

    stop = StopRequest(begin)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):  # which signals are blocked is inherited
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    children.end_with_command(stop.ask)
    sys.stdout, sys.stderr = console.lenient(sys.stdout), console.lenient(sys.stderr)
    with _own_stdout() as stdout:
        console.configure(quiet=rank != 0 or _QUIET in os.environ, remarks=stdout)
        with _stop_told():
            return _work(report, log, job, stop)


@contextlib.contextmanager
def _stop_told() -> Iterator[None]:
    """Acknowledge a signal at once: Python handles it only when the main thread returns from a step on the GPU.

    The message comes from here because one from the watching process could be overwritten by this process's display.
    """
    heard, wake = socket.socketpair()
    wake.setblocking(False)
    once_more = " (press again to stop at once)" if PARENT_PID in os.environ else ""

    def tell() -> None:
        if heard.recv(1):
            console.note(f"stopping cleanly{once_more}")

    listener = threading.Thread(target=tell, daemon=True)
    listener.start()
    before = signal.set_wakeup_fd(wake.fileno())
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        wake.close()
        listener.join()
        heard.close()


@contextlib.contextmanager
def _own_stdout() -> Iterator[TextIO]:
    """Reserve stdout for this process's own messages; what libraries print there goes to stderr, and so to the log."""
    sys.stdout.flush()
    number = os.dup(1)
    os.dup2(2, 1)
    stdout = os.fdopen(os.dup(number), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    try:
        yield console.lenient(stdout)
    finally:
        with contextlib.suppress(OSError):  # nobody reads it any more
            stdout.close()
        sys.stdout.flush()
        os.dup2(number, 1)
        os.close(number)


def _work(report: WorkerReport, log: Path, job: Callable[[StopRequest], bool], stop: StopRequest) -> int:
    try:
        report.write("starting")
        report.write("done" if job(stop) else "stopped")
        return 0
    except CogtuneError as error:
        _tell_end(report, error, f"{error}\n", foreseen=True)
        return error.exit_code
    except Exception as error:
        _tell_end(report, _in_words(error, log), traceback.format_exc(), foreseen=False)
        return EXIT_FAILURE


def _tell_end(report: WorkerReport, error: CogtuneError, logged: str, *, foreseen: bool) -> None:
    """Report a failure and log it, as far as the disk allows."""
    if not report.write("failed", error, foreseen=foreseen):
        console.error(error)
    with contextlib.suppress(OSError):
        sys.stderr.write(logged)


def _in_words(error: Exception, log: Path) -> CogtuneError:
    if is_out_of_memory(error):
        return out_of_memory(error, "use a smaller --size, or a preset with offload: see `cogtune presets`")
    return CogtuneError(f"{type(error).__name__}: {said_by(error)}", f"the full traceback is in {log}")


def supervise(
    command: Sequence[str],
    reports: Sequence[WorkerReport],
    log: Path,
    *,
    environment: dict[str, str],
    if_stopped: Callable[[], str],
    if_unheard: Callable[[str], CogtuneError | None] = lambda _log: None,
    is_last: bool = False,
) -> None:
    """Run ``command``, whose worker processes write ``reports``, and wait for it.

    The processes get their own session: Ctrl-C, SIGTERM and SIGHUP reach the workers through this process, which asks
    them to shut down cleanly, or kills them if they are still starting. A second signal kills them. When this function
    returns or raises, none of them is left.

    Args:
        if_stopped: returns the hint about what to do next, for work that was stopped.
        if_unheard: finds the error in the log of a launcher that ended before any worker reported.
        is_last: whether this is the last step, so that a signal that came too late for the work has no effect.

    Raises:
        StoppedError: it was stopped, or was asked to stop.
        CogtuneError: it failed, with the failing worker's own message and exit code.
    """
    for report in reports:
        report.reserve()
    family = secrets.token_hex(8)
    variables = {**children.environment(environment), children.FAMILY: family}
    if console.is_quiet():
        variables[_QUIET] = "1"
    here = str(Path(sys.executable).parent)  # where ninja is, which DeepSpeed builds its kernels with
    variables["PATH"] = os.pathsep.join((here, variables.get("PATH", os.defpath)))
    with os_errors_explained(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        output = log.open("wb")
    with output, tempfile.TemporaryDirectory() as scratch, _signals_heard() as received:
        variables[FIRST_DEATH] = str(Path(scratch) / "first-death.json")
        try:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,  # a library that prompts there would wait forever
                stdout=sys.stderr.fileno(),
                stderr=output,
                cwd=STANDARD_LIBRARY,
                env=variables,
                start_new_session=True,
            )
            status = _end_of(child, reports, received, family)
        finally:
            children.kill_family(family, grace=0.0 if len(received) > 1 else GRACE)
        first = read_death(Path(variables[FIRST_DEATH]))
    _raise_for(
        [report.read() for report in reports], first, log, status, received, if_stopped, if_unheard, is_last=is_last
    )


@contextlib.contextmanager
def _signals_heard() -> Iterator[list[int]]:
    """Record signals that ask this process to end, instead of ending it, while the context is active."""
    received: list[int] = []
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, lambda number, _frame: received.append(number)) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_of(
    child: subprocess.Popen[bytes], reports: Sequence[WorkerReport], received: Sequence[int], family: str
) -> int:
    """Wait for the child to end, or end it; return its exit status.

    It polls, since a signal that another thread received does not interrupt a wait.
    """
    asked, doomed = False, None  # the time at which what is left is killed
    while (status := child.poll()) is None:
        said = [report.read() for report in reports]
        at_work = [one["pid"] for one in said if one is not None and one["status"] == "running"]
        if received and not asked:
            asked = True
            if any(one is None or one["status"] == "starting" for one in said):
                children.kill_family(family)
            for pid in at_work:
                with contextlib.suppress(ProcessLookupError):  # already dead
                    os.kill(pid, signal.SIGTERM)
        if len(received) > 1:
            children.kill_family(family)
        if not (asked and not at_work) and all(children.find(pid) is not None for pid in at_work):
            doomed = None
        else:  # the others wait for what is gone; the launcher, which knows who went first, is left to say so
            doomed = doomed or time.monotonic() + GRACE
            if time.monotonic() > doomed:
                _kill([pid for pid in at_work if pid != child.pid] or [child.pid])
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=0.2)
    return status


def _kill(pids: Sequence[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, children.KILL)


def _raise_for(
    said: Sequence[dict[str, Any] | None],
    first: Death | None,
    log: Path,
    status: int,
    received: Sequence[int],
    if_stopped: Callable[[], str],
    if_unheard: Callable[[str], CogtuneError | None],
    *,
    is_last: bool,
) -> None:
    ends = {report["status"] if report is not None else None for report in said}
    if ends == {"done"} and (is_last if received else status == 0):
        return
    failed = [report for report in said if report is not None and report["status"] == "failed"]
    if failed and (first is None or any(report["pid"] == first.pid for report in failed)):
        # What follows from a failure in the other processes is never foreseen: their peer is gone.
        likely = [report for report in failed if report["foreseen"]] or failed
        report = next((report for report in likely if first is not None and report["pid"] == first.pid), likely[0])
        raise CogtuneError(report["message"], report["hint"], details=report["details"], exit_code=report["exit_code"])
    if first is not None and first.signal and not received:
        rank = next((rank for rank, report in enumerate(said) if report and report["pid"] == first.pid), "?")
        raise CogtuneError(
            f"process {rank} of {len(said)} was killed by signal {first.signal}, and the others were stopped",
            ("signal 9 usually means that the system ran out of memory; " if first.signal == children.KILL else "")
            + f"{if_stopped()}; the full log is {log}",
        )
    if received or "stopped" in ends:
        number = received[0] if received else signal.SIGTERM
        raise StoppedError(if_stopped(), signal=number)
    logged = log.read_text(errors="replace")
    if ends == {None} and (known := if_unheard(logged)) is not None:
        raise known
    raise CogtuneError(
        f"a worker process died without an error message (status {status})",
        f"the system may have run out of memory; {if_stopped()}; the full log is {log}",
        details=logged.splitlines()[-_TAIL_LINES:],
    )
