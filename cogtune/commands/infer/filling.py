"""Filling in what a request leaves open, from the run's facts and the model's configs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cogtune.commands.infer.clips import frames_of
from cogtune.commands.infer.remarks import Remarks
from cogtune.commands.infer.request import (
    STRENGTH,
    InferRequest,
    Problems,
    files_asked,
    number_problems,
    output_problems,
    prompts_asked,
    rows_of,
)
from cogtune.commands.infer.sampling_config import SamplingConfig
from cogtune.config.arrangement import SamplingArrangement
from cogtune.config.choices import parse_bytes
from cogtune.config.resolving import read_mapping
from cogtune.data.frames import load_image
from cogtune.modeling.devices import best_device, free_bytes
from cogtune.modeling.lora_files import Lora, check_fits, fitting_models, read_lora
from cogtune.modeling.pipelines import steps_taken
from cogtune.models.checkpoint_configs import ModelSpec, read_spec
from cogtune.models.download import snapshot
from cogtune.models.geometry import Size
from cogtune.models.locate import locate
from cogtune.planning.estimate import CONTEXT
from cogtune.planning.sampling_memory import arrangement_for, decoding_bytes, plan_sampling
from cogtune.run.checkpoints import STATE_NAME, checkpoints, read_state, refuse_shards
from cogtune.run.facts import checked_facts
from cogtune.run.folder import AVERAGE_NAME, MERGE_NAME, RUN_NAME
from cogtune.run.lora_paths import file_and_weight, lora_at
from cogtune.system import console
from cogtune.system.errors import UsageError
from cogtune.system.reading import Schema, read_as

SURE = 1.15
"""On a CPU, the VAE works in tiles if this times its estimate is more than the free memory."""


@dataclass(frozen=True)
class Model:
    """The base model that is sampled from, and what is known of a run."""

    name: str
    folder: str
    """As :func:`cogtune.models.locate.locate` takes it."""
    transformer: Path | None
    facts: Mapping[str, Any]
    configs: Path
    """The folder of its configs; its weights may not be there yet."""
    spec: ModelSpec


@dataclass(frozen=True)
class Given:
    """What a request names, found and read."""

    prompts: list[str]
    images: list[Path]
    clips: list[Path]
    loras: list[tuple[Lora, float]]


def fill_in(request: InferRequest, remarks: Remarks | None = None) -> SamplingConfig:
    """Return a request with everything filled in from the run's facts and the model's configs.

    The weights of the base model are downloaded last, once nothing is wrong.

    Args:
        remarks: those that were made of other requests, which are not repeated.

    Raises:
        UsageError: with everything that is wrong, or that the model cannot do.
        CogtuneError: the model or the LoRA cannot be read.
    """
    problems = Problems(number_problems(request))
    given = _given(request, problems)
    model = None
    with problems.gathered():
        model = _model(request, given)
    if model is None:
        output_problems(request, problems, 1)
        problems.refuse()
        raise AssertionError("a model that is not found is a problem")
    recipe = _filled(request, given, model, problems)
    problems.refuse()
    remarks = remarks or Remarks()
    loras = tuple((remarks.with_alpha(lora, request.lora_alpha), weight) for lora, weight in recipe.loras)
    recipe = replace(recipe, base=locate(model.folder), loras=loras)
    remarks.advise(recipe, given.images)
    return recipe


def model_of(request: InferRequest) -> Model:
    """Return the base model of a request, and what its weights say of their run; no weights of the base are fetched.

    Raises:
        CogtuneError: nothing says which model, or something cannot be read.
    """
    problems = Problems()
    given = _given(request, problems)
    problems.refuse()
    model = _model(request, given)
    assert model is not None  # all LoRAs were read
    return model


def _given(request: InferRequest, problems: Problems) -> Given:
    loras: list[tuple[Lora, float]] = []
    for text in request.loras:
        with problems.gathered():
            name, weight = file_and_weight(text)
            loras.append((read_lora(lora_at(name)), weight))
    return Given(
        prompts_asked(request.prompts, problems),
        files_asked("--image", request.images, problems),
        files_asked("--video", request.videos, problems),
        loras,
    )


def _filled(request: InferRequest, given: Given, model: Model, problems: Problems) -> SamplingConfig:
    """Return the request with what run and model know; its base has configs but maybe no weights yet."""
    spec, facts = model.spec, model.facts
    prompts = _with_token(given.prompts, request, [lora.facts for lora, _ in given.loras] or [facts])
    if not request.prompts:
        prompts = [facts["prompt"]] if facts.get("prompt") is not None else []
        problems.lines[:0] = [] if prompts else ["--prompt is required"]
    size, views, fps = frames_of(request, spec, facts, given.clips, problems)
    precision = request.precision or facts.get("precision") or spec.variant.trained_in
    problems.lines += [f"--size {size}: {problem}" for problem in spec.size_problems(size)]
    problems.lines += [f"--precision {problem}" for problem in spec.precision_problems(precision)]
    problems.lines += [f"--steps {problem}" for problem in spec.steps_problems(request.steps)]
    _check_inputs(request, spec, given, size, problems)
    rows = rows_of(prompts, given.images, given.clips, problems)
    output_problems(request, problems, len(rows) * request.num_videos * max(1, len(request.lora_scales)))
    loras: list[tuple[Lora, float]] = []
    for lora, weight in given.loras:
        with problems.gathered():
            loras.append((check_fits(lora, spec, str(request.model or model.name)), weight))
    recipe = SamplingConfig(
        name=model.name,
        base=model.configs,
        transformer=model.transformer,
        loras=tuple(loras),
        spec=spec,
        rows=tuple(rows),
        negative_prompt=request.negative_prompt,
        size=size,
        views=views,
        fps=fps,
        precision=precision,
        base_precision=request.base_precision,
        text_encoder_precision=request.text_encoder_precision,
        scheduler=request.scheduler or spec.sampled_with,
        steps=request.steps,
        guidance=request.guidance,
        strength=STRENGTH if request.strength is None else request.strength,
        seeds=range(request.seed, request.seed + request.num_videos),
        scales=request.lora_scales or (1.0,),
        arrangement=SamplingArrangement(),
        room=None,
    )
    if not problems.lines:
        with problems.gathered():
            return arranged(recipe, request.vram)
    return recipe


def _model(request: InferRequest, given: Given) -> Model | None:
    """Return the base model and the run's facts; None if a LoRA that may name it could not be read.

    Raises:
        UsageError: nothing says which model, or it has to be merged first.
        CogtuneError: it cannot be read.
    """
    loras = [lora for lora, _ in given.loras]
    facts: Mapping[str, Any] = next((lora.facts for lora in loras if lora.facts), {})
    transformer, name = None, request.model
    if name is not None and (trained := _trained_transformer(Path(name))) is not None:
        transformer, facts = trained
        name = None
    elif name is not None and (Path(name) / MERGE_NAME).is_file():
        facts = {**_facts_of_merge(Path(name) / MERGE_NAME), "model_path": name, "base_model": name}
    elif name is not None:
        refuse_shards(Path(name))
    name = name or facts.get("base_model")
    if name is None:
        if len(loras) < len(request.loras):
            return None
        fitting = fitting_models(loras[0]) if loras else []
        others = f"; its layers match {', '.join(fitting)}" if fitting else ""
        raise UsageError(
            "no base model: --model is missing and the LoRA file does not name one",
            f"pass --model with the model the LoRA was trained on, such as --model 5b{others}",
        )
    here = facts.get("base_model") == name and Path(facts.get("model_path", "/nowhere")).is_dir()
    folder = str(facts["model_path"]) if here else name
    configs = locate(folder, weights=False)
    if transformer is None and not Path(folder).is_dir() and not (configs / "model_index.json").is_file():
        transformer, facts = _pushed_transformer(folder)
        name = folder = str(facts["base_model"])
        configs = locate(folder, weights=False)
    return Model(name, folder, transformer, facts, configs, read_spec(configs))


def _pushed_transformer(repo_id: str) -> tuple[Path, Mapping[str, Any]]:
    """Fetch a fully trained transformer from the Hub, as `cogtune push` puts it there, with the run's facts.

    Raises:
        CogtuneError: it cannot be fetched.
        UsageError: it is something else.
    """
    folder = snapshot(repo_id, "model", patterns=[RUN_NAME, "transformer/*"], otherwise="check the network")
    found = _trained_transformer(folder)
    if found is None or found[1].get("base_model") is None:
        raise UsageError(
            f"{repo_id} on the Hub is neither a complete model nor a transformer that cogtune trained",
            "pass a LoRA as --lora",
        )
    return found


def _trained_transformer(folder: Path) -> tuple[Path, Mapping[str, Any]] | None:
    """Find the fully trained transformer of a run, a checkpoint or a pushed run, with the run's facts."""
    if folder.name == AVERAGE_NAME and (folder / "transformer").is_dir() and (folder.parent / STATE_NAME).is_file():
        return folder / "transformer", checked_facts(read_state(folder.parent), folder.parent / STATE_NAME)
    for candidate in (folder, *reversed(checkpoints(folder))):
        if not (candidate / "transformer").is_dir():
            continue
        if (candidate / STATE_NAME).is_file():
            return candidate / "transformer", checked_facts(read_state(candidate), candidate / STATE_NAME)
        if (candidate / RUN_NAME).is_file() and not (candidate / "model_index.json").is_file():
            values = read_mapping(candidate / RUN_NAME)
            said = {key: values[key] for key in ("size", "fps", "precision", "id_token") if values.get(key) is not None}
            facts = {**said, "base_model": values.get("model")}
            return candidate / "transformer", checked_facts(facts, candidate / RUN_NAME)
    return None


