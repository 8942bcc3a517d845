"""Monitoring a run: metrics of every step, losses at fixed noise, sample videos; written and displayed."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from cogtune.config.run_config import RunConfig
from cogtune.data.cache.index import SampleKeys
from cogtune.data.cache.store import Store
from cogtune.modeling.devices import gib_in_use
from cogtune.run.comparison import Sign, SignName
from cogtune.run.folder import RunFolder
from cogtune.run.metrics import WINDOW, MetricsFile, MovingAverage, read_metrics
from cogtune.run.sample_videos import step_folder
from cogtune.system import console
from cogtune.system.errors import CogtuneError
from cogtune.system.out_of_memory import is_out_of_memory, out_of_memory
from cogtune.training.checkpoint import TrainState
from cogtune.training.evaluate import evaluate
from cogtune.training.objective import Objective
from cogtune.training.sample_signs import SIGNS
from cogtune.training.sample_videos import ValidationVideos, render_validation_videos
from cogtune.training.trackers import TrackedVideo, Trackers

EMA_PREFIX = "ema_"
"""In ``metrics.jsonl``, before the name of a loss of the weights' moving average."""

_OF = {
    "validation_loss": "on the validation data",
    "ema_eval_loss": "of the average",
    "ema_validation_loss": "of the average on the validation data",
}

_LOOKS: Mapping[SignName, str] = {
    "no effect": "as before training",
    "too strong": "distorted",
    "frozen": "frozen",
    "burnt": "burnt",
    "memorised": "memorised",
    "forgot": "as if the base were forgotten",
}
"""How sample videos with a sign look, in words."""


@dataclass(frozen=True, kw_only=True)
class EvalSchedule:
    """What is evaluated, and how often."""

    measured: Mapping[str, tuple[SampleKeys, ...]]
    """The samples whose loss at fixed noise is evaluated, by its name in ``metrics.jsonl``."""
    eval_every: int
    """Optimizer steps between evaluations; 0 for none."""
    validation_videos: ValidationVideos | None
    sample_every: int
    """Optimizer steps between sample videos; 0 for none."""
    total_steps: int
    after_each: Callable[[], None] = lambda: None
    """Called in this process after each evaluation and each round of sample videos."""
    new_signs_at: Callable[[int], Sequence[Sign]] = lambda _step: ()
    """Returns the signs of a problem in the sample videos of a step that were not told before."""

    def evaluates_at(self, step: int) -> bool:
        """Return whether the losses at fixed noise are evaluated at ``step``."""
        return self._is_due(self.eval_every, step)

    def samples_at(self, step: int) -> bool:
        """Return whether sample videos are made at ``step``."""
        return self.validation_videos is not None and self._is_due(self.sample_every, step)

    def _is_due(self, every: int, step: int) -> bool:
        return every > 0 and (step % every == 0 or step == self.total_steps)


class _Stopped(Exception):
    """The run was asked to stop while it was being evaluated."""


