"""The world of the nano models: one flat shape that moves in front of a plain background, with true captions.

Clips are 17 frames of 64x96 at 8 fps. A scene is a function of only its seed; numpy and torch draw it by the same
code, so a GPU can draw its own batches. Combinations of colour, shape and motion that :data:`HELD_OUT` lists are never
drawn for training; :data:`NEW_COLOURS`, :data:`NEW_SHAPES` and :data:`NEW_MOTIONS` are things that the
models never see.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cogtune.data.video.clips import Pixels
from cogtune.models.geometry import NANO_SIZE

SIZE = NANO_SIZE
FPS = 8.0

WORLD_VERSION = 2
"""Increase it whenever the same seed draws another clip: weights were trained on one version."""

Rgb = tuple[int, int, int]

COLOURS: dict[str, Rgb] = {
    "red": (222, 48, 52),
    "orange": (244, 132, 36),
    "yellow": (250, 210, 50),
    "green": (44, 160, 84),
    "blue": (44, 96, 222),
    "purple": (138, 66, 190),
    "white": (248, 248, 248),
}
NEW_COLOURS: dict[str, Rgb] = {"pink": (250, 110, 180), "turquoise": (40, 200, 200)}

BACKGROUNDS: dict[str, tuple[Rgb, Rgb]] = {
    "black": ((16, 16, 20), (16, 16, 20)),
    "grey": ((96, 100, 108), (96, 100, 108)),
    "cream": ((250, 240, 219), (250, 240, 219)),
    "pale blue": ((190, 220, 246), (190, 220, 246)),
    "night": ((14, 20, 60), (24, 96, 112)),
    "morning": ((120, 180, 240), (252, 246, 236)),
}
"""Colours at the top and at the bottom of the frame, with a linear gradient between them."""

_CONTRAST = 90.0
"""Smallest RGB distance between a shape and any row of its background."""

_JITTER = 5
"""Largest deviation of a scene's colours from those of the table, per channel."""


# Signed distances in units of the shape's radius, negative inside; x to the right, y down. ``xp`` is numpy or torch.


def _disc(x: Any, y: Any, xp: Any) -> Any:
    return xp.sqrt(x * x + y * y) - 0.9


def _ring(x: Any, y: Any, xp: Any) -> Any:
    return abs(xp.sqrt(x * x + y * y) - 0.74) - 0.22


def _square(x: Any, y: Any, xp: Any) -> Any:
    return xp.maximum(abs(x), abs(y)) - 0.78


def _triangle(x: Any, y: Any, xp: Any) -> Any:
    side = math.sqrt(3) / 2 * abs(x) - 0.5 * (y - 0.2)
    return xp.maximum(side, y - 0.2) - 0.62


def _cross(x: Any, y: Any, xp: Any) -> Any:
    arm, half = 1.0, 0.34
    across, along = abs(x), abs(y)
    level = xp.maximum(across - arm, along - half)
    upright = xp.maximum(across - half, along - arm)
    return xp.minimum(level, upright)


def _star(x: Any, y: Any, xp: Any) -> Any:
    """Return the distance to a five-pointed star. Source: Inigo Quilez, "2D distance functions"."""
    inner = 0.42
    kx, ky = math.cos(math.pi / 5), -math.sin(math.pi / 5)
    x, y = abs(x) / 1.15, -(y / 1.15 - 0.08)
    for sign in (1.0, -1.0):
        fold = 2 * (sign * kx * x + ky * y).clip(0)
        x, y = x - fold * sign * kx, y - fold * ky
    x, y = abs(x), y - 1.0
    ex, ey = -inner * ky, inner * kx - 1.0
    along = ((x * ex + y * ey) / (ex * ex + ey * ey)).clip(0, 1)
    dx, dy = x - ex * along, y - ey * along
    return xp.sqrt(dx * dx + dy * dy) * xp.sign(y * ex - x * ey) * 1.15


def _heart(x: Any, y: Any, xp: Any) -> Any:
    """Return the distance to a heart. Source: Inigo Quilez, "2D distance functions"."""
    x, y = abs(x) / 1.65, (0.9 - y) / 1.65
    lobe = xp.sqrt((x - 0.25) ** 2 + (y - 0.75) ** 2) - math.sqrt(2) / 4
    top = x * x + (y - 1.0) ** 2
    fold = 0.5 * (x + y).clip(0)
    side = (x - fold) ** 2 + (y - fold) ** 2
    body = xp.sqrt(xp.minimum(top, side)) * xp.sign(x - y)
    return xp.where(x + y > 1.0, lobe, body) * 1.65


