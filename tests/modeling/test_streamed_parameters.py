"""Weights trained from host memory: their steps are those of plain AdamW on fp32 master weights, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

from cogtune.config.arrangement import Arrangement
from cogtune.config.stream import MasterWeights, Moments, state_bytes
from cogtune.modeling.conditioning import conditioning_of, predict
from cogtune.modeling.engine import attach
from cogtune.modeling.engine.activations import OffloadedActivations
from cogtune.modeling.engine.blockwise_quantization import BLOCK, dequantize, quantize
from cogtune.modeling.engine.engine import blocks_of
from cogtune.modeling.engine.flat_adam import FlatAdam, _joined, _round, _split
from cogtune.modeling.engine.flat_buffer import ALIGNMENT, FlatBufferSpec
from cogtune.modeling.engine.host import HostArena, LentMemory
from cogtune.modeling.engine.streamed_parameters import StreamedParameters
from cogtune.models.checkpoint_configs import read_spec
from cogtune.models.geometry import Size, latent_shape
from cogtune.models.variants import VARIANTS
from tests.support.sampling import sampled

CPU = torch.device("cpu")
BLOCKS = 3
NORM = 0.5
"""Below the norms of these models' gradients, so that all are clipped."""


@dataclass(frozen=True)
class Case:
    """What is trained, and how."""

    steps: int = 2
    passes: int = 1
    dtype: torch.dtype = torch.bfloat16
    decoupled: bool = True
    looks: bool = False
    """Whether it is looked at between the steps."""
    rounded: bool = False
    """Whether the first weights are numbers in bf16."""


Settled = dict[str, torch.Tensor]


def model(folder: Path, case: Case) -> CogVideoXTransformer3DModel:
    config = CogVideoXTransformer3DModel.load_config(folder / "transformer")
    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel.from_config({**config, "num_layers": BLOCKS})
    transformer.train()
    for parameter in transformer.parameters():
        if case.rounded:
            parameter.data = parameter.data.bfloat16().float()
    return transformer


def rate(step: int) -> float:
    return 1e-3 * (1 + step % 5)


def losses_of(
    folder: Path,
    transformer: CogVideoXTransformer3DModel,
    case: Case,
    update: Callable[[int], float],
    after_pass: Callable[[], None] = lambda: None,
) -> list[float]:
    """Train; every loss and gradient norm."""
    spec = read_spec(folder)
    random = torch.Generator().manual_seed(2)
    frames, channels, height, width = latent_shape(Size.parse("9x32x48"), spec.out_channels, spec.patch_size_t)
    if spec.learned_positions:
        frames, channels, height, width = latent_shape(Size.parse("9x64x96"), spec.out_channels, spec.patch_size_t)

    def loss(step: int) -> torch.Tensor:
        noisy = torch.randn(1, frames, channels, height, width, generator=random).to(case.dtype)
        text = torch.randn(1, spec.max_text_seq_length, spec.text_embed_dim, generator=random).to(case.dtype)
        image = torch.randn(noisy.shape, generator=random).to(case.dtype) if spec.image_to_video else None
        with torch.autocast("cpu", dtype=case.dtype, enabled=case.dtype != torch.float32):
            answer = predict(transformer, noisy, text, torch.tensor([500 + step]), image, conditioning_of(noisy, spec))
        return (answer.float() - noisy.float()).square().mean()

    seen = []
    for step in range(case.steps):
        for _ in range(case.passes):
            one = loss(step)
            (one / case.passes).backward()
            after_pass()
            seen.append(one.item())
        seen.append(update(step))
        if case.looks:
            with torch.no_grad():
                seen += [loss(step).item() for _ in range(2)]
    return seen


