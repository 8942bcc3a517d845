"""A small synthetic dataset: mp4 files of moving shapes, with captions that describe them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cogtune.data.sources import CAPTIONS, VIDEOS
from cogtune.data.video.clips import Pixels, write_video
from cogtune.system.files import write_text

SECONDS = 2.5

FORMATS = (
    (96, 128, 8.0),
    (144, 256, 24.0),
    (240, 320, 30.0),
    (180, 120, 12.5),
    (128, 128, 16.0),
    (270, 480, 25.0),
)
"""Height, width and frame rate of the clips, in turn: landscape, portrait, square; slow and fast."""

COLOURS = {
    "red": (226, 61, 66),
    "yellow": (247, 193, 52),
    "blue": (46, 111, 219),
    "green": (47, 163, 99),
    "orange": (242, 128, 40),
    "purple": (132, 76, 196),
}

BACKGROUNDS = {
    "a pale blue background": ((214, 230, 246), (214, 230, 246)),
    "a background that fades from navy to teal": ((20, 30, 74), (28, 118, 128)),
    "a cream background": ((250, 240, 219), (250, 240, 219)),
    "a background that fades from pink to lavender": ((250, 205, 214), (196, 184, 240)),
    "a dark grey background": ((52, 55, 62), (52, 55, 62)),
    "a background that fades from sky blue to white": ((128, 190, 240), (248, 250, 252)),
}
"""Each background's description, and its colours at the top and at the bottom."""

Plane = npt.NDArray[np.floating]
"""One value per pixel, ``[H, W]``."""

_REACH = 1.8
"""How far from its centre a shape and its shadow change the background at most, in units of the shape's radius."""


# Signed distances in units of the shape's radius, negative inside; x to the right and y down.
# The square, the triangle and the star are inscribed in about the same circle.


def _disc(x: Plane, y: Plane) -> Plane:
    return np.hypot(x, y) - 0.9


def _ring(x: Plane, y: Plane) -> Plane:
    return np.abs(np.hypot(x, y) - 0.7) - 0.22


def _square(x: Plane, y: Plane) -> Plane:
    dx, dy = np.abs(x) - 0.72, np.abs(y) - 0.72
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0) - 0.06


def _triangle(x: Plane, y: Plane) -> Plane:
    return _polygon(x, y, [(1.0, 90.0), (1.0, 210.0), (1.0, 330.0)])


def _diamond(x: Plane, y: Plane) -> Plane:
    return _polygon(x, y, [(1.0, 90.0), (0.66, 180.0), (1.0, 270.0), (0.66, 0.0)])


def _star(x: Plane, y: Plane) -> Plane:
    return _polygon(x, y, [(1.0 if k % 2 == 0 else 0.46, 90.0 + 36.0 * k) for k in range(10)])


def _polygon(x: Plane, y: Plane, corners: list[tuple[float, float]]) -> Plane:
    """Return the signed distance to a polygon; a corner is its radius and its angle, degrees counterclockwise."""
    points = [(r * math.cos(math.radians(a)), -r * math.sin(math.radians(a))) for r, a in corners]
    nearest = np.full_like(x, np.inf)
    inside = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1], strict=True):
        ex, ey = bx - ax, by - ay
        along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, np.hypot(x - ax - along * ex, y - ay - along * ey))
        if ey != 0:  # a ray to the right crosses this edge an odd number of times from inside
            inside ^= ((ay > y) != (by > y)) & (x < ex * (y - ay) / ey + ax)
    return np.where(inside, -nearest, nearest)


SHAPES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "disc": _disc,
    "square": _square,
    "triangle": _triangle,
    "ring": _ring,
    "star": _star,
    "diamond": _diamond,
}

ROUND = ("disc", "ring")
"""Shapes that look the same when they spin."""


@dataclass(frozen=True)
class _Pose:
    """A shape's pose: its centre as fractions of width and height, its relative size, degrees clockwise."""

    x: float
    y: float
    scale: float = 1.0
    turn: float = 0.0


def _wave(t: float, periods: float = 1.0) -> float:
    return math.sin(2 * math.pi * periods * t)


SPINS = "spins clockwise in the middle of"

MOTIONS: dict[str, Callable[[float], _Pose]] = {
    "slides from left to right across": lambda t: _Pose(0.2 + 0.6 * t, 0.5),
    "bounces up and down on": lambda t: _Pose(0.5, 0.7 - 0.42 * abs(_wave(t, 1.5))),
    "rises from the bottom to the top of": lambda t: _Pose(0.5, 0.76 - 0.52 * t),
    "grows and shrinks in the middle of": lambda t: _Pose(0.5, 0.5, 1.0 + 0.4 * _wave(t, 1.5)),
    "circles clockwise around the middle of": lambda t: _Pose(
        0.5 + 0.26 * math.cos(2 * math.pi * t), 0.5 + 0.24 * _wave(t)
    ),
    SPINS: lambda t: _Pose(0.5, 0.5, 1.15, 360 * t),
}
"""Descriptions of motions, each with the shape's pose at a time from 0 to 1."""


