"""The processes of a run as those who share out a model: what each has, and how they put it together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shares:
    """One process among ``count`` of the default process group."""

    rank: int = 0
    count: int = 1

    def gather(self, whole: Tensor) -> None:
        """Fill a buffer, of which this process's share is right, with the others'. Collective."""
        if self.count > 1:
            own = whole.view(self.count, -1)[self.rank].clone()
            torch.distributed.all_gather_into_tensor(whole, own)

    def mean(self, whole: Tensor) -> Tensor:
        """Return this process's share of the processes' mean of a buffer, which is used up. Collective."""
        if self.count == 1:
            return whole
        own = torch.empty_like(whole.view(self.count, -1)[self.rank])
        torch.distributed.reduce_scatter_tensor(own, whole)
        return own.div_(self.count)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of the processes' values. Collective."""
        if self.count > 1:
            torch.distributed.all_reduce(values)
        return values