def _moon(x: Any, y: Any, xp: Any) -> Any:
    full = xp.sqrt(x * x + y * y) - 1.05
    bite = xp.sqrt((x - 0.5) ** 2 + y * y) - 0.8
    return xp.maximum(full, -bite)


Distance = Callable[[Any, Any, Any], Any]

SHAPES: dict[str, Distance] = {
    "disc": _disc,
    "ring": _ring,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "star": _star,
}
NEW_SHAPES: dict[str, Distance] = {"heart": _heart, "moon": _moon}

Poses = npt.NDArray[np.float64]
"""``[F, 3]``: centre x and y, and radius, in pixels."""

_TIME = np.linspace(0.0, 1.0, SIZE.num_frames)


def _poses(x: Any, y: Any, radius: Any) -> Poses:
    return np.stack(np.broadcast_arrays(x + 0 * _TIME, y + 0 * _TIME, radius + 0 * _TIME), axis=1)


def _across(random: np.random.Generator, *, to_right: bool) -> Poses:
    start, end, radius = random.uniform(26, 30), random.uniform(66, 70), random.uniform(15, 17)
    x = start + (end - start) * _TIME
    return _poses(x if to_right else SIZE.width - x, random.uniform(29, 35), radius)


def _upwards(random: np.random.Generator, *, up: bool) -> Poses:
    low, high, radius = random.uniform(42, 44), random.uniform(20, 22), random.uniform(14, 16)
    y = low + (high - low) * _TIME
    return _poses(random.uniform(42, 54), y if up else SIZE.height - y, radius)


def _bounce(random: np.random.Generator) -> Poses:
    rise = random.uniform(16, 18)
    y = random.uniform(42, 44) - rise * abs(np.sin(2 * math.pi * _TIME))
    return _poses(random.uniform(42, 54), y, random.uniform(14, 16))


def _circle(random: np.random.Generator) -> Poses:
    """Return a path that begins at the top."""
    angle = 2 * math.pi * (_TIME - 0.25 + random.uniform(-0.03, 0.03))
    x = 48 + random.uniform(15, 17) * np.cos(angle)
    return _poses(x + random.uniform(-3, 3), 32 + random.uniform(11, 12) * np.sin(angle), random.uniform(13.5, 14.5))


def _resize(random: np.random.Generator, *, grow: bool) -> Poses:
    small, large = random.uniform(9, 10), random.uniform(20, 22)
    radius = small + (large - small) * _TIME
    return _poses(random.uniform(42, 54), random.uniform(29, 35), radius if grow else radius[::-1])


def _still(random: np.random.Generator) -> Poses:
    return _poses(random.uniform(42, 54), random.uniform(28, 36), random.uniform(16, 19))


def _beat(random: np.random.Generator) -> Poses:
    """Return three beats: quickly larger, slowly back."""
    phase = (3 * _TIME) % 1.0
    swell = np.where(phase < 0.3, phase / 0.3, (1.0 - phase) / 0.7)
    return _poses(random.uniform(44, 52), random.uniform(30, 34), random.uniform(13, 14) * (1 + 0.5 * swell))


def _zigzag(random: np.random.Generator) -> Poses:
    x = random.uniform(22, 25) + random.uniform(47, 50) * _TIME
    wave = 2 * abs((2 * _TIME + 0.25) % 1.0 - 0.5) * 2 - 1
    return _poses(x, 32 + random.uniform(9.5, 10.5) * wave, random.uniform(13, 14))


Motion = Callable[[np.random.Generator], Poses]

MOTIONS: dict[str, Motion] = {
    "right": lambda random: _across(random, to_right=True),
    "left": lambda random: _across(random, to_right=False),
    "rises": lambda random: _upwards(random, up=True),
    "falls": lambda random: _upwards(random, up=False),
    "bounces": _bounce,
    "circles": _circle,
    "grows": lambda random: _resize(random, grow=True),
    "shrinks": lambda random: _resize(random, grow=False),
    "still": _still,
}
NEW_MOTIONS: dict[str, Motion] = {"beats": _beat, "zigzags": _zigzag}

