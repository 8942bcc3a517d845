"""What was measured of presets, on which GPU, when, with what, and by which command: rows of ``measurements.json``."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from cogtune.config.arrangement import Arrangement
from cogtune.config.resolving import resolve
from cogtune.config.run_config import RunConfig
from cogtune.system.errors import CogtuneError
from cogtune.system.files import os_errors_explained, write_text

FILE = Path(__file__).with_name("measurements.json")
"""The recorded measurements, one JSON object a line."""

GIB = 2**30
GB = 10**9

Recipe = Literal["preset", "plain"]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One run of ``cogtune bench``. Memory is the peak from the start of the processes on; GB are 10^9 bytes."""

    preset: str | None
    changes: Mapping[str, Any]
    """Configuration keys that were set beside the preset."""
    recipe: Recipe
    """``plain``: the guides' recipe in place of the preset's: base loaded in fp32, eager, full checkpointing."""
    gpu: str
    """Name of the GPUs, as the driver gives it; ``cpu`` without."""
    gpus: int
    """Of the run: one for each process."""
    alone: bool = False
    """Whether one of the processes alone was there, on one GPU, and what it sent to the others went nowhere."""
    reserved_gib: tuple[float, ...]
    """PyTorch's reserved memory of each process."""
    allocated_gib: tuple[float, ...]
    """What PyTorch handed out of it, of each process."""
    start_gib: tuple[float, ...] = ()
    """PyTorch's reserved memory before the first step, of each process."""
    card_gb: float | None = None
    """All memory in use on the fullest GPU."""
    host_gib: float | None = None
    """Memory of all processes together that cannot be dropped."""
    host_rise_gib: float | None = None
    """By how much the memory in use on the whole machine rose."""
    cgroup_gib: float | None = None
    """The control group's own peak, page cache included."""
    step_s: float
    """Median of the steps after warm-up."""
    step_s_range: tuple[float, float] | None = None
    tokens_per_s: float | None = None
    """Video and text tokens, all GPUs together."""
    first_step_s: float | None = None
    start_s: float | None = None
    """From the launch to the first step's beginning."""
    date: str = ""
    versions: Mapping[str, str]
    command: str
    arrangement: Mapping[str, Any] | None = None
    """Of the memory engine (the fields of :class:`cogtune.config.arrangement.Arrangement`), where the run used it."""
    retries: int | None = None
    """How often PyTorch had to free memory it had kept, and wait for the GPU, to get more: each takes time."""

    @property
    def config(self) -> RunConfig:
        """The configuration that was measured."""
        changes = {**self.changes, "num_processes": self.gpus}
        return resolve(preset_name=self.preset, flags=changes).config

    @property
    def planned(self) -> Arrangement | None:
        """The memory engine's arrangement, where the run used it."""
        return None if self.arrangement is None else Arrangement.from_dict(self.arrangement)

    @property
    def place(self) -> str:
        """On what it was measured, such as ``4 x H200``, or ``1 of 8 x H200``."""
        return f"{'1 of ' if self.alone else ''}{self.gpus} x {self.gpu.removeprefix('NVIDIA ')}"

    @property
    def whole_card(self) -> str:
        """What was in use on the fullest GPU, such as ``21.1 GB``; empty where it was not measured."""
        return "" if self.card_gb is None else f"{self.card_gb:.1f} GB{' without NCCL' if self.alone else ''}"

    @property
    def peak_gib(self) -> float:
        """PyTorch's reserved memory on the fullest GPU."""
        return max(self.reserved_gib)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-able values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Measurement:
        """Return a measurement of :meth:`to_dict`'s values.

        Raises:
            TypeError: a field is missing or unknown.
        """
        tuples = ("reserved_gib", "allocated_gib", "start_gib", "step_s_range")
        fields: dict[str, Any] = {key: tuple(v) if key in tuples and v else v for key, v in value.items()}
        return cls(**fields)


def read(path: Path = FILE) -> tuple[Measurement, ...]:
    """Return the measurements in a file of ``cogtune bench --json``, or of one JSON object a line.

    Raises:
        CogtuneError: it cannot be read, or holds something else.
    """
    with os_errors_explained(path, "read"):
        text = path.read_text(encoding="utf-8")
    try:
        values = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
        return tuple(Measurement.from_dict(value) for value in values)
    except (ValueError, TypeError) as error:
        raise CogtuneError(
            f"{path} contains no measurements: {error}", "pass a file written by `cogtune bench --json`"
        ) from error


@functools.cache
def recorded() -> tuple[Measurement, ...]:
    """Return the measurements that come with cogtune."""
    return read()


def of_preset(name: str, rows: Sequence[Measurement]) -> Measurement | None:
    """Return the measurement of a preset as it is, on the most GPUs, and of those the latest; None when there is none.

    One process without the others counts where no whole run was measured; so does a run of another preset whose
    changes make the same configuration of it.
    """
    whole = [row for row in rows if row.preset == name and row.recipe == "preset" and not row.changes]
    if not whole:
        same = resolve(preset_name=name).config
        whole = [row for row in rows if row.recipe == "preset" and row.changes and row.config == same]
    return max(whole, key=lambda row: (not row.alone, row.gpus, row.date), default=None)


def add(new: Sequence[Measurement], path: Path = FILE) -> int:
    """Record measurements, each in place of an earlier one of the same run; how many there are now."""
    rows = {_key(row): row for row in (*read(path), *new)}
    order = sorted(rows.values(), key=lambda row: (row.preset or "", row.gpus, row.recipe, row.command))
    write_text(path, "".join(json.dumps(row.to_dict()) + "\n" for row in order))
    return len(order)


def _key(row: Measurement) -> str:
    return json.dumps([row.preset, dict(row.changes), row.recipe, row.gpu, row.gpus, row.alone], sort_keys=True)
