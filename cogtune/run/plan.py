"""RunConfig to Plan: everything resolved, plain JSON, nothing secret."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from cogtune.config.compatibility import problems_of_training
from cogtune.config.launchers import ZERO2_SHARDS
from cogtune.config.resolving import Resolved
from cogtune.config.run_config import RunConfig, tagged
from cogtune.models.checkpoint_configs import ModelSpec
from cogtune.models.geometry import Size, video_tokens
from cogtune.run.checkpoints import checkpoints, stamp
from cogtune.system.errors import CogtuneError, UsageError
from cogtune.system.json_files import read_json

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the processes of a run work from. Written to ``launch/plan.json``."""

    config: RunConfig
    provenance: Mapping[str, str]
    base_model_dir: Path
    """Local folder of the base model."""
    spec: ModelSpec
    size: Size
    fps: float
    samples: int
    buckets: Mapping[str, int]
    """How many of them are trained at each size."""
    prompt: str
    """The first sample's caption, with which the finished weights are tried."""
    total_steps: int
    index: Path
    """The cache index that names every sample's entries."""
    validation: Path | None
    """The same for the samples of the validation data; None without any."""
    prompts: Path | None
    """The prompts of the sample videos with their entries; None for a run that makes none."""
    resume_fingerprint: Mapping[str, Any]
    """What must be equal for a resumed run to be the same run."""
    resume: Path | None
    overwrite: bool
    """Whether checkpoints behind the run's first step may be deleted."""
    replaces: Mapping[str, str]
    """The checkpoints that stood in the output folder when a new run was planned there, each with its stamp."""
    init_lora: Mapping[str, Any] | None = None
    """Name and digest of the LoRA that the run began with, if it did."""

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-able values."""
        return {
            "format": FORMAT,
            "config": self.config.to_dict(),
            "provenance": dict(self.provenance),
            "checkpoint": str(self.base_model_dir),
            "spec": self.spec.to_dict(),
            "size": str(self.size),
            "fps": self.fps,
            "samples": self.samples,
            "buckets": dict(self.buckets),
            "prompt": self.prompt,
            "total_steps": self.total_steps,
            "tokens": self.tokens,
            "index": str(self.index),
            "validation": str(self.validation) if self.validation else None,
            "prompts": str(self.prompts) if self.prompts else None,
            "identity": dict(self.resume_fingerprint),
            "resume": str(self.resume) if self.resume else None,
            "overwrite": self.overwrite,
            "began_with": dict(self.init_lora) if self.init_lora else None,
            "replaces": dict(self.replaces),
        }

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Return the plan saved at ``path``.

        Raises:
            CogtuneError: there is none, another version of cogtune wrote it, or it was changed to what is no plan.
        """
        value = read_json(path)
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise CogtuneError(f"{path} was written by another version of cogtune", "run `cogtune train` again")
        try:
            saved = _Saved.model_validate(value)
            return cls(
                config=RunConfig.model_validate(saved.config),
                provenance=saved.provenance,
                base_model_dir=Path(saved.checkpoint),
                spec=TypeAdapter(ModelSpec).validate_json(json.dumps(saved.spec), strict=True),
                size=Size.parse(saved.size),
                fps=saved.fps,
                samples=saved.samples,
                buckets=saved.buckets,
                prompt=saved.prompt,
                total_steps=saved.total_steps,
                index=Path(saved.index),
                validation=Path(saved.validation) if saved.validation else None,
                prompts=Path(saved.prompts) if saved.prompts else None,
                resume_fingerprint=saved.identity,
                resume=Path(saved.resume) if saved.resume else None,
                overwrite=saved.overwrite,
                init_lora=saved.began_with,
                replaces=saved.replaces,
            )
        except ValidationError as error:
            said = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_url=False)]
            raise CogtuneError(f"{path} is not a valid plan", "run `cogtune train` again", details=said) from error
        except ValueError as error:
            raise CogtuneError(f"{path} is not a valid plan: {error}", "run `cogtune train` again") from error

    @property
    def tokens(self) -> int:
        """Video tokens of one sample, of the largest size."""
        return video_tokens(self.size, self.spec.patch_size, self.spec.patch_size_t)


