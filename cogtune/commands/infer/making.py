"""Sampling the videos that do not exist yet, with one model for all of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from cogtune.commands.infer.filling import arranged, fill_in
from cogtune.commands.infer.outputs import PlannedVideo, free_name, grid_path, plan_videos
from cogtune.commands.infer.remarks import Remarks
from cogtune.commands.infer.request import InferRequest, Row, names_file
from cogtune.commands.infer.sampling_config import SamplingConfig
from cogtune.data.frames import load_clip, load_image
from cogtune.data.layouts import own_files
from cogtune.data.video.generated import frames_of, side_by_side, write_generated
from cogtune.modeling.lora_files import Lora
from cogtune.modeling.pipelines import Frames, steps_taken
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


@dataclass(frozen=True, eq=False)
class Batch:
    """A request with everything filled in, and its videos."""

    request: InferRequest
    recipe: SamplingConfig
    videos: tuple[PlannedVideo, ...]

    @property
    def todo(self) -> tuple[PlannedVideo, ...]:
        """The videos that do not exist yet."""
        return tuple(video for video in self.videos if not video.done)


class Measurement(Protocol):
    """What else is measured with the models that are loaded for sampling."""

    def due(self, batch: Batch) -> bool:
        """Return whether something is to be measured with a batch's weights at its first scale."""
        ...

    def measure(self, batch: Batch, transformer: Any) -> None:
        """Measure it."""
        ...


def generate(request: InferRequest) -> list[Made]:
    """Sample the videos of a request that do not exist yet; replace nothing unless the request says so.

    Raises:
        CogtuneError: as :func:`fill_in`, or a video cannot be written, or the GPU's memory is not enough; where
            possible before the model is loaded.
    """
    if request.output is not None and names_file(request.output):
        remove_leftovers(request.output.parent, request.output.name)
    batch = plan_batch(request)
    for video in batch.videos:
        if video.done:
            console.note(f"{video.path} already exists: skipped (--force makes it again)")
    (paths,) = sample_batches([batch])
    recipe = batch.recipe
    made = [
        Made(path, video.row.prompt, recipe.size, recipe.fps) for video, path in zip(batch.videos, paths, strict=True)
    ]
    if request.grid and len(paths) > 1:
        made.append(_grid(recipe, batch.videos, paths))
    return made


def plan_batch(request: InferRequest, remarks: Remarks | None = None) -> Batch:
    """Return a request with everything filled in, and its videos.

    Raises:
        CogtuneError: as :func:`fill_in`, or a file cannot be written.
    """
    recipe = fill_in(request, remarks)
    return Batch(request, recipe, tuple(plan_videos(recipe, request)))


def sample_batches(batches: Sequence[Batch], also: Measurement | None = None) -> list[list[Path]]:
    """Sample the videos that do not exist yet, and return the path of each video of each batch.

    Batches with the same weights share one model, in which their LoRAs are switched on and off.

    Raises:
        CogtuneError: a video cannot be written, or the GPU's memory is not enough.
    """
    paths = {video: video.path for batch in batches for video in batch.videos}
    groups: dict[Any, list[Batch]] = {}
    for batch in batches:
        groups.setdefault(setup_of(batch.recipe).model, []).append(batch)
    for group in groups.values():
        if any(batch.todo or (also is not None and also.due(batch)) for batch in group):
            paths |= _sample(group, also)
    return [[paths[video] for video in batch.videos] for batch in batches]


def setup_of(recipe: SamplingConfig) -> VideoSamplerSetup:
    """Return what has to be loaded for a request."""
    return VideoSamplerSetup(
        base=recipe.base,
        transformer=recipe.transformer,
        loras=recipe.loras,
        spec=recipe.spec,
        precision=recipe.precision,
        base_precision=recipe.base_precision,
        text_encoder_precision=recipe.text_encoder_precision,
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


def _sample(batches: Sequence[Batch], also: Measurement | None) -> dict[PlannedVideo, Path]:
    """Sample videos with one model, write each as soon as it is finished, and return their paths."""
    first = batches[0]
    recipe = first.recipe
    loras = {_key(lora): lora for batch in batches for lora in batch.recipe.loras}
    if len(batches) > 1:
        recipe = arranged(replace(recipe, loras=tuple(loras.values())), first.request.vram)
    if recipe.arrangement != type(recipe.arrangement)():
        console.note(f"sampling: {recipe.arrangement.describe(recipe.spec.num_layers)}")
    todo = [video for batch in batches for video in batch.todo]
    texts = [
        text for batch in batches for video in batch.todo for text in (batch.recipe.negative_prompt, video.row.prompt)
    ]
    steps = sum(len(batch.todo) * _steps_of(batch.recipe) for batch in batches)
    paths: dict[PlannedVideo, Path] = {}
    with _memory_explained(recipe), console.progress("sampling", steps) as progress:
        sampler = VideoSampler(setup_of(recipe), texts, console.warn)
        for batch in batches:
            used = tuple(list(loras).index(_key(lora)) for lora in batch.recipe.loras)
            if also is not None and also.due(batch):
                also.measure(batch, sampler.transformer_with(used, batch.recipe.scales[0]))
            for video in batch.todo:
                status = f"video {len(paths) + 1} of {len(todo)}"
                inputs = replace(load_inputs(batch.recipe, video.row, video.seed, video.scale), loras=used)
                frames = sampler.sample(inputs, partial(_advance, progress, status))
                paths[video] = _written(batch, video, frames)
                if len(todo) > 1:
                    console.note(f"{paths[video]} ({len(paths)} of {len(todo)})")
    return paths


def _key(lora: tuple[Lora, float]) -> Any:
    """Return what distinguishes a LoRA and its weight from others."""
    return lora[0].path, lora[0].alphas[0], lora[1]


def _steps_of(recipe: SamplingConfig) -> int:
    """Return the denoising steps of each video."""
    return steps_taken(recipe.steps, recipe.strength if recipe.views else 1.0)


def _written(batch: Batch, video: PlannedVideo, frames: Frames) -> Path:
    """Write a video; return its path, which is another one if a program has written that file meanwhile."""
    remove_leftovers(video.path.parent, video.path.name)
    taken = os.path.lexists(video.path) and not batch.request.force
    path = free_name(video.path) if taken else video.path
    write_generated(path, frames, batch.recipe.fps, video.facts, own_files.MARK)
    return path


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
            fits = what_fits(recipe.task, room.free, tried=recipe.arrangement)
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
