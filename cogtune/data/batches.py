"""Which samples are in which step: a function of the seed and the step number alone.

Samples are counted through the whole run: optimizer step s takes ordinals ``s * global_batch`` to
``(s + 1) * global_batch - 1``, however many processes and accumulation steps share them. So a resumed run goes on
with the sample it would have had, and two processes see what one would.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cogtune.data.cache import Store
from cogtune.data.index import Index, Row

if TYPE_CHECKING:
    from torch import Tensor

LOOKAHEAD = 2
"""Batches read ahead of the step that uses them."""


@dataclass(frozen=True)
class Batch:
    """What one forward pass works on.

    ``moments [B, 2C, F, h, w]``, ``text [B, L, D]``, ``image [B, 3, H, W]`` uint8 or None; ``ordinals`` are the
    samples' numbers in the run, from which noise and timestep follow.
    """

    moments: Tensor
    text: Tensor
    image: Tensor | None
    ids: tuple[str, ...]
    ordinals: tuple[int, ...]


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.random.default_rng([seed, epoch]).permutation(count)


def sample_at(seed: int, ordinal: int, count: int) -> int:
    """Which of ``count`` samples is number ``ordinal`` of a run: each once an epoch, in an order of the epoch's own."""
    epoch, position = divmod(ordinal, count)
    return int(_order(seed, epoch, count)[position])


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which part of every optimizer step one process works on."""

    seed: int
    batch_size: int
    accumulation: int
    world_size: int
    rank: int

    def ordinals(self, step: int, micro: int) -> tuple[int, ...]:
        """The numbers of the samples in this process's forward pass ``micro`` of optimizer step ``step``."""
        passes = (step * self.accumulation + micro) * self.world_size + self.rank
        return tuple(range(passes * self.batch_size, (passes + 1) * self.batch_size))


def load_batch(store: Store, rows: Sequence[Row], ordinals: tuple[int, ...]) -> Batch:
    """Read the entries of ``rows`` from the cache and stack them."""
    import torch

    moments = torch.stack([store.read("latents", row.latents) for row in rows])
    text = torch.stack([store.read("text", row.text) for row in rows])
    images = [store.read("image", row.image) for row in rows if row.image is not None]
    return Batch(moments, text, torch.stack(images) if images else None, tuple(row.id for row in rows), ordinals)


def batches(store: Store, index: Index, share: Share, first_step: int, last_step: int) -> Iterator[list[Batch]]:
    """For each optimizer step from ``first_step`` up to ``last_step``, its forward passes' batches, read ahead."""

    def load(step: int) -> list[Batch]:
        passes = []
        for micro in range(share.accumulation):
            ordinals = share.ordinals(step, micro)
            rows = [index.rows[sample_at(share.seed, ordinal, len(index.rows))] for ordinal in ordinals]
            passes.append(load_batch(store, rows, ordinals))
        return passes

    with ThreadPoolExecutor(1, "cogtune-batches") as reader:
        pending: list[Future[list[Batch]]] = []
        for step in range(first_step, last_step):
            while len(pending) <= LOOKAHEAD and step + len(pending) < last_step:
                pending.append(reader.submit(load, step + len(pending)))
            yield pending.pop(0).result()
