"""Image files: reading pictures, and their properties from the header."""

from __future__ import annotations

import contextlib
import io
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cogtune.data.video.completeness import begins_like_clip
from cogtune.data.video.stamp import FileChanged, Stamp, check_unchanged
from cogtune.system.errors import CogtuneError
from cogtune.system.files import open_regular
from cogtune.system.sniffing import HEAD, image_kind, sniff

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image

HINT = "save it as a PNG or JPEG with 8 bits per channel, or remove it"

_ORIENTATION = 0x0112
_ON_ITS_SIDE = frozenset({5, 6, 7, 8})
"""Values of EXIF's orientation that swap width and height."""


@dataclass(frozen=True)
class ImageInfo:
    """An image's properties.

    Args:
        height, width: pixels as shown.
        transparency: Pillow's mode, such as ``RGBA``, if any pixel is transparent; else empty.
        pictures: number of frames or pages; the first is read.
    """

    height: int
    width: int
    transparency: str = ""
    pictures: int = 1


@contextlib.contextmanager
def opened_image(path: Path, stamp: Stamp | None = None) -> Iterator[Image.Image]:
    """Open the picture in ``path``, reading only its header.

    Args:
        stamp: the file's expected state while it is read.

    Raises:
        CogtuneError: the file is not an image, cannot be read or changed; raised inside the block, too.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with open_regular(path) as handle:
            stat = os.fstat(handle.fileno())
            if stamp is not None and (stat.st_size, stat.st_mtime_ns, stat.st_ino) != stamp:
                raise FileChanged(path)
            with _large_ones_allowed(), Image.open(handle) as image:
                yield image
        check_unchanged(path, stamp)
    except UnidentifiedImageError as error:
        raise _not_readable(path) from error
    except Image.DecompressionBombError as error:
        raise _too_large(path, error) from error
    except (OSError, SyntaxError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is damaged"
        raise CogtuneError(f"cannot read the image {path}: {reason}", HINT) from error


def _not_readable(path: Path) -> CogtuneError:
    """Return the error for a file that Pillow does not know."""
    with open_regular(path) as handle:
        start = handle.read(HEAD)
    if not start:
        return CogtuneError(f"cannot read the image {path}: it is empty", "copy or download it again")
    if (instead := sniff(start)) is not None:
        return CogtuneError(f"{path} is {instead.what}, not an image", instead.advice)
    if kind := image_kind(start):
        return CogtuneError(f"cannot read the image {path}: it is {kind}, which is not supported", HINT)
    if begins_like_clip(start):
        return CogtuneError(
            f"{path} is a video, not an image", "use one of its frames: ffmpeg -i VIDEO -frames:v 1 IMAGE.png"
        )
    return CogtuneError(f"cannot read the image {path}: it is in no known image format", HINT)


@contextlib.contextmanager
def _large_ones_allowed() -> Iterator[None]:
    """Suppress Pillow's warning about large sizes."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _too_large(path: Path, error: Exception) -> CogtuneError:
    figures = [f"{int(figure):,}" for figure in re.findall(r"\d+", str(error))]
    pixels = f"{figures[0]} pixels, but at most {figures[1]} are supported" if len(figures) == 2 else "unknown size"
    return CogtuneError(f"cannot read the image {path}: it is too large ({pixels})", "make it smaller, or remove it")


def measure_image(path: Path, *, full: bool) -> ImageInfo:
    """Return the properties of the picture in ``path``; decodes it with ``full``, or if it may be transparent.

    Raises:
        CogtuneError: the file is not an image, cannot be read, or has pixels that :func:`read_image` rejects.
    """
    from PIL import Image

    with opened_image(path) as image:
        _check_kind(path, image)
        if full:
            image.load()
        width, height = image.size
        exif = Image.Image.getexif(image)  # a PNG's own method would decode it, to look behind the pixels too
        if exif.get(_ORIENTATION) in _ON_ITS_SIDE:
            width, height = height, width
        transparency = transparency_of(image)
        return ImageInfo(height, width, transparency, _pictures_in(image))


def _pictures_in(image: Image.Image) -> int:
    """Return the number of pictures in a file, without the previews that cameras append to a photograph (MPO)."""
    return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)


