"""Sampling videos: base model, size, frame rate and LoRA strength come from the run unless said otherwise."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel, DiffusionPipeline

from cogtune.data.frames import load_image
from cogtune.data.layouts import own_files
from cogtune.data.video.clips import write_video
from cogtune.data.video.images import image_warnings
from cogtune.modeling.devices import DTYPES
from cogtune.modeling.lora_files import Lora, add_to, check_fits, find_lora, fitting_models, read_lora
from cogtune.modeling.sampling import Frames, pipeline_class, render, scheduler_for, unit_image
from cogtune.models.checkpoint_configs import ModelSpec, fingerprint, read_spec
from cogtune.models.configs import TransformerConfig
from cogtune.models.geometry import Size
from cogtune.models.locate import loading, locate
from cogtune.models.tokens import cut_short, token_counter
from cogtune.models.variants import Precision
from cogtune.run.checkpoints import STATE_NAME, checkpoints, read_state, refuse_shards
from cogtune.run.folder import MERGE_NAME
from cogtune.system import console
from cogtune.system.errors import CogtuneError, UsageError
from cogtune.system.files import os_errors_explained
from cogtune.system.folders import remove_leftovers
from cogtune.system.json_files import read_json
from cogtune.system.reading import read_as

"""In a merged folder: what it was merged from."""

VIDEO_NAME = "video.mp4"
"""What a video is called when nobody says."""

OFFLOAD_BELOW_GIB = 48
"""On a smaller GPU, encoder, transformer and VAE take turns on it."""


@dataclass(frozen=True, kw_only=True)
class InferRequest:
    """What to sample. None means: as the run or the model has it."""

    lora: Path | None = None
    """A LoRA file of any program, an adapter's folder, a checkpoint, or a run's folder."""
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
    lora_scale: float | None = None
    """The LoRA's strength is multiplied by it; 1 when None."""
    lora_alpha: float | None = None
    """The LoRA's alpha, for a file that does not say; None leaves it to the file, else to the rank."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """A request with everything filled in."""

    base: Path
    transformer: Path | None
    """A folder of fine-tuned weights in place of the base's own."""
    lora: Lora | None
    spec: ModelSpec
    prompt: str
    first_frame: torch.Tensor | None
    """Of an image-to-video model: ``[3, H, W]`` uint8."""
    size: Size
    fps: float
    precision: Precision


def fill_in(request: InferRequest) -> SamplingConfig:
    """Everything the request leaves open, from the run's own facts and the model's configs.

    Raises:
        UsageError: something is needed that neither gives, or the model cannot do it.
        CogtuneError: the model or the LoRA cannot be read.
    """
    lora = _asked_lora(request)
    adapter: Mapping[str, Any] = lora.facts if lora is not None else {}
    facts = adapter
    transformer = None
    model = request.model
    if model is not None and (trained := _trained_transformer(Path(model))) is not None:
        transformer, facts = trained
        model = None
    elif model is not None and (Path(model) / MERGE_NAME).is_file():
        facts = {**(read_json(Path(model) / MERGE_NAME).get("run") or {}), "model_path": model, "base_model": model}
    elif model is not None:
        refuse_shards(Path(model))
    model = model or facts.get("base_model")
    if model is None:
        fitting = fitting_models(lora) if lora is not None else []
        others = f"; of the published ones it fits {', '.join(fitting)}" if fitting else ""
        raise UsageError(
            "which model? neither --model nor the LoRA file says",
            f"add --model 5b, or the base the LoRA was trained on{others}",
        )
    base = locate(facts["model_path"] if _is_here(facts, model) else model)
    spec = read_spec(base)
    size = request.size or (Size.parse(facts["size"]) if "size" in facts else spec.native)
    precision = request.precision or facts.get("precision") or spec.variant.trained_in
    prompt = facts.get("prompt") if request.prompt is None else request.prompt
    problems = _problems(request, spec, size, precision)
    if prompt is None:
        problems.insert(0, "--prompt: say what to show")
    if problems or prompt is None:
        raise UsageError("this cannot be sampled", details=problems)
    if lora is not None:
        lora = _at_strength(check_fits(lora, spec, str(request.model or base)), request.lora_alpha)
    _compare_bases(adapter, transformer or base / "transformer")
    for advice in spec.size_advice(size):
        console.note(f"size {advice}")
    for told in cut_short([prompt], spec.max_text_seq_length, token_counter(str(base))):
        console.warn(f"--prompt: {told}")
    return SamplingConfig(
        base=base,
        transformer=transformer,
        lora=lora,
        spec=spec,
        prompt=prompt,
        first_frame=load_image(request.image, size) if request.image is not None else None,
        size=size,
        fps=request.fps or facts.get("fps") or float(spec.variant.fps),
        precision=precision,
    )


def _asked_lora(request: InferRequest) -> Lora | None:
    """The LoRA that is asked for, at the strength that is asked for."""
    if request.lora is None:
        alone = [
            f"--{name} is the strength of a LoRA, and there is none: add --lora"
            for name, value in (("lora-scale", request.lora_scale), ("lora-alpha", request.lora_alpha))
            if value is not None
        ]
        if alone:
            raise UsageError("this cannot be sampled", details=alone)
        return None
    return read_lora(find_lora(request.lora))


