"""File names of clips, images and captions."""

from __future__ import annotations

from pathlib import PurePosixPath

VIDEO_SUFFIXES = frozenset(
    {
        ".264",
        ".265",
        ".3g2",
        ".3gp",
        ".asf",
        ".avi",
        ".divx",
        ".dv",
        ".f4v",
        ".flv",
        ".h264",
        ".h265",
        ".hevc",
        ".ivf",
        ".m1v",
        ".m2v",
        ".m4v",
        ".mjpeg",
        ".mjpg",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpe",
        ".mpeg",
        ".mpg",
        ".mxf",
        ".nut",
        ".obu",
        ".ogm",
        ".ogv",
        ".qt",
        ".rm",
        ".rmvb",
        ".vob",
        ".webm",
        ".wmv",
        ".y4m",
    }
)
"""Suffixes of clips in a layout without a list of them (compared in lower case)."""

ALSO_SUFFIXES = frozenset({".apng", ".avif", ".gif", ".m2ts", ".mts", ".ts", ".webp"})
"""Suffixes of clips and of other files: they are clips if they have a caption."""

IMAGE_SUFFIXES = frozenset({".bmp", ".exr", ".heic", ".heif", ".jpeg", ".jpg", ".jxl", ".png", ".tif", ".tiff"})

CAPTION_SUFFIX = ".txt"

OTHER_CAPTION_SUFFIXES = (".caption", ".captions", ".cap", ".prompt")
"""Suffixes of captions next to clips in other programs, in the order of preference."""

CAPTION_FOLDERS = ("labels", "captions", "caption", "prompts", "texts", "text", "txt")
"""Folders of captions named like their clips in other programs, in the order of preference."""


def is_clip(file: PurePosixPath) -> bool:
    """Return whether a file is a clip, by its name."""
    return file.suffix.lower() in VIDEO_SUFFIXES


def may_be_clip(file: PurePosixPath) -> bool:
    """Return whether a file is a clip by its name, or may be one."""
    return file.suffix.lower() in VIDEO_SUFFIXES or file.suffix.lower() in ALSO_SUFFIXES


def is_image(file: PurePosixPath) -> bool:
    """Return whether a file is a still, by its name."""
    return file.suffix.lower() in IMAGE_SUFFIXES
