"""The names of files that cogtune writes to the folder of a run or cache.

For their places in a run's folder, see :class:`cogtune.run.folder.RunFolder`.
"""

from __future__ import annotations

import re

# A run's folder.
RUN_YAML = "run.yaml"
METRICS = "metrics.jsonl"
REPORT = "report.html"
LAUNCH = "launch"
DRY_RUN = "dry-run"
LOGS = "logs"
SAMPLES = "samples"
CHECKPOINT = "checkpoint-"
SMOKE = "smoke"
COMPARISON = "compare"

# In the folders of launch files, of a checkpoint, of a step's sample videos, of merged weights.
PLAN = "plan.json"
MACHINE = "machine.json"
TRACKERS = "trackers.json"
CLIPS = "clips.json"
STATE = "state.json"
SAMPLES_LIST = "samples.json"
MERGE = "merge.json"

# A cache.
FACTS = "files.json"
JOB = "job"
MEDIA = "media"
DATASETS = "datasets"
ENTRIES = ("latents", "text", "image")

TRACKER_FOLDERS = ("tensorboard", "trackio", "wandb")

CHECKPOINT_NAME = re.compile(rf"{CHECKPOINT}(\d+)")
STEP_NAME = re.compile(r"step-(\d+)")
"""The folder of a step's sample videos."""

LAUNCH_NAME = re.compile(rf"{LAUNCH}(-.+)?|{DRY_RUN}")