class TrainMonitor:
    """Evaluates a run and reports on it. Every process makes the same calls; only the main one prints and writes.

    Made by :func:`monitored`.
    """

    def __init__(
        self,
        train_state: TrainState,
        objective: Objective,
        store: Store,
        config: RunConfig,
        schedule: EvalSchedule,
        metrics: MetricsFile,
        line: console.Dashboard,
        trackers: Trackers,
        should_stop: Callable[[], bool],
    ) -> None:
        self._train_state, self._objective, self._store, self._config = train_state, objective, store, config
        self._eval_schedule, self._metrics, self._line, self._trackers = schedule, metrics, line, trackers
        self._should_stop = should_stop
        self._loss, self._pace = MovingAverage(WINDOW), MovingAverage(WINDOW)
        self._evaluated: dict[str, float] = {}
        """The last losses at fixed noise, by their names in ``metrics.jsonl``."""
        self._began = time.perf_counter()

    def before_training(self, step: int) -> bool:
        """Do what is due at the run's first step, unless it was done before.

        Collective, like all evaluation; returns False if the run was asked to stop before it was done.
        """
        output, names = self._config.output, self._eval_schedule.measured
        for line in read_metrics(RunFolder(output).metrics):
            if line["step"] == step:
                self._evaluated |= {name: line[name] for name in names if name in line}
        measured = self._evaluated.keys() == names.keys()
        sampled = step_folder(output, step).is_dir()
        return (self._as_on_main(measured) or self.evaluate(step)) and (self._as_on_main(sampled) or self.sample(step))

    def step(self, done: int, *, loss: float, grad_norm: float, learning_rate: float) -> None:
        """Write and display the metrics of an optimizer step."""
        now = time.perf_counter()
        seconds, self._began = now - self._began, now
        memory = gib_in_use(self._train_state.accelerator.device)
        values = {"loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate}
        values |= {"seconds": round(seconds, 4), "memory_gib": round(memory, 3)}
        self._metrics.write({"step": done, **values})
        self._trackers.log(values, done)
        pace = self._pace.add(seconds)
        figures = {
            "loss": f"{self._loss.add(loss):.4f}",
            **{name.removesuffix("_loss"): f"{value:.4f}" for name, value in self._evaluated.items()},
            "grad": f"{grad_norm:.3g}",
            "lr": f"{learning_rate:.2e}",
            "s/step": f"{pace:.2f}",
            "clips/s": f"{self._config.global_batch / pace:.2f}",
            "GiB": f"{memory:.1f}",
        }
        self._line.advance(figures, seconds_left=(self._eval_schedule.total_steps - done) * pace)

    def evaluate(self, step: int) -> bool:
        """Evaluate the losses at fixed noise if that is due.

        Raises:
            CogtuneError: one is not finite.
        """
        return not self._eval_schedule.evaluates_at(step) or self._finishes(self._evaluate, step)

    def sample(self, step: int) -> bool:
        """Make the sample videos if that is due.

        Raises:
            CogtuneError: a video cannot be written.
        """
        return not self._eval_schedule.samples_at(step) or self._finishes(self._sample, step)

    def _finishes(self, look: Callable[[int], None], step: int) -> bool:
        try:
            look(step)
        except _Stopped:
            console.note(f"step {step}: stopping; this evaluation will be done when the run is resumed")
            return False
        self._eval_schedule.after_each()
        self.rest()
        return True

    def rest(self) -> None:
        """Restart the step timer, so that a checkpoint's time does not count as the next step's."""
        self._began = time.perf_counter()

    def _doing(self, words: str) -> None:
        self._line.doing(words)
        if self._should_stop():
            raise _Stopped

    def _evaluate(self, step: int) -> None:
        values = self._measure(step, "")
        if self._train_state.averages:
            with self._train_state.averaged():
                values |= self._measure(step, EMA_PREFIX)
        self._metrics.write({"step": step, **values})
        told = [f"{self._evaluated['eval_loss']:.4f}"]
        told += [f"{value:.4f} {_OF[name]}" for name, value in self._evaluated.items() if name in _OF]
        console.note(f"step {step}: loss at fixed noise {', '.join(told)}")

    def _measure(self, step: int, prefix: str) -> dict[str, Any]:
        """Measure the losses at fixed noise of the current weights; their names get ``prefix``."""
        accelerator = self._train_state.accelerator
        values: dict[str, Any] = {}
        for kind, rows in self._eval_schedule.measured.items():
            name = f"{prefix}{kind}"
            found = evaluate(
                self._train_state.model,
                self._objective,
                self._store,
                rows,
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
                before_each=partial(self._doing, f"evaluating the {name.replace('_', ' ')}"),
            )
            if not math.isfinite(found.loss):
                raise CogtuneError(
                    f"step {step}: the loss at fixed noise is {found.loss}; training has diverged",
                    "resume from an earlier checkpoint, or start over, with a lower --learning-rate",
                )
            values |= {name: found.loss, f"{name}_by_timestep": found.by_timestep}
            self._evaluated[name] = found.loss
            by_timestep = {f"{name}/timestep {timestep}": loss for timestep, loss in found.by_timestep.items()}
            self._trackers.log({name: found.loss, **by_timestep}, step)
        return values

    def _sample(self, step: int) -> None:
        assert self._eval_schedule.validation_videos is not None
        try:
            videos = render_validation_videos(
                self._train_state, self._eval_schedule.validation_videos, step, self._doing
            )
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory(
                error,
                "use --sample-every 0 to train without them; `cogtune infer --vram` samples checkpoints in less memory",
                doing=f"making the sample videos of step {step}",
            ) from error
        counted = "a sample video" if len(videos) == 1 else f"{len(videos)} sample videos"
        folder = step_folder(self._config.output, step)
        console.note(f"step {step}: {counted} in {folder}")
        fps = self._eval_schedule.validation_videos.fps
        if self._train_state.accelerator.is_main_process:
            self._tell_signs(step)
        self._trackers.show([TrackedVideo(video["prompt"], folder / video["file"], fps) for video in videos], step)

    def _tell_signs(self, step: int) -> None:
        """Warn of signs of a problem in the sample videos; a failure to look for them is only a warning."""
        try:
            signs = self._eval_schedule.new_signs_at(step)
        except Exception as error:  # videos that cannot be measured must never stop a run
            console.warn(f"cannot measure the sample videos: {error}")
            return
        for sign in signs:
            told = f"the sample videos look {_LOOKS[sign.name]}: {sign.why}; to change it, {sign.advice}"
            console.warn(f"step {step}: {told}")
        if signs:
            self._metrics.write({"step": step, SIGNS: [sign.name for sign in signs]})

    def _as_on_main(self, seen: bool) -> bool:
        """Return a value read from the run's folder by the main process; other machines may not see that folder."""
        accelerator = self._train_state.accelerator
        mine = torch.tensor(float(seen and accelerator.is_main_process), device=accelerator.device)
        total: torch.Tensor = accelerator.reduce(mine, "sum")
        return bool(total > 0)


@contextlib.contextmanager
def monitored(
    train_state: TrainState,
    objective: Objective,
    store: Store,
    config: RunConfig,
    schedule: EvalSchedule,
    *,
    first_step: int,
    should_stop: Callable[[], bool],
) -> Iterator[TrainMonitor]:
    """Monitor a run from ``first_step`` on.

    Args:
        should_stop: called by all processes during evaluation, as after every step; True ends it.
    """
    is_main = train_state.accelerator.is_main_process
    with (
        MetricsFile(RunFolder(config.output).metrics, first_step=first_step, enabled=is_main) as metrics,
        Trackers(config, first_step=first_step, enabled=is_main) as trackers,
        console.dashboard("training", schedule.total_steps, done=first_step) as line,
    ):
        yield TrainMonitor(train_state, objective, store, config, schedule, metrics, line, trackers, should_stop)
