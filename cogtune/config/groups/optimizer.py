"""The optimizer and the schedule of its learning rate."""

from __future__ import annotations

import functools
import re

from pydantic import BaseModel, ValidationInfo, field_validator

from cogtune.config.choices import LrScheduler
from cogtune.config.fields import option
from cogtune.config.optimizers import OPTIMIZERS, USUAL_RATE, OptimizerName

*_SOME, _LAST = (name for name, facts in OPTIMIZERS.items() if not facts.package)  # those that come with torch

_optimizer = functools.partial(option, panel="Optimizer")

_NUMBER = r"\d+(?:\.\d+)?(?:e-?\d+)?"


class OptimizerFields(BaseModel):
    """The optimizer and its options."""

    optimizer: OptimizerName = _optimizer(
        "adamw",
        help_text=f"Optimizer. All but {', '.join(_SOME)} and {_LAST} require the extra `optimizers`.",
        tags=("resume",),
    )
    learning_rate: float = _optimizer(USUAL_RATE, gt=0, help_text="Peak learning rate. The default for prodigy is 1.")
    beta1: float = _optimizer(0.9, ge=0, lt=1, help_text="Decay of the running average of gradients.", tags=("resume",))
    beta2: float = _optimizer(
        0.95, ge=0, lt=1, help_text="Decay of the running average of squared gradients.", tags=("resume",)
    )
    beta3: float | None = _optimizer(
        None,
        ge=0,
        lt=1,
        help_text="Third decay rate, for came and prodigy. [default: 0.9999 for came, √beta2 for prodigy]",
        tags=("resume",),
    )
    epsilon: float = _optimizer(
        1e-8, gt=0, help_text="Added to the denominator of an update; came has its own.", tags=("resume",)
    )
    weight_decay: float = _optimizer(
        1e-4,
        ge=0,
        help_text="Weight decay, decoupled and scaled by the learning rate; adam adds it to the gradient.",
        tags=("resume",),
    )
    prodigy_decouple: bool = _optimizer(
        True, help_text="Prodigy: decoupled weight decay, as in AdamW.", tags=("resume",)
    )
    prodigy_bias_correction: bool = _optimizer(
        True, help_text="Prodigy: bias correction of the running averages.", tags=("resume",)
    )
    prodigy_safeguard_warmup: bool = _optimizer(
        True, help_text="Prodigy: leave the warm-up's small rates out of the step size estimate.", tags=("resume",)
    )
    max_grad_norm: float = _optimizer(1.0, gt=0, help_text="Maximum gradient norm.")
    ema: float | None = _optimizer(
        None,
        gt=0,
        lt=1,
        help_text="Decay of a moving average of the trained weights, such as 0.999; it is evaluated, sampled and saved "
        "as well as the weights. [default: no average]",
    )


class ScheduleFields(BaseModel):
    """The learning rate schedule."""

    lr_scheduler: LrScheduler = _optimizer(
        "constant_with_warmup", help_text="Learning rate schedule.", tags=("untimed",)
    )
    warmup_steps: int = _optimizer(
        0, ge=0, help_text="Optimizer steps over which the learning rate rises from 0.", tags=("untimed",)
    )
    lr_cycles: int = _optimizer(1, ge=1, help_text="Number of cycles of cosine_with_restarts.", tags=("untimed",))
    lr_power: float = _optimizer(
        1.0, gt=0, help_text="Power of the polynomial schedule; 1 is linear.", tags=("untimed",)
    )
    lr_pieces: str | None = _optimizer(
        None,
        help_text="For piecewise_constant: 1:100,0.1:200,0.01 is the full rate up to step 100, a tenth up to step 200, "
        "then a hundredth.",
        tags=("untimed",),
    )

    @field_validator("warmup_steps")
    @classmethod
    def _warmup_ends(cls, warmup: int, info: ValidationInfo) -> int:
        steps = info.data.get("steps")
        if steps is not None and info.data.get("epochs") is None and warmup >= steps:
            raise ValueError(
                f"{warmup} must be less than the run's {steps} steps, or the learning rate never reaches its peak"
            )
        return warmup

    @field_validator("lr_pieces")
    @classmethod
    def _pieces_read(cls, text: str | None) -> str | None:
        if text is None:
            return None
        if not re.fullmatch(rf"({_NUMBER}:\d+,)+{_NUMBER}", text):
            raise ValueError(f"'{text}' is not a list of pieces; write FACTOR:STEP,...,FACTOR, such as 1:100,0.1")
        ends = [int(piece.split(":")[1]) for piece in text.split(",")[:-1]]
        if ends != sorted(set(ends)):
            raise ValueError(f"'{text}': the steps must be increasing")
        return text
