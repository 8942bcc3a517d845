"""``cogtune plan``: what a run needs, and the command that starts it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from cogtune.config.arrangement import Arrangement
from cogtune.config.run_config import RunConfig
from cogtune.data.sources import LayoutOptions, read_dataset
from cogtune.encoding.jobs import clips_by_size, frame_settings
from cogtune.models.checkpoint_configs import ModelSpec
from cogtune.planning.estimate import GIB, Estimate, estimate
from cogtune.planning.fit import GB, Hardware, problems
from cogtune.planning.measurements import recorded
from cogtune.run.folder import RunFolder
from cogtune.run.launch import LaunchFiles
from cogtune.run.plan import size_of
from cogtune.system.errors import CogtuneError

_USUAL_SAMPLES = 100
"""Assumed where there is no dataset to count."""

_UNMEASURED = "estimated only; no measurement of strategy {strategy} is recorded yet"

_PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations kept for the backward pass",
    "workspace": "workspace of a block and of libraries",
    "context": "CUDA and NCCL besides PyTorch",
}


@dataclass(frozen=True)
class RunEstimate:
    """What a run will take, and whether this machine has it."""

    config: RunConfig
    spec: ModelSpec
    machine: Hardware
    needs: Estimate
    counts: tuple[int, ...]
    """Samples at each training size."""
    counted: bool
    """Whether they were counted, not assumed."""
    launch: Path
    """The folder of its launch files."""

    @property
    def samples(self) -> int:
        """In the dataset."""
        return sum(self.counts)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.config.total_steps(*self.counts)

    @property
    def is_measured(self) -> bool:
        """Whether a run of this strategy was measured, so that the estimate's constants could be held to it."""
        strategy = self.config.strategy
        return not self.config.sharding.streams or any(row.config.strategy == strategy for row in recorded())

    @property
    def command(self) -> str:
        """The command that starts the run from its launch files."""
        return shlex.join(LaunchFiles(self.launch).command(self.config))

    @property
    def problems(self) -> list[str]:
        """Why this machine cannot make the run."""
        return problems(self.config, self.needs, self.machine)

    def rows(self) -> list[tuple[str, str]]:
        """Return what and how much, as the table shows it."""
        needs, config = self.needs, self.config
        rows = [(f"each GPU: {name}", f"{getattr(needs.memory, key) / GIB:.2f} GiB") for key, name in _PARTS.items()]
        if needs.arrangement is not None:
            rows.append(("each GPU: arrangement", self._arrangement(needs.arrangement)))
        assumed = "" if self.counted else " (assumed)"
        rows += [
            ("each GPU: PyTorch reserves", f"{needs.memory.reserved / GIB:.1f} GiB"),
            ("each GPU: all memory in use", f"{needs.memory.card / GB:.1f} GB of 10^9 bytes"),
            ("host memory of a machine", f"{needs.host / GIB:.0f} GiB"),
            *([] if self.is_measured else [("these figures", _UNMEASURED.format(strategy=config.strategy))]),
            ("disk: cache", f"{needs.cache_per_sample * self.samples / GB:.2f} GB for {self.samples} samples{assumed}"),
            ("disk: checkpoints", f"{self._checkpoints / GB:.2f} GB, {needs.checkpoint / GB:.2f} each"),
            ("size", str(size_of(config, self.spec))),
            ("optimizer steps", f"{self.steps:,} of {config.global_batch} samples"),
            ("time", self._time()),
            ("this machine", f"{self.machine}; {self.machine.host / GIB:.0f} GiB of host memory"),
            ("fits", self._fits()),
            ("command", self.command),
        ]
        return rows

    def _arrangement(self, arrangement: Arrangement) -> str:
        """Return the memory engine's arrangement and why it is this one."""
        words = arrangement.describe(self.spec.num_layers)
        if self.config.vram is None:
            return f"{words} (as given)"
        return f"{words} (the fastest by the estimate that fits {self.config.vram})"

    @property
    def _checkpoints(self) -> int:
        """Bytes of all that are on the disk at once: the newest is written before the oldest goes."""
        written = -(-self.steps // self.config.checkpoint_every)
        return self.needs.checkpoint * min(written, self.config.keep_checkpoints + 1)

    def _fits(self) -> str:
        return "no: " + "; ".join(self.problems) if self.problems else "yes"

    def _time(self) -> str:
        if self.needs.seconds is None:
            return "unknown for this machine; run `cogtune bench` to measure it"
        hours = self.needs.seconds * self.steps / 3600
        return f"about {self.needs.seconds:.2f} s per step, {hours:.1f} hours in total"

    def to_dict(self) -> dict[str, Any]:
        """Return the same for programs; sizes in bytes."""
        memory = {field.name: getattr(self.needs.memory, field.name) for field in fields(self.needs.memory)}
        return {
            "gpu_memory": memory | {"reserved": self.needs.memory.reserved, "card": self.needs.memory.card},
            "host_memory": self.needs.host,
            "measured": self.is_measured,
            "cache": self.needs.cache_per_sample * self.samples,
            "arrangement": self.needs.arrangement.to_dict() if self.needs.arrangement is not None else None,
            "checkpoint": self.needs.checkpoint,
            "checkpoints": self._checkpoints,
            "samples": self.samples,
            "steps": self.steps,
            "seconds_per_step": self.needs.seconds,
            "gpus": [gpu.name for gpu in self.machine.cards],
            "problems": self.problems,
            "command": self.command,
        }


def estimate_run(
    config: RunConfig, spec: ModelSpec, machine: Hardware, counts: Sequence[int] = (), launch: Path | None = None
) -> RunEstimate:
    """Return what a run will take.

    Args:
        counts: samples at each training size; counted when not given and the dataset is here.
        launch: the folder of its launch files; the one that a run makes when not given.
    """
    found = tuple(counts) or _count(config, spec)
    gpu = machine.cards[0].name if machine.cards else ""
    needs = estimate(config, spec, gpu=gpu)
    folder = launch or RunFolder(config.output).launch(config.machine_rank)
    return RunEstimate(config, spec, machine, needs, found or (_USUAL_SAMPLES,), bool(found), folder)


def _count(config: RunConfig, spec: ModelSpec) -> tuple[int, ...]:
    if not config.data.is_dir():
        return ()
    try:
        dataset = read_dataset(config.data, LayoutOptions(format=config.format))
        if config.buckets:
            return tuple(clips_by_size(dataset, frame_settings(config, spec)).values())
        return (len(dataset.samples),)
    except CogtuneError:  # what is wrong with it, `cogtune dataset validate` says
        return ()
