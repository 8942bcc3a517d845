"""The VRAM table of the fine-tuning guides as rows: hardware, model, training type, strategy.

Each row is a preset of the name ``hardware-type-model[-i2v][-strategy]``. Where the guides name a GPU that
cannot hold their own figure, the row names one that can.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from cogtune.config.strategies import Strategy
from cogtune.models.geometry import Size
from cogtune.models.variants import VARIANTS, Precision
from cogtune.system.errors import UsageError, did_you_mean

TrainingType = Literal["lora", "sft"]

CARDS_GB: dict[str, int] = {
    "6gb": 6,
    "8gb": 8,
    "12gb": 12,
    "16gb": 16,
    "24gb": 24,
    "4080": 16,
    "4090": 24,
    "5090": 32,
    "a100": 80,
}
"""Memory of each GPU the presets are named after, in GB of 10^9 bytes, as GPUs are sold."""

_TYPE_VALUES: dict[TrainingType, dict[str, Any]] = {
    "lora": {"rank": 128, "learning_rate": 1e-4},
    "sft": {"learning_rate": 2e-5},
}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One row: a run's initial settings, and the memory the guides promise for it."""

    name: str
    card: str
    gpus: int
    model: str
    """Short name of the variant (a key of ``models.VARIANTS``) or a reference such as ``tiny:2b``."""
    type: TrainingType
    strategy: Strategy
    precision: Precision
    size: Size
    promised_gb: float | None
    """Peak of all memory in use that the guides promise, GB of 10^9 bytes; None for a preset not in their table."""
    more: tuple[tuple[str, Any], ...] = ()
    """Further configuration keys, which override the training type's."""

    def values(self) -> dict[str, Any]:
        """Return the configuration keys this preset sets, with their values."""
        shared: dict[str, Any] = {
            "model": VARIANTS[self.model].hub_id if self.model in VARIANTS else self.model,
            "type": self.type,
            "strategy": self.strategy,
            "num_processes": self.gpus,
            "precision": self.precision,
            "size": str(self.size),
            **_TYPE_VALUES[self.type],
        }
        return shared | dict(self.more)


def _row(
    card: str,
    type: TrainingType,  # noqa: A002 (the field's name)
    model: str,
    promised_gb: float,
    strategy: Strategy = "ddp",
    gpus: int = 1,
    precision: Precision | None = None,
    vram: int | None = None,
) -> Preset:
    """Return a row of the guides' table; ``vram`` is its budget in GB, no more than any other trainer promises."""
    row = VARIANTS[model]
    engine = (("vram", f"{vram}GB"),) if vram is not None else ()
    hardware = card if gpus == 1 else f"{gpus}x{card}"
    tail = "" if strategy == "ddp" else f"-{strategy}"
    return Preset(
        name=f"{hardware}-{type}-{model}{tail}",
        card=card,
        gpus=gpus,
        model=model,
        type=type,
        strategy=strategy,
        precision=precision or row.trained_in,
        size=row.native,
        promised_gb=promised_gb,
        more=engine,
    )


