"""Image files: opened, turned upright, and measured without being decoded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cogtune.errors import CogtuneError

if TYPE_CHECKING:
    from PIL import Image

_ORIENTATION = 0x0112
_ON_ITS_SIDE = frozenset({5, 6, 7, 8})
"""Values of EXIF's orientation by which width and height change places."""


@contextlib.contextmanager
def opened_image(path: Path) -> Iterator[Image.Image]:
    """The picture in ``path``, of which only the header is read yet.

    Raises:
        CogtuneError: the file is no image or cannot be read; also in place of such errors inside the block.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or "it is no image, or damaged"
        hint = "make it a PNG or JPEG, or leave it out"
        raise CogtuneError(f"cannot read the image {path}: {reason}", hint) from error


def measure_image(path: Path, *, full: bool) -> tuple[int, int]:
    """Height and width of the picture in ``path`` as it is shown; with ``full``, every pixel is decoded too.

    Raises:
        CogtuneError: the file is no image, or cannot be read.
    """
    from PIL import Image

    with opened_image(path) as image:
        if full:
            image.load()
        width, height = image.size
        exif = Image.Image.getexif(image)  # a PNG's own method would decode it, to look behind the pixels too
        return (width, height) if exif.get(_ORIENTATION) in _ON_ITS_SIDE else (height, width)