def plainly(folder: Path, case: Case) -> tuple[list[float], Settled, Settled]:
    """What torch's own optimizer makes of it: losses, weights in the model's type, and master weights."""
    transformer = model(folder, case)
    masters = {name: torch.nn.Parameter(p.detach().clone()) for name, p in transformer.named_parameters()}
    for parameter in transformer.parameters():
        parameter.data = parameter.data.to(case.dtype)
    kind = torch.optim.AdamW if case.decoupled else torch.optim.Adam
    optimizer = kind(masters.values(), betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-2, fused=True)

    def after_pass() -> None:
        for name, parameter in transformer.named_parameters():
            assert parameter.grad is not None
            before, gradient = masters[name].grad, parameter.grad.float()
            masters[name].grad = gradient.clone() if before is None else before + gradient
            parameter.grad = None

    def update(step: int) -> float:
        norm = float(torch.nn.utils.clip_grad_norm_(masters.values(), NORM))
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, parameter in transformer.named_parameters():
                parameter.copy_(masters[name])
        return norm

    seen = losses_of(folder, transformer, case, update, after_pass)
    weights = {name: parameter.detach() for name, parameter in transformer.named_parameters()}
    return seen, weights, {name: parameter.detach() for name, parameter in masters.items()}


def stream(
    transformer: CogVideoXTransformer3DModel, case: Case, arrangement: Arrangement | None = None, **options: Any
) -> StreamedParameters:
    arrangement = arrangement or Arrangement(streamed_blocks=BLOCKS, keep="inputs")
    optimizer = FlatAdam(
        betas=(0.9, 0.95),
        epsilon=1e-8,
        weight_decay=1e-2,
        decoupled=case.decoupled,
        weight_dtype=case.dtype,
        **options,
    )
    trained = StreamedParameters(
        transformer,
        list(blocks_of(transformer)),
        optimizer,
        slots=arrangement.slots,
        device=CPU,
        arena=HostArena(pin=False),
        accumulates=case.passes > 1,
    )
    attach(transformer, arrangement, device=CPU, smallest=0, trained=trained)
    return trained


def streamed(
    folder: Path, case: Case, arrangement: Arrangement | None = None, **options: Any
) -> tuple[list[float], Settled, Settled]:
    """What the engine makes of it: losses, weights, and master weights where they are kept in fp32."""
    transformer = model(folder, case)
    trained = stream(transformer, case, arrangement, **options)

    def update(step: int) -> float:
        trained.learning_rate = rate(step)
        return trained.step(NORM)

    seen = losses_of(folder, transformer, case, update)
    trained.settle()
    weights = {name: value for number in range(BLOCKS + 1) for name, value in trained.whole(number).items()}
    kept = [(part, part.state.get("master", part.weights)) for part in trained.parts]
    if "low" in trained.parts[0].state:
        kept = [(part, _joined(part.weights, part.state["low"])) for part in trained.parts]
    masters = {
        name: value for part, flat in kept for name, value in zip(part.names, part.spec.views(flat), strict=True)
    }
    return seen, weights, masters


def assert_same(one: tuple[list[float], Settled, Settled], other: tuple[list[float], Settled, Settled]) -> None:
    assert one[0] == other[0]
    for mine, theirs in zip(one[1:], other[1:], strict=True):
        assert mine.keys() == theirs.keys()
        assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


@pytest.mark.parametrize("name", VARIANTS)
def test_steps_are_those_of_plain_adamw(name: str, tiny: Callable[[str], Path]) -> None:
    case = Case(passes=2)
    plain = plainly(tiny(name), case)
    assert min(plain[0][2::3]) > NORM  # all are clipped
    assert len(set(plain[0])) == 6  # they tell steps apart
    assert_same(streamed(tiny(name), case), plain)


@pytest.mark.parametrize(
    ("name", "passes"), sampled([*((name, 2) for name in VARIANTS), ("5b", 1)], ("1.5-5b-i2v", 2), ("5b", 1))
)
def test_fifty_steps_are_those_of_plain_adamw(name: str, passes: int, tiny: Callable[[str], Path]) -> None:
    case = Case(steps=50, passes=passes)
    assert_same(streamed(tiny(name), case), plainly(tiny(name), case))


