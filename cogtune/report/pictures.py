"""Small pictures of training frames, including cropped parts, as inline JPEGs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cogtune.data.frames import ClipView, reshape
from cogtune.data.video.clips import Pixels, iter_frames
from cogtune.data.video.images import read_image
from cogtune.models.geometry import Crop, Size, cover
from cogtune.report.page import Html, tag

BOX = (400, 300)
"""Largest width and height of a picture in pixels, including cropped parts."""

_HIGHEST = 300
"""Largest height of a picture in the page's pixels, since one of a portrait clip would fill a screen."""

PAGE_BYTES = 6_000_000
"""About the size of all JPEGs of a page in bytes; in base64 they are a third larger."""

_BYTES = (6_000, 30_000)
"""Smallest and largest limit for one JPEG."""

_QUALITIES = (82, 70, 55, 40)


@dataclass(frozen=True)
class Picture:
    """A small picture of a frame.

    Args:
        jpeg: the whole frame, resized as for training.
        width, height: its pixels.
        kept: ``(left, top, width, height)`` in pixels of the part that training sees.
    """

    jpeg: bytes
    width: int
    height: int
    kept: tuple[int, int, int, int]

    def html(self, alt: str) -> Html:
        """Return the picture with its cropped part dimmed."""
        left, top, width, height = self.kept
        image = tag("img", src=data_uri(self.jpeg), width=self.width, height=self.height, alt=alt)
        widest = f"max-width:{_HIGHEST * self.width / self.height:.0f}px"
        if (width, height) == (self.width, self.height):
            return tag("div", image, class_="frame", style=widest)
        style = (
            f"left:{100 * left / self.width:.3f}%;top:{100 * top / self.height:.3f}%;"
            f"width:{100 * width / self.width:.3f}%;height:{100 * height / self.height:.3f}%"
        )
        return tag("div", image, tag("span", class_="kept", style=style), class_="frame", style=widest)


def data_uri(jpeg: bytes) -> str:
    """Return a JPEG as a data URL."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def bytes_each(pictures: int) -> int:
    """Return the size limit of each JPEG of a page, which is smaller the more there are."""
    least, most = _BYTES
    return max(least, min(most, PAGE_BYTES // max(1, pictures)))


def to_jpeg(pixels: Pixels, most_bytes: int) -> bytes:
    """Return ``uint8 [H, W, 3]`` as a JPEG of at most ``most_bytes``, unless the lowest quality takes more."""
    from PIL import Image

    image = Image.fromarray(pixels)
    data = b""
    for quality in _QUALITIES:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality, optimize=True)
        data = buffer.getvalue()
        if len(data) <= most_bytes:
            break
    return data


def shrink(pixels: Pixels, height: int, width: int) -> Pixels:
    """Return ``uint8 [H, W, 3]`` at another size, antialiased."""
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))


def picture(frame: Pixels, size: Size, most_bytes: int, crop: Crop | None = None) -> Picture:
    """Return a small picture of a frame ``uint8 [H, W, 3]``, which is that of :func:`reshape` inside ``kept``.

    Black bars are included.
    """
    crop = crop or cover((frame.shape[0], frame.shape[1]), (size.height, size.width))
    scale = min(BOX[0] / max(crop.resized[1], size.width), BOX[1] / max(crop.resized[0], size.height), 1.0)
    left, top = round(max(0, crop.left) * scale), round(max(0, crop.top) * scale)
    width, height = max(1, round(size.width * scale)), max(1, round(size.height * scale))
    whole_width = left + width + round(max(0, crop.resized[1] - crop.left - size.width) * scale)
    whole_height = top + height + round(max(0, crop.resized[0] - crop.top - size.height) * scale)
    seen = reshape(frame[np.newaxis], size, crop)[0].permute(1, 2, 0).numpy()
    whole = shrink(frame, whole_height, whole_width).copy()
    whole[top : top + height, left : left + width] = shrink(seen, height, width)
    return Picture(to_jpeg(whole, most_bytes), whole_width, whole_height, (left, top, width, height))


@dataclass(frozen=True)
class Shown:
    """A clip's pictures: indices of frames, their pictures, and that of the conditioning image."""

    indices: tuple[int, ...]
    pictures: tuple[Picture, ...]
    image: Picture | None


def first_middle_last(indices: Sequence[int]) -> list[int]:
    """Return the first, the middle and the last of some frames, without repeats."""
    return sorted({indices[0], indices[len(indices) // 2], indices[-1]})


def show_clip(video: Path, seen: ClipView, image: Path | None, most_bytes: int) -> Shown:
    """Return pictures of the first, the middle and the last training frame.

    Args:
        image: the conditioning image, if there is one.
        most_bytes: of one picture; see :func:`bytes_each`.

    Raises:
        CogtuneError: the clip or the image cannot be read.
    """

    def small(frame: Pixels) -> Picture:
        return picture(frame, seen.size, most_bytes, seen.crop_of((frame.shape[0], frame.shape[1])))

    indices = first_middle_last(seen.indices)
    pictures = tuple(small(frame) for frame in iter_frames(video, indices))
    return Shown(tuple(indices), pictures, None if image is None else small(read_image(image)))
