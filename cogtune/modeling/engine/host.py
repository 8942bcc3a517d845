"""Host memory for what is not on the card: large regions, pinned where the system gives pinned memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

_ALIGNMENT = 256
_PORTABLE = 1
"""``cudaHostRegisterPortable``: pinned for every context of the process."""

GIB = 2**30


def aligned(size: int) -> int:
    """``size`` in bytes, rounded up to where a tensor may start."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class HostArena:
    """Regions of host memory that are handed out from the front and all taken back at once.

    PyTorch rounds each pinned allocation up to a power of two; here pages are registered with CUDA as they are.
    """

    def __init__(self, *, pin: bool, region: int = GIB, tell: Callable[[str], None] = lambda _: None) -> None:
        """An empty arena.

        Args:
            pin: whether to register the memory with CUDA, so that copies run beside the computation.
            region: bytes that are asked of the system at a time, or more where more is taken at once.
            tell: told once when the system does not give pinned memory.
        """
        self._pin = pin
        self._region = region
        self._tell = tell
        self._regions: list[Tensor] = []
        self._current = 0
        self._used = 0

    @property
    def size(self) -> int:
        """Bytes asked of the system."""
        return sum(region.numel() for region in self._regions)

    @property
    def is_pinned(self) -> bool:
        """Whether all of it is, or would be, pinned."""
        return self._pin

    def take(self, size: int) -> Tensor:
        """``size`` bytes as uint8; what they hold is not defined."""
        size = aligned(size)
        while self._current < len(self._regions):
            region = self._regions[self._current]
            if self._used + size <= region.numel():
                self._used += size
                return region[self._used - size : self._used]
            self._current, self._used = self._current + 1, 0
        self._regions.append(self._allocate(max(size, self._region)))
        self._used = size
        return self._regions[-1][:size]

    def reset(self) -> None:
        """Hand out from the front again: what was taken is free."""
        self._current, self._used = 0, 0

    def _allocate(self, size: int) -> Tensor:
        region = torch.empty(size, dtype=torch.uint8)
        if self._pin:
            problem = _register(region)
            if problem is not None:
                self._pin = False
                self._tell(
                    f"the system gives no more pinned host memory ({problem}): copies to and from it will hold the "
                    "computation up"
                )
        return region


def _register(region: Tensor) -> str | None:
    """Pin the pages of ``region`` until it is freed; CUDA's own words where it refuses."""
    runtime = torch.cuda.cudart()
    status = runtime.cudaHostRegister(region.data_ptr(), region.numel(), _PORTABLE)
    if int(status) != 0:
        return str(runtime.cudaGetErrorString(status))
    weakref.finalize(region.untyped_storage(), runtime.cudaHostUnregister, region.data_ptr()).atexit = False
    return None