# The first phrase of each is the plainest: what tests and demos ask with.
_SHAPE_WORDS: dict[str, tuple[str, ...]] = {
    "disc": ("disc", "ball"),
    "ring": ("ring", "hoop"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "cross": ("cross", "plus sign"),
    "star": ("star",),
    "heart": ("heart",),
    "moon": ("moon",),
}
_MOTION_WORDS: dict[str, tuple[str, ...]] = {
    "right": ("slides to the right", "moves from left to right", "glides across to the right"),
    "left": ("slides to the left", "moves from right to left", "glides across to the left"),
    "rises": ("rises", "floats upwards", "moves up to the top"),
    "falls": ("falls", "sinks downwards", "moves down to the bottom"),
    "bounces": ("bounces up and down", "jumps up and down", "keeps bouncing"),
    "circles": ("moves in a circle", "goes round and round", "circles around the middle"),
    "grows": ("grows larger", "gets bigger and bigger", "grows"),
    "shrinks": ("shrinks", "gets smaller and smaller", "becomes smaller"),
    "still": ("stays still", "does not move", "rests in one place"),
    "beats": ("beats",),
    "zigzags": ("zigzags",),
}
_BACKGROUND_WORDS: dict[str, tuple[str, ...]] = {
    "black": ("a black background", "plain black"),
    "grey": ("a grey background", "plain grey"),
    "cream": ("a cream background", "cream paper"),
    "pale blue": ("a pale blue background", "plain pale blue"),
    "night": ("a night sky", "the dark sky at night"),
    "morning": ("a morning sky", "the bright sky in the morning"),
}
_SENTENCES = (
    "{A} {colour} {shape} {motion} on {background}.",
    "On {background}, {a} {colour} {shape} {motion}.",
    "{Background}, and {a} {colour} {shape} that {motion}.",
    "There is {a} {colour} {shape} on {background}. It {motion}.",
    "A {shape} on {background} is {colour} and {motion}.",
)


@dataclass(frozen=True)
class Subject:
    """A clip's contents, by the names in the tables."""

    colour: str
    shape: str
    motion: str
    background: str

    @property
    def combination(self) -> tuple[str, str, str]:
        """Colour, shape and motion, which are held out in combination."""
        return self.colour, self.shape, self.motion


@dataclass(frozen=True, eq=False)
class Scene:
    """A subject with everything that is needed to draw it: ``paint [3]``, ``top [3]``, ``bottom [3]`` in 0 to 255."""

    subject: Subject
    caption: str
    poses: Poses
    paint: npt.NDArray[np.float64]
    top: npt.NDArray[np.float64]
    bottom: npt.NDArray[np.float64]


def _held_out(count: int) -> frozenset[tuple[str, str, str]]:
    every = itertools.product(COLOURS, SHAPES, MOTIONS)
    return frozenset(sorted(every, key=lambda words: hashlib.sha256(" ".join(words).encode()).digest())[:count])


HELD_OUT = _held_out(64)
"""The 64 of 378 combinations of colour, shape and motion whose SHA-256 is smallest."""


def backgrounds_for(colour: str) -> list[str]:
    """Return the backgrounds that contrast well with a shape of this colour."""
    paint = np.array((COLOURS | NEW_COLOURS)[colour], float)
    shares = np.linspace(0, 1, 9)[:, None]
    return [
        name
        for name, (top, bottom) in BACKGROUNDS.items()
        if np.linalg.norm(np.array(top) * (1 - shares) + np.array(bottom) * shares - paint, axis=1).min() >= _CONTRAST
    ]


def known_subjects(*, held_out: bool = False) -> list[Subject]:
    """Return all subjects that are drawn for training, or all that are held out."""
    return [
        Subject(*words, background)
        for words in itertools.product(COLOURS, SHAPES, MOTIONS)
        if (words in HELD_OUT) == held_out
        for background in backgrounds_for(words[0])
    ]


def held_out_prompts() -> list[tuple[Subject, str]]:
    """Return one subject with its plain caption for each held-out combination; backgrounds take turns."""
    chosen = []
    for number, (colour, shape, motion) in enumerate(sorted(HELD_OUT)):
        places = backgrounds_for(colour)
        subject = Subject(colour, shape, motion, places[number % len(places)])
        chosen.append((subject, caption_of(subject)))
    return chosen


def caption_of(subject: Subject, random: np.random.Generator | None = None) -> str:
    """Return a caption of ``subject``: the plainest, or one with random phrases."""

    def pick(phrases: Sequence[str]) -> str:
        return phrases[0 if random is None else int(random.integers(len(phrases)))]

    sentence = pick(_SENTENCES)
    background = pick(_BACKGROUND_WORDS[subject.background])
    article = "an" if subject.colour[0] in "aeiou" else "a"
    return sentence.format(
        a=article,
        A=article.capitalize(),
        colour=subject.colour,
        shape=pick(_SHAPE_WORDS[subject.shape]),
        motion=pick(_MOTION_WORDS[subject.motion]),
        background=background,
        Background=background[0].upper() + background[1:],
    )


def scene_of(subject: Subject, random: np.random.Generator, *, plain_caption: bool = False) -> Scene:
    """Return a scene of ``subject``, with everything else, such as place and size, drawn from ``random``."""
    poses = (MOTIONS | NEW_MOTIONS)[subject.motion](random)
    caption = caption_of(subject, None if plain_caption else random)
    top, bottom = BACKGROUNDS[subject.background]
    shift = random.uniform(-_JITTER, _JITTER, 3)
    paint = np.array((COLOURS | NEW_COLOURS)[subject.colour]) + random.uniform(-_JITTER, _JITTER, 3)
    return Scene(subject, caption, poses, paint, np.array(top) + shift, np.array(bottom) + shift)


def training_scenes(seed: int, numbers: Iterable[int]) -> list[Scene]:
    """Return scenes of training subjects, without held-out combinations; scene N is a function of ``(seed, N)``.

    Every block of as many scenes as there are subjects has each subject once, in a random order.
    """
    scenes = []
    for number in numbers:
        block, place = divmod(number, len(_TRAINING))
        subject = _TRAINING[_order(seed, block)[place]]
        scenes.append(scene_of(subject, np.random.default_rng([seed, number, 1])))
    return scenes


_TRAINING = known_subjects()


@functools.lru_cache(maxsize=64)
def _order(seed: int, block: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng([seed, block]).permutation(len(_TRAINING))


def draw(scene: Scene) -> Pixels:
    """Return the frames of a scene, ``uint8 [F, H, W, 3]``."""
    frames = _rendered([scene], np, lambda values: np.asarray(values, np.float32))
    pixels: Pixels = frames[0].round().astype(np.uint8)
    return pixels


def draw_batch(scenes: Sequence[Scene], device: Any) -> Any:
    """Return the frames of scenes as a torch tensor ``[B, 3, F, H, W]`` in [-1, 1] on ``device``, as VAE input."""
    import torch

    frames = _rendered(scenes, torch, lambda values: torch.as_tensor(np.asarray(values, np.float32), device=device))
    return (frames.round() / 127.5 - 1).permute(0, 4, 1, 2, 3).contiguous()


def _rendered(scenes: Sequence[Scene], xp: Any, array: Callable[[Any], Any]) -> Any:
    """Return frames ``[B, F, H, W, 3]`` in 0 to 255; shapes have edges that are one pixel soft."""
    height, width = SIZE.height, SIZE.width
    x, y = array(np.arange(width) + 0.5), array(np.arange(height) + 0.5)[:, None]
    poses = array(np.stack([scene.poses for scene in scenes]))[..., None, None]  # [B, F, 3, 1, 1]
    across, along, radius = x - poses[:, :, 0], y - poses[:, :, 1], poses[:, :, 2]
    across, along = across / radius, along / radius
    names = [scene.subject.shape for scene in scenes]
    cover = 0 * (across + along)
    for name in sorted(set(names)):
        own = [place for place, other in enumerate(names) if other == name]
        distance = (SHAPES | NEW_SHAPES)[name](across[own], along[own], xp) * radius[own]
        cover[own] = (0.5 - distance).clip(0, 1)
    down = array((np.arange(height) + 0.5) / height)[:, None, None]
    top, bottom, paint = (
        array(np.stack([getattr(scene, part) for scene in scenes]))[:, None, None, None]
        for part in ("top", "bottom", "paint")
    )
    canvas = top * (1 - down) + bottom * down  # [B, 1, H, 1, 3]
    cover = cover[..., None]
    return (canvas * (1 - cover) + paint * cover).clip(0, 255)
