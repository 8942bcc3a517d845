"""What training hands the transformer, held to what the diffusers pipelines hand it, for all five models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from cogtune.modeling.conditioning import (
    conditioning_of,
    pad_front,
    place_image,
    sample_posterior,
    scale_image_latents,
    scale_video_latents,
)
from cogtune.modeling.encoders import TextEncoder, VideoEncoder, pixels_to_unit
from cogtune.modeling.random_weights import build_transformer
from cogtune.models.checkpoint_configs import ModelSpec, published_spec, read_spec
from cogtune.models.geometry import Size, latent_shape
from cogtune.models.variants import VARIANTS, Variant

CPU = torch.device("cpu")
PROMPT = "a red ball rolls over the grass"
IMAGE_SEED = 7


class Recorder(torch.nn.Module):
    """Stands in for the transformer: keeps what it is given, and answers with zeros."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.config, self.dtype, self.device = transformer.config, transformer.dtype, transformer.device
        self.cache_context = transformer.cache_context
        self.given: dict[str, Any] = {}

    def forward(self, **given: Any) -> tuple[Tensor]:
        self.given = given
        channels = self.config.out_channels
        return (torch.zeros_like(given["hidden_states"][:, :, :channels]),)


def recorded(
    folder: Path, size: Size, image: Tensor | None, *, transformer: Any = None, output_type: str = "pt"
) -> tuple[dict[str, Any], Tensor]:
    """What the pipeline gives its transformer at the first step, and the video that comes out of it.

    Args:
        transformer: another than the folder's own, to be stood in for.
    """
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    recorder = Recorder(transformer or pipeline.transformer)
    pipeline.transformer = recorder
    inputs = {} if image is None else {"image": image.float().div(255).unsqueeze(0)}
    video = pipeline(
        prompt=PROMPT,
        num_frames=size.num_frames,
        height=size.height,
        width=size.width,
        num_inference_steps=1,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(IMAGE_SEED),
        output_type=output_type,
        **inputs,
    ).frames
    return recorder.given, video


def assert_conditioned_alike(given: dict[str, Any], spec: ModelSpec, shape: tuple[int, ...]) -> None:
    """Rotary positions and ofs are the pipeline's, to the bit."""
    latents = torch.zeros(1, *shape)
    ours = conditioning_of(latents, spec)
    theirs = given["image_rotary_emb"]
    if theirs is None:
        assert ours.rotary is None
    else:
        assert ours.rotary is not None
        assert torch.equal(ours.rotary[0], theirs[0])
        assert torch.equal(ours.rotary[1], theirs[1])
    if given.get("ofs") is None:
        assert ours.ofs is None
    else:
        assert ours.ofs is not None
        assert torch.equal(ours.ofs, given["ofs"])


def assert_image_alike(given: dict[str, Any], spec: ModelSpec, folder: Path, image: Tensor) -> None:
    """The latents of the conditioning image are the pipeline's, to the bit."""
    frames = given["hidden_states"].shape[1]
    encoder = VideoEncoder(folder, device=CPU, dtype=torch.float32)
    moments = encoder.image_moments(pixels_to_unit(image, torch.float32).unsqueeze(0))
    noise = torch.randn(moments.chunk(2, dim=1)[0].shape, generator=torch.Generator().manual_seed(IMAGE_SEED))
    image_latents = scale_image_latents(sample_posterior(moments, noise.permute(0, 2, 1, 3, 4)), spec)
    placed = place_image(image_latents, frames)
    assert torch.equal(placed, given["hidden_states"][:, :, spec.out_channels :])


def image_of(size: Size) -> Tensor:
    """A conditioning image ``uint8 [3, H, W]``."""
    random = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (3, size.height, size.width), dtype=torch.uint8, generator=random)


SIZES = {
    False: [Size(9, 64, 96), Size(13, 48, 96), Size(17, 96, 64)],
    True: [Size(17, 64, 96), Size(9, 48, 80), Size(13, 64, 64), Size(5, 32, 96)],
}


def cases() -> list[Any]:
    """Native and other sizes, odd and even counts of latent frames; the one with learned positions has one size."""
    return [
        pytest.param(
            row.name, Size(size.num_frames, 64, 96) if row.learned_positions else size, id=f"{row.name}-{size}"
        )
        for row in VARIANTS.values()
        for size in SIZES[row.patch_size_t is not None]
    ]


