"""Sampling videos: base model, size, frame rate and LoRA strength come from the run unless said otherwise."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel, DiffusionPipeline

from cogtune import console
from cogtune.checkpoints import STATE_NAME, checkpoints, read_state
from cogtune.data import own
from cogtune.data.frames import load_image
from cogtune.data.video import write_video
from cogtune.errors import CogtuneError, UsageError
from cogtune.files import explained, read_json
from cogtune.geometry import Size
from cogtune.modeling.adapters import read_facts
from cogtune.modeling.devices import DTYPES
from cogtune.modeling.locate import loading, locate
from cogtune.modeling.sampling import Frames, pipeline_class, render, scheduler_for, unit_image
from cogtune.models import LORA_WEIGHTS_NAME, ModelSpec, Precision, fingerprint, read_spec
from cogtune.training.checkpoint import ZERO_TAG

MERGE_NAME = "merge.json"
"""In a merged folder: what it was merged from."""

OFFLOAD_BELOW_GIB = 48
"""On a smaller GPU, encoder, transformer and VAE take turns on it."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to sample. None means: as the run or the model has it."""

    lora: Path | None = None
    """A LoRA file, a checkpoint, or a run's folder."""
    model: str | None = None
    """Base model; or the result of full fine-tuning: a run, a checkpoint or a merged folder."""
    prompt: str | None = None
    image: Path | None = None
    size: Size | None = None
    fps: float | None = None
    precision: Precision | None = None
    seed: int = 42
    steps: int = 50
    guidance: float = 6.0
    lora_scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A request with everything filled in."""

    base: Path
    transformer: Path | None
    """A folder of fine-tuned weights in place of the base's own."""
    lora: Path | None
    spec: ModelSpec
    prompt: str
    image: Path | None
    size: Size
    fps: float
    precision: Precision


def find_lora(path: Path) -> Path:
    """The LoRA file that ``path`` means: itself, or the one in a run or a checkpoint.

    Raises:
        UsageError: there is none.
    """
    if path.is_file():
        return path
    for folder in (path, *reversed(checkpoints(path))):
        if (folder / LORA_WEIGHTS_NAME).is_file():
            return folder / LORA_WEIGHTS_NAME
    _refuse_shards(path)
    what = "no such file or folder" if not path.exists() else f"it holds no {LORA_WEIGHTS_NAME} and no checkpoint"
    raise UsageError(f"there is no LoRA in {path}: {what}", "give a run's folder, a checkpoint, or a .safetensors file")


def _refuse_shards(path: Path) -> None:
    """Say what to do with a checkpoint, or a run of them, whose weights are in ZeRO shards alone."""
    for folder in (path, *checkpoints(path)[-1:]):
        if (folder / "latest").is_file() and (folder / ZERO_TAG).is_dir():
            raise UsageError(
                f"{path} needs `cogtune merge-zero {shlex.quote(str(folder))}` first: its weights are in ZeRO shards",
                "then give --model the folder that it writes",
            )


def fill_in(request: Request) -> Recipe:
    """Everything the request leaves open, from the run's own facts and the model's configs.

    Raises:
        UsageError: something is needed that neither gives, or the model cannot do it.
        CogtuneError: the model or the LoRA cannot be read.
    """
    lora = find_lora(request.lora) if request.lora is not None else None
    adapter: Mapping[str, Any] = read_facts(lora) if lora is not None else {}
    facts = adapter
    transformer = None
    model = request.model
    if model is not None and (trained := _trained_transformer(Path(model))) is not None:
        transformer, facts = trained
        model = None
    elif model is not None and (Path(model) / MERGE_NAME).is_file():
        facts = {**(read_json(Path(model) / MERGE_NAME).get("run") or {}), "model_path": model, "base_model": model}
    elif model is not None:
        _refuse_shards(Path(model))
    model = model or facts.get("base_model")
    if model is None:
        raise UsageError(
            "which model? neither --model nor the LoRA file says", "add --model 5b, or the base the LoRA was trained on"
        )
    base = locate(facts["model_path"] if _is_here(facts, model) else model)
    spec = read_spec(base)
    size = request.size or (Size.parse(facts["size"]) if "size" in facts else spec.native)
    prompt = facts.get("prompt") if request.prompt is None else request.prompt
    problems = [f"--size {size}: {problem}" for problem in spec.size_problems(size)]
    if prompt is None:
        problems.append("--prompt: say what to show")
    if spec.image_to_video and request.image is None:
        problems.append("--image: an image-to-video model needs the first frame")
    if not spec.image_to_video and request.image is not None:
        problems.append("--image: this is a text-to-video model, it takes none")
    if problems or prompt is None:
        raise UsageError("this cannot be sampled", details=problems)
    _compare_bases(adapter, transformer or base / "transformer")
    return Recipe(
        base=base,
        transformer=transformer,
        lora=lora,
        spec=spec,
        prompt=prompt,
        image=request.image,
        size=size,
        fps=request.fps or facts.get("fps") or float(spec.variant.fps),
        precision=request.precision or facts.get("precision") or spec.variant.trained_in,
    )


