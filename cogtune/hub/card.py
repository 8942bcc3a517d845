"""The model card: the text and metadata of a fine-tuned model's page on the Hub."""

from __future__ import annotations

import contextlib
import html
import json
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from cogtune import __version__
from cogtune.models.checkpoint_configs import read_spec
from cogtune.models.geometry import Size
from cogtune.models.variants import LORA_WEIGHTS_NAME, VARIANTS, Precision, Variant, built_in, published
from cogtune.system.console import printable
from cogtune.system.errors import CogtuneError
from cogtune.system.reading import Schema, read_as

Kind = Literal["lora", "transformer", "pipeline"]
"""What is published: an adapter, the transformer alone, or all components of a pipeline."""

DIFFUSERS_RELEASE = "0.42"
"""The oldest diffusers that the card's code is tested with."""

_UNPUBLISHED = "path/to/the/base/model"

_DTYPES: dict[Precision, str] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class SampleVideo:
    """A video made with the weights: its path in the repository, and its prompt if known."""

    path: str
    prompt: str | None = None


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """Facts about a published model. Unknown ones are None and left out of the card."""

    repo_id: str
    kind: Kind
    variant: Variant
    """The published model with the base's architecture."""
    base_model: str | None
    """The base's Hub id; None for a local or built-in model."""
    size: Size
    fps: float
    precision: Precision
    trigger: str | None = None
    """The trigger word that was put in front of every caption."""
    prompt: str | None = None
    """A caption from the training data."""
    rank: int | None = None
    alpha: float | None = None
    steps: int | None = None
    global_batch: int | None = None
    learning_rate: float | None = None
    seed: int | None = None
    dataset_samples: int | None = None
    dataset_digest: str | None = None
    cogtune_version: str | None = None
    samples: tuple[SampleVideo, ...] = ()
    comparison: str = ""
    """The section about the comparison with the base model, in Markdown."""


def gather_facts(
    repo_id: str,
    kind: Kind,
    weights: Path,
    stamp: Mapping[str, Any],
    config: Mapping[str, Any],
    samples: tuple[SampleVideo, ...] = (),
) -> CardFacts:
    """Collect what is known about the weights and their run.

    Args:
        weights: the LoRA file, or the folder of the transformer or the pipeline.
        stamp: what cogtune saved with the weights (``base_model``, ``variant``, ``step``...); it wins.
        config: the keys of the run's ``run.yaml``; empty when there is none.

    Raises:
        CogtuneError: the CogVideoX model cannot be determined.
    """
    row = _variant(kind, weights, stamp, config)
    lora = kind == "lora"
    dataset = stamp.get("dataset")
    dataset = dataset if isinstance(dataset, dict) else {}
    rank = _first(int, stamp.get("rank"), config.get("rank")) if lora else None
    size = row.native
    with contextlib.suppress(ValueError):
        asked = Size.parse(_first(str, stamp.get("size"), config.get("size")) or "")
        size = asked if max(asked.num_frames, asked.height, asked.width) <= _MOST_SIDE else size
    precision = _first(str, stamp.get("precision"), config.get("precision"))
    counts: list[Any] = [config.get(key) for key in ("batch_size", "gradient_accumulation_steps", "num_processes")]
    return CardFacts(
        repo_id=repo_id,
        kind=kind,
        variant=row,
        base_model=_hub_id(_first(str, stamp.get("base_model"), config.get("model")) or ""),
        size=size,
        fps=_first((int, float), stamp.get("fps"), config.get("fps"), row.fps),
        precision=precision if precision in _DTYPES else row.trained_in,
        trigger=_first(str, stamp.get("id_token"), config.get("id_token")) or None,
        prompt=_first(str, stamp.get("prompt")) or None,
        rank=rank,
        alpha=_first((int, float), stamp.get("alpha"), config.get("alpha"), rank) if lora else None,
        steps=_first(int, stamp.get("step"), None if config.get("epochs") else config.get("steps")),
        global_batch=math.prod(counts) if all(_first(int, count) for count in counts) else None,
        learning_rate=_first((int, float), config.get("learning_rate")),
        seed=_first(int, config.get("seed")),
        dataset_samples=_first(int, dataset.get("samples")),
        dataset_digest=_first(str, dataset.get("digest")),
        cogtune_version=_first(str, stamp.get("version"), __version__),
        samples=samples,
    )


