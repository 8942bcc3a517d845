"""Adding a LoRA to a model, and verifying the result."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from cogtune.modeling.lora_files.reading import Lora, Pair
from cogtune.system.errors import CogtuneError

_PREFIX = "transformer."


def peft_config(lora: Lora) -> dict[str, Any]:
    """Return PEFT's ``LoraConfig`` of a LoRA, exact for every layer."""
    rank, alpha = lora.ranks[0], lora.alphas[0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_only(name): pair.rank for name, pair in lora.pairs.items() if pair.rank != rank},
        "alpha_pattern": {_only(name): lora.alpha_of(name) for name in lora.pairs if lora.alpha_of(name) != alpha},
        "target_modules": sorted(lora.pairs),
        "use_dora": lora.dora,
        "use_rslora": lora.rslora,
    }


def _only(name: str) -> str:
    return f"^{re.escape(name)}"  # a pattern, which without the anchor matches names that end so too


def weights(lora: Lora) -> dict[str, Tensor]:
    """Return the tensors by diffusers name."""
    found = {}
    for name, pair in lora.pairs.items():
        found[f"{_PREFIX}{name}.lora_A.weight"] = pair.down
        found[f"{_PREFIX}{name}.lora_B.weight"] = pair.up
        if pair.magnitude is not None:
            found[f"{_PREFIX}{name}.lora_magnitude_vector"] = pair.magnitude
    return found


def add_to(transformer: CogVideoXTransformer3DModel, lora: Lora, *, adapter: str = "lora", scale: float = 1.0) -> None:
    """Add a LoRA whose shapes fit to a transformer.

    Args:
        scale: the strength is multiplied by it.

    Raises:
        CogtuneError: the model's adapter differs from the file afterwards.
    """
    add_all(transformer, {adapter: (lora, scale)})


def add_all(transformer: CogVideoXTransformer3DModel, loras: Mapping[str, tuple[Lora, float]]) -> None:
    """Add several LoRAs to a transformer.

    Args:
        loras: by the name of their adapters, each with what its strength is multiplied by.

    Raises:
        CogtuneError: what sits in the model afterwards is not what is in the files.
    """
    for adapter, (lora, _) in loras.items():
        config = {f"{_PREFIX}{key}": value for key, value in peft_config(lora).items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second LoRA is what is asked for
            transformer.load_lora_adapter(weights(lora), adapter_name=adapter, metadata=config)
    scale_all(transformer, {adapter: scale for adapter, (_, scale) in loras.items()})
    for adapter, (lora, scale) in loras.items():
        check_applied(transformer, lora, adapter=adapter, scale=scale)


def scale_all(transformer: CogVideoXTransformer3DModel, scales: Mapping[str, float]) -> None:
    """Set what the strengths of a transformer's adapters are multiplied by; adapters not named are off.

    Without any, the model is its base: also for DoRA, whose magnitudes act at a strength of 0, too.
    """
    if not scales:
        transformer.disable_adapters()
        return
    transformer.enable_adapters()
    transformer.set_adapters(list(scales), list(scales.values()))


def start_from(transformer: CogVideoXTransformer3DModel, lora: Lora, *, adapter: str = "default") -> None:
    """Copy a LoRA's weights into the trainable adapter that ``transformer`` already has.

    Raises:
        CogtuneError: the adapter's layers, rank, kind or strength differ from the LoRA's.
    """
    for name, module in _adapted(transformer, adapter).items():
        if (pair := lora.pairs.get(name)) is None or module.lora_A[adapter].weight.shape != pair.down.shape:
            continue  # told below
        for parameter, value in _parts(module, adapter, pair):
            parameter.data.copy_(value)
    check_applied(transformer, lora, adapter=adapter)


def check_applied(
    transformer: CogVideoXTransformer3DModel, lora: Lora, *, adapter: str = "lora", scale: float = 1.0
) -> None:
    """Check that the model has the LoRA's values and strength on its layers and on no others.

    Raises:
        CogtuneError: with the layers that differ.
    """
    sitting = _adapted(transformer, adapter)
    wrong = [f"{name}: only in the file" for name in lora.pairs.keys() - sitting.keys()]
    wrong += [f"{name}: only in the model" for name in sitting.keys() - lora.pairs.keys()]
    for name in lora.pairs.keys() & sitting.keys():
        pair, module = lora.pairs[name], sitting[name]
        wanted = lora.scale_of(name) * scale
        if not math.isclose(module.scaling[adapter], wanted, rel_tol=1e-6, abs_tol=1e-12):
            wrong.append(f"{name}: strength {module.scaling[adapter]:g} in the model, {wanted:g} in the file")
        elif module.disable_adapters or adapter not in module.active_adapters:
            wrong.append(f"{name}: not active")
        elif (adapter in module.lora_magnitude_vector) != (pair.magnitude is not None):
            wrong.append(f"{name}: DoRA in only one of the two")
        else:
            for parameter, value in _parts(module, adapter, pair):
                if parameter.shape != value.shape or not torch.equal(parameter, value.to(parameter)):
                    wrong.append(f"{name}: different values in the model")
                    break
    if wrong:
        raise CogtuneError(
            f"{lora.path} was not applied correctly: {len(wrong)} of {len(lora.pairs)} layers differ",
            "report this with your versions of diffusers and peft",
            details=sorted(wrong)[:5],
        )


def _adapted(transformer: CogVideoXTransformer3DModel, adapter: str) -> dict[str, Any]:
    """Return the layers that have an adapter of that name."""
    return {
        name: module
        for name, module in transformer.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.lora_A
    }


def _parts(module: Any, adapter: str, pair: Pair) -> list[tuple[torch.nn.Parameter, Tensor]]:
    """Return the model's parameters beside the file's values for them."""
    found = [(module.lora_A[adapter].weight, pair.down), (module.lora_B[adapter].weight, pair.up)]
    if pair.magnitude is not None and adapter in module.lora_magnitude_vector:
        magnitude = module.lora_magnitude_vector[adapter].weight
        found.append((magnitude, pair.magnitude.reshape(magnitude.shape)))
    return found
