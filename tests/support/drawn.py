"""Videos whose motion and colours are known."""

from __future__ import annotations

import numpy as np

from cogtune.data.video.clips import Pixels


def grey(count: int, level: int) -> Pixels:
    """Frames of one level."""
    return np.full((count, 64, 96, 3), level, np.uint8)


def disc(speed: float, count: int = 9, *, size: tuple[int, int] = (64, 96), noise: float = 0.0) -> Pixels:
    """A light disc that moves to the right by ``speed`` pixels a frame on a dark background."""
    height, width = size
    y, x = np.mgrid[:height, :width] + 0.5
    random = np.random.default_rng(0)
    frames = []
    for number in range(count):
        cover = np.clip(0.5 - (np.hypot(x - (22 + speed * number), y - height / 2) - 11), 0, 1)
        frames.append(40 + 170 * cover + random.normal(0, noise, cover.shape))
    pixels = np.clip(np.stack(frames) + 0.5, 0, 240).astype(np.uint8)
    return np.repeat(pixels[..., None], 3, axis=3)


def pan(speed: int, count: int = 9) -> Pixels:
    """A soft pattern that moves to the left by ``speed`` pixels a frame."""
    y, x = np.mgrid[:64, : 96 + speed * count]
    wide = 128 + 50 * np.sin(x / 3.1 + np.sin(y / 5.3)) + 40 * np.cos(y / 4.1 + x / 9.7)
    frames = [wide[:, speed * number : speed * number + 96] for number in range(count)]
    return np.repeat(np.stack(frames).astype(np.uint8)[..., None], 3, axis=3)
