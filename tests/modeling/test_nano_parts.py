"""The nano parts in tools/nano/parts: what their records say of them is so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX

from cogtune.data.nano import world
from cogtune.modeling.nano import SHARED_PARTS
from tools.nano.common import folder_hashes, recorded
from tools.nano.train_vae import quality

PARTS = Path(__file__).parents[2] / "tools" / "nano" / "parts"


def test_files_are_those_of_the_records() -> None:
    records = recorded(PARTS)
    assert records.keys() == set(SHARED_PARTS)
    for part, record in records.items():
        assert record["files"] == folder_hashes(PARTS / part), part
    assert records["vae"]["world"] == records["text_encoder"]["world"] == world.WORLD_VERSION


def test_the_vae_keeps_what_it_was_not_trained_on() -> None:
    recorded_psnr = recorded(PARTS)["vae"]["psnr"]["held out"]
    vae = AutoencoderKLCogVideoX.from_pretrained(PARTS / "vae", dtype=torch.float32).eval()
    random = np.random.default_rng(1)
    scenes = [world.scene_of(subject, random) for subject, _ in world.held_out_prompts()[:4]]
    values = quality(vae, scenes, torch.device("cpu"))
    assert np.mean(values) > 32
    assert min(values) >= recorded_psnr["least"] - 1
