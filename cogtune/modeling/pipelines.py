"""diffusers pipelines, with the settings of the CogVideoX guides: for ``infer`` and a run's sample videos."""

from __future__ import annotations

import contextlib
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
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from cogtune.modeling.conditioning import pad_front
from cogtune.modeling.encoders import pixels_to_unit
from cogtune.models.checkpoint_configs import ModelSpec
from cogtune.models.geometry import Size, latent_frames, temporal_padding
from cogtune.models.variants import SamplingScheduler
from cogtune.system.errors import CogtuneError

Frames = np.ndarray[Any, np.dtype[np.uint8]]


class NotFinite(CogtuneError):
    """A sampled video with values that are not finite."""


def pipeline_class(spec: ModelSpec) -> type[DiffusionPipeline]:
    """Return the diffusers pipeline that samples this model."""
    kind: type[DiffusionPipeline] = CogVideoXImageToVideoPipeline if spec.image_to_video else CogVideoXPipeline
    return kind


def uses_dynamic_guidance(scheduler: Any) -> bool:
    """Return whether guidance grows over the steps, as the guides do with DPM."""
    return isinstance(scheduler, CogVideoXDPMScheduler)


def scheduler_for(spec: ModelSpec, config: Any, name: SamplingScheduler | None = None) -> Any:
    """Return a scheduler with trailing spacing.

    Args:
        config: of the checkpoint's own scheduler.
        name: the guides' choice for this model when None.
    """
    kind = CogVideoXDPMScheduler if (name or spec.sampled_with) == "dpm" else CogVideoXDDIMScheduler
    return kind.from_config(config, timestep_spacing="trailing")


class UnbatchedGuidance:
    """A transformer as a pipeline wants it, through which guidance's two samples go one by one.

    So compiled blocks meet the shape that they were compiled for, and activations take half the memory.

    Args:
        model: what is called, such as the transformer inside of what trains it.
    """

    def __init__(self, transformer: Any, model: Any = None) -> None:
        self._model = transformer if model is None else model
        self.config = transformer.config
        self.dtype = transformer.dtype

    def cache_context(self, _name: str) -> contextlib.AbstractContextManager[None]:
        """Return a context for attention caches; none are kept."""
        return contextlib.nullcontext()

    def __call__(
        self, *, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor, **shared: Any
    ) -> tuple[Tensor]:
        """Return the transformer's output, ``[B, F, C, h, w]``."""
        shared.pop("attention_kwargs", None)
        rows = zip(hidden_states.split(1), encoder_hidden_states.split(1), timestep.split(1), strict=True)
        answers = [
            self._model(hidden_states=hidden, encoder_hidden_states=text, timestep=time, **shared)[0]
            for hidden, text, time in rows
        ]
        return (torch.cat(answers),)


def steps_taken(steps: int, strength: float) -> int:
    """Return how many denoising steps are run at a strength, as diffusers counts them."""
    return min(int(steps * strength), steps)


