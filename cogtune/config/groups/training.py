"""What is trained, and on what loss."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, field_validator

from cogtune.config.arrangement import AttentionKernel, Keep
from cogtune.config.choices import TimestepDistribution, parse_bytes
from cogtune.config.fields import option
from cogtune.config.presets import TrainingType

_training = functools.partial(option, panel="Training")
_lora = functools.partial(option, panel="LoRA")
_memory = functools.partial(option, panel="Memory")

_NUMBER = r"\d+(?:\.\d+)?(?:e-?\d+)?"


class TrainingFields(BaseModel):
    """What is trained, for how long, and in what batches."""

    type: TrainingType = _training("lora", help_text="lora trains a small adapter, sft every weight.", tags=("resume",))
    steps: int = _training(1000, ge=1, help_text="Optimizer steps in all.", tags=("untimed",))
    epochs: float | None = _training(
        None, gt=0, help_text="Passes over the data, in place of steps.", tags=("untimed",)
    )
    batch_size: int = _training(1, ge=1, help_text="Samples per GPU and forward pass.", tags=("resume",))
    gradient_accumulation_steps: int = _training(1, ge=1, help_text="Forward passes per optimizer step.")
    gradient_checkpointing: bool = _training(
        True,
        help_text="Recompute activations in the backward pass: far less memory, about a third more time.",
    )
    compile: bool | None = _training(
        None,
        help_text="Compile the transformer's blocks: less memory and time a step, after a minute's start. "
        "[default: on a GPU, where no GPU shares its weights]",
        tags=("machine",),
    )
    seed: int = _training(
        42,
        ge=0,
        le=2**31 - 1,
        help_text="Decides order, noise, timesteps and the adapter's start.",
        tags=("resume", "frames"),
    )


class MemoryFields(BaseModel):
    """Where weights and activations are kept, and what is recomputed: the memory engine."""

    vram: str | None = _memory(
        None,
        help_text="Memory that a LoRA run may take of each card, such as 8GB: weights and activations are kept in host "
        "memory as far as they do not fit. [default: no limit, and everything on the card]",
        tags=("machine", "engine"),
    )
    stream_blocks: int | None = _memory(
        None,
        ge=0,
        help_text="Transformer blocks whose frozen weights stay in host memory and are streamed through the card. "
        "[default: as many as --vram asks for]",
        tags=("machine", "engine"),
    )
    keep_activations: Keep | None = _memory(
        None,
        help_text="What each block keeps for its backward pass: its inputs, the outputs of attention too, those of "
        "matrix products too, or everything. [default: chosen with --vram]",
        tags=("machine", "engine"),
    )
    keep_everything: int | None = _memory(
        None,
        ge=0,
        help_text="The last blocks, which keep everything on the card in place of that. [default: chosen with --vram]",
        tags=("machine", "engine"),
    )
    offload_activations: int | None = _memory(
        None,
        ge=0,
        help_text="The first blocks, whose activations wait for the backward pass in host memory. "
        "[default: chosen with --vram]",
        tags=("machine", "engine"),
    )
    attention: AttentionKernel | Literal["auto"] | None = _memory(
        None,
        help_text="The attention kernel; auto measures those that are there. [default: PyTorch's own choice; auto with "
        "--vram]",
        tags=("machine", "engine"),
    )

    @field_validator("vram")
    @classmethod
    def _vram_reads(cls, text: str | None) -> str | None:
        if text is not None and parse_bytes(text) <= 0:
            raise ValueError(f"'{text}' is not an amount of memory: write it in GB or GiB, such as 8GB")
        return text


class ObjectiveFields(BaseModel):
    """Which timesteps and how much noise the loss is measured at."""

    timestep_sampling: TimestepDistribution = _training(
        "uniform",
        help_text="How timesteps are drawn: all alike, or more often where a logistic normal has its mass.",
        tags=("resume",),
    )
    timestep_mean: float = _training(
        0.0,
        help_text="Mean of the normal under logit-normal; above 0, noisier timesteps come more often.",
        tags=("resume",),
    )
    timestep_std: float = _training(
        1.0, gt=0, help_text="Deviation of the normal under logit-normal.", tags=("resume",)
    )
    timestep_range: str | None = _training(
        None,
        help_text="LOW,HIGH: train on these timesteps alone, both included. [default: 0,999, all]",
        tags=("resume",),
    )
    image_noise: str = _training(
        "-3,0.5",
        help_text="MEAN,STD of the log of the noise on conditioning images (image-to-video), or off.",
        tags=("resume",),
    )
    init_lora: Path | None = _lora(
        None,
        help_text="A LoRA of any program to begin with, in place of a new adapter; rank, alpha and layers are taken "
        "from it. [default: none]",
        tags=("untimed",),
    )

    @field_validator("timestep_range")
    @classmethod
    def _range_reads(cls, text: str | None) -> str | None:
        if text is not None and not re.fullmatch(r"\s*\d+\s*,\s*\d+\s*", text):
            raise ValueError(f"'{text}' is not a range: write LOW,HIGH, such as 500,999")
        return text

    @field_validator("image_noise", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare `off` as false

    @field_validator("image_noise")
    @classmethod
    def _noise_reads(cls, text: str) -> str:
        if text != "off" and not re.fullmatch(rf"\s*-?{_NUMBER}\s*,\s*{_NUMBER}\s*", text):
            raise ValueError(f"'{text}' is no noise: write MEAN,STD of its log, such as -3,0.5, or off")
        return text


class LoraFields(BaseModel):
    """The adapter."""

    rank: int = _lora(128, ge=1, help_text="Rank of the adapter.", tags=("resume",))
    alpha: float | None = _lora(
        None,
        gt=0,
        help_text="Strength of the adapter is alpha / rank, with --rslora alpha / √rank. [default: the rank]",
    )
    target_modules: tuple[str, ...] = _lora(
        ("to_q", "to_k", "to_v", "to_out.0"),
        min_length=1,
        help_text="Layers that get an adapter, by the end of their names.",
        tags=("resume",),
    )
    lora_dropout: float = _lora(
        0.0, ge=0, lt=1, help_text="Share of the adapter's inputs dropped in training.", tags=("resume",)
    )
    dora: bool = _lora(
        False, help_text="Learn a magnitude for each output beside the direction (DoRA).", tags=("resume",)
    )
    rslora: bool = _lora(
        False, help_text="Rank-stabilised strength, alpha / √rank in place of alpha / rank.", tags=("resume",)
    )
