"""Filling the cache: what is missing goes through the encoders, in a process of its own.

The job is a file, ``CACHE/job/plan.json``: what has to be encoded, and with what. ``python -m cogtune.caching JOB``
does it. So the process that asks needs no torch, and the encoders' memory is free again before training starts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cogtune import console, process
from cogtune.config import RunConfig
from cogtune.data.cache import Store
from cogtune.data.frames import FrameSettings
from cogtune.data.index import ClipJob, ImageJob, Index, Recipe, TextJob, Todo, make_index, todo
from cogtune.data.sources import Dataset
from cogtune.files import read_json, write_json
from cogtune.launch import ENVIRONMENT, LaunchFiles
from cogtune.models import ModelSpec, Precision, fingerprint
from cogtune.plan import fps_of, size_of
from cogtune.process import StopRequest, work

if TYPE_CHECKING:
    import torch

TEXT_BATCH = 8
"""Captions encoded together: T5-XXL takes 7 ms a caption so on an H200, and 17 ms one at a time."""

READ_AHEAD = 2
"""Clips decoded while the encoder works on the one before."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Prepared:
    """A dataset's index under one recipe, and what of it is not cached yet."""

    store: Store
    index: Index
    todo: Todo


def frame_settings(config: RunConfig, spec: ModelSpec) -> FrameSettings:
    """Which frames of a clip are taken, and how they are fitted."""
    return FrameSettings(size=size_of(config, spec), fps=fps_of(config, spec), start=config.skip_start)


def prepare(config: RunConfig, spec: ModelSpec, checkpoint: Path, dataset: Dataset) -> Prepared:
    """Work out every entry's key and look which are missing; nothing is encoded.

    Raises:
        CogtuneError: a clip or the model cannot be read, or the cache folder not be written.
    """
    tokens = {part: fingerprint(checkpoint, part) for part in ("text_encoder", "tokenizer")}
    recipe = Recipe(
        frames=frame_settings(config, spec),
        vae=fingerprint(checkpoint, "vae"),
        text=f"{tokens['text_encoder']}-{tokens['tokenizer']}",
        max_tokens=spec.max_text_seq_length,
        dtype=config.precision,
        id_token=config.id_token,
        with_image=spec.image_to_video,
    )
    store = Store(config.cache_dir or config.data / ".cogtune")
    index = make_index(store, dataset.samples, recipe)
    store.facts.save()
    return Prepared(store, index, todo(store, dataset.samples, index, recipe))


@dataclass(frozen=True)
class Job:
    """What has to be encoded, and with what."""

    checkpoint: Path
    store: Store
    precision: Precision
    max_tokens: int
    todo: Todo

    def write(self, path: Path) -> None:
        """Save as JSON."""
        write_json(
            path,
            {
                "checkpoint": str(self.checkpoint),
                "cache": str(self.store.root),
                "precision": self.precision,
                "max_tokens": self.max_tokens,
                "clips": [[job.key, str(job.video), job.frames.to_dict()] for job in self.todo.clips],
                "texts": [[job.key, job.caption] for job in self.todo.texts],
                "images": [
                    [job.key, str(job.source), job.from_video, job.frames.to_dict()] for job in self.todo.images
                ],
            },
        )

    @classmethod
    def read(cls, path: Path) -> Job:
        """The job saved at ``path``."""
        value = read_json(path)
        return cls(
            Path(value["checkpoint"]),
            Store(Path(value["cache"])),
            value["precision"],
            value["max_tokens"],
            Todo(
                tuple(
                    ClipJob(key, Path(video), FrameSettings.from_dict(frames)) for key, video, frames in value["clips"]
                ),
                tuple(TextJob(key, caption) for key, caption in value["texts"]),
                tuple(
                    ImageJob(key, Path(source), from_video, FrameSettings.from_dict(frames))
                    for key, source, from_video, frames in value["images"]
                ),
            ),
        )


