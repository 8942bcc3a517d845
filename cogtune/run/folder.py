"""A run's folder: every name in it, in one place.

```text
out/
  run.yaml                                the configuration, with where each value came from
  launch/                                 what `accelerate launch` reads, and how each process is (run.launch)
  logs/launch.log, logs/tensorboard/      what libraries print, trackers
  metrics.jsonl                           a line for each step and evaluation
  samples/step-000500/                    videos, and samples.json, which says what they show (run.sample_videos)
  checkpoint-500/                         weights, optimizer, state.json (run.checkpoints)
  pytorch_lora_weights.safetensors        the finished LoRA
  ema/pytorch_lora_weights.safetensors    the moving average of its weights, with --ema
  report.html
  compare/                                videos, figures and page of `cogtune compare` (run.comparison)
  smoke/                                  the same of a trial run
```
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cogtune.models.variants import LORA_WEIGHTS_NAME
from cogtune.system import names

RUN_NAME = names.RUN_YAML
AVERAGE_NAME = "ema"
"""In a checkpoint, and beside a finished LoRA: the folder of the moving average of the weights."""
MERGE_NAME = names.MERGE
"""In a folder of merged weights: what they were merged from."""


def step_of_checkpoint(folder: Path) -> int | None:
    """Return the step in a checkpoint folder's name; None when it is not called like one."""
    match = names.CHECKPOINT_NAME.fullmatch(folder.absolute().name)
    return int(match[1]) if match else None


@dataclass(frozen=True)
class RunFolder:
    """The paths in a run's folder; none of them need exist."""

    root: Path

    @property
    def run_yaml(self) -> Path:
        """The configuration."""
        return self.root / names.RUN_YAML

    def launch(self, machine_rank: int = 0) -> Path:
        """Return the folder of launch files; each machine of a run has one of its own."""
        return self.root / (f"{names.LAUNCH}-{machine_rank}" if machine_rank else names.LAUNCH)

    @property
    def plan(self) -> Path:
        """The plan that the main machine launched."""
        return self.launch() / names.PLAN

    @property
    def machine(self) -> Path:
        """What the run was made on and with."""
        return self.launch() / names.MACHINE

    @property
    def logs(self) -> Path:
        """The folder of logs and of trackers' files."""
        return self.root / names.LOGS

    @property
    def metrics(self) -> Path:
        """A line for each step and evaluation."""
        return self.root / names.METRICS

    @property
    def samples(self) -> Path:
        """The folder of sample videos, one folder for each step."""
        return self.root / names.SAMPLES

    @property
    def lora(self) -> Path:
        """The finished LoRA."""
        return self.root / LORA_WEIGHTS_NAME

    @property
    def averaged_lora(self) -> Path:
        """The moving average of its weights."""
        return self.root / AVERAGE_NAME / LORA_WEIGHTS_NAME

    @property
    def page(self) -> Path:
        """The run's report."""
        return self.root / names.REPORT

    @property
    def comparison(self) -> Path:
        """The folder of `cogtune compare`."""
        return self.root / names.COMPARISON

    @property
    def smoke(self) -> Path:
        """The folder of a trial run."""
        return self.root / names.SMOKE

    def checkpoint(self, step: int) -> Path:
        """Return the checkpoint of a step."""
        return self.root / f"{names.CHECKPOINT}{step}"

    def checkpoint_folders(self) -> list[tuple[int, Path]]:
        """List steps and folders named like a checkpoint, complete or not, in order."""
        found = ((step_of_checkpoint(path), path) for path in self.root.glob(f"{names.CHECKPOINT}*"))
        return sorted((step, path) for step, path in found if step is not None)

    @property
    def is_run(self) -> bool:
        """Whether a run was started here."""
        return self.run_yaml.is_file() or self.plan.is_file()


def run_folder(weights: Path) -> Path | None:
    """Return the run's folder of a file or folder of weights: the folder itself or its parent; None if neither is."""
    place = weights.absolute() if weights.is_dir() else weights.absolute().parent
    if RunFolder(place).run_yaml.is_file():
        return place
    if RunFolder(place.parent).run_yaml.is_file() and RunFolder(place.parent).launch().is_dir():
        return place.parent
    return None