def draw_dataset(root: Path, *, clips: int = 6, seed: int = 0) -> Path:
    """Draw short clips into the folder ``root``, with their captions: ``prompts.txt`` and ``videos.txt``.

    Each lasts 2.5 s; sizes and frame rates are :data:`FORMATS` in turn. The same seed draws the same files.

    Returns:
        ``root``.

    Raises:
        CogtuneError: a file cannot be written.
    """
    captions, names = [], []
    for index, (caption, shape, motion, colour, background) in enumerate(_scenes(clips, seed)):
        height, width, fps = FORMATS[index % len(FORMATS)]
        captions.append(caption)
        names.append(f"videos/{index + 1:02d}-{colour}-{shape}.mp4")
        frames = _draw(shape, motion, colour, background, height, width, round(SECONDS * fps))
        write_video(root / names[-1], frames, fps)
    write_text(root / VIDEOS, "".join(f"{name}\n" for name in names))
    write_text(root / CAPTIONS, "".join(f"{caption}\n" for caption in captions))
    return root


def draw_stills(count: int, height: int, width: int, *, seed: int = 0) -> list[tuple[str, Pixels]]:
    """Return captions of drawn clips, each with the clip's first frame, ``uint8 [H, W, 3]``."""
    return [
        (caption, next(_draw(shape, motion, colour, background, height, width, 2)))
        for caption, shape, motion, colour, background in _scenes(count, seed)
    ]


def _scenes(clips: int, seed: int) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield captions, shapes, motions, colours and backgrounds."""
    random = np.random.default_rng(seed)
    shapes = list(SHAPES)
    colours, backgrounds = random.permutation(list(COLOURS)), random.permutation(list(BACKGROUNDS))
    for index in range(clips):
        lap, place = divmod(index, len(shapes))
        shape = shapes[place]
        motions = [motion for motion in MOTIONS if motion != SPINS or shape not in ROUND]
        motion = motions[(place + lap) % len(motions)]
        # each lap pairs shapes, colours and backgrounds anew
        colour = str(colours[(place + lap) % len(colours)])
        background = str(backgrounds[(place + 2 * lap) % len(backgrounds)])
        article = "An" if colour[0] in "aeiou" else "A"
        yield f"{article} {colour} {shape} {motion} {background}.", shape, motion, colour, background


def _draw(
    shape: str, motion: str, colour: str, background: str, height: int, width: int, num_frames: int
) -> Iterator[Pixels]:
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) + np.float32(0.5)
    top, bottom = (np.array(ends, np.float32) for ends in BACKGROUNDS[background])
    down = (y / height)[..., np.newaxis]
    canvas = top * (1 - down) + bottom * down
    paint = np.array(COLOURS[colour], np.float32)
    unpainted = _to_pixels(canvas)
    for index in range(num_frames):
        pose = MOTIONS[motion](index / (num_frames - 1))
        radius = 0.2 * min(height, width) * pose.scale
        part = tuple(
            slice(max(0, int(centre - _REACH * radius)), int(centre + _REACH * radius) + 2)
            for centre in (pose.y * height, pose.x * width)
        )
        across, along = x[part] - pose.x * width, y[part] - pose.y * height
        shadow = _distance(shape, across - 0.1 * radius, along - 0.22 * radius, radius, pose.turn)
        shade = 0.3 * np.clip(0.5 - shadow / (0.5 * radius), 0, 1)[..., np.newaxis]
        cover = np.clip(0.5 - _distance(shape, across, along, radius, pose.turn), 0, 1)[..., np.newaxis]
        # lit from the upper left, so that the shape does not look cut out of paper
        light = np.clip(-(across + along) / (2.4 * radius), -1, 1)[..., np.newaxis]
        lit = paint * (1 - 0.16 * np.maximum(-light, 0)) + (255 - paint) * 0.22 * np.maximum(light, 0)
        frame = unpainted.copy()
        frame[part] = _to_pixels(canvas[part] * (1 - shade) * (1 - cover) + lit * cover)
        yield frame


def _to_pixels(colours: npt.NDArray[np.floating]) -> Pixels:
    pixels: Pixels = np.clip(colours + 0.5, 0, 255).astype(np.uint8)
    return pixels


def _distance(shape: str, x: Plane, y: Plane, radius: float, turn: float) -> Plane:
    """Return the signed distance in pixels to a shape of this radius at the origin, ``turn`` degrees clockwise."""
    cosine, sine = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    return SHAPES[shape]((x * cosine + y * sine) / radius, (y * cosine - x * sine) / radius) * radius
