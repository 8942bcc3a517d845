"""The loss at fixed noise: the same samples, noise and timesteps each time, so that values are comparable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from cogtune.data.batches import load_batch
from cogtune.data.cache.index import SampleKeys
from cogtune.data.cache.store import Store
from cogtune.training.objective import Objective

QUANTILES = (0.125, 0.375, 0.625, 0.875)
"""The evaluated timesteps: the middle of each quarter of the noise schedule."""

MOST_TRAINING_SAMPLES = 4
"""Number of training samples to evaluate; of the validation data it is ``validation_samples``."""


@dataclass(frozen=True)
class Evaluation:
    """Mean loss at fixed noise, overall and by timestep."""

    loss: float
    by_timestep: dict[int, float]


@torch.no_grad()
def evaluate(
    transformer: torch.nn.Module,
    objective: Objective,
    store: Store,
    samples: Sequence[SampleKeys],
    *,
    rank: int = 0,
    world_size: int = 1,
    before_each: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Measure the loss of ``samples`` at fixed noise and fixed timesteps.

    The work is divided over the processes, the same number of passes each, since under ZeRO-3 every forward
    pass needs all of them. The weights and the training state are not touched.

    Args:
        before_each: called before each pass, by all processes alike; an exception ends the evaluation.
    """
    timesteps = [int(quantile * objective.spec.num_train_timesteps) for quantile in QUANTILES]
    work = [(position, row, timestep) for position, row in enumerate(samples) for timestep in timesteps]
    sums = torch.zeros(2, len(timesteps), dtype=torch.float64, device=objective.device)
    was_training = transformer.training
    transformer.eval()
    try:
        for turn in range(-(-len(work) // world_size)):
            before_each()
            number = turn * world_size + rank
            position, row, timestep = work[number % len(work)]
            ordinal = -1 - position * len(timesteps) - timesteps.index(timestep)
            batch = load_batch(store, [row], (ordinal,))
            loss = objective.losses(transformer, batch, objective.draw(batch, [timestep]), training=False)[0]
            if number < len(work):
                sums[:, timesteps.index(timestep)] += torch.stack(
                    [loss.double(), torch.ones_like(loss, dtype=torch.float64)]
                )
    finally:
        transformer.train(was_training)
    if world_size > 1:
        torch.distributed.all_reduce(sums)
    means = (sums[0] / sums[1]).tolist()
    return Evaluation(sum(means) / len(means), dict(zip(timesteps, means, strict=True)))
