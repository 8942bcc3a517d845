"""A request to sample with everything filled in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cogtune.commands.infer.request import Row
from cogtune.config.arrangement import SamplingArrangement
from cogtune.data.frames import ClipView
from cogtune.modeling.lora_files import Lora
from cogtune.models.checkpoint_configs import ModelSpec
from cogtune.models.geometry import Size
from cogtune.models.variants import FrozenPrecision, Precision, SamplingScheduler
from cogtune.planning.sampling_memory import SamplingTask


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """A request with everything filled in."""

    name: str
    """What the user calls the base model."""
    base: Path
    transformer: Path | None
    """A folder of fine-tuned weights in place of the base's own."""
    loras: tuple[tuple[Lora, float], ...]
    """Each with its weight."""
    spec: ModelSpec
    rows: tuple[Row, ...]
    negative_prompt: str
    size: Size
    views: Mapping[Path, ClipView]
    """What is taken of each clip that videos are made of."""
    fps: float
    precision: Precision
    base_precision: FrozenPrecision | None
    text_encoder_precision: FrozenPrecision | None
    scheduler: SamplingScheduler
    steps: int
    guidance: float
    strength: float
    seeds: Sequence[int]
    scales: tuple[float, ...]
    arrangement: SamplingArrangement
    room: int | None
    """Bytes of the GPU that PyTorch may take; all that is free when None."""

    @property
    def task(self) -> SamplingTask:
        """What decides the memory that sampling takes."""
        adapters = sum(pair.down.numel() + pair.up.numel() for lora, _ in self.loras for pair in lora.pairs.values())
        return SamplingTask(self.spec, self.size, self.precision, adapters, self.base_precision == "fp8")
