"""The optimizers: where each comes from, what it costs, and what it goes with. One row each.

The code that builds them is in :mod:`cogtune.training.optimizers`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cogtune.config.strategies import STRATEGIES, Strategy

OptimizerName = Literal["adamw", "adam", "prodigy", "came", "adamw-8bit", "adamw-offload"]

USUAL_RATE = 1e-4
"""The learning rate where nobody says one."""


@dataclass(frozen=True, kw_only=True)
class OptimizerFacts:
    """What the rest of the program has to know of an optimizer."""

    state_bytes: int
    """Of its state, for each trained number, on the GPU."""
    host_bytes: int = 0
    """The same in the host's memory, with a copy of the weights."""
    usual_rate: float = USUAL_RATE
    package: str = ""
    """What it is installed as; nothing for those that come with torch."""
    module: str = ""
    """What it is imported as."""
    not_under_zero: str = ""
    """Why DeepSpeed cannot run it; empty where it can."""


OPTIMIZERS: dict[OptimizerName, OptimizerFacts] = {
    "adamw": OptimizerFacts(state_bytes=8),
    "adam": OptimizerFacts(state_bytes=8),
    "prodigy": OptimizerFacts(
        state_bytes=16,
        usual_rate=1.0,  # it finds the size of its steps itself, and the rate only scales them (arXiv 2306.06101)
        package="prodigyopt",
        module="prodigyopt",
        not_under_zero="it estimates its step from all gradients, and a ZeRO process has a part of them",
    ),
    "came": OptimizerFacts(
        state_bytes=4,
        package="came-pytorch",
        module="came_pytorch",
        not_under_zero="it works on rows and columns, and ZeRO cuts matrices into flat pieces",
    ),
    "adamw-8bit": OptimizerFacts(
        state_bytes=2,
        package="bitsandbytes",
        module="bitsandbytes",
        not_under_zero="its 8-bit state cannot be saved in ZeRO's shards, which already share it out",
    ),
    "adamw-offload": OptimizerFacts(
        state_bytes=0,
        host_bytes=12,
        not_under_zero="DeepSpeed offloads by itself: use zero2-offload or zero3-offload",
    ),
}
"""Every optimizer."""


def goes_with(optimizer: OptimizerName, strategy: Strategy) -> bool:
    """Return whether an optimizer can run under a strategy."""
    return not (STRATEGIES[strategy].uses_deepspeed and OPTIMIZERS[optimizer].not_under_zero)
