"""Pictures of clips, drawn in processes of their own: a clip that kills or hangs its decoder has none, and no more."""

from __future__ import annotations

import contextlib
import queue
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from cogtune.data.frames import ClipView
from cogtune.report.pictures import Shown, show_clip
from cogtune.system.children import Context, end_with_creator, forking

PATIENCE = 120.0
"""Seconds after which a process that draws one clip is taken to hang; it takes about one."""


@dataclass(frozen=True)
class Task:
    """A clip to draw: what :func:`cogtune.report.pictures.show_clip` takes."""

    video: Path
    seen: ClipView
    image: Path | None
    most_bytes: int


Draw = Callable[[Task], Shown]


def draw(task: Task) -> Shown:
    """Return the pictures of one clip.

    Raises:
        CogtuneError: the clip or the image cannot be read.
    """
    return show_clip(task.video, task.seen, task.image, task.most_bytes)


def drawn(
    tasks: Iterable[Task | None], workers: int, *, patience: float = PATIENCE, draw: Draw = draw
) -> Generator[Shown | str | None, None, None]:
    """Each task's pictures, or in words why there are none, in their order; None stays None.

    Args:
        tasks: taken up a few at a time.
        workers: processes; 0 draws in this one.
        patience: seconds after which a process is taken to hang.
        draw: does one task; a function at the top of a module.
    """
    if not workers:
        yield from (None if task is None else _attempt(draw, task) for task in tasks)
        return
    free: queue.SimpleQueue[_Process] = queue.SimpleQueue()
    context = forking(["torch", "numpy", "av", "PIL.Image", "cogtune.data.frames"])
    processes = [_Process(context, draw, patience) for _ in range(workers)]
    for process in processes:
        free.put(process)

    def work(task: Task | None) -> Shown | str | None:
        if task is None:
            return None
        process = free.get()
        try:
            return process.do(task)
        finally:
            free.put(process)

    pool = ThreadPoolExecutor(workers, "cogtune-report")
    waiting: deque[Future[Shown | str | None]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(work, task))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.close()
        pool.shutdown()


def _attempt(draw: Draw, task: Task) -> Shown | str:
    try:
        return draw(task)
    except Exception as error:  # whatever it is: the check has given its verdict, and one clip is not the others
        return str(getattr(error, "message", error))


def _serve(connection: Connection, draw: Draw) -> None:
    """In the process: draw what comes in until the other side hangs up."""
    import torch

    end_with_creator()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the one that started us ends us
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        connection.send("ready")
        while True:
            connection.send(_attempt(draw, connection.recv()))


class _Process:
    """One drawing process, started when it is needed and anew when it is gone."""

    def __init__(self, context: Context, draw: Draw, patience: float) -> None:
        self._context = context
        self._draw, self._patience = draw, patience
        self._connection: Connection | None = None
        self._process: BaseProcess | None = None
        self._closed = False

    def do(self, task: Task) -> Shown | str:
        """Return the task done; by one thread at a time."""
        try:
            connection = self._connection or self._start()
            connection.send(task)
            if connection.poll(self._patience):
                answer: Shown | str = connection.recv()
                return answer
            reason = f"the decoder hangs: it gave nothing for {self._patience:g} seconds"
        except (EOFError, OSError):
            reason = "the decoder dies of it"
        self._drop()
        return f"{task.video.name}: {reason}"

    def _start(self) -> Connection:
        if self._closed:
            raise EOFError
        self._connection, theirs = self._context.Pipe()
        self._process = self._context.Process(target=_serve, args=(theirs, self._draw), daemon=True)
        self._process.start()
        theirs.close()
        self._connection.recv()  # its imports are done, and take none of the clip's time
        return self._connection

    def _drop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None

    def close(self) -> None:
        """End the process, whatever it is at, and start none again."""
        self._closed = True
        if self._process is not None:
            self._process.kill()
            self._process.join()