@pytest.mark.parametrize(
    ("case", "arrangement"),
    [
        (Case(looks=True), Arrangement(streamed_blocks=BLOCKS, slots=1, keep="attention")),
        (Case(looks=True), Arrangement(streamed_blocks=BLOCKS, slots=3, keep="everything")),
        (Case(), Arrangement(streamed_blocks=BLOCKS, offloaded_blocks=2, kept_whole=1)),
        (Case(dtype=torch.float32, looks=True), Arrangement(streamed_blocks=BLOCKS, slots=1)),
        (Case(decoupled=False), Arrangement(streamed_blocks=BLOCKS)),
    ],
)
def test_every_arrangement_steps_alike(case: Case, arrangement: Arrangement, tiny: Callable[[str], Path]) -> None:
    assert_same(streamed(tiny("5b"), case, arrangement), plainly(tiny("5b"), case))


def test_activations_use_the_memory_of_gradients_meanwhile(tiny: Callable[[str], Path]) -> None:
    folder, arrangement = tiny("5b"), Arrangement(streamed_blocks=BLOCKS, offloaded_blocks=BLOCKS, keep="inputs")
    transformer = model(folder, Case())
    trained = stream(transformer, Case(), arrangement)
    assert trained.lent is not None
    taken: list[bytes] = []

    def update(step: int) -> float:
        trained.learning_rate = rate(step)
        return trained.step(NORM)

    def look(*_: object) -> None:  # between the forward and the backward pass
        assert trained.lent is not None
        taken.append(trained.lent.memory.numpy().tobytes())

    hook = transformer.register_forward_hook(look)
    losses = losses_of(folder, transformer, Case(), update)
    hook.remove()
    assert losses == plainly(folder, Case())[0]
    gradients = trained._gradients.view(torch.uint8).numpy().tobytes()
    assert all(one != gradients and any(one[: trained.lent.ends[0]]) for one in taken)
    assert stream(model(folder, Case(passes=2)), Case(passes=2), arrangement).lent is None  # gradients are added up


def test_lent_memory_is_taken_as_it_becomes_free() -> None:
    lent = LentMemory(torch.zeros(2048, dtype=torch.uint8), (512, 1024, 2048))
    arena = HostArena(pin=False)
    kept = OffloadedActivations(device=CPU, arena=arena, lent=lent, smallest=0)
    kept.begin(())
    rooms = [kept._room(kept._pass, block, size) for block, size in ((0, 200), (0, 400), (1, 400), (2, 250))]
    first = lent.memory.data_ptr()
    places = [room.data_ptr() - first if 0 <= room.data_ptr() - first < 2048 else None for room in rooms]
    assert places == [0, None, 256, 768]  # 256 + 400 is more than is free with the first block
    assert arena.size > 0


def test_split_weights_are_the_fp32_ones() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    highs = torch.tensor([0x3F80, 0x3F81, 0x0001, 0x8000 - 2**16, 0xBF81 - 2**16, 0x7F7F], dtype=torch.int32)
    numbers = ((highs.unsqueeze(1) << 16) + (every & 0xFFFF)).view(torch.float32).reshape(-1)
    high, low = torch.empty(len(numbers), dtype=torch.bfloat16), torch.empty(len(numbers), dtype=torch.int16)
    _split(numbers, high, low)
    assert torch.equal(_joined(high, low).view(torch.int32), numbers.view(torch.int32))
    ties = (every & 0xFFFF) == 0x8000
    nearest = numbers.to(torch.bfloat16).view(len(highs), -1)
    assert torch.equal(high.view(len(highs), -1)[:, ~ties], nearest[:, ~ties])


