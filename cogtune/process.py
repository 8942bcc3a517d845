"""The processes that do the heavy work, from both sides: how one is watched, and how it says what became of it.

A worker process writes a small report file: that it runs, and how it ended. Its own words go to stdout, which the
watching process joins to its stderr; everything that libraries and launchers say goes to a log file.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TextIO

from cogtune import console
from cogtune.errors import EXIT_FAILURE, CogtuneError, StoppedError, said_by
from cogtune.files import explained, write_text

_QUIET = "COGTUNE_QUIET"

PARENT_PID = "COGTUNE_PARENT_PID"
"""Environment variable by which a worker knows whose death is a request to stop."""

Status = Literal["running", "done", "stopped", "failed"]
_REPORT_BYTES = 4096
_TAIL_LINES = 20


@dataclass(frozen=True)
class Report:
    """The file in which one worker process says how it is."""

    path: Path

    def reserve(self) -> None:
        """Take the room on the disk that saying something takes, and say nothing yet.

        Raises:
            CogtuneError: there is none, or the file cannot be written.
        """
        write_text(self.path, " " * _REPORT_BYTES)

    def write(self, status: Status, error: CogtuneError | None = None, *, foreseen: bool = True) -> bool:
        """Say how it is; with ``failed``, what the failure was. False when it could not be said.

        Args:
            foreseen: whether the error is in our own words. The others that fail when one process fails are not.
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
                with self.path.open("r+b") as file:  # over what is there, which takes no more of a full disk
                    file.write(text.encode())
                    file.truncate()
            except OSError:
                return False
        return True

    def read(self) -> dict[str, Any] | None:
        """What was said last; None when nothing was."""
        try:
            return dict(json.loads(self.path.read_bytes()))
        except (OSError, ValueError):
            return None


class StopRequest:
    """Whether this process was asked to stop: by SIGTERM or SIGINT, or by the death of the one that watches it."""

    def __init__(self) -> None:
        self._asked = False
        self._parent = int(os.environ.get(PARENT_PID, "0"))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self._asked = True

    def __bool__(self) -> bool:
        if self._parent and not _is_running(self._parent):
            self._asked = True  # never set to False: a signal may have come while the parent was looked for
        return self._asked


def _is_running(pid: int) -> bool:
    """Whether a process is alive; one that ended and was not waited for is not."""
    import psutil

    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def work(report: Report, log: Path, job: Callable[[StopRequest], bool]) -> int:
    """Run ``job`` in a worker process and report how it ended; the exit status.

    Args:
        job: does the work; False when it was asked to stop before the end.
    """
    rank = int(os.environ.get("RANK", "0"))
    logging.captureWarnings(True)
    stop = StopRequest()
    with _own_stdout() as stdout:
        console.configure(quiet=rank != 0 or _QUIET in os.environ, remarks=stdout)
        with _stop_told():
            return _work(report, log, job, stop)


@contextlib.contextmanager
def _stop_told() -> Iterator[None]:
    """Say at once that a signal was heard: Python itself looks at it when the main thread comes back from a GPU's step.

    It is said here and not by the watching process, on whose words this one would draw.
    """
    heard, wake = socket.socketpair()
    wake.setblocking(False)
    once_more = " (once more to stop at once)" if PARENT_PID in os.environ else ""

    def tell() -> None:
        if heard.recv(1):
            console.note(f"stopping in good order{once_more}")

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
    """This process's stdout for its own words alone; what libraries print there goes where stderr goes, to the log."""
    sys.stdout.flush()
    number = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(os.dup(number), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors) as stdout:
            yield stdout
    finally:
        sys.stdout.flush()
        os.dup2(number, 1)
        os.close(number)


def _work(report: Report, log: Path, job: Callable[[StopRequest], bool], stop: StopRequest) -> int:
    try:
        report.write("running")
        report.write("done" if job(stop) else "stopped")
        return 0
    except CogtuneError as error:
        _tell_end(report, error, f"{error}\n", foreseen=True)
        return error.exit_code
    except Exception as error:
        _tell_end(report, _in_words(error, log), traceback.format_exc(), foreseen=False)
        return EXIT_FAILURE


def _tell_end(report: Report, error: CogtuneError, logged: str, *, foreseen: bool) -> None:
    """Report a failure and log it; each as far as the disk allows."""
    if not report.write("failed", error, foreseen=foreseen):
        console.error(error)
    with contextlib.suppress(OSError):
        sys.stderr.write(logged)


_NO_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What CUDA and its libraries say, in errors of other kinds than PyTorch's own, when a GPU's memory is used up."""


def cannot_pin(error: Exception) -> bool:
    """Whether an error says that the host's memory could not be pinned, of which a system may allow less than there is.

    CUDA says the same of it as of a GPU's memory that is used up.
    """
    where = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    return is_out_of_memory(error) and any(name.startswith(("pin_memory", "pin_empty")) for name in where)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that a GPU's memory is used up."""
    is_torchs = type(error).__name__ == "OutOfMemoryError"
    return is_torchs or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_MEMORY))


