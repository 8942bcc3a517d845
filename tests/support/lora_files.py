"""LoRA files as other programs write them, and what a model does with them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from cogtune.modeling.lora_files import (
    Lora,
    add_to,
)
from tests.support.adapters import answer

RANK, ALPHA = 4, 3.0

TARGETS = ["to_q", "to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear", "patch_embed.proj", "proj_out"]
"""Attention and what else a LoRA may sit on, a convolution among it."""

Tensors = dict[str, torch.Tensor]


def moved(transformer: Any) -> Any:
    """The same with every adapter's weight moved from its start."""
    random = torch.Generator().manual_seed(3)
    for name, parameter in transformer.named_parameters():
        if "lora_" in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=random)
    return transformer


def base(folder: Path, *, dtype: torch.dtype = torch.float32) -> CogVideoXTransformer3DModel:
    return CogVideoXTransformer3DModel.from_pretrained(folder / "transformer", dtype=dtype).eval()


def bare(transformer: CogVideoXTransformer3DModel) -> Tensors:
    """The adapter's tensors, as PEFT gives them: ``LAYER.lora_A.weight`` and ``LAYER.lora_B.weight``."""
    return {name: value.detach().clone() for name, value in get_peft_model_state_dict(transformer).items()}


def renamed(tensors: Tensors, rename: Callable[[str, str], str], *, alpha: float | None = None) -> Tensors:
    """The tensors by ``rename(layer, part)``, part being down, up or alpha."""
    found = {}
    for name, value in tensors.items():
        layer, matrix = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name).groups()  # type: ignore[union-attr]
        found[rename(layer, {"A": "down", "B": "up"}[matrix])] = value.contiguous()
        if alpha is not None:
            found[rename(layer, "alpha")] = torch.tensor(alpha)
    return found


def kohya(prefix: str) -> Callable[[str, str], str]:
    ends = {"down": "lora_down.weight", "up": "lora_up.weight", "alpha": "alpha"}
    return lambda layer, part: f"{prefix}{layer.replace('.', '_')}.{ends[part]}"


def dotted(prefix: str, middle: str = "") -> Callable[[str, str], str]:
    ends = {"down": f"lora_A.{middle}weight", "up": f"lora_B.{middle}weight", "alpha": "alpha"}
    return lambda layer, part: f"{prefix}{layer}.{ends[part]}"


DIFFSYNTH = {
    "transformer_blocks.": "blocks.",
    "attn1.to_out.0": "attn1.to_out",
    "ff.net.0.proj": "ff.0",
    "ff.net.2": "ff.2",
    "patch_embed.proj": "patchify.proj",
}


def diffsynth(layer: str, part: str) -> str:
    for ours, theirs in DIFFSYNTH.items():
        layer = layer.replace(ours, theirs)
    return dotted("", "default.")(layer, part)


def by_diffusers(folder: Path, transformer: CogVideoXTransformer3DModel, **more: Any) -> Path:
    CogVideoXPipeline.save_lora_weights(folder, transformer_lora_layers=bare(transformer), **more)
    return folder


def with_its_metadata(folder: Path, transformer: CogVideoXTransformer3DModel) -> Path:
    config = transformer.peft_config["default"].to_dict()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    return by_diffusers(folder, transformer, transformer_lora_adapter_metadata=config)


def by_finetrainers(folder: Path, transformer: CogVideoXTransformer3DModel) -> Path:
    told = {"r": RANK, "lora_alpha": ALPHA, "init_lora_weights": True, "target_modules": TARGETS}
    return written(
        folder, renamed(bare(transformer), dotted("transformer.")), {"lora_config": json.dumps(told, indent=4)}
    )


def by_peft(folder: Path, tiny: Path, *, safe: bool = True) -> Path:
    """An adapter's folder; its weights are those of ``ours``, since both are moved from one start."""
    config = LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=TARGETS)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = moved(get_peft_model(base(tiny), config))
    model.save_pretrained(folder, safe_serialization=safe)
    return folder


def written(folder: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "lora.safetensors", metadata)
    return folder / "lora.safetensors"


def torch_saved(folder: Path, value: Any, name: str = "lora.pt") -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(value, folder / name)
    return folder / name


Writer = Callable[[Path, CogVideoXTransformer3DModel], Path]


def effect(lora: Lora, model: Path, **more: Any) -> torch.Tensor:
    """What a model with the LoRA answers."""
    transformer = base(model)
    add_to(transformer, lora, **more)
    return answer(transformer.eval())
