"""The limits of a LoRA run that sets none: what is free."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cogtune.bench.run import BenchRequest, _narrowed
from cogtune.commands.resume import _with_settings
from cogtune.commands.train import _warn_of_changes
from cogtune.config.resolving import Resolved, resolve
from cogtune.models.locate import spec_of
from cogtune.planning import free_memory
from cogtune.planning.estimate import estimate
from cogtune.planning.fit import Hardware
from cogtune.planning.free_memory import FREE_MEMORY, with_free_memory
from cogtune.run.plan import check_config
from cogtune.run.run_yaml import read_run
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
    assert "vram: null  # default" in found.to_yaml()


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
    told = "--vram 12GB, which is what is free of the GPU, in place of the preset's 24GB"
    assert told in capsys.readouterr().err
    assert limited(machine(12), "4090-lora-5b", vram="24GB").config.vram == "24GB"  # who sets it is believed
    assert limited(machine(79, total=80), "4080-lora-2b", batch_size=8).config.vram == "79GB"  # 12 fit no arrangement
    assert "vram: 24GB  # preset 4090-lora-5b" in limited(machine(12), "4090-lora-5b").to_yaml()


@pytest.mark.parametrize("flags", [[], ["--slurm", "job.sh"]])
def test_a_presets_budget_is_known_in_a_runs_configuration(
    flags: list[str], clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", "--preset", "4090-lora-5b", "--model", "tiny:5b", "--size", "9x64x96", "--data", clips]
    run(capsys, *words, *(flags or ["--dry-run"]))
    (file,) = tmp_path.glob("job.sh.yaml" if flags else "out/*/run.yaml")
    resolved = resolve(file=file, flags={"model": "5b", "size": None})
    assert resolved.provenance["vram"] == "preset 4090-lora-5b"
    assert with_free_memory(resolved, spec_of("5b"), machine(12)).config.vram == "12GB"
    assert resolve(file=file, flags={"type": "sft"}).config.vram is None
    file.write_text(file.read_text().replace("vram: 24GB  # preset 4090-lora-5b", "vram: 24GB"))
    edited = resolve(file=file, flags={"model": "5b", "size": None})
    assert with_free_memory(edited, spec_of("5b"), machine(12)).config.vram == "24GB"


def test_limits_of_another_machine_do_not_come_from_the_hub(capsys: pytest.CaptureFixture[str]) -> None:
    settings = resolve(preset_name="4090-lora-5b", flags={"host_memory": "30GB"}).config.to_dict()
    resolved = _with_settings(settings, "--resume me/run", {})
    assert (resolved.config.rank, resolved.config.vram, resolved.config.host_memory) == (128, None, None)
    assert "--vram" not in capsys.readouterr().err


def test_an_edited_limit_outlives_the_next_start(tmp_path: Path) -> None:
    file = _write(tmp_path / "run.yaml", limited(machine(23), model="5b"))
    assert "vram: null  # default\n" in file.read_text()
    file.write_text(file.read_text().replace("vram: null  # default", "vram: 9GB  # default"))
    again = with_free_memory(replace(read_run(tmp_path), momentary={}), spec_of("5b"), machine(23))
    assert again.config.vram == "9GB"
    assert "vram: 9GB" in again.to_yaml()


def test_only_the_gpus_of_the_run_count_and_machines_decide_alike() -> None:
    two = Hardware((*machine(23.5).cards, *machine(1).cards), 64 * GIB)
    assert limited(two, model="5b").config.vram == "23.5GB"
    assert limited(two, model="5b", num_processes=2).config.vram is None
    assert limited(machine(23.5), model="5b", num_machines=2, num_processes=2, main_process_ip="h").momentary == {}


def test_fit_limits_the_run_that_it_chooses(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cogtune.planning.fit.gpus", lambda: machine(11.7, total=12).cards * 2)
    monkeypatch.setattr("cogtune.planning.fit.limited", lambda _: 200 * GIB)
    with_host(monkeypatch, 150)
    told = run(capsys, "plan", "--model", "5b", "--fit").out
    assert "the fastest by the estimate that fits 11.7GB" in told
    assert "optimizer steps: 1,000 of 2 samples" in told.replace("\t", ": ")


def test_full_fine_tuning_from_the_host_takes_what_is_free_too() -> None:
    found = limited(machine(15.5), model="5b", type="sft", strategy="stream")
    assert (found.config.vram, found.config.host_memory) == ("15.5GB", None)  # the state's formats go by the host
    assert limited(machine(10.7), "12gb-sft-2b").config.vram == "12GB"  # takes 10.0 GB
    assert limited(machine(8), "12gb-sft-2b").config.vram == "8GB"


def test_dora_is_compiled_without_the_engine_if_it_fits() -> None:
    assert limited(machine(23.5), model="5b", dora=True).config.vram is None
    assert limited(machine(12), model="5b", dora=True).config.vram == "12GB"
    found = limited(machine(23.5), "4090-lora-5b", dora=True)
    assert (found.config.vram, found.config.uses_engine) == ("off", False)
    assert "vram: 24GB  # preset 4090-lora-5b" in found.to_yaml()
    assert (
        limited(machine(12), model="5b", dora=True, compile=True).config.vram is None
    )  # compiled as asked, or refused
    assert limited(machine(23.5), model="5b", dora=True, vram="20GB").config.vram == "20GB"


def test_a_budget_edited_behind_its_presets_name_is_ones_own(tmp_path: Path) -> None:
    file = _write(tmp_path / "run.yaml", resolve(preset_name="4090-lora-5b"))
    file.write_text(file.read_text().replace("vram: 24GB  # preset", "vram: 20GB  # preset"))
    for resolved in (resolve(file=file), read_run(tmp_path)):
        assert with_free_memory(resolved, spec_of("5b"), machine(12)).config.vram == "20GB"


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
    with_host(monkeypatch, 5)  # less than any run takes: the least that there is
    least = limited(machine(23.5), "4090-lora-5b").config
    assert least.host_memory == "8GiB"
    assert estimate(least, spec, gpu="NVIDIA GeForce RTX 4090").host == 8 * GIB
    assert limited(machine(23.5), "4090-lora-5b", host_memory="30GB").config.host_memory == "30GB"


def test_a_limit_of_the_host_that_no_arrangement_fits_is_refused(cogtune: Cogtune) -> None:
    ran = cogtune("plan", "--preset", "8gb-lora-5b", "--host-memory", "9GB", status=2)
    assert "--host-memory 9GB is not enough: this run is estimated to need at least" in ran.err
    cogtune("plan", "--preset", "8gb-lora-5b", "--host-memory", "40GB")
    cogtune("plan", "--host-memory", "9GB")  # for a run that starts elsewhere, with a GPU
    by_hand = ["plan", "--stream-blocks", "42", "--offload-activations", "30", "--host-memory", "9GB"]
    assert "--host-memory 9GB is not enough" in cogtune(*by_hand, status=2).err
    off = cogtune("plan", "--vram", "off", "--host-memory", "9GB", status=2).err
    assert "host_memory: cannot be used with vram off" in off


def test_off_is_off(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("vram: off\n")  # which YAML reads as false
    config = resolve(preset_name="4090-lora-5b", file=file).config
    assert (config.vram, config.vram_bytes, config.uses_engine) == ("off", None, False)
    assert resolve(file=Path(_write(tmp_path / "again.yaml", resolve(file=file)))).config == resolve(file=file).config
    for flags, told in (
        ({"stream_blocks": 3}, "vram off: cannot be used with stream_blocks"),
        ({"strategy": "stream", "type": "sft"}, "vram off: cannot be used with strategy stream"),
        ({"base_precision": "nf4", "vram": None, "type": "sft"}, "base_precision: only supported for type lora"),
    ):
        with pytest.raises(UsageError) as caught:
            check_config(resolve(flags={"vram": "off", "model": "tiny:5b", **flags}).config, spec_of("tiny:5b"))
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
