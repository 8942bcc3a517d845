"""Host memory for what is not on the GPU: large regions, pinned where the system gives pinned memory."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from cogtune.modeling.engine.machine_group import MachineGroup
from cogtune.modeling.engine.pages import Pages

_ALIGNMENT = 256

SMALLEST_REGION = 2**28
_MOST_THREADS = 8
"""That bring in the pages of a region."""
_AHEAD = 2
"""Announced regions that are asked for before they are needed."""
_OF_LARGE = 8.4
"""A new region has room for so many tensors like the one that asked for it: eight, and the small ones between them."""


def aligned(size: int) -> int:
    """Return ``size`` in bytes, rounded up to where a tensor may start."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True)
class LentMemory:
    """Host memory that is free between the forward and the backward pass of blocks: a little more with each block."""

    memory: Tensor
    """uint8"""
    ends: tuple[int, ...]
    """Bytes of it that are free from the forward pass of each block until its backward pass has ended."""


@dataclass
class _Region:
    memory: Tensor
    used: int = 0


class HostArena:
    """Regions of host memory that are handed out from the front and all taken back at once.

    PyTorch rounds each pinned allocation up to a power of two; here pages are registered with CUDA as they are.
    """

    def __init__(
        self, *, pin: bool, tell: Callable[[str], None] = lambda _: None, group: MachineGroup | None = None
    ) -> None:
        """Create an empty arena.

        Args:
            pin: whether to register the memory with CUDA, so that copies run beside the computation.
            tell: told once when the system does not give pinned memory.
            group: processes that share the memory where the system allows it. They have to ask for the same regions.
        """
        self._pin = pin
        self._tell = tell
        self._group = group
        self._fillers = group  # also where a later region is not shared any more: an earlier one may be
        self._regions: list[_Region] = []
        self._thread: ThreadPoolExecutor | None = None
        self._coming: Iterator[int] = iter(())
        self._ahead: deque[Future[Tensor]] = deque()

    @property
    def is_filled_here(self) -> bool:
        """Whether this process is to write what the memory is to hold, which others may share."""
        return self._group is None or self._group.writes

    def wait_until_filled(self) -> None:
        """Wait for the process that fills shared memory. Collective."""
        if self._fillers is not None:
            self._fillers.wait()

    @property
    def size(self) -> int:
        """Bytes asked of the system."""
        return sum(region.memory.numel() for region in self._regions)

    def take(self, size: int) -> Tensor:
        """Return ``size`` bytes as uint8; what they hold is not defined."""
        room = aligned(size)
        for region in self._regions:
            if region.used + room <= region.memory.numel():
                break
        else:
            region = self.reserve(max(SMALLEST_REGION, int(room * _OF_LARGE)))
        region.used += room
        return region.memory[region.used - room : region.used - room + size]

    def reserve(self, size: int) -> _Region:
        """Ask the system for a region of ``size`` bytes at once; they are zero."""
        memory = self._ahead.popleft().result() if self._ahead else self._allocate(size)
        assert memory.numel() == size  # regions are reserved in the order that was announced
        self._regions.append(_Region(memory))
        self._go_ahead()
        return self._regions[-1]

    def reserve_ahead(self, sizes: Iterable[int]) -> None:
        """Announce the next regions: two at a time are asked for in a thread, until each is reserved.

        That takes a while (2 GiB a second in an H200's virtual machine), in which the region before can be filled.
        Shared memory is not asked for ahead, since all processes map it together.
        """
        if self._group is not None:
            return
        self._coming = iter(sizes)
        self._thread = ThreadPoolExecutor(1, "cogtune-host-memory")
        for _ in range(_AHEAD):
            self._go_ahead()

    def _go_ahead(self) -> None:
        """Ask for one more of the announced regions."""
        if self._thread is None:
            return
        size = next(self._coming, None)
        if size is not None:
            card = torch.cuda.current_device() if self._pin else None
            self._ahead.append(self._thread.submit(self._allocate, size, card))
        elif not self._ahead:
            self._thread.shutdown()
            self._thread = None

    def reset(self) -> None:
        """Hand out from the front again: what was taken is free."""
        for region in self._regions:
            region.used = 0

    def _allocate(self, size: int, card: int | None = None) -> Tensor:
        """Map a region and pin it, in a thread for the GPU ``card``."""
        pages = self._group.map(size) if self._group is not None else None
        if pages is None:
            self._group = None
            pages = _mapped(size)
        region = torch.frombuffer(pages, dtype=torch.uint8)
        if self._pin:
            if card is not None:
                torch.cuda.set_device(card)  # that of a thread is the first one at first
            if self.is_filled_here:  # elsewhere the same pages may hold weights already
                _bring_in(region)
            problem = pages.pin(region.data_ptr())
            if problem is not None:
                self._pin = False
                self._tell(
                    f"the system gives no more pinned host memory ({problem}): copies to and from it will hold the "
                    "computation up"
                )
        return region


def _mapped(size: int) -> Pages:
    """Return ``size`` bytes of zeros, in huge pages where the system has them: they are pinned and copied faster."""
    pages = Pages(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def _bring_in(region: Tensor) -> None:
    """Have the system give the pages of ``region``: several threads are faster at it than CUDA, which pins with one."""
    threads = min(_MOST_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(Tensor.zero_, region.chunk(threads)))
