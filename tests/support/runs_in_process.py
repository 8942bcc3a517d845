"""Training in the test's own process: the real worker on a real plan, without the seconds that launching takes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

from accelerate.state import AcceleratorState, GradientState, PartialState

from cogtune.commands import train
from cogtune.config.resolving import resolve
from cogtune.encoding import jobs
from cogtune.encoding import worker as encoding
from cogtune.run.launch import LaunchFiles
from cogtune.run.plan import Plan
from cogtune.training import setup, worker
from cogtune.training.loop import Training
from cogtune.training.setup import set_up

EVALUATED_SAMPLES = 1
"""Training samples that an evaluation measures; with the program's own four, it takes longer than most tests' steps."""


class Stop:
    """Asks to stop after so many questions."""

    def __init__(self, after: int | None = None) -> None:
        self.after, self.asked = after, 0

    def begins(self) -> None: ...

    def __bool__(self) -> bool:
        self.asked += 1
        return self.after is not None and self.asked >= self.after


def fill_here(job: jobs.EncodePlan) -> list[dict[str, Any]]:
    """Stands in for :func:`cogtune.encoding.jobs.fill_cache`: the same job, done in this process."""
    outcome = encoding.encode(replace(job, options=jobs.EncodeOptions(workers=0)), Stop())  # type: ignore[arg-type]
    assert outcome.complete
    assert not outcome.failures
    return [asdict(outcome)]


def plan_for(data: Path, output: Path, *, resume: str | None = None, overwrite: bool = False, **flags: Any) -> Plan:
    """The plan of a run on a tiny model."""
    settings = {"data": data, "output": output, "checkpoint_every": 100, **flags}
    resolved = resolve(preset_name="cpu-lora-tiny", flags=settings)
    return train.prepare_run(resolved, resume=resume, overwrite=overwrite, dry_run=False).plan


def forget_earlier_runs() -> None:
    """Let accelerate take up another precision than an earlier run of this process had."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


class StopWhen:
    """Asks a run to stop once something is so."""

    def __init__(self, condition: Callable[[], bool]) -> None:
        self.condition = condition

    def begins(self) -> None: ...

    def __bool__(self) -> bool:
        return self.condition()


@contextlib.contextmanager
def few_evaluated() -> Iterator[None]:
    """Let runs measure only :data:`EVALUATED_SAMPLES`."""
    with mock.patch.object(setup, "MOST_TRAINING_SAMPLES", EVALUATED_SAMPLES):
        yield


def set_up_here(plan: Plan) -> Training:
    """What a run of this process works with."""
    forget_earlier_runs()
    with few_evaluated():
        return set_up(plan, lambda: False)


def train_here(
    plan: Plan, *, stop_after: int | None = None, stop_when: Callable[[], bool] = lambda: False
) -> list[dict[str, Any]]:
    """Run the plan; the lines of its ``metrics.jsonl``.

    Args:
        stop_after: the step after which the run is asked to stop.
        stop_when: as often as the run asks, whether it is.
    """

    def asked() -> bool:
        return stop_when() or (stop_after is not None and is_done(plan.config.output, stop_after))

    forget_earlier_runs()
    with few_evaluated():
        worker.run(plan, LaunchFiles(plan.config.output / "launch"), StopWhen(asked))  # type: ignore[arg-type]
    return read_lines(plan.config.output)


def is_done(output: Path, step: int) -> bool:
    """Whether a run has done a step."""
    return any("loss" in line and line["step"] >= step for line in read_lines(output))


def read_lines(output: Path) -> list[dict[str, Any]]:
    """What a run measured, without what differs from time to time."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "memory_gib")} for line in lines]


def evaluations(lines: list[dict[str, Any]]) -> dict[int, float]:
    """The loss at fixed noise by step."""
    return {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}


def start_here(plan: Plan, files: LaunchFiles, *_worker: str, **_more: object) -> None:
    """Stands in for :func:`cogtune.run.launch.start`: the run, done in this process."""
    forget_earlier_runs()
    files.report(0).write("running")
    with few_evaluated():
        worker.run(Plan.read(files.plan), files, StopWhen(lambda: False))  # type: ignore[arg-type]
