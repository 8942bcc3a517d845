"""What blocks keep for the backward pass, moved to host memory after the forward pass and fetched a block ahead."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from cogtune.modeling.engine.copies import CopyLane, wait_for
from cogtune.modeling.engine.host import HostArena, LentMemory, aligned

SMALLEST = 2**20
"""Bytes below which a tensor stays where it is."""

_BEHIND = 2
"""Blocks after which the GPU's copy of a moved tensor is given up; its copy has ended by then."""


@dataclass
class _Moved:
    """A saved tensor that is on the host."""

    host: Tensor
    """In the order of its memory on the GPU."""
    order: tuple[int, ...]
    """The tensor's dimensions in that order."""
    down: torch.cuda.Event | None
    card: Tensor | None = None
    up: torch.cuda.Event | None = None


@dataclass
class _Pass:
    """One forward pass and its backward pass."""

    moved: dict[int, list[_Moved]] = field(default_factory=dict)
    leaving: deque[tuple[int, torch.cuda.Event | None, Tensor]] = field(default_factory=deque)
    """GPU tensors that are being copied, by block."""
    resident: set[int] = field(default_factory=set)
    """Addresses of storages that stay on the GPU."""
    borrowed: int = 0
    """Bytes taken of the lent memory."""
    over: bool = False


class OffloadedActivations:
    """The saved tensors of a transformer's blocks, on the host between a block's forward and backward pass."""

    def __init__(
        self, *, device: torch.device, arena: HostArena, lent: LentMemory | None = None, smallest: int = SMALLEST
    ) -> None:
        """Keep saved tensors in ``arena``.

        Args:
            lent: memory to use before that.
            smallest: bytes from which on a tensor is moved.
        """
        self._device = device
        self._arena = arena
        self._lent = lent
        self._smallest = smallest
        self._down, self._up = CopyLane(device), CopyLane(device)
        self._pass = _Pass(over=True)

    def begin(self, resident: Iterable[Tensor]) -> None:
        """Start a forward pass; the backward pass of the one before cannot be made after this.

        Args:
            resident: tensors that stay on the GPU: weights, and what all blocks share.
        """
        self._pass.over = True
        self._pass = _Pass(resident={tensor.untyped_storage().data_ptr() for tensor in resident})
        self._arena.reset()

    def offloading(self, block: int) -> contextlib.AbstractContextManager[None]:
        """Move what a block's forward pass saves to the host, while the context is active."""
        run = self._pass
        while run.leaving and run.leaving[0][0] <= block - _BEHIND:
            wait_for(run.leaving.popleft()[1])
        run.moved[block] = []
        hooks = torch.autograd.graph.saved_tensors_hooks
        manager: contextlib.AbstractContextManager[None] = hooks(
            partial(self._pack, run, block, {}), partial(self._unpack, run)
        )
        return manager

    def end_forward(self) -> None:
        """Give up the GPU's copies of the last blocks."""
        while self._pass.leaving:
            wait_for(self._pass.leaving.popleft()[1])

    def fetch(self, block: int) -> None:
        """Start to bring back what a block keeps."""
        for moved in self._pass.moved.get(block, ()):
            self._fetch(moved)

    def release(self, block: int) -> None:
        """Free what a block kept, once its backward pass is enqueued."""
        for moved in self._pass.moved.get(block, ()):
            wait_for(moved.up)  # of one that was not needed: the host's memory may be written from here on
            moved.card = None

    def _pack(self, run: _Pass, block: int, known: dict[object, _Moved], tensor: Tensor) -> Tensor | _Moved:
        size = tensor.numel() * tensor.element_size()
        address = tensor.untyped_storage().data_ptr()
        if size < max(1, self._smallest) or tensor.device.type != self._device.type or address in run.resident:
            return tensor
        strides = tensor.stride()
        order = tuple(sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], dim)))
        dense = tensor.detach().permute(order)
        if not dense.is_contiguous():
            return tensor
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, strides)
        if key not in known:
            host = self._room(run, block, size).view(tensor.dtype).view(dense.shape)
            moved = _Moved(host, order, self._down.copy(host, dense))
            run.leaving.append((block, moved.down, tensor))
            run.moved[block].append(moved)
            known[key] = moved
        return known[key]

    def _room(self, run: _Pass, block: int, size: int) -> Tensor:
        """Return ``size`` bytes of the host's memory."""
        start = run.borrowed
        if self._lent is None or start + size > self._lent.ends[block]:
            return self._arena.take(size)
        run.borrowed = start + aligned(size)
        return self._lent.memory[start : start + size]

    def _unpack(self, run: _Pass, saved: Tensor | _Moved) -> Tensor:
        if run.over:
            raise RuntimeError("the backward pass of a forward pass before the last one cannot be made")
        if isinstance(saved, Tensor):
            return saved
        self._fetch(saved)
        wait_for(saved.up)
        assert saved.card is not None  # fetched above
        inverse = [saved.order.index(dim) for dim in range(len(saved.order))]
        return saved.card.permute(inverse)

    def _fetch(self, moved: _Moved) -> None:
        if moved.card is None:
            moved.card = torch.empty(moved.host.shape, dtype=moved.host.dtype, device=self._device)
            moved.up = self._up.copy(moved.card, moved.host, after=(moved.down,))
