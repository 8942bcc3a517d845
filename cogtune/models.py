"""The five CogVideoX variants as rows of facts, and what a checkpoint's own configs say.

A checkpoint's config files always win. The rows hold what no config states: the native frame rate, the
frame and size rules, the precision a model was trained in, the licence.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from cogtune.errors import CogtuneError, UsageError, did_you_mean
from cogtune.files import digest, explained
from cogtune.geometry import FRAME_STEP, SPATIAL_COMPRESSION, Size, legal_frame_counts
from cogtune.model_configs import Configs, read_index

Precision = Literal["bf16", "fp16", "fp32"]

LORA_WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
"""The file name under which diffusers looks for a LoRA."""


NEW_OWNER = "zai-org"
"""What THUDM is called on the Hub today; its models are found under both names."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One published CogVideoX model. Sources: the diffusers checkpoints' configs and the model cards."""

    name: str
    hub_id: str
    num_layers: int
    num_heads: int
    head_dim: int
    image_to_video: bool
    patch_size_t: int | None
    rotary: bool
    learned_positions: bool
    ofs_embed_dim: int | None
    sample_height: int
    sample_width: int
    sample_frames: int
    text_tokens: int
    """The documented prompt limit in T5 tokens; the config's ``max_text_seq_length`` is 226 for all five."""
    vae_scaling_factor: float
    invert_scale_latents: bool
    snr_shift_scale: float
    trained_in: Precision
    fps: int
    native: Size
    frame_multiple: int
    """Frame counts are this times N plus one."""
    most_frames_n: int
    any_aspect: bool
    """Whether it was trained on frames of many shapes, none beyond its native one's sides."""
    license: str
    license_link: str

    @property
    def hub_ids(self) -> tuple[str, ...]:
        """All Hub ids under which it is published: the first one, and that of the organisation's new name."""
        return (self.hub_id, f"{NEW_OWNER}/{self.hub_id.partition('/')[2]}")


def _variant(name: str, hub_id: str, *, image: bool = False, **facts: Any) -> Variant:
    """A row of the 1.0 5B model, with ``facts`` in place of its own."""
    row: dict[str, Any] = {
        "num_layers": 42,
        "num_heads": 48,
        "head_dim": 64,
        "patch_size_t": None,
        "rotary": True,
        "learned_positions": False,
        "ofs_embed_dim": None,
        "sample_height": 60,
        "sample_width": 90,
        "sample_frames": 49,
        "text_tokens": 226,
        "vae_scaling_factor": 0.7,
        "invert_scale_latents": False,
        "snr_shift_scale": 1.0,
        "trained_in": "bf16",
        "fps": 8,
        "native": Size(49, 480, 720),
        "frame_multiple": 8,
        "most_frames_n": 6,
        "any_aspect": False,
        "license": "other",
        "license_link": f"https://huggingface.co/{hub_id}/blob/main/LICENSE",
    }
    return Variant(name=name, hub_id=hub_id, image_to_video=image, **(row | facts))


_V1_5: dict[str, Any] = {
    "patch_size_t": 2,
    "sample_height": 300,
    "sample_width": 300,
    "sample_frames": 81,
    "text_tokens": 224,
    "invert_scale_latents": True,
    "fps": 16,
    "native": Size(81, 768, 1360),
    "frame_multiple": 16,
    "most_frames_n": 10,
}

VARIANTS: dict[str, Variant] = {
    row.name: row
    for row in (
        _variant(
            "2b",
            "THUDM/CogVideoX-2b",
            num_layers=30,
            num_heads=30,
            rotary=False,
            vae_scaling_factor=1.15258426,
            snr_shift_scale=3.0,
            trained_in="fp16",
            license="apache-2.0",
        ),
        _variant("5b", "THUDM/CogVideoX-5b"),
        _variant("5b-i2v", "THUDM/CogVideoX-5b-I2V", image=True, learned_positions=True),
        _variant("1.5-5b", "THUDM/CogVideoX1.5-5B", **_V1_5),
        _variant("1.5-5b-i2v", "THUDM/CogVideoX1.5-5B-I2V", image=True, ofs_embed_dim=512, any_aspect=True, **_V1_5),
    )
}
"""The published models by short name."""


def variant(name: str) -> Variant:
    """The row called ``name``.

    Raises:
        UsageError: there is none; the message names the nearest.
    """
    try:
        return VARIANTS[name.lower()]
    except KeyError:
        raise UsageError(
            f"there is no model '{name}'{did_you_mean(name, VARIANTS)}", f"models: {', '.join(VARIANTS)}"
        ) from None


LEAST_SIDE, MOST_SIDE = 256, 2048
"""The least and the most pixels of height and width of a bucket, for any but a tiny model."""

TINY = "tiny:"
"""Prefix of the built-in models with random weights: ``tiny:2b``."""


def published(reference: str) -> Variant | None:
    """The variant that a short name, a Hub id or ``tiny:NAME`` means; None for any other reference."""
    name = reference.removeprefix(TINY).lower()
    for row in VARIANTS.values():
        if name in (row.name, *map(str.lower, row.hub_ids)):
            return row
    return None