def _at_strength(lora: Lora, alpha: float | None) -> Lora:
    """The LoRA with the alpha that is asked for; what is assumed of a file that does not say it is told."""
    if lora.changes_nothing:
        console.warn(f"{lora.path} changes nothing: all of its B matrices are zero, as before a training's first step")
    silent, rank = lora.without_alpha, lora.ranks[0]
    if alpha is None:
        if silent:
            whole = "" if len(silent) == len(lora.pairs) else f" of {len(silent)} of its {len(lora.pairs)} layers"
            console.warn(
                f"{lora.path} does not say the alpha{whole}: it is taken for the rank, {rank}, which is full strength. "
                f"If it was trained with another, such as {rank / 2:g}, give that as --lora-alpha"
            )
        return lora
    if not silent and any(said != alpha for said in lora.alphas):
        told = ", ".join(f"{said:g}" for said in lora.alphas)
        console.note(f"--lora-alpha {alpha:g} is used; {lora.path} says {told}")
    return lora.with_alpha(alpha)


def _problems(request: InferRequest, spec: ModelSpec, size: Size, precision: Precision) -> list[str]:
    """Why the model cannot do what is asked of it."""
    problems = [f"--size {size}: {problem}" for problem in spec.size_problems(size)]
    problems += [f"--precision {problem}" for problem in spec.precision_problems(precision)]
    problems += [f"--steps {problem}" for problem in spec.steps_problems(request.steps)]
    if spec.image_to_video and request.image is None:
        problems.append("--image: an image-to-video model needs the first frame")
    if request.image is not None:
        if not spec.image_to_video:
            problems.append("--image: this is a text-to-video model, it takes none")
        elif not request.image.is_file():
            problems.append(f"--image: there is no file {request.image}: give the picture that the video starts with")
    return problems


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


def load_pipeline(recipe: SamplingConfig) -> DiffusionPipeline:
    """The diffusers pipeline with the fine-tuned weights and the guides' scheduler, on the GPU if there is one.

    Raises:
        CogtuneError: a file of it is damaged.
    """
    dtype = DTYPES[recipe.precision]
    own = {}
    if recipe.transformer is not None:
        read_as(recipe.transformer / "config.json", TransformerConfig)
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
    recipe: SamplingConfig,
    request: InferRequest,
    on_step: Callable[[int], None] | None = None,
) -> Frames:
    """Sample one video: frames ``[F, H, W, 3]`` uint8.

    Args:
        on_step: called after each denoising step with its number, from 1.
    """
    if recipe.lora is not None:
        scale = 1.0 if request.lora_scale is None else request.lora_scale
        add_to(pipeline.transformer, recipe.lora, scale=scale, pipeline=pipeline)
    inputs: dict[str, Any] = {"prompt": recipe.prompt}
    if recipe.first_frame is not None:
        inputs["image"] = unit_image(recipe.first_frame)
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


@dataclass(frozen=True)
class Made:
    """A video that was made, and of what."""

    recipe: SamplingConfig
    video: Path


def free_name(path: Path) -> Path:
    """``path``, or the first of ``NAME-2``, ``NAME-3`` and so on that is not taken."""
    number, found = 1, path
    while os.path.lexists(found):
        number += 1
        found = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return found


def _check_output(output: Path, *, force: bool) -> None:
    """Refuse a name that cannot be written, before the minutes that sampling takes.

    Raises:
        UsageError: a file has that name, and may not be replaced.
        CogtuneError: a folder has that name, or its own folder is a file or not writable.
    """
    with os_errors_explained(output):
        if output.is_dir():
            raise CogtuneError(f"cannot write {output}: a folder has that name", "give --output another name")
        if os.path.lexists(output) and not force:
            raise UsageError(f"{output} is there already", "give --output another name, or --force to replace it")
        folder = next(above for above in output.absolute().parents if above.exists())
        if not folder.is_dir():
            raise CogtuneError(f"cannot write {output}: {folder} is a file", "give an --output in a folder")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise CogtuneError(
                f"cannot write {output}: {folder} is not writable", "check who owns it, or give another --output"
            )


def generate(
    request: InferRequest,
    output: Path | None = None,
    on_step: Callable[[int], None] | None = None,
    *,
    force: bool = False,
) -> Made:
    """Sample what is asked for and write it to ``output`` (mp4); nothing is replaced unless ``force`` says so.

    Args:
        output: by default ``video.mp4``, or ``video-2.mp4`` and so on where that is taken.

    Raises:
        CogtuneError: as :func:`fill_in`, or the image cannot be read, or the video cannot be written; where possible
            before the model is loaded.
    """
    target = output or free_name(Path(VIDEO_NAME))
    _check_output(target, force=force)
    remove_leftovers(target.parent, target.name)
    recipe = fill_in(request)
    for told in image_warnings(request.image) if request.image is not None else ():
        console.warn(told)
    frames = sample(load_pipeline(recipe), recipe, request, on_step)
    video = output or Path(VIDEO_NAME)
    if not force:
        video = free_name(video)  # another program may have written one meanwhile
    write_video(video, frames, recipe.fps, own_files.MARK)
    return Made(recipe, video)
