"""Integer rules of CogVideoX: frames, sizes, latent grid, tokens. Pure functions.

Sizes are ``num_frames, height, width`` in that order: pixels and frames unless a name says ``latent``.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

SPATIAL_COMPRESSION = 8
"""Pixels along each side of a frame that one latent stands for (AutoencoderKLCogVideoX: three halvings)."""

TEMPORAL_COMPRESSION = 4
"""Frames that one latent frame stands for, the first frame alone apart."""


@dataclass(frozen=True, order=True)
class Size:
    """A clip's size: frames, and pixels of height and width. Written ``49x480x720``."""

    num_frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if min(self.num_frames, self.height, self.width) < 1:
            raise ValueError(f"a size has positive parts: {self}")

    @classmethod
    def parse(cls, text: str) -> Size:
        """Return the size written as ``FRAMESxHEIGHTxWIDTH``.

        Raises:
            ValueError: the text is not of that form, or a part is zero.
        """
        match = re.fullmatch(r"\s*(\d+)\s*[xX×]\s*(\d+)\s*[xX×]\s*(\d+)\s*", text)
        if match is None:
            raise ValueError(f"'{text}' is not a size; write frames x height x width, such as 49x480x720")
        return cls(*(int(part) for part in match.groups()))

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width}"


NANO_SIZE = Size(17, 64, 96)
"""The size of the nano models, and of the clips of the world that they draw."""

FRAME_STEP = 8
"""Frame counts are this times N plus one.

The VAE encodes any 4N+1, but diffusers decodes two latent frames at a time and takes the first alone only when their
count is odd: 13 frames (4 latent ones) come back as 16.
"""


def latent_frames(num_frames: int) -> int:
    """Return latent frames of ``num_frames`` frames: the first alone, then one for each four."""
    return (num_frames - 1) // TEMPORAL_COMPRESSION + 1


def temporal_padding(latents: int, patch_size_t: int | None) -> int:
    """Return copies of the first latent frame to put in front so that temporal patches divide the count."""
    return (-latents) % (patch_size_t or 1)


def latent_shape(size: Size, channels: int, patch_size_t: int | None = None) -> tuple[int, int, int, int]:
    """Return ``(F, C, h, w)`` that the transformer is given for one sample of this size, padding included."""
    frames = latent_frames(size.num_frames)
    return (
        frames + temporal_padding(frames, patch_size_t),
        channels,
        size.height // SPATIAL_COMPRESSION,
        size.width // SPATIAL_COMPRESSION,
    )


def video_tokens(size: Size, patch_size: int = 2, patch_size_t: int | None = None) -> int:
    """Return tokens that the transformer sees for a clip: 17,550 at 49x480x720 (1.0), 44,880 at 81x768x1360 (1.5)."""
    frames, _, height, width = latent_shape(size, 1, patch_size_t)
    return frames // (patch_size_t or 1) * (height // patch_size) * (width // patch_size)


def legal_frame_counts(multiple: int, most: int) -> list[int]:
    """Return the frame counts ``multiple * N + 1`` for ``N`` from 1 to ``most``."""
    return [multiple * n + 1 for n in range(1, most + 1)]


def nearest_below(value: int, allowed: list[int]) -> int | None:
    """Return the largest allowed count that is at most ``value``, or None."""
    return max((count for count in allowed if count <= value), default=None)


def frame_indices(available: int, source_fps: float, num_frames: int, fps: float, start: int = 0) -> list[int]:
    """Return which frames of a clip are taken: ``num_frames`` of them at ``fps``, from frame ``start`` on.

    Frame k is the source frame nearest in time to ``k / fps`` seconds after the start. A clip slower than
    ``fps`` is taken frame by frame, so that none is shown twice.

    Raises:
        ValueError: the clip has too few frames; the message says how many it needs.
    """
    stride = max(1.0, source_fps / fps)
    indices = [start + int(k * stride + 0.5) for k in range(num_frames)]
    if indices[-1] >= available:
        raise ValueError(
            f"needs {indices[-1] + 1} frames for {num_frames} at {fps:g} fps "
            f"(it runs at {source_fps:g} fps), but has {available}"
        )
    return indices


