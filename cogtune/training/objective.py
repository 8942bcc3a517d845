"""The loss, with all its randomness as functions of (seed, sample number). Computed in fp32 at any precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import CogVideoXDDIMScheduler
from torch import Tensor

from cogtune.config.choices import TimestepDistribution
from cogtune.data.batches import Batch
from cogtune.modeling.conditioning import (
    conditioning_of,
    pad_front,
    place_image,
    predict,
    sample_posterior,
    scale_image_latents,
    scale_video_latents,
)
from cogtune.modeling.encoders import VideoEncoder, pixels_to_unit
from cogtune.models.checkpoint_configs import ModelSpec
from cogtune.models.geometry import temporal_padding
from cogtune.models.locate import loading
from cogtune.system.reading import read_object

_GOLDEN = 0x9E3779B97F4A7C15
_LAYERS = 0x5851F42D4C957F2D
"""Separates the random numbers of layers (dropout) from those of samples."""


@dataclass(frozen=True)
class TimestepSampling:
    """The distributions of training timesteps and image noise."""

    timesteps: TimestepDistribution = "uniform"
    mean: float = 0.0
    deviation: float = 1.0
    """Mean of the normal for ``logit-normal`` (Esser et al. 2024, "Scaling Rectified Flow Transformers")."""
    bounds: tuple[int, int] | None = None
    """Lowest and highest timestep; None for all."""
    image_noise: tuple[float, float] | None = (-3.0, 0.5)
    """Mean and deviation of the log of the noise added to conditioning images (CogVideoX report, section on I2V);
    None for no noise."""

    def timestep(self, random: torch.Generator, count: int) -> int:
        """Draw one of the timesteps 0 to ``count - 1``."""
        low, high = self.bounds or (0, count - 1)
        width = high - low + 1
        if self.timesteps == "uniform":
            return low + int(torch.randint(width, (), generator=random))
        share = torch.sigmoid(torch.randn((), generator=random, dtype=torch.float64) * self.deviation + self.mean)
        return low + min(int(share * width), width - 1)


USUAL = TimestepSampling()


def _mixed(seed: int, ordinal: int) -> int:
    mixed = (seed * _GOLDEN + ordinal * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 31)) * _GOLDEN) & (2**64 - 1)
    return (mixed ^ (mixed >> 29)) & (2**63 - 1)


def generator_for(seed: int, ordinal: int) -> torch.Generator:
    """Return the random generator of sample ``ordinal``, the same in any process and on any device."""
    return torch.Generator().manual_seed(_mixed(seed, ordinal))


def seed_layers(seed: int, ordinal: int) -> None:
    """Seed what layers draw in a forward pass (dropout) from its first sample."""
    torch.manual_seed(_mixed(seed, ordinal) ^ _LAYERS)


@dataclass(frozen=True)
class NoiseDraws:
    """The random part of a forward pass, one row a sample.

    ``noise`` and ``posterior`` ``[B, F, C, h, w]`` standard normal (noise has the padded F), ``timesteps [B]``,
    ``dropped [B]`` bool. For an image-to-video model ``image_noise [B, 3, H, W]``, scaled by each sample's sigma
    (zero without noise),
    and ``image_posterior [B, 1, C, h, w]``, standard normal; else both None.
    """

    noise: Tensor
    posterior: Tensor
    timesteps: Tensor
    dropped: Tensor
    image_noise: Tensor | None
    image_posterior: Tensor | None


_Tensors = TypeVar("_Tensors", Batch, NoiseDraws)


def pinned(record: _Tensors) -> _Tensors:
    """Return ``record`` with its tensors in pinned memory, from which they are copied to a GPU while it computes.

    They stay as they are if the system gives no pinned memory.
    """
    tensors = {key: value for key, value in vars(record).items() if isinstance(value, Tensor)}
    try:
        changes: dict[str, Any] = {key: value.pin_memory() for key, value in tensors.items()}
    except RuntimeError:
        return record
    return replace(record, **changes)


def draw_noise(
    batch: Batch,
    spec: ModelSpec,
    *,
    seed: int,
    caption_dropout: float,
    sampling: TimestepSampling = USUAL,
    timesteps: Sequence[int] | None = None,
) -> NoiseDraws:
    """Draw the random numbers that belong to the samples of ``batch``.

    Args:
        timesteps: fixed timesteps to use instead of random ones.
    """
    _, channels, frames, height, width = batch.moments.shape
    padded = frames + temporal_padding(frames, spec.patch_size_t)
    noise, posterior, steps, dropped = [], [], [], []
    image_noise, image_posterior = [], []
    for position, ordinal in enumerate(batch.ordinals):
        random = generator_for(seed, ordinal)
        drawn = sampling.timestep(random, spec.num_train_timesteps)
        steps.append(drawn if timesteps is None else timesteps[position])
        dropped.append(float(torch.rand((), generator=random)) < caption_dropout)
        noise.append(torch.randn(padded, channels // 2, height, width, generator=random))
        posterior.append(torch.randn(frames, channels // 2, height, width, generator=random))
        if batch.image is not None:
            log_sigma = torch.randn((), generator=random)
            unscaled = torch.randn(batch.image.shape[1:], generator=random)
            image_noise.append(_sigma(log_sigma, sampling) * unscaled)
            image_posterior.append(torch.randn(1, channels // 2, height, width, generator=random))
    return NoiseDraws(
        torch.stack(noise),
        torch.stack(posterior),
        torch.tensor(steps),
        torch.tensor(dropped),
        torch.stack(image_noise) if image_noise else None,
        torch.stack(image_posterior) if image_posterior else None,
    )


def _sigma(standard: Tensor, sampling: TimestepSampling) -> Tensor:
    """Return the sigma of a sample's image noise, from a draw of the standard normal."""
    if sampling.image_noise is None:
        return torch.zeros(())
    mean, deviation = sampling.image_noise
    return torch.exp(standard * deviation + mean)