TIME_EMBED_DIM = 512
"""Numbers in an embedded timestep of the published models, and where a transformer's config does not say."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What a checkpoint's config files say, as far as training and sampling depend on it."""

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
        """Whether the transformer takes image latents beside the noisy ones."""
        return self.in_channels == 2 * self.out_channels

    @property
    def variant(self) -> Variant:
        """The published model that this checkpoint is built like (its size apart)."""
        traits = (self.image_to_video, self.patch_size_t is not None, self.rotary)
        for row in VARIANTS.values():
            if (row.image_to_video, row.patch_size_t is not None, row.rotary) == traits:
                return row
        raise CogtuneError(
            "this checkpoint is not built like any of the five CogVideoX models",
            f"known models: {', '.join(VARIANTS)}",
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

    def size_problems(self, size: Size) -> list[str]:
        """Why the model cannot be trained at ``size``; empty when it can."""
        problems = []
        if size.num_frames % FRAME_STEP != 1:
            near = max(1, round((size.num_frames - 1) / FRAME_STEP)) * FRAME_STEP + 1
            problems.append(f"{size.num_frames} frames: the VAE takes {FRAME_STEP}N+1, such as {near}")
        step = SPATIAL_COMPRESSION * self.patch_size
        for name, value in (("height", size.height), ("width", size.width)):
            if value % step:
                problems.append(f"{name} {value} is not a multiple of {step}; {max(1, round(value / step)) * step} is")
        if self.learned_positions and size != self.native:
            problems.append(
                f"this model has learned positions, and they are for {self.native} alone "
                "(diffusers takes others at another number of frames)"
            )
        if self.patch_size_t is not None and (
            size.height > self.sample_height * SPATIAL_COMPRESSION
            or size.width > self.sample_width * SPATIAL_COMPRESSION
        ):
            problems.append(
                f"{size.height}x{size.width} is beyond the model's rotary grid of "
                f"{self.sample_height * SPATIAL_COMPRESSION}x{self.sample_width * SPATIAL_COMPRESSION}"
            )
        return problems

    def bucket_problems(self, size: Size) -> list[str]:
        """Why ``size`` cannot be one of several that the model is trained at; empty when it can."""
        least = min(LEAST_SIDE, self.native.height, self.native.width)
        outside = [
            f"{name} {value} is not from {least} to {MOST_SIDE}"
            for name, value in (("height", size.height), ("width", size.width))
            if not least <= value <= MOST_SIDE
        ]
        return self.size_problems(size) + outside

    def size_advice(self, size: Size) -> list[str]:
        """What is legal about ``size`` but unlike what the model was trained on. Source: the model cards."""
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
        """Why the model cannot be run in ``precision``, if so."""
        row = self.variant
        if precision == "fp16" and row.trained_in != "fp16":
            return [f"fp16: {row.name} was trained in bf16 and overflows in fp16 (black video); use bf16 or fp32"]
        return []

    def steps_problems(self, steps: int) -> list[str]:
        """Why a video cannot be sampled in so many denoising steps, if so."""
        if steps > self.num_train_timesteps:
            return [f"{steps}: the model has {self.num_train_timesteps} timesteps, and 50 steps are usual"]
        return []

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values."""
        return asdict(self)


def published_spec(row: Variant) -> ModelSpec:
    """What the configs of a published checkpoint say, for when none is on this machine."""
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
        return "it is a LoRA: give it as --lora, and its base model as --model"
    if (folder / "config.json").is_file():
        return "it is a transformer alone: put it as transformer/ into a copy of its base model's folder"
    return "give the folder that holds model_index.json, transformer/, vae/, text_encoder/, tokenizer/, scheduler/"


def read_spec(folder: Path) -> ModelSpec:
    """What the configs of the diffusers checkpoint in ``folder`` say.

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
            f"{folder} is a {pipeline or 'nameless'} checkpoint, not a CogVideoX one",
            f"cogtune fine-tunes {', '.join(VARIANTS)}",
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
    """A digest of the file's bytes; of a large file, its size and 256 evenly spread blocks of 64 KiB.

    Hashing all of a 10 GB text encoder would take longer than encoding the captions. Fine-tuned weights differ
    everywhere, so the blocks tell them apart.
    """
    size = path.stat().st_size
    hasher = hashlib.blake2b(str(size).encode(), digest_size=16)
    with path.open("rb") as handle:
        if size <= _WHOLE_BELOW:
            while chunk := handle.read(1 << 20):
                hasher.update(chunk)
        else:
            for block in range(_SAMPLES):
                handle.seek((size - _SAMPLE_BYTES) * block // (_SAMPLES - 1))
                hasher.update(handle.read(_SAMPLE_BYTES))
    return hasher.hexdigest()


def fingerprint(checkpoint: Path, component: str) -> str:
    """What stands for the weights and configs in ``checkpoint/component`` (such as ``vae``): 32 hex digits.

    Raises:
        CogtuneError: the component's folder is missing or cannot be read.
    """
    folder = checkpoint / component
    if not folder.is_dir():
        raise CogtuneError(f"{checkpoint} has no {component}/ folder", "download the whole checkpoint")
    with explained(folder, "read"):
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
        return digest([[path.relative_to(folder).as_posix(), _file_fingerprint(path)] for path in files])
