"""A LoRA written in the format of any program, so that reading it gives the same matrices at the same strength."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors.torch import save
from torch import Tensor

from cogtune.modeling.lora_files.applying import peft_config
from cogtune.modeling.lora_files.lora_file import WITHOUT_ALPHA
from cogtune.modeling.lora_files.reading import Lora, Pair
from cogtune.models.lora_formats import LORA_FORMATS, LoraFormat, LoraFormatName
from cogtune.run.checkpoints import FACTS, lora_facts
from cogtune.run.lora_paths import ADAPTER_CONFIG
from cogtune.system.errors import CogtuneError
from cogtune.system.files import os_errors_explained, write_atomic
from cogtune.system.folders import remove_leftovers, written_folder
from cogtune.system.json_files import CHECKSUM, write_json

_CONVOLUTION = "patch_embed.proj"
"""The one layer that may be a convolution."""

_LAST_BITS = 1e-15
"""Relative difference of two numbers that are as near as their format allows."""

_OF_FORMAT = ("format", FACTS, LORA_ADAPTER_METADATA_KEY, "lora_config", "ss_network_alpha", WITHOUT_ALPHA)
"""Keys of a header that say what another format says elsewhere."""


def in_format(lora: Lora, lora_format: LoraFormatName) -> tuple[dict[str, Tensor], list[str]]:
    """Return a LoRA's tensors by the names of ``lora_format``, and a description of what became of its strength."""
    kind, tensors, told = LORA_FORMATS[lora_format], {}, set()
    for name, pair in lora.pairs.items():
        pair = _shaped(name, pair, kind)
        up, alpha = pair.up, pair.alpha
        if kind.alpha == "nowhere" and lora.scale_of(name) != 1:
            up = (up.double() * lora.scale_of(name)).to(max(up.dtype, torch.float32, key=lambda dtype: dtype.itemsize))
            told.add("B is multiplied by the strength, alpha / rank, since this format has no place for alpha")
        tensors[kind.key(name, "down")] = pair.down.contiguous()
        tensors[kind.key(name, "up")] = up.contiguous()
        if pair.magnitude is not None:
            tensors[kind.key(name, "magnitude")] = pair.magnitude.contiguous()
        if kind.alpha == "tensors" and (alpha is not None or lora.rslora):
            if lora.rslora:
                told.add("alpha is multiplied by the root of the rank, since this format knows no rank-stabilised LoRA")
            tensors[kind.key(name, "alpha")] = _number(_alpha_for(lora.scale_of(name), pair.rank, alpha, lora.rslora))
    return tensors, sorted(told)


def write_lora(
    lora: Lora, path: Path, lora_format: LoraFormatName, *, warn: Callable[[str], object] | None = None
) -> list[str]:
    """Write a LoRA to ``path``, atomically: a file, or for PEFT an adapter's folder.

    Args:
        warn: told what is left of a folder that was replaced, if that cannot be deleted.

    Returns:
        Remarks on what the format cannot say.

    Raises:
        CogtuneError: it cannot be written, or not in that format.
    """
    if lora.dora and LORA_FORMATS[lora_format].alpha == "nowhere":
        raise CogtuneError(
            f"{lora.path} is a DoRA, which the {lora_format} format does not support", "choose another --to"
        )
    tensors, told = in_format(lora, lora_format)
    if large := [name for name, tensor in tensors.items() if not bool(tensor.float().isfinite().all())]:
        raise CogtuneError(
            f"{len(large)} tensors have values too large for their number format: {large[0]}",
            "use --dtype fp32 or bf16",
        )
    header = {"format": "pt", **{key: value for key, value in lora.header.items() if key not in _OF_FORMAT}}
    config = peft_config(lora)
    where = LORA_FORMATS[lora_format].alpha
    silent = lora.without_alpha
    adapter = ""
    speaks = where == "folder" or len(silent) < len(lora.pairs) or lora.rslora or lora.dora
    if silent and speaks and where in ("header", "folder"):
        header[WITHOUT_ALPHA] = json.dumps(sorted(silent) if len(silent) < len(lora.pairs) else [])
    if speaks and lora_format == "finetrainers":
        header["lora_config"] = json.dumps({**config, "init_lora_weights": True}, sort_keys=True)
    elif speaks and where == "header":
        prefix = LORA_FORMATS[lora_format].prefix
        adapter = json.dumps({f"{prefix}{key}": value for key, value in config.items()}, sort_keys=True)
        header[LORA_ADAPTER_METADATA_KEY] = adapter
    if lora.facts:
        header[FACTS] = lora_facts({**_own(lora.facts), **_strength(lora)}, adapter)
    if where != "folder":
        remove_leftovers(path.parent, path.name)
        write_atomic(path, lambda aside: aside.write_bytes(save(tensors, header)))
        return told
    with written_folder(path, warn) as folder, os_errors_explained(path):
        (folder / "adapter_model.safetensors").write_bytes(save(tensors, header))
        base = lora.facts.get("base_model")
        settings = {"peft_type": "LORA", "task_type": None, "base_model_name_or_path": base, **config}
        write_json(folder / ADAPTER_CONFIG, settings)
    return told


