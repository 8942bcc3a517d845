"""The budgets of a run that sets none: what is free of this machine's GPUs, and of its host memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from cogtune.config.groups.training import VRAM_OFF
from cogtune.config.resolving import Resolved, is_of_preset
from cogtune.models.checkpoint_configs import ModelSpec
from cogtune.planning.estimate import GIB, estimate, plan_arrangement
from cogtune.planning.fit import GB, Hardware
from cogtune.planning.host_memory import free_host_memory
from cogtune.system import console

FREE_MEMORY = "what is free"
"""The source of a limit on memory that nobody set."""


def with_free_memory(
    resolved: Resolved, spec: ModelSpec, machine: Hardware, tell: Callable[[str], object] = console.note
) -> Resolved:
    """Limit a LoRA run, or one under ``stream``, to the memory that is free, as far as it sets no limits of its own.

    ``vram`` is set unless the run is arranged by hand, and if the budget of its preset is not free or too little;
    ``host_memory`` for every LoRA run with the engine (see :mod:`.host_memory` for the others). A run that does not fit
    into what is free is returned unchanged, to be refused or warned about as it is; so is one of several machines,
    whose processes have to be arranged alike. DoRA, which the engine cannot compile, goes without it if it fits.

    Args:
        tell: called with a remark if a preset's budget gives way.
    """
    config = resolved.config
    cards = machine.cards[: config.local_processes]
    if not cards or not config.may_use_engine or config.num_machines > 1:
        return resolved
    if config.vram_bytes is None and (config.is_arranged_by_hand or config.vram is not None):
        return resolved  # or without the engine
    gpu, free = cards[0].name, min(card.free for card in cards)
    may_change = config.vram is None or is_of_preset(resolved.provenance["vram"], config.vram)
    if config.dora and may_change and config.base_precision is None and config.attention is None:
        plain = config.model_copy(update={"vram": VRAM_OFF})
        if config.compile or estimate(plain, spec).memory.card <= free:
            return resolved if config.vram is None else _limited(resolved, "vram", VRAM_OFF)
    if config.vram_bytes is not None and not _gives_way(resolved, spec, gpu, free):
        return _with_host_memory(resolved, spec, gpu)
    budget = int(10 * free / GB) / 10
    limited = _limited(resolved, "vram", f"{budget:g}GB") if budget else resolved
    if not budget or not plan_arrangement(limited.config, spec, gpu=gpu)[1]:
        return resolved
    if config.vram_bytes is not None:
        tell(f"--vram {limited.config.vram}, which is what is free of the GPU, in place of the preset's {config.vram}")
    return _with_host_memory(limited, spec, gpu)


def _gives_way(resolved: Resolved, spec: ModelSpec, gpu: str, free: int) -> bool:
    """Return whether the budget is a preset's, and is too little, or more is planned for it than is free."""
    if not is_of_preset(resolved.provenance["vram"], resolved.config.vram):
        return False
    fits = plan_arrangement(resolved.config, spec, gpu=gpu)[1]
    return not fits or estimate(resolved.config, spec, gpu=gpu).memory.card > free


def _with_host_memory(resolved: Resolved, spec: ModelSpec, gpu: str) -> Resolved:
    """Limit the host memory of a LoRA run to what is free, or to the least that it needs, unless it is limited."""
    if resolved.config.host_memory is not None or resolved.config.sharding.streams:
        return resolved
    free = int(10 * free_host_memory() / GIB) / 10
    limited = _limited(resolved, "host_memory", f"{max(free, 0.1):g}GiB")
    least = math.ceil(10 * estimate(limited.config, spec, gpu=gpu).host / GIB) / 10
    return limited if least <= free else _limited(resolved, "host_memory", f"{least:g}GiB")


def _limited(resolved: Resolved, key: str, value: str) -> Resolved:
    """Set a limit for this start; ``run.yaml`` keeps what it replaces."""
    before = (getattr(resolved.config, key), resolved.provenance[key])
    return replace(
        resolved,
        config=resolved.config.model_copy(update={key: value}),
        provenance={**resolved.provenance, key: FREE_MEMORY},
        momentary={key: before, **resolved.momentary},
    )
