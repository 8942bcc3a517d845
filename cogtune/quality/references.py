"""The training clips that sampled videos are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import TypeAdapter

from cogtune.data.frames import ClipView, FrameSettings, load_clip, view
from cogtune.data.layouts.base import Sample
from cogtune.data.video.clips import probe
from cogtune.run.comparison import Look
from cogtune.system.errors import CogtuneError
from cogtune.system.json_files import read_sealed, write_sealed

if TYPE_CHECKING:
    from cogtune.quality.likeness import Thumbnail

FORMAT = 1


@dataclass(frozen=True)
class ClipReference:
    """A training clip: its id, its file, and the frames that training reads."""

    id: str
    video: Path
    seen: ClipView


_REFERENCES = TypeAdapter(tuple[ClipReference, ...])


def choose_clips(
    samples: Sequence[Sample],
    settings: FrameSettings,
    most: int,
    tell: Callable[[str], object] = lambda _: None,
) -> tuple[ClipReference, ...]:
    """Return at most ``most`` of the training clips, spread evenly.

    Where frames are drawn at random, those at the beginning are taken: they look alike.

    Args:
        tell: called with a remark about each clip that cannot be read or is too short, which is left out.
    """
    if settings.draws:
        settings = FrameSettings(size=settings.size, fps=settings.fps, buckets=settings.buckets)
    count = min(most, len(samples))
    chosen = [samples[number * len(samples) // count] for number in range(count)]
    found = []
    for sample in chosen:
        try:
            found.append(ClipReference(sample.id, sample.video, view(probe(sample.video), settings)))
        except CogtuneError as error:
            tell(f"not compared with {sample.id}: {error.message}")
        except ValueError as error:
            tell(f"not compared with {sample.id}: it {error}")
    return tuple(found)


def write_clips(path: Path, clips: Sequence[ClipReference]) -> None:
    """Save clips as JSON, for :func:`read_clips`."""
    write_sealed(path, {"format": FORMAT, "clips": _REFERENCES.dump_python(tuple(clips), mode="json")})


def read_clips(path: Path) -> tuple[ClipReference, ...]:
    """Return the clips saved at ``path``.

    Raises:
        CogtuneError: the file is missing or damaged.
    """
    return _REFERENCES.validate_python(read_sealed(path)["clips"])


@dataclass(frozen=True)
class MeasuredClips:
    """The training clips that could be read."""

    ids: tuple[str, ...] = ()
    looks: tuple[Look, ...] = ()
    thumbnails: tuple[Thumbnail, ...] = ()


def measure_clips(
    clips: Sequence[ClipReference],
    tell: Callable[[str], object] = lambda _: None,
    each: Callable[[], object] = lambda: None,
) -> MeasuredClips:
    """Read clips as training does, and measure them, one in memory at a time.

    Args:
        tell: called with a remark about each clip that cannot be read, which is left out.
        each: called after each clip.
    """
    from cogtune.quality.likeness import thumbnail  # the command that starts a training needs no torch
    from cogtune.quality.looks import measure_look

    ids, looks, thumbnails = [], [], []
    for clip in clips:
        try:
            frames = np.ascontiguousarray(load_clip(clip.video, clip.seen).permute(0, 2, 3, 1).numpy())
        except CogtuneError as error:
            tell(f"not compared with {clip.id}: {error.message}")
            continue
        finally:
            each()
        ids.append(clip.id)
        looks.append(measure_look(frames))
        thumbnails.append(thumbnail(frames))
    return MeasuredClips(tuple(ids), tuple(looks), tuple(thumbnails))