_MOST, _MOST_SIDE = 10**15, 65_536


def _first(kind: Any, *values: Any) -> Any:
    """Return the first of ``values`` that is of ``kind``, or None; numbers must be plausible."""
    return next((value for value in values if isinstance(value, kind) and _is_meant(value)), None)


def _is_meant(value: Any) -> bool:
    return isinstance(value, str) or (not isinstance(value, bool) and abs(value) <= _MOST)


class _Shape(Schema):
    """The keys of a transformer's config that distinguish the five models."""

    in_channels: int
    out_channels: int
    patch_size_t: int | None = None
    use_rotary_positional_embeddings: bool = False


def _variant(kind: Kind, weights: Path, stamp: Mapping[str, Any], config: Mapping[str, Any]) -> Variant:
    if kind == "pipeline":
        return read_spec(weights).variant
    if kind == "transformer":
        shape = read_as(weights / "config.json", _Shape)
        traits = (
            shape.in_channels == 2 * shape.out_channels,
            shape.patch_size_t is not None,
            shape.use_rotary_positional_embeddings,
        )
        for row in VARIANTS.values():
            if (row.image_to_video, row.patch_size_t is not None, row.rotary) == traits:
                return row
    else:
        for name in (stamp.get("variant"), stamp.get("base_model"), config.get("model")):
            named = published(str(name))
            if named is not None:
                return named
    raise CogtuneError(
        f"cannot tell which CogVideoX model {weights} was trained on",
        "push the folder of its run, which contains run.yaml",
    )


_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


def _hub_id(model: str) -> str | None:
    """Return the Hub id of a run's base model; None for a local or built-in model."""
    row = published(model)
    if row is not None:
        return None if built_in(model) is not None else row.hub_id
    parts = re.split(r"[/\\]", model.rstrip("/\\"))
    for part in parts:
        if part.startswith("models--"):  # a folder of the Hub's own cache
            named = part.removeprefix("models--").replace("--", "/")
            return named if _HUB_ID.fullmatch(named) else None
    if _HUB_ID.fullmatch(model) and not Path(model).exists():
        return model
    same = (row.hub_id for row in VARIANTS.values() if row.hub_id.lower().endswith(f"/{parts[-1].lower()}"))
    return next(same, None)


def model_card(facts: CardFacts) -> str:
    """Write the repository's README.md: the metadata block, then Markdown."""
    return f"---\n{_metadata(facts)}\n---\n\n" + "\n\n".join(_sections(facts)) + "\n"


def _metadata(facts: CardFacts) -> str:
    """Write the YAML block. Keys: https://huggingface.co/docs/hub/model-cards#model-card-metadata"""
    from huggingface_hub import ModelCardData

    lora = facts.kind == "lora"
    extra: dict[str, Any] = {}
    if facts.base_model is not None:
        extra["base_model_relation"] = "adapter" if lora else "finetune"
    if facts.trigger:
        extra["instance_prompt"] = _one_line(facts.trigger)
    if facts.samples:
        extra["widget"] = [
            {"text": _seen(sample.prompt or "-"), "output": {"url": sample.path}} for sample in facts.samples
        ]
    named = facts.variant.license == "other"
    data = ModelCardData(
        license=facts.variant.license,
        license_name="cogvideox-license" if named else None,
        license_link=facts.variant.license_link if named else None,
        language="en",
        base_model=facts.base_model,
        library_name="diffusers",
        pipeline_tag="image-to-video" if facts.variant.image_to_video else "text-to-video",
        tags=["cogvideox", "cogtune", *(["lora", "template:sd-lora"] if lora else ["full-finetune"])],
        **extra,
    )
    return data.to_yaml()


