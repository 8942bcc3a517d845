"""Frozen weights that stay in host memory and take turns in a few slots on the GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cogtune.modeling.engine.block_weights import BlockWeights
from cogtune.modeling.engine.copies import CopyLane, wait_for
from cogtune.modeling.engine.host import HostArena, aligned
from cogtune.modeling.engine.stored_weights import restore, storable, store, stored_bytes
from cogtune.models.variants import StoredPrecision

_TOGETHER = 8
"""Blocks whose host memory is asked for at once."""


class FrozenWeights(BlockWeights):
    """The frozen weights of some blocks: one host buffer for each, copied as a whole into slot number i mod n.

    A block's parameters are views into its slot from then on, so that compiled code and saved tensors see addresses
    that never change. What a slot holds is only right between :meth:`need` and the next block's of the same slot.

    Weights that are stored in fewer bits pass through a second slot, from which they are restored into the first.
    """

    def __init__(
        self,
        blocks: Sequence[torch.nn.Module],
        *,
        slots: int,
        device: torch.device,
        arena: HostArena,
        stored: StoredPrecision | None = None,
    ) -> None:
        """Move the frozen parameters of ``blocks`` to the host, and load the first of them.

        Processes whose arenas share memory have to hold the same parameters, of which one process's are moved.

        Args:
            stored: format of the linear layers' weights on the host, if it is not their own.
        """
        super().__init__(len(blocks), slots)
        self._stored = stored
        chosen: set[int] = set().union(*map(storable, blocks)) if stored is not None else set()
        frozen = [_ordered(block, chosen) for block in blocks]
        places = [sum(aligned(_bytes(p)) for p in parameters) for parameters in frozen]
        sizes = [sum(aligned(self._host_bytes(p, chosen)) for p in parameters) for parameters in frozen]
        self._lane = CopyLane(device)
        self._slots = [torch.empty(max(places), dtype=torch.uint8, device=device) for _ in range(self._turns)]
        self._packed = [
            torch.empty(max(sizes), dtype=torch.uint8, device=device) for _ in range(self._turns if chosen else 0)
        ]
        self._restored: list[list[tuple[Tensor, int, int]]] = []
        """Of each block, the weights in its slot that are restored, and from where to where they are stored."""
        self._held: list[int | None] = [None] * self._turns
        self._loaded: list[torch.cuda.Event | None] = [None] * self._turns
        self._host = []
        regions = [sum(sizes[first : first + _TOGETHER]) for first in range(0, len(sizes), _TOGETHER)]
        arena.reserve_ahead(regions)
        for number, (parameters, size) in enumerate(zip(frozen, sizes, strict=True)):
            if number % _TOGETHER == 0:
                arena.reserve(regions[number // _TOGETHER])
            host = arena.take(size)
            if arena.is_filled_here:
                self._fill(host, parameters, chosen, device)
            self._host.append(host)
            self._restored.append(self._place(parameters, chosen, self._slots[number % self._turns]))
        arena.wait_until_filled()
        self._load_first()

    def _host_bytes(self, parameter: Tensor, chosen: set[int]) -> int:
        if self._stored is not None and id(parameter) in chosen:
            return stored_bytes(parameter.numel(), self._stored)
        return _bytes(parameter)

    def _fill(self, host: Tensor, parameters: Sequence[Tensor], chosen: set[int], device: torch.device) -> None:
        """Write the weights of a block to the host."""
        start = 0
        for parameter in parameters:
            end = start + self._host_bytes(parameter, chosen)
            if self._stored is not None and id(parameter) in chosen:
                store(parameter, host[start:end], self._stored, device)
            else:
                _typed(host[start:end], parameter).copy_(parameter.data)
            start = aligned(end)

    def _place(self, parameters: Sequence[Tensor], chosen: set[int], slot: Tensor) -> list[tuple[Tensor, int, int]]:
        """Make the parameters of a block views into its slot; return those to restore, with their place on the host."""
        restored, start, from_ = [], 0, 0
        for parameter in parameters:
            end, to = start + _bytes(parameter), from_ + self._host_bytes(parameter, chosen)
            parameter.data = _typed(slot[start:end], parameter)
            if id(parameter) in chosen:
                restored.append((parameter.data, from_, to))
            start, from_ = aligned(end), aligned(to)
        return restored

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
            self._held[slot] = number
            if self._stored is not None and self._restored[number]:
                self._loaded[slot] = self._lane.run(lambda: self._unpack(number, slot))
            else:
                host = self._host[number]
                self._loaded[slot] = self._lane.copy(self._slots[slot][: host.numel()], host)

    def _unpack(self, number: int, slot: int) -> None:
        """Load a block and restore its stored weights; the others, which follow them, are copied as they are."""
        assert self._stored is not None
        host, packed = self._host[number], self._packed[slot]
        packed[: host.numel()].copy_(host, non_blocking=True)
        for target, start, end in self._restored[number]:
            restore(packed[start:end], target, self._stored)
        rest = host.numel() - aligned(self._restored[number][-1][2])
        if rest:
            first = sum(aligned(_bytes(target)) for target, _, _ in self._restored[number])
            self._slots[slot][first : first + rest].copy_(packed[host.numel() - rest : host.numel()])


def _ordered(block: torch.nn.Module, first: set[int]) -> list[torch.nn.Parameter]:
    """Return the frozen parameters of a block, those in ``first`` before the others."""
    frozen = [parameter for parameter in block.parameters() if not parameter.requires_grad]
    return sorted(frozen, key=lambda parameter: id(parameter) not in first)


def _bytes(parameter: Tensor) -> int:
    return parameter.numel() * parameter.element_size()


def _typed(memory: Tensor, like: Tensor) -> Tensor:
    return memory.view(like.dtype).view(like.shape)
