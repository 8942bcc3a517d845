"""The training loop: :func:`train` shows a step from top to bottom."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from cogtune.config.arrangement import Arrangement
from cogtune.config.run_config import RunConfig
from cogtune.data.batches import Batch, RankSampler, batches
from cogtune.data.cache.index import Index
from cogtune.data.cache.store import Store
from cogtune.run.checkpoints import checkpoints
from cogtune.system.errors import CogtuneError
from cogtune.training import checkpoint
from cogtune.training.checkpoint import TrainState
from cogtune.training.monitor import EvalSchedule, monitored
from cogtune.training.objective import NoiseDraws, Objective, pinned
from cogtune.training.optimizers import learning_rate_at


@dataclass(frozen=True, kw_only=True)
class Training:
    """Everything the loop needs."""

    train_state: TrainState
    objective: Objective
    store: Store
    index: Index
    config: RunConfig
    first_step: int
    total_steps: int
    facts: Mapping[str, Any]
    """Metadata saved with every checkpoint."""
    schedule: EvalSchedule
    should_stop: Callable[[], bool]
    """Returns whether to stop, the same in every process. Called after every step and during evaluation."""
    saves: bool = True
    """Whether to write checkpoints; a bench writes none."""
    arrangement: Arrangement | None = None
    """The memory engine's arrangement, if the run uses it."""
    most_graphs: int | None = None
    """Maximum number of graphs per block, if blocks are compiled; they are compiled when first needed."""


def train(run: Training) -> bool:
    """Train up to and including the last step's evaluation; return False if stopped before.

    Raises:
        CogtuneError: a loss or gradient is not finite, or a checkpoint cannot be written.
    """
    config, train_state, total = run.config, run.train_state, run.total_steps
    accelerator = train_state.accelerator
    share = RankSampler(
        seed=config.seed,
        batch_size=config.batch_size,
        accumulation=config.gradient_accumulation_steps,
        world_size=accelerator.num_processes,
        rank=accelerator.process_index,
    )
    rate = learning_rate_at(config, total)
    done = run.first_step

    def prepare(batch: Batch) -> tuple[Batch, NoiseDraws]:
        draws = run.objective.draw(batch)
        if accelerator.device.type == "cuda":
            return pinned(batch), pinned(draws)
        return batch, draws

    with (
        compiling(run.most_graphs),
        monitored(
            train_state, run.objective, run.store, config, run.schedule, first_step=done, should_stop=run.should_stop
        ) as watch,
    ):
        if not watch.before_training(done):
            return False
        train_state.model.train()
        for passes in batches(run.store, run.index, share, done, total, prepare):
            learning_rate = rate(done)
            train_state.set_learning_rate(learning_rate)
            loss = sum(_forward_backward(run, batch, draws, done) for batch, draws in passes) / len(passes)
            grad_norm = _update(train_state, config, [batch for batch, _ in passes], done)
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
    """Raise PyTorch's limit of 8 graphs per compiled function inside the context."""
    if most_graphs is None:
        yield
        return
    with torch._dynamo.config.patch(cache_size_limit=most_graphs):
        yield


def _save(run: Training, done: int) -> None:
    if run.saves:
        checkpoint.save(run.train_state, run.config, done, {**run.facts, "step": done})


def _forward_backward(run: Training, batch: Batch, draws: NoiseDraws, step: int) -> float:
    """Run one forward and backward pass; return the mean loss of its samples."""
    train_state, config = run.train_state, run.config
    with train_state.accelerator.accumulate(train_state.model):
        loss = run.objective.losses(train_state.model, batch, draws).mean()
        if train_state.is_zero:  # whose last backward pass updates the weights
            _refuse_not_finite(loss, batch, config, step)
        # Accelerate divides by the passes of a step before fp16 scales: what overflows on as many processes would not
        # here. The scale comes first, and _update divides.
        passes = train_state.accelerator.gradient_accumulation_steps if _scales_here(train_state) else 1
        train_state.accelerator.backward(loss * passes)
    return _refuse_not_finite(loss, batch, config, step)  # read late: it waits for the GPU


def _refuse_not_finite(loss: Tensor, batch: Batch, config: RunConfig, step: int) -> float:
    value = float(loss.detach())
    if not math.isfinite(value):
        raise _not_finite(f"the loss is {value}", batch.ids, config, step)
    return value


def _scales_here(train_state: TrainState) -> bool:
    """Return whether Accelerate's scaler scales the loss, for fp16. (DeepSpeed has its own, and divides first.)"""
    return not train_state.is_zero and train_state.accelerator.scaler is not None


def _update(train_state: TrainState, config: RunConfig, passes: Sequence[Batch], step: int) -> float:
    """Clip gradients, step the optimizer, clear gradients; return the norm before clipping.

    Raises:
        CogtuneError: the gradient is not finite, and no smaller loss scale could help. The step is not saved.
    """
    if train_state.is_zero:  # DeepSpeed did all of this in the last backward pass
        norm = float(train_state.model.get_global_grad_norm() or 0.0)
    elif train_state.streamed is not None:
        norm = train_state.streamed.step(config.max_grad_norm)
    else:
        trainable = [parameter for parameter in train_state.transformer.parameters() if parameter.requires_grad]
        if _scales_here(train_state) and len(passes) > 1:
            torch._foreach_div_([parameter.grad for parameter in trainable if parameter.grad is not None], len(passes))
        total = train_state.accelerator.clip_grad_norm_(trainable, config.max_grad_norm)
        train_state.optimizer.step()
        train_state.optimizer.zero_grad()
        if train_state.ema is not None:
            train_state.ema.update()
        norm = float(total)
    if not math.isfinite(norm) and _loss_scale(train_state) <= 1:
        mine = [sample for batch in passes for sample in batch.ids]  # the norm is that of all processes' samples
        raise _not_finite(f"the gradient norm is {norm}", gather_object(mine), config, step)
    return norm


def _loss_scale(train_state: TrainState) -> float:
    """Return the loss scale: with fp16, it is halved after each step that is not finite; else 1."""
    if train_state.is_zero:
        return float(train_state.model.optimizer.loss_scale)
    scaler = train_state.accelerator.scaler
    return 1.0 if scaler is None else float(scaler.get_scale())


def _not_finite(what: str, samples: Iterable[str], config: RunConfig, step: int) -> CogtuneError:
    start = "resume from an earlier checkpoint" if checkpoints(config.output) else "start over"
    return CogtuneError(
        f"step {step + 1}: {what}",
        f"{start} with a lower --learning-rate, or remove these samples",
        details=[f"sample {sample}" for sample in sorted(set(samples))],
    )