class _Saved(BaseModel):
    """How a plan stands in its file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: int
    config: dict[str, Any]
    provenance: dict[str, str]
    checkpoint: str
    spec: dict[str, Any]
    size: str
    fps: float
    samples: int
    buckets: dict[str, int]
    prompt: str
    total_steps: int
    tokens: int
    index: str
    validation: str | None
    prompts: str | None
    identity: dict[str, Any]
    resume: str | None
    overwrite: bool
    began_with: dict[str, Any] | None = None
    replaces: dict[str, str]
    checksum: str = ""


def check_config(config: RunConfig, spec: ModelSpec) -> None:
    """Reject what the model or this machine does not support.

    Raises:
        UsageError: with every reason.
    """
    problems = [f"precision {problem}" for problem in spec.precision_problems(config.precision)]
    problems += problems_of_training(config, spec)
    for size in sizes_of(config, spec):
        of_size = spec.bucket_problems(size) if config.buckets else spec.size_problems(size)
        problems += [f"size {size}: {problem}" for problem in of_size]
    if config.num_processes < config.sharding.fewest_processes:
        problems.append(f"strategy {config.strategy} shards weights over GPUs and requires num_processes of 2 or more")
    problems += [
        f"tracker {name} is not installed; run `pip install 'cogtune[{name}]'`"
        for name in config.tracker
        if importlib.util.find_spec(name) is None
    ]
    if config.sharding.uses_deepspeed and importlib.util.find_spec("deepspeed") is None:
        problems.append(
            f"strategy {config.strategy} requires DeepSpeed, which is not installed (it has builds only for Linux on "
            "x86-64: `pip install deepspeed`); strategy ddp does not need it"
        )
    if problems:
        raise UsageError("invalid configuration", details=problems)


def advice(config: RunConfig, spec: ModelSpec) -> list[str]:
    """Return what is legal about a run's sizes but unlike what the model was trained on."""
    return [f"size {told}" for size in sizes_of(config, spec) for told in spec.size_advice(size)]


def sizes_of(config: RunConfig, spec: ModelSpec) -> tuple[Size, ...]:
    """Return the sizes to train at: the buckets, else the configured size, else the model's own."""
    if config.buckets:
        return tuple(Size.parse(text) for text in config.buckets)
    size = Size.parse(config.size) if config.size else spec.native
    return (replace(size, num_frames=config.frames or size.num_frames),)


def size_of(config: RunConfig, spec: ModelSpec) -> Size:
    """Return the size to train at, or the largest of them: the one with the most tokens, and of equals the first."""
    return max(sizes_of(config, spec), key=lambda size: video_tokens(size, spec.patch_size, spec.patch_size_t))


def fps_of(config: RunConfig, spec: ModelSpec) -> float:
    """Return frames per second to take from clips: the configured rate, else the model's own."""
    return config.fps if config.fps is not None else float(spec.variant.fps)


def resume_fingerprint(config: RunConfig, *, base: str, data: str) -> dict[str, Any]:
    """Return what must be equal for a resumed run to be the same run, by name.

    Args:
        base: fingerprint of the base model's transformer.
        data: digest of the cache index.
    """
    values = config.to_dict()
    fingerprint = {key: values[key] for key in tagged("resume")}
    fingerprint |= {
        "alpha": config.lora_alpha,
        "samples per step": config.global_batch,
        "model": base,
        "data": data,
    }
    fingerprint |= {key: values[key] for key in ("ema", "base_precision") if values[key] is not None}
    if config.sharding.uses_deepspeed:  # ZeRO shards belong to a number of processes
        fingerprint["num_processes"] = config.num_processes
    if config.sharding.streams:  # each process has a share of the state, in its format
        fingerprint |= {key: values[key] for key in ("num_processes", "master_weights", "moments")}
    if config.sharding.zero_stage == 2:
        fingerprint["shards"] = ZERO2_SHARDS
    return fingerprint


def make_plan(
    resolved: Resolved,
    *,
    base_model_dir: Path,
    spec: ModelSpec,
    samples: int,
    buckets: Mapping[Size, int] | None = None,
    prompt: str,
    index: Path,
    fingerprint: Mapping[str, Any],
    resume: Path | None,
    validation: Path | None = None,
    prompts: Path | None = None,
    overwrite: bool = False,
    init_lora: Mapping[str, Any] | None = None,
) -> Plan:
    """Return everything a run needs, resolved.

    Args:
        buckets: how many samples are trained at each size; by default all of them at one.

    Raises:
        UsageError: the warm-up is longer than the run.
    """
    config = resolved.config
    counts = buckets or {size_of(config, spec): samples}
    total = config.total_steps(*counts.values())
    if config.epochs is not None and config.warmup_steps >= total:
        raise UsageError(
            f"warmup_steps: {config.warmup_steps} must be less than the {total} steps of {config.epochs:g} epochs, "
            "or the learning rate never reaches its peak",
            "use fewer --warmup-steps or more --epochs",
        )
    return Plan(
        config=config,
        provenance=resolved.provenance,
        base_model_dir=base_model_dir,
        spec=spec,
        size=size_of(config, spec),
        fps=fps_of(config, spec),
        samples=samples,
        buckets={str(size): counts[size] for size in sorted(counts)},
        prompt=prompt,
        total_steps=total,
        index=index,
        validation=validation,
        prompts=prompts,
        resume_fingerprint=fingerprint,
        resume=resume,
        overwrite=overwrite,
        init_lora=init_lora,
        replaces={path.name: stamp(path) for path in checkpoints(config.output)} if resume is None else {},
    )