def _sections(facts: CardFacts) -> list[str]:
    sections = [f"# {facts.repo_id.split('/')[-1]}", _summary(facts)]
    if facts.samples:
        sections.append("<Gallery />")
    if facts.trigger:
        sections.append(
            f"## Trigger word\n\nStart the prompt with {_code(facts.trigger)}, as all training captions do."
        )
    sections.append(f"## Training\n\n{_table(facts)}")
    if facts.comparison:
        sections.append(f"## Compared with the base model\n\n{facts.comparison}")
    sections.append(f"## Use with cogtune\n\n{_cogtune_use(facts)}")
    sections.append(f"## Use with diffusers\n\n{_diffusers_use(facts)}")
    if facts.samples:
        sections.append("## Sample videos\n\n" + "\n".join(map(_sample, facts.samples)))
    sections.append(f"## Licence\n\n{_licence(facts)}")
    return sections


def _sample(sample: SampleVideo) -> str:
    link = f"[{_plain(sample.path.rsplit('/', 1)[-1])}]({quote(sample.path)})"
    return f"- {link}: {_plain(sample.prompt)}" if sample.prompt else f"- {link}"


def _summary(facts: CardFacts) -> str:
    what = "A LoRA for" if facts.kind == "lora" else "A full fine-tune of"
    makes = "an image and a prompt" if facts.variant.image_to_video else "a prompt"
    return f"{what} {_base(facts)}, trained with cogtune. It makes videos from {makes}."


def _base(facts: CardFacts) -> str:
    if facts.base_model is None:
        return f"an unpublished model with the architecture of {facts.variant.hub_id}"
    return f"[{facts.base_model}](https://huggingface.co/{facts.base_model})"


def _table(facts: CardFacts) -> str:
    kinds = {"lora": "LoRA", "transformer": "whole transformer", "pipeline": "whole pipeline"}
    rows: list[tuple[str, Any]] = [
        ("Base model", _base(facts)),
        ("Weights", kinds[facts.kind]),
        ("Training samples", facts.dataset_samples),
        ("Dataset digest", facts.dataset_digest and _code(facts.dataset_digest)),
        ("Steps", facts.steps),
        ("Samples per step", facts.global_batch),
        ("Frames x height x width", facts.size),
        ("Frames per second", f"{facts.fps:g}"),
        ("Rank", facts.rank),
        ("Alpha", None if facts.alpha is None else f"{facts.alpha:g}"),
        ("Learning rate", None if facts.learning_rate is None else f"{facts.learning_rate:g}"),
        ("Precision", facts.precision),
        ("Seed", facts.seed),
        ("cogtune", facts.cogtune_version and _plain(facts.cogtune_version)),
    ]
    known = [f"| {name} | {value} |" for name, value in rows if value is not None]
    return "\n".join(["| | |", "|---|---|", *known])


_MOST_CHARACTERS = 2000


def _seen(text: str) -> str:
    """Return untrusted text without invisible characters, truncated if it is long."""
    shown = printable(text.strip())
    return shown if len(shown) <= _MOST_CHARACTERS else f"{shown[:_MOST_CHARACTERS]}..."


def _one_line(text: str) -> str:
    return " ".join(_seen(text).split())


_MARKUP = re.compile(r"([\\`*_{}\[\]()#+!|~$:@-])")
"""Characters with a meaning in Markdown, or in what the Hub detects in it: formulas, links, user names."""


def _plain(text: str) -> str:
    """Escape ``text`` for Markdown."""
    return _MARKUP.sub(r"\\\1", html.escape(_one_line(text), quote=False))


def _code(text: str) -> str:
    """Return ``text`` as a code span, whatever it contains."""
    line = _one_line(text).replace("|", "\u00a6")  # a bar would end the cell of a table even in code
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    pad = " " if "`" in line or not line else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def _prompt(facts: CardFacts) -> str:
    known = next((sample.prompt for sample in facts.samples if sample.prompt), None)
    return _seen(known or facts.prompt or f"{facts.trigger or ''} a boat on a calm river at sunset")


