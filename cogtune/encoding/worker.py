"""What each process that fills a cache does: decoders before it, a writer behind it, the encoder never waiting.

Started by :func:`cogtune.encoding.jobs.fill_cache` as ``python -m cogtune.encoding.worker JOB``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cogtune.data.cache.index import ClipJob, EncodeJobs, ImageJob, TextJob
from cogtune.data.cache.store import EntryKind, Store
from cogtune.encoding.decoders import LOOKAHEAD_BYTES, DecodedJob, DecodeFailure, decoding, default_workers
from cogtune.encoding.jobs import EncodePlan, result_path, share
from cogtune.models.geometry import Size
from cogtune.run.launch import LaunchFiles
from cogtune.system import console
from cogtune.system.errors import CogtuneError
from cogtune.system.garbage import no_collections
from cogtune.system.json_files import write_json
from cogtune.system.out_of_memory import is_out_of_memory, out_of_memory
from cogtune.system.processes import StopRequest, run_worker

if TYPE_CHECKING:
    import torch

    from cogtune.modeling.encoders import Encoding, VideoEncoder

WRITERS = 2
UNWRITTEN = 8
"""Entries that may wait to be written."""


@dataclass
class EncodeOutcome:
    """What a process did, and how long what took; seconds and GiB.

    Args:
        complete: False when it was asked to stop before the end.
        failures: a line for each file that could not be decoded.
        first_clip: from the start until the first clip was encoded: loading, and compiling.
        steady_clips, steady: clips encoded after the first, and the time that took.
        busy: of that time, how long the device worked.
        waited: for decoding, encoding and writing.
        text_peak, video_peak: the most memory that PyTorch took of the GPU.
    """

    complete: bool = True
    clips: int = 0
    texts: int = 0
    images: int = 0
    failures: list[str] = field(default_factory=list)
    total: float = 0.0
    first_clip: float = 0.0
    steady_clips: int = 0
    steady: float = 0.0
    busy: float = 0.0
    waited: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("decoding", "encoding", "writing"), 0.0))
    text_peak: float = 0.0
    video_peak: float = 0.0

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Count the time of the block as waiting for ``what``."""
        start = time.perf_counter()
        yield
        self.waited[what] += time.perf_counter() - start

    @property
    def bottleneck(self) -> str:
        """What was waited for the longest."""
        return max(self.waited, key=lambda what: self.waited[what])


class Writer:
    """Writes entries in the background. The first failure comes back at the next call."""

    def __init__(self, store: Store, pool: ThreadPoolExecutor) -> None:
        self.store, self.pool = store, pool
        self.unwritten: deque[Future[None]] = deque()

    def write(self, kind: EntryKind, key: str, tensor: torch.Tensor) -> None:
        """Have ``tensor`` stored; waits while too many are.

        Raises:
            CogtuneError: an entry could not be written.
        """
        while len(self.unwritten) >= UNWRITTEN:
            self.unwritten.popleft().result()
        self.unwritten.append(self.pool.submit(self.store.write, kind, key, tensor))

    def finish(self) -> None:
        """Wait until all is written; raises as :meth:`write` does."""
        while self.unwritten:
            self.unwritten.popleft().result()


def encode(job: EncodePlan, stop: StopRequest, *, rank: int = 0, device: torch.device | None = None) -> EncodeOutcome:
    """Encode this process's part of a job, text first, so that the two encoders are never in memory together.

    Raises:
        CogtuneError: an entry cannot be written, or the GPU's memory is used up.
    """
    try:
        return _encode(job, stop, rank, device)
    except CogtuneError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        fits = "use a smaller --size, or free memory on the GPU"
        if job.options.tiling == "off":
            fits = "use --vae-tiling auto, which encodes in tiles what does not fit in one piece"
        raise out_of_memory(error, fits, doing="encoding") from error


def _encode(job: EncodePlan, stop: StopRequest, rank: int, device: torch.device | None) -> EncodeOutcome:
    with no_collections():
        from cogtune.modeling.devices import best_device

    device = device or best_device()
    processes = job.options.processes
    part = share(job.todo, rank, processes)
    workers = default_workers(processes) if job.options.workers is None else job.options.workers
    outcome = EncodeOutcome()
    began = time.perf_counter()
    with (
        decoding([*part.images, *part.clips], workers, limit=_lookahead(processes)) as decoded,
        ThreadPoolExecutor(WRITERS, "cogtune-write") as pool,
    ):
        writer = Writer(job.store, pool)
        outcome.complete = _encode_texts(job, part.texts, stop, device, writer, outcome) and _encode_clips(
            job, part, decoded, stop, device, writer, outcome
        )
        writer.finish()
    outcome.total = time.perf_counter() - began
    return outcome


