"""The optimizers, one row each: package, memory, default learning rate, supported strategies.

The code that builds them is in :mod:`cogtune.training.optimizers`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cogtune.config.strategies import STRATEGIES, Strategy

OptimizerName = Literal["adamw", "adam", "prodigy", "came", "adamw-8bit", "adamw-offload"]

USUAL_RATE = 1e-4
"""The default learning rate."""


@dataclass(frozen=True, kw_only=True)
class OptimizerFacts:
    """Facts about an optimizer."""

    state_bytes: int
    """Bytes of optimizer state on the GPU per trained number."""
    host_bytes: int = 0
    """Bytes in host memory per trained number, including a copy of the weights."""
    default_learning_rate: float = USUAL_RATE
    package: str = ""
    """The package to install; empty for those that come with torch."""
    module: str = ""
    """The module to import."""
    not_under_zero: str = ""
    """Why it cannot be used with DeepSpeed; empty if it can."""
    streams: bool = False
    """Whether its step can be made block by block, as strategy ``stream`` does."""


OPTIMIZERS: dict[OptimizerName, OptimizerFacts] = {
    "adamw": OptimizerFacts(state_bytes=8, streams=True),
    "adam": OptimizerFacts(state_bytes=8, streams=True),
    "prodigy": OptimizerFacts(
        state_bytes=16,
        default_learning_rate=1.0,  # only scales the step size that it estimates (arXiv 2306.06101)
        package="prodigyopt",
        module="prodigyopt",
        not_under_zero="it estimates its step size from all gradients, of which each ZeRO process has only a part",
    ),
    "came": OptimizerFacts(
        state_bytes=4,
        package="came-pytorch",
        module="came_pytorch",
        not_under_zero="it needs rows and columns, but ZeRO splits matrices into flat pieces",
    ),
    "adamw-8bit": OptimizerFacts(
        state_bytes=2,
        package="bitsandbytes",
        module="bitsandbytes",
        not_under_zero="its 8-bit state cannot be saved in ZeRO shards",
    ),
    "adamw-offload": OptimizerFacts(
        state_bytes=0,
        host_bytes=12,
        not_under_zero="DeepSpeed has its own offload; use zero2-offload or zero3-offload",
    ),
}
"""Every optimizer."""


def why_not_with(optimizer: OptimizerName, strategy: Strategy) -> str:
    """Return why an optimizer cannot run under a strategy; empty if it can."""
    facts = OPTIMIZERS[optimizer]
    if STRATEGIES[strategy].streams and not facts.streams:
        able = " and ".join(name for name, row in OPTIMIZERS.items() if row.streams)
        return f"its step is made block by block, as only those of {able} can be"
    return facts.not_under_zero if STRATEGIES[strategy].uses_deepspeed else ""


def is_compatible(optimizer: OptimizerName, strategy: Strategy) -> bool:
    """Return whether an optimizer can run under a strategy."""
    return not why_not_with(optimizer, strategy)
