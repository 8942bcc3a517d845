"""The figures of one checkpoint from its videos, those of the base, and the training clips."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cogtune.data.video.clips import Pixels
from cogtune.quality.likeness import Thumbnail, distance, thumbnail, to_nearest, usual_distance
from cogtune.quality.looks import mean_look, measure_look
from cogtune.quality.references import MeasuredClips
from cogtune.run.comparison import Figures, Look, Scene

_LEAST_UNIT = 0.01
"""The smallest unit of distance, for base models whose videos are all alike."""


@dataclass(frozen=True)
class MeasuredVideo:
    """A sampled video: its look and a small copy of it."""

    look: Look
    small: Thumbnail


def measure_video(frames: Pixels) -> MeasuredVideo:
    """Measure a sampled video ``uint8 [F, H, W, 3]``."""
    return MeasuredVideo(measure_look(frames), thumbnail(frames))


def unit_of(scenes: Sequence[Scene], base: Sequence[MeasuredVideo]) -> float:
    """Return the unit of distance: the mean between the base's videos of different prompts.

    Where they are alike, as with a single prompt, it is half of what two videos are apart that have nothing in common.
    """
    apart = [
        distance(base[one].small, base[other].small)
        for one in range(len(base))
        for other in range(one)
        if scenes[one].prompt != scenes[other].prompt
    ]
    strangers = math.sqrt(2) * float(np.mean([video.small.std() for video in base]))
    return max(_LEAST_UNIT, strangers / 2, float(np.mean(apart)) if apart else 0.0)


def figures_of(
    scenes: Sequence[Scene],
    videos: Sequence[MeasuredVideo],
    base: Sequence[MeasuredVideo],
    clips: MeasuredClips,
) -> Figures:
    """Return what the videos of one checkpoint show; losses and CLIP similarity are added by who measured them.

    Args:
        scenes: what each video shows.
        videos: the checkpoint's, one for each scene.
        base: the base's, of the same scenes.
        clips: the training clips.
    """
    unit = unit_of(scenes, base)
    unrelated = [number for number, scene in enumerate(scenes) if scene.kind == "unrelated"]
    related = [number for number in range(len(scenes)) if number not in unrelated]
    nearest, clip = _nearest(scenes, videos, base, clips)

    def apart(numbers: Sequence[int]) -> float | None:
        found = [distance(videos[number].small, base[number].small) / unit for number in numbers]
        return float(np.mean(found)) if found else None

    look = mean_look([videos[number].look for number in related or unrelated])
    return Figures(
        **look.model_dump(),
        change=apart(related or unrelated),
        drift=apart(unrelated),
        nearest=nearest,
        nearest_clip=clip,
    )


def _nearest(
    scenes: Sequence[Scene], videos: Sequence[MeasuredVideo], base: Sequence[MeasuredVideo], clips: MeasuredClips
) -> tuple[float | None, str | None]:
    """Return the mean distance to the nearest clip of videos that were not trained on, and which clip it mostly is."""
    unseen = [number for number, scene in enumerate(scenes) if not scene.trained]
    unseen = [number for number in unseen if scenes[number].kind != "unrelated"] or unseen
    usual = usual_distance(clips.thumbnails, [base[number].small for number in unseen])
    if not unseen or not usual:
        return None, None
    found = [to_nearest(videos[number].small, clips.thumbnails) for number in unseen]
    ((number, _),) = Counter(number for _, number in found).most_common(1)
    return float(np.mean([apart for apart, _ in found])) / usual, clips.ids[number]
