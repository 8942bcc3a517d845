"""What a run writes, and what it is watched by."""

from __future__ import annotations

import functools
from pathlib import Path

from pydantic import BaseModel, ValidationInfo, field_validator

from cogtune.config.choices import Tracker
from cogtune.config.fields import option

_saving = functools.partial(option, panel="Saving and evaluation")


class OutputFields(BaseModel):
    """Where the run is written, and what is kept of it."""

    output: Path = _saving(Path("out"), help_text="The run's folder.", tags=("machine", "untimed"))
    checkpoint_every: int = _saving(500, ge=1, help_text="Optimizer steps between checkpoints.", tags=("untimed",))
    keep_checkpoints: int = _saving(
        3, ge=1, help_text="How many of the newest checkpoints stay.", tags=("machine", "untimed")
    )


class EvaluationFields(BaseModel):
    """What the run is measured and watched by while it trains."""

    eval_every: int | None = _saving(
        None,
        ge=0,
        help_text="Steps between measurements of the loss at fixed noise; 0 for none. [default: with each checkpoint]",
        tags=("untimed",),
    )
    validation_data: Path | None = _saving(
        None,
        help_text="Clips and captions kept out of training, to measure the loss on too: a folder, or user/name on "
        "the Hub.",
        tags=("machine", "untimed"),
    )
    validation_samples: int = _saving(
        8,
        ge=1,
        help_text="How many samples of the validation data are measured, spread evenly over it.",
        tags=("untimed",),
    )
    validation_prompts: str | None = _saving(
        None,
        help_text="What the sample videos show: prompts with ::: between them, or a .txt file with one a line. "
        "[default: the first caption]",
        tags=("machine", "untimed"),
    )
    validation_images: str | None = _saving(
        None,
        help_text="First frames for image-to-video models, one for each prompt: files with ::: between them, or a "
        ".txt file of paths. [default: those of the first samples]",
        tags=("machine", "untimed"),
    )
    sample_every: int | None = _saving(
        None,
        ge=0,
        help_text="Steps between sample videos; 0 for none. [default: with each checkpoint where there are validation "
        "prompts, else none]",
        tags=("untimed",),
    )
    sample_epochs: float | None = _saving(
        None, gt=0, help_text="Passes over the data between sample videos, in place of steps.", tags=("untimed",)
    )
    sample_steps: int = _saving(50, ge=1, help_text="Denoising steps of a sample video.", tags=("untimed",))
    sample_guidance: float = _saving(
        6.0, ge=1, help_text="How closely a sample video follows its prompt.", tags=("untimed",)
    )
    tracker: tuple[Tracker, ...] = _saving(
        (),
        help_text="Show the run in tensorboard, wandb or trackio too, or in several; each is an extra of its name.",
        tags=("machine", "untimed"),
    )

    @field_validator("sample_epochs")
    @classmethod
    def _one_interval(cls, epochs: float | None, info: ValidationInfo) -> float | None:
        if epochs is not None and info.data.get("sample_every") is not None:
            raise ValueError("give sample_every or sample_epochs, not both")
        return epochs
