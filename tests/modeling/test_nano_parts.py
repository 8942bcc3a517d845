"""The nano parts of the package: what their records say of them is so."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSpatialNorm3D

from cogtune.data.nano import world
from cogtune.modeling.nano import new_vae
from cogtune.models.nano_models import NANO_PARTS, SHARED_PARTS, transformer_part
from cogtune.models.variants import NANO_VARIANTS
from tools.nano.common import folder_hashes, recorded
from tools.nano.train_vae import modulated, quality


def test_files_are_those_of_the_records() -> None:
    records = recorded(NANO_PARTS)
    assert records.keys() == {path.name for path in NANO_PARTS.iterdir()} - {"records"}
    assert records.keys() >= set(SHARED_PARTS)
    for part, record in records.items():
        assert record["files"] == folder_hashes(NANO_PARTS / part), part
    assert records["vae"]["world"] == records["text_encoder"]["world"] == 1  # since then, only places have changed
    for name in NANO_VARIANTS:
        if transformer_part(name) in records:
            assert records[transformer_part(name)]["data"]["world"] == world.WORLD_VERSION


def test_the_vae_keeps_what_it_was_not_trained_on() -> None:
    recorded_psnr = recorded(NANO_PARTS)["vae"]["psnr"]["held out"]
    vae = AutoencoderKLCogVideoX.from_pretrained(NANO_PARTS / "vae", dtype=torch.float32).eval()
    random = np.random.default_rng(1)
    scenes = [world.scene_of(subject, random) for subject, _ in world.held_out_prompts()[:4]]
    values = quality(vae, scenes, torch.device("cpu"))
    assert np.mean(values) > 32
    assert min(values) >= recorded_psnr["least"] - 1


@pytest.mark.parametrize("frames", [5, 2])
def test_the_norm_that_training_uses_computes_the_same(frames: int) -> None:
    vae = new_vae().double().eval()
    latents = torch.randn(2, 16, frames, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = vae.decode(latents).sample
        replaced = [module for module in vae.modules() if isinstance(module, CogVideoXSpatialNorm3D)]
        for module in replaced:
            module.forward = partial(modulated, module)
        assert replaced
        assert (vae.decode(latents).sample - expected).abs().max() < 1e-12
