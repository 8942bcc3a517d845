"""Sampling the videos that do not exist yet, with one model for all of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cogtune.commands.infer.filling import SamplingConfig, fill_in
from cogtune.commands.infer.outputs import PlannedVideo, free_name, grid_path, plan_videos
from cogtune.commands.infer.request import InferRequest, Row, names_file
from cogtune.data.frames import load_clip, load_image
from cogtune.data.layouts import own_files
from cogtune.data.video.generated import frames_of, side_by_side, write_generated
from cogtune.modeling.pipelines import steps_taken
from cogtune.modeling.video_sampler import SampleInputs, VideoSampler, VideoSamplerSetup
from cogtune.models.geometry import Size
from cogtune.planning.sampling_memory import what_fits
from cogtune.system import console
from cogtune.system.errors import CogtuneError
from cogtune.system.folders import remove_leftovers
from cogtune.system.out_of_memory import is_out_of_memory, out_of_memory, room_of

MOST_COLUMNS = 4
"""Columns of a grid with one video for each prompt."""


@dataclass(frozen=True)
class Made:
    """A video that exists now."""

    path: Path
    prompt: str
    size: Size
    fps: float


def generate(request: InferRequest) -> list[Made]:
    """Sample the videos of a request that do not exist yet; replace nothing unless the request says so.

    Raises:
        CogtuneError: as :func:`fill_in`, or a video cannot be written, or the GPU's memory is not enough; where
            possible before the model is loaded.
    """
    if request.output is not None and names_file(request.output):
        remove_leftovers(request.output.parent, request.output.name)
    recipe = fill_in(request)
    videos = plan_videos(recipe, request)
    for video in videos:
        if video.done:
            console.note(f"{video.path} already exists: skipped (--force makes it again)")
    todo = [video for video in videos if not video.done]
    paths = {video: video.path for video in videos if video.done}
    if todo:
        paths |= _sample(recipe, todo, request)
    made = [Made(paths[video], video.row.prompt, recipe.size, recipe.fps) for video in videos]
    if request.grid and len(videos) > 1:
        made.append(_grid(recipe, videos, [paths[video] for video in videos]))
    return made


def setup_of(recipe: SamplingConfig) -> VideoSamplerSetup:
    """Return what has to be loaded for a request."""
    return VideoSamplerSetup(
        base=recipe.base,
        transformer=recipe.transformer,
        loras=recipe.loras,
        spec=recipe.spec,
        precision=recipe.precision,
        scheduler=recipe.scheduler,
        arrangement=recipe.arrangement,
        room=recipe.room,
    )


def load_inputs(recipe: SamplingConfig, row: Row, seed: int, scale: float = 1.0) -> SampleInputs:
    """Return one video with its image and clip loaded.

    Raises:
        CogtuneError: one cannot be read.
    """
    clip = load_clip(row.video, recipe.views[row.video]) if row.video is not None else None
    image = load_image(row.image, recipe.size) if row.image is not None else None
    if image is None and clip is not None and recipe.spec.image_to_video:
        image = clip[0]
    return SampleInputs(
        prompt=row.prompt,
        negative_prompt=recipe.negative_prompt,
        seed=seed,
        size=recipe.size,
        steps=recipe.steps,
        guidance=recipe.guidance,
        lora_scale=scale,
        image=image,
        clip=clip,
        strength=recipe.strength if clip is not None else 1.0,
    )


def _sample(recipe: SamplingConfig, videos: Sequence[PlannedVideo], request: InferRequest) -> dict[PlannedVideo, Path]:
    """Sample videos, write each as soon as it is finished, and return their paths."""
    if recipe.arrangement != type(recipe.arrangement)():
        console.note(f"sampling: {recipe.arrangement.describe(recipe.spec.num_layers)}")
    texts = [recipe.negative_prompt, *(video.row.prompt for video in videos)]
    strength = recipe.strength if recipe.views else 1.0
    steps = steps_taken(recipe.steps, strength)
    paths = {}
    with _memory_explained(recipe), console.progress("sampling", steps * len(videos)) as progress:
        sampler = VideoSampler(setup_of(recipe), texts, console.warn)
        for number, video in enumerate(videos, 1):
            status = f"video {number} of {len(videos)}"
            inputs = load_inputs(recipe, video.row, video.seed, video.scale)
            frames = sampler.sample(inputs, partial(_advance, progress, status))
            remove_leftovers(video.path.parent, video.path.name)
            # Another program may have written one meanwhile.
            path = video.path if request.force or not os.path.lexists(video.path) else free_name(video.path)
            write_generated(path, frames, recipe.fps, video.facts, own_files.MARK)
            paths[video] = path
            if len(videos) > 1:
                console.note(f"{path} ({number} of {len(videos)})")
    return paths


def _advance(progress: console.Progress, status: str, _step: int) -> None:
    progress.advance(1, status)


@contextlib.contextmanager
def _memory_explained(recipe: SamplingConfig) -> Iterator[None]:
    """Turn an out-of-memory error into what is free and what would fit.

    Raises:
        CogtuneError: in place of PyTorch's error, and of those of cuBLAS and CUDA.
    """
    try:
        yield
    except CogtuneError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        room = room_of(error)
        fits = "use a smaller --size or fewer --frames"
        if room is not None:
            fits = what_fits(
                recipe.spec,
                recipe.size,
                recipe.precision,
                room.free,
                tried=recipe.arrangement,
                adapters=recipe.adapters,
            )
        raise out_of_memory(error, fits, doing="sampling") from error


def _grid(recipe: SamplingConfig, videos: Sequence[PlannedVideo], paths: Sequence[Path]) -> Made:
    """Write one video of all: a row for each prompt if it has several videos, else rows of a few columns."""
    several = len(recipe.seeds) * len(recipe.scales)
    columns = several if several > 1 and len(recipe.rows) > 1 else min(MOST_COLUMNS, len(paths))
    places = [paths[start : start + columns] for start in range(0, len(paths), columns)]
    size = Size(recipe.size.num_frames, recipe.size.height * len(places), recipe.size.width * columns)
    grid = Made(grid_path(videos), "all of them side by side", size, recipe.fps)
    if grid.path.exists():
        console.note(f"{grid.path} already exists: skipped")
        return grid
    facts = {
        "prompt": " | ".join(dict.fromkeys(video.row.prompt for video in videos)),
        "videos": [dict(video.facts) for video in videos],
    }
    pictures = side_by_side([[frames_of(path) for path in row] for row in places])
    write_generated(grid.path, pictures, recipe.fps, facts, own_files.MARK)
    return grid