def longest_at(available: int, source_fps: float, fps: float, start: int = 0) -> int:
    """Return how many frames at ``fps`` a clip of ``available`` frames gives from ``start`` on."""
    stride = max(1.0, source_fps / fps)
    count = max(0, int((available - start) / stride))
    while start + int(count * stride + 0.5) < available:
        count += 1
    while count and start + int((count - 1) * stride + 0.5) >= available:
        count -= 1
    return count


def spread_indices(first: int, end: int, num_frames: int) -> list[int]:
    """Return ``num_frames`` frames spread evenly from frame ``first`` to frame ``end - 1``, both among them, none
    twice.

    One frame alone is the first.

    Raises:
        ValueError: there are too few to choose from; the message says how many it needs.
    """
    if end - first < num_frames:
        raise ValueError(f"needs {num_frames} frames to spread {num_frames} over it, but has {max(0, end - first)}")
    stride = (end - 1 - first) / max(1, num_frames - 1)
    return [first + int(k * stride + 0.5) for k in range(num_frames)]


FrameSampling = Literal["head", "uniform", "random-start"]
"""Which frames of a clip are taken.

``head`` takes them at a rate from the first on, ``random-start`` at a rate from one that is drawn for each clip;
``uniform`` spreads them evenly over the clip, whatever their rate.
"""

Reshape = Literal["center", "random", "letterbox", "stretch"]
"""How a frame is brought to another shape.

``center`` and ``random`` resize it, aspect kept, until it covers the size, and cut out its middle or another part;
``letterbox`` resizes it, aspect kept, until it fits inside, between black bars; ``stretch`` gives up its aspect.
"""


@dataclass(frozen=True)
class Crop:
    """How a frame is fitted: resized to ``resized`` (height, width), then the target cut out from ``top``/``left`` on.

    Both are 0 or negative where the resized frame is the smaller one: that many pixels of black come first.
    """

    resized: tuple[int, int]
    top: int
    left: int


def cover(source: tuple[int, int], target: tuple[int, int]) -> Crop:
    """Return the resize that just covers ``target`` (height, width) with no change of aspect, cut at the centre."""
    return fit(source, target, "center")


def fit(source: tuple[int, int], target: tuple[int, int], reshape: Reshape, place: float = 0.5) -> Crop:
    """Return how frames of ``source`` (height, width) become ones of ``target``.

    Args:
        place: where along its longer side a frame is cut, from 0 (top or left) to 1 (bottom or right); it counts for
            ``random`` alone.
    """
    (height, width), (to_height, to_width) = source, target
    taller = height * to_width >= width * to_height
    if reshape == "stretch":
        resized = target
    elif taller != (reshape == "letterbox"):  # widths meet
        resized = (round(height * to_width / width), to_width)
    else:
        resized = (to_height, round(width * to_height / height))
    if reshape == "letterbox":
        resized = (min(max(1, resized[0]), to_height), min(max(1, resized[1]), to_width))
    else:
        resized = (max(resized[0], to_height), max(resized[1], to_width))
    part = place if reshape == "random" else 0.5
    return Crop(resized, *(math.floor(part * (have - want)) for have, want in zip(resized, target, strict=True)))


def shape_loss(source: tuple[int, int], target: tuple[int, int]) -> float:
    """Return the share (0 to 1) that a change of shape costs: of the frame, cut away; or of the target, black bars.

    One less the smaller aspect over the larger one, which is both; for a stretched frame it says by how much.
    """
    across = source[0] * target[1], source[1] * target[0]
    return 1.0 - min(across) / max(across)


def enlargement_loss(source: tuple[int, int], crop: Crop) -> float:
    """Return the share (0 to 1) of the resized frame's pixels that the source does not have."""
    down, across = (max(1.0, now / was) for now, was in zip(crop.resized, source, strict=True))
    return 1.0 - 1.0 / (down * across)
