"""The samples of each step, as a function of only the seed and the step number.

Forward passes are counted through the whole run, and the samples in them: optimizer step s takes the next
``accumulation * world_size`` passes, however they are divided between the two. So a resumed run continues with the
sample that comes next, and two processes together see what one would.

The samples of a pass are from one bucket, that is of one size. Each bucket has an endless sequence of its samples,
round after round in a new order, of which an epoch takes as many full passes as are needed to see each sample once. If
the last pass is not full, the next round begins in it, and the next epoch continues after it. Over E epochs each sample
is seen at least E times, and no bucket gets more passes than that requires. The order of buckets is shuffled per epoch.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from cogtune.data.cache.index import Index, SampleKeys
from cogtune.data.cache.store import Store

if TYPE_CHECKING:
    from torch import Tensor

Integers = np.ndarray[tuple[int], np.dtype[np.int64]]

_Prepared = TypeVar("_Prepared")

LOOKAHEAD, MOST_AHEAD = 2, 8
"""The number of steps whose batches are prefetched, and the number for batches so small that drawing their noise takes
longer than a step."""

_BYTES_AHEAD = 64 << 20
"""Entries that more than :data:`LOOKAHEAD` steps may have; noise in fp32 is three to four times as large."""


@dataclass(frozen=True)
class Batch:
    """The inputs of one forward pass.

    ``moments [B, 2C, F, h, w]``, ``text [B, L, D]``, ``image [B, 3, H, W]`` uint8 or None; ``ordinals`` are the
    samples' numbers in the run, from which noise and timestep follow.
    """

    moments: Tensor
    text: Tensor
    image: Tensor | None
    ids: tuple[str, ...]
    ordinals: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in (self.moments, self.text, self.image) if tensor is not None)


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass: samples of one bucket.

    ``positions`` are their positions in the bucket, ``ordinals`` their numbers in the run.
    """

    bucket: int
    positions: tuple[int, ...]
    ordinals: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class RankSampler:
    """One process's part of every optimizer step."""

    seed: int
    batch_size: int
    accumulation: int
    world_size: int
    rank: int

    def passes(self, step: int, counts: tuple[int, ...]) -> list[MicroBatch]:
        """Return this process's forward passes of optimizer step ``step``, for buckets of these sizes.

        A step's passes are distributed by bucket, so that the processes work on the same size as far as possible.
        """
        together = self.accumulation * self.world_size
        passes = [
            micro_batch_at(self.seed, number, counts, self.batch_size)
            for number in range(step * together, (step + 1) * together)
        ]
        passes.sort(key=lambda one: one.bucket)
        return passes[self.rank :: self.world_size]


def micro_batch_at(seed: int, number: int, counts: tuple[int, ...], batch_size: int) -> MicroBatch:
    """Return forward pass ``number`` of a run, for buckets of these sizes."""
    epoch = number * batch_size // sum(counts)
    while sum(_passes_before(epoch, counts, batch_size)) > number:
        epoch -= 1
    before = _passes_before(epoch, counts, batch_size)
    order = _order_of_buckets(seed, epoch, counts, batch_size)
    place = number - sum(before)
    bucket = int(order[place])
    turn = before[bucket] + int(np.count_nonzero(order[:place] == bucket))
    return MicroBatch(
        bucket,
        tuple(
            sample_at(seed, ordinal, counts[bucket], bucket)
            for ordinal in range(turn * batch_size, (turn + 1) * batch_size)
        ),
        tuple(range(number * batch_size, (number + 1) * batch_size)),
    )


def sample_at(seed: int, ordinal: int, count: int, bucket: int = 0) -> int:
    """Return the position of a bucket's ``ordinal``-th sample: each comes once per round, in the round's order."""
    round_, position = divmod(ordinal, count)
    return int(_order(seed, round_, count, bucket)[position])


def _passes_before(epoch: int, counts: tuple[int, ...], batch_size: int) -> list[int]:
    """Return the number of each bucket's forward passes before ``epoch``: enough to see each sample ``epoch`` times."""
    return [-(-epoch * count // batch_size) for count in counts]


@functools.lru_cache(maxsize=64)
def _order(seed: int, round_: int, count: int, bucket: int) -> Integers:
    return np.random.default_rng([seed, round_, bucket + 1]).permutation(count)


@functools.lru_cache(maxsize=4)
def _order_of_buckets(seed: int, epoch: int, counts: tuple[int, ...], batch_size: int) -> Integers:
    """Return the bucket of each forward pass of an epoch."""
    before, after = (np.array(_passes_before(at, counts, batch_size)) for at in (epoch, epoch + 1))
    return np.random.default_rng([seed, epoch]).permutation(np.repeat(np.arange(len(counts)), after - before))


def load_batch(store: Store, rows: Sequence[SampleKeys], ordinals: tuple[int, ...]) -> Batch:
    """Read the entries of ``rows`` from the cache and stack them."""
    import torch

    moments = torch.stack([store.read("latents", row.latents) for row in rows])
    text = torch.stack([store.read("text", row.text) for row in rows])
    images = [store.read("image", row.image) for row in rows if row.image is not None]
    return Batch(moments, text, torch.stack(images) if images else None, tuple(row.id for row in rows), ordinals)


def batches(
    store: Store,
    index: Index,
    share: RankSampler,
    first_step: int,
    last_step: int,
    prepare: Callable[[Batch], _Prepared],
) -> Iterator[list[_Prepared]]:
    """Yield what ``prepare`` makes of the batches of each optimizer step from ``first_step`` up to ``last_step``.

    They are read and prepared ahead of their use, in threads.
    """
    buckets = list(index.buckets.values())
    counts = tuple(len(bucket) for bucket in buckets)

    def load(step: int) -> tuple[int, list[_Prepared]]:
        read = [
            load_batch(store, [index.rows[buckets[one.bucket][place]] for place in one.positions], one.ordinals)
            for one in share.passes(step, counts)
        ]
        return sum(batch.nbytes for batch in read), [prepare(batch) for batch in read]

    most, ahead = min(MOST_AHEAD, max(LOOKAHEAD, (os.cpu_count() or 1) // share.world_size)), LOOKAHEAD
    with ThreadPoolExecutor(most + 1, "cogtune-batches") as reader:
        pending: list[Future[tuple[int, list[_Prepared]]]] = []
        for step in range(first_step, last_step):
            while len(pending) <= ahead and step + len(pending) < last_step:
                pending.append(reader.submit(load, step + len(pending)))
            size, prepared = pending.pop(0).result()
            ahead = min(most, max(LOOKAHEAD, _BYTES_AHEAD // max(1, size)))
            yield prepared
