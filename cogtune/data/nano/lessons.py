"""Lessons for the nano models: clips of a thing that they have never seen, and whether videos show it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from cogtune.data.nano import detector, world
from cogtune.data.nano.world import Subject
from cogtune.data.sources import CAPTIONS, VIDEOS
from cogtune.data.video.clips import iter_frames, write_video
from cogtune.system.files import write_text

TAUGHT = ("pink", "heart", "beats")
"""Colour, shape and motion of the usual lesson: no nano model was trained on any of the three."""


def taught_subjects(thing: tuple[str, str, str] = TAUGHT) -> list[Subject]:
    """Return a thing on each background that it contrasts with."""
    return [Subject(*thing, background) for background in world.backgrounds_for(thing[0])]


def draw_lesson(root: Path, *, clips: int = 8, seed: int = 0, thing: tuple[str, str, str] = TAUGHT) -> Path:
    """Write clips of ``thing`` with captions to ``root``, in the format of two lists; return ``root``.

    Backgrounds take turns; places, sizes and captions are drawn at random.

    Raises:
        CogtuneError: the files cannot be written.
    """
    random = np.random.default_rng([seed, clips])
    subjects = taught_subjects(thing)
    scenes = [world.scene_of(subjects[number % len(subjects)], random) for number in range(clips)]
    names = [f"videos/{number:02d}.mp4" for number in range(clips)]
    for name, scene in zip(names, scenes, strict=True):
        write_video(root / name, world.draw(scene), world.FPS)
    write_text(root / VIDEOS, "".join(f"{name}\n" for name in names))
    write_text(root / CAPTIONS, "".join(f"{scene.caption}\n" for scene in scenes))
    return root


def reading_of(video: Path) -> detector.Reading:
    """Return what the detector reads in a file.

    Raises:
        CogtuneError: the file cannot be read.
    """
    return detector.detect(np.stack(list(iter_frames(video, range(world.SIZE.num_frames)))))


def count_shown(videos: Iterable[Path], thing: tuple[str, str, str] = TAUGHT) -> int:
    """Return how many of the videos show a thing's colour, shape and motion.

    Raises:
        CogtuneError: a file cannot be read.
    """
    subject = Subject(*thing, "black")
    return sum(reading_of(video).shows(subject) for video in videos)
