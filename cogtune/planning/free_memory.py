"""The budgets of a run that sets none: what is free of this machine's GPUs, and of its host memory."""

from __future__ import annotations

from dataclasses import replace

from cogtune.config.resolving import FREE_MEMORY, Resolved
from cogtune.models.checkpoint_configs import ModelSpec
from cogtune.planning.estimate import GIB, estimate, plan_arrangement
from cogtune.planning.fit import GB, Hardware
from cogtune.planning.host_memory import free_host_memory
from cogtune.system import console


def with_free_memory(resolved: Resolved, spec: ModelSpec, machine: Hardware) -> Resolved:
    """Limit a LoRA run, or one under ``stream``, to the memory that is free, as far as it sets no limits of its own.

    ``vram`` is set unless the run is arranged by hand, and if the budget of its preset is not free; ``host_memory`` for
    every LoRA run with the engine (see :mod:`.host_memory` for the others). A run that does not fit into what is free
    is returned unchanged, to be refused or warned about as it is.
    """
    config = resolved.config
    may_have_engine = config.sharding.streams or (config.type == "lora" and config.strategy == "ddp")
    if not machine.cards or not may_have_engine:
        return resolved
    if config.vram_bytes is None and (config.is_arranged_by_hand or config.vram is not None):
        return resolved  # or without the engine
    gpu, free = machine.cards[0].name, min(card.free for card in machine.cards)
    if config.vram_bytes is not None and not _may_lower(resolved, spec, gpu, free):
        return _with_host_memory(resolved, spec, gpu)
    budget = int(10 * free / GB) / 10
    lower = _with_host_memory(_limited(resolved, "vram", f"{budget:g}GB"), spec, gpu) if budget else resolved
    if not budget or not plan_arrangement(lower.config, spec, gpu=gpu)[1]:
        return resolved
    if config.vram_bytes is not None:
        console.note(f"--vram {lower.config.vram} in place of {config.vram}: no more of the GPU is free")
    return lower


def _may_lower(resolved: Resolved, spec: ModelSpec, gpu: str, free: int) -> bool:
    """Return whether the budget is a preset's, and what is planned for it is not free."""
    is_of_preset = resolved.provenance["vram"].startswith("preset ")
    return is_of_preset and estimate(resolved.config, spec, gpu=gpu).memory.card > free


def _with_host_memory(resolved: Resolved, spec: ModelSpec, gpu: str) -> Resolved:
    """Limit the host memory of a LoRA run to what is free, unless it is limited or that is too little."""
    if resolved.config.host_memory is not None or resolved.config.sharding.streams:
        return resolved
    free = int(10 * free_host_memory() / GIB) / 10
    limited = _limited(resolved, "host_memory", f"{free:g}GiB")
    return limited if estimate(limited.config, spec, gpu=gpu).host <= free * GIB else resolved


def _limited(resolved: Resolved, key: str, value: str) -> Resolved:
    config = resolved.config.model_copy(update={key: value})
    return replace(resolved, config=config, provenance={**resolved.provenance, key: FREE_MEMORY})
