"""Frozen weights in 8 or 4 bits on the host: the formats, and that the arrangement changes no result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cogtune.config.arrangement import Arrangement
from cogtune.config.resolving import resolve
from cogtune.modeling.engine import attach, stored_weights
from cogtune.modeling.engine.blockwise_quantization import dequantize_nf4, quantize_nf4
from cogtune.modeling.engine.frozen_weights import FrozenWeights
from cogtune.modeling.engine.host import HostArena
from cogtune.modeling.engine.stored_weights import restore, round_weights, storable, store, stored_bytes
from cogtune.models.checkpoint_configs import published_spec
from cogtune.models.layers import block_parameters
from cogtune.models.variants import VARIANTS, StoredPrecision
from cogtune.planning import arrangements
from cogtune.planning.estimate import STORED_BYTES, estimate
from tests.modeling.test_engine import ARRANGEMENTS, CPU, assert_same, engine_of, model, plainly, trained

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The values as the paper's appendix E prints them."""

KINDS: tuple[StoredPrecision, ...] = ("int8", "nf4")


def restored(numbers: torch.Tensor, kind: StoredPrecision, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    memory = torch.empty(stored_bytes(numbers.numel(), kind), dtype=torch.uint8)
    store(numbers, memory, kind, CPU)
    target = torch.full(numbers.shape, torch.nan, dtype=dtype)
    restore(memory, target, kind)
    return target


def test_nf4_has_the_papers_values_and_packs_the_first_of_two_into_the_high_bits() -> None:
    numbers = torch.tensor(NF4, dtype=torch.float32).repeat(4) * 3
    codes, scales = torch.empty(32, dtype=torch.uint8), torch.empty(1)
    quantize_nf4(numbers, codes, scales)
    assert codes.tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF] * 4
    assert scales.tolist() == [3.0]
    assert torch.allclose(dequantize_nf4(codes, scales), numbers, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_each_number_becomes_the_nearest_of_its_blocks(kind: StoredPrecision, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = torch.randn(24, 96, generator=torch.Generator().manual_seed(0)) * torch.linspace(1e-3, 9, 96)
    after = restored(numbers, kind)
    block = 64 if kind == "nf4" else 256
    largest = numbers.view(-1, block).abs().amax(dim=1, keepdim=True)
    error = ((after - numbers).view(-1, block) / largest).abs()
    assert error.max() < (0.16 if kind == "nf4" else 0.009)
    assert error.mean() < (0.03 if kind == "nf4" else 0.0025)
    if kind == "nf4":  # what is rounded stays; the 8-bit code has no -1
        assert torch.equal(restored(after, kind), after)
    assert torch.equal(restored(torch.zeros(256), kind), torch.zeros(256))
    assert torch.equal(restored(numbers, kind, torch.bfloat16), after.bfloat16())
    monkeypatch.setattr(stored_weights, "_CHUNK", 512)
    assert torch.equal(restored(numbers, kind), after)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["one slot", "three slots", "some streamed", "all at once"])
def test_every_arrangement_trains_alike(name: str, kind: StoredPrecision, tiny: Callable[[str], Path]) -> None:
    here = trained(tiny("5b"), engine_of(Arrangement(), stored=kind))
    assert_same(trained(tiny("5b"), engine_of(ARRANGEMENTS[name], stored=kind)), here)
    plain: Any = trained(tiny("5b"), plainly)
    assert here["losses"] == pytest.approx(plain["losses"], rel=0.3 if kind == "nf4" else 0.02)
    assert here["losses"] != plain["losses"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_host_holds_as_few_bytes_as_are_counted(kind: StoredPrecision, tiny: Callable[[str], Path]) -> None:
    def taken(stored: StoredPrecision | None) -> int:
        blocks = list(model(tiny("5b")).requires_grad_(False).transformer_blocks)
        arena = HostArena(pin=False)
        FrozenWeights(blocks, slots=2, device=CPU, arena=arena, stored=stored)
        return arena.size

    block = model(tiny("5b")).requires_grad_(False).transformer_blocks[0]
    chosen = storable(block)
    linear = sum(p.numel() for p in block.parameters() if id(p) in chosen)
    assert linear / sum(p.numel() for p in block.parameters()) > 0.97
    assert taken(kind) / taken(None) == pytest.approx(STORED_BYTES[kind] / 4, rel=0.12)  # with biases and norms


def test_a_weight_that_is_trained_or_of_no_whole_blocks_stays_as_it_is() -> None:
    block = torch.nn.ModuleList([torch.nn.Linear(16, 16), torch.nn.Linear(5, 7), torch.nn.Linear(32, 16)])
    block.requires_grad_(False)
    block[2].requires_grad_(True)
    assert storable(block) == {id(block[0].weight)}
    before = [p.clone() for p in block.parameters()]
    round_weights(block, "nf4", CPU)
    assert [torch.equal(p, q) for p, q in zip(block.parameters(), before, strict=True)] == [False] + [True] * 5


def test_only_frozen_weights_of_blocks_are_rounded(tiny: Callable[[str], Path]) -> None:
    transformer = model(tiny("5b"))
    before = {name: p.clone() for name, p in transformer.named_parameters()}
    transformer.requires_grad_(False)
    attach(transformer, Arrangement(), device=CPU, stored="int8")
    changed = {name for name, p in transformer.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert {name.split(".")[0] for name in changed} == {"transformer_blocks"}
    assert {name.rpartition(".")[2] for name in changed} == {"weight"}


@pytest.mark.parametrize(("kind", "bytes_"), [("int8", 1.0156), ("nf4", 0.5625)])
def test_the_plan_counts_what_is_stored(kind: StoredPrecision, bytes_: float) -> None:
    def needs(**flags: Any) -> Any:
        config = resolve(preset_name="8gb-lora-5b", flags={"stream_blocks": 42, "offload_activations": 42} | flags)
        return estimate(config.config, published_spec(VARIANTS["5b"]), gpu="NVIDIA GeForce RTX 4090")

    whole, stored = needs(), needs(base_precision=kind)
    weights = 42 * block_parameters(published_spec(VARIANTS["5b"]))
    assert whole.host - stored.host == pytest.approx((2 - bytes_) * weights, rel=1e-3)
    assert stored.memory.card > whole.memory.card  # a second slot
    assert arrangements._RESTORING == 20 * stored_weights._CHUNK
    assert stored.seconds <= whole.seconds