def _own(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if key not in ("adapter", CHECKSUM)}


def _strength(lora: Lora) -> dict[str, Any]:
    """Return those of a run's facts that changing a LoRA changes."""
    found: dict[str, Any] = {"rank": lora.ranks[0]} if "rank" in lora.facts else {}
    return found | ({"alpha": lora.alphas[0]} if "alpha" in lora.facts else {})


def _shaped(name: str, pair: Pair, lora_format: LoraFormat) -> Pair:
    """Return the pair with the dimensions that a layer has in diffusers, and magnitudes as the format has them."""
    if name != _CONVOLUTION and pair.down.dim() > 2:
        pair = replace(pair, down=pair.down.flatten(1), up=pair.up.flatten(1))
    if pair.magnitude is not None:
        ones = [1] * (pair.down.dim() - 1)
        whole = (-1, *ones) if lora_format.parts.get("magnitude") == "dora_scale" else (1, -1, *ones[1:])
        flat = lora_format.parts.get("magnitude") != "dora_scale" and pair.down.dim() == 2
        pair = replace(pair, magnitude=pair.magnitude.flatten() if flat else pair.magnitude.reshape(whole))
    return pair


def _alpha_for(scale: float, rank: int, alpha: float | None, rslora: bool) -> float:
    """Return the alpha at which alpha / rank is ``scale``, to the last bit where a number of that kind exists."""
    if not rslora and alpha is not None:
        return alpha
    wanted = scale * rank
    near = (wanted, math.nextafter(wanted, math.inf), math.nextafter(wanted, 0.0))
    return next((value for value in near if value / rank == scale), wanted)


def _number(value: float) -> Tensor:
    """Return a number as a tensor: in fp32 where that holds it exactly, as programs write it, else in fp64."""
    single = torch.tensor(value, dtype=torch.float32)
    return single if float(single) == value else torch.tensor(value, dtype=torch.float64)


def differences(lora: Lora, back: Lora, lora_format: LoraFormat) -> list[str]:
    """List how a LoRA read back differs from the one that was written in ``lora_format``."""
    wrong = [f"{name}: only in one of them" for name in lora.pairs.keys() ^ back.pairs.keys()]
    for name in lora.pairs.keys() & back.pairs.keys():
        ours, theirs = _shaped(name, lora.pairs[name], lora_format), _shaped(name, back.pairs[name], lora_format)
        folded = lora_format.alpha == "nowhere" and lora.scale_of(name) != 1
        near = _LAST_BITS if lora.rslora else 0.0  # not every strength is a quotient by the rank
        if not folded and not math.isclose(back.scale_of(name), lora.scale_of(name), rel_tol=near):
            wrong.append(f"{name}: strength {back.scale_of(name)} for {lora.scale_of(name)}")
        pairs = [(ours.down, theirs.down), *([] if folded else [(ours.up, theirs.up)])]
        if ours.magnitude is not None and theirs.magnitude is not None:
            pairs.append((ours.magnitude, theirs.magnitude))
        if (ours.magnitude is None) != (theirs.magnitude is None) or not all(_same(*pair) for pair in pairs):
            wrong.append(f"{name}: other values")
    return sorted(wrong)


def _same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are the same to the bit, type and shape included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    first, second = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return bool(torch.equal(first, second))