def image_warnings(path: Path) -> list[str]:
    """Return remarks on a picture that a video starts from.

    Raises:
        CogtuneError: it cannot be read.
    """
    info, told = measure_image(path, full=False), []
    if info.transparency:
        dropped = f"transparency ({info.transparency}), which is dropped"
        told.append(f"{path} has {dropped}, so the video starts from the colours beneath it")
    if info.pictures > 1:
        told.append(f"{path} holds {info.pictures} pictures; the video starts from the first")
    return told


def transparency_of(image: Image.Image) -> str:
    """Return the image's mode if any pixel is transparent, else empty."""
    if not image.has_transparency_data:
        return ""
    lowest, _ = image.convert("RGBA").getchannel("A").getextrema()
    return image.mode if isinstance(lowest, int | float) and lowest < 255 else ""


def read_image(path: Path, stamp: Stamp | None = None) -> npt.NDArray[np.uint8]:
    """Return the picture in ``path``, rotated by its EXIF orientation: ``uint8 [H, W, 3]``.

    16 bits per channel are converted to 8, and colours with another ICC profile to sRGB. Transparency is dropped and
    the colours beneath it are kept, as for a clip.

    Args:
        stamp: the file's expected state while it is read.

    Raises:
        CogtuneError: the file is not an image, cannot be read, changed, or has pixels with an unknown white value.
    """
    import numpy as np
    from PIL import ImageOps

    with opened_image(path, stamp) as image:
        _check_kind(path, image)
        upright = ImageOps.exif_transpose(image)
        if upright.mode in _SIXTEEN_BITS:
            grey = _to_eight_bits(np.asarray(upright), image)
            return np.repeat(grey[..., np.newaxis], 3, axis=2)
        if upright.mode in ("RGBa", "La"):  # multiplied by the opacity, which has to be taken out again
            upright = upright.convert("RGBA" if upright.mode == "RGBa" else "LA")
        return np.array(_in_srgb(upright, image.info.get("icc_profile")))


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Return the picture in sRGB by its profile; a profile that cannot be used is ignored."""
    from PIL import ImageCms

    if image.mode in ("1", "L", "LA"):  # a profile of colours says nothing of grey
        profile = None
    if image.mode != "CMYK":
        image = image.convert("RGB")
    with contextlib.suppress(ImageCms.PyCMSError, OSError, ValueError):
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile)) if profile else None
        space = _COLOUR_SPACES.get(source.profile.xcolor_space.strip()) if source else None
        if source is not None and space == image.mode and "sRGB" not in (source.profile.profile_description or ""):
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            return converted or image.convert("RGB")
    return image.convert("RGB")


_COLOUR_SPACES = {"RGB": "RGB", "CMYK": "CMYK"}
"""Colour spaces of profiles that are applied, and Pillow's modes of their pictures."""


_SIXTEEN_BITS = frozenset({"I;16", "I;16L", "I;16B", "I;16N", "I"})
"""Pillow's modes for 16-bit grey; some formats use ``I``."""

_SIXTEEN_BITS_AS_I = frozenset({"PNG", "PPM"})
"""Formats whose 16 bits Pillow reads as 32; those of others may have any range."""

_REFUSED = {
    "I": "its pixels are 32-bit integers of unknown range",
    "F": "its pixels are floating-point numbers of unknown range",
    "LAB": "its pixels are CIE L*a*b*",
}
"""Pillow's modes that are not supported, and why."""

_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
"""Tags of TIFF 6.0, and a value of the second."""


def _check_kind(path: Path, image: Image.Image) -> None:
    reason = _REFUSED.get(image.mode)
    if reason and not (image.mode == "I" and image.format in _SIXTEEN_BITS_AS_I):
        raise CogtuneError(f"cannot read the image {path}: {reason}", HINT)


def _to_eight_bits(grey: npt.NDArray[np.generic], image: Image.Image) -> npt.NDArray[np.uint8]:
    """Return grey of up to 16 bits as 8: white becomes 255, whatever the depth."""
    import numpy as np

    tags = getattr(image, "tag_v2", {})
    white = 2 ** tags.get(_BITS_PER_SAMPLE, (16,))[0] - 1
    levels = np.rint(np.clip(grey.astype(np.float32) / white, 0, 1) * 255)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        levels = 255 - levels
    eight: npt.NDArray[np.uint8] = levels.astype(np.uint8)
    return eight