def _facts_of_merge(path: Path) -> Mapping[str, Any]:
    """Return what the record of a merge says of the run.

    Raises:
        CogtuneError: it is damaged.
    """
    record = read_as(path, _MergeRecord)
    return checked_facts(record.run or {}, path)


class _MergeRecord(Schema):
    """The record of a merge, so far as sampling goes by it."""

    run: dict[str, Any] | None = None


def _with_token(prompts: list[str], request: InferRequest, facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the prompts with the run's id token in front, unless they contain it."""
    tokens = [str(one.get("id_token") or "") for one in facts] if request.id_token is None else [request.id_token]
    for token in reversed(list(dict.fromkeys(token for token in tokens if token))):
        lacking = [prompt for prompt in prompts if prompt and token.lower() not in prompt.lower()]
        if lacking and request.id_token is None:
            console.note(f"adding the run's id token '{token}' to the prompt; --id-token '' leaves it out")
        prompts = [f"{token} {prompt}" if prompt in lacking else prompt for prompt in prompts]
    return prompts


def _check_inputs(request: InferRequest, spec: ModelSpec, given: Given, size: Size, problems: Problems) -> None:
    """Add what is wrong with the images and clips for this model."""
    if spec.image_to_video and not request.images and not request.videos:
        problems.lines.append("--image is required for an image-to-video model")
    if request.images and not spec.image_to_video:
        problems.lines.append("--image is not supported by a text-to-video model")
    elif spec.image_to_video:
        for image in given.images:
            with problems.gathered():
                load_image(image, size)
    strength = STRENGTH if request.strength is None else request.strength
    if given.clips and 0 < strength <= 1 and steps_taken(request.steps, strength) < 1:
        problems.lines.append(f"--strength {strength:g} leaves none of {request.steps} steps; use more --steps")


def arranged(recipe: SamplingConfig, vram: str | None) -> SamplingConfig:
    """Return the request with what has to be done in less memory.

    Raises:
        UsageError: the budget is not enough.
    """
    if vram is not None:
        budget = parse_bytes(vram)
        arrangement = arrangement_for(recipe.task, budget)
        return replace(recipe, arrangement=arrangement, room=budget - CONTEXT)
    device = best_device()
    free = free_bytes(device)
    if device.type == "cpu":
        tiles = decoding_bytes(recipe.size, recipe.precision, tiles=False) * SURE > free
        return replace(recipe, arrangement=SamplingArrangement(vae_tiles=tiles))
    return replace(recipe, arrangement=plan_sampling(recipe.task, free + CONTEXT)[0])