def _cogtune_use(facts: CardFacts) -> str:
    if facts.kind == "transformer":
        return (
            "These weights are the transformer only. Download the base model, replace its `transformer` folder with "
            "this repository's, and pass the folder to `cogtune infer --model`."
        )
    folder = facts.repo_id.split("/")[-1]
    words = ["cogtune infer", "--lora" if facts.kind == "lora" else "--model", folder]
    if facts.kind == "lora" and facts.base_model is None:
        words += ["--model", _UNPUBLISHED]
    if facts.variant.image_to_video:
        words += ["--image", "first-frame.png"]
    words += ["--prompt", shlex.quote(_one_line(_prompt(facts))), "--output", "video.mp4"]
    return "\n".join(["```bash", f"hf download {facts.repo_id} --local-dir {folder}", " ".join(words), "```"])


def _diffusers_use(facts: CardFacts) -> str:
    image = facts.variant.image_to_video
    pipeline = "CogVideoXImageToVideoPipeline" if image else "CogVideoXPipeline"
    base = json.dumps(facts.base_model or _UNPUBLISHED)
    repo = json.dumps(facts.repo_id)
    dtype = f"torch.{_DTYPES[facts.precision]}"
    dynamic = facts.variant.snr_shift_scale == 1.0  # as `cogtune infer` samples
    scheduler = "CogVideoXDPMScheduler" if dynamic else "CogVideoXDDIMScheduler"
    classes = sorted([pipeline, scheduler, *(["CogVideoXTransformer3DModel"] if facts.kind == "transformer" else [])])
    helpers = ["export_to_video", *(["load_image"] if image else [])]
    lines = [
        "import torch",
        f"from diffusers import {', '.join(classes)}",
        f"from diffusers.utils import {', '.join(helpers)}",
        "",
    ]
    if facts.kind == "lora":
        lines += [
            f"pipe = {pipeline}.from_pretrained({base}, dtype={dtype})",
            f'pipe.load_lora_weights({repo}, weight_name="{LORA_WEIGHTS_NAME}")',
        ]
    elif facts.kind == "transformer":
        lines += [
            "transformer = CogVideoXTransformer3DModel.from_pretrained(",
            f'    {repo}, subfolder="transformer", dtype={dtype}',
            ")",
            f"pipe = {pipeline}.from_pretrained({base}, transformer=transformer, dtype={dtype})",
        ]
    else:
        lines += [f"pipe = {pipeline}.from_pretrained({repo}, dtype={dtype})"]
    lines += [
        f'pipe.scheduler = {scheduler}.from_config(pipe.scheduler.config, timestep_spacing="trailing")',
        "pipe.enable_model_cpu_offload()",
        "pipe.vae.enable_tiling()",
        "",
        "frames = pipe(",
        f"    prompt={json.dumps(_prompt(facts), ensure_ascii=False)},",
        *(['    image=load_image("first-frame.png"),'] if image else []),
        f"    num_frames={facts.size.num_frames},",
        f"    height={facts.size.height},",
        f"    width={facts.size.width},",
        "    num_inference_steps=50,",
        "    guidance_scale=6.0,",
        f"    use_dynamic_cfg={dynamic},",
        "    generator=torch.Generator().manual_seed(42),",
        ").frames[0]",
        f'export_to_video(frames, "video.mp4", fps={facts.fps:g})',
    ]
    remark = f"With diffusers {DIFFUSERS_RELEASE} or newer:"
    if facts.kind == "lora":
        remark = (
            "The adapter's rank and alpha are in the file's metadata and are applied on loading, so "
            f"no scale needs to be set. {remark}"
        )
    return "\n".join([remark, "", "```python", *lines, "```"])


def _licence(facts: CardFacts) -> str:
    row = facts.variant
    if row.license == "other":
        return (
            f"{row.hub_id} is published under the [CogVideoX licence]({row.license_link}), which also applies to "
            "weights made from it. Read it before you use them, especially commercially."
        )
    return f"`{row.license}`, like {row.hub_id}."
