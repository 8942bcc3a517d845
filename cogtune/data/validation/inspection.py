"""Looking at clips in other processes, so that one which kills or hangs its decoder is a finding, and no more.

A damaged file can make a decoder hang, crash or ask for all the memory there is. There it takes one process with it
and nothing else.
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
"""A process may also die, or stand still, for reasons that are not the clip's: each clip gets a second one."""

MOST_WORKERS = 8
"""Each takes about 60 MB; beyond eight, a disk is the bottleneck more often than a core."""

STALL_VARIABLE = "COGTUNE_STALL_SECONDS"
"""Environment variable: how long a decoder may go without giving anything before it counts as hung."""

STALL_SECONDS = 30.0

SECONDS_PER_BYTE = 1e-7
"""What a file's size adds to that while it is opened: some have to be read to their end for it."""

MOST_MEMORY = 4 << 30
"""Bytes of address space that a look may take; a damaged header may ask for any amount. A clip of 8K takes about a
quarter of it."""


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


def inspect(
    jobs: Iterable[InspectionJob], *, workers: int | None = None
) -> Generator[tuple[int, Inspection], None, None]:
    """Look at every job's files in ``workers`` processes; each job's place and what was seen, as they come.

    Args:
        workers: by default one for each core that this process may use, up to :data:`MOST_WORKERS`.

    Raises:
        CogtuneError: the processes cannot work.
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
    """Return the finding about a clip that a process was lost over."""
    if lost.silence:
        message = f"{name} hangs the decoder: it gave nothing for {limit:g} seconds"
        return Inspection(None, None, (("decoder-hung", message, "encode it again, or leave it out"),))
    memory = ", as the system does when memory runs out" if lost.end == "SIGKILL" else ""
    message = f"{name} kills the decoder ({lost.end}{memory})"
    return Inspection(None, None, (("decoder-died", message, "encode it again, or leave it out"),))


# ------------------------------------------------------------------------------------------- in a process


def look(limit: float, job: InspectionJob, beat: Beat) -> Inspection:
    """Return what there is to see of one clip and its image; ``limit`` as :func:`stall_seconds` gives it."""
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
        problems.append(("missing-image", f"{job.image.name} is not there", "check the path"))
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
    """Give the opening of a file the time that its size may take."""
    with contextlib.suppress(OSError):
        limit += path.stat().st_size * SECONDS_PER_BYTE
    beat(limit)


def _unforeseen(video: Path, error: Exception) -> VideoError:
    if isinstance(error, MemoryError):
        return DamagedVideo(video, f"asks for more memory than {MOST_MEMORY >> 30} GiB")
    return DamagedVideo(video, f"makes the decoder fail: {type(error).__name__}: {error}")


def prepare() -> None:
    """Let this process be the one that ends when a decoder goes wrong, and keep what libraries print to itself.

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
