"""Detection of colour, shape, motion and background in clips of the nano world, from pixels, without a network.

Each frame is split into background (a colour a row, the median over time and width) and cover (how far a pixel lies
from it towards the shape's own colour). The cover, brought to a standard place and size, is compared with every shape's
own; the paths of its centre and its area give the motion. Whatever does not fit is None: a blob is no disc.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cogtune.data.nano import world
from cogtune.data.video.clips import Pixels

Array = npt.NDArray[np.float64]

_LEAST_DISTANCE = 45.0
"""Smallest RGB distance of a foreground pixel from its background."""
_MOST_SPREAD = 50.0
"""Largest median RGB distance of an object's pixels from its colour."""
_LEAST_AREA, _MOST_AREA = 60.0, 2000.0
_LEAST_FRAMES = 0.8
"""Smallest fraction of frames that must show the object, with the same shape."""
_ALIKE, _AHEAD = 0.91, 0.03
"""Smallest similarity (Dice, 1 is equal) of an object's cover to its shape's, and lead over the next shape."""
_COLOUR_RADIUS, _BACKGROUND_RADIUS = 60.0, 45.0
_GRID = 28
"""Side of an object's normalized picture."""
_SPAN = 2.3
"""Half its width, in radii of a disc of the object's area."""


@dataclass(frozen=True)
class Reading:
    """What was detected in a clip; None for what is unknown. ``confidence`` from 0 to 1 is that of the shape.

    ``path [F, 3]`` is the object's centre and the radius of a disc of its area, in pixels; NaN if it is not visible.
    """

    colour: str | None
    shape: str | None
    motion: str | None
    background: str | None
    confidence: float
    path: Array

    def shows(self, subject: world.Subject) -> bool:
        """Return whether colour, shape and motion are those of ``subject``."""
        return (self.colour, self.shape, self.motion) == subject.combination


def detect(frames: Pixels) -> Reading:
    """Detect the contents of a clip ``uint8 [F, H, W, 3]`` of any size; it was measured on the world's 17x64x96."""
    pixels = frames.astype(np.float64)
    rows = np.median(pixels, axis=(0, 2))  # [H, 3]
    background = _background(rows)
    offset = pixels - rows[:, None]
    distance = np.sqrt((offset**2).sum(-1))
    paint = _paint(pixels, distance)
    if paint is None:
        return Reading(None, None, None, background, 0.0, np.full((len(frames), 3), np.nan))
    towards = paint - rows[:, None]  # [H, 1, 3]
    cover = (offset * towards).sum(-1) / np.maximum((towards**2).sum(-1), 1.0)
    cover = _sharpened(_main_part(cover))
    path = _path(cover)
    seen = np.isfinite(path[:, 0])
    if seen.mean() < _LEAST_FRAMES:
        return Reading(None, None, None, background, 0.0, path)
    colour = _nearest(paint, world.COLOURS | world.NEW_COLOURS, _COLOUR_RADIUS)
    shape, confidence = _shape(cover[seen], path[seen])
    motion = _motion(path, frames.shape[1], frames.shape[2]) if shape else None
    return Reading(colour, shape, motion, background, confidence, path)


def _paint(pixels: Array, distance: Array) -> Array | None:
    """Return the object's colour: the median of the pixels farthest from the background, if they have one colour."""
    far = distance > _LEAST_DISTANCE
    if far.mean() * far[0].size < _LEAST_AREA / 2:
        return None
    inside = far & (distance > 0.75 * np.quantile(distance[far], 0.9))
    colours = pixels[inside]
    paint: Array = np.median(colours, axis=0)
    spread = float(np.median(np.sqrt(((colours - paint) ** 2).sum(-1))))
    return paint if spread < _MOST_SPREAD else None


def _main_part(cover: Array) -> Array:
    """Return the cover without stray pixels: that in the window around the densest place of each frame."""
    kept = np.where(cover > 0.3, cover, 0.0).clip(0, 1)
    averaged = _box(kept, 1)
    return np.where(averaged > 0.2, kept, 0.0)


def _box(values: Array, reach: int) -> Array:
    """Return the mean over squares of ``2 * reach + 1`` pixels, of each frame."""
    padded = np.pad(values, ((0, 0), (reach, reach), (reach, reach)), mode="edge")
    size = 2 * reach + 1
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(1, 2))
    means: Array = windows.mean(axis=(-1, -2))
    return means


