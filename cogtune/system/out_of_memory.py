"""A GPU whose memory is used up: how it is known, and what is said of it. One place for everything that computes."""

from __future__ import annotations

import re
import traceback
from dataclasses import dataclass

from cogtune.system.errors import CogtuneError, said_by
from cogtune.system.gpus import gpus

GB = 10**9

_NO_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What CUDA and its libraries say, in errors of other kinds than PyTorch's own, when a GPU's memory is used up."""

_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a GPU's memory is used up."""
    is_torchs = type(error).__name__ == "OutOfMemoryError"
    return is_torchs or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_MEMORY))


def cannot_pin(error: Exception) -> bool:
    """Whether an error says that the host's memory could not be pinned, of which a system may allow less than there is.

    CUDA says the same of it as of a GPU's memory that is used up.
    """
    where = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    return is_out_of_memory(error) and any(name.startswith(("pin_memory", "pin_empty")) for name in where)


@dataclass(frozen=True)
class Room:
    """A GPU's memory in bytes: what this program could have of it, its own share included, and all there is."""

    free: int
    total: int

    def __str__(self) -> str:
        whole = f"{self.free / GB:.1f} GB of the GPU's {self.total / GB:.1f} GB"
        return f"{whole} are free for this program"


def room_of(error: BaseException) -> Room | None:
    """What PyTorch's error says of the GPU's memory, else what the driver says; None when neither does.

    What other programs use is not free, and neither is what a limit on this process's memory leaves out.
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
    """The bytes that stand in ``text`` where ``{}`` is in the pattern."""
    match = re.search(pattern.format(r"(\d+(?:\.\d+)?) (bytes|KiB|MiB|GiB)"), text)
    return int(float(match[1]) * _UNITS[match[2]]) if match else None


def out_of_memory(error: BaseException, hint: str, *, doing: str = "", details: tuple[str, ...] = ()) -> CogtuneError:
    """The error of a GPU whose memory is used up, for the user.

    Args:
        error: PyTorch's, cuBLAS's or CUDA's.
        hint: what would fit.
        doing: what was being done, such as ``sampling``.
    """
    room = room_of(error)
    what = f"out of GPU memory while {doing}" if doing else "out of GPU memory"
    return CogtuneError(f"{what}: {room or said_by(error)}", hint, details=details)
