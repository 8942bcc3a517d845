"""The processes of one machine that hold the same frozen weights: one copy in host memory serves all of them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cogtune.modeling.engine.pages import Pages


def _gather(value: str) -> list[str]:
    """Return what every process of the job passed, by rank. Collective."""
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered


@dataclass(frozen=True)
class MachineGroup:
    """This process among those of its machine, of which every machine of the job has as many.

    Args:
        rank: among all processes of the job.
        size: processes on each machine.
    """

    rank: int
    size: int

    @property
    def writes(self) -> bool:
        """Whether this is the process that fills shared memory."""
        return self.rank % self.size == 0

    def wait(self) -> None:
        """Wait until all processes of the job are here. Collective."""
        _gather("")

    def map(self, size: int) -> Pages | None:
        """Return ``size`` bytes of zeros that the processes of this machine share. Collective.

        The memory is anonymous, so it needs no room in ``/dev/shm`` and is free when its last process ends.

        Returns:
            None in every process of the job where a system does not have such memory.
        """
        descriptor, path = _anonymous(size) if self.writes else (None, "")
        path = _gather(path)[self.rank - self.rank % self.size]
        memory = _mapped(path, size)
        shared = all(_gather("yes" if memory is not None else ""))
        if descriptor is not None:
            os.close(descriptor)
        return memory if shared else None


def _anonymous(size: int) -> tuple[int | None, str]:
    """Return a descriptor of new memory and the path by which others find it; None and an empty path without it."""
    if not hasattr(os, "memfd_create"):
        return None, ""
    try:
        descriptor = os.memfd_create("cogtune-weights")
        os.ftruncate(descriptor, size)
    except OSError:
        return None, ""
    return descriptor, f"/proc/{os.getpid()}/fd/{descriptor}"


def _mapped(path: str, size: int) -> Pages | None:
    if not path:
        return None
    try:
        with Path(path).open("r+b") as file:
            return Pages(file.fileno(), size)
    except (OSError, ValueError):  # another user's, or a container's own numbers of processes
        return None
