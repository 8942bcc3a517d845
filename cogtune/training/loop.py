"""The training loop: a step is read from top to bottom in :func:`train`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object

from cogtune.config.arrangement import Arrangement
from cogtune.config.run_config import RunConfig
from cogtune.data.batches import Batch, RankSampler, batches
from cogtune.data.cache.index import Index
from cogtune.data.cache.store import Store
from cogtune.run.checkpoints import checkpoints
from cogtune.system.errors import CogtuneError
from cogtune.training import checkpoint
from cogtune.training.checkpoint import TrainState
from cogtune.training.objective import Objective
from cogtune.training.optimizers import learning_rate_at
from cogtune.training.watch import EvalSchedule, monitored


@dataclass(frozen=True, kw_only=True)
class Training:
    """All that the loop works with."""

    trainee: TrainState
    objective: Objective
    store: Store
    index: Index
    config: RunConfig
    first_step: int
    total_steps: int
    facts: Mapping[str, Any]
    """What is saved with every checkpoint."""
    plans: EvalSchedule
    should_stop: Callable[[], bool]
    """Asked after every step and while the run is looked at, by every process; the same answer for all."""
    saves: bool = True
    """Whether checkpoints are written; a bench writes none."""
    arrangement: Arrangement | None = None
    """Of the memory engine, where the run uses it."""
    most_graphs: int | None = None
    """Graphs that a block may be compiled to, where blocks are compiled: as the steps meet it, not before them."""


def train(run: Training) -> bool:
    """Train up to the last step and do what is due there; False when asked to stop before that was done.

    Raises:
        CogtuneError: a loss or gradient is not finite, or a checkpoint cannot be written.
    """
    config, trainee, total = run.config, run.trainee, run.total_steps
    accelerator = trainee.accelerator
    share = RankSampler(
        seed=config.seed,
        batch_size=config.batch_size,
        accumulation=config.gradient_accumulation_steps,
        world_size=accelerator.num_processes,
        rank=accelerator.process_index,
    )
    rate = learning_rate_at(config, total)
    done = run.first_step

    with (
        compiling(run.most_graphs),
        monitored(
            trainee, run.objective, run.store, config, run.plans, first_step=done, should_stop=run.should_stop
        ) as watch,
    ):
        if not watch.look_before(done):
            return False
        trainee.model.train()
        for passes in batches(run.store, run.index, share, done, total):
            learning_rate = rate(done)
            for group in trainee.optimizer.param_groups:
                group["lr"] = learning_rate
            loss = sum(_forward_backward(run, batch, done) for batch in passes) / len(passes)
            grad_norm = _update(trainee, config, passes, done)
            done += 1

            loss = float(accelerator.reduce(torch.tensor(loss, device=accelerator.device), "mean"))
            watch.step(done, loss=loss, grad_norm=grad_norm, learning_rate=learning_rate)

            stop = (done < total and run.should_stop()) or not watch.evaluate(done)
            if due := done % config.checkpoint_every == 0 or done == total:
                _save(run, done)
                watch.rest()
            if stop or not watch.sample(done):
                if not due:
                    _save(run, done)
                return False
    return True


@contextlib.contextmanager
def compiling(most_graphs: int | None) -> Iterator[None]:
    """Let PyTorch, which gives up at 8, compile a function to so many graphs while the block runs."""
    if most_graphs is None:
        yield
        return
    with torch._dynamo.config.patch(cache_size_limit=most_graphs):
        yield


def _save(run: Training, done: int) -> None:
    if run.saves:
        checkpoint.save(run.trainee, run.config, done, {**run.facts, "step": done})


def _forward_backward(run: Training, batch: Batch, step: int) -> float:
    """One forward and backward pass; the mean loss of its samples."""
    trainee, config = run.trainee, run.config
    with trainee.accelerator.accumulate(trainee.model):
        loss = run.objective.losses(trainee.model, batch).mean()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise _not_finite(f"the loss is {value}", batch.ids, config, step)
        # Accelerate divides by the passes of a step before fp16 scales: what overflows on as many processes would not
        # here. The scale comes first, and _update divides.
        passes = trainee.accelerator.gradient_accumulation_steps if _scales_here(trainee) else 1
        trainee.accelerator.backward(loss * passes)
    return value


def _scales_here(trainee: TrainState) -> bool:
    """Whether the loss is scaled by accelerate's scaler, for fp16. (DeepSpeed has its own, and divides first.)"""
    return not trainee.is_zero and trainee.accelerator.scaler is not None


def _update(trainee: TrainState, config: RunConfig, passes: Sequence[Batch], step: int) -> float:
    """Clip, let the optimizer step, clear the gradients; the norm before clipping.

    Raises:
        CogtuneError: the gradient is not finite and no smaller loss scale could help. Nothing is saved of such a step.
    """
    if trainee.is_zero:  # DeepSpeed did all of it in the last backward pass
        norm = float(trainee.model.get_global_grad_norm() or 0.0)
    else:
        trainable = [parameter for parameter in trainee.transformer.parameters() if parameter.requires_grad]
        if _scales_here(trainee) and len(passes) > 1:
            torch._foreach_div_([parameter.grad for parameter in trainable if parameter.grad is not None], len(passes))
        norm = float(trainee.accelerator.clip_grad_norm_(trainable, config.max_grad_norm))
        trainee.optimizer.step()
        trainee.optimizer.zero_grad()
    if not math.isfinite(norm) and _loss_scale(trainee) <= 1:
        mine = [sample for batch in passes for sample in batch.ids]  # the norm is that of all processes' samples
        raise _not_finite(f"the gradient norm is {norm}", gather_object(mine), config, step)
    return norm


def _loss_scale(trainee: TrainState) -> float:
    """What the next loss is multiplied by: under fp16, half as much after each step that was not finite; else 1."""
    if trainee.is_zero:
        return float(trainee.model.optimizer.loss_scale)
    scaler = trainee.accelerator.scaler
    return 1.0 if scaler is None else float(scaler.get_scale())


def _not_finite(what: str, samples: Iterable[str], config: RunConfig, step: int) -> CogtuneError:
    start = "resume from an earlier checkpoint" if checkpoints(config.output) else "start anew"
    return CogtuneError(
        f"step {step + 1}: {what}",
        f"{start} with a lower --learning-rate, or take these samples out",
        details=[f"sample {sample}" for sample in sorted(set(samples))],
    )
