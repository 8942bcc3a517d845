"""What strategy ``stream`` takes: a training step's sizes, from the formats of the optimizer's state."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cogtune.config.run_config import RunConfig
from cogtune.config.stream import state_bytes
from cogtune.planning.arrangements import Workload

_PLACES = 2
"""Parts whose state and gradients are on the card at once."""
_TEMPORARIES = 3.0
"""Copies in fp32 of the largest matrix while it is updated."""


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """How many numbers the parts of a transformer have."""

    block: int
    rest: int
    """Outside of all blocks."""
    largest: int
    """In one matrix."""


def state_of_each(config: RunConfig) -> float:
    """Bytes of the optimizer's state for each weight; formats that are left open count as exact."""
    return state_bytes(
        config.master_weights or "fp32",
        config.moments or "fp32",
        weights=_weight_bytes(config),
        averages=config.ema is not None,
    )


def _weight_bytes(config: RunConfig) -> int:
    return 4 if config.precision == "fp32" else 2


def _gradient_bytes(config: RunConfig) -> int:
    """Of each number on the host: gradients that are added up are so in fp32."""
    several = config.gradient_accumulation_steps > 1 or config.num_processes > 1
    return 4 if several else _weight_bytes(config)


def trained_weights(work: Workload, config: RunConfig, numbers: Numbers) -> Workload:
    """A training step on frozen weights as one under ``stream``, where all of them are trained."""
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
        extra=work.extra + int(_TEMPORARIES * numbers.largest * 4),
        host_state=int(whole / shares * (item + each + gradient)),
        update_up=int(update + whole / shares * gradient),
        update_down=int(update + whole / shares * item),
        gradients_down=int(whole / shares * gradient),
    )


def checkpoint_bytes(config: RunConfig, whole: int) -> int:
    """A checkpoint on disk: the weights as the model computes with them, and the optimizer's state."""
    averages = _weight_bytes(config) if config.ema is not None else 0
    return int(whole * (_weight_bytes(config) + state_of_each(config) + averages))
