"""The optimizer and the schedule of its learning rate."""

from __future__ import annotations

import functools
import re

from pydantic import BaseModel, ValidationInfo, field_validator

from cogtune.config.choices import LrScheduler
from cogtune.config.fields import option
from cogtune.config.optimizers import USUAL_RATE, OptimizerName

_optimizer = functools.partial(option, panel="Optimizer")

_NUMBER = r"\d+(?:\.\d+)?(?:e-?\d+)?"


class OptimizerFields(BaseModel):
    """What moves the weights."""

    optimizer: OptimizerName = _optimizer(
        "adamw",
        help_text="What moves the weights; all but adamw, adam and adamw-offload need the extra `optimizers`.",
        tags=("resume",),
    )
    learning_rate: float = _optimizer(
        USUAL_RATE, gt=0, help_text="Peak learning rate; where prodigy is chosen and no rate beside it, 1."
    )
    beta1: float = _optimizer(0.9, ge=0, lt=1, help_text="Decay of the gradients' average.", tags=("resume",))
    beta2: float = _optimizer(0.95, ge=0, lt=1, help_text="Decay of the squared gradients' average.", tags=("resume",))
    beta3: float | None = _optimizer(
        None,
        ge=0,
        lt=1,
        help_text="The third decay of came and prodigy. [default: 0.9999 for came, √beta2 for prodigy]",
        tags=("resume",),
    )
    epsilon: float = _optimizer(
        1e-8, gt=0, help_text="Added to the denominator of a step; came has its own.", tags=("resume",)
    )
    weight_decay: float = _optimizer(
        1e-4,
        ge=0,
        help_text="How much weights shrink, as a share of the learning rate; adam adds it to the gradient.",
        tags=("resume",),
    )
    prodigy_decouple: bool = _optimizer(
        True, help_text="Prodigy: weight decay as in AdamW, apart from the gradient.", tags=("resume",)
    )
    prodigy_bias_correction: bool = _optimizer(
        True, help_text="Prodigy: correct the averages' bias towards zero.", tags=("resume",)
    )
    prodigy_safeguard_warmup: bool = _optimizer(
        True, help_text="Prodigy: keep a warm-up's small rates out of the estimate of the step size.", tags=("resume",)
    )
    max_grad_norm: float = _optimizer(1.0, gt=0, help_text="Gradients are clipped to this norm.")
    ema: float | None = _optimizer(
        None,
        gt=0,
        lt=1,
        help_text="Keep a moving average of the trained weights with this decay, such as 0.999, on the host: it is "
        "measured, sampled and saved as well as the weights. [default: none]",
    )


class ScheduleFields(BaseModel):
    """How the learning rate moves."""

    lr_scheduler: LrScheduler = _optimizer(
        "constant_with_warmup", help_text="How the learning rate moves.", tags=("untimed",)
    )
    warmup_steps: int = _optimizer(
        0, ge=0, help_text="Optimizer steps over which the learning rate rises from 0.", tags=("untimed",)
    )
    lr_cycles: int = _optimizer(
        1, ge=1, help_text="How often cosine_with_restarts falls from the peak.", tags=("untimed",)
    )
    lr_power: float = _optimizer(1.0, gt=0, help_text="Power of polynomial's fall; 1 is a line.", tags=("untimed",))
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
            raise ValueError(f"{warmup} is not below the {steps} steps of the run: the learning rate never gets there")
        return warmup

    @field_validator("lr_pieces")
    @classmethod
    def _pieces_read(cls, text: str | None) -> str | None:
        if text is None:
            return None
        if not re.fullmatch(rf"({_NUMBER}:\d+,)+{_NUMBER}", text):
            raise ValueError(f"'{text}' is no list of pieces: write SHARE:STEP,...,SHARE, such as 1:100,0.1")
        ends = [int(piece.split(":")[1]) for piece in text.split(",")[:-1]]
        if ends != sorted(set(ends)):
            raise ValueError(f"'{text}': the steps at which the pieces end must rise")
        return text
