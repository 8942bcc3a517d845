"""Numbered images in place of a clip, as ``frame_%05d.png``: other programs read them, here they are made a video."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

_NUMBER = re.compile(r"%0?\d*d|\d+|\*")
"""What stands for a number in the name of one of numbered images."""


def as_clip(image: str) -> str:
    """Return how to make a clip of numbered images, named by one of them or by a pattern for all.

    Args:
        image: such as ``a/frame_00001.png``, ``a/frame_%05d.png`` or ``a/*.png``.
    """
    folder, slash, name = image.rpartition("/")
    number = [*_NUMBER.finditer(PurePosixPath(name).stem)]
    if not number:
        return "make a clip of them with ffmpeg -framerate RATE -i %04d.png OUT.mp4"
    found = number[-1]
    if found[0] == "*":
        return f"make a clip of them: ffmpeg -framerate RATE -pattern_type glob -i '{image}' {folder or 'OUT'}.mp4"
    counted = found[0] if found[0].startswith("%") else f"%0{len(found[0])}d"
    pattern = f"{folder}{slash}{name[: found.start()]}{counted}{name[found.end() :]}"
    return f"make a clip of them: ffmpeg -framerate RATE -i {pattern} {folder or 'OUT'}.mp4"


def is_pattern(path: str) -> bool:
    """Return whether a path stands for numbered images, as in FFmpeg and other programs."""
    name = PurePosixPath(path)
    return name.suffix.lower() in _STILLS and re.search(r"%0?\d*d|\*", name.name) is not None


_STILLS = frozenset({".bmp", ".exr", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
"""Suffixes of numbered images."""
