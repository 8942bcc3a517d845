"""The processes that train one model: gathering from all of them, and reducing to each one's shard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_distributed: Any = torch.distributed
# Their names from torch 2.13 on, and those before.
_gather = getattr(_distributed, "all_gather_single", None) or _distributed.all_gather_into_tensor
_reduce = getattr(_distributed, "reduce_scatter_single", None) or _distributed.reduce_scatter_tensor


@dataclass(frozen=True)
class ShardGroup:
    """One process among ``size`` of the default process group."""

    rank: int = 0
    size: int = 1

    def all_gather(self, whole: Tensor) -> None:
        """Fill a buffer that holds this process's shard with the shards of the others. Collective."""
        if self.size > 1:
            own = whole.view(self.size, -1)[self.rank].clone()
            _gather(whole, own)

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        """Return this process's shard of the mean of all processes' buffers, which it may overwrite. Collective."""
        if self.size == 1:
            return whole
        own = torch.empty_like(whole.view(self.size, -1)[self.rank])
        _reduce(own, whole)
        return own.div_(self.size)

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum the values of all processes, in place. Collective."""
        if self.size > 1:
            torch.distributed.all_reduce(values)
        return values