def _sharpened(cover: Array) -> Array:
    """Return the cover with steeper edges about one half, so that slight blur does not change a shape."""
    return ((cover - 0.5) * 2 + 0.5).clip(0, 1)


def _path(cover: Array) -> Array:
    """Return centre and radius ``[F, 3]`` of the object in each frame; NaN if its area is too small or too large."""
    height, width = cover.shape[1:]
    area = cover.sum(axis=(1, 2))
    safe = np.maximum(area, 1e-9)
    x = (cover.sum(axis=1) * (np.arange(width) + 0.5)).sum(-1) / safe
    y = (cover.sum(axis=2) * (np.arange(height) + 0.5)).sum(-1) / safe
    path: Array = np.stack([x, y, np.sqrt(area / np.pi)], axis=1)
    path[(area < _LEAST_AREA) | (area > _MOST_AREA)] = np.nan
    return path


def _standard(cover: Array, path: Array) -> Array:
    """Return each frame's object in the middle of a ``_GRID`` square, scaled to one area: ``[F, G, G]``, bilinear."""
    height, width = cover.shape[1:]
    steps = (np.arange(_GRID) + 0.5) / _GRID * 2 - 1
    x = path[:, 0, None] + _SPAN * path[:, 2, None] * steps - 0.5  # [F, G]
    y = path[:, 1, None] + _SPAN * path[:, 2, None] * steps - 0.5
    padded = np.pad(cover, ((0, 0), (1, 1), (1, 1)))
    x, y = x.clip(-1, width) + 1, y.clip(-1, height) + 1
    left, above = np.minimum(np.floor(x), width).astype(int), np.minimum(np.floor(y), height).astype(int)
    right, below = (x - left)[:, None, :], (y - above)[:, :, None]
    frame = np.arange(len(cover))[:, None, None]
    columns, lines = left[:, None, :], above[:, :, None]
    upper = padded[frame, lines, columns] * (1 - right) + padded[frame, lines, columns + 1] * right
    lower = padded[frame, lines + 1, columns] * (1 - right) + padded[frame, lines + 1, columns + 1] * right
    pictures: Array = upper * (1 - below) + lower * below
    return pictures


@functools.lru_cache(maxsize=1)
def _templates() -> tuple[tuple[str, ...], Array]:
    """Return every shape's normalized picture ``[S, G, G]``, made from drawn clips."""
    names = tuple(world.SHAPES | world.NEW_SHAPES)
    pictures = []
    for name in names:
        scene = world.scene_of(world.Subject("white", name, "still", "black"), np.random.default_rng(0))
        places = np.random.default_rng(1).uniform([40, 28, 11], [56, 36, 14], scene.poses.shape)
        scene = world.Scene(scene.subject, "", places, np.full(3, 255.0), np.zeros(3), np.zeros(3))
        cover = _sharpened(world.draw(scene)[..., 0] / 255.0)
        pictures.append(_standard(cover, _path(cover)).mean(axis=0))
    return names, np.stack(pictures)


def _shape(cover: Array, path: Array) -> tuple[str | None, float]:
    """Return the shape that most frames show, and its similarity; None if there is none."""
    names, templates = _templates()
    pictures = _standard(cover, path)[:, None]  # [F, 1, G, G]
    both = np.minimum(pictures, templates).sum(axis=(2, 3))
    dice = 2 * both / (pictures.sum(axis=(2, 3)) + templates.sum(axis=(1, 2)))  # [F, S]
    votes = np.bincount(dice.argmax(axis=1), minlength=len(names))
    best = int(votes.argmax())
    likeness = float(np.median(dice[:, best]))
    ahead = likeness - float(np.delete(np.median(dice, axis=0), best).max())
    sure = votes[best] >= _LEAST_FRAMES * len(dice) and likeness >= _ALIKE and ahead >= _AHEAD
    return (names[best] if sure else None), likeness


def _nearest(colour: Array, table: dict[str, world.Rgb], radius: float) -> str | None:
    distances = {name: float(np.linalg.norm(colour - np.array(rgb))) for name, rgb in table.items()}
    name = min(distances, key=lambda key: distances[key])
    return name if distances[name] <= radius else None