class Objective:
    """v-prediction mean squared error under the checkpoint's own noise schedule.

    Equal to the x0 error weighted by 1 / (1 - alpha). Salimans and Ho 2022, "Progressive Distillation".
    """

    def __init__(
        self,
        spec: ModelSpec,
        checkpoint: Path,
        null_text: Tensor,
        *,
        seed: int,
        caption_dropout: float,
        device: torch.device,
        dtype: torch.dtype,
        image_encoder: VideoEncoder | None,
        sampling: TimestepSampling = USUAL,
    ) -> None:
        self.spec = spec
        self.seed = seed
        self.sampling = sampling
        self.caption_dropout = caption_dropout
        self.device = device
        self.dtype = dtype
        self.image_encoder = image_encoder
        self.null_text = null_text.to(device, dtype)
        self.alphas = _alphas_cumprod(checkpoint).to(device)

    def draw(self, batch: Batch, timesteps: Sequence[int] | None = None) -> NoiseDraws:
        """Draw the random numbers of ``batch``; may be called from any thread.

        Args:
            timesteps: fixed timesteps, one per sample, for evaluation.
        """
        return draw_noise(
            batch,
            self.spec,
            seed=self.seed,
            caption_dropout=self.caption_dropout,
            sampling=self.sampling,
            timesteps=timesteps,
        )

    def losses(
        self,
        transformer: torch.nn.Module,
        batch: Batch,
        draws: NoiseDraws,
        *,
        training: bool = True,
    ) -> Tensor:
        """Compute the loss of each sample, ``[B]`` in fp32.

        Args:
            draws: of :meth:`draw` for the same batch.
            training: False turns off caption dropout and image noise.
                With True, torch's random state is seeded, so that a resumed run has the same dropout.
        """
        posterior, noise = self._here(draws.posterior), self._here(draws.noise)
        clean = sample_posterior(self._here(batch.moments), posterior)
        clean = pad_front(scale_video_latents(clean, self.spec), self.spec)
        steps = self._here(draws.timesteps)
        alpha = self.alphas[steps].view(-1, 1, 1, 1, 1)
        signal, spread = alpha.sqrt(), (1.0 - alpha).sqrt()
        noisy = signal * clean + spread * noise
        target = signal * noise - spread * clean
        text = self._here(batch.text).to(self.dtype)
        if training:
            text = torch.where(self._here(draws.dropped).view(-1, 1, 1), self.null_text, text)
            seed_layers(self.seed, batch.ordinals[0])
        predicted = predict(
            transformer,
            noisy.to(self.dtype),
            text,
            steps,
            self._image_latents(batch, draws, clean.shape[1], noised=training),
            conditioning_of(noisy.to(self.dtype), self.spec),
        )
        return (predicted.float() - target).square().mean(dim=(1, 2, 3, 4))

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _image_latents(self, batch: Batch, draws: NoiseDraws, frames: int, *, noised: bool) -> Tensor | None:
        if self.image_encoder is None or batch.image is None:
            return None
        assert draws.image_noise is not None  # drawn for every image
        assert draws.image_posterior is not None
        image = pixels_to_unit(self._here(batch.image), torch.float32)
        if noised:
            image = image + self._here(draws.image_noise)
        moments = self.image_encoder.image_moments(image)
        latents = sample_posterior(moments, self._here(draws.image_posterior))
        return place_image(scale_image_latents(latents, self.spec), frames).to(self.dtype)


def _alphas_cumprod(checkpoint: Path) -> Tensor:
    """Read the scheduler's cumulative alphas ``[1000]`` in fp32, including SNR shift and rescaling."""
    path = checkpoint / "scheduler" / "scheduler_config.json"
    with loading(path.parent):
        scheduler = CogVideoXDDIMScheduler.from_config(read_object(path))
    alphas: Tensor = scheduler.alphas_cumprod.to(torch.float32)
    return alphas
