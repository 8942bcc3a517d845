"""Sampling with the guides' settings, shared by ``infer`` and a run's sample videos."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    DiffusionPipeline,
)

from cogtune.models.checkpoint_configs import ModelSpec
from cogtune.models.geometry import Size
from cogtune.system.errors import CogtuneError

Frames = np.ndarray[Any, np.dtype[np.uint8]]


class NotFinite(CogtuneError):
    """A sampled video with values that are not finite."""


def pipeline_class(spec: ModelSpec) -> type[DiffusionPipeline]:
    """Return the diffusers pipeline that samples this model."""
    kind: type[DiffusionPipeline] = CogVideoXImageToVideoPipeline if spec.image_to_video else CogVideoXPipeline
    return kind


def uses_dynamic_guidance(spec: ModelSpec) -> bool:
    """Return whether the guides sample this model with DPM and dynamic guidance; 2b, with its shifted SNR, is not."""
    return spec.snr_shift_scale == 1.0


def scheduler_for(spec: ModelSpec, config: Any) -> Any:
    """Return the guides' scheduler: DPM with trailing spacing, and DDIM for a model trained with a shifted SNR (2b).

    Args:
        config: of the checkpoint's own scheduler.
    """
    kind = CogVideoXDPMScheduler if uses_dynamic_guidance(spec) else CogVideoXDDIMScheduler
    return kind.from_config(config, timestep_spacing="trailing")


def render(
    pipeline: DiffusionPipeline,
    spec: ModelSpec,
    size: Size,
    *,
    steps: int,
    guidance: float,
    seed: int,
    on_step: Callable[[int], None] | None = None,
    **inputs: Any,
) -> Frames:
    """Sample one video: frames ``[F, H, W, 3]`` uint8.

    Args:
        on_step: called after each denoising step with its number, from 1.
        inputs: the pipeline's inputs: a prompt or its embeddings, and the image.

    Raises:
        NotFinite: the model or the VAE overflowed.
    """

    def stepped(_pipeline: object, step: int, _timestep: object, values: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step(step + 1)
        return values

    frames = pipeline(
        num_frames=size.num_frames,
        height=size.height,
        width=size.width,
        num_inference_steps=steps,
        guidance_scale=guidance,
        use_dynamic_cfg=uses_dynamic_guidance(spec),
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
        max_sequence_length=spec.max_text_seq_length,
        callback_on_step_end=stepped,
        **inputs,
    ).frames[0]
    if not np.isfinite(frames).all():
        raise NotFinite(
            "the video has values that are not finite",
            "use --precision fp32, or bf16 for a model trained in it",
        )
    video: Frames = (frames * 255).round().astype(np.uint8)
    return video


def unit_image(pixels: torch.Tensor) -> torch.Tensor:
    """Return a first frame ``[3, H, W]`` uint8 as the pipelines take it: ``[1, 3, H, W]`` in [0, 1]."""
    return pixels.float().div(255).unsqueeze(0)
