"""How alike two videos are, by small copies of both."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from cogtune.data.video.clips import Pixels

Thumbnail = npt.NDArray[np.float32]
"""A video of :data:`SIZE`, ``[F, H, W, 3]``, from 0 to 1."""

SIZE = (8, 24, 36)
"""Frames, height and width of a thumbnail: coarse enough that noise and small shifts count little."""


def thumbnail(frames: Pixels) -> Thumbnail:
    """Return a small copy of a video ``uint8 [F, H, W, 3]`` of any size: the mean over each part of it."""
    video = torch.from_numpy(frames.copy()).float().div(255).permute(3, 0, 1, 2)
    small: Thumbnail = functional.adaptive_avg_pool3d(video, SIZE).permute(1, 2, 3, 0).numpy()
    return small


def distance(one: Thumbnail, other: Thumbnail) -> float:
    """Return the root mean square difference of two thumbnails, from 0 to 1."""
    return float(np.sqrt(np.square(one - other, dtype=np.float64).mean()))


def to_nearest(video: Thumbnail, others: Sequence[Thumbnail]) -> tuple[float, int]:
    """Return the distance from a video to the nearest of ``others``, and its number."""
    distances = [distance(video, other) for other in others]
    number = int(np.argmin(distances))
    return distances[number], number


def usual_distance(clips: Sequence[Thumbnail], otherwise: Sequence[Thumbnail]) -> float | None:
    """Return how far a clip usually is from the nearest other one.

    Args:
        clips: the training clips.
        otherwise: videos whose distance to the nearest clip is taken if there is only one clip.
    """
    if len(clips) > 1:
        apart = [to_nearest(clip, [other for other in clips if other is not clip])[0] for clip in clips]
    else:
        apart = [to_nearest(video, clips)[0] for video in otherwise] if clips else []
    return float(np.median(apart)) if apart else None
