"""A run's sample videos, made with the same prompts and seeds each time from the weights in training."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor

from cogtune.data.cache.store import Store
from cogtune.data.layouts import own_files
from cogtune.data.prompts import PromptRow
from cogtune.data.video.clips import write_video
from cogtune.modeling.pipelines import (
    NotFinite,
    UnbatchedGuidance,
    pipeline_class,
    render,
    scheduler_for,
    unit_image,
)
from cogtune.models.checkpoint_configs import ModelSpec
from cogtune.models.geometry import Size
from cogtune.models.locate import loading
from cogtune.run.folder import AVERAGE_NAME, RunFolder
from cogtune.run.sample_videos import SampleEntry, file_name, read_list, step_folder, step_folders, write_list
from cogtune.system import console
from cogtune.system.folders import partial_folder, partial_path, publish_folder, remove_folder, remove_partials
from cogtune.system.json_files import read_json
from cogtune.training.checkpoint import TrainState


def remove_later_samples(output: Path, first_step: int) -> None:
    """Delete sample videos after ``first_step``, which the run will make again, and leftovers of a killed run."""
    remove_partials(RunFolder(output).samples)
    for step, path in step_folders(output):
        if (step > first_step or first_step == 0) and (left := remove_folder(path)):
            console.warn(left)


@dataclass(frozen=True, kw_only=True)
class ValidationVideos:
    """The prompts of a run's sample videos, and how to sample them."""

    prompts: tuple[PromptRow, ...]
    null_text: str
    """Key of the empty prompt's embedding."""
    store: Store
    base_model_dir: Path
    """The base model, for its VAE and its scheduler."""
    spec: ModelSpec
    size: Size
    fps: float
    dtype: torch.dtype
    seed: int
    steps: int
    guidance: float
    output: Path

    def file_name(self, number: int, *, averaged: bool = False) -> str:
        """Return the file name of the video of prompt ``number``, made with the weights or their average."""
        name = file_name(number, self.prompts[number].prompt)
        return f"{AVERAGE_NAME}-{name}" if averaged else name


def render_validation_videos(
    train_state: TrainState,
    validation_videos: ValidationVideos,
    step: int,
    tell: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Sample every prompt into the folder of ``step``; return its entries. Collective: every process calls it.

    The prompts are divided over the processes, the same number of videos each, since under ZeRO-3 every forward
    pass needs all of them. Weights, optimizer and random state are as before afterwards.

    Args:
        tell: called after each denoising step, by all processes alike, with a status text. An exception ends the
            sampling, and nothing of it is kept.

    Raises:
        CogtuneError: a video cannot be written.
    """
    accelerator = train_state.accelerator
    target = step_folder(validation_videos.output, step)
    aside = partial_path(target)
    if accelerator.is_main_process:
        partial_folder(target)
    accelerator.wait_for_everyone()
    try:
        with _undisturbed(train_state):
            _render_share(train_state, validation_videos, aside, tell)
            if train_state.averages:
                with train_state.averaged():
                    _render_share(train_state, validation_videos, aside, tell, averaged=True)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_list(aside, _entries(validation_videos, aside))
            if left := publish_folder(aside, target):
                console.warn(left)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    accelerator.wait_for_everyone()
    return [asdict(entry) for entry in read_list(target)]


def _entries(validation_videos: ValidationVideos, folder: Path) -> list[SampleEntry]:
    return [
        SampleEntry(row.prompt, row.image_file, validation_videos.seed, name, averaged)
        for averaged in (False, True)
        for number, row in enumerate(validation_videos.prompts)
        if (folder / (name := validation_videos.file_name(number, averaged=averaged))).is_file()
    ]


def _render_share(
    train_state: TrainState,
    validation_videos: ValidationVideos,
    folder: Path,
    tell: Callable[[str], None],
    *,
    averaged: bool = False,
) -> None:
    """Sample this process's videos. The VAE is in memory only during this."""
    accelerator, count = train_state.accelerator, len(validation_videos.prompts)
    turns = -(-count // accelerator.num_processes)
    pipeline = _pipeline(train_state, validation_videos)
    for turn in range(turns):
        number = turn * accelerator.num_processes + accelerator.process_index
        row = validation_videos.prompts[number % count]

        def stepped(done: int, turn: int = turn) -> None:
            tell(f"sample video {turn + 1}/{turns}, step {done}/{validation_videos.steps}")

        try:
            frames = render(
                pipeline,
                validation_videos.spec,
                validation_videos.size,
                steps=validation_videos.steps,
                guidance=validation_videos.guidance,
                seed=validation_videos.seed,
                on_step=stepped,
                **_inputs(validation_videos, row, accelerator.device),
            )
        except NotFinite as error:
            console.warn(f"cannot sample '{row.prompt}': {error.message}")
            continue
        if number < count:
            write_video(
                folder / validation_videos.file_name(number, averaged=averaged),
                frames,
                validation_videos.fps,
                own_files.MARK,
            )


def _pipeline(train_state: TrainState, validation_videos: ValidationVideos) -> Any:
    """Build the diffusers pipeline around the model in training, without a text encoder."""
    with loading(validation_videos.base_model_dir / "vae"):
        vae = AutoencoderKLCogVideoX.from_pretrained(
            validation_videos.base_model_dir / "vae", dtype=validation_videos.dtype
        )
    vae.to(train_state.accelerator.device).eval()
    vae.enable_slicing()
    vae.enable_tiling()
    # DDP's own forward pass may synchronise, and the processes' numbers of videos differ; DeepSpeed's is needed.
    model = train_state.model if train_state.is_zero else train_state.transformer
    scheduler = scheduler_for(
        validation_videos.spec, read_json(validation_videos.base_model_dir / "scheduler" / "scheduler_config.json")
    )
    pipeline = pipeline_class(validation_videos.spec)(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=UnbatchedGuidance(train_state.transformer, model),
        scheduler=scheduler,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _inputs(validation_videos: ValidationVideos, row: PromptRow, device: torch.device) -> dict[str, Any]:
    def embedding(key: str) -> Tensor:
        return validation_videos.store.read("text", key).unsqueeze(0).to(device, validation_videos.dtype)

    inputs = {"prompt_embeds": embedding(row.text), "negative_prompt_embeds": embedding(validation_videos.null_text)}
    if row.image is not None:
        inputs["image"] = unit_image(validation_videos.store.read("image", row.image))
    return inputs


@contextlib.contextmanager
def _undisturbed(train_state: TrainState) -> Iterator[None]:
    """Put the model in evaluation mode, and restore everything that training depends on afterwards."""
    device = train_state.accelerator.device
    on_gpu = device.type == "cuda"
    was_training = train_state.model.training
    with torch.random.fork_rng(devices=[device] if on_gpu else []), torch.no_grad():
        train_state.model.eval()
        if on_gpu:
            torch.cuda.empty_cache()
        try:
            yield
        finally:
            train_state.model.train(was_training)
            if on_gpu:
                torch.cuda.empty_cache()
