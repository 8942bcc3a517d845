"""The five rows, and what is read from a checkpoint's configs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import CogVideoXPatchEmbed
from huggingface_hub import constants

from cogtune.models.checkpoint_configs import fingerprint, published_spec, read_spec
from cogtune.models.geometry import Size, latent_frames
from cogtune.models.locate import locate
from cogtune.models.tokens import token_counter
from cogtune.models.variants import VARIANTS, published, variant
from cogtune.system.errors import CogtuneError, UsageError


def test_there_are_five_models() -> None:
    assert list(VARIANTS) == ["2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v"]
    assert [row.fps for row in VARIANTS.values()] == [8, 8, 8, 16, 16]
    assert [row.trained_in for row in VARIANTS.values()] == ["fp16", "bf16", "bf16", "bf16", "bf16"]


def test_a_wrong_name_gets_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"did you mean '1\.5-5b'"):
        variant("1.5-5B2")


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("2b", "2b"),
        ("thudm/cogvideox1.5-5b-i2v", "1.5-5b-i2v"),
        ("zai-org/CogVideoX1.5-5B-I2V", "1.5-5b-i2v"),
        ("tiny:5b", "5b"),
        ("tiny:6b", None),
        ("tiny:THUDM/CogVideoX-5b", None),
        ("nano:1.5-5b-I2V", "1.5-5b-i2v"),
        ("nano:1.5-5b", None),
        ("x/y", None),
    ],
)
def test_published_references(reference: str, name: str | None) -> None:
    row = published(reference)
    assert (row.name if row else None) == name


@pytest.mark.parametrize("name", VARIANTS)
def test_a_checkpoints_configs_are_read(name: str, tiny: Callable[[str], Path]) -> None:
    spec = read_spec(tiny(name))
    row = VARIANTS[name]
    assert spec.variant is row
    assert spec.image_to_video == row.image_to_video
    assert spec.scaling_factor == row.vae_scaling_factor
    assert spec.invert_scale_latents == row.invert_scale_latents
    assert spec.snr_shift_scale == row.snr_shift_scale
    assert spec.size_problems(spec.native) == []


def test_size_rules(tiny: Callable[[str], Path]) -> None:
    spec = read_spec(tiny("2b"))
    assert len(spec.size_problems(Size(10, 60, 90))) == 3
    assert spec.size_problems(Size(17, 128, 192)) == []
    assert "such as 17" in spec.size_problems(Size(16, 64, 96))[0]
    assert spec.size_advice(Size(49, 64, 96)) == []
    assert "up to 49" in spec.size_advice(Size(57, 64, 96))[0]
    fixed = read_spec(tiny("5b-i2v"))
    for other in (Size(9, 128, 192), Size(17, 64, 96), Size(1, 64, 96)):
        assert "learned positions, which only work at 9x64x96" in fixed.size_problems(other)[0]
        assert fixed.bucket_problems(other)
    sliced = read_spec(tiny("1.5-5b"))
    assert "rotary grid" in sliced.size_problems(Size(17, 4096, 4096))[0]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("frames", [49, 41, 33, 25])
def test_positions_are_the_trained_ones_at_every_size_that_is_allowed(name: str, frames: int) -> None:
    """What diffusers' patch embedding adds: what it has learned, which "effectively" is 0 here, or sines."""
    row = VARIANTS[name]
    if not row.learned_positions:
        assert published_spec(row).size_problems(Size(frames, 480, 720)) == []
        return
    embed = CogVideoXPatchEmbed(
        in_channels=32, embed_dim=64, text_embed_dim=32, sample_width=90, sample_height=60, sample_frames=49,
        max_text_seq_length=5, use_learned_positional_embeddings=True,
    )  # fmt: skip
    for parameter in (*embed.parameters(), embed.pos_embedding):
        torch.nn.init.zeros_(parameter)
    added = embed(torch.zeros(1, 5, 32), torch.zeros(1, latent_frames(frames), 32, 60, 90))
    allowed = published_spec(row).size_problems(Size(frames, 480, 720)) == []
    assert allowed == (float(added.detach().abs().max()) == 0) == (frames == 49)


@pytest.mark.parametrize(
    ("name", "size", "told"),
    [
        ("2b", "49x480x720", []),
        ("2b", "49x256x256", ["256x256: the model was trained at 480x720"]),
        ("5b", "49x768x1360", ["768x1360: the model was trained at 480x720"]),
        ("1.5-5b", "81x768x1360", []),
        ("1.5-5b", "81x576x1024", ["576x1024: the model was trained at 768x1360"]),
        ("1.5-5b-i2v", "81x1360x768", []),
        ("1.5-5b-i2v", "81x768x768", []),
        ("1.5-5b-i2v", "81x768x1376", ["768x1376: the model was trained with sides of 768 and 768 to 1360"]),
        ("1.5-5b-i2v", "81x576x1024", ["576x1024: the model was trained with sides of 768 and 768 to 1360"]),
        (
            "5b",
            "57x240x368",
            ["57 frames: the model was trained on 8N+1, up to 49", "240x368: the model was trained at 480x720"],
        ),
    ],
)
def test_a_size_unlike_the_models_own_gets_a_note(name: str, size: str, told: list[str]) -> None:
    spec = published_spec(VARIANTS[name])
    assert spec.size_problems(Size.parse(size)) == []
    assert spec.size_advice(Size.parse(size)) == told


