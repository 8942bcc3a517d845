"""The five rows, and what is read from a checkpoint's configs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cogtune.errors import CogtuneError, UsageError
from cogtune.geometry import Size
from cogtune.models import VARIANTS, fingerprint, published, read_spec, variant


def test_there_are_five_models() -> None:
    assert list(VARIANTS) == ["2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v"]
    assert [row.fps for row in VARIANTS.values()] == [8, 8, 8, 16, 16]
    assert [row.trained_in for row in VARIANTS.values()] == ["fp16", "bf16", "bf16", "bf16", "bf16"]


def test_a_wrong_name_gets_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"did you mean '1\.5-5b'"):
        variant("1.5-5B2")


@pytest.mark.parametrize(
    ("reference", "name"), [("2b", "2b"), ("thudm/cogvideox1.5-5b-i2v", "1.5-5b-i2v"), ("tiny:5b", "5b"), ("x/y", None)]
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
    assert "learned positions" in fixed.size_problems(Size(9, 128, 192))[0]
    sliced = read_spec(tiny("1.5-5b"))
    assert "rotary grid" in sliced.size_problems(Size(17, 4096, 4096))[0]


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    with pytest.raises(CogtuneError, match="no model_index"):
        read_spec(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(CogtuneError, match="WanPipeline checkpoint"):
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
