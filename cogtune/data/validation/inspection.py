"""Inspection of clips in separate processes, so that one that crashes or hangs its decoder is only a finding.

A damaged file can make a decoder hang, crash or ask for all memory. Only its own process is lost then.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from cogtune.data.video.container import DamagedVideo, VideoError, VideoInfo, check_decoded, decode_all, import_av
from cogtune.data.video.images import HINT, ImageInfo, measure_image
from cogtune.data.video.probing import probe
from cogtune.system.errors import CogtuneError
from cogtune.system.pool import Beat, Lost, PoolOptions, processing, usable_cores

ATTEMPTS = 2
"""Attempts per clip, since a process may also die or hang for other reasons."""

MOST_WORKERS = 8
"""Most processes: each takes about 60 MB, and beyond eight the disk is often the bottleneck."""

STALL_VARIABLE = "COGTUNE_STALL_SECONDS"
"""Environment variable: how long a decoder may produce nothing before it counts as hung."""

STALL_SECONDS = 30.0

SECONDS_PER_BYTE = 1e-7
"""Extra time per byte while a file is opened, since some have to be read to their end."""

MOST_MEMORY = 4 << 30
"""Most bytes of address space of an inspection, since a damaged header may ask for any amount. An 8K clip takes about a
quarter of it."""


@dataclass(frozen=True)
class InspectionJob:
    """One sample's files, and whether to decode them completely."""

    video: Path
    image: Path | None = None
    full: bool = False


@dataclass(frozen=True)
class Inspection:
    """The result of inspecting one sample's files.

    Args:
        info: the clip's properties, if it could be opened.
        image: the image's properties, if there is one that could be opened.
        problems: code, message and hint of each problem.
    """

    info: VideoInfo | None
    image: ImageInfo | None
    problems: tuple[tuple[str, str, str], ...]


def inspect(
    jobs: Iterable[InspectionJob], *, workers: int | None = None
) -> Generator[tuple[int, Inspection], None, None]:
    """Inspect every job's files in ``workers`` processes; yield each job's position and result as they come.

    Args:
        workers: by default one per core that this process may use, up to :data:`MOST_WORKERS`.

    Raises:
        CogtuneError: the processes cannot start.
    """
    limit = stall_seconds()
    options = PoolOptions[InspectionJob](
        patience=limit,
        preload=["numpy", "av", "cogtune.data.validation.inspection"],
        prepare=prepare,
        attempts=ATTEMPTS,
    )
    absolute = (  # the processes work in another folder
        InspectionJob(job.video.absolute(), job.image and job.image.absolute(), job.full) for job in jobs
    )
    with processing(partial(look, limit), absolute, workers or min(MOST_WORKERS, usable_cores()), options) as results:
        for item in results:
            if item is not None:
                place, job, seen = item
                yield place, _epitaph(job.video.name, seen, limit) if isinstance(seen, Lost) else seen


def stall_seconds() -> float:
    """Return the time limit, from the environment or by default."""
    try:
        return max(0.01, float(os.environ[STALL_VARIABLE]))
    except (KeyError, ValueError):
        return STALL_SECONDS


def _epitaph(name: str, lost: Lost, limit: float) -> Inspection:
    """Return the problem of a clip on which a process was lost."""
    if lost.silence:
        message = f"{name} hangs the decoder: no output for {limit:g} seconds"
        return Inspection(None, None, (("decoder-hung", message, "encode it again, or remove it"),))
    memory = ", as when memory runs out" if lost.end == "SIGKILL" else ""
    message = f"{name} crashes the decoder ({lost.end}{memory})"
    return Inspection(None, None, (("decoder-died", message, "encode it again, or remove it"),))


# ------------------------------------------------------------------------------------------- in a process


def look(limit: float, job: InspectionJob, beat: Beat) -> Inspection:
    """Inspect one clip and its image; ``limit`` is that of :func:`stall_seconds`."""
    problems: list[tuple[str, str, str]] = []
    info, image = None, None

    def tick() -> None:
        beat(limit)

    try:
        _allow_for_size(job.video, limit, beat)
        info = probe(job.video, tick)
        if job.full:
            decoded = decode_all(job.video, tick)
            info = replace(info, interlaced=info.interlaced or decoded.interlaced)
            check_decoded(job.video, info.num_frames, decoded)
    except Exception as error:
        problem = error if isinstance(error, VideoError) else _unforeseen(job.video, error)
        problems.append((problem.code, f"{job.video.name} {problem.reason}", problem.hint))
    if job.image is not None and not job.image.is_file():
        problems.append(("missing-image", f"{job.image.name} does not exist", "check the path"))
    elif job.image is not None:
        try:
            _allow_for_size(job.image, limit, beat)
            image = measure_image(job.image, full=job.full)
        except Exception as error:
            if not isinstance(error, CogtuneError):
                error = CogtuneError(f"cannot read the image {job.image}: {error}", HINT)
            problems.append(("unreadable-image", error.message, error.hint))
    return Inspection(info, image, tuple(problems))


def _allow_for_size(path: Path, limit: float, beat: Beat) -> None:
    """Extend the time limit while a file is opened, by its size."""
    with contextlib.suppress(OSError):
        limit += path.stat().st_size * SECONDS_PER_BYTE
    beat(limit)


def _unforeseen(video: Path, error: Exception) -> VideoError:
    if isinstance(error, MemoryError):
        return DamagedVideo(video, f"asks for more memory than {MOST_MEMORY >> 30} GiB")
    return DamagedVideo(video, f"makes the decoder fail: {type(error).__name__}: {error}")


def prepare() -> None:
    """Prepare this process to decode: it is the first to be killed when memory runs out, and silences libraries.

    Raises:
        CogtuneError: PyAV cannot be imported.
    """
    import_av()
    with open(os.devnull, "wb") as nothing:  # noqa: PTH123 (a device, not a file)
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    try:
        import resource
    except ImportError:  # Windows
        return
    import psutil

    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = psutil.Process().memory_info().vms + MOST_MEMORY
    with contextlib.suppress(OSError, ValueError):  # not every system has this limit
        resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
