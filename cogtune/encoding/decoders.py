"""Decoding in processes of their own: pixels arrive ready made, and a decoder that dies takes one clip with it.

Each decoder has a thread here that feeds it. Pixels come back in memory that both processes map, not through a pipe.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import queue
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import recv_handle, send_handle
from typing import TYPE_CHECKING

from cogtune.data.cache.index import ClipJob, ImageJob
from cogtune.system.children import Context, end_with_creator, forking
from cogtune.system.errors import CogtuneError

if TYPE_CHECKING:
    import torch

LOOKAHEAD_BYTES = 2 << 30
"""Pixels that may be in memory at a time, in work or waiting for the encoder: 40 clips of 49x480x720."""

MOST_HELD = 128
"""Jobs that may be in work or waiting at a time, however small: each takes a file handle, of which 1024 are common."""

DECODE_SECONDS = 300.0
"""A decoder that works longer than this on one clip is taken to hang; one of 49 frames takes about a second."""

MOST_WORKERS = 16
"""Decoders by default at most; each keeps a core busy, and a GPU is fed by far fewer."""

PixelJob = ClipJob | ImageJob


@dataclass(frozen=True)
class DecodedJob:
    """A job and its pixels: ``uint8 [F, 3, H, W]`` of a clip, ``uint8 [3, H, W]`` of an image."""

    job: PixelJob
    pixels: torch.Tensor


@dataclass(frozen=True)
class DecodeFailure:
    """A job whose file could not be decoded, and why."""

    job: PixelJob
    reason: str


def default_workers(processes: int = 1) -> int:
    """How many decoders each of ``processes`` encoding processes gets: the cores shared out, one left for itself."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_WORKERS, cores // processes - 1))


def load(job: PixelJob) -> torch.Tensor:
    """Return the pixels of a job, decoded and fitted.

    Raises:
        CogtuneError: the file cannot be read, is too short, or is not the one that the job's key was made of.
    """
    from cogtune.data.frames import load_clip, load_image

    if isinstance(job, ClipJob):
        return load_clip(job.video, job.frames, job.stamp)
    if job.from_video:
        return load_clip(job.source, job.frames, job.stamp)[0]
    return load_image(job.source, job.frames.size, job.frames, job.stamp)


@contextlib.contextmanager
def decoding(
    jobs: Sequence[PixelJob],
    workers: int,
    *,
    limit: int = LOOKAHEAD_BYTES,
    patience: float = DECODE_SECONDS,
    load: Callable[[PixelJob], torch.Tensor] = load,
) -> Iterator[Iterator[DecodedJob | DecodeFailure | None]]:
    """Decode ``jobs``, which starts at once; inside the block each comes out as soon as it is ready, in any order.

    A None comes out when nothing was ready for a second, so that the one who waits can look around.

    Args:
        workers: processes; 0 decodes in this one, when asked.
        limit: bytes of pixels in memory at a time; a single larger job is let through.
        patience: seconds after which a decoder is taken to hang.
        load: does one job; a function at the top of a module.
    """
    if not workers or not jobs:
        yield (_in_words(job, load) for job in jobs)
        return
    pool = _Pool(jobs, min(workers, len(jobs)), limit, patience, load)
    try:
        yield pool.results()
    finally:
        pool.close()


def _in_words(job: PixelJob, load: Callable[[PixelJob], torch.Tensor]) -> DecodedJob | DecodeFailure:
    try:
        return DecodedJob(job, load(job))
    except CogtuneError as error:
        return DecodeFailure(job, error.message)
    except Exception as error:  # one clip's misfortune, whatever it is, is not the others'
        return DecodeFailure(job, f"{type(error).__name__}: {error}")


def _bytes_of(job: PixelJob) -> int:
    size = job.frames.size
    return 3 * size.height * size.width * (size.num_frames if isinstance(job, ClipJob) else 1)


# ------------------------------------------------------------------------------------------- in the decoder


def _serve(connection: Connection, load: Callable[[PixelJob], torch.Tensor]) -> None:
    """Do the jobs that come in until the other side hangs up."""
    import torch

    end_with_creator()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the encoding process decides when to stop
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        connection.send("ready")
        while True:
            done = _in_words(connection.recv(), load)
            if isinstance(done, DecodeFailure):
                connection.send(done.reason)
                continue
            descriptor = _shared_memory()
            with open(descriptor, "wb") as memory:  # noqa: PTH123 (a descriptor, not a path)
                memory.write(done.pixels.numpy().data)
                memory.flush()
                connection.send(tuple(done.pixels.shape))
                send_handle(connection, descriptor, 0)  # only Windows asks to which process


