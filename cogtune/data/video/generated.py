"""Generated videos as mp4, webp or gif files, with prompt, seed and settings in their metadata."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cogtune.data.video.clips import Pixels, probe, read_frames, write_video
from cogtune.data.video.container import VideoError, opened
from cogtune.data.video.images import opened_image
from cogtune.system.errors import CogtuneError
from cogtune.system.files import write_atomic

SUFFIXES = (".mp4", ".webp", ".gif")

_DESCRIPTION = 0x010E
"""EXIF's ImageDescription."""


def write_generated(path: Path, frames: Pixels, fps: float, facts: Mapping[str, Any], mark: str) -> None:
    """Write a video in the format of the file's suffix.

    Args:
        path: the file, replaced if it exists.
        frames: ``uint8 [F, H, W, 3]``.
        facts: the video's JSON-able metadata. The title of an mp4 is its ``prompt``.
        mark: a comment by which such files are recognised.

    Raises:
        CogtuneError: it cannot be written.
    """
    if path.suffix.lower() == ".mp4":
        texts = {"title": str(facts.get("prompt", "")), "description": json.dumps(facts)}
        write_video(path, frames, fps, mark, texts)
        return
    from PIL import Image

    pictures = [Image.fromarray(frame) for frame in frames]
    text = json.dumps({"comment": mark, **facts})
    options: dict[str, Any] = {
        "save_all": True,
        "append_images": pictures[1:],
        "loop": 0,
        "duration": _times(fps, len(frames)),
    }
    if path.suffix.lower() == ".gif":
        options |= {"comment": text.encode(), "optimize": False}
    else:
        exif = Image.Exif()
        exif[_DESCRIPTION] = text
        options |= {"exif": exif, "quality": 90, "method": 4}
    kind = path.suffix.lower()[1:].upper()
    write_atomic(path, lambda aside: pictures[0].save(aside, format=kind, **options))


def _times(fps: float, count: int) -> list[int]:
    """Return the duration of each frame in milliseconds, in GIF's hundredths of a second, without drift."""
    ends = [round(100 * (number + 1) / fps) for number in range(count)]
    return [10 * (end - start) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def facts_of(path: Path) -> dict[str, Any] | None:
    """Read the facts that :func:`write_generated` put into a file; None for any other file."""
    text = ""
    with contextlib.suppress(VideoError, OSError, ValueError, CogtuneError):
        if path.suffix.lower() == ".mp4":
            with opened(path) as (container, _):
                text = container.metadata.get("description", "")
        else:
            with opened_image(path) as image:
                said = (
                    image.info.get("comment", b"") if image.format == "GIF" else image.getexif().get(_DESCRIPTION, "")
                )
            text = said.decode() if isinstance(said, bytes) else str(said)
    with contextlib.suppress(ValueError):
        facts = json.loads(text)
        return facts if isinstance(facts, dict) else None
    return None


def frames_of(path: Path) -> Pixels:
    """Read a video that :func:`write_generated` wrote: ``uint8 [F, H, W, 3]``.

    Raises:
        CogtuneError: it cannot be read.
    """
    if path.suffix.lower() == ".mp4":
        return read_frames(path, range(probe(path).num_frames))
    from PIL import ImageSequence

    rate = (facts_of(path) or {}).get("fps")
    frames: list[Pixels] = []
    with opened_image(path) as image:
        for picture in ImageSequence.Iterator(image):
            pixels = np.asarray(picture.convert("RGB"))
            shown = picture.info.get("duration", 0) / 1000  # of frames that are alike, one stands for all
            frames += [pixels] * max(1, round(shown * rate) if rate else 1)
    return np.stack(frames)


def side_by_side(rows: Sequence[Sequence[Pixels]]) -> Pixels:
    """Combine videos of one size into one, in rows.

    Shorter ones repeat their last frame, and missing places in a row are black.
    """
    there = [video for row in rows for video in row]
    count, (height, width) = max(map(len, there)), there[0].shape[1:3]
    whole = np.zeros((count, height * len(rows), width * max(map(len, rows)), 3), np.uint8)
    for down, row in enumerate(rows):
        for across, video in enumerate(row):
            still = np.minimum(np.arange(count), len(video) - 1)
            whole[:, down * height : (down + 1) * height, across * width : (across + 1) * width] = video[still]
    return whole
