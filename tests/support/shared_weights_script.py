"""Two processes that keep one copy of frozen weights; each has other ones, so that it shows whose are used."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from cogtune.modeling.engine import machine_group
from cogtune.modeling.engine.frozen_weights import FrozenWeights
from cogtune.modeling.engine.host import HostArena
from cogtune.modeling.engine.machine_group import MachineGroup
from cogtune.models.variants import StoredPrecision

BLOCKS, WIDTH = 10, 64


def weight(rank: int, block: int) -> float:
    """What a process's weights of a block all are."""
    return 100.0 * rank + block


def without_memory(size: int) -> tuple[None, str]:
    """Stands in for :func:`machine_group._anonymous` on a system that has no such memory."""
    return None, ""


def main(folder: Path) -> None:
    """Write, by rank, what each block's weights are when they are needed, and how much memory is shared."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo")
    if (folder / "without").exists():
        machine_group._anonymous = without_memory
    blocks = [torch.nn.Linear(WIDTH, WIDTH).requires_grad_(False) for _ in range(BLOCKS)]
    for number, block in enumerate(blocks):
        for parameter in block.parameters():
            torch.nn.init.constant_(parameter, weight(rank, number))
    arena = HostArena(pin=False, group=MachineGroup(rank, size))
    stored: StoredPrecision | None = "nf4" if (folder / "stored").exists() else None
    weights = FrozenWeights(blocks, slots=2, device=torch.device("cpu"), arena=arena, stored=stored)
    seen = []
    for number, block in enumerate(blocks):
        weights.need(number)
        seen.append(sorted({float(value) for parameter in block.parameters() for value in parameter.flatten()}))
        weights.after_forward(number, with_backward=False)
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:cogtune-weights" in line]
    torch.save((seen, len(maps), arena.size), folder / f"rank-{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