def test_a_step_on_split_weights_is_that_on_fp32_ones(tiny: Callable[[str], Path]) -> None:
    """The next one is too, but where a weight is exactly between two in bf16."""
    case = Case(steps=1, rounded=True)
    exact, split = streamed(tiny("5b"), case), streamed(tiny("5b"), case, master="split")
    assert split[0] == exact[0]
    assert [name for name in exact[2] if not torch.equal(exact[2][name], split[2][name])] == []
    assert any(not torch.equal(value, value.bfloat16().float()) for value in split[2].values())


def test_weights_are_rounded_up_and_down_so_that_the_mean_is_right() -> None:
    number = torch.full((100_000,), 1.0 + 2**-10)  # an eighth of the way to the next in bf16
    rounded = torch.empty(len(number), dtype=torch.bfloat16)
    _round(-number, rounded, torch.Generator().manual_seed(0))
    assert set(rounded.tolist()) == {-1.0, -1.0078125}
    assert rounded.float().mean().item() == pytest.approx(-number[0].item(), abs=5e-5)


@pytest.mark.parametrize("signed", [True, False])
def test_eight_bits_hold_a_number_to_the_nearest_code(signed: bool) -> None:
    numbers = torch.randn(8 * BLOCK, generator=torch.Generator().manual_seed(0))
    numbers[BLOCK : 2 * BLOCK] = 0
    if not signed:
        numbers = numbers.square()
    codes, scales = torch.empty(len(numbers), dtype=torch.uint8), torch.empty(8)
    quantize(numbers, codes, scales, signed=signed)
    assert torch.equal(scales, numbers.view(-1, BLOCK).abs().amax(1))
    back = dequantize(codes, scales, signed=signed)
    assert torch.equal(back[BLOCK : 2 * BLOCK], torch.zeros(BLOCK))
    every = dequantize(torch.arange(256, dtype=torch.uint8), torch.ones(1), signed=signed)
    assert every.unique().numel() == 256
    assert (every.min().item(), every.max().item()) == (pytest.approx(-0.992969 if signed else 0.0), 1.0)
    nearest = (numbers.view(8, BLOCK, 1) - every * scales.view(8, 1, 1)).abs().amin(2).view(-1)
    assert torch.allclose((numbers - back).abs(), nearest, atol=1e-6)


def test_shards_hold_every_number_once() -> None:
    shapes = [torch.Size((3, 100)), torch.Size((7,)), torch.Size((1000,))]
    for shards in (1, 2, 3):
        spec = FlatBufferSpec(shapes, shards)
        assert spec.shard_size % ALIGNMENT == 0
        flat = torch.zeros(spec.size)
        values = [torch.rand(shape) + 1 for shape in shapes]
        for view, value in zip(spec.views(flat), values, strict=True):
            view.copy_(value)
        found: list[list[torch.Tensor]] = [[] for _ in shapes]
        for rank in range(shards):
            own = spec.own(flat, rank)
            for piece in spec.pieces(rank):
                first = spec.first(piece, rank)
                assert first % ALIGNMENT == 0
                assert torch.equal(own[piece.place], values[piece.parameter].reshape(-1)[first : first + piece.size])
                found[piece.parameter].append(own[piece.place])
        assert all(torch.equal(torch.cat(one), value.reshape(-1)) for one, value in zip(found, values, strict=True))


@pytest.mark.parametrize("moments", ["fp32", "bf16", "8bit"])
@pytest.mark.parametrize("master", ["fp32", "split", "stochastic"])
def test_the_state_takes_what_is_planned_for_it(master: MasterWeights, moments: Moments) -> None:
    optimizer = FlatAdam(
        betas=(0.9, 0.95), epsilon=1e-8, weight_decay=0.0, decoupled=True, weight_dtype=torch.bfloat16,
        master=master, moments=moments, decay=0.9,
    )  # fmt: skip
    taken = sum(dtype.itemsize * size for dtype, size in optimizer.state_of(4096).values())
    assert taken == 4096 * state_bytes(master, moments, weights=2, averages=True)
