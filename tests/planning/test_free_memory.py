"""The limits of a LoRA run that sets none: what is free."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cogtune.bench.run import BenchRequest, _narrowed
from cogtune.commands.train import _warn_of_changes
from cogtune.config.resolving import FREE_MEMORY, Resolved, resolve
from cogtune.config.run_config import RunConfig
from cogtune.models.locate import spec_of
from cogtune.planning import free_memory
from cogtune.planning.estimate import estimate
from cogtune.planning.fit import Hardware
from cogtune.planning.free_memory import with_free_memory
from cogtune.run.plan import check_config
from cogtune.system.errors import UsageError
from cogtune.system.gpus import Gpu
from tests.conftest import Cogtune
from tests.support.in_process import run

GB, GIB = 10**9, 2**30
NONE = Hardware((), 64 * GIB)


def machine(free: float, *, total: float = 24.0) -> Hardware:
    return Hardware((Gpu("NVIDIA GeForce RTX 4090", int(total * GB), int((total - free) * GB)),), 64 * GIB)


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    with_host(monkeypatch, 40)


def with_host(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    monkeypatch.setattr(free_memory, "free_host_memory", lambda: int(gib * GIB))


def limited(here: Hardware, preset: str | None = None, **flags: Any) -> Resolved:
    resolved = resolve(preset_name=preset, flags=flags)
    return with_free_memory(resolved, spec_of(resolved.config.model), here)


def test_a_lora_run_without_limits_takes_what_is_free() -> None:
    found = limited(machine(7.78, total=8), model="5b", rank=64)
    assert (found.config.vram, found.config.host_memory) == ("7.7GB", "40GiB")
    assert {found.provenance[key] for key in ("vram", "host_memory")} == {FREE_MEMORY}
    needs = estimate(found.config, spec_of("5b"), gpu="NVIDIA GeForce RTX 4090")
    assert needs.memory.card < 7.7 * GB
    assert needs.arrangement is not None
    assert needs.arrangement.streamed_blocks > 0
    written = yaml.safe_load(found.to_yaml())  # another start, perhaps on another machine, decides anew
    assert (written["vram"], written["host_memory"]) == (None, None)
    assert f"vram: null  # {FREE_MEMORY}" in found.to_yaml()


@pytest.mark.parametrize("flags", [{"base_precision": "nf4"}, {"attention": "cudnn"}])
def test_options_that_arrange_nothing_leave_the_limit_open(flags: dict[str, Any]) -> None:
    assert limited(machine(7.78, total=8), model="5b", **flags).config.vram == "7.7GB"


@pytest.mark.parametrize(
    ("here", "preset", "flags"),
    [
        (NONE, None, {"model": "5b"}),
        (machine(23), None, {"model": "5b", "vram": "off"}),
        (machine(23), None, {"model": "5b", "stream_blocks": 3}),
        (machine(23), None, {"model": "5b", "type": "sft"}),
        (machine(23), "12gb-sft-5b", {}),
        (machine(23), "a100-sft-5b-zero2-offload", {}),
        (machine(3), None, {"model": "5b"}),  # to be refused in words of its own
        (machine(0), None, {"model": "5b"}),
    ],
)
def test_a_run_that_is_not_to_be_limited_is_left_alone(
    here: Hardware, preset: str | None, flags: dict[str, Any]
) -> None:
    resolved = resolve(preset_name=preset, flags=flags)
    assert with_free_memory(resolved, spec_of(resolved.config.model), here) == resolved


def test_a_presets_budget_stands_if_it_is_free_and_gives_way_if_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert limited(machine(23.5), "4090-lora-5b").config.vram == "24GB"
    assert capsys.readouterr().err == ""
    assert limited(machine(12), "4090-lora-5b").config.vram == "12GB"
    assert "--vram 12GB in place of 24GB: no more of the GPU is free" in capsys.readouterr().err
    assert limited(machine(12), "4090-lora-5b", vram="24GB").config.vram == "24GB"  # who sets it is believed


def test_full_fine_tuning_from_the_host_takes_what_is_free_too() -> None:
    found = limited(machine(15.5), model="5b", type="sft", strategy="stream")
    assert (found.config.vram, found.config.host_memory) == ("15.5GB", None)  # the state's formats go by the host
    assert limited(machine(10.7), "12gb-sft-2b").config.vram == "12GB"  # takes 10.0 GB
    assert limited(machine(8), "12gb-sft-2b").config.vram == "8GB"


def test_host_memory_is_part_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, took = spec_of("5b"), []
    for gib in (40, 24, 16):
        with_host(monkeypatch, gib)
        needs = estimate(limited(machine(23.5), "4090-lora-5b").config, spec, gpu="NVIDIA GeForce RTX 4090")
        assert needs.host <= gib * GIB
        assert needs.memory.card <= 24 * GB
        assert needs.seconds is not None
        took.append(needs.seconds)
    assert took == sorted(took)
    assert took[0] < took[-1]
    with_host(monkeypatch, 5)  # less than any run takes: refused or warned about elsewhere
    assert limited(machine(23.5), "4090-lora-5b").config.host_memory is None
    assert limited(machine(23.5), "4090-lora-5b", host_memory="30GB").config.host_memory == "30GB"


def test_a_limit_of_the_host_that_no_arrangement_fits_is_refused(cogtune: Cogtune) -> None:
    ran = cogtune("plan", "--preset", "8gb-lora-5b", "--host-memory", "9GB", status=2)
    assert "--host-memory 9GB is not enough: this run is estimated to need at least" in ran.err
    cogtune("plan", "--preset", "8gb-lora-5b", "--host-memory", "40GB")
    assert "host_memory: only supported for strategy stream" in cogtune("plan", "--host-memory", "9GB", status=2).err


def test_off_is_off(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("vram: off\n")  # which YAML reads as false
    config = resolve(preset_name="4090-lora-5b", file=file).config
    assert (config.vram, config.vram_bytes, config.uses_engine) == ("off", None, False)
    assert resolve(file=Path(_write(tmp_path / "again.yaml", resolve(file=file)))).config == resolve(file=file).config
    for flags, told in (
        ({"stream_blocks": 3}, "vram off: cannot be used with stream_blocks"),
        ({"strategy": "stream", "type": "sft"}, "vram off: cannot be used with strategy stream"),
    ):
        with pytest.raises(UsageError) as caught:
            check_config(RunConfig(vram="off", **flags), spec_of("tiny:5b"))
        assert told in "\n".join((caught.value.message, *caught.value.details))


def _write(path: Path, resolved: Resolved) -> Path:
    path.write_text(resolved.to_yaml())
    return path


def test_a_preset_that_trains_in_another_way_has_no_budget() -> None:
    assert resolve(preset_name="4090-lora-5b", flags={"type": "sft"}).config.vram is None
    assert resolve(preset_name="4090-lora-5b", flags={"strategy": "zero2"}).config.vram is None
    assert resolve(preset_name="12gb-sft-5b", flags={"strategy": "zero2-offload"}).config.vram is None
    assert resolve(preset_name="12gb-sft-5b").config.vram == "12GB"
    with pytest.raises(UsageError):  # who sets both hears of it
        check_config(resolve(flags={"type": "sft", "vram": "9GB"}).config, spec_of("5b"))


def test_a_resumed_run_is_not_warned_of_what_was_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    resolved = resolve(flags={"model": "tiny:5b"})
    trained = resolved.config.to_dict() | {"vram": "7.7GB", "host_memory": "40GiB"}
    monkeypatch.setattr("cogtune.commands.train.read_state", lambda _: {"config": trained})
    _warn_of_changes(resolved, tmp_path / "checkpoint-1", {})
    assert capsys.readouterr().err == ""
    trained["rank"] = 3
    _warn_of_changes(resolved, tmp_path / "checkpoint-1", {})
    assert "rank: 3 in checkpoint-1, 128 in run.yaml" in capsys.readouterr().err


def test_the_launching_command_plans_with_what_is_free(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cogtune.planning.fit.gpus", lambda: machine(7.78, total=8).cards)
    output = tmp_path / "out"
    words = ["train", "--data", clips, "--output", output, "--model", "tiny:5b", "--size", "9x64x96", "--dry-run"]
    ran = run(capsys, *words)
    (plan,) = output.glob("*/plan.json")
    config = json.loads(plan.read_text())["config"]
    assert (config["vram"], config["host_memory"]) == ("7.7GB", "40GiB")
    assert "the fastest by the estimate that fits 7.7GB" in ran.out
    assert yaml.safe_load((plan.parent / "run.yaml").read_text())["vram"] is None


def test_a_bench_records_what_was_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cogtune.bench.run.local_hardware", lambda: machine(7.78, total=8))
    request = BenchRequest(
        resolved=resolve(flags={"model": "tiny:5b"}), preset=None, changes={"model": "tiny:5b"}, steps=1, warmup=0,
        keep=None, command="",
    )  # fmt: skip
    found = _narrowed(request)
    assert found.changes == {"model": "tiny:5b", "vram": "7.7GB", "host_memory": "40GiB"}
    assert found.resolved.config.vram == "7.7GB"
    off = replace(request, resolved=resolve(flags={"model": "tiny:5b", "vram": "off"}), changes={"vram": "off"})
    assert _narrowed(off).changes == {"vram": "off"}