def _lookahead(processes: int) -> int:
    import psutil

    return int(min(LOOKAHEAD_BYTES, psutil.virtual_memory().available // 4 // processes))


def _encode_texts(
    job: EncodePlan,
    texts: tuple[TextJob, ...],
    stop: StopRequest,
    device: torch.device,
    writer: Writer,
    outcome: EncodeOutcome,
) -> bool:
    with no_collections():
        from cogtune.modeling.devices import DTYPES
        from cogtune.modeling.encoders import TextEncoder

    if not texts:
        return True
    encoder = TextEncoder(
        job.base_model_dir, max_tokens=job.max_tokens, device=device, dtype=DTYPES[job.precision], tell=console.note
    )
    with console.progress("captions", len(texts)) as progress:
        for start in range(0, len(texts), encoder.batch):
            if stop:
                return False
            group = texts[start : start + encoder.batch]
            for text, embedding in zip(group, encoder.encode([text.caption for text in group]), strict=True):
                writer.write("text", text.key, embedding)
            outcome.texts += len(group)
            progress.advance(len(group))
    del encoder
    outcome.text_peak = _peak(device)
    return True


def _encode_clips(
    job: EncodePlan,
    part: EncodeJobs,
    decoded: Iterator[DecodedJob | DecodeFailure | None],
    stop: StopRequest,
    device: torch.device,
    writer: Writer,
    outcome: EncodeOutcome,
) -> bool:
    if not part.clips and not part.images:
        return True
    lane = _EncodePipeline(_video_encoder(job, part.clips, device), writer, outcome) if part.clips else None
    noun = "clips" if part.clips else "images"
    noun = noun if job.options.processes == 1 else f"{noun} of the first of {job.options.processes} processes"
    stopped = False
    with console.progress(noun, len(part.clips) + len(part.images)) as progress:
        while True:
            with outcome.waiting("decoding"):
                item = next(decoded, _END)
            stopped = item is not _END and bool(stop)
            if stopped or item is _END:
                break
            if isinstance(item, DecodeFailure):
                source = item.job.source if isinstance(item.job, ImageJob) else item.job.video
                outcome.failures.append(f"{source}: {item.reason}")
            elif isinstance(item, DecodedJob) and isinstance(item.job, ClipJob):
                assert lane is not None  # there are clips
                lane.encode(item.job, item.pixels)
            elif isinstance(item, DecodedJob):
                writer.write("image", item.job.key, item.pixels)
                outcome.images += 1
            if item is not None:
                progress.advance(1, _status(outcome))
        if lane is not None:
            lane.finish()
    outcome.video_peak = _peak(device)
    return not stopped


_END = object()


def _status(outcome: EncodeOutcome) -> str:
    if not outcome.steady_clips:
        return ""
    return f"{outcome.steady_clips / outcome.steady:.2f} clips/s, mostly waiting for {outcome.bottleneck}"


def _video_encoder(job: EncodePlan, clips: tuple[ClipJob, ...], device: torch.device) -> VideoEncoder:
    from cogtune.modeling.devices import DTYPES
    from cogtune.modeling.encoders import VideoEncoder, worth_compiling

    sizes = Counter(clip.frames.size for clip in clips)
    compiled: frozenset[Size] = frozenset()
    if job.options.compile == "on" or (job.options.compile == "auto" and device.type == "cuda"):
        always = job.options.compile == "on"
        compiled = frozenset(size for size, count in sizes.items() if always or worth_compiling(count, size))
    return VideoEncoder(
        job.base_model_dir,
        device=device,
        dtype=DTYPES[job.precision],
        tiling=job.options.tiling,
        compiled_sizes=compiled,
        tell=console.note,
    )


class _EncodePipeline:
    """The encoder, working on one clip while the next is prepared."""

    def __init__(self, encoder: VideoEncoder, writer: Writer, outcome: EncodeOutcome) -> None:
        self.encoder, self.writer, self.outcome = encoder, writer, outcome
        self.at_work: tuple[ClipJob, Encoding] | None = None
        self.began = time.perf_counter()
        self.first_done = 0.0

    def encode(self, job: ClipJob, pixels: torch.Tensor) -> None:
        """Have a clip encoded; the one before is written."""
        with self.outcome.waiting("encoding"):
            following = (job, self.encoder.start(pixels))
        self.finish()
        self.at_work = following
        if following[1].ended is None:  # not on a GPU: it is done
            self.finish()

    def finish(self) -> None:
        """Wait for the clip that is at work, if any, and have it written."""
        if self.at_work is None:
            return
        job, encoding = self.at_work
        self.at_work = None
        with self.outcome.waiting("encoding"):
            moments, busy = encoding.result()
        with self.outcome.waiting("writing"):
            self.writer.write("latents", job.key, moments)
        now = time.perf_counter()
        if not self.outcome.clips:
            self.first_done, self.outcome.first_clip = now, now - self.began
            self.outcome.waited = dict.fromkeys(
                self.outcome.waited, 0.0
            )  # of loading and compiling nothing can be learned about what follows
        else:
            self.outcome.steady_clips += 1
            self.outcome.steady = now - self.first_done
            self.outcome.busy += busy
        self.outcome.clips += 1


def _peak(device: torch.device) -> float:
    """Return GiB that PyTorch took of the GPU at most since the last time this was asked; what is unused is let go."""
    if device.type != "cuda":
        return 0.0
    import gc

    import torch

    gc.collect()
    torch.cuda.empty_cache()
    peak = torch.cuda.max_memory_reserved(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def main(arguments: list[str] | None = None) -> int:
    """Work through this process's part of one job file; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m cogtune.encoding.worker", description=__doc__)
    parser.add_argument("job", type=Path, help="the job's plan.json")
    parser.add_argument("--shared", action="store_true", help="the launcher started several of these")
    given = parser.parse_args(arguments)
    files = LaunchFiles(given.job.parent)
    rank = int(os.environ["RANK"]) if given.shared else 0

    def do(stop: StopRequest) -> bool:
        job = EncodePlan.read(given.job)
        stop.begins()
        if not given.shared:
            outcome = encode(job, stop)
        else:
            import torch
            from accelerate import PartialState

            state = PartialState(cpu=not torch.cuda.is_available())
            outcome = encode(job, stop, rank=state.process_index, device=state.device)
            state.destroy_process_group()
        write_json(result_path(files.folder, rank), asdict(outcome))
        return outcome.complete

    return run_worker(files.report(rank), files.log, do)


if __name__ == "__main__":
    raise SystemExit(main())
