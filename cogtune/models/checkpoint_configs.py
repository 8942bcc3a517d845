"""A checkpoint's config files, and fingerprints of its weights."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cogtune.models.configs import Configs, read_index
from cogtune.models.geometry import FRAME_STEP, SPATIAL_COMPRESSION, Size, legal_frame_counts
from cogtune.models.variants import (
    LEAST_SIDE,
    LORA_WEIGHTS_NAME,
    MOST_SIDE,
    VARIANTS,
    Precision,
    SamplingScheduler,
    Variant,
)
from cogtune.system.digests import digest
from cogtune.system.errors import CogtuneError
from cogtune.system.files import open_regular, os_errors_explained

TIME_EMBED_DIM = 512
"""Numbers in an embedded timestep of the published models, and where a transformer's config does not say."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The values in a checkpoint's config files that training and sampling depend on."""

    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    in_channels: int
    out_channels: int
    patch_size: int
    patch_size_t: int | None
    text_embed_dim: int
    max_text_seq_length: int
    sample_height: int
    sample_width: int
    sample_frames: int
    rotary: bool
    learned_positions: bool
    ofs_embed_dim: int | None
    scaling_factor: float
    invert_scale_latents: bool
    num_train_timesteps: int
    snr_shift_scale: float
    time_embed_dim: int = TIME_EMBED_DIM

    @property
    def image_to_video(self) -> bool:
        """Whether the transformer takes image latents in addition to the noisy ones."""
        return self.in_channels == 2 * self.out_channels

    @property
    def variant(self) -> Variant:
        """The published model with this checkpoint's architecture, apart from its size."""
        traits = (
            self.in_channels / self.out_channels,
            self.patch_size_t,
            self.rotary,
            self.learned_positions,
            self.ofs_embed_dim is not None,
            self.invert_scale_latents,
            self.snr_shift_scale,
        )
        for row in VARIANTS.values():
            if row.traits == traits:
                return row
        raise CogtuneError(
            "this checkpoint has the architecture of none of the five CogVideoX models",
            f"supported models: {', '.join(VARIANTS)}",
        )

    @property
    def native(self) -> Size:
        """The size the model was trained at.

        For 1.5 the config's sample size is the largest rotary grid, not a training size: the row limits it.
        """
        row = self.variant.native
        return Size(
            self.sample_frames,
            min(self.sample_height * SPATIAL_COMPRESSION, row.height),
            min(self.sample_width * SPATIAL_COMPRESSION, row.width),
        )

    @property
    def sampled_with(self) -> SamplingScheduler:
        """The scheduler of the guides: DPM, and DDIM for a model trained with a shifted SNR (2b)."""
        return "dpm" if self.snr_shift_scale == 1.0 else "ddim"

    def size_problems(self, size: Size) -> list[str]:
        """Return why the model cannot be trained at ``size``; empty when it can."""
        problems = []
        if size.num_frames % FRAME_STEP != 1:
            near = max(1, round((size.num_frames - 1) / FRAME_STEP)) * FRAME_STEP + 1
            problems.append(f"{size.num_frames} frames: the number must be {FRAME_STEP}N+1, such as {near}")
        step = SPATIAL_COMPRESSION * self.patch_size
        for name, value in (("height", size.height), ("width", size.width)):
            if value % step:
                problems.append(
                    f"{name} {value} must be a multiple of {step}, such as {max(1, round(value / step)) * step}"
                )
        if self.learned_positions and size != self.native:
            problems.append(
                f"this model has learned positions, which only work at {self.native} "
                "(diffusers uses others at another number of frames)"
            )
        if self.patch_size_t is not None and (
            size.height > self.sample_height * SPATIAL_COMPRESSION
            or size.width > self.sample_width * SPATIAL_COMPRESSION
        ):
            problems.append(
                f"{size.height}x{size.width} exceeds the model's rotary grid of "
                f"{self.sample_height * SPATIAL_COMPRESSION}x{self.sample_width * SPATIAL_COMPRESSION}"
            )
        return problems

    def bucket_problems(self, size: Size) -> list[str]:
        """Return why ``size`` cannot be one of several that the model is trained at; empty when it can."""
        least = min(LEAST_SIDE, self.native.height, self.native.width)
        outside = [
            f"{name} {value} must be between {least} and {MOST_SIDE}"
            for name, value in (("height", size.height), ("width", size.width))
            if not least <= value <= MOST_SIDE
        ]
        return self.size_problems(size) + outside

    def size_advice(self, size: Size) -> list[str]:
        """Return what is legal about ``size`` but unlike what the model was trained on. Source: the model cards."""
        row, native = self.variant, self.native
        legal = legal_frame_counts(row.frame_multiple, row.most_frames_n)
        shape, trained = f"{size.height}x{size.width}", "the model was trained"
        advice = []
        if size.num_frames not in legal and size.num_frames != native.num_frames:
            advice.append(f"{size.num_frames} frames: {trained} on {row.frame_multiple}N+1, up to {legal[-1]}")
        if (size.height, size.width) == (native.height, native.width):
            return advice
        if row.any_aspect and (native.height, native.width) == (row.native.height, row.native.width):
            shorter, longer = sorted((size.height, size.width))
            if shorter != row.native.height or longer > row.native.width:
                sides = f"{row.native.height} and {row.native.height} to {row.native.width}"
                advice.append(f"{shape}: {trained} with sides of {sides}")
        else:
            advice.append(f"{shape}: {trained} at {native.height}x{native.width}")
        return advice

    def precision_problems(self, precision: Precision) -> list[str]:
        """Return why the model cannot be run in ``precision``, if so."""
        row = self.variant
        if precision == "fp16" and row.trained_in != "fp16":
            return [f"fp16: {row.name} was trained in bf16 and overflows in fp16 (black video); use bf16 or fp32"]
        return []

    def steps_problems(self, steps: int) -> list[str]:
        """List why a video cannot be sampled in ``steps`` denoising steps."""
        if steps > self.num_train_timesteps:
            return [f"{steps}: must not exceed the model's {self.num_train_timesteps} timesteps; 50 steps are usual"]
        return []

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-able values."""
        return asdict(self)


def published_spec(row: Variant) -> ModelSpec:
    """Return what the configs of a published checkpoint say, for when none is on this machine."""
    return ModelSpec(
        num_layers=row.num_layers,
        num_attention_heads=row.num_heads,
        attention_head_dim=row.head_dim,
        in_channels=32 if row.image_to_video else 16,
        out_channels=16,
        patch_size=2,
        patch_size_t=row.patch_size_t,
        text_embed_dim=4096,
        max_text_seq_length=226,
        sample_height=row.sample_height,
        sample_width=row.sample_width,
        sample_frames=row.sample_frames,
        rotary=row.rotary,
        learned_positions=row.learned_positions,
        ofs_embed_dim=row.ofs_embed_dim,
        scaling_factor=row.vae_scaling_factor,
        invert_scale_latents=row.invert_scale_latents,
        num_train_timesteps=1000,
        snr_shift_scale=row.snr_shift_scale,
    )


def _whole_or_part(folder: Path) -> str:
    if (folder / LORA_WEIGHTS_NAME).is_file():
        return "it is a LoRA; pass it as --lora, and its base model as --model"
    if (folder / "config.json").is_file():
        return "it is only a transformer; put it as transformer/ into a copy of its base model's folder"
    return "pass the folder that contains model_index.json, transformer/, vae/, text_encoder/, tokenizer/, scheduler/"


def read_spec(folder: Path) -> ModelSpec:
    """Return what the configs of the diffusers checkpoint in ``folder`` say.

    Raises:
        CogtuneError: the folder is not a CogVideoX checkpoint, or with every wrong value in its configs.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise CogtuneError(
            f"{folder} is not a diffusers checkpoint: it has no model_index.json",
            _whole_or_part(folder),
        )
    pipeline, _ = read_index(index)
    if not pipeline.startswith("CogVideoX"):
        raise CogtuneError(
            f"{folder} is a checkpoint of {pipeline or 'an unnamed pipeline'}, not of CogVideoX",
            f"supported models: {', '.join(VARIANTS)}",
        )
    configs = Configs(folder)
    transformer = configs.transformer
    return ModelSpec(
        num_layers=transformer.num_layers,
        num_attention_heads=transformer.num_attention_heads,
        attention_head_dim=transformer.attention_head_dim,
        in_channels=transformer.in_channels,
        out_channels=transformer.out_channels,
        patch_size=transformer.patch_size,
        patch_size_t=transformer.patch_size_t,
        text_embed_dim=transformer.text_embed_dim,
        max_text_seq_length=transformer.max_text_seq_length,
        sample_height=transformer.sample_height,
        sample_width=transformer.sample_width,
        sample_frames=transformer.sample_frames,
        rotary=transformer.use_rotary_positional_embeddings,
        learned_positions=transformer.use_learned_positional_embeddings,
        ofs_embed_dim=transformer.ofs_embed_dim,
        scaling_factor=configs.vae.scaling_factor,
        invert_scale_latents=configs.vae.invert_scale_latents,
        num_train_timesteps=configs.scheduler.num_train_timesteps,
        snr_shift_scale=configs.scheduler.snr_shift_scale,
        time_embed_dim=transformer.time_embed_dim,
    )


