"""Captions and clips to what training reads: T5 embeddings and VAE moments. Both exactly as the pipelines do it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor
from transformers import AutoTokenizer, T5EncoderModel


def pixels_to_unit(frames: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 pixels as numbers in [-1, 1], as diffusers' ``VideoProcessor`` makes them."""
    return (2.0 * (frames.to(torch.float32) / 255.0) - 1.0).to(dtype)


class TextEncoder:
    """The checkpoint's T5 encoder and tokenizer on ``device``."""

    def __init__(self, checkpoint: Path, *, max_tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint / "tokenizer")
        self.model = T5EncoderModel.from_pretrained(checkpoint / "text_encoder", dtype=dtype).to(device).eval()
        self.max_tokens = max_tokens

    @torch.inference_mode()
    def encode(self, captions: Sequence[str]) -> Tensor:
        """Embeddings ``[B, L, D]`` on the CPU; longer captions are cut at ``max_tokens``, as the pipelines do."""
        tokens = self.tokenizer(
            list(captions),
            padding="max_length",
            max_length=self.max_tokens,
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        ).input_ids
        embeddings: Tensor = self.model(tokens.to(self.model.device))[0]
        return embeddings.cpu()


class VideoEncoder:
    """The checkpoint's VAE on ``device``."""

    def __init__(self, checkpoint: Path, *, device: torch.device, dtype: torch.dtype) -> None:
        self.vae = AutoencoderKLCogVideoX.from_pretrained(checkpoint / "vae", dtype=dtype).to(device).eval()

    @torch.inference_mode()
    def moments(self, frames: Tensor) -> Tensor:
        """Posterior moments ``[2C, F, h, w]`` on the CPU of a clip ``[F, 3, H, W]`` uint8 (mean, then log-variance)."""
        video = pixels_to_unit(frames.to(self.vae.device), self.vae.dtype).permute(1, 0, 2, 3).unsqueeze(0)
        parameters: Tensor = self.vae.encode(video).latent_dist.parameters
        return parameters[0].cpu()

    @torch.no_grad()
    def image_moments(self, images: Tensor) -> Tensor:
        """Posterior moments ``[B, 2C, 1, h, w]`` on the VAE's device of images ``[B, 3, H, W]`` in [-1, 1]."""
        parameters: Tensor = self.vae.encode(images.to(self.vae.dtype).unsqueeze(2)).latent_dist.parameters
        return parameters
