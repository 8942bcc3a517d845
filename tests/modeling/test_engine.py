"""The memory engine: whatever the arrangement, losses, gradients and weights are those of the plain step, to the bit.

On a CPU its streams and slots are plain copies, in the order in which a GPU would make them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file

from cogtune.config.arrangement import KEEPS, Arrangement, Keep
from cogtune.config.choices import parse_bytes
from cogtune.config.presets import PRESETS
from cogtune.config.resolving import resolve
from cogtune.config.run_config import RunConfig
from cogtune.data.video.clips import probe
from cogtune.encoding import jobs
from cogtune.modeling.adapters import add_lora
from cogtune.modeling.conditioning import conditioning_of, predict
from cogtune.modeling.engine import attach
from cogtune.modeling.engine.attention import FlashAttention4Processor, fastest
from cogtune.modeling.engine.engine import blocks_of
from cogtune.modeling.engine.float8 import use_float8
from cogtune.modeling.engine.host import SMALLEST_REGION, HostArena
from cogtune.models.checkpoint_configs import ModelSpec, published_spec, read_spec
from cogtune.models.geometry import Size, latent_shape
from cogtune.models.locate import locate
from cogtune.models.variants import LORA_WEIGHTS_NAME, VARIANTS
from cogtune.planning import arrangements
from cogtune.planning.estimate import check_arrangement, estimate, plan_arrangement, workload
from cogtune.run.plan import check_config
from cogtune.system.errors import UsageError
from cogtune.training import memory
from tests.conftest import Cogtune
from tests.support import shared_weights_script as script
from tests.support.forked_workers import run_script, run_workers
from tests.support.runs_in_process import evaluations, fill_here, plan_for, read_lines, set_up_here, train_here
from tests.support.sampling import sampled

CPU = torch.device("cpu")
BLOCKS = 5
STEPS, PASSES = 2, 2
"""Optimizer steps, and forward and backward passes of each."""

ARRANGEMENTS = {
    "on the card": Arrangement(),
    "streamed": Arrangement(streamed_blocks=BLOCKS),
    "one slot": Arrangement(streamed_blocks=BLOCKS, slots=1),
    "three slots": Arrangement(streamed_blocks=BLOCKS, slots=3),
    "some streamed": Arrangement(streamed_blocks=2, slots=1),
    "offloaded": Arrangement(offloaded_blocks=BLOCKS),
    "some offloaded": Arrangement(offloaded_blocks=2),
    "all at once": Arrangement(streamed_blocks=4, offloaded_blocks=3, kept_whole=1),
}


def model(folder: Path) -> CogVideoXTransformer3DModel:
    """A tiny transformer of enough blocks that slots have to be shared."""
    config = CogVideoXTransformer3DModel.load_config(folder / "transformer")
    torch.manual_seed(0)
    return CogVideoXTransformer3DModel.from_config({**config, "num_layers": BLOCKS})


Attach = Callable[[CogVideoXTransformer3DModel], object]


def trained(
    folder: Path,
    put_in: Attach,
    *,
    batch: int = 1,
    sizes: tuple[str, ...] = ("9x64x96",),
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0"),
    **lora: Any,
) -> dict[str, list[float] | torch.Tensor]:
    """Some optimizer steps, with an evaluation after each: every loss, and all gradients and weights by name."""
    spec = read_spec(folder)
    transformer = model(folder)
    # Short texts take less time, but a table of positions has a place for every token.
    tokens = 26 if spec.rotary and not spec.learned_positions else spec.max_text_seq_length
    add_lora(transformer, rank=4, alpha=4, target_modules=targets, seed=1, **lora)
    put_in(transformer)
    transformer.train()
    named = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(named.values(), lr=1e-2)
    random = torch.Generator().manual_seed(2)
    losses: list[float] = []
    seen: dict[str, list[float] | torch.Tensor] = {"losses": losses}

    def loss(step: int, size: str) -> torch.Tensor:
        frames, channels, height, width = latent_shape(Size.parse(size), spec.out_channels, spec.patch_size_t)
        noisy = torch.randn(batch, frames, channels, height, width, generator=random)
        text = torch.randn(batch, tokens, spec.text_embed_dim, generator=random)
        image = torch.randn(noisy.shape, generator=random) if spec.image_to_video else None
        torch.manual_seed(step)
        timesteps = torch.arange(batch) * 100 + 500 + step
        answer = predict(transformer, noisy, text, timesteps, image, conditioning_of(noisy, spec))
        return answer.square().mean()

    for step in range(STEPS):
        for number in range(PASSES):
            one = loss(step, sizes[(step + number) % len(sizes)])
            one.backward()
            losses.append(one.item())
        seen |= {f"{step} {name}": p.grad.clone() for name, p in named.items() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        transformer.eval()
        with torch.no_grad():
            losses += [loss(step, size).item() for size in sizes]
        transformer.train()
    return seen | {name: p.detach().clone() for name, p in named.items()}


def plainly(transformer: CogVideoXTransformer3DModel) -> None:
    transformer.enable_gradient_checkpointing()


def engine_of(arrangement: Arrangement, **how: Any) -> Attach:
    return lambda transformer: attach(transformer, arrangement, device=CPU, smallest=0, **how)


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    assert one["losses"] == other["losses"]
    tensors = [name for name in one if name != "losses"]
    assert [name for name in tensors if not torch.equal(one[name], other[name])] == []


@pytest.fixture(scope="module")
def plain(home: Path) -> dict[str, Any]:
    return trained(locate("tiny:5b"), plainly)


MATRIX = [
    (name, keep)
    for name in ARRANGEMENTS
    for keep in KEEPS
    if keep == "attention" or name in ("one slot", "all at once")
]


@pytest.mark.parametrize(("name", "keep"), MATRIX)
def test_every_arrangement_trains_as_plainly(
    name: str, keep: Keep, plain: dict[str, Any], tiny: Callable[[str], Path]
) -> None:
    assert len({float(value) for value in plain["losses"]}) == STEPS * (PASSES + 1)  # they tell steps apart
    assert_same(trained(tiny("5b"), engine_of(replace(ARRANGEMENTS[name], keep=keep))), plain)


def in_float8(arrangement: Arrangement) -> Attach:
    def put_in(transformer: CogVideoXTransformer3DModel) -> None:
        use_float8(blocks_of(transformer), dtype=torch.float32, device=CPU)
        attach(transformer, arrangement, device=CPU, smallest=0)

    return put_in


@pytest.mark.parametrize("name", ["one slot", "some offloaded", "all at once"])
def test_every_arrangement_trains_alike_in_fp8(name: str, plain: dict[str, Any], tiny: Callable[[str], Path]) -> None:
    here = trained(tiny("5b"), in_float8(Arrangement()))
    assert_same(trained(tiny("5b"), in_float8(ARRANGEMENTS[name])), here)
    assert here["losses"] == pytest.approx(plain["losses"], rel=0.02)
    assert here["losses"] != plain["losses"]


KINDS: dict[str, dict[str, Any]] = {
    "a batch of two": {"batch": 2},
    "dropout": {"dropout": 0.3},
    "dora": {"dora": True},
    "rslora": {"rslora": True},
    "feed-forward": {"targets": ("ff.net.0.proj", "ff.net.2")},
    "one block's layer": {"targets": ("transformer_blocks.3.attn1.to_q",)},
    "outside of the blocks": {"targets": ("time_embedding.linear_1", "to_v")},
    "all of it": {"batch": 2, "dropout": 0.3, "dora": True, "targets": ("to_q", "ff.net.2", "proj_out")},
}


@cache
def plain_of_kind(kind: str) -> dict[str, Any]:
    return trained(locate("tiny:2b"), plainly, **KINDS[kind])


@pytest.mark.parametrize(
    ("kind", "keep"),
    [(kind, keep) for kind in KINDS for keep in KEEPS if keep == "attention" or kind == "all of it"],
)
def test_every_kind_of_adapter_trains_as_plainly(kind: str, keep: Keep, tiny: Callable[[str], Path]) -> None:
    arrangement = replace(ARRANGEMENTS["all at once"], keep=keep)
    assert_same(trained(tiny("2b"), engine_of(arrangement), **KINDS[kind]), plain_of_kind(kind))


@pytest.mark.parametrize("name", ["2b", "5b-i2v", "1.5-5b", "1.5-5b-i2v"])
def test_every_model_trains_as_plainly_at_several_sizes(name: str, tiny: Callable[[str], Path]) -> None:
    learned = name == "5b-i2v"  # its positions are those of one size
    sizes = ("9x64x96",) if learned else ("9x64x96", "17x64x64")
    plain = trained(tiny(name), plainly, sizes=sizes)
    for arrangement in (Arrangement(streamed_blocks=5, offloaded_blocks=5), ARRANGEMENTS["all at once"]):
        assert_same(trained(tiny(name), engine_of(arrangement), sizes=sizes), plain)


@pytest.mark.filterwarnings("ignore")  # of libraries, while they trace
@pytest.mark.parametrize("keep", sampled(KEEPS, "attention"))
def test_compiled_blocks_are_one_graph_and_train_as_plainly(
    keep: Keep, plain: dict[str, Any], tiny: Callable[[str], Path]
) -> None:
    """With the tracer and the partitioner of ``torch.compile``; kernels of its own would round otherwise."""
    torch._dynamo.reset()
    for arrangement in (Arrangement(streamed_blocks=5, offloaded_blocks=5), ARRANGEMENTS["all at once"]):
        got = trained(tiny("5b"), engine_of(replace(arrangement, keep=keep), backend="aot_eager"))
        assert got["losses"] == pytest.approx(plain["losses"], rel=1e-6)
        assert_same(got, plain)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", sampled(["dropout", "a batch of two", "one block's layer"], "dropout"))
def test_compiled_blocks_with_every_kind_of_adapter_are_one_graph(kind: str, tiny: Callable[[str], Path]) -> None:
    torch._dynamo.reset()
    arrangement = Arrangement(streamed_blocks=5, offloaded_blocks=5)
    got = trained(tiny("2b"), engine_of(arrangement, backend="aot_eager"), **KINDS[kind])
    assert_same(got, plain_of_kind(kind))


def test_frozen_weights_leave_the_model_and_an_abandoned_pass_does_no_harm(tiny: Callable[[str], Path]) -> None:
    transformer = model(tiny("2b"))
    add_lora(transformer, rank=4, alpha=4, target_modules=["to_q"], seed=1)
    before = {name: p.detach().clone() for name, p in transformer.named_parameters()}
    frozen = sum(p.nbytes for p in transformer.transformer_blocks.parameters() if not p.requires_grad)
    engine = attach(transformer, Arrangement(streamed_blocks=5, offloaded_blocks=5), device=CPU, smallest=0)
    storages = {
        p.untyped_storage().data_ptr() for p in transformer.transformer_blocks.parameters() if not p.requires_grad
    }
    assert len(storages) == 2  # two slots
    assert engine.host_bytes >= frozen
    spec = read_spec(tiny("2b"))
    noisy = torch.randn(1, 3, 16, 8, 12)
    text = torch.randn(1, spec.max_text_seq_length, spec.text_embed_dim)

    def loss() -> torch.Tensor:
        return (
            predict(transformer, noisy, text, torch.tensor([500]), None, conditioning_of(noisy, spec)).square().mean()
        )

    first = loss()
    second = loss()
    with pytest.raises(RuntimeError, match="before the last one cannot be made"):
        first.backward()
    assert torch.equal(first, second)
    third = loss()
    third.backward()
    assert torch.equal(third, second)
    assert all(torch.equal(p, before[name]) for name, p in transformer.named_parameters() if p.requires_grad)


def test_flash_attention_4s_processor_computes_what_diffusers_does(tiny: Callable[[str], Path]) -> None:
    """With PyTorch's own attention in the kernel's place, which needs a GPU."""
    for name in ("2b", "5b"):
        transformer, spec = model(tiny(name)), read_spec(tiny(name))
        noisy = torch.randn(2, 3, 16, 8, 12)
        text = torch.randn(2, spec.max_text_seq_length, spec.text_embed_dim)
        inputs = (noisy, text, torch.tensor([500, 20]), None, conditioning_of(noisy, spec))
        with torch.no_grad():
            theirs = predict(transformer, *inputs)
            transformer.set_attn_processor(FlashAttention4Processor(torch.nn.functional.scaled_dot_product_attention))
            assert torch.equal(predict(transformer, *inputs), theirs)


def test_an_arena_hands_out_what_does_not_overlap_and_takes_it_back() -> None:
    arena = HostArena(pin=False)
    sizes = [3, 5000, 70_000_000, 100, 70_000_000, 1]
    for _ in range(3):
        parts = [arena.take(size) for size in sizes]
        assert [part.numel() for part in parts] == sizes
        spans = sorted((part.data_ptr(), part.data_ptr() + part.numel()) for part in parts)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
        assert all(start % 64 == 0 for start, _ in spans)
        taken = arena.size
        arena.reset()
    assert arena.size == taken
    assert taken <= SMALLEST_REGION + 8.4 * 70_000_000 + 4096
    assert not HostArena(pin=False).take(5000).any()  # new memory is zero


def test_blocks_that_are_streamed_are_spread() -> None:
    assert Arrangement(streamed_blocks=42).streamed(42) == tuple(range(42))
    assert Arrangement(streamed_blocks=3).streamed(9) == (1, 4, 7)
    assert Arrangement().streamed(9) == ()
    for count in range(1, 31):
        assert len(set(Arrangement(streamed_blocks=count).streamed(30))) == count
    assert (
        Arrangement.from_dict(json.loads(json.dumps(ARRANGEMENTS["all at once"].to_dict())))
        == ARRANGEMENTS["all at once"]
    )


# The whole run


@pytest.fixture
def encode_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "fill_cache", fill_here)


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """One slot for both blocks of a tiny model, and all that is kept, however small, on the host."""
    really = attach

    def attach_tightly(transformer: Any, arrangement: Arrangement, **how: Any) -> Any:
        return really(transformer, replace(arrangement, slots=1), **how, smallest=0)

    monkeypatch.setattr(memory, "attach", attach_tightly)


ENGINE: dict[str, Any] = {"stream_blocks": 2, "offload_activations": 2}


@pytest.mark.slow
@pytest.mark.usefixtures("encode_here", "tight")
@pytest.mark.parametrize("model", ["tiny:2b", "tiny:1.5-5b-i2v"])
def test_a_run_on_the_engine_is_the_same_run(model: str, clips: Path, tmp_path: Path) -> None:
    """With accumulation, dropped captions, buckets, evaluations, a sample video, a stop and a resume in between."""
    sizes = "9x64x96,9x96x64" if model == "tiny:2b" else "17x64x96"
    flags: dict[str, Any] = {
        "model": model, "steps": 4, "buckets": sizes, "gradient_accumulation_steps": 2, "caption_dropout": 0.5,
        "lora_dropout": 0.2, "eval_every": 2, "sample_every": 4, "sample_steps": 1, "batch_size": 2,
    }  # fmt: skip
    plain = train_here(plan_for(clips, tmp_path / "plain", **flags))
    train_here(plan_for(clips, tmp_path / "engine", **flags, **ENGINE), stop_after=2)
    lines = train_here(plan_for(clips, tmp_path / "engine", resume="latest", **flags, **ENGINE))
    assert evaluations(lines) == evaluations(plain)
    assert [line for line in lines if "loss" in line] == [line for line in plain if "loss" in line]
    ours, theirs = (load_file(tmp_path / run / LORA_WEIGHTS_NAME) for run in ("engine", "plain"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    videos = [next((tmp_path / run / "samples" / "step-000004").glob("*.mp4")) for run in ("engine", "plain")]
    assert videos[0].read_bytes() == videos[1].read_bytes()
    assert probe(videos[0]).num_frames == int(sizes.partition("x")[0])


@pytest.mark.usefixtures("encode_here")
def test_a_budget_decides_the_arrangement(clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Some tiny budget that leaves room for one block's weights fewer than there are."""
    training = set_up_here(plan_for(clips, tmp_path, vram="900MB"))
    assert training.arrangement == plan_arrangement(training.config, training.objective.spec)[0]
    assert training.arrangement.describe(2) in capsys.readouterr().err
    assert set_up_here(plan_for(clips, tmp_path / "other")).arrangement is None