def _compare_bases(adapter: Mapping[str, Any], transformer: Path) -> None:
    """Warn when a LoRA's facts name other weights than those in the folder ``transformer``."""
    trained_on = (adapter.get("identity") or {}).get("model")
    if trained_on is not None and trained_on != fingerprint(transformer.parent, transformer.name):
        console.warn(
            f"the LoRA was trained on {adapter.get('base_model')}, whose weights are not those in "
            f"{transformer.parent}: the video may be poor"
        )


def _is_here(facts: Mapping[str, Any], model: str) -> bool:
    """Whether the folder the run used is still there, and is the model asked for."""
    return facts.get("base_model") == model and Path(facts.get("model_path", "/nowhere")).is_dir()


def _trained_transformer(folder: Path) -> tuple[Path, Mapping[str, Any]] | None:
    """The fully trained transformer that a run or a checkpoint holds, with the run's facts; None if it is neither."""
    for candidate in (folder, *reversed(checkpoints(folder))):
        if (candidate / STATE_NAME).is_file() and (candidate / "transformer").is_dir():
            return candidate / "transformer", read_state(candidate)
    return None


def load_pipeline(recipe: Recipe) -> DiffusionPipeline:
    """The diffusers pipeline with the fine-tuned weights and the guides' scheduler, on the GPU if there is one.

    Raises:
        CogtuneError: a file of it is damaged.
    """
    dtype = DTYPES[recipe.precision]
    own = {}
    if recipe.transformer is not None:
        with loading(recipe.transformer):
            own["transformer"] = CogVideoXTransformer3DModel.from_pretrained(recipe.transformer, dtype=dtype)
    with loading(recipe.base):
        pipeline = pipeline_class(recipe.spec).from_pretrained(recipe.base, dtype=dtype, **own)
    pipeline.scheduler = scheduler_for(recipe.spec, pipeline.scheduler.config)
    pipeline.vae.enable_slicing()
    pipeline.vae.enable_tiling()
    pipeline.set_progress_bar_config(disable=True)
    if torch.cuda.is_available():
        if torch.cuda.get_device_properties(0).total_memory < OFFLOAD_BELOW_GIB * 2**30:
            pipeline.enable_model_cpu_offload()
        else:
            pipeline.to("cuda")
    return pipeline


def sample(
    pipeline: DiffusionPipeline,
    recipe: Recipe,
    request: Request,
    on_step: Callable[[int], None] | None = None,
) -> Frames:
    """Sample one video: frames ``[F, H, W, 3]`` uint8.

    Args:
        on_step: called after each denoising step with its number, from 1.
    """
    if recipe.lora is not None:
        pipeline.load_lora_weights(recipe.lora.parent, weight_name=recipe.lora.name, adapter_name="lora")
        if request.lora_scale != 1.0:
            pipeline.set_adapters(["lora"], [request.lora_scale])
    inputs: dict[str, Any] = {"prompt": recipe.prompt}
    if recipe.image is not None:
        inputs["image"] = unit_image(load_image(recipe.image, recipe.size))
    return render(
        pipeline,
        recipe.spec,
        recipe.size,
        steps=request.steps,
        guidance=request.guidance,
        seed=request.seed,
        on_step=on_step,
        **inputs,
    )


def _check_output(output: Path) -> None:
    """Refuse a name that cannot be written, before the minutes that sampling takes.

    Raises:
        CogtuneError: a folder has that name, or its own folder is a file or not writable.
    """
    with explained(output):
        if output.is_dir():
            raise CogtuneError(f"cannot write {output}: a folder has that name", "give --output another name")
        folder = next(above for above in output.absolute().parents if above.exists())
        if not folder.is_dir():
            raise CogtuneError(f"cannot write {output}: {folder} is a file", "give an --output in a folder")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise CogtuneError(
                f"cannot write {output}: {folder} is not writable", "check who owns it, or give another --output"
            )


def generate(request: Request, output: Path, on_step: Callable[[int], None] | None = None) -> Recipe:
    """Sample what is asked for and write it to ``output`` (mp4).

    Raises:
        CogtuneError: as :func:`fill_in`, or the video cannot be written; what can be seen of that is told first.
    """
    _check_output(output)
    recipe = fill_in(request)
    frames = sample(load_pipeline(recipe), recipe, request, on_step)
    write_video(output, frames, recipe.fps, own.MARK)
    return recipe
