"""A LoRA in a checkpoint: the names diffusers gives its weights, and the header that carries its strength."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import SafetensorError, safe_open

from cogtune.merge.fit import bare_name, shape_text, truncated
from cogtune.merge.sources import SavedWeights, Values
from cogtune.models.variants import LORA_WEIGHTS_NAME
from cogtune.run.checkpoints import FACTS, lora_facts
from cogtune.system.errors import CogtuneError

_PREFIX = "transformer."
_NAME = re.compile(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)\.([^.]+)\.(weight|bias)")


def adapter_config(folder: Path, state: Mapping[str, Any], alpha: float | None) -> dict[str, Any]:
    """Return what is known of the LoRA's configuration: as asked, else from the run's own LoRA file, else its state.

    Raises:
        CogtuneError: there is a LoRA file in ``folder`` that cannot be read.
    """
    config: dict[str, Any] = {"lora_alpha": state.get("alpha")}
    if state.get("rslora"):
        config["use_rslora"] = True
    path = folder / LORA_WEIGHTS_NAME
    if path.is_file():
        try:
            with safe_open(path, framework="pt") as file:
                written = json.loads((file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
            if not isinstance(written, dict):
                raise ValueError("its header has no configuration of a LoRA")
        except (OSError, SafetensorError, ValueError, RecursionError) as error:
            raise CogtuneError(
                f"{path} is damaged: {error}", "delete it; the weights are read from the ZeRO files"
            ) from error
        config |= {key.removeprefix(_PREFIX): value for key, value in written.items()}
    return config if alpha is None else config | {"lora_alpha": alpha}


def lora_header(config: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, str]:
    """Return what a LoRA file's header says: peft's configuration as diffusers stores it, and the run's own facts."""
    named = {f"{_PREFIX}{key}": value for key, value in config.items()}
    adapter = json.dumps(named, indent=2, sort_keys=True)
    header = {LORA_ADAPTER_METADATA_KEY: adapter}
    return header | ({FACTS: lora_facts({**state, "alpha": config["lora_alpha"]}, adapter)} if state else {})


def fit_lora(
    zero: SavedWeights, expected: Mapping[str, tuple[int, ...]] | None, config: Mapping[str, Any]
) -> tuple[dict[str, Values], dict[str, Any]]:
    """Return the adapter under diffusers' names, and its configuration: ``config`` filled up with what is left open."""
    sources: dict[str, Values] = {}
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    problems = []
    adapters = set()
    for name, source in zero.trained.items():
        match = _NAME.fullmatch(bare_name(name))
        if match is None:
            problems.append(f"{name} was trained as well as the LoRA, but a LoRA file cannot contain it")
            continue
        module, part, adapter, suffix = match.groups()
        adapters.add(adapter)
        key = f"{module}.{part}" if part == "lora_magnitude_vector" else f"{module}.{part}.{suffix}"
        sources[f"{_PREFIX}{key}"] = source
        if suffix == "weight":
            modules.setdefault(module, {})[part] = source.shape
    if len(adapters) > 1:
        problems.append(f"it contains several adapters: {', '.join(sorted(adapters))}")
    for module, shapes in modules.items():
        down, up = shapes.get("lora_A"), shapes.get("lora_B")
        if down is None or up is None:
            problems.append(f"{module} lacks its {'lora_A' if down is None else 'lora_B'}")
            continue
        if down[0] != up[1]:
            problems.append(f"{module} has rank {down[0]} in lora_A and {up[1]} in lora_B")
        if expected is not None:
            weight = expected.get(f"{module}.weight")
            if weight is None:
                problems.append(f"the base model has no {module}")
            elif (up[0], *down[1:]) != weight:
                adapted = shape_text((up[0], *down[1:]))
                problems.append(f"{module} adapts a weight of {adapted}, in the base model {shape_text(weight)}")
    if problems:
        raise CogtuneError(
            "the checkpoint's LoRA cannot be merged",
            "check that --model is the model it was trained on",
            details=truncated(problems),
        )
    dora = any("lora_magnitude_vector" in shapes for shapes in modules.values())
    ranks = {module: shapes["lora_A"][0] for module, shapes in modules.items()}
    return sources, _filled_up(config, ranks, dora=dora)


def _filled_up(config: Mapping[str, Any], ranks: Mapping[str, int], *, dora: bool) -> dict[str, Any]:
    """Return peft's LoraConfig of an adapter whose modules have ``ranks``."""
    rank = max(ranks.values())
    alpha = config.get("lora_alpha")
    if alpha is None or type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        raise CogtuneError(
            "the checkpoint does not record its LoRA's alpha, and would load at the wrong strength without",
            f"pass it as --lora-alpha (the rank is {rank})",
        )
    if config.get("r") is not None:
        return dict(config)
    others = {module: own for module, own in ranks.items() if own != rank}
    kind = {"use_dora": True} if dora else {}
    return {"r": rank, "target_modules": sorted(ranks), "rank_pattern": others, **kind, **config}
