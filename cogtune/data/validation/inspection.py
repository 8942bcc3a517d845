"""Looking at clips in other processes, so that one which kills or hangs its decoder is a finding, and no more."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cogtune.data.validation.inspector import HUNG, stall_seconds
from cogtune.data.video.container import VideoInfo
from cogtune.data.video.images import ImageInfo
from cogtune.system.children import environment
from cogtune.system.errors import CogtuneError
from cogtune.system.safe_path import STANDARD_LIBRARY

COMMAND = (sys.executable, "-m", "cogtune.data.validation.inspector")
"""What starts one of the processes."""

ATTEMPTS = 2
"""A process may also die, or stand still, for reasons that are not the clip's: each clip gets a second one."""

MOST_WORKERS = 8
"""Each takes about 60 MB; beyond eight, a disk is the bottleneck more often than a core."""


LISTENS = 0.5
"""Seconds after which the wait for answers is begun anew: only between two waits does Python see a Ctrl-C that came
just before one, or that the system gave to another thread."""


@dataclass(frozen=True)
class InspectionJob:
    """One sample's files, and whether they are to be decoded to their end."""

    video: Path
    image: Path | None = None
    full: bool = False


@dataclass(frozen=True)
class Inspection:
    """What a look at one sample's files showed.

    Args:
        info: what the clip is, when it could be opened.
        image: what the image is, when there is one that could be opened.
        problems: code, message and hint of each thing that is wrong.
    """

    info: VideoInfo | None
    image: ImageInfo | None
    problems: tuple[tuple[str, str, str], ...]


class _Worker:
    """One of the processes, and the job it is at. Its answers come into ``heard``; an empty one is its end."""

    def __init__(self, heard: queue.SimpleQueue[tuple[_Worker, bytes]]) -> None:
        self.place, self.job, self.attempt = -1, InspectionJob(Path()), 0
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed in end())
        self.process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            cwd=STANDARD_LIBRARY,
            env=environment(),
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.questions, self.answers, self.heard = self.process.stdin, self.process.stdout, heard
        self.listener = threading.Thread(target=self._listen, daemon=True)  # Windows can wait for no pipe
        self.listener.start()

    def _listen(self) -> None:
        for line in self.answers:
            self.heard.put((self, line))
        self.heard.put((self, b""))

    def ask(self, place: int, job: InspectionJob, attempt: int) -> None:
        self.place, self.job, self.attempt = place, job, attempt
        image = job.image and str(job.image.absolute())  # it works in another folder
        question = {"video": str(job.video.absolute()), "image": image, "full": job.full}
        with contextlib.suppress(BrokenPipeError):  # it is dead: its silence will tell
            self.questions.write(json.dumps(question).encode() + b"\n")
            self.questions.flush()

    def answer(self, line: bytes) -> Inspection | None:
        """Return what it found; None when it died over it.

        Raises:
            CogtuneError: it cannot work at all.
        """
        if not line.endswith(b"\n") and not line.endswith(b"}"):
            return None
        value = json.loads(line)
        if "failed" in value:
            message, hint = value["failed"]
            raise CogtuneError(message, hint)
        info = None if value["info"] is None else VideoInfo.from_dict(value["info"])
        image = None if value["image"] is None else ImageInfo(**value["image"])
        return Inspection(info, image, tuple((code, message, hint) for code, message, hint in value["problems"]))

    def epitaph(self) -> Inspection:
        """Return the finding about the clip that it died over.

        Raises:
            CogtuneError: it never got as far as a clip.
        """
        status, name = self.process.wait(), self.job.video.name
        self.errors.seek(0)
        said = self.errors.read().decode(errors="replace").splitlines()
        if status > 0 and said:  # Python ended it in good order: no decoder does that
            raise CogtuneError("the process that opens clips fails", "the last of it says why", details=said[-20:])
        if status == HUNG:
            message = f"{name} hangs the decoder: it gave nothing for {stall_seconds():g} seconds"
            return Inspection(None, None, (("decoder-hung", message, "encode it again, or leave it out"),))
        reason = signal.Signals(-status).name if status < 0 else f"status {status}"
        if reason == "SIGKILL":
            reason += ", as the system does when memory runs out"
        message = f"{name} kills the decoder ({reason})"
        return Inspection(None, None, (("decoder-died", message, "encode it again, or leave it out"),))

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.listener.join()
        for stream in (self.questions, self.answers, self.errors):
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def inspect(
    jobs: Iterable[InspectionJob], *, workers: int | None = None
) -> Generator[tuple[int, Inspection], None, None]:
    """Look at every job's files in ``workers`` processes; each job's place and what was seen, as they come.

    Args:
        workers: by default one for each core that this process may use, up to :data:`MOST_WORKERS`.

    Raises:
        CogtuneError: the processes cannot work.
    """
    workers = workers or min(MOST_WORKERS, _usable_cores())
    waiting = enumerate(jobs)
    again: deque[tuple[int, InspectionJob, int]] = deque()

    def following() -> tuple[int, InspectionJob, int] | None:
        if again:
            return again.popleft()
        return next(((place, job, 1) for place, job in waiting), None)

    heard: queue.SimpleQueue[tuple[_Worker, bytes]] = queue.SimpleQueue()
    at_work: set[_Worker] = set()
    with contextlib.ExitStack() as stack:

        def start(task: tuple[int, InspectionJob, int]) -> None:
            worker = _Worker(heard)
            stack.callback(worker.end)
            at_work.add(worker)
            worker.ask(*task)

        while len(at_work) < workers and (task := following()) is not None:
            start(task)
        while at_work:
            try:
                worker, line = heard.get(timeout=LISTENS)
            except queue.Empty:
                continue
            if worker not in at_work:  # it was ended
                continue
            seen = worker.answer(line)
            died = seen is None
            if seen is None:
                if worker.attempt < ATTEMPTS:
                    again.append((worker.place, worker.job, worker.attempt + 1))
                else:
                    yield worker.place, worker.epitaph()
            else:
                yield worker.place, seen
            task = following()
            if died or task is None:
                at_work.remove(worker)
                worker.end()
                if task is not None:
                    start(task)
            else:
                worker.ask(*task)


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
