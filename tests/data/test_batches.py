"""Which samples are in which step: the same for any number of processes, and after any resume."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from cogtune.config.run_config import RunConfig
from cogtune.data.batches import MicroBatch, RankSampler, micro_batch_at, sample_at

COUNTS = (3, 17, 1)
"""Samples in each of three buckets; no batch size but 1 divides all."""


def steps(
    world_size: int, batch_size: int, accumulation: int, count: int, counts: tuple[int, ...]
) -> list[list[MicroBatch]]:
    """The forward passes of each step, those of the first process first."""
    shares = [
        RankSampler(seed=1, batch_size=batch_size, accumulation=accumulation, world_size=world_size, rank=rank)
        for rank in range(world_size)
    ]
    return [[one for share in shares for one in share.passes(step, counts)] for step in range(count)]


def samples(passes: list[MicroBatch]) -> list[tuple[int, int, int]]:
    """Ordinal, bucket and position of every sample in some passes."""
    return sorted(
        (ordinal, one.bucket, place)
        for one in passes
        for ordinal, place in zip(one.ordinals, one.positions, strict=True)
    )


@pytest.mark.parametrize(("world", "batch", "accumulation"), [(1, 8, 1), (2, 4, 1), (2, 2, 2), (8, 1, 1), (4, 1, 2)])
def test_a_step_has_the_same_samples_however_they_are_shared_out(world: int, batch: int, accumulation: int) -> None:
    plain = steps(1, 1, 8, 4, (11,))
    shared = steps(world, batch, accumulation, 4, (11,))
    assert [samples(step) for step in shared] == [samples(step) for step in plain]
    assert [[ordinal for ordinal, _, _ in samples(step)] for step in shared] == [
        list(range(8 * step, 8 * step + 8)) for step in range(4)
    ]


@pytest.mark.parametrize(("world", "accumulation"), [(2, 2), (4, 1)])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_with_buckets_too_one_process_and_several_see_the_same(world: int, accumulation: int, batch: int) -> None:
    alone = steps(1, batch, 4, 30, COUNTS)
    shared = steps(world, batch, accumulation, 30, COUNTS)
    assert [samples(step) for step in shared] == [samples(step) for step in alone]


def test_every_process_does_as_many_passes_and_as_far_as_may_be_of_one_size() -> None:
    share = [RankSampler(seed=5, batch_size=2, accumulation=3, world_size=2, rank=rank) for rank in range(2)]
    for step in range(20):
        one, other = (rank.passes(step, COUNTS) for rank in share)
        assert len(one) == len(other) == 3
        assert sum(a.bucket != b.bucket for a, b in zip(one, other, strict=True)) <= len(COUNTS) - 1


def test_every_sample_comes_once_an_epoch_in_an_order_of_its_own() -> None:
    epochs = [[sample_at(3, epoch * 50 + position, 50) for position in range(50)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [sample_at(4, position, 50) for position in range(50)] != epochs[0]
    assert [sample_at(3, position, 50, bucket=1) for position in range(50)] != epochs[0]
    assert epochs[0] == [sample_at(3, position, 50) for position in range(50)]


@pytest.mark.parametrize("batch_size", [1, 2, 4, 5])
def test_over_some_epochs_every_sample_comes_as_often_and_no_bucket_gets_more_than_that_takes(batch_size: int) -> None:
    """What fills up a bucket's last batch of one epoch is left out of the next, so that nothing adds up."""
    for epochs in (1, 2, 7):
        config = RunConfig(epochs=epochs, batch_size=batch_size)
        seen: Counter[tuple[int, int]] = Counter()
        for number in range(config.total_steps(*COUNTS)):
            one = micro_batch_at(9, number, COUNTS, batch_size)
            seen.update((one.bucket, place) for place in one.positions)
        for bucket, count in enumerate(COUNTS):
            times = [seen[bucket, place] for place in range(count)]
            assert epochs <= min(times)
            assert max(times) - min(times) <= 1
            assert sum(times) == -(-epochs * count // batch_size) * batch_size


def test_epochs_are_counted_in_whole_passes_of_each_size() -> None:
    config = RunConfig(epochs=1, batch_size=4, gradient_accumulation_steps=2)
    assert config.total_steps(*COUNTS) == 4  # 1 + 5 + 1 passes
    assert config.total_steps(sum(COUNTS)) == 3  # of one size: 6 passes
    assert RunConfig(epochs=0.5, batch_size=4).total_steps(*COUNTS) == 3  # 1, 8 and none: 1 + 2 passes


def test_the_buckets_take_turns_in_another_order_each_epoch() -> None:
    turns = [[micro_batch_at(2, 21 * epoch + place, COUNTS, 1).bucket for place in range(21)] for epoch in range(3)]
    assert all(Counter(epoch) == {0: 3, 1: 17, 2: 1} for epoch in turns)
    assert all(one != other for one, other in pairwise(turns))


def test_a_bucket_smaller_than_a_batch_fills_it_with_its_next_rounds() -> None:
    one = next(one for number in range(20) if (one := micro_batch_at(0, number, (2, 9), 5)).bucket == 0)
    assert Counter(one.positions) in ({0: 3, 1: 2}, {0: 2, 1: 3})