def _background(rows: Array) -> str | None:
    """Return the background with the rows' colours, from top to bottom."""
    down = ((np.arange(len(rows)) + 0.5) / len(rows))[:, None]
    best, least = None, _BACKGROUND_RADIUS
    for name, (top, bottom) in world.BACKGROUNDS.items():
        own = np.array(top) * (1 - down) + np.array(bottom) * down
        distance = float(np.sqrt(((rows - own) ** 2).sum(-1)).mean())
        if distance < least:
            best, least = name, distance
    return best


def _motion(path: Array, height: int, width: int) -> str | None:
    """Return the motion of a path, by rules on its length and its turns."""
    path = path[np.isfinite(path[:, 0])]
    x, y, radius = path[:, 0] / width * 96, path[:, 1] / height * 64, path[:, 2] / height * 64
    reach_x, reach_y = np.ptp(x), np.ptp(y)
    scale = radius / np.median(radius)
    swing, growth = np.ptp(_smooth(scale)), float(np.log(scale[-3:].mean() / scale[:3].mean()))
    if reach_x < 7 and reach_y < 7:
        if swing < 0.12 and reach_x < 4 and reach_y < 4:
            return "still"
        if swing < 0.2:
            return None
        turns = _turns(scale, 0.12)
        if turns >= 3:
            return "beats"
        if turns == 0 and abs(growth) > 0.35:
            return "grows" if growth > 0 else "shrinks"
        return None
    if swing > 0.35:
        return None
    turns_x, turns_y = _turns(x, 5.0), _turns(y, 5.0)
    if turns_x == turns_y == 0:
        return _straight(x, y)
    if reach_x < 7 and reach_y > 11:
        # Two bounces: up, down, up, down; the thing begins and ends low
        low = max(y[0], y[-1]) > y.max() - 0.3 * reach_y
        return "bounces" if turns_y == 3 and low else None
    if reach_x > 40 and turns_x == 0 and turns_y >= 3:
        return "zigzags"
    return "circles" if _is_circle(x, y) else None


def _straight(x: Array, y: Array) -> str | None:
    across, along = x[-1] - x[0], y[-1] - y[0]
    if abs(across) > 28 and np.ptp(y) < 8:
        return "right" if across > 0 else "left"
    if abs(along) > 15 and np.ptp(x) < 8:
        return "falls" if along > 0 else "rises"
    return None


def _is_circle(x: Array, y: Array) -> bool:
    """Return whether a path goes once clockwise around a centre, along an ellipse."""
    if np.ptp(x) < 22 or np.ptp(y) < 16:
        return False
    across = (x - (x.max() + x.min()) / 2) / (np.ptp(x) / 2)
    along = (y - (y.max() + y.min()) / 2) / (np.ptp(y) / 2)
    turned = np.unwrap(np.arctan2(along, across))
    even = bool((np.diff(turned) > -0.15).all())
    return even and turned[-1] - turned[0] > 4.7 and float(np.hypot(across, along).min()) > 0.6


def _smooth(values: Array) -> Array:
    padded = np.pad(values, 1, mode="edge")
    return (padded[:-2] + padded[1:-1] + padded[2:]) / 3


def _turns(values: Array, least: float) -> int:
    """Return how often ``values`` change direction, ignoring swings smaller than ``least``."""
    turns, direction, extreme = 0, 0, float(values[0])
    for value in map(float, values):
        if direction == 0:
            if abs(value - extreme) >= least:
                direction, extreme = (1 if value > extreme else -1), value
        elif (value - extreme) * direction >= 0:
            extreme = value
        elif abs(value - extreme) >= least:
            turns, direction, extreme = turns + 1, -direction, value
    return turns


def confusion(pairs: list[tuple[world.Subject, Reading]], part: str) -> dict[tuple[str, str], int]:
    """Count the pairs (requested, detected) of ``colour``, ``shape``, ``motion`` or ``background``."""
    counts: dict[tuple[str, str], int] = {}
    for subject, reading in pairs:
        key: Any = getattr(subject, part), getattr(reading, part) or "-"
        counts[key] = counts.get(key, 0) + 1
    return counts
