"""A pool of killable processes: a job that crashes or hangs its process loses only its own result.

Each process is fed by a thread of the parent. Arrays come back in shared memory, not through a pipe.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import queue
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, Generic, TypeVar

from cogtune.system.children import Context, end_with_creator, forking
from cogtune.system.errors import CogtuneError

Job = TypeVar("Job")
Result = TypeVar("Result")

Beat = Callable[[float], None]
"""Called with the seconds for which the job may be silent before its process counts as hung."""

_BEATS = 0.1
"""Minimum seconds between two beats; others in between are not sent."""

_TRACEBACK_LINES = 20

_REAPING = threading.Lock()
"""Held where exit codes are read, since multiprocessing is not safe there: a thread that starts a process asks for
those of all others, too, and whoever reads one second gets 255."""


@dataclass(frozen=True)
class Lost:
    """The loss of a process during a job.

    Args:
        end: what ended it, such as ``SIGSEGV`` or ``status 3``; empty if it hung and was killed.
        silence: the seconds without a sign of life, if it hung.
    """

    end: str = ""
    silence: float = 0.0


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class PoolOptions(Generic[Job]):
    """Options of a pool.

    Args:
        patience: seconds without a result or beat after which a process counts as hung.
        preload: modules that are imported before the processes start.
        prepare: called once in each process; a function at the top of a module.
        attempts: how often a job is tried if it loses its process.
        most_held: maximum number of jobs in progress or waiting to be taken; each array takes a file handle.
        cost: returns the cost of a job's result; a single job above ``most_cost`` is still accepted.
        most_cost: maximum total cost of the results held.
        ordered: whether results come in the order of the jobs instead of as they are ready.
    """

    patience: float
    preload: Sequence[str]
    prepare: Callable[[], None] = _nothing
    attempts: int = 1
    most_held: int = 64
    cost: Callable[[Job], int] = lambda _job: 0
    most_cost: int = 0
    ordered: bool = False


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def processing(
    do: Callable[[Job, Beat], Result], jobs: Iterable[Job], workers: int, options: PoolOptions[Job]
) -> Iterator[Iterator[tuple[int, Job, Result | Lost] | None]]:
    """Start to run ``jobs`` in processes; yield an iterator over each job, its position and its result.

    It yields None if nothing was ready for a while, so that the caller can do other things and Python can handle a
    signal that another thread received. No process is left when the block ends.

    Args:
        do: does one job; a function at the top of a module, or a partial of one.
        workers: number of processes, each started with its first job; 0 runs the jobs in this process, on demand.

    Raises:
        CogtuneError: ``do`` raised an error, which is a bug and not the fault of a job, or a process cannot start.
    """
    listed = enumerate(jobs)
    if not workers:
        yield ((place, job, do(job, lambda _seconds: None)) for place, job in listed)
        return
    if (first := next(listed, None)) is None:
        yield iter(())
        return
    pool = Pool(do, chain([first], listed), workers, options)
    try:
        yield pool.results()
    finally:
        pool.close()


# ------------------------------------------------------------------------------------------- in a process


def _serve(connection: Connection, do: Callable[[Any, Beat], Any], prepare: Callable[[], None]) -> None:
    """Run the jobs that arrive until the other side closes the connection."""
    for number in (signal.SIGINT, signal.SIGTERM):  # where nothing forks; a fork server's children never get them
        signal.signal(number, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the process that started this ends it
    end_with_creator()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            prepare()
            connection.send(("ready", None))
            while True:
                job, patience = connection.recv()
                _send_result(connection, do(job, _Pulse(connection, patience).beat))
        except CogtuneError as error:
            connection.send(("failed", (error.message, error.hint, error.details, error.exit_code)))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except Exception:
            said = traceback.format_exc().splitlines()[-_TRACEBACK_LINES:]
            connection.send(("failed", ("the process that opens clips fails", "the last of it says why", said, 1)))


class _Pulse:
    """A callable that sends a job's beats, at a limited rate."""

    def __init__(self, connection: Connection, patience: float) -> None:
        self._connection, self._patience, self._last = connection, patience, time.monotonic()

    def beat(self, seconds: float) -> None:
        now = time.monotonic()
        if seconds != self._patience or now - self._last > min(_BEATS, seconds / 4):
            self._connection.send(("beat", seconds))
            self._patience, self._last = seconds, now


def _send_result(connection: Connection, result: object) -> None:
    """Send a result; its arrays are put in shared memory, whose file handle is sent."""
    if sys.platform == "win32":  # which has other handles
        connection.send(("done", (pickle.dumps(result), [])))
        return
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(result, protocol=5, buffer_callback=buffers.append)
    views = [buffer.raw() for buffer in buffers]
    connection.send(("done", (pickled, [view.nbytes for view in views])))
    if sum(view.nbytes for view in views):
        descriptor = _shared_memory()
        with open(descriptor, "wb") as memory:  # noqa: PTH123 (a descriptor, not a path)
            memory.writelines(views)
            memory.flush()
            send_handle(connection, descriptor, 0)  # only Windows asks to which process


