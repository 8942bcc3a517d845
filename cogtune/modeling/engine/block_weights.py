"""The order in which the weights of blocks take turns in a few slots on the GPU."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch


class BlockWeights(ABC):
    """Weights that are not always on the GPU: block i passes through slot number i mod n; others are not counted."""

    def __init__(self, count: int, slots: int) -> None:
        self._count = count
        self._turns = min(slots, count)
        """The number of slots."""

    @abstractmethod
    def need(self, number: int) -> None:
        """Ensure that the weights of block ``number`` are in their slot before the next computation."""

    def after_forward(self, number: int, *, with_backward: bool) -> None:
        """Fetch what is needed next, now that the forward pass of block ``number`` is enqueued."""
        if number + self._turns < self._count:
            self._load(number + self._turns)
        elif number == self._count - 1 and not with_backward:
            self._load_first()

    def after_backward(self, number: int) -> None:
        """Fetch what is needed next, now that the backward pass of block ``number`` is enqueued."""
        if number >= self._turns:
            self._load(number - self._turns)

    @abstractmethod
    def _load(self, number: int) -> None:
        """Start to load the weights of block ``number`` into their slot, unless they are there."""

    def _load_first(self) -> None:
        for number in range(self._turns):
            self._load(number)


def parameters_by_block(
    transformer: torch.nn.Module, blocks: Sequence[torch.nn.Module]
) -> list[dict[str, torch.nn.Parameter]]:
    """Return the parameters of each block by their names in the transformer, and last those outside of the blocks."""
    named = dict(transformer.named_parameters())
    members: list[dict[str, torch.nn.Parameter]] = []
    for block in blocks:
        own = {id(parameter) for parameter in block.parameters()}
        members.append({name: parameter for name, parameter in named.items() if id(parameter) in own})
    inside = {name for own in members for name in own}
    return [*members, {name: parameter for name, parameter in named.items() if name not in inside}]
