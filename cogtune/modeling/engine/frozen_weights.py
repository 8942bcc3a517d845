"""Frozen weights that stay in host memory and take turns in a few slots on the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from cogtune.modeling.engine.copies import CopyLane, wait_for
from cogtune.modeling.engine.host import HostArena, aligned

_TOGETHER = 8
"""Blocks whose host memory is asked for at once."""


class BlockWeights(Protocol):
    """What the engine asks of weights that are not always on the GPU; only streamed blocks are counted."""

    def need(self, number: int) -> None:
        """Ensure that a block's weights are in place before the next computation."""

    def after_forward(self, number: int, *, with_backward: bool) -> None:
        """React to a block's forward pass having been enqueued."""

    def after_backward(self, number: int) -> None:
        """React to a block's backward pass having been enqueued."""


class FrozenWeights:
    """The frozen weights of some blocks: one host buffer for each, copied as a whole into slot number i mod n.

    A block's parameters are views into its slot from then on, so that compiled code and saved tensors see addresses
    that never change. What a slot holds is only right between :meth:`need` and the next block's of the same slot.
    """

    def __init__(
        self, blocks: Sequence[torch.nn.Module], *, slots: int, device: torch.device, arena: HostArena
    ) -> None:
        """Move the frozen parameters of ``blocks`` to the host, and load the first of them."""
        self._count = len(blocks)
        slots = min(slots, self._count)
        frozen = [[p for p in block.parameters() if not p.requires_grad] for block in blocks]
        sizes = [sum(aligned(_bytes(p)) for p in parameters) for parameters in frozen]
        self._lane = CopyLane(device)
        self._slots = [torch.empty(max(sizes), dtype=torch.uint8, device=device) for _ in range(slots)]
        self._held: list[int | None] = [None] * slots
        self._loaded: list[torch.cuda.Event | None] = [None] * slots
        self._host = []
        for number, (parameters, size) in enumerate(zip(frozen, sizes, strict=True)):
            if number % _TOGETHER == 0:
                arena.reserve(sum(sizes[number : number + _TOGETHER]))
            host, start = arena.take(size), 0
            slot = self._slots[number % slots]
            for parameter in parameters:
                end = start + _bytes(parameter)
                _typed(host[start:end], parameter).copy_(parameter.data)
                parameter.data = _typed(slot[start:end], parameter)
                start = aligned(end)
            self._host.append(host)
        self._load_first()

    @property
    def storages(self) -> set[int]:
        """Addresses of the slots."""
        return {slot.untyped_storage().data_ptr() for slot in self._slots}

    @property
    def bytes_of_block(self) -> int:
        """Bytes of the largest block on the host."""
        return max(host.numel() for host in self._host)

    def need(self, number: int) -> None:
        """Ensure that the weights of streamed block ``number`` are in their slot before the next computation."""
        self._load(number)
        wait_for(self._loaded[number % len(self._slots)])

    def after_forward(self, number: int, *, with_backward: bool) -> None:
        """Fetch what is needed next, now that the forward pass of ``number`` is enqueued."""
        if number + len(self._slots) < self._count:
            self._load(number + len(self._slots))
        elif number == self._count - 1 and not with_backward:
            self._load_first()

    def after_backward(self, number: int) -> None:
        """Fetch what is needed next, now that the backward pass of ``number`` is enqueued."""
        if number >= len(self._slots):
            self._load(number - len(self._slots))

    def _load_first(self) -> None:
        for number in range(len(self._slots)):
            self._load(number)

    def _load(self, number: int) -> None:
        slot = number % len(self._slots)
        if self._held[slot] != number:
            host = self._host[number]
            self._held[slot] = number
            self._loaded[slot] = self._lane.copy(self._slots[slot][: host.numel()], host)


def _bytes(parameter: Tensor) -> int:
    return parameter.numel() * parameter.element_size()


def _typed(memory: Tensor, like: Tensor) -> Tensor:
    return memory.view(like.dtype).view(like.shape)