def _shared_memory() -> int:
    """Return a descriptor of anonymous shared memory, which is freed when its last user ends."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("cogtune-result")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _receive_result(connection: Connection, pickled: bytes, sizes: Sequence[int]) -> Any:
    if not sum(sizes):
        return pickle.loads(pickled, buffers=[bytearray() for _ in sizes])
    descriptor = recv_handle(connection)
    memory = memoryview(mmap.mmap(descriptor, sum(sizes)))  # let go with the arrays in it
    os.close(descriptor)
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    views = [memory[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    return pickle.loads(pickled, buffers=views)


# --------------------------------------------------------------------------------- in the one that started it


class _Process(Generic[Job, Result]):
    """One process and the pipe to it."""

    def __init__(self, context: Context, do: Callable[[Job, Beat], Result], prepare: Callable[[], None]) -> None:
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(theirs, do, prepare), daemon=True)
        with _REAPING:
            self.process.start()
        self.ready = False
        theirs.close()

    def do(self, job: Job, patience: float) -> Result | Lost:
        """Return the job's result; a process that died or hung is removed.

        Raises:
            CogtuneError: it cannot work at all.
        """
        try:
            if not self.ready:  # its imports are done, and take none of the job's time
                self._hear()
                self.ready = True
            self.connection.send((job, patience))
            while True:
                if not self.connection.poll(patience):
                    self.kill()
                    return Lost(silence=patience)
                kind, value = self._hear()
                if kind == "done":
                    result: Result = _receive_result(self.connection, *value)
                    return result
                patience = value
        except (EOFError, OSError) as error:
            self.kill()
            code = self.process.exitcode or 0
            end = signal.Signals(-code).name if code < 0 else f"status {code}"
            if not self.ready:
                raise CogtuneError(f"a process that opens clips does not start ({end})") from error
            return Lost(end)

    def _hear(self) -> tuple[str, Any]:
        kind, value = self.connection.recv()
        if kind == "failed":
            message, hint, details, exit_code = value
            raise CogtuneError(message, hint, details=details, exit_code=exit_code)
        return kind, value

    def kill(self) -> None:
        self.process.kill()
        with _REAPING:
            self.process.join()
        self.connection.close()


class Pool(Generic[Job, Result]):
    """The processes, their threads, and the finished results."""

    def __init__(
        self,
        do: Callable[[Job, Beat], Result],
        jobs: Iterator[tuple[int, Job]],
        workers: int,
        options: PoolOptions[Job],
    ) -> None:
        self.do, self.options = do, options
        self.waiting = jobs
        self.following = next(self.waiting, None)
        self.context = forking(options.preload, deaf=True)  # by a server that knows nothing of CUDA
        self.held = self.held_cost = self.taken = 0
        self.closed = False
        self.room = threading.Condition()
        self.ready: queue.SimpleQueue[tuple[int, Job, Result | Lost] | BaseException | None] = queue.SimpleQueue()
        self.processes: dict[int, _Process[Job, Result]] = {}
        self.threads = [threading.Thread(target=self._work, args=(number,), daemon=True) for number in range(workers)]
        for thread in self.threads:
            thread.start()

    def results(self) -> Iterator[tuple[int, Job, Result | Lost] | None]:
        """Yield each job's position and result; the memory of a result is freed when the next is requested."""
        at_work, given = len(self.threads), 0
        early: dict[int, tuple[int, Job, Result | Lost]] = {}
        while at_work:
            try:
                done = self.ready.get(timeout=0.5)
            except queue.Empty:
                yield None
                continue
            if isinstance(done, BaseException):
                raise done
            if done is None:
                at_work -= 1
                continue
            early[done[0]] = done
            while early and (not self.options.ordered or given in early):
                place = given if self.options.ordered else next(iter(early))
                given += 1
                yield early[place]
                self._give_back(early.pop(place)[1])

    def close(self) -> None:
        """Kill every process, whatever it is doing."""
        with self.room:
            self.closed = True
            self.room.notify_all()
            processes = list(self.processes.values())
        for process in processes:
            process.process.kill()
        for thread in self.threads:
            thread.join()

    def _work(self, number: int) -> None:
        try:
            while (taken := self._next_job()) is not None:
                place, job = taken
                result: Result | Lost = Lost()
                for _ in range(self.options.attempts):
                    process = self.processes.get(number) or self._start(number)
                    if process is None:
                        return
                    result = process.do(job, self.options.patience)
                    if not isinstance(result, Lost):
                        break
                    del self.processes[number]
                self.ready.put((place, job, result))
        except BaseException as error:
            self.ready.put(error)
        finally:
            if (left := self.processes.get(number)) is not None:
                left.kill()
            self.ready.put(None)

    def _start(self, number: int) -> _Process[Job, Result] | None:
        with self.room:  # so that close() sees every process
            if self.closed:
                return None
            self.processes[number] = _Process(self.context, self.do, self.options.prepare)
            return self.processes[number]

    def _next_job(self) -> tuple[int, Job] | None:
        with self.room:
            while self.following is not None and not self.closed:
                cost = self.options.cost(self.following[1])
                fits = self.held < self.options.most_held and self.held_cost + cost <= self.options.most_cost
                if not self.held or fits:
                    self.held += 1
                    self.held_cost += cost
                    self.taken += 1
                    taken, self.following = self.following, next(self.waiting, None)
                    return taken
                self.room.wait()
            self.room.notify_all()
            return None

    def _give_back(self, job: Job) -> None:
        with self.room:
            self.held -= 1
            self.held_cost -= self.options.cost(job)
            self.room.notify_all()