def test_precision_and_steps_that_a_model_cannot_do() -> None:
    assert [name for name, row in VARIANTS.items() if not published_spec(row).precision_problems("fp16")] == ["2b"]
    assert published_spec(VARIANTS["5b"]).precision_problems("bf16") == []
    assert published_spec(VARIANTS["5b"]).steps_problems(1000) == []
    assert "must not exceed the model's 1000 timesteps" in published_spec(VARIANTS["5b"]).steps_problems(1001)[0]


@pytest.mark.parametrize("owner", ["THUDM", "zai-org"])
@pytest.mark.parametrize("asked", ["{owner}", "short", "the other"])
def test_a_copy_of_a_published_model_is_found_under_either_owner(
    owner: str, asked: str, tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a cache laid out as huggingface_hub does; its snapshot is a tiny model."""
    cache = tmp_path / "hub"
    stored = cache / f"models--{owner}--CogVideoX-5b"
    shutil.copytree(tiny("5b"), stored / "snapshots" / "8d6e")
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text("8d6e")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    other = {"THUDM": "zai-org", "zai-org": "THUDM"}[owner]
    reference = {"short": "5b", "the other": f"{other}/CogVideoX-5b"}.get(asked, f"{owner}/CogVideoX-5b")
    assert locate(reference) == stored / "snapshots" / "8d6e"
    assert token_counter(reference) is not None
    assert token_counter("2b") is None


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    with pytest.raises(CogtuneError, match="no model_index"):
        read_spec(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(CogtuneError, match="is a checkpoint of WanPipeline, not of CogVideoX"):
        read_spec(tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(tiny("2b"), broken)
    config = json.loads((broken / "vae" / "config.json").read_text())
    del config["scaling_factor"]
    (broken / "vae" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CogtuneError, match=r"vae/config\.json: scaling_factor: the key is missing"):
        read_spec(broken)


def test_a_fingerprint_notices_one_changed_weight(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny("2b"), copy)
    before = fingerprint(copy, "vae")
    assert before == fingerprint(tiny("2b"), "vae")
    weights = next((copy / "vae").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert fingerprint(copy, "vae") != before
    assert fingerprint(copy, "transformer") == fingerprint(tiny("2b"), "transformer")


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    "other",
    [
        {"in_channels": 48},
        {"patch_size_t": 4},
        {"rotary": False, "snr_shift_scale": 1.0},
        {"learned_positions": True, "in_channels": 16},
        {"ofs_embed_dim": 512, "in_channels": 16},
        {"snr_shift_scale": 2.0},
    ],
)
def test_a_model_that_resembles_one_of_the_five_is_not_taken_for_it(name: str, other: dict[str, Any]) -> None:
    spec = published_spec(VARIANTS[name])
    assert spec.variant is VARIANTS[name]
    with pytest.raises(CogtuneError, match="the architecture of none of the five"):
        _ = replace(spec, **other).variant


def test_a_tiny_model_that_is_there_is_found_without_torch(tiny: Callable[[str], Path]) -> None:
    tiny("5b")
    program = "import sys; from cogtune.models.locate import spec_of; spec_of('tiny:5b'); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "False\n"


@pytest.mark.parametrize(
    ("name", "content", "hint"),
    [
        ("lora.safetensors", b'{"transformer.a.lora_A.weight":{}}', "pass a LoRA as --lora"),
        ("5b.safetensors", b'{"transformer_blocks.0.attn1.to_q.weight":{}}', "transformer/diffusion_pytorch_model"),
        ("5b-Q4.gguf", None, "GGUF files are not supported"),
        ("a.bin", b"nothing known", "pass a LoRA as --lora"),
    ],
)
def test_a_file_given_as_the_model_gets_advice_for_what_it_is(
    tmp_path: Path, name: str, content: bytes | None, hint: str
) -> None:
    start = b"GGUF\x03\0\0\0" if content is None else len(content).to_bytes(8, "little")
    (tmp_path / name).write_bytes(start + (content or b""))
    with pytest.raises(UsageError, match="is a file, not a folder") as caught:
        locate(str(tmp_path / name))
    assert hint in caught.value.hint
