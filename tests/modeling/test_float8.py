"""Products with frozen weights in fp8: how near they are to the exact ones, and which layers they replace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file

from cogtune.encoding import jobs
from cogtune.modeling.adapters import add_lora
from cogtune.modeling.engine.engine import blocks_of
from cogtune.modeling.engine.float8 import WEIGHTS, Float8Linear, _product, quantize, use_float8
from cogtune.models.variants import LORA_WEIGHTS_NAME
from cogtune.system.errors import CogtuneError
from tests.support.runs_in_process import evaluations, fill_here, plan_for, train_here

CPU = torch.device("cpu")


def off(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.float() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 1e3])
def test_outputs_and_gradients_are_those_of_the_exact_layer_to_a_few_per_cent(
    dtype: torch.dtype, magnitude: float
) -> None:
    exact = torch.nn.Linear(64, 96)
    exact.weight.data *= min(1.0, 1 / magnitude)  # keeps fp16 within its range
    exact.bias.data *= min(1.0, magnitude)  # and the bias from being most of it
    layer = Float8Linear(exact, dtype, CPU)
    inputs = (torch.randn(2, 40, 64) * magnitude).to(dtype).requires_grad_()
    copied = inputs.detach().float().requires_grad_()
    outputs, expected = layer(inputs), exact(copied)
    assert (outputs.dtype, outputs.shape) == (dtype, (2, 40, 96))
    assert 0.005 < off(outputs.detach(), expected.detach()) < 0.05  # 8 bits are not exact
    gradient = torch.randn(2, 40, 96)
    outputs.backward(gradient.to(dtype))
    expected.backward(gradient)
    assert inputs.grad is not None
    assert copied.grad is not None
    assert 0.005 < off(inputs.grad, copied.grad) < 0.1
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_a_product_on_a_cpu_is_pytorchs() -> None:
    random = torch.Generator().manual_seed(3)
    (left, one), (right, other) = (quantize(torch.randn(size, 32, generator=random), WEIGHTS) for size in (16, 48))
    theirs = torch._scaled_mm(left, right.t(), scale_a=one, scale_b=other, out_dtype=torch.float32)
    torch.testing.assert_close(_product(left, right, (one, other), torch.float32), theirs, rtol=1e-5, atol=1e-5)


def test_without_gradients_a_sample_has_its_own_scale_whatever_is_beside_it() -> None:
    layer = Float8Linear(torch.nn.Linear(64, 96), torch.float32, CPU, differentiable=False)
    samples = torch.randn(2, 40, 64) * torch.tensor([1.0, 50.0]).view(2, 1, 1)
    together = layer(samples)
    for number in range(2):
        assert torch.equal(together[number], layer(samples[number : number + 1])[0])
        assert torch.equal(together[number], layer(samples[number]))


def test_zeros_stay_zeros() -> None:
    numbers, scale = quantize(torch.zeros(4, 16), WEIGHTS)
    assert torch.equal(numbers.float() * scale, torch.zeros(4, 16))


def test_frozen_layers_of_attention_and_feed_forward_are_replaced_and_nothing_else(tiny: Callable[[str], Path]) -> None:
    transformer = CogVideoXTransformer3DModel.from_pretrained(tiny("5b") / "transformer")
    add_lora(transformer, rank=4, alpha=4, target_modules=["to_q", "ff.net.2"], seed=1)
    before = {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    names = use_float8(blocks_of(transformer), dtype=torch.bfloat16, device=CPU)
    layers = ["attn1.to_q.base_layer", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj"]
    layers.append("ff.net.2.base_layer")
    assert sorted(names) == sorted(f"{block}.{layer}" for block in range(2) for layer in layers)
    after = {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert {type(transformer.get_submodule(f"transformer_blocks.{name}")) for name in names} == {Float8Linear}


@pytest.mark.parametrize("kind", ["fp8", "int8", "nf4"])
def test_a_run_on_a_smaller_base_trains_streams_and_resumes(
    kind: str, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "fill_cache", fill_here)
    flags: dict[str, Any] = {"precision": "bf16", "base_precision": kind, "steps": 3, "eval_every": 2}
    here = train_here(plan_for(clips, tmp_path / "here", **flags))
    train_here(plan_for(clips, tmp_path / "streamed", stream_blocks=2, **flags), stop_after=2)
    streamed = train_here(plan_for(clips, tmp_path / "streamed", stream_blocks=2, resume="latest", **flags))
    assert [line for line in streamed if "loss" in line] == [line for line in here if "loss" in line]
    assert evaluations(streamed) == evaluations(here)
    saved, other = (load_file(tmp_path / name / LORA_WEIGHTS_NAME) for name in ("here", "streamed"))
    assert saved.keys() == other.keys()
    assert [name for name in saved if not torch.equal(saved[name], other[name])] == []
    assert {value.dtype for value in saved.values()} == {torch.float32}
    for before, now in ((repr(kind), None), ("None", kind)):
        output = tmp_path / f"before-{before}"
        if before == "None":
            train_here(plan_for(clips, output, precision="bf16", steps=1))
        else:
            (tmp_path / "here").rename(output)
        with pytest.raises(CogtuneError, match="does not fit this run") as refused:
            plan_for(clips, output, precision="bf16", base_precision=now, steps=4, resume="latest")
        assert any(f"base_precision: {before} in the checkpoint, {now!r} now" in line for line in refused.value.details)