def job_for(prepared: Prepared, config: RunConfig, spec: ModelSpec, checkpoint: Path) -> Job:
    """The job of encoding what ``prepared`` lacks."""
    return Job(
        checkpoint,
        prepared.store,
        config.precision,
        spec.max_text_seq_length,
        prepared.todo,
    )


def fill(job: Job) -> None:
    """Do a job in a process of its own.

    Raises:
        CogtuneError: it failed, or was stopped; what is done stays done.
    """
    files = LaunchFiles(job.store.root / "job")
    job.write(files.plan)
    process.watch(
        [sys.executable, "-m", "cogtune.caching", str(files.plan)],
        [files.report(0)],
        files.log,
        environment=ENVIRONMENT,
        if_stopped=lambda: "the same command goes on where it was",
    )


def encode(job: Job, stop: StopRequest) -> bool:
    """Encode all of a job, text first, so that the two encoders are never in memory together; False when stopped."""
    from cogtune.modeling.devices import DTYPES, best_device

    device, dtype = best_device(), DTYPES[job.precision]
    return (
        _encode_texts(job, stop, device, dtype) and _encode_clips(job, stop, device, dtype) and _store_images(job, stop)
    )


def _encode_texts(job: Job, stop: StopRequest, device: torch.device, dtype: torch.dtype) -> bool:
    from cogtune.modeling.encode import TextEncoder

    texts = job.todo.texts
    if not texts:
        return True
    encoder = TextEncoder(job.checkpoint, max_tokens=job.max_tokens, device=device, dtype=dtype)
    with console.progress("captions", len(texts)) as progress:
        for start in range(0, len(texts), TEXT_BATCH):
            if stop:
                return False
            group = texts[start : start + TEXT_BATCH]
            for text, embedding in zip(group, encoder.encode([text.caption for text in group]), strict=True):
                job.store.write("text", text.key, embedding)
            progress.advance(len(group))
    return True


def _encode_clips(job: Job, stop: StopRequest, device: torch.device, dtype: torch.dtype) -> bool:
    from cogtune.data.frames import load_clip
    from cogtune.modeling.encode import VideoEncoder

    clips = job.todo.clips
    if not clips:
        return True
    encoder = VideoEncoder(job.checkpoint, device=device, dtype=dtype)
    with console.progress("clips", len(clips)) as progress:
        for clip, frames in _ahead(clips, lambda clip: load_clip(clip.video, clip.frames)):
            if stop:
                return False
            job.store.write("latents", clip.key, encoder.moments(frames))
            progress.advance(1)
    return True


def _store_images(job: Job, stop: StopRequest) -> bool:
    from cogtune.data.frames import load_clip, load_image

    def load(image: ImageJob) -> torch.Tensor:
        if image.from_video:
            return load_clip(image.source, image.frames.first_frame())[0]
        return load_image(image.source, image.frames.size)

    if not job.todo.images:
        return True
    with console.progress("images", len(job.todo.images)) as progress:
        for image, pixels in _ahead(job.todo.images, load):
            if stop:
                return False
            job.store.write("image", image.key, pixels)
            progress.advance(1)
    return True


def _ahead(jobs: Sequence[T], load: Callable[[T], R]) -> Iterator[tuple[T, R]]:
    """Each job with what ``load`` makes of it, loaded in other threads while the one before is worked on."""
    with ThreadPoolExecutor(READ_AHEAD, "cogtune-read") as readers:
        pending = [(job, readers.submit(load, job)) for job in jobs[:READ_AHEAD]]
        following = iter(jobs[READ_AHEAD:])
        while pending:
            job, loading = pending.pop(0)
            loaded = loading.result()
            pending += [(later, readers.submit(load, later)) for later in [next(following, None)] if later is not None]
            yield job, loaded


def main(arguments: list[str] | None = None) -> int:
    """Work through one job file; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m cogtune.caching", description=__doc__)
    parser.add_argument("job", type=Path, help="the job's plan.json")
    path: Path = parser.parse_args(arguments).job
    files = LaunchFiles(path.parent)
    return work(files.report(0), files.log, lambda stop: encode(Job.read(path), stop))


if __name__ == "__main__":
    raise SystemExit(main())