_TABLE: tuple[Preset, ...] = (
    _row("4080", "lora", "2b", 16, vram=12),
    _row("4090", "lora", "5b", 24, vram=24),
    _row("4090", "lora", "5b-i2v", 24, vram=24),
    _row("a100", "lora", "1.5-5b", 35, vram=32),
    _row("a100", "lora", "1.5-5b-i2v", 35, vram=32),
    _row("a100", "sft", "2b", 36),
    _row("4090", "sft", "2b", 17, "zero2-offload"),
    _row("4090", "sft", "2b", 17, "zero2", 8),
    _row("4090", "sft", "2b", 19, "zero3", 8),
    _row("4080", "sft", "2b", 14, "zero3-offload", 8, "bf16"),
    _row("a100", "sft", "5b", 42, "zero2-offload"),
    _row("a100", "sft", "5b-i2v", 42, "zero2-offload"),
    _row("a100", "sft", "5b", 42, "zero2", 8),
    _row("a100", "sft", "5b-i2v", 42, "zero2", 8),
    _row("a100", "sft", "5b", 43, "zero3", 8),
    _row("a100", "sft", "5b-i2v", 43, "zero3", 8),
    _row("5090", "sft", "5b", 28, "zero3-offload", 8),
    _row("5090", "sft", "5b-i2v", 28, "zero3-offload", 8),
    _row("a100", "sft", "1.5-5b", 56, "zero2-offload"),
    _row("a100", "sft", "1.5-5b-i2v", 56, "zero2-offload"),
    _row("a100", "sft", "1.5-5b", 55, "zero2", 8),
    _row("a100", "sft", "1.5-5b-i2v", 55, "zero2", 8),
    _row("a100", "sft", "1.5-5b", 55, "zero3", 8),
    _row("a100", "sft", "1.5-5b-i2v", 55, "zero3", 8),
    _row("a100", "sft", "1.5-5b", 40, "zero3-offload", 8),
    _row("a100", "sft", "1.5-5b-i2v", 40, "zero3-offload", 8),
)


def _budget(
    card: str,
    model: str,
    type: TrainingType = "lora",  # noqa: A002 (the field's name)
) -> Preset:
    """Return a run on any GPU of a size, by the memory engine."""
    row = VARIANTS[model]
    is_lora = type == "lora"
    return Preset(
        name=f"{card}-{type}-{model}",
        card=card,
        gpus=1,
        model=model,
        type=type,
        strategy="ddp" if is_lora else "stream",
        precision=row.trained_in if is_lora else "bf16",
        size=row.native,
        promised_gb=None,
        more=(("vram", f"{CARDS_GB[card]}GB"),),
    )


_BUDGETS: tuple[Preset, ...] = (
    _budget("6gb", "2b"),
    _budget("8gb", "5b"),
    _budget("8gb", "5b-i2v"),
    _budget("16gb", "1.5-5b"),
    _budget("16gb", "1.5-5b-i2v"),
    _budget("12gb", "2b", "sft"),
    _budget("12gb", "5b", "sft"),
    _budget("12gb", "5b-i2v", "sft"),
    _budget("24gb", "1.5-5b", "sft"),
    _budget("24gb", "1.5-5b-i2v", "sft"),
)
"""Presets for GPUs smaller than those of the table, at the models' own sizes. Those of type sft and
16gb-lora-1.5-5b-i2v are not measured."""


def _trial(training_type: TrainingType, *more: tuple[str, Any]) -> Preset:
    return Preset(
        name=f"cpu-{training_type}-tiny",
        card="cpu",
        gpus=1,
        model="tiny:2b",
        type=training_type,
        strategy="ddp",
        precision="fp32",
        size=Size(9, 64, 96),
        promised_gb=None,
        more=(("steps", 20), ("learning_rate", 1e-3), ("checkpoint_every", 10), *more),
    )


_TRIAL: tuple[Preset, ...] = (_trial("lora", ("rank", 8)), _trial("sft"))
"""Presets for trials without a GPU or a download, with a random model of a few megabytes."""

PRESETS: dict[str, Preset] = {row.name: row for row in (*_TABLE, *_BUDGETS, *_TRIAL)}
"""All presets by name: the 26 rows of the table, those for smaller GPUs, and those for trials on a CPU."""


def preset(name: str, others: Iterable[str] = ()) -> Preset:
    """Return the preset called ``name``.

    Args:
        others: further names to suggest for a typo.

    Raises:
        UsageError: it does not exist; the message suggests the nearest name.
    """
    try:
        return PRESETS[name.lower()]
    except KeyError:
        raise UsageError(
            f"unknown preset '{name}'{did_you_mean(name, [*PRESETS, *others])}",
            "run `cogtune presets` to list all presets",
        ) from None
