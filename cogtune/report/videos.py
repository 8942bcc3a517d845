"""A run's sample videos on its page: each prompt's videos by step, with that from before training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np

from cogtune.report.page import Html, section, tag
from cogtune.report.pictures import bytes_each, data_uri, shrink, to_jpeg
from cogtune.run.folder import RunFolder
from cogtune.run.sample_videos import read_list, step_folders
from cogtune.system.containment import leads_out
from cogtune.system.errors import CogtuneError

MOST_STEPS = 12
"""Most steps of one prompt that are shown: the first, the last, and others evenly in between."""

MOST_PROMPTS = 24

_POSTER_WIDTH = 320


@dataclass(frozen=True)
class Scene:
    """The key of a sample video: its prompt, the name of its first frame's file, its seed."""

    prompt: str
    image: str | None
    seed: int | None
    averaged: bool = False
    """Whether it was made with the moving average of the weights."""


def find_videos(output: Path) -> dict[Scene, dict[int, Path]]:
    """Return the videos of a run by scene in the order of the lists, then by step, without damaged or missing ones."""
    found: defaultdict[Scene, dict[int, Path]] = defaultdict(dict)
    for step, folder in step_folders(output):
        for entry in read_list(folder):
            scene = Scene(entry.prompt, Path(entry.image).name if entry.image else None, entry.seed, entry.averaged)
            if not leads_out(folder / entry.file, output):
                found[scene][step] = folder / entry.file
    return dict(found)


def spread(steps: list[int], most: int = MOST_STEPS) -> list[int]:
    """Return at most ``most`` steps: the first, the last, and others evenly in between."""
    if len(steps) <= most:
        return steps
    return [steps[number * (len(steps) - 1) // (most - 1)] for number in range(most)]


def video_section(output: Path) -> Iterator[Html]:
    """Yield the section with the videos, if there are any."""
    scenes = find_videos(output)
    if not scenes:
        return
    shown = [(scene, spread(list(by_step)), by_step) for scene, by_step in list(scenes.items())[:MOST_PROMPTS]]
    most_bytes = bytes_each(sum(len(steps) for _, steps, _ in shown))
    remark = "The same prompts and seeds before training, then the latest step first."
    if len(scenes) > len(shown):
        remark += f" Showing {len(shown)} of {len(scenes)} prompts."
    if any(len(steps) < len(by_step) for _, steps, by_step in shown):
        remark += f" {MOST_STEPS} steps of each are shown; all videos are in {RunFolder(output).samples.name}/."
    strips = [_strip(output, scene, steps, by_step, most_bytes) for scene, steps, by_step in shown]
    yield section("Sample videos", tag("p", remark, class_="remark"), strips, id="samples")


def _strip(output: Path, scene: Scene, steps: list[int], by_step: dict[int, Path], most_bytes: int) -> Html:
    figures = []
    for step in [*steps[:1], *reversed(steps[1:])]:
        label = "before training" if step == 0 else f"step {step:,}"
        figures.append(video_figure(by_step[step], output, label, scene.prompt, most_bytes))
    about = [f"seed {scene.seed}" if scene.seed is not None else None, f"from {scene.image}" if scene.image else None]
    about += ["moving average of the weights"] if scene.averaged else []
    return strip(scene.prompt, " · ".join(filter(None, about)), figures, label="Videos by step")


def video_figure(video: Path, folder: Path, label: str, prompt: str, most_bytes: int) -> Html:
    """Return a video with its label.

    Args:
        folder: that of the page, from which the video is loaded.
        most_bytes: of the picture that is shown before it plays.
    """
    shown = tag(
        "video",
        src=quote(video.relative_to(folder).as_posix()),
        poster=_poster(video, most_bytes),
        aria_label=f"{label}: {prompt or 'no prompt'}",
        controls=True,
        muted=True,
        loop=True,
        playsinline=True,
        preload="metadata",
    )
    return tag("figure", shown, tag("figcaption", label))


def strip(prompt: str, about: str, figures: list[Html], *, label: str) -> Html:
    """Return videos of one prompt side by side, of which the first stays in place.

    Args:
        about: what else they have in common.
        label: description for screen readers.
    """
    return tag(
        "article",
        tag("p", prompt or "no prompt", class_="prompt", dir="auto"),
        tag("p", about, class_="what"),
        tag("button", "Play all", type="button", hidden=True),
        tag("div", figures, class_="strip", role="group", tabindex="0", aria_label=label),
        class_="samples",
    )


def _poster(video: Path, most_bytes: int) -> str | None:
    """Return the first frame as a data URL; None if it cannot be read."""
    from cogtune.data.video.clips import iter_frames

    try:
        frame = next(iter_frames(video, [0]))
    except CogtuneError:
        return None
    height, width, _ = frame.shape
    if width > _POSTER_WIDTH:
        frame = shrink(frame, max(1, round(height * _POSTER_WIDTH / width)), _POSTER_WIDTH)
    return data_uri(to_jpeg(np.ascontiguousarray(frame), most_bytes))
