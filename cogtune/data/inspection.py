"""Looking at clips in other processes, so that one which kills or hangs its decoder is a finding, and no more."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cogtune.children import environment
from cogtune.data.container import VideoInfo
from cogtune.data.images import ImageInfo
from cogtune.data.inspector import stall_seconds
from cogtune.errors import CogtuneError
from cogtune.safe_path import STANDARD_LIBRARY

COMMAND = (sys.executable, "-m", "cogtune.data.inspector")
"""What starts one of the processes."""

ATTEMPTS = 2
"""A process may also die, or stand still, for reasons that are not the clip's: each clip gets a second one."""

MOST_WORKERS = 8
"""Each takes about 60 MB; beyond eight, a disk is the bottleneck more often than a core."""


LISTENS = 0.5
"""Seconds after which the wait for answers is begun anew: only between two waits does Python see a Ctrl-C that came
just before one, or that the system gave to another thread."""


@dataclass(frozen=True)
class Job:
    """One sample's files, and whether they are to be decoded to their end."""

    video: Path
    image: Path | None = None
    full: bool = False


@dataclass(frozen=True)
class Seen:
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
    """One of the processes, and the job it is at."""

    def __init__(self) -> None:
        self.place, self.job, self.attempt = -1, Job(Path()), 0
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
        self.questions, self.answers = self.process.stdin, self.process.stdout

    def ask(self, place: int, job: Job, attempt: int) -> None:
        self.place, self.job, self.attempt = place, job, attempt
        image = job.image and str(job.image.absolute())  # it works in another folder
        question = {"video": str(job.video.absolute()), "image": image, "full": job.full}
        with contextlib.suppress(BrokenPipeError):  # it is dead: its silence will tell
            self.questions.write(json.dumps(question).encode() + b"\n")
            self.questions.flush()

    def answer(self) -> Seen | None:
        """What it found; None when it died over it.

        Raises:
            CogtuneError: it cannot work at all.
        """
        line = self.answers.readline()
        if not line.endswith(b"\n") and not line.endswith(b"}"):
            return None
        value = json.loads(line)
        if "failed" in value:
            message, hint = value["failed"]
            raise CogtuneError(message, hint)
        info = None if value["info"] is None else VideoInfo.from_dict(value["info"])
        image = None if value["image"] is None else ImageInfo(**value["image"])
        return Seen(info, image, tuple((code, message, hint) for code, message, hint in value["problems"]))

    def epitaph(self) -> Seen:
        """The finding about the clip that it died over.

        Raises:
            CogtuneError: it never got as far as a clip.
        """
        status, name = self.process.wait(), self.job.video.name
        self.errors.seek(0)
        said = self.errors.read().decode(errors="replace").splitlines()
        if status > 0 and said:  # Python ended it in good order: no decoder does that
            raise CogtuneError("the process that opens clips fails", "the last of it says why", details=said[-20:])
        if status == -signal.SIGALRM:
            message = f"{name} hangs the decoder: it gave nothing for {stall_seconds():g} seconds"
            return Seen(None, None, (("decoder-hung", message, "encode it again, or leave it out"),))
        reason = signal.Signals(-status).name if status < 0 else f"status {status}"
        if status == -signal.SIGKILL:
            reason += ", as the system does when memory runs out"
        message = f"{name} kills the decoder ({reason})"
        return Seen(None, None, (("decoder-died", message, "encode it again, or leave it out"),))

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.questions, self.answers, self.errors):
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def inspect(jobs: Iterable[Job], *, workers: int | None = None) -> Generator[tuple[int, Seen], None, None]:
    """Look at every job's files in ``workers`` processes; each job's place and what was seen, as they come.

    Args:
        workers: by default one for each core that this process may use, up to :data:`MOST_WORKERS`.

    Raises:
        CogtuneError: the processes cannot work.
    """
    workers = workers or min(MOST_WORKERS, _usable_cores())
    waiting = enumerate(jobs)
    again: deque[tuple[int, Job, int]] = deque()

    def following() -> tuple[int, Job, int] | None:
        if again:
            return again.popleft()
        return next(((place, job, 1) for place, job in waiting), None)

    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:

        def start(task: tuple[int, Job, int]) -> None:
            worker = _Worker()
            stack.callback(worker.end)
            selector.register(worker.answers, selectors.EVENT_READ, worker)
            worker.ask(*task)

        while len(selector.get_map()) < workers and (task := following()) is not None:
            start(task)
        while selector.get_map():
            for key, _ in selector.select(LISTENS):
                worker: _Worker = key.data
                seen = worker.answer()
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
                    selector.unregister(worker.answers)
                    worker.end()
                    if task is not None:
                        start(task)
                else:
                    worker.ask(*task)


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
