"""What a run writes, and how it is evaluated."""

from __future__ import annotations

import functools
from pathlib import Path

from pydantic import BaseModel, ValidationInfo, field_validator

from cogtune.config.choices import Tracker
from cogtune.config.fields import option

_saving = functools.partial(option, panel="Saving and evaluation")


class OutputFields(BaseModel):
    """Where a run is written, and which checkpoints are kept."""

    output: Path = _saving(Path("out"), help_text="Run folder.", tags=("machine", "untimed"))
    checkpoint_every: int = _saving(500, ge=1, help_text="Optimizer steps between checkpoints.", tags=("untimed",))
    keep_checkpoints: int = _saving(
        3, ge=1, help_text="Number of newest checkpoints to keep.", tags=("machine", "untimed")
    )


class EvaluationFields(BaseModel):
    """How a run is evaluated while it trains."""

    eval_every: int | None = _saving(
        None,
        ge=0,
        help_text="Steps between evaluations of the loss at fixed noise; 0 for none. [default: with each checkpoint]",
        tags=("untimed",),
    )
    validation_data: Path | None = _saving(
        None,
        help_text="Held-out clips and captions to evaluate the loss on: a folder, or user/name on the Hub.",
        tags=("machine", "untimed"),
    )
    validation_samples: int = _saving(
        8,
        ge=1,
        help_text="Number of validation samples to evaluate, spread evenly over the data.",
        tags=("untimed",),
    )
    validation_prompts: str | None = _saving(
        None,
        help_text="Prompts of the sample videos, separated by :::, or a .txt file with one per line. "
        "[default: the first caption]",
        tags=("machine", "untimed"),
    )
    validation_images: str | None = _saving(
        None,
        help_text="First frames for image-to-video models, one per prompt: files separated by :::, or a .txt file of "
        "paths. [default: those of the first samples]",
        tags=("machine", "untimed"),
    )
    sample_every: int | None = _saving(
        None,
        ge=0,
        help_text="Steps between sample videos; 0 for none. [default: with each checkpoint if there are validation "
        "prompts, else none]",
        tags=("untimed",),
    )
    sample_epochs: float | None = _saving(
        None, gt=0, help_text="Epochs between sample videos, instead of --sample-every.", tags=("untimed",)
    )
    sample_steps: int = _saving(50, ge=1, help_text="Denoising steps of a sample video.", tags=("untimed",))
    sample_guidance: float = _saving(
        6.0, ge=1, help_text="How closely a sample video follows its prompt.", tags=("untimed",)
    )
    tracker: tuple[Tracker, ...] = _saving(
        (),
        help_text="Also log to tensorboard, wandb or trackio, or several. Each requires the extra of that name.",
        tags=("machine", "untimed"),
    )

    @field_validator("sample_epochs")
    @classmethod
    def _one_interval(cls, epochs: float | None, info: ValidationInfo) -> float | None:
        if epochs is not None and info.data.get("sample_every") is not None:
            raise ValueError("cannot be used with sample_every")
        return epochs
