"""Motion and flicker of a video, from its optical flow.

The flow is that of Lucas and Kanade, at every pixel of a pyramid, as in Bouguet, "Pyramidal Implementation of the
Lucas Kanade Feature Tracker" (2001). It needs no network and no library besides torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from cogtune.data.video.clips import Pixels

_LONG_SIDE = 160
"""Larger frames are reduced to this length before the flow is computed; the result is scaled back."""

_SHORTEST = 12
"""Smallest side of the coarsest level of the pyramid, in pixels."""

_ITERATIONS = 3
_REACH, _SIGMA = 4, 2.0
"""Half the width of the window, and its Gaussian's deviation, in pixels of each level."""

_REGULAR = 1e-4
"""Added to the structure tensor, so that the flow is zero where nothing can be seen to move."""

_NOISE = 0.02
"""Slopes per pixel, of a brightness from 0 to 1, that count as noise of the sampling and of the file."""

_WEIGHTS = (0.299, 0.587, 0.114)
"""Of red, green and blue in the brightness (ITU-R BT.601)."""


@dataclass(frozen=True)
class Motion:
    """How a video changes from frame to frame."""

    speed: float
    """Mean length of the optical flow, in pixels per frame, where there is something to see: each pixel counts by its
    slope, so that a plain background neither adds to it nor takes away from it."""
    flicker: float
    """Mean change of brightness, from 0 to 255, that the flow does not explain. Source: the warping error of Lai et
    al., "Learning Blind Video Temporal Consistency" (2018), with absolute values."""


def measure_motion(frames: Pixels) -> Motion:
    """Measure the motion of a video ``uint8 [F, H, W, 3]``; both figures are 0 for a single frame."""
    if len(frames) < 2:
        return Motion(0.0, 0.0)
    luma = brightness(frames).unsqueeze(1)  # [F, 1, H, W]
    scale = max(1.0, max(luma.shape[2:]) / _LONG_SIDE)
    if scale > 1:
        size = [max(1, round(side / scale)) for side in luma.shape[2:]]
        luma = functional.interpolate(luma, size, mode="area")
    before, after = luma[:-1], luma[1:]
    flow = optical_flow(before, after)
    across, along = _slopes(before)
    seen = ((across.square() + along.square()).sqrt() - _NOISE).clip(0)
    total = float(seen.sum())
    speed = float((flow.square().sum(1, keepdim=True).sqrt() * seen).sum()) / total * scale if total > 0 else 0.0
    flicker = float((_warped(after, flow) - before).abs().mean()) * 255
    return Motion(speed, flicker)


def brightness(frames: Pixels) -> Tensor:
    """Return the brightness ``[F, H, W]`` of frames ``uint8 [F, H, W, 3]``, from 0 to 1."""
    return torch.from_numpy(frames.copy()).float().div(255) @ torch.tensor(_WEIGHTS)


def optical_flow(before: Tensor, after: Tensor) -> Tensor:
    """Return the flow ``[B, 2, H, W]`` that leads from ``before`` to ``after``, in pixels to the right and down.

    Args:
        before: brightness ``[B, 1, H, W]``, from 0 to 1.
        after: the same, one frame later.
    """
    levels = [(before, after)]
    while min(levels[-1][0].shape[2:]) // 2 >= _SHORTEST:
        levels.append((functional.avg_pool2d(levels[-1][0], 2), functional.avg_pool2d(levels[-1][1], 2)))
    coarse_height, coarse_width = levels[-1][0].shape[2:]
    flow = before.new_zeros(len(before), 2, coarse_height, coarse_width)
    for one, other in reversed(levels):
        height, width = one.shape[2:]
        if flow.shape[2:] != one.shape[2:]:
            factors = flow.new_tensor([width / flow.shape[3], height / flow.shape[2]]).view(1, 2, 1, 1)
            flow = functional.interpolate(flow, (height, width), mode="bilinear", align_corners=False) * factors
        for _ in range(_ITERATIONS):
            flow = flow + _step(one, _warped(other, flow))
    return flow


def _step(before: Tensor, warped: Tensor) -> Tensor:
    """Return the change of the flow ``[B, 2, H, W]`` that best explains what still differs, at most a pixel."""
    across, along = _slopes((before + warped) / 2)
    left = before - warped
    products = torch.cat([across * across, across * along, along * along, across * left, along * left], dim=1)
    xx, xy, yy, x, y = _windowed(products).split(1, dim=1)
    xx, yy = xx + _REGULAR, yy + _REGULAR
    determinant = xx * yy - xy * xy
    step = torch.cat([yy * x - xy * y, xx * y - xy * x], dim=1) / determinant
    clipped: Tensor = step.clip(-1, 1)
    return clipped


def _slopes(picture: Tensor) -> tuple[Tensor, Tensor]:
    """Return the change of brightness per pixel to the right and down, by central differences."""
    padded = functional.pad(picture, (1, 1, 1, 1), mode="replicate")
    across = (padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]) / 2
    along = (padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]) / 2
    return across, along


def _windowed(values: Tensor) -> Tensor:
    """Return the Gaussian mean around each pixel of ``[B, C, H, W]``."""
    places = torch.arange(-_REACH, _REACH + 1, dtype=values.dtype)
    kernel = torch.exp(-places.square() / (2 * _SIGMA**2))
    kernel = kernel / kernel.sum()
    flat = values.reshape(-1, 1, *values.shape[2:])
    flat = functional.conv2d(functional.pad(flat, (_REACH, _REACH, 0, 0), mode="replicate"), kernel.view(1, 1, 1, -1))
    flat = functional.conv2d(functional.pad(flat, (0, 0, _REACH, _REACH), mode="replicate"), kernel.view(1, 1, -1, 1))
    return flat.reshape(values.shape)


def _warped(picture: Tensor, flow: Tensor) -> Tensor:
    """Return ``picture`` where the flow leads from each pixel; beyond the edge it repeats."""
    height, width = picture.shape[2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    across = (x + flow[:, 0] + 0.5) / width * 2 - 1
    along = (y + flow[:, 1] + 0.5) / height * 2 - 1
    grid = torch.stack([across, along], dim=-1)
    warped: Tensor = functional.grid_sample(picture, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return warped
