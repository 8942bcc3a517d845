"""Frozen weights that stay in host memory and take turns in a few slots on the GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cogtune.modeling.engine.block_weights import BlockWeights
from cogtune.modeling.engine.copies import CopyLane, wait_for
from cogtune.modeling.engine.host import HostArena, aligned

_TOGETHER = 8
"""Blocks whose host memory is asked for at once."""


class FrozenWeights(BlockWeights):
    """The frozen weights of some blocks: one host buffer for each, copied as a whole into slot number i mod n.

    A block's parameters are views into its slot from then on, so that compiled code and saved tensors see addresses
    that never change. What a slot holds is only right between :meth:`need` and the next block's of the same slot.
    """

    def __init__(
        self, blocks: Sequence[torch.nn.Module], *, slots: int, device: torch.device, arena: HostArena
    ) -> None:
        """Move the frozen parameters of ``blocks`` to the host, and load the first of them.

        Processes whose arenas share memory have to hold the same parameters, of which one process's are moved.
        """
        super().__init__(len(blocks), slots)
        frozen = [[p for p in block.parameters() if not p.requires_grad] for block in blocks]
        sizes = [sum(aligned(_bytes(p)) for p in parameters) for parameters in frozen]
        self._lane = CopyLane(device)
        self._slots = [torch.empty(max(sizes), dtype=torch.uint8, device=device) for _ in range(self._turns)]
        self._held: list[int | None] = [None] * self._turns
        self._loaded: list[torch.cuda.Event | None] = [None] * self._turns
        self._host = []
        regions = [sum(sizes[first : first + _TOGETHER]) for first in range(0, len(sizes), _TOGETHER)]
        arena.reserve_ahead(regions)
        for number, (parameters, size) in enumerate(zip(frozen, sizes, strict=True)):
            if number % _TOGETHER == 0:
                arena.reserve(regions[number // _TOGETHER])
            host, start = arena.take(size), 0
            slot = self._slots[number % self._turns]
            for parameter in parameters:
                end = start + _bytes(parameter)
                if arena.is_filled_here:
                    _typed(host[start:end], parameter).copy_(parameter.data)
                parameter.data = _typed(slot[start:end], parameter)
                start = aligned(end)
            self._host.append(host)
        arena.wait_until_filled()
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
        wait_for(self._loaded[number % self._turns])

    def _load(self, number: int) -> None:
        slot = number % self._turns
        if self._held[slot] != number:
            host = self._host[number]
            self._held[slot] = number
            self._loaded[slot] = self._lane.copy(self._slots[slot][: host.numel()], host)


def _bytes(parameter: Tensor) -> int:
    return parameter.numel() * parameter.element_size()


def _typed(memory: Tensor, like: Tensor) -> Tensor:
    return memory.view(like.dtype).view(like.shape)
