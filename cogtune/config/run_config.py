"""The configuration of a run: all of its settings."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

from pydantic import ConfigDict, ValidationInfo, field_validator

from cogtune.config.choices import SEPARATOR, parse_bytes
from cogtune.config.fields import Tag, tags_of
from cogtune.config.groups.data import DataFields, ModelFields, SampleFields
from cogtune.config.groups.machines import MachineFields
from cogtune.config.groups.optimizer import OptimizerFields, ScheduleFields
from cogtune.config.groups.output import EvaluationFields, OutputFields
from cogtune.config.groups.training import VRAM_OFF, LoraFields, MemoryFields, ObjectiveFields, TrainingFields
from cogtune.config.strategies import STRATEGIES, StrategyFacts
from cogtune.models.variants import StoredPrecision


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100 (resolve() would follow links, which may be moved later)


def is_list_file(value: str) -> bool:
    """Return whether prompts or images are given as a text file that lists them."""
    return SEPARATOR not in value and value.lower().endswith(".txt")


def _anchored_list(value: str, *, of_files: bool) -> str:
    """Return the same with absolute paths."""
    if is_list_file(value):
        return str(_absolute(Path(value)))
    return SEPARATOR.join(str(_absolute(Path(part.strip()))) for part in value.split(SEPARATOR)) if of_files else value


class RunConfig(
    # Pydantic puts the fields of the last base first.
    MachineFields,
    EvaluationFields,
    OutputFields,
    ScheduleFields,
    OptimizerFields,
    LoraFields,
    ObjectiveFields,
    MemoryFields,
    TrainingFields,
    SampleFields,
    DataFields,
    ModelFields,
):
    """All settings of a run. Its fields are the command line's flags and the keys of ``run.yaml``."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and {int, float} & {kind, *get_args(kind)}:
            raise ValueError(f"input should be a number, not {str(value).lower()}")
        return value

    @field_validator("image_noise", "vram", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any) -> Any:
        is_off = value is False or (isinstance(value, str) and value.strip().lower() == "off")
        return "off" if is_off else value  # YAML reads a bare `off` as false

    @field_validator("target_modules", "buckets", "tracker", mode="before")
    @classmethod
    def _split_at_commas(cls, value: Any) -> Any:
        parts = [value] if isinstance(value, str) else value
        if not isinstance(parts, (list, tuple)) or not all(isinstance(part, str) for part in parts):
            return value
        return tuple(name.strip() for part in parts for name in part.split(",") if name.strip())

    @property
    def sharding(self) -> StrategyFacts:
        """Facts about the run's strategy."""
        return STRATEGIES[self.strategy]

    @property
    def cache_folder(self) -> Path:
        """The folder for encoded clips and captions."""
        return self.cache_dir or self.default_cache_folder

    @property
    def default_cache_folder(self) -> Path:
        """The cache folder without ``cache_dir``."""
        return self.data / ".cogtune"

    def compiles_blocks(self, *, on_gpu: bool = True) -> bool:
        """Return whether the transformer's blocks are compiled.

        By default on a GPU, unless ZeRO-3 gathers every weight by hooks, which break a graph apart.
        """
        return self.compile if self.compile is not None else on_gpu and not self.sharding.shards_weights

    @property
    def lora_alpha(self) -> float:
        """Alpha with its default, the rank."""
        return float(self.rank if self.alpha is None else self.alpha)

    @property
    def timestep_bounds(self) -> tuple[int, int] | None:
        """The lowest and the highest timestep to train on; None for all."""
        if self.timestep_range is None:
            return None
        low, high = map(int, self.timestep_range.split(","))
        return low, high

    @property
    def image_noise_log(self) -> tuple[float, float] | None:
        """Mean and deviation of the log of the conditioning images' noise; None for no noise."""
        if self.image_noise == "off":
            return None
        mean, deviation = map(float, self.image_noise.split(","))
        return mean, deviation

    @property
    def uses_engine(self) -> bool:
        """Whether the memory engine runs the transformer's blocks: under ``stream``, or with any option of it set."""
        return self.sharding.streams or any(getattr(self, key) not in (None, VRAM_OFF) for key in tagged("engine"))

    @property
    def may_use_engine(self) -> bool:
        """Whether the memory engine can run the transformer's blocks."""
        return self.sharding.streams or (self.type == "lora" and self.strategy == "ddp")

    @property
    def is_arranged_by_hand(self) -> bool:
        """Whether it is set what the memory engine keeps where."""
        given = (self.stream_blocks, self.keep_activations, self.keep_everything, self.offload_activations)
        return any(value is not None for value in given)

    @property
    def stored_precision(self) -> StoredPrecision | None:
        """The format in which host memory holds the base model's weights, if it is not that of :attr:`precision`."""
        return self.base_precision if self.base_precision in ("int8", "nf4") else None

    @property
    def vram_bytes(self) -> int | None:
        """The run's budget of each GPU's memory; None for no limit."""
        return None if self.vram in (None, VRAM_OFF) else parse_bytes(self.vram)

    @property
    def host_memory_bytes(self) -> int | None:
        """The run's budget of host memory; None for what is free."""
        return None if self.host_memory is None else parse_bytes(self.host_memory)

    @property
    def local_processes(self) -> int:
        """Processes on each machine."""
        return self.num_processes // self.num_machines

    @property
    def global_batch(self) -> int:
        """Samples in one optimizer step, over all processes and accumulation steps."""
        return self.batch_size * self.gradient_accumulation_steps * self.num_processes

    def total_steps(self, *counts: int) -> int:
        """Return the run's optimizer steps for a dataset with ``counts`` samples of each size.

        A forward pass works on samples of one size, and the last one of an epoch is filled up.
        """
        return self.steps if self.epochs is None else self._steps_of(self.epochs, counts)

    def _steps_of(self, epochs: float, counts: Iterable[int]) -> int:
        passes = sum(-(-int(epochs * count) // self.batch_size) for count in counts)
        return max(1, -(-passes // (self.gradient_accumulation_steps * self.num_processes)))

    @property
    def eval_interval(self) -> int:
        """Optimizer steps between evaluations; 0 for none."""
        return self.checkpoint_every if self.eval_every is None else self.eval_every

    def sample_interval(self, *counts: int) -> int:
        """Return the optimizer steps between sample videos, 0 for none; ``counts`` as for :meth:`total_steps`."""
        if self.sample_epochs is not None:
            return self._steps_of(self.sample_epochs, counts)
        if self.sample_every is not None:
            return self.sample_every
        return self.checkpoint_every if self.validation_prompts else 0

    def with_absolute_paths(self) -> RunConfig:
        """Return a copy with absolute local paths, valid from any working folder."""
        paths: dict[str, Any] = {key: _absolute(getattr(self, key)) for key in ("data", "output")}
        paths["cache_dir"] = _absolute(self.cache_folder)
        if self.init_lora is not None:
            paths["init_lora"] = _absolute(self.init_lora)
        if self.quarantine is not None:
            paths["quarantine"] = _absolute(self.quarantine)
        if self.validation_data is not None:
            paths["validation_data"] = _absolute(self.validation_data)
        for key in ("validation_prompts", "validation_images"):
            if (value := getattr(self, key)) is not None:
                paths[key] = _anchored_list(value, of_files=key == "validation_images")
        if Path(self.model).is_dir():
            paths["model"] = str(_absolute(Path(self.model)))
        return self.model_copy(update=paths)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-able values, in order."""
        return self.model_dump(mode="json")


def tagged(tag: Tag) -> tuple[str, ...]:
    """Return the names of the fields with a tag, in order."""
    return tuple(name for name, field in RunConfig.model_fields.items() if tag in tags_of(field))
