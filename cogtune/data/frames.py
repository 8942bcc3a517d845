"""From a clip to what training sees: which frames, at which size, cut how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cogtune.data.images import opened_image
from cogtune.data.video import Pixels, VideoInfo, iter_frames, probe
from cogtune.errors import CogtuneError
from cogtune.geometry import Size, cover, frame_indices

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class FrameSettings:
    """How every clip of a run becomes frames of one size.

    Args:
        size: frames, height and width that training takes.
        fps: frames a second that training takes; see :func:`cogtune.geometry.frame_indices`.
        start: the clip's frame that comes first.
        reshape: ``center`` resizes, aspect kept, until the frame covers the size, and cuts out its middle.
    """

    size: Size
    fps: float
    start: int = 0
    reshape: Literal["center"] = "center"

    def __post_init__(self) -> None:
        if not self.fps > 0 or self.start < 0:
            raise ValueError(f"frames are taken at more than 0 fps and from frame 0 or later: {self}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values: the part of a cache key that the choice of frames stands for."""
        return asdict(self) | {"size": str(self.size)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> FrameSettings:
        """The settings that :meth:`to_dict` gave."""
        return cls(**{**fields, "size": Size.parse(fields["size"])})

    def first_frame(self) -> FrameSettings:
        """The same settings for the first of their frames alone."""
        return replace(self, size=replace(self.size, num_frames=1))


def choose(info: VideoInfo, settings: FrameSettings) -> list[int]:
    """The indices of the frames that training takes from a clip, rising.

    Raises:
        ValueError: the clip has too few; the message says how many it needs.
    """
    return frame_indices(info.num_frames, info.fps, settings.size.num_frames, settings.fps, settings.start)


def reshape(frames: Pixels, size: Size) -> torch.Tensor:
    """Frames ``uint8 [F, H, W, 3]`` resized and cut to a height and width: ``uint8 [F, 3, height, width]``.

    The resize is bicubic and antialiased, and keeps the aspect.
    """
    import torch

    crop = cover((frames.shape[1], frames.shape[2]), (size.height, size.width))
    pixels = torch.from_numpy(np.require(frames, requirements=("C", "W"))).permute(0, 3, 1, 2)
    if pixels.shape[2:] != crop.resized:
        pixels = torch.nn.functional.interpolate(pixels, crop.resized, mode="bicubic", antialias=True)
    return pixels[:, :, crop.top : crop.top + size.height, crop.left : crop.left + size.width].contiguous()


def load_clip(path: Path, settings: FrameSettings) -> torch.Tensor:
    """The frames of a clip as training sees them: ``uint8 [F, 3, height, width]``.

    Beside the result, one frame of the clip's own size is in memory at a time.

    Raises:
        CogtuneError: the clip cannot be read, or is too short.
    """
    import torch

    try:
        indices = choose(probe(path), settings)
    except ValueError as error:
        raise CogtuneError(f"{path} {error}", "use a longer clip, or ask for fewer frames") from error
    size = settings.size
    clip = torch.empty((size.num_frames, 3, size.height, size.width), dtype=torch.uint8)
    for position, frame in enumerate(iter_frames(path, indices)):
        clip[position] = reshape(frame[np.newaxis], size)[0]
    return clip


def load_image(path: Path, size: Size) -> torch.Tensor:
    """A conditioning image as training sees it: ``uint8 [3, height, width]``, resized and cut as frames are.

    Raises:
        CogtuneError: the file is no image, or cannot be read.
    """
    return reshape(read_image(path)[np.newaxis], size)[0]


def read_image(path: Path) -> Pixels:
    """The picture in ``path``, turned as its EXIF orientation says: ``uint8 [H, W, 3]``.

    Raises:
        CogtuneError: the file is no image, or cannot be read.
    """
    from PIL import ImageOps

    with opened_image(path) as image:
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))
