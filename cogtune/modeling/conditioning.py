"""How a CogVideoX transformer is conditioned, shared by training, evaluation and tests.

Everything here follows the diffusers pipelines (``CogVideoXPipeline``, ``CogVideoXImageToVideoPipeline``), since a
model must be trained as it will be sampled. Differences between the variants are fields of :class:`ModelSpec`.

Shapes: B batch, F latent frames, C latent channels, h and w latent height and width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch import Tensor

from cogtune.models.checkpoint_configs import ModelSpec
from cogtune.models.geometry import temporal_padding

OFS = 2.0
"""The ``ofs`` value that CogVideoX1.5-5B-I2V was trained with."""

LOGVAR_LIMITS = (-30.0, 20.0)
"""Clamp of the VAE's log-variance (diffusers' ``DiagonalGaussianDistribution``)."""

Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Conditioning:
    """The transformer's inputs other than latents, text and timestep."""

    rotary: Rotary | None
    """cos and sin, each ``[tokens, head_dim]``; None for a model with sin-cos positions."""
    ofs: Tensor | None
    """``[1]``; None unless the model has an ofs embedding."""


def sample_posterior(moments: Tensor, noise: Tensor) -> Tensor:
    """Draw unscaled latents ``[B, F, C, h, w]`` in fp32 from a VAE's posterior.

    Args:
        moments: mean and log-variance ``[B, 2C, F, h, w]``.
        noise: standard normal ``[B, F, C, h, w]``.
    """
    mean, logvar = moments.float().permute(0, 2, 1, 3, 4).chunk(2, dim=2)
    return mean + torch.exp(0.5 * logvar.clamp(*LOGVAR_LIMITS)) * noise


def scale_video_latents(latents: Tensor, spec: ModelSpec) -> Tensor:
    """Scale video latents for the transformer: always multiply by the VAE's scaling factor."""
    return latents * spec.scaling_factor


def pad_front(latents: Tensor, spec: ModelSpec) -> Tensor:
    """Pad latents ``[B, F, C, h, w]`` with copies of the first frame in front, so that temporal patches divide F.

    The pipeline for 1.5 samples one latent frame more and drops the leading one; training pads to match.
    """
    padding = temporal_padding(latents.shape[1], spec.patch_size_t)
    return torch.cat([latents[:, :1].expand(-1, padding, -1, -1, -1), latents], dim=1) if padding else latents


def scale_image_latents(latents: Tensor, spec: ModelSpec) -> Tensor:
    """Scale image latents as the I2V pipeline does: divide by the factor if the VAE's config says inverted.

    By the factor's reciprocal, as there, so that both are equal to the bit.
    """
    return latents * (1 / spec.scaling_factor if spec.invert_scale_latents else spec.scaling_factor)


def place_image(latents: Tensor, frames: int) -> Tensor:
    """Return ``[image, 0, 0, ...]``: image latents ``[B, 1, C, h, w]`` in front of zeros, ``frames`` in all."""
    batch, _, channels, height, width = latents.shape
    return torch.cat([latents, latents.new_zeros(batch, frames - 1, channels, height, width)], dim=1)


def rotary_positions(spec: ModelSpec, frames: int, height: int, width: int, device: torch.device) -> Rotary | None:
    """Compute the rotary embeddings of a latent grid (padded ``frames`` x latent ``height`` x ``width``), or None.

    1.0 resizes the crop region of a base grid, 1.5 slices a grid whose maximum the config gives.
    """
    if not spec.rotary:
        return None
    grid = (height // spec.patch_size, width // spec.patch_size)
    base_height, base_width = spec.sample_height // spec.patch_size, spec.sample_width // spec.patch_size
    if spec.patch_size_t is None:
        cos, sin = get_3d_rotary_pos_embed(
            embed_dim=spec.attention_head_dim,
            crops_coords=get_resize_crop_region_for_grid(grid, base_width, base_height),
            grid_size=grid,
            temporal_size=frames,
            device=device,
        )
    else:
        cos, sin = get_3d_rotary_pos_embed(
            embed_dim=spec.attention_head_dim,
            crops_coords=None,
            grid_size=grid,
            temporal_size=(frames + spec.patch_size_t - 1) // spec.patch_size_t,
            grid_type="slice",
            max_size=(base_height, base_width),
            device=device,
        )
    return cos, sin


def conditioning_of(latents: Tensor, spec: ModelSpec) -> Conditioning:
    """Return what goes with (padded) latents ``[B, F, C, h, w]``; the same for every sample of a size."""
    _, frames, _, height, width = latents.shape
    ofs = None if spec.ofs_embed_dim is None else latents.new_full((1,), OFS)
    return Conditioning(rotary_positions(spec, frames, height, width, latents.device), ofs)


def predict(
    transformer: torch.nn.Module,
    noisy: Tensor,
    text: Tensor,
    timesteps: Tensor,
    image_latents: Tensor | None,
    conditioning: Conditioning,
) -> Tensor:
    """Return the transformer's output ``[B, F, C, h, w]`` (v) for noisy latents of the same shape.

    Args:
        text: ``[B, L, D]``.
        timesteps: ``[B]``, integers in [0, 1000).
        image_latents: scaled and padded like ``noisy``, or None for a text-to-video model.
    """
    hidden = noisy if image_latents is None else torch.cat([noisy, image_latents], dim=2)
    output: Tensor = transformer(
        hidden_states=hidden,
        encoder_hidden_states=text,
        timestep=timesteps,
        ofs=conditioning.ofs,
        image_rotary_emb=conditioning.rotary,
        return_dict=False,
    )[0]
    return output
