"""Recognising and reporting errors about GPU memory."""

from __future__ import annotations

import re
import traceback
from dataclasses import dataclass

from cogtune.system.errors import CogtuneError, said_by
from cogtune.system.gpus import gpus

GB = 10**9

_NO_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Messages of CUDA and its libraries, in errors other than PyTorch's own."""

_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a GPU is out of memory."""
    is_torchs = type(error).__name__ == "OutOfMemoryError"
    return is_torchs or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_MEMORY))


def cannot_pin(error: Exception) -> bool:
    """Return whether an error says that host memory could not be pinned, which a system may limit.

    CUDA reports it like a GPU that is out of memory.
    """
    where = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    return is_out_of_memory(error) and any(name.startswith(("pin_memory", "pin_empty")) for name in where)


@dataclass(frozen=True)
class Room:
    """A GPU's memory in bytes: what this program can have, including what it has, and the total."""

    free: int
    total: int

    def __str__(self) -> str:
        whole = f"{self.free / GB:.1f} GB of the GPU's {self.total / GB:.1f} GB"
        return f"{whole} are available to this program"


def room_of(error: BaseException) -> Room | None:
    """Read the GPU's memory from PyTorch's error, or else from the driver; None if neither has it.

    Memory that other programs use or that this process may not have is not free.
    """
    text = str(error)
    total, free = _amount(r"total capacity of {}", text), _amount(r"of which {} is free", text)
    if total is not None and free is not None:
        own = _amount(r"this process has {} memory in use", text)
        if own is None:
            own = (_amount(r"{} is allocated by PyTorch", text) or 0) + (_amount(r"{} is reserved by", text) or 0)
        allowed = _amount(r"{} allowed", text)
        return Room(min(free + own, total if allowed is None else allowed), total)
    cards = gpus()
    if not cards:
        return None
    card = min(cards, key=lambda card: card.free)
    return Room(card.free, card.total)


def _amount(pattern: str, text: str) -> int | None:
    """Return the bytes at ``{}`` of the pattern in ``text``."""
    match = re.search(pattern.format(r"(\d+(?:\.\d+)?) (bytes|KiB|MiB|GiB)"), text)
    return int(float(match[1]) * _UNITS[match[2]]) if match else None


def out_of_memory(error: BaseException, hint: str, *, doing: str = "", details: tuple[str, ...] = ()) -> CogtuneError:
    """Return the error to show for a GPU that is out of memory.

    Args:
        error: PyTorch's, cuBLAS's or CUDA's.
        hint: what would fit.
        doing: what was being done, such as ``sampling``.
    """
    room = room_of(error)
    what = f"out of GPU memory while {doing}" if doing else "out of GPU memory"
    return CogtuneError(f"{what}: {room or said_by(error)}", hint, details=details)