def _shared_memory() -> int:
    """Return a descriptor of memory without a name: nothing is left of it when its last user dies."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("cogtune-pixels")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


# ------------------------------------------------------------------------------------- in the encoding process


class _Decoder:
    """One decoder process and the pipe to it."""

    def __init__(self, context: Context, load: Callable[[PixelJob], torch.Tensor]) -> None:
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(theirs, load), daemon=True)
        self.process.start()
        self.ready = False
        theirs.close()

    def do(self, job: PixelJob, patience: float) -> DecodedJob | DecodeFailure:
        """Return the job done; when the decoder dies or hangs, it is gone afterwards."""
        import torch

        try:
            if not self.ready:
                self.connection.recv()
                self.ready = True
            self.connection.send(job)
            if not self.connection.poll(patience):
                self.kill()
                return DecodeFailure(job, f"the decoder was still at work after {patience:g} s")
            said = self.connection.recv()
            if isinstance(said, str):
                return DecodeFailure(job, said)
            descriptor = recv_handle(self.connection)
        except (EOFError, OSError):
            self.kill()
            return DecodeFailure(job, f"the decoder died of it ({_end_of(self.process)})")
        memory = mmap.mmap(descriptor, 0)  # let go with the tensor
        os.close(descriptor)
        return DecodedJob(job, torch.frombuffer(memory, dtype=torch.uint8).reshape(said))

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _end_of(process: BaseProcess) -> str:
    code = process.exitcode or 0
    return signal.Signals(-code).name if code < 0 else f"status {code}"


class _Pool:
    """Decoders, their threads, and what they have ready."""

    def __init__(
        self,
        jobs: Sequence[PixelJob],
        workers: int,
        limit: int,
        patience: float,
        load: Callable[[PixelJob], torch.Tensor],
    ) -> None:
        self.waiting = list(reversed(jobs))
        self.count = len(jobs)
        self.limit, self.patience, self.load = limit, patience, load
        self.context = forking(["torch", "numpy", "av", "cogtune.data.frames"])  # it knows nothing of CUDA
        self.held = self.count_held = 0
        self.closed = False
        self.room = threading.Condition()
        self.ready: queue.SimpleQueue[DecodedJob | DecodeFailure | BaseException] = queue.SimpleQueue()
        self.decoders: dict[int, _Decoder] = {}
        self.threads = [threading.Thread(target=self._work, args=(number,), daemon=True) for number in range(workers)]
        for thread in self.threads:
            thread.start()

    def results(self) -> Iterator[DecodedJob | DecodeFailure | None]:
        """Each job's result; the memory of one is given back when the next is asked for."""
        given = 0
        while given < self.count:
            try:
                done = self.ready.get(timeout=1.0)
            except queue.Empty:
                yield None
                continue
            if isinstance(done, BaseException):
                raise done
            given += 1
            yield done
            self._give_back(_bytes_of(done.job))

    def close(self) -> None:
        """End every decoder, whatever it is at."""
        with self.room:
            self.closed = True
            self.room.notify_all()
            decoders = list(self.decoders.values())
        for decoder in decoders:
            decoder.process.kill()
        for thread in self.threads:
            thread.join()

    def _work(self, number: int) -> None:
        try:
            while (job := self._next_job()) is not None:
                decoder = self.decoders.get(number) or self._start(number)
                if decoder is None:
                    return
                self.ready.put(decoder.do(job, self.patience))
                if decoder.connection.closed:
                    del self.decoders[number]
        except BaseException as error:
            self.ready.put(error)
        finally:
            decoder = self.decoders.get(number)
            if decoder is not None:
                decoder.kill()

    def _start(self, number: int) -> _Decoder | None:
        with self.room:  # close() sees every decoder there is
            if self.closed:
                return None
            self.decoders[number] = _Decoder(self.context, self.load)
            return self.decoders[number]

    def _next_job(self) -> PixelJob | None:
        with self.room:
            while self.waiting and not self.closed:
                needed = _bytes_of(self.waiting[-1])
                if not self.held or (self.held + needed <= self.limit and self.count_held < MOST_HELD):
                    self.held += needed
                    self.count_held += 1
                    return self.waiting.pop()
                self.room.wait()
            return None

    def _give_back(self, count: int) -> None:
        with self.room:
            self.held -= count
            self.count_held -= 1
            self.room.notify_all()
