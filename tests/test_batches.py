"""Which samples are in which step: the same for any number of processes, and after any resume."""

from __future__ import annotations

import pytest

from cogtune.data.batches import Share, sample_at


def order(world_size: int, batch_size: int, accumulation: int, steps: int) -> list[list[int]]:
    """The ordinals of each step, over all processes and passes."""
    shares = [
        Share(seed=1, batch_size=batch_size, accumulation=accumulation, world_size=world_size, rank=rank)
        for rank in range(world_size)
    ]
    return [
        sorted(n for share in shares for micro in range(accumulation) for n in share.ordinals(step, micro))
        for step in range(steps)
    ]


@pytest.mark.parametrize(("world", "batch", "accumulation"), [(1, 8, 1), (2, 4, 1), (2, 2, 2), (8, 1, 1), (4, 1, 2)])
def test_a_step_has_the_same_samples_however_they_are_shared_out(world: int, batch: int, accumulation: int) -> None:
    assert order(world, batch, accumulation, 3) == [list(range(8)), list(range(8, 16)), list(range(16, 24))]


def test_every_sample_comes_once_an_epoch_in_an_order_of_its_own() -> None:
    epochs = [[sample_at(3, epoch * 50 + position, 50) for position in range(50)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [sample_at(4, position, 50) for position in range(50)] != epochs[0]
    assert epochs[0] == [sample_at(3, position, 50) for position in range(50)]