def _in_words(error: Exception, log: Path) -> CogtuneError:
    hint = f"the whole traceback is in {log}"
    if is_out_of_memory(error):
        hint = "use a smaller --size, or a preset with offload: see `cogtune presets`"
    return CogtuneError(f"{type(error).__name__}: {said_by(error)}", hint)


def watch(
    command: Sequence[str],
    reports: Sequence[Report],
    log: Path,
    *,
    environment: dict[str, str],
    if_stopped: Callable[[], str],
    if_unheard: Callable[[str], CogtuneError | None] = lambda _log: None,
    is_last: bool = False,
) -> None:
    """Run ``command``, whose worker processes write ``reports``, and wait for it.

    The processes get a session of their own: Ctrl-C and SIGTERM reach the workers through this process, which asks
    them to end in good order. A second signal kills them.

    Args:
        if_stopped: gives what to do next, told when the work was stopped.
        if_unheard: finds, in the log of a launcher that ended before any worker said a word, what was wrong.
        is_last: nothing follows that a signal could still stop, so one that came too late for the work changes nothing.

    Raises:
        StoppedError: it was stopped, or asked to.
        CogtuneError: it failed, with the failing worker's own words and exit code.
    """
    for report in reports:
        report.reserve()
    variables = {**environment, **os.environ, PARENT_PID: str(os.getpid())}
    if console.is_quiet():
        variables[_QUIET] = "1"
    variables["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    here = str(Path(sys.executable).parent)  # where ninja is, which DeepSpeed builds its kernels with
    variables["PATH"] = os.pathsep.join((here, variables.get("PATH", os.defpath)))
    with explained(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        output = log.open("wb")
    with output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,  # a library that asks something there would wait for ever
            stdout=sys.stderr.fileno(),
            stderr=output,
            env=variables,
            start_new_session=True,
        )
        with _signals_passed_on(child, reports) as received:
            status = _end_of(child)
    _raise_for([report.read() for report in reports], log, status, received, if_stopped, if_unheard, is_last=is_last)


def _end_of(child: subprocess.Popen[bytes]) -> int:
    """The child's exit status. Looked for time and again, since a signal that another thread got ends no wait."""
    while (status := child.poll()) is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=1)
    return status


@contextlib.contextmanager
def _signals_passed_on(child: subprocess.Popen[bytes], reports: Sequence[Report]) -> Iterator[list[int]]:
    received: list[int] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        workers = [said["pid"] for report in reports if (said := report.read()) is not None]
        if len(received) > 1 or not workers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            return
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):  # one that is dead already
                os.kill(pid, signal.SIGTERM)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class _Death:
    """The process that torch's launcher saw die first; the others' failures follow from it."""

    pid: int
    signal: int
    """What killed it; 0 when it ended by itself."""


_ROOT_CAUSE = re.compile(r"^Root Cause .*?^\s*exitcode\s*:\s*(-?\d+)\s*\(pid: (\d+)\)", re.DOTALL | re.MULTILINE)


def _first_death(log: Path) -> _Death | None:
    found = _ROOT_CAUSE.search(log.read_text(errors="replace"))
    return None if found is None else _Death(int(found[2]), max(0, -int(found[1])))


def _raise_for(
    said: Sequence[dict[str, Any] | None],
    log: Path,
    status: int,
    received: Sequence[int],
    if_stopped: Callable[[], str],
    if_unheard: Callable[[str], CogtuneError | None],
    *,
    is_last: bool,
) -> None:
    ends = {report["status"] if report is not None else None for report in said}
    if status == 0 and ends == {"done"} and (is_last or not received):
        return
    failed = [report for report in said if report is not None and report["status"] == "failed"]
    first = _first_death(log)
    if failed and (first is None or any(report["pid"] == first.pid for report in failed)):
        # What follows from a failure in the other processes is never foreseen: their peer is gone.
        likely = [report for report in failed if report["foreseen"]] or failed
        report = next((report for report in likely if first is not None and report["pid"] == first.pid), likely[0])
        raise CogtuneError(report["message"], report["hint"], details=report["details"], exit_code=report["exit_code"])
    if first is not None and first.signal and not received:
        rank = next((rank for rank, report in enumerate(said) if report and report["pid"] == first.pid), "?")
        raise CogtuneError(
            f"process {rank} of {len(said)} was killed by signal {first.signal}, and the others with it",
            ("signal 9 is mostly the system's, when memory runs out; " if first.signal == signal.SIGKILL else "")
            + f"{if_stopped()}; the whole log is {log}",
        )
    if received or "stopped" in ends:
        number = received[0] if received else signal.SIGTERM
        raise StoppedError(if_stopped(), signal=number)
    logged = log.read_text(errors="replace")
    if ends == {None} and (known := if_unheard(logged)) is not None:
        raise known
    raise CogtuneError(
        f"a worker process died without a word (status {status})",
        f"the system kills a process when memory runs out; {if_stopped()}; the whole log is {log}",
        details=logged.splitlines()[-_TAIL_LINES:],
    )
