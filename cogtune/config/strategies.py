"""The strategies, one row each: how a run's memory and work are distributed over GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Strategy = Literal["ddp", "zero2", "zero3", "zero2-offload", "zero3-offload", "stream"]


@dataclass(frozen=True, kw_only=True)
class StrategyFacts:
    """Facts about a strategy."""

    zero_stage: Literal[0, 2, 3] = 0
    """DeepSpeed's ZeRO stage; 0 for a strategy without DeepSpeed."""
    offloads: bool = False
    """Whether the optimizer and its state are in host memory."""
    streams: bool = False
    """Whether all weights are trained from host memory, by the memory engine, on the GPUs of one machine."""
    fewest_processes: int = 1
    """The minimum number of GPUs."""
    worthwhile_from: int = 1
    """The number of GPUs from which it saves memory; it is never suggested for fewer."""

    @property
    def uses_deepspeed(self) -> bool:
        """Whether it uses DeepSpeed, which saves checkpoints as shards."""
        return self.zero_stage > 0

    @property
    def shards_weights(self) -> bool:
        """Whether each GPU holds a part of the weights, gathered layer by layer in hooks."""
        return self.zero_stage == 3


STRATEGIES: dict[Strategy, StrategyFacts] = {
    "ddp": StrategyFacts(),
    "zero2": StrategyFacts(zero_stage=2, worthwhile_from=2),
    "zero3": StrategyFacts(zero_stage=3, fewest_processes=2, worthwhile_from=2),
    "zero2-offload": StrategyFacts(zero_stage=2, offloads=True),
    "zero3-offload": StrategyFacts(zero_stage=3, offloads=True, fewest_processes=2, worthwhile_from=2),
    "stream": StrategyFacts(streams=True),
}
"""All strategies, the fastest first; ``stream`` is last as long as it is not measured."""
