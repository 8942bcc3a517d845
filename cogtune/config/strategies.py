"""The strategies: how the memory and the work of a run are shared out over GPUs. One row each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Strategy = Literal["ddp", "zero2", "zero3", "zero2-offload", "zero3-offload", "stream"]


@dataclass(frozen=True, kw_only=True)
class StrategyFacts:
    """What the rest of the program has to know of a strategy."""

    zero_stage: Literal[0, 2, 3] = 0
    """DeepSpeed's ZeRO stage; 0 for a strategy that does without DeepSpeed."""
    offloads: bool = False
    """Whether the optimizer and its state live in the host's memory."""
    streams: bool = False
    """Whether all weights are trained from host memory, by the memory engine, on the GPUs of one machine."""
    fewest_processes: int = 1
    """Fewer are refused."""
    worthwhile_from: int = 1
    """The number of GPUs from which it saves anything; with fewer it is never proposed."""

    @property
    def uses_deepspeed(self) -> bool:
        """Whether DeepSpeed runs it, and writes its checkpoints as shards."""
        return self.zero_stage > 0

    @property
    def shards_weights(self) -> bool:
        """Whether each GPU holds a part of the weights, which hooks gather layer by layer."""
        return self.zero_stage == 3


STRATEGIES: dict[Strategy, StrategyFacts] = {
    "ddp": StrategyFacts(),
    "zero2": StrategyFacts(zero_stage=2, worthwhile_from=2),
    "zero3": StrategyFacts(zero_stage=3, fewest_processes=2, worthwhile_from=2),
    "zero2-offload": StrategyFacts(zero_stage=2, offloads=True),
    "zero3-offload": StrategyFacts(zero_stage=3, offloads=True, fewest_processes=2, worthwhile_from=2),
    "stream": StrategyFacts(streams=True),
}
"""Every strategy, the fastest first; ``stream`` is last as long as it is not measured."""
