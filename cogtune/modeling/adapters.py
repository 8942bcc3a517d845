"""LoRA adapters: adding them, and saving them in the diffusers format with everything needed to apply them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from cogtune.run.checkpoints import FACTS, lora_facts
from cogtune.system.errors import CogtuneError
from cogtune.system.files import write_atomic

_PREFIX = "transformer."


def add_lora(
    transformer: CogVideoXTransformer3DModel,
    *,
    rank: int,
    alpha: float,
    target_modules: Sequence[str],
    seed: int,
    dropout: float = 0.0,
    dora: bool = False,
    rslora: bool = False,
) -> None:
    """Freeze ``transformer`` and put a trainable fp32 adapter on every layer whose name ends in a target.

    Args:
        dropout: dropout probability on the adapter's inputs in training mode.
        dora: learn a magnitude for each output (Liu et al. 2024, "DoRA").
        rslora: scale by alpha / sqrt(rank) (Kalajdzievski 2023, "A Rank Stabilization Scaling Factor").
    """
    transformer.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer.add_adapter(
            LoraConfig(
                r=rank,
                lora_alpha=alpha,
                init_lora_weights=True,
                target_modules=list(target_modules),
                lora_dropout=dropout,
                use_dora=dora,
                use_rslora=rslora,
            )
        )
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def register_dora_with_deepspeed(transformer: CogVideoXTransformer3DModel) -> None:
    """Make ZeRO-3 gather the base weights that DoRA layers read, also when activations are recomputed.

    DeepSpeed detects such reads by itself only in a forward pass, and only for weights that were partitioned then.
    """
    import deepspeed

    for module in transformer.modules():
        if isinstance(module, LoraLayer):
            for adapter, dora in module.lora_magnitude_vector.items():
                for layer in (module.get_base_layer(), module.lora_A[adapter], module.lora_B[adapter]):
                    for parameter in layer.parameters(recurse=False):
                        deepspeed.zero.register_external_parameter(dora, parameter)


def lora_state(
    transformer: CogVideoXTransformer3DModel, state: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the adapter's weights by diffusers name, on the CPU.

    Args:
        state: the trainable weights by parameter name, if the module holds only parts of them (ZeRO-3).
    """
    weights = get_peft_model_state_dict(transformer, state_dict=dict(state) if state is not None else None)
    return {f"{_PREFIX}{name}": weight.detach().cpu().contiguous() for name, weight in weights.items()}


def save_lora(
    path: Path,
    transformer: CogVideoXTransformer3DModel,
    facts: Mapping[str, Any],
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the adapter atomically as one safetensors file.

    The header carries the adapter's configuration where diffusers looks for it, so that ``load_lora_weights`` applies
    the right alpha, and ``facts`` about the run under the key ``cogtune``.

    Raises:
        CogtuneError: a weight is empty (not gathered from its ranks), or the file cannot be written.
    """
    weights = lora_state(transformer, state)
    empty = [name for name, weight in weights.items() if weight.numel() == 0]
    if empty or not weights:
        raise CogtuneError("the adapter's weights are empty; they were not gathered from all ranks", details=empty)
    config = transformer.peft_config["default"].to_dict()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    config["lora_dropout"] = 0.0  # diffusers leaves a loaded adapter in training mode: it would drop while sampling
    adapter = json.dumps({f"{_PREFIX}{key}": value for key, value in config.items()}, default=str)
    metadata = {"format": "pt", LORA_ADAPTER_METADATA_KEY: adapter, FACTS: lora_facts(facts, adapter)}
    write_atomic(path, lambda aside: aside.write_bytes(save(weights, metadata)))


def load_lora(path: Path, transformer: CogVideoXTransformer3DModel) -> None:
    """Load saved weights into the adapter that ``transformer`` already has.

    Raises:
        CogtuneError: the file is damaged or belongs to another adapter.
    """
    try:
        weights = {name.removeprefix(_PREFIX): weight for name, weight in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise CogtuneError(f"cannot read {path}: {error}", "resume from an earlier checkpoint") from error
    expected = {name.removeprefix(_PREFIX): weight.shape for name, weight in lora_state(transformer).items()}
    found = {name: weight.shape for name, weight in weights.items()}
    if found != expected:
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise CogtuneError(
            f"{path} does not match the run's adapter",
            "use the --rank and --target-modules it was trained with",
            details=[f"{name}: {found.get(name)} in the file, {expected.get(name)} here" for name in wrong[:5]],
        )
    set_peft_model_state_dict(transformer, weights)