@pytest.mark.parametrize(("name", "size"), cases())
def test_the_transformer_is_given_what_the_pipeline_gives_it(
    name: str, size: Size, tiny: Callable[[str], Path]
) -> None:
    folder = tiny(name)
    spec = read_spec(folder)
    image = image_of(size) if spec.image_to_video else None
    given, video = recorded(folder, size, image)

    shape = latent_shape(size, spec.out_channels, spec.patch_size_t)
    assert given["hidden_states"].shape[1:] == (shape[0], spec.in_channels, *shape[2:])
    if not spec.size_problems(size):  # diffusers decodes an even count of latent frames to too many frames
        assert video.shape[1] == size.num_frames

    assert_conditioned_alike(given, spec, shape)

    text = TextEncoder(folder, max_tokens=spec.max_text_seq_length, device=CPU, dtype=torch.float32)
    assert torch.equal(text.encode([PROMPT]), given["encoder_hidden_states"])

    if image is not None:
        assert_image_alike(given, spec, folder, image)


REAL_SIZES = {
    False: [Size(49, 480, 720), Size(45, 480, 720), Size(33, 320, 512), Size(17, 720, 480)],
    True: [Size(81, 768, 1360), Size(77, 768, 768), Size(65, 1360, 768), Size(37, 480, 720)],
}
"""The native size first; odd and even counts of latent frames."""


def _pace(row: Variant, size: Size) -> list[pytest.MarkDecorator]:
    """An image-to-video model's VAE encodes an image of that size, which takes its time."""
    if not row.image_to_video:
        return []
    return [pytest.mark.slow if size == REAL_SIZES[row.patch_size_t is not None][1] else pytest.mark.exhaustive]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(row.name, size, id=f"{row.name}-{size}", marks=_pace(row, size))
        for row in VARIANTS.values()
        for size in REAL_SIZES[row.patch_size_t is not None]
        if not row.learned_positions or (size.height, size.width) == (480, 720)
    ],
)
def test_at_the_real_dimensions_too(name: str, size: Size, tiny: Callable[[str], Path]) -> None:
    """The published transformer's own configuration, at its native size and others; encoders are tiny ones."""
    row, folder = VARIANTS[name], tiny(name)
    spec = published_spec(row)
    assert REAL_SIZES[row.patch_size_t is not None][0] == row.native
    transformer = build_transformer(row, "full", device="meta", dtype=torch.float32)
    image = image_of(size) if spec.image_to_video else None
    given, _ = recorded(folder, size, image, transformer=transformer, output_type="latent")
    shape = latent_shape(size, spec.out_channels, spec.patch_size_t)
    assert given["hidden_states"].shape[1:] == (shape[0], spec.in_channels, *shape[2:])
    assert_conditioned_alike(given, spec, shape)
    if image is not None:
        assert_image_alike(given, spec, folder, image)


@pytest.mark.parametrize("name", VARIANTS)
def test_video_latents_are_what_the_pipeline_decodes(name: str, tiny: Callable[[str], Path]) -> None:
    """Scaled latents, decoded as the pipeline decodes its result, are the VAE's own reconstruction."""
    folder = tiny(name)
    spec = read_spec(folder)
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    encoder = VideoEncoder(folder, device=CPU, dtype=torch.float32)
    clip = torch.randint(0, 256, (9, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    moments = encoder.moments(clip).unsqueeze(0)
    latents = sample_posterior(moments, torch.zeros(1, 3, 16, 8, 12))
    with torch.no_grad():
        direct = pipeline.vae.decode(latents.permute(0, 2, 1, 3, 4)).sample
        through = pipeline.decode_latents(scale_video_latents(latents, spec))
    assert torch.allclose(direct, through, atol=1e-4)


def test_padding_goes_in_front_and_only_where_needed(tiny: Callable[[str], Path]) -> None:
    latents = torch.arange(3.0).view(1, 3, 1, 1, 1)
    assert pad_front(latents, read_spec(tiny("1.5-5b"))).flatten().tolist() == [0, 0, 1, 2]
    assert pad_front(latents[:, :2], read_spec(tiny("1.5-5b"))).flatten().tolist() == [0, 1]
    assert pad_front(latents, read_spec(tiny("5b"))).flatten().tolist() == [0, 1, 2]


def test_image_latents_are_divided_when_the_vae_says_inverted(tiny: Callable[[str], Path]) -> None:
    ones = torch.ones(1, 1, 16, 2, 2)
    assert scale_image_latents(ones, read_spec(tiny("5b-i2v")))[0, 0, 0, 0, 0] == pytest.approx(0.7)
    assert scale_image_latents(ones, read_spec(tiny("1.5-5b-i2v")))[0, 0, 0, 0, 0] == pytest.approx(1 / 0.7)
