"""Decoding for the encoders, in processes of their own: pixels arrive ready made, and a clip costs its own at most."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from cogtune.data.cache.index import ClipJob, ImageJob
from cogtune.system.errors import CogtuneError
from cogtune.system.pool import Beat, Lost, PoolOptions, processing, usable_cores

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
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
    """Return how many decoders each of ``processes`` encoding processes gets: the cores shared out, one left for
    itself."""
    return max(1, min(MOST_WORKERS, usable_cores() // processes - 1))


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

    A None comes out when nothing was ready for a while, so that the one who waits can look around.

    Args:
        workers: processes; 0 decodes in this one, when asked.
        limit: bytes of pixels in memory at a time; a single larger job is let through.
        patience: seconds after which a decoder is taken to hang.
        load: does one job; a function at the top of a module.
    """
    options = PoolOptions[PixelJob](
        patience=patience,
        preload=["torch", "numpy", "av", "cogtune.data.frames"],
        prepare=_prepare,
        most_held=MOST_HELD,
        cost=_bytes_of,
        most_cost=limit,
    )
    with processing(partial(_pixels_of, load), jobs, min(workers, len(jobs)), options) as results:
        yield (None if item is None else _result_of(item[1], item[2], patience) for item in results)


def _prepare() -> None:
    import torch

    torch.set_num_threads(1)


def _pixels_of(load: Callable[[PixelJob], torch.Tensor], job: PixelJob, _beat: Beat) -> npt.NDArray[np.uint8] | str:
    """Return the pixels of a job, or why there are none."""
    try:
        pixels: npt.NDArray[np.uint8] = load(job).numpy()
        return pixels
    except CogtuneError as error:
        return error.message
    except Exception as error:  # one clip's misfortune, whatever it is, is not the others'
        return f"{type(error).__name__}: {error}"


def _result_of(job: PixelJob, found: npt.NDArray[np.uint8] | str | Lost, patience: float) -> DecodedJob | DecodeFailure:
    import torch

    if isinstance(found, str):
        return DecodeFailure(job, found)
    if not isinstance(found, Lost):
        return DecodedJob(job, torch.from_numpy(found))
    if found.silence:
        return DecodeFailure(job, f"decoding did not finish within {patience:g} s")
    return DecodeFailure(job, f"the decoder died of it ({found.end})")


def _bytes_of(job: PixelJob) -> int:
    size = job.frames.size
    return 3 * size.height * size.width * (size.num_frames if isinstance(job, ClipJob) else 1)
