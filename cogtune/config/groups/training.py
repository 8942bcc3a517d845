"""What is trained, and with which loss."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationInfo, field_validator

from cogtune.config.arrangement import AttentionKernel, Keep
from cogtune.config.choices import TimestepDistribution, parse_bytes
from cogtune.config.fields import option
from cogtune.config.presets import TrainingType
from cogtune.config.stream import MasterWeights, Moments
from cogtune.models.variants import BasePrecision

_training = functools.partial(option, panel="Training")
_lora = functools.partial(option, panel="LoRA")
_memory = functools.partial(option, panel="Memory")

_NUMBER = r"\d+(?:\.\d+)?(?:e-?\d+)?"


class TrainingFields(BaseModel):
    """What is trained, for how long, and in what batches."""

    type: TrainingType = _training(
        "lora", help_text="Train a LoRA adapter (lora) or all weights (sft).", tags=("resume",)
    )
    steps: int = _training(1000, ge=1, help_text="Total optimizer steps.", tags=("untimed",))
    epochs: float | None = _training(
        None, gt=0, help_text="Passes over the data, instead of --steps.", tags=("untimed",)
    )
    batch_size: int = _training(1, ge=1, help_text="Samples per GPU and forward pass.", tags=("resume",))
    gradient_accumulation_steps: int = _training(1, ge=1, help_text="Forward passes per optimizer step.")
    gradient_checkpointing: bool = _training(
        True,
        help_text="Recompute activations in the backward pass: far less memory for about a third more time.",
    )
    compile: bool | None = _training(
        None,
        help_text="Compile the transformer's blocks: less memory and time per step, after about a minute of "
        "compilation. "
        "[default: on, on a GPU without ZeRO-3]",
        tags=("machine",),
    )
    seed: int = _training(
        42,
        ge=0,
        le=2**31 - 1,
        help_text="Random seed for data order, noise, timesteps and the adapter's initial weights.",
        tags=("resume", "frames"),
    )


VRAM_OFF = "off"
"""The value of ``vram`` for a LoRA run without the memory engine."""


class MemoryFields(BaseModel):
    """The memory engine: where weights and activations are kept, and what is recomputed."""

    vram: str | None = _memory(
        None,
        help_text="Memory limit per GPU, such as 8GB. Weights and activations that do not fit are kept in host memory. "
        "off trains a LoRA without the memory engine. [default: what is free, for a LoRA and strategy stream]",
        tags=("machine", "engine"),
    )
    stream_blocks: int | None = _memory(
        None,
        ge=0,
        help_text="Number of transformer blocks whose frozen weights are kept in host memory and streamed to the GPU. "
        "[default: as many as --vram requires]",
        tags=("machine", "engine"),
    )
    keep_activations: Keep | None = _memory(
        None,
        help_text="What each block keeps for its backward pass: its inputs, plus attention outputs, plus matrix "
        "product "
        "outputs, or everything. [default: chosen with --vram]",
        tags=("machine", "engine"),
    )
    keep_everything: int | None = _memory(
        None,
        ge=0,
        help_text="Number of last blocks that keep everything on the GPU instead. [default: chosen with --vram]",
        tags=("machine", "engine"),
    )
    offload_activations: int | None = _memory(
        None,
        ge=0,
        help_text="Number of first blocks whose activations are kept in host memory until the backward pass. "
        "[default: chosen with --vram]",
        tags=("machine", "engine"),
    )
    attention: Literal[AttentionKernel, "auto"] | None = _memory(
        None,
        help_text="Attention kernel; auto picks the fastest available one. [default: PyTorch's choice; auto with "
        "--vram]",
        tags=("machine", "engine"),
    )

    base_precision: BasePrecision | None = _memory(
        None,
        help_text="Precision of a LoRA's base model. fp8 computes the products with its weights in 8 bits, which is "
        "faster on GPUs of compute capability 8.9 and later. int8 and nf4 hold the weights in 8 or 4 bits in host "
        "memory. The adapter keeps its precision. [default: that of --precision]",
        tags=("engine",),
    )

    host_memory: str | None = _memory(
        None,
        help_text="Host memory limit, such as 64GB, for strategy stream and for a LoRA with the memory engine. Under "
        "stream, it decides the formats of the optimizer's state. [default: what is free]",
        tags=("machine", "stream"),
    )
    master_weights: MasterWeights | None = _memory(
        None,
        help_text="Master weights of strategy stream: an fp32 copy; split, only the 16 bits that bf16 leaves out; or "
        "stochastic, none, with stochastic rounding. [default: fp32 if the host has room, else split]",
        tags=("stream",),
    )
    moments: Moments | None = _memory(
        None,
        help_text="Format of Adam's moments under strategy stream. [default: fp32 if the host has room, else 8bit]",
        tags=("stream",),
    )

    @field_validator("vram", "host_memory")
    @classmethod
    def _amount_reads(cls, text: str | None, info: ValidationInfo) -> str | None:
        if text == VRAM_OFF and info.field_name == "vram":
            return text
        if text is not None and parse_bytes(text) <= 0:
            off = ", or off" if info.field_name == "vram" else ""
            raise ValueError(f"'{text}' is not an amount of memory; write it in GB or GiB, such as 8GB{off}")
        return text


class ObjectiveFields(BaseModel):
    """Which timesteps and how much image noise to train with."""

    timestep_sampling: TimestepDistribution = _training(
        "uniform",
        help_text="Distribution of the training timesteps.",
        tags=("resume",),
    )
    timestep_mean: float = _training(
        0.0,
        help_text="Mean of the normal for logit-normal; above 0, noisier timesteps are more frequent.",
        tags=("resume",),
    )
    timestep_std: float = _training(
        1.0, gt=0, help_text="Standard deviation of the normal for logit-normal.", tags=("resume",)
    )
    timestep_range: str | None = _training(
        None,
        help_text="LOW,HIGH: range of training timesteps, inclusive. [default: 0,999]",
        tags=("resume",),
    )
    image_noise: str = _training(
        "-3,0.5",
        help_text="MEAN,STD of the log of the noise on conditioning images (image-to-video), or off.",
        tags=("resume",),
    )
    init_lora: Path | None = _lora(
        None,
        help_text="LoRA file of any program to start from, instead of a new adapter. Rank, alpha and layers are taken "
        "from it. [default: none]",
        tags=("untimed",),
    )

    @field_validator("timestep_range")
    @classmethod
    def _range_reads(cls, text: str | None) -> str | None:
        if text is not None and not re.fullmatch(r"\s*\d+\s*,\s*\d+\s*", text):
            raise ValueError(f"'{text}' is not a range; write LOW,HIGH, such as 500,999")
        return text

    @field_validator("image_noise")
    @classmethod
    def _noise_reads(cls, text: str) -> str:
        if text != "off" and not re.fullmatch(rf"\s*-?{_NUMBER}\s*,\s*{_NUMBER}\s*", text):
            raise ValueError(f"'{text}' is not valid; write MEAN,STD of the noise's log, such as -3,0.5, or off")
        return text


class LoraFields(BaseModel):
    """The adapter."""

    rank: int = _lora(128, ge=1, help_text="Rank of the adapter.", tags=("resume",))
    alpha: float | None = _lora(
        None,
        gt=0,
        help_text="The adapter is scaled by alpha / rank, or alpha / √rank with --rslora. [default: the rank]",
    )
    target_modules: tuple[str, ...] = _lora(
        ("to_q", "to_k", "to_v", "to_out.0"),
        min_length=1,
        help_text="Layers that get an adapter, matched by the end of their names.",
        tags=("resume",),
    )
    lora_dropout: float = _lora(
        0.0, ge=0, lt=1, help_text="Dropout probability on the adapter's inputs.", tags=("resume",)
    )
    dora: bool = _lora(
        False, help_text="Weight-decomposed LoRA (DoRA): also learn a magnitude for each output.", tags=("resume",)
    )
    rslora: bool = _lora(
        False, help_text="Rank-stabilised LoRA: scale by alpha / √rank instead of alpha / rank.", tags=("resume",)
    )
