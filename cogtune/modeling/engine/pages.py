"""Mapped host memory that stays pinned for as long as a tensor uses it."""

from __future__ import annotations

import mmap
import sys

import torch

_PORTABLE = 1
"""``cudaHostRegisterPortable``: pinned for every context of the process."""


class Pages(mmap.mmap):
    """Memory whose pages can be registered with CUDA.

    ``torch.frombuffer(pages)`` keeps the mapping alive through every view, whoever else has let go of it, and so its
    end is what ends the registration. (A tensor's own end would not do: its views live longer than it.)
    """

    _pinned_at: int | None = None

    def pin(self, address: int) -> str | None:
        """Register the pages with CUDA, so that copies run alongside the computation.

        Args:
            address: where they begin.

        Returns:
            CUDA's own words where it refuses.
        """
        runtime = torch.cuda.cudart()
        status = runtime.cudaHostRegister(address, len(self), _PORTABLE)
        if int(status) != 0:
            return str(runtime.cudaGetErrorString(status))
        self._pinned_at = address
        return None

    def __del__(self) -> None:
        """Take back the registration before the memory is unmapped."""
        if self._pinned_at is not None and not sys.is_finalizing():  # else the process's end does it
            torch.cuda.synchronize()  # a copy may be under way
            torch.cuda.cudart().cudaHostUnregister(self._pinned_at)
