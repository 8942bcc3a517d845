"""Lessons for the nano models: clips of a thing that they have never seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cogtune.data.nano import world
from cogtune.data.nano.world import Subject
from cogtune.data.sources import CAPTIONS, VIDEOS
from cogtune.data.video.clips import write_video
from cogtune.system.files import write_text

TAUGHT = ("pink", "heart", "beats")
"""Colour, shape and motion of the usual lesson: no nano model was trained on any of the three."""


def draw_lesson(root: Path, *, clips: int = 8, seed: int = 0) -> Path:
    """Write clips of :data:`TAUGHT` with captions to ``root``, in the format of two lists; return ``root``.

    Backgrounds that it contrasts with take turns; places, sizes and captions are drawn at random.

    Raises:
        CogtuneError: the files cannot be written.
    """
    random = np.random.default_rng([seed, clips])
    subjects = [Subject(*TAUGHT, background) for background in world.backgrounds_for(TAUGHT[0])]
    scenes = [world.scene_of(subjects[number % len(subjects)], random) for number in range(clips)]
    names = [f"videos/{number:02d}.mp4" for number in range(clips)]
    for name, scene in zip(names, scenes, strict=True):
        write_video(root / name, world.draw(scene), world.FPS)
    write_text(root / VIDEOS, "".join(f"{name}\n" for name in names))
    write_text(root / CAPTIONS, "".join(f"{scene.caption}\n" for scene in scenes))
    return root