@pytest.mark.slow
@pytest.mark.usefixtures("encode_here")
def test_two_processes_with_the_engine_train_as_one_does(clips: Path, tmp_path: Path) -> None:
    shared: dict[str, Any] = {"steps": 3, "eval_every": 0}
    train_here(plan_for(clips, tmp_path / "one", gradient_accumulation_steps=2, **shared))
    run_workers(plan_for(clips, tmp_path / "two", num_processes=2, **ENGINE, **shared))
    losses = []
    for run in ("one", "two"):
        losses.append([line["loss"] for line in read_lines(tmp_path / run) if "loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("shared", "stored"), [(True, False), (False, False), (True, True)])
def test_the_processes_of_a_machine_keep_one_copy_of_frozen_weights(tmp_path: Path, shared: bool, stored: bool) -> None:
    """Each has other weights, so it shows: those of the first are used, or each one's own where nothing is shared."""
    if not shared:
        (tmp_path / "without").touch()
    if stored:
        (tmp_path / "stored").touch()
    run_script("shared_weights_script", tmp_path)
    for rank in range(2):
        seen, mapped, size = torch.load(tmp_path / f"rank-{rank}.pt")
        assert seen == [[script.weight(0 if shared else rank, block)] for block in range(script.BLOCKS)]
        assert bool(mapped) is shared
        assert size >= script.BLOCKS * script.WIDTH**2 * (0.5 if stored else 4)


# What is planned


def test_frozen_weights_on_the_host_are_counted_once_a_machine() -> None:
    one, eight = (planned("8gb-lora-5b", "10GB", num_processes=count, stream_blocks=42) for count in (1, 8))
    spec = spec_for("8gb-lora-5b")
    assert one[0] == eight[0]
    hosts = [estimate(config, spec, arrangement=arrangement).host for arrangement, config in (one, eight)]
    work = workload(one[1], spec)
    weights = one[0].streamed_blocks * work.block_weights
    alone = arrangements.host_bytes(work, one[0])
    assert weights > 8 * 2**30
    assert arrangements.host_bytes(work, one[0], 8) == pytest.approx(weights + 8 * (alone - weights))
    assert hosts[1] - hosts[0] < 7 * hosts[0] - 6.9 * weights


def spec_for(preset: str) -> ModelSpec:
    return published_spec(VARIANTS[PRESETS[preset].model])


def planned(preset: str, vram: str, gpu: str = "NVIDIA H200", **flags: Any) -> tuple[Arrangement, RunConfig]:
    config = resolve(preset_name=preset, flags={"vram": vram, **flags}).config
    arrangement, fits = plan_arrangement(config, spec_for(preset), gpu=gpu)
    assert fits
    return arrangement, config


@pytest.mark.parametrize("gpu", ["NVIDIA H200", "NVIDIA GeForce RTX 4090", "Some Other Card"])
def test_more_memory_is_never_slower_and_the_budget_is_kept(gpu: str) -> None:
    speed = None
    for vram in ("7GB", "8GB", "12GB", "16GB", "24GB", "32GB", "48GB", "80GB", "100GB"):
        arrangement, config = planned("4090-lora-5b", vram, gpu)
        needs = estimate(config, spec_for("4090-lora-5b"), gpu=gpu, arrangement=arrangement)
        assert needs.memory.card <= parse_bytes(vram) * (1 - arrangements.MARGIN)
        assert estimate(config, spec_for("4090-lora-5b"), gpu=gpu) == needs  # planned there too
        if needs.seconds is not None:
            assert speed is None or needs.seconds <= speed * (1 + arrangements.WORTH)
            speed = needs.seconds
    assert arrangement.kept_whole >= 41


def test_the_planner_leaves_what_was_given() -> None:
    given: list[tuple[dict[str, Any], str]] = [
        ({"stream_blocks": 7}, "streamed_blocks"), ({"keep_everything": 3}, "kept_whole"),
        ({"offload_activations": 11}, "offloaded_blocks"),
    ]  # fmt: skip
    for flags, field in given:
        arrangement, _ = planned("4090-lora-5b", "24GB", **flags)
        assert getattr(arrangement, field) == next(iter(flags.values()))
    assert planned("4090-lora-5b", "24GB", keep_activations="inputs")[0].keep == "inputs"
    assert planned("4090-lora-5b", "100GB", gradient_checkpointing=False)[0].keep == "everything"
    flags = {"vram": None, "offload_activations": 5, "attention": "flash"}
    config = resolve(preset_name="4090-lora-5b", flags=flags).config
    assert plan_arrangement(config, spec_for("4090-lora-5b")) == (
        Arrangement(offloaded_blocks=5, attention="flash"), True,
    )  # fmt: skip


def test_a_slow_link_moves_less() -> None:
    """On a card whose link is a tenth of an H200's, offloading is what computing again is dearer than."""
    config = resolve(preset_name="a100-lora-1.5-5b", flags={"vram": "24GB"}).config
    work = workload(config, spec_for("a100-lora-1.5-5b"))
    fast = arrangements.Speed(products=8e14, attention=4e14, memory=4.8e12, link=5.5e10)
    moved = []
    for speed in (fast, replace(fast, link=1.5e9)):
        arrangement, fits = arrangements.arrange(work, 24 * 10**9, speed, arrangements.RequestedArrangement())
        assert fits
        moved.append(arrangements.host_bytes(work, arrangement))
    assert moved[1] < 0.8 * moved[0]


def test_a_budget_that_is_too_small_is_refused_with_the_least_that_is_not() -> None:
    config = resolve(preset_name="4090-lora-5b", flags={"vram": "4GB"}).config
    with pytest.raises(
        UsageError, match=r"--vram 4GB is not enough: this run is estimated to need at least \d\.\d GB"
    ) as caught:
        check_arrangement(config, spec_for("4090-lora-5b"))
    enough = caught.value.hint.split()[2].rstrip(",")
    check_arrangement(config.model_copy(update={"vram": enough}), spec_for("4090-lora-5b"))


@pytest.mark.parametrize(
    ("text", "size"), [("8GB", 8 * 10**9), ("7.5 gib", int(7.5 * 2**30)), ("900MB", 9 * 10**8), ("8", 0), ("8kg", 0)]
)
def test_amounts_of_memory_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size
    if size == 0:
        with pytest.raises(UsageError) as caught:
            resolve(flags={"vram": text})
        assert "is not an amount of memory; write it in GB or GiB, such as 8GB" in caught.value.details[0]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"type": "sft", "vram": "8GB"}, "vram: only supported for type lora or strategy stream, not sft"),
        ({"base_precision": "fp8", "dora": True, "compile": False}, "base_precision fp8: not supported with dora"),
        (
            {"base_precision": "fp8", "precision": "fp32"},
            "base_precision fp8: only supported for precision bf16 and fp16",
        ),
        (
            {"base_precision": "fp8", "type": "sft", "strategy": "stream"},
            "base_precision: only supported for type lora, whose base model is frozen",
        ),
        (
            {"strategy": "zero2", "keep_activations": "inputs"},
            "keep_activations: only supported for strategies ddp and stream, not zero2",
        ),
        ({"stream_blocks": 43}, "stream_blocks 43: 5b has only 42 blocks"),
        ({"vram": "8GB", "dora": True, "compile": True}, "compile: DoRA layers cannot be compiled with vram"),
        ({"keep_everything": 20, "offload_activations": 23}, "add up to 43 blocks, but 5b has 42"),
    ],
)
def test_what_the_engine_cannot_do_is_refused(flags: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_config(resolve(preset_name="4090-lora-5b", flags=flags).config, spec_for("4090-lora-5b"))
    assert any(told in detail for detail in caught.value.details)


def test_no_kernel_is_measured_without_a_gpu(tmp_path: Path) -> None:
    assert fastest((1, 2, 8, 64), torch.bfloat16, CPU, tmp_path / "attention.json") is None
    assert not (tmp_path / "attention.json").exists()


def test_a_plan_shows_the_arrangement_and_refuses_a_budget_too_small(command: Cogtune) -> None:
    shown = command("plan", "--preset", "8gb-lora-5b", "--samples", 1).out
    assert "weights of 42 of 42 blocks streamed from the host" in shown
    assert "the fastest by the estimate that fits 8GB" in shown
    plan = json.loads(command("plan", "--preset", "8gb-lora-5b", "--samples", 1, "--json").out)
    assert plan["arrangement"]["streamed_blocks"] == 42
    assert plan["gpu_memory"]["card"] < 8 * 10**9
    assert "--vram 3GB is not enough" in command("plan", "--preset", "8gb-lora-5b", "--vram", "3GB", status=2).err