def render(
    pipeline: DiffusionPipeline,
    spec: ModelSpec,
    size: Size,
    *,
    steps: int,
    guidance: float,
    seed: int,
    clip: Tensor | None = None,
    strength: float = 1.0,
    on_step: Callable[[int], None] | None = None,
    **inputs: Any,
) -> Frames:
    """Sample one video: frames ``[F, H, W, 3]`` uint8.

    Args:
        clip: frames ``[F, 3, H, W]`` uint8 that the video is made of, noised as far as ``strength`` says.
        strength: above 0 and at most 1; which share of the steps is taken.
        on_step: called after each denoising step with its number, from 1.
        inputs: the pipeline's inputs: a prompt or its embeddings, and the image.

    Raises:
        NotFinite: the model or the VAE overflowed.
    """

    def stepped(_pipeline: object, step: int, _timestep: object, values: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step(step + 1)
        return values

    generator = torch.Generator().manual_seed(seed)
    scheduler = pipeline.scheduler
    if clip is not None:
        pipeline.scheduler = _from_the_middle(scheduler, steps, steps - steps_taken(steps, strength))
        inputs["timesteps"] = pipeline.scheduler.timesteps.tolist()
        inputs["latents"] = _noised_latents(pipeline, spec, clip, generator)
    try:
        latents = pipeline(
            num_frames=size.num_frames,
            height=size.height,
            width=size.width,
            num_inference_steps=steps,
            guidance_scale=guidance,
            use_dynamic_cfg=uses_dynamic_guidance(scheduler),
            generator=generator,
            output_type="latent",
            max_sequence_length=spec.max_text_seq_length,
            callback_on_step_end=stepped,
            **inputs,
        ).frames
    finally:
        pipeline.scheduler = scheduler
    frames = decode(pipeline, latents[:, temporal_padding(latent_frames(size.num_frames), spec.patch_size_t) :])
    if not np.isfinite(frames).all():
        raise NotFinite(
            "the video has values that are not finite",
            "use --precision fp32, or bf16 for a model trained in it",
        )
    video: Frames = (frames * 255).round().astype(np.uint8)
    return video


@torch.no_grad()
def decode(pipeline: DiffusionPipeline, latents: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Decode latents ``[1, F, C, h, w]`` to frames ``[F, H, W, 3]`` in [0, 1]."""
    video = _in_tiles_if_needed(pipeline, lambda: pipeline.decode_latents(latents))
    frames: np.ndarray[Any, np.dtype[np.float32]] = pipeline.video_processor.postprocess_video(video, "np")[0]
    return frames


def _in_tiles_if_needed(pipeline: DiffusionPipeline, work: Callable[[], Tensor]) -> Tensor:
    """Run the VAE; switch it to tiles if the GPU runs out of memory."""
    try:
        return work()
    except torch.OutOfMemoryError:
        if pipeline.vae.use_tiling:
            raise
    torch.cuda.empty_cache()
    pipeline.vae.enable_tiling()
    return work()


def _from_the_middle(scheduler: Any, steps: int, first: int) -> Any:
    """Return a scheduler of ``steps`` timesteps that skips the ``first`` ones whenever a pipeline sets them."""
    late = type(scheduler).from_config(scheduler.config)

    def set_timesteps(device: Any = None, timesteps: Any = None) -> None:  # noqa: ARG001 (a pipeline looks for both)
        type(scheduler).set_timesteps(late, steps, device)
        late.timesteps = late.timesteps[first:]

    late.set_timesteps = set_timesteps
    set_timesteps()
    return late


@torch.no_grad()
def _noised_latents(pipeline: DiffusionPipeline, spec: ModelSpec, clip: Tensor, generator: torch.Generator) -> Tensor:
    """Return the latents ``[1, F, C, h, w]`` of a clip, padded for the model, at the scheduler's first timestep.

    Source: diffusers' ``CogVideoXVideoToVideoPipeline.prepare_latents``; its pipeline rejects clips that need padding.
    """
    vae, device = pipeline.vae, pipeline.device
    video = pixels_to_unit(clip.to(device), vae.dtype).transpose(0, 1).unsqueeze(0)
    encoded = _in_tiles_if_needed(pipeline, lambda: vae.encode(video).latent_dist.sample(generator))
    latents = pipeline.vae_scaling_factor_image * encoded.to(vae.dtype).permute(0, 2, 1, 3, 4)
    latents = pad_front(latents, spec)
    noise = randn_tensor(latents.shape, generator=generator, device=device, dtype=latents.dtype)
    noised: Tensor = pipeline.scheduler.add_noise(latents, noise, pipeline.scheduler.timesteps[:1])
    return noised


def unit_image(pixels: Tensor) -> Tensor:
    """Return a first frame ``[3, H, W]`` uint8 as the pipelines take it: ``[1, 3, H, W]`` in [0, 1]."""
    return pixels.float().div(255).unsqueeze(0)