_WHOLE_BELOW = 64 << 20


_SAMPLES, _SAMPLE_BYTES = 256, 1 << 16


def _file_fingerprint(path: Path) -> str:
    """Return a digest of the file's bytes; of a large file, its size and 256 evenly spread blocks of 64 KiB.

    Hashing all of a 10 GB text encoder would take longer than encoding the captions. Fine-tuned weights differ
    everywhere, so the blocks tell them apart.
    """
    size = path.stat().st_size
    hasher = hashlib.blake2b(str(size).encode(), digest_size=16)
    with open_regular(path) as handle:
        if size <= _WHOLE_BELOW:
            while chunk := handle.read(1 << 20):
                hasher.update(chunk)
        else:
            for block in range(_SAMPLES):
                handle.seek((size - _SAMPLE_BYTES) * block // (_SAMPLES - 1))
                hasher.update(handle.read(_SAMPLE_BYTES))
    return hasher.hexdigest()


def fingerprint(checkpoint: Path, component: str) -> str:
    """Return a fingerprint of the weights and configs in ``checkpoint/component`` (such as ``vae``): 32 hex digits.

    Raises:
        CogtuneError: the component's folder is missing or cannot be read.
    """
    folder = checkpoint / component
    if not folder.is_dir():
        raise CogtuneError(f"{checkpoint} has no {component}/ folder", "download the complete checkpoint")
    with os_errors_explained(folder, "read"):
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
        return digest([[path.relative_to(folder).as_posix(), _file_fingerprint(path)] for path in files])
