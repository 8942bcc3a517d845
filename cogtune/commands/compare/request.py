"""What is asked of ``cogtune compare``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cogtune.models.variants import Precision, SamplingScheduler

BASE = "base"
"""The word for the base model among the things to compare."""

HELD_OUT = 4
"""Captions of the validation data that are sampled, unless the user says how many."""

UNRELATED = (
    "A cat sleeps on a windowsill in the afternoon sun.",
    "Waves roll onto a sandy beach under a cloudy sky.",
    "A busy street at night in the rain, with the lights of passing cars.",
)
"""Prompts that have nothing to do with anybody's training data, or with little of it."""


@dataclass(frozen=True, kw_only=True)
class CompareRequest:
    """What to compare, and how. None, or nothing, means: as the run or the model has it."""

    targets: tuple[str, ...]
    """Runs, checkpoints, LoRA files, adapters, full weights, Hub ids of LoRAs, and the word ``base``."""
    model: str | None = None
    lora_scales: tuple[float, ...] = ()
    prompts: tuple[str, ...] = ()
    images: tuple[Path, ...] = ()
    unrelated: tuple[str, ...] = ()
    held_out: int = HELD_OUT
    """Number of captions of the validation data."""
    data: Path | None = None
    """Training clips to compare with, in place of the run's."""
    clip: str | None = None
    """A CLIP model: a folder, or a Hub id that was downloaded before."""
    num_videos: int = 1
    seed: int = 42
    size: str | None = None
    frames: int | None = None
    fps: float | None = None
    steps: int = 50
    guidance: float = 6.0
    scheduler: SamplingScheduler | None = None
    precision: Precision | None = None
    vram: str | None = None
    output: Path | None = None
    """The folder for everything; by default ``compare`` in the first run's folder."""
