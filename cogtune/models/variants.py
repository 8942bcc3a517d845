"""The five CogVideoX variants as rows of facts, and what a checkpoint's own configs say.

A checkpoint's config files always win. The rows hold what no config states: the native frame rate, the
frame and size rules, the precision a model was trained in, the licence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from cogtune.models.geometry import Size
from cogtune.system.errors import UsageError, did_you_mean

Precision = Literal["bf16", "fp16", "fp32"]
FrozenPrecision = Literal["fp8"]
"""Number formats of weights that are not trained, besides those."""
StoredPrecision = Literal["int8", "nf4"]
"""Those that weights only wait in: products are computed in another."""
BasePrecision = Literal[FrozenPrecision, StoredPrecision]
"""Both."""

SamplingScheduler = Literal["dpm", "ddim"]
"""What denoises a video: DPM-Solver++ with dynamic guidance, or DDIM; both with trailing spacing."""

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

    @property
    def license_link(self) -> str:
        """Where the licence is."""
        return f"https://huggingface.co/{self.hub_id}/blob/main/LICENSE"

    @property
    def traits(self) -> tuple[Any, ...]:
        """All that tells this model from others in a checkpoint's configs, whatever its size and its VAE's scale."""
        return (
            2.0 if self.image_to_video else 1.0,  # channels in, for each that comes out
            self.patch_size_t,
            self.rotary,
            self.learned_positions,
            self.ofs_embed_dim is not None,
            self.invert_scale_latents,
            self.snr_shift_scale,
        )

    @property
    def hub_ids(self) -> tuple[str, ...]:
        """All Hub ids under which it is published: the first one, and that of the organisation's new name."""
        return (self.hub_id, f"{NEW_OWNER}/{self.hub_id.partition('/')[2]}")


_5B = Variant(
    name="5b",
    hub_id="THUDM/CogVideoX-5b",
    num_layers=42,
    num_heads=48,
    head_dim=64,
    image_to_video=False,
    patch_size_t=None,
    rotary=True,
    learned_positions=False,
    ofs_embed_dim=None,
    sample_height=60,
    sample_width=90,
    sample_frames=49,
    vae_scaling_factor=0.7,
    invert_scale_latents=False,
    snr_shift_scale=1.0,
    trained_in="bf16",
    fps=8,
    native=Size(49, 480, 720),
    frame_multiple=8,
    most_frames_n=6,
    any_aspect=False,
    license="other",
)
_2B = replace(
    _5B,
    name="2b",
    hub_id="THUDM/CogVideoX-2b",
    num_layers=30,
    num_heads=30,
    rotary=False,
    vae_scaling_factor=1.15258426,
    snr_shift_scale=3.0,
    trained_in="fp16",
    license="apache-2.0",
)
_5B_I2V = replace(_5B, name="5b-i2v", hub_id="THUDM/CogVideoX-5b-I2V", image_to_video=True, learned_positions=True)
_1_5_5B = replace(
    _5B,
    name="1.5-5b",
    hub_id="THUDM/CogVideoX1.5-5B",
    patch_size_t=2,
    sample_height=300,
    sample_width=300,
    sample_frames=81,
    invert_scale_latents=True,
    fps=16,
    native=Size(81, 768, 1360),
    frame_multiple=16,
    most_frames_n=10,
)
_1_5_5B_I2V = replace(
    _1_5_5B,
    name="1.5-5b-i2v",
    hub_id="THUDM/CogVideoX1.5-5B-I2V",
    image_to_video=True,
    ofs_embed_dim=512,
    any_aspect=True,
)

VARIANTS: dict[str, Variant] = {row.name: row for row in (_2B, _5B, _5B_I2V, _1_5_5B, _1_5_5B_I2V)}
"""The published models by short name."""


def variant(name: str) -> Variant:
    """Return the row called ``name``.

    Raises:
        UsageError: there is none; the message names the nearest.
    """
    try:
        return VARIANTS[name.lower()]
    except KeyError:
        raise UsageError(
            f"unknown model '{name}'{did_you_mean(name, VARIANTS)}", f"supported models: {', '.join(VARIANTS)}"
        ) from None


LEAST_SIDE, MOST_SIDE = 256, 2048
"""The least and the most pixels of height and width of a bucket, for any but a built-in model."""

BuiltInKind = Literal["tiny", "nano"]
"""The kinds of models that come with cogtune: with random weights, and trained on a small artificial world."""

NANO_VARIANTS = ("2b", "5b", "5b-i2v", "1.5-5b-i2v")

BUILT_IN: dict[BuiltInKind, tuple[str, ...]] = {"tiny": tuple(VARIANTS), "nano": NANO_VARIANTS}
"""The variants that there are of each kind."""


@dataclass(frozen=True)
class BuiltIn:
    """A reference to a model that comes with cogtune, written ``tiny:2b`` or ``nano:5b``."""

    kind: BuiltInKind
    name: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}"

    @property
    def published(self) -> Variant | None:
        """The published model that it is built like; None if there is no built-in model of this name."""
        name = self.name.lower()
        return VARIANTS[name] if name in BUILT_IN[self.kind] else None

    @property
    def variant(self) -> Variant:
        """The published model that it is built like.

        Raises:
            UsageError: there is no built-in model of this name; the message suggests the nearest.
        """
        row, names = self.published, BUILT_IN[self.kind]
        if row is None:
            raise UsageError(
                f"unknown {self.kind} model '{self.name}'{did_you_mean(self.name, names)}",
                f"use one of {', '.join(f'{self.kind}:{name}' for name in names)}",
            )
        return row


def built_in(reference: str) -> BuiltIn | None:
    """Return the built-in model that ``reference`` asks for, whether it exists or not; None for any other reference."""
    for kind in BUILT_IN:
        if reference.startswith(f"{kind}:"):
            return BuiltIn(kind, reference.removeprefix(f"{kind}:"))
    return None


def published(reference: str) -> Variant | None:
    """Return the variant that a short name, a Hub id, ``tiny:NAME`` or ``nano:NAME`` means; None for any other
    reference."""
    if (asked := built_in(reference)) is not None:
        return asked.published
    name = reference.lower()
    for row in VARIANTS.values():
        if name in (row.name, *map(str.lower, row.hub_ids)):
            return row
    return None
