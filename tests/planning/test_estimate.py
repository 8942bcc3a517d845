"""What a run will take: sizes held to real models, memory to recorded measurements; and what fits which machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cogtune.config.arrangement import Arrangement
from cogtune.config.presets import PRESETS
from cogtune.config.resolving import resolve
from cogtune.config.run_config import RunConfig
from cogtune.modeling.adapters import add_lora
from cogtune.modeling.random_weights import build_transformer
from cogtune.models.checkpoint_configs import ModelSpec, published_spec
from cogtune.models.layers import layers, names, transformer_parameters
from cogtune.models.locate import spec_of
from cogtune.models.variants import VARIANTS
from cogtune.planning import fit, host_memory
from cogtune.planning.estimate import GIB, Estimate, Memory, estimate, lora_parameters, plan_arrangement
from cogtune.planning.fit import GB, Hardware, fitted, nearest_preset, problems, refuse_unfit
from cogtune.planning.measurements import Measurement, recorded
from cogtune.planning.summary import estimate_run
from cogtune.system.errors import UsageError
from cogtune.system.gpus import Gpu
from tests.conftest import Cogtune

WITHIN = 0.08


def spec_for(name: str) -> ModelSpec:
    return published_spec(VARIANTS[name])


def cards(count: int, gb: float, *, used: float = 0, name: str = "NVIDIA Card") -> Hardware:
    return Hardware((Gpu(name, int(gb * GB), int(used * GB)),) * count, 512 * GIB)


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_are_counted_as_the_real_models_have_them(name: str) -> None:
    model = build_transformer(VARIANTS[name], "full", device="meta", dtype=torch.bfloat16)
    assert transformer_parameters(spec_for(name)) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", VARIANTS)
def test_an_adapters_parameters_are_counted_too(name: str) -> None:
    for targets in (("to_q", "to_out.0", "ff.net.0.proj", "transformer_blocks.3.ff.net.2"), names(spec_for(name))):
        model = build_transformer(VARIANTS[name], "full", device="meta", dtype=torch.bfloat16)
        add_lora(model, rank=16, alpha=16, target_modules=targets, seed=0)
        counted = lora_parameters(spec_for(name), RunConfig(rank=16, target_modules=tuple(targets)))
        assert counted == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_layers_are_those_of_the_real_models(name: str) -> None:
    model = build_transformer(VARIANTS[name], "full", device="meta", dtype=torch.bfloat16)
    found = {
        path: module.weight.flatten(1).shape
        for path, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
    }
    assert layers(spec_for(name)) == {path: (inputs, outputs) for path, (outputs, inputs) in found.items()}


of_every_recorded_run = pytest.mark.parametrize(
    "row",
    [row for row in recorded() if row.recipe == "preset"],  # an estimate is of cogtune's own recipe
    ids=lambda row: f"{row.preset}-{row.gpus}-{row.gpu.split()[1]}",
)


@of_every_recorded_run
def test_every_recorded_peak_is_estimated(row: Measurement) -> None:
    spec = spec_for(PRESETS[row.preset or ""].model)
    needs = estimate(row.config, spec, gpu=row.gpu, alone=row.alone, arrangement=row.planned)
    assert needs.memory.reserved / GIB == pytest.approx(row.peak_gib, rel=WITHIN)
    if row.card_gb is not None:
        assert needs.memory.card / GB == pytest.approx(row.card_gb, rel=WITHIN)


@of_every_recorded_run
def test_the_host_and_the_time_of_every_recorded_run_are_estimated(row: Measurement) -> None:
    """What little a run without offload takes of the host depends on its compilers: that is held from above alone."""
    needs = estimate(row.config, spec_for(PRESETS[row.preset or ""].model), gpu=row.gpu, arrangement=row.planned)
    assert row.step_s == pytest.approx(needs.seconds, rel=0.10)
    assert row.host_gib is not None
    if row.alone:  # the host has all of a run's processes
        return
    assert row.host_gib < needs.host / GIB + 3
    if row.config.strategy.endswith("-offload"):
        assert row.host_gib == pytest.approx(needs.host / GIB, rel=0.15)


@pytest.mark.parametrize(
    ("preset", "gib"),
    [
        ("4080-lora-2b", 8.7),
        ("4090-lora-5b", 20.1),
        ("4090-lora-5b-i2v", 20.6),
        ("a100-lora-1.5-5b", 32.2),
        ("a100-lora-1.5-5b-i2v", 32.9),
    ],
)
def test_eager_steps_take_what_they_took_on_an_h200(preset: str, gib: float) -> None:
    """Peak reserved memory of five LoRA steps of ``tests/gpu/test_one_gpu.py``, nothing compiled."""
    config = resolve(preset_name=preset, flags={"compile": False, "vram": "off"}).config
    needs = estimate(config, spec_for(PRESETS[preset].model))
    assert needs.memory.reserved / GIB == pytest.approx(gib, rel=WITHIN)


@pytest.mark.parametrize(
    ("preset", "flags", "arrangement", "gb"),
    [
        ("12gb-sft-5b", {"vram": "10.5GB", "master_weights": "fp32", "moments": "fp32"}, None, 8.93),
        (
            "12gb-sft-2b",
            {"vram": "6GB", "master_weights": "split", "moments": "8bit"},
            Arrangement(streamed_blocks=30, kept_whole=1, offloaded_blocks=29),
            5.01,
        ),
    ],
)
def test_streamed_training_takes_what_it_took_on_an_h200(
    preset: str, flags: dict[str, str], arrangement: Arrangement | None, gb: float
) -> None:
    """The two runs of docs/memory-and-speed.md, which are not among the recorded ones."""
    config = resolve(preset_name=preset, flags=flags).config
    needs = estimate(config, spec_for(PRESETS[preset].model), gpu="NVIDIA H200", arrangement=arrangement)
    assert needs.memory.card / GB == pytest.approx(gb, rel=WITHIN)


def test_an_estimates_parts_are_its_sum() -> None:
    memory = estimate(resolve(preset_name="8xa100-sft-5b-zero3").config, spec_for("5b")).memory
    parts = memory.weights + memory.gradients + memory.optimizer + memory.activations + memory.workspace
    assert (memory.reserved, memory.card) == (parts, parts + memory.context)
    assert memory.optimizer == transformer_parameters(spec_for("5b")) * 12 // 8  # fp32 weights, two moments, 8 shares


def test_options_move_the_parts_they_should() -> None:
    def at(**flags: Any) -> Memory:
        config = resolve(preset_name="4090-lora-5b", flags={"vram": "off", **flags}).config
        return estimate(config, spec_for("5b")).memory

    base = at()
    assert at(gradient_checkpointing=False).activations > 14 * base.activations
    assert at(optimizer="adamw-8bit").optimizer * 4 == base.optimizer
    assert at(rank=256).gradients == 2 * base.gradients
    assert at(batch_size=2).workspace == pytest.approx(2 * base.workspace)
    assert at(num_processes=2).weights == base.weights


def test_zero2_keeps_the_gradients_of_the_passes_before() -> None:
    def at(preset: str, passes: int) -> Estimate:
        flags = {"gradient_accumulation_steps": passes, "num_processes": 1 if "offload" in preset else 4}
        return estimate(resolve(preset_name=preset, flags=flags).config, spec_for("5b"))

    whole = transformer_parameters(spec_for("5b"))
    one, two, eight = (at("8xa100-sft-5b-zero2", passes).memory.card for passes in (1, 2, 8))
    assert (two - one, eight) == (pytest.approx(2 * whole / 4, rel=1e-6), two)
    host = [at("a100-sft-5b-zero2-offload", passes).host for passes in (1, 4)]
    model = build_transformer(VARIANTS["5b"], "full", device="meta", dtype=torch.bfloat16)
    pinned = sum(1 << (2 * p.numel() - 1).bit_length() for p in model.parameters())  # each rounded up on its own
    assert host[1] - host[0] == pytest.approx(pinned, rel=1e-3)


def test_without_pinned_memory_a_step_takes_longer_and_the_host_less() -> None:
    def at(preset: str, **flags: Any) -> Estimate:
        return estimate(resolve(preset_name=preset, flags=flags).config, spec_for("5b"), gpu="H100")

    for preset in ("a100-sft-5b-zero2-offload", "8x5090-sft-5b-zero3-offload"):
        pinned, without = (at(preset, pin_memory=pin).seconds or 0 for pin in (True, False))
        assert without > pinned + 2
    whole = transformer_parameters(spec_for("5b"))
    several = {"gradient_accumulation_steps": 4, "pin_memory": False}
    one, four = (at("a100-sft-5b-zero2-offload", **flags).host for flags in ({"pin_memory": False}, several))
    assert four - one == pytest.approx(2 * whole, rel=1e-6)  # bf16 gradients, and no more
    pinned, without = (at("8x5090-sft-5b-zero3-offload", pin_memory=pin).host for pin in (True, False))
    assert pinned - without == pytest.approx(0.24 * 18 * whole, rel=1e-6)  # all but the weights


def test_one_process_alone_has_no_nccl() -> None:
    config = resolve(preset_name="8xa100-sft-5b-zero2").config
    whole, alone = (estimate(config, spec_for("5b"), alone=alone).memory for alone in (False, True))
    assert alone.reserved == whole.reserved
    assert 1.3 < (whole.context - alone.context) / GIB < 1.4


def test_the_host_holds_weights_that_are_read_as_another_type() -> None:
    def host(preset: str, **flags: Any) -> int:
        flags = {"vram": "off", **flags}
        return estimate(resolve(preset_name=preset, flags=flags).config, spec_for(PRESETS[preset].model)).host

    whole = transformer_parameters(spec_for("5b"))
    assert host("4090-lora-5b", precision="fp32") - host("4090-lora-5b") == 4 * whole
    assert host("8xa100-sft-5b-zero2", strategy="ddp") == host("8xa100-sft-5b-zero2")  # made fp32 on the GPU
    bf16 = host("4080-lora-2b", precision="bf16") - host("4080-lora-2b")  # it is published in fp16
    assert bf16 == 2 * transformer_parameters(spec_for("2b"))
    assert host("a100-sft-2b", precision="bf16") == host("a100-sft-2b")


def test_time_is_known_where_the_card_is() -> None:
    config = resolve(preset_name="4090-lora-5b", flags={"vram": "off"}).config
    assert estimate(config, spec_for("5b"), gpu="Some Other Card").seconds is None
    h200 = estimate(config, spec_for("5b"), gpu="NVIDIA H200").seconds
    assert h200 == pytest.approx(2.76, rel=0.1)  # measured, compiled, full checkpointing
    eager = estimate(config.model_copy(update={"compile": False}), spec_for("5b"), gpu="NVIDIA H200").seconds
    assert eager == pytest.approx(3.65, rel=0.1)


def test_a_run_that_cannot_fit_is_refused_with_the_nearest_that_does() -> None:
    def told(preset: str, machine: Hardware, **flags: Any) -> str:
        config = resolve(preset_name=preset, flags=flags).config
        with pytest.raises(UsageError) as caught:
            refuse_unfit(config, spec_for(PRESETS[preset].model), machine, preset)
        return f"{caught.value.message} | {caught.value.hint}"

    assert "--preset 8gb-lora-5b," in told("4090-lora-5b", cards(1, 16.9))
    assert "--preset 6gb-lora-2b," in told("4090-lora-5b", cards(1, 6))
    assert "this machine has 1 x NVIDIA Card of 12.0 GB" in told("a100-lora-1.5-5b", cards(1, 12))
    assert "--preset 16gb-lora-1.5-5b," in told("a100-lora-1.5-5b", cards(1, 12))
    assert "--strategy zero2-offload --num-processes 1" in told("8xa100-sft-5b-zero2", cards(1, 80))
    assert "needs 8 GPUs, but this machine has 4 x" in told("8x4090-sft-2b-zero2", cards(4, 24))
    assert "no preset fits" in told("4090-lora-5b", cards(1, 4))
    assert "this machine has no NVIDIA GPU" in told("4090-lora-5b", Hardware((), 64 * GIB))
    assert "8 GPUs" in told("8xa100-sft-5b-zero3", Hardware((), 64 * GIB))


def test_no_strategy_is_proposed_that_the_optimizer_does_not_go_with() -> None:
    resolved = resolve(preset_name="4090-lora-5b", flags={"type": "sft", "optimizer": "came"})
    with pytest.raises(UsageError, match="--fit: no strategy for") as caught:
        fitted(resolved, spec_for("5b"), cards(8, 40))
    assert caught.value.hint == "nearest that fits: --optimizer adamw --strategy zero2 --num-processes 8"
    assert [detail.partition(":")[0] for detail in caught.value.details] == [
        "ddp",
        "the others do not support optimizer came",
    ]
    assert fitted(resolved, spec_for("5b"), cards(8, 141)).config.strategy == "ddp"
    with pytest.raises(UsageError) as caught:
        refuse_unfit(resolved.config, spec_for("5b"), cards(1, 40))
    assert caught.value.hint.startswith("nearest that fits: --optimizer adamw --strategy zero2-offload, ")


def test_what_fits_is_let_through_with_a_word_where_it_is_tight(capsys: pytest.CaptureFixture[str]) -> None:
    config = resolve(preset_name="4090-lora-5b").config
    refuse_unfit(config, spec_for("5b"), cards(1, 25.7))
    assert capsys.readouterr().err == ""
    refuse_unfit(config, spec_for("5b"), cards(1, 25.7, used=10))
    assert "the run may be out of memory" in capsys.readouterr().err


def test_the_hosts_memory_counts() -> None:
    big, spec = resolve(preset_name="a100-sft-5b-zero2-offload"), spec_for("5b")
    for gib, fits in ((32, False), (90, False), (96, True), (128, True)):
        machine = replace(cards(1, 80), host=gib * GIB)
        told = problems(big.config, estimate(big.config, spec), machine)
        assert (told == []) == fits
        assert fits or f"GiB of host memory, but this machine has {gib} GiB" in told[0]
    with pytest.raises(UsageError) as caught:
        fitted(big, spec, replace(cards(1, 80), host=48 * GIB))
    assert [line.partition(": ")[0] for line in caught.value.details] == ["ddp", "zero2-offload", "stream"]
    assert "needs 92.7 GB on each GPU" in caught.value.details[0]
    assert "needs about 101 GiB of host memory" in caught.value.details[1]
    assert nearest_preset(big.config, spec, replace(cards(1, 80), host=48 * GIB)).name == "4090-lora-5b"  # type: ignore[union-attr]


def test_a_containers_limit_is_the_machines_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(host_memory, "_CGROUP_LIMITS", (str(limit),))
    whole = fit.local_hardware().host
    for text, host in (("max", whole), (str(2**62), whole), (str(2 * GIB), 2 * GIB)):
        limit.write_text(text + "\n")
        assert fit.local_hardware().host == host


def test_what_is_proposed_fits_by_its_whole_estimate() -> None:
    """A run may be started whose estimate is 8 % too much; none is proposed."""
    config, spec = resolve(preset_name="8x4090-sft-2b-zero2").config, spec_for("2b")
    needs = estimate(config.model_copy(update={"num_processes": 2}), spec).memory.card / GB
    for gb, strategy in ((needs + 0.1, "zero2"), (needs - 0.1, "zero2-offload")):
        assert fitted(resolve(preset_name="8x4090-sft-2b-zero2"), spec, cards(2, gb)).config.strategy == strategy


def test_a_cpu_trains_what_takes_it_seconds() -> None:
    nothing = Hardware((), 16 * GIB)
    tiny = resolve(preset_name="cpu-lora-tiny").config
    spec = spec_of("tiny:2b")
    assert problems(tiny, estimate(tiny, spec), nothing) == []
    two = tiny.model_copy(update={"num_processes": 2, "strategy": "zero3-offload"})
    assert problems(two, estimate(two, spec), nothing) == []


def test_fit_takes_all_gpus_and_the_fastest_strategy_that_fits() -> None:
    def chosen(preset: str, machine: Hardware) -> tuple[str, int]:
        resolved = fitted(resolve(preset_name=preset), spec_for(PRESETS[preset].model), machine)
        assert resolved.provenance["strategy"] in ("--fit", f"preset {preset}")
        return resolved.config.strategy, resolved.config.num_processes

    assert chosen("8xa100-sft-5b-zero3-offload".replace("-offload", ""), cards(1, 141)) == ("ddp", 1)
    assert chosen("8xa100-sft-5b-zero3", cards(1, 80)) == ("zero2-offload", 1)
    assert chosen("a100-sft-2b", cards(8, 24)) == ("zero2", 8)
    assert chosen("4090-lora-5b", cards(4, 24)) == ("ddp", 4)
    with pytest.raises(UsageError, match="--fit requires an NVIDIA GPU"):
        fitted(resolve(preset_name="cpu-sft-tiny"), spec_of("tiny:2b"), Hardware((), 64 * GIB))
    with pytest.raises(UsageError, match="--fit: no strategy for"):
        fitted(resolve(preset_name="4090-lora-5b"), spec_for("5b"), cards(1, 12))


@pytest.mark.parametrize("name", [row.name for row in PRESETS.values() if row.promised_gb is not None])
def test_every_preset_is_estimated_to_fit_the_card_it_is_named_after(name: str) -> None:
    row = PRESETS[name]
    config = resolve(preset_name=name).config
    assert problems(config, estimate(config, spec_for(row.model)), cards(row.gpus, fit_card(row.card))) == []


def fit_card(card: str) -> int:
    from cogtune.config.presets import CARDS_GB

    return CARDS_GB[card]


def test_the_nearest_preset_is_of_the_same_kind() -> None:
    config = resolve(preset_name="a100-lora-1.5-5b-i2v").config
    for gb, name in ((25.7, "a100-lora-1.5-5b-i2v"), (14, "16gb-lora-1.5-5b-i2v"), (9, "8gb-lora-5b-i2v")):
        row = nearest_preset(config, spec_for("1.5-5b-i2v"), cards(1, gb))
        assert row is not None
        assert row.name == name


def test_an_outlook_counts_disk_and_time() -> None:
    config = resolve(preset_name="4090-lora-5b", flags={"output": "out", "steps": 2000}).config
    found = estimate_run(config, spec_for("5b"), cards(1, 141, name="NVIDIA H200"), counts=[70])
    shown = dict(found.rows())
    moments, text = 32 * 13 * 60 * 90 * 2, 226 * 4096 * 2
    assert found.to_dict()["cache"] == 70 * (moments + text)
    assert shown["disk: checkpoints"].startswith("6.34 GB, 1.59 each")  # three, and the next while it is written
    assert shown["fits"] == "yes"
    assert shown["optimizer steps"] == "2,000 of 1 samples"
    assert "hours in total" in shown["time"]
    assert shown["command"].startswith("accelerate launch --config_file out/launch/accelerate.yaml")


def test_steps_of_epochs_are_counted_size_by_size(clips: Path) -> None:
    """Five clips of one size and one of another, in batches of four: two passes and one, where six would be two."""
    flags = {"data": clips, "buckets": "17x64x96,9x96x64", "batch_size": 4, "epochs": 1}
    config = resolve(preset_name="cpu-lora-tiny", flags=flags).config
    found = estimate_run(config, spec_of("tiny:2b"), cards(0, 0))
    assert sorted(found.counts) == [1, 5]
    assert (found.samples, found.counted, found.steps) == (6, True, 3)


def test_a_plan_needs_no_data_and_no_model(command: Cogtune) -> None:
    plan = json.loads(command("plan", "--preset", "8xa100-sft-1.5-5b-zero3", "--json").out)
    assert plan["samples"] == 100
    assert plan["gpu_memory"]["card"] < 55 * GB
    shown = command("plan", "--preset", "4090-lora-5b", "--samples", 7).out
    assert "for 7 samples" in shown


def test_train_refuses_before_it_downloads(command: Cogtune, monkeypatch: pytest.MonkeyPatch) -> None:
    if fit.local_hardware().cards:
        pytest.skip("there is a GPU here")
    told = command("train", "--preset", "8xa100-sft-5b-zero3", status=2).err
    assert "8xa100-sft-5b-zero3 does not fit this machine" in told
    assert "--force" in told


def test_what_is_not_there_to_resume_is_told_before_what_does_not_fit(command: Cogtune) -> None:
    told = command("train", "--resume", "latest", "--output", "nowhere", status=2).err
    assert "nowhere has no checkpoint to resume from" in told


STREAMED = [row.name for row in PRESETS.values() if row.strategy == "stream"]


@pytest.mark.parametrize("name", STREAMED)
def test_a_streamed_preset_is_planned_for_its_card_and_says_that_it_was_not_measured(name: str) -> None:
    row, spec = PRESETS[name], spec_for(PRESETS[name].model)
    machine = Hardware((Gpu("NVIDIA H200", fit_card(row.card) * GB, 0),), 128 * GIB)
    config = host_memory.with_formats(resolve(preset_name=name).config, spec, machine.host)
    assert plan_arrangement(config, spec)[1]
    assert problems(config, estimate(config, spec), machine, sure=1.0) == []
    found = estimate_run(config, spec, machine, (4,))
    said = "estimated only; no measurement of strategy stream is recorded yet"
    assert ("these figures", said) in found.rows()
    assert (found.to_dict()["measured"], found.needs.seconds) == (False, None)
    other = estimate_run(resolve(preset_name="4090-lora-5b").config, spec_for("5b"), machine, (4,))
    assert other.is_measured
    assert not any(said in line for line in other.rows())


def test_every_gpus_share_of_a_streamed_state_is_smaller() -> None:
    flags = {"master_weights": "fp32", "moments": "fp32", "gradient_accumulation_steps": 2}
    one, two = (
        estimate(resolve(preset_name="12gb-sft-5b", flags={**flags, "num_processes": count}).config, spec_for("5b"))
        for count in (1, 2)
    )
    weights = transformer_parameters(spec_for("5b"))
    assert two.memory.optimizer < one.memory.optimizer
    assert one.host > 18 * weights  # bf16 weights, fp32 gradients, 12 bytes of state
    assert two.host < one.host + 18 * GIB  # one state, whatever shares it; activations and processes are each's own
    assert one.checkpoint == 14 * weights


def test_streaming_is_proposed_where_nothing_else_fits() -> None:
    resolved, spec = resolve(preset_name="a100-sft-5b-zero2-offload"), spec_for("5b")
    assert fitted(resolved, spec, cards(1, 40)).config.strategy == "zero2-offload"
    assert fitted(resolved, spec, replace(cards(1, 40), host=80 * GIB)).config.strategy == "stream"
    lora = resolve(preset_name="4090-lora-5b")
    assert fitted(lora, spec, cards(1, 40)).config.strategy == "ddp"
