"""Adapters: what is trained is what plain diffusers loads, whatever the kind; dropout belongs to the step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file

from cogtune.encoding import jobs
from cogtune.modeling.adapters import save_lora
from cogtune.models.checkpoint_configs import read_spec
from cogtune.models.variants import LORA_WEIGHTS_NAME
from tests.support.adapters import adapted, answer
from tests.support.objectives import batch_of, objective
from tests.support.runs_in_process import evaluations, fill_here, plan_for, train_here

KINDS: dict[str, Any] = {
    "plain": {},
    "dropout": {"dropout": 0.5},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "dora-rslora": {"dora": True, "rslora": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_plain_diffusers_loads_every_kind_at_its_strength(
    kind: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    ours = adapted(tiny("2b"), **KINDS[kind]).eval()
    save_lora(tmp_path / LORA_WEIGHTS_NAME, ours, {})
    pipeline = CogVideoXPipeline.from_pretrained(tiny("2b"), dtype=torch.float32)
    before = answer(pipeline.transformer)
    pipeline.load_lora_weights(tmp_path)
    theirs = answer(pipeline.transformer)
    assert torch.equal(theirs, answer(ours))
    assert float((theirs - before).abs().mean()) > 0.02


def test_the_strength_is_alpha_over_the_rank_or_its_root(tiny: Callable[[str], Path]) -> None:
    def scaling(**kind: Any) -> float:
        return float(adapted(tiny("2b"), **kind).transformer_blocks[0].attn1.to_q.scaling["default"])

    assert scaling() == 3 / 4
    assert scaling(rslora=True) == 3 / 2


def test_the_file_holds_doras_magnitudes_and_the_header_its_kind(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    save_lora(tmp_path / "x.safetensors", adapted(tiny("2b"), dora=True, rslora=True, dropout=0.25), {})
    names = load_file(tmp_path / "x.safetensors")
    magnitudes = [name for name in names if name.endswith("lora_magnitude_vector")]
    assert len(magnitudes) == len(names) // 3
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
    assert [told[f"transformer.{key}"] for key in ("use_dora", "use_rslora", "lora_dropout")] == [True, True, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_only_the_adapter_is_fp32_and_trained(dtype: torch.dtype, tiny: Callable[[str], Path]) -> None:
    transformer = adapted(tiny("2b"), dtype=dtype, dora=True)
    kinds = {
        ("lora_" in name, parameter.requires_grad, parameter.dtype)
        for name, parameter in transformer.named_parameters()
    }
    assert kinds == {(True, True, torch.float32), (False, False, dtype)}


def gradients(transformer: CogVideoXTransformer3DModel, folder: Path, *, first: int = 0) -> list[torch.Tensor]:
    """The adapter's gradients for the batch that starts at sample ``first`` of a run."""
    transformer.zero_grad()
    of, batch = objective(folder), batch_of(read_spec(folder), 1, first=first)
    losses = of.losses(transformer, batch, of.draw(batch, [500]))
    losses.mean().backward()
    return [parameter.grad.clone() for parameter in transformer.parameters() if parameter.grad is not None]


def test_what_is_dropped_follows_from_the_sample_alone(tiny: Callable[[str], Path]) -> None:
    """Also when the activations are made anew in the backward pass."""
    transformer = adapted(tiny("2b"), dropout=0.5).train()
    straight = gradients(transformer, tiny("2b"))
    torch.manual_seed(123)
    torch.rand(7)
    assert all(map(torch.equal, gradients(transformer, tiny("2b")), straight))
    transformer.enable_gradient_checkpointing()
    assert all(map(torch.equal, gradients(transformer, tiny("2b")), straight))
    other = gradients(transformer, tiny("2b"), first=1)
    assert not any(map(torch.equal, other, straight))
    with pytest.MonkeyPatch.context() as patch:  # the fault: layers left to whatever state torch is in
        patch.setattr("cogtune.training.objective.seed_layers", lambda *_: None)
        assert not all(map(torch.equal, gradients(transformer, tiny("2b")), straight))


def test_nothing_is_dropped_in_evaluation(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "fill_cache", fill_here)
    shared: dict[str, Any] = {"steps": 1, "learning_rate": 1e-12, "checkpoint_every": 1}
    plain = evaluations(train_here(plan_for(clips, tmp_path / "plain", **shared)))
    dropped = train_here(plan_for(clips, tmp_path / "dropped", lora_dropout=0.9, **shared))
    assert evaluations(dropped)[0] == plain[0]
