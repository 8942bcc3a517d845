"""What stands in for decoding a clip: in a module that the decoders' processes import quickly."""

from __future__ import annotations

import os
import time

import torch

from cogtune.data.cache.index import ClipJob
from cogtune.encoding.decoders import PixelJob, load


def die_or_hang(job: PixelJob) -> torch.Tensor:
    """A decoder that the first clip kills and the second hangs; others are decoded."""
    assert isinstance(job, ClipJob)
    if job.video.name.startswith("01"):
        os.kill(os.getpid(), 11)
    if job.video.name.startswith("02"):
        time.sleep(1000)
    if job.video.name.startswith("03"):
        raise ZeroDivisionError("of its own")
    return load(job)


def speck(job: PixelJob) -> torch.Tensor:
    return torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
