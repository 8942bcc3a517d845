"""Memory that strategy ``stream`` takes, from the formats of the optimizer's state."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cogtune.config.run_config import RunConfig
from cogtune.config.stream import state_bytes
from cogtune.planning.arrangements import Workload

_PLACES = 2
"""Parts whose state and gradients are on the GPU at once."""
_TEMPORARIES = 3.0
"""Copies in fp32 of the largest matrix while it is updated."""


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """The sizes of a transformer's parts, in numbers."""

    block: int
    rest: int
    """Outside of all blocks."""
    largest: int
    """In one matrix."""


def state_of_each(config: RunConfig) -> float:
    """Return the bytes of the optimizer's state per weight; formats that are not set count as fp32."""
    return state_bytes(
        config.master_weights or "fp32",
        config.moments or "fp32",
        weights=_weight_bytes(config),
        averages=config.ema is not None,
    )


def _weight_bytes(config: RunConfig) -> int:
    return 4 if config.precision == "fp32" else 2


def _gradient_bytes(config: RunConfig) -> int:
    """Return the bytes of a gradient on the host; accumulated and reduced ones are in fp32."""
    several = config.gradient_accumulation_steps > 1 or config.num_processes > 1
    return 4 if several else _weight_bytes(config)


def trained_weights(work: Workload, config: RunConfig, numbers: Numbers) -> Workload:
    """Return the workload of a step on frozen weights as that of a step that trains all of them."""
    item, each, gradient = _weight_bytes(config), state_of_each(config), _gradient_bytes(config)
    widest, whole = max(numbers.block, numbers.rest), numbers.block * work.blocks + numbers.rest
    shares = config.num_processes
    slots = _PLACES * widest * ((each + gradient) / shares + gradient)
    if shares > 1:
        slots += _PLACES * widest / shares * gradient
    update = whole / shares * each
    return replace(
        work,
        trained=int(slots),
        gradients=(numbers.block + numbers.rest) * item,
        updating=int(_TEMPORARIES * numbers.largest * 4),
        host_state=int(whole / shares * (item + each + gradient)),
        lent=0 if config.gradient_accumulation_steps > 1 else int(numbers.block / shares * gradient),
        update_up=int(update + whole / shares * gradient),
        update_down=int(update + whole / shares * item),
        gradients_down=int(whole / shares * gradient),
    )


def checkpoint_bytes(config: RunConfig, whole: int) -> int:
    """Return the size of a checkpoint on disk: the weights, and the optimizer's state."""
    averages = _weight_bytes(config) if config.ema is not None else 0
    return int(whole * (_weight_bytes(config) + state_of_each(config) + averages))
