"""What a video looks like: colour, contrast, sharpness, motion."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from cogtune.data.video.clips import Pixels
from cogtune.quality.motion import brightness, measure_motion
from cogtune.run.comparison import LOOKS, Look, Range

_DARKEST, _BRIGHTEST = 2, 253
"""A channel at or beyond these values has lost its details."""

_ENDS = (0.05, 0.95)
"""The quantiles that a range reaches to, so that one odd clip does not decide it."""


def measure_look(frames: Pixels) -> Look:
    """Measure a video ``uint8 [F, H, W, 3]``; :class:`cogtune.run.comparison.Look` says what each figure is."""
    moved = measure_motion(frames)
    spread = frames.max(axis=3).astype(np.float64) - frames.min(axis=3)
    luma = brightness(frames)
    lost = (frames <= _DARKEST) | (frames >= _BRIGHTEST)
    return Look(
        motion=moved.speed,
        flicker=moved.flicker,
        saturation=float(spread.mean()) / 255,
        contrast=float(luma.flatten(1).std(dim=1, unbiased=False).mean()),
        sharpness=_sharpness(luma),
        clipped=float(lost.any(axis=3).mean()),
    )


def _sharpness(luma: torch.Tensor) -> float:
    """Return the mean deviation of the frames' Laplacian.

    Source: Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy" (2000), as its square root.
    """
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]]).view(1, 1, 3, 3)
    edges = functional.conv2d(luma.unsqueeze(1), kernel)
    return float(edges.flatten(1).std(dim=1, unbiased=False).mean())


def mean_look(looks: Sequence[Look]) -> Look:
    """Return the means of several videos' figures."""
    return Look(**{name: float(np.mean([getattr(look, name) for look in looks])) for name in LOOKS})


def ranges_of(looks: Sequence[Look]) -> dict[str, Range]:
    """Return the range of each figure over several videos; empty without any."""
    if not looks:
        return {}
    ends = {name: np.quantile([getattr(look, name) for look in looks], _ENDS) for name in LOOKS}
    return {name: Range(low=float(low), high=float(high)) for name, (low, high) in ends.items()}
