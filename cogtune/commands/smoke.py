"""``train --smoke``: a few steps of a run at its real size, to see within minutes whether all of it works."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from cogtune.commands.train import prepare_run, run_lock
from cogtune.config.resolving import Resolved
from cogtune.config.run_config import RunConfig
from cogtune.data.frames import FrameSettings, settings_for
from cogtune.data.sources import Dataset
from cogtune.data.video.clips import probe
from cogtune.encoding import jobs
from cogtune.models.geometry import Size
from cogtune.planning.fit import local_hardware
from cogtune.run import launch
from cogtune.run.folder import RunFolder
from cogtune.system.console import span
from cogtune.system.errors import UsageError
from cogtune.system.folders import remove_folder

"""Its folder in the run's output."""

STEPS = 3

_SMALL: dict[str, Any] = {
    "steps": STEPS,
    "epochs": None,
    "warmup_steps": 0,
    "checkpoint_every": STEPS,
    "keep_checkpoints": 1,
    "eval_every": STEPS,
    "validation_data": None,
    "sample_every": STEPS,
    "sample_epochs": None,
    "sample_steps": 4,
    "tracker": (),
}
"""Settings that differ from the run's own. None affects memory or the time of a step."""

GIB = 2**30


@dataclass(frozen=True)
class SmokeResult:
    """The results of a smoke test. Times in seconds."""

    size: Size
    first_step: float
    step: float
    """The median of the steps after the first."""
    peak_gib: float
    total: float
    """Total time, including encoding and loading."""
    real_steps: int
    """Steps of the full run."""
    checkpoint_bytes: int
    folder: Path

    def lines(self) -> list[str]:
        """Describe the results in lines of text."""
        cards = local_hardware().cards
        of = f" of {min(card.total for card in cards) / GIB:.1f}" if cards else ""
        return [
            f"smoke test passed in {span(self.total)}: {STEPS} steps at {self.size}, a checkpoint and a sample video",
            f"{self.step:.2f} s per step (first step {self.first_step:.2f} s), peak memory {self.peak_gib:.1f} GiB{of}",
            f"full run: {self.real_steps:,} steps, about {span(self.real_steps * self.step)} without evaluations "
            f"and sample videos; {self.checkpoint_bytes / 10**9:.2f} GB per checkpoint",
            f"the test's files are in {self.folder}; next, run the same command without --smoke",
        ]


def smoke(resolved: Resolved) -> SmokeResult:
    """Train on one clip for a few steps at its real size, then evaluate, save and sample, in a separate folder.

    Raises:
        CogtuneError: something that would have stopped the run, or the folder holds something else.
    """
    began = time.monotonic()
    whole = resolved.config.with_absolute_paths()
    config = whole.model_copy(update={**_SMALL, "output": RunFolder(whole.output).smoke})
    counts: dict[Size, int] = {}

    def one_clip(dataset: Dataset, settings: FrameSettings) -> Dataset:
        counts.update(jobs.clips_by_size(dataset, settings))
        return _largest(dataset, settings, max(counts, key=_volume))

    with run_lock(config.output):
        _clear(config.output)
        ready = prepare_run(
            replace(resolved, config=config), resume=None, overwrite=False, dry_run=False, only=one_clip
        )
        launch.start(ready.plan, ready.files)
        return _seen(config.output, whole, counts, total=time.monotonic() - began)


def _largest(dataset: Dataset, settings: FrameSettings, size: Size) -> Dataset:
    """Return the dataset reduced to the first sample trained at ``size``."""
    chosen = next(sample for sample in dataset.samples if settings_for(probe(sample.video), settings).size == size)
    return replace(dataset, samples=(chosen,))


def _volume(size: Size) -> int:
    return size.num_frames * size.height * size.width


def _clear(output: Path) -> None:
    """Delete what an earlier smoke test left.

    Raises:
        UsageError: the folder is not one of a smoke test.
    """
    there = [path for path in output.iterdir() if not path.name.startswith(".")]
    if there and not RunFolder(output).launch().is_dir():
        raise UsageError(f"{output} is not a smoke test's folder", "move it away, or choose another --output")
    for path in there:
        if path.is_dir():
            remove_folder(path)
        else:
            path.unlink()


def _seen(output: Path, whole: RunConfig, counts: dict[Size, int], *, total: float) -> SmokeResult:
    from cogtune.run.metrics import read_metrics

    steps: Sequence[dict[str, Any]] = [line for line in read_metrics(RunFolder(output).metrics) if "loss" in line]
    checkpoint = RunFolder(output).checkpoint(STEPS)
    return SmokeResult(
        size=max(counts, key=_volume),
        first_step=steps[0]["seconds"],
        step=median(line["seconds"] for line in steps[1:]),
        peak_gib=max(line["memory_gib"] for line in steps),
        total=total,
        real_steps=whole.total_steps(*counts.values()),
        checkpoint_bytes=sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()),
        folder=output,
    )
