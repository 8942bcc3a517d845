"""``cogtune bench``: the run's own step, on a model and samples made for it, with every figure accounted for."""

from __future__ import annotations

import ctypes
import gzip
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from cogtune.bench import run, stage, watch, worker
from cogtune.cli import main
from cogtune.cli.bench import preset_and_changes, table
from cogtune.config.presets import PRESETS
from cogtune.config.resolving import resolve
from cogtune.models.checkpoint_configs import published_spec, read_spec
from cogtune.models.variants import variant
from cogtune.planning import measurements
from cogtune.planning.fit import Hardware
from cogtune.planning.measurements import Measurement, Recipe
from cogtune.run import launch
from cogtune.run.launch import LaunchFiles
from cogtune.run.plan import Plan
from cogtune.system import console
from cogtune.system import gpus as cards
from cogtune.system.errors import CogtuneError, StoppedError, UsageError
from cogtune.system.json_files import write_json
from cogtune.system.locks import exclusive_folder
from tests.conftest import Cogtune
from tests.support.runs_in_process import plan_for
from tools import measurements as cli
from tools import vram_page as vram


@pytest.fixture
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do in this process what a bench does in processes of its own."""

    def start(plan: Plan, files: LaunchFiles, module: str, *words: str, **_how: Any) -> None:
        assert module == "cogtune.bench.worker"
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
        read = Plan.read(files.plan)
        assert worker.run(read, files, 0, False, plain="--plain" in words, alone=False)  # type: ignore[arg-type]

    monkeypatch.setattr("cogtune.bench.stage.prepare", lambda job, folder: stage.make(job))
    monkeypatch.setattr("cogtune.run.launch.start", start)


def request(tmp_path: Path, preset: str = "cpu-lora-tiny", **flags: Any) -> run.BenchRequest:
    return run.BenchRequest(
        resolved=resolve(preset_name=preset, flags=flags),
        preset=preset,
        changes=flags,
        steps=4,
        warmup=2,
        keep=tmp_path / "kept",
        command=run.command_of(preset, flags, ["--steps", "4"]),
    )


def bench(request: run.BenchRequest, recipes: tuple[Recipe, ...] = ("preset",)) -> list[Measurement]:
    return list(run.bench(request, recipes))


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize("model", ["tiny:2b", "tiny:1.5-5b-i2v"])
def test_a_bench_measures_the_steps_after_warm_up(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = iter([[9.0, 8.0, 1.0, 3.0, 2.0, 5.0], [4.0] * 6])
    monkeypatch.setattr(worker, "_seconds", lambda _metrics: next(told))
    size = "9x64x96" if model == "tiny:2b" else "17x64x96"
    mine, plain = bench(request(tmp_path, model=model, size=size), ("preset", "plain"))
    assert (mine.step_s, mine.step_s_range, mine.first_step_s) == (2.5, (1.0, 5.0), 9.0)
    tokens = {"tiny:2b": 3 * 4 * 6, "tiny:1.5-5b-i2v": 3 * 4 * 6}[model]  # 5 latent frames are padded to 6, in pairs
    assert mine.tokens_per_s == round((tokens + 226) / 2.5, 1)
    assert plain.tokens_per_s == round((tokens + 226) / 4, 1)
    assert (mine.recipe, plain.recipe, mine.gpus) == ("preset", "plain", 1)
    assert mine.peak_gib >= mine.start_gib[0] > 0
    assert mine.config.model == model
    assert mine.command == f"cogtune bench --preset cpu-lora-tiny --model {model} --size {size} --steps 4"
    assert Measurement.from_dict(json.loads(json.dumps(mine.to_dict()))) == mine


@pytest.mark.usefixtures("_here")
def test_nothing_is_saved_and_the_kept_model_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[str] = set()
    really = worker.run

    def watched(plan: Plan, *rest: Any, **more: Any) -> bool:
        ended = really(plan, *rest, **more)
        seen.update(path.name for path in plan.config.output.rglob("*") if path.is_file())
        return ended

    monkeypatch.setattr(worker, "run", watched)
    bench(request(tmp_path))
    assert seen == {
        "plan.json", "accelerate.yaml", "command.sh", "run.yaml", "bench-0.json", "metrics.jsonl",
    }  # fmt: skip
    weights = next((tmp_path / "kept").rglob("*.safetensors"))
    made = weights.stat().st_mtime_ns
    monkeypatch.setattr(stage, "make", None)  # nothing is left to be made
    bench(request(tmp_path))
    assert weights.stat().st_mtime_ns == made
    with pytest.raises(TypeError):  # samples of another size are
        bench(request(tmp_path, size="9x64x64"))


@pytest.mark.usefixtures("_here")
def test_a_nano_model_is_measured_as_it_is(
    tmp_path: Path, nano: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bases: list[tuple[Path, int]] = []
    really = worker.run

    def watched(plan: Plan, *rest: Any, **more: Any) -> bool:
        bases.append((plan.base_model_dir, plan.spec.max_text_seq_length))
        return really(plan, *rest, **more)

    monkeypatch.setattr(worker, "run", watched)
    for model in ("nano:5b", str(nano("5b"))):
        bench(request(tmp_path, model=model, size="17x64x96"))
    assert bases == [(nano("5b"), 48)] * 2
    with pytest.raises(UsageError, match=r"unknown nano model '1\.5-5b'"):
        bench(request(tmp_path, model="nano:1.5-5b"))


@pytest.mark.usefixtures("_here")
def test_a_stop_of_the_second_recipe_ends_the_bench_and_the_first_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    really, told = launch.start, []

    def start(plan: Plan, files: LaunchFiles, *words: str, is_last: bool, **how: Any) -> None:
        told.append(is_last)
        if is_last:
            raise StoppedError(how["if_stopped"], signal=signal.SIGINT)
        really(plan, files, *words, is_last=is_last, **how)

    monkeypatch.setattr("cogtune.run.launch.start", start)
    words = ["--preset", "cpu-lora-tiny", "--steps", "2", "--warmup", "1", "--compare", "plain"]
    file = tmp_path / "measured.json"
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        main(["bench", *words, "--keep", str(tmp_path / "kept"), "--json", str(file)])
    signal.signal(signal.SIGTERM, before)
    out, err = capsys.readouterr()
    assert (ended.value.code, told) == (130, [False, True])
    assert "error: stopped before the end" in err
    assert "plain was not measured" in err
    assert "seconds a step (median)" in out
    assert [row.recipe for row in measurements.read(file)] == ["preset"]
    with pytest.raises(StoppedError):  # and no other preset is begun
        cli.measure(tmp_path / "rows.json", ["cpu-lora-tiny", "cpu-sft-tiny"], keep=tmp_path / "kept")
    assert told == [False, True, True]


@pytest.mark.usefixtures("_here")
def test_a_log_that_an_error_names_is_there_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_plan: Plan, files: LaunchFiles, *_words: str, **_how: Any) -> None:
        files.log.parent.mkdir()
        files.log.write_text("all of it")
        raise CogtuneError("it broke", f"the full traceback is in {files.log}", details=["one"], exit_code=3)

    monkeypatch.setattr("cogtune.run.launch.start", fail)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    with pytest.raises(CogtuneError, match="it broke") as caught:
        bench(request(tmp_path))
    (left,) = (tmp_path / "temporary").iterdir()
    assert (caught.value.hint, left.read_text()) == (f"the full traceback is in {left}", "all of it")
    assert (caught.value.details, caught.value.exit_code) == (("one",), 3)


@pytest.mark.usefixtures("_here")
def test_what_a_killed_bench_left_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    folders = [tmp_path / "temporary" / name for name in ("cogtune-bench-killed", "cogtune-bench-busy", "other-one")]
    for folder in folders:
        (folder / "model").mkdir(parents=True)
        (folder / ".lock").touch()
        os.utime(folder / ".lock", (0, 0))
    (tmp_path / "temporary" / "cogtune-bench-new").mkdir()  # not locked yet
    with exclusive_folder(folders[1]):
        os.utime(folders[1] / ".lock", (0, 0))
        bench(request(tmp_path))
    left = {path.name for path in (tmp_path / "temporary").iterdir()}
    assert left == {"cogtune-bench-busy", "cogtune-bench-new", "other-one"}


@pytest.mark.usefixtures("_here")
def test_a_bench_that_is_out_of_memory_names_what_would_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("cogtune.training.objective.Objective.losses", exhausted)
    with pytest.raises(CogtuneError, match="out of GPU memory: CUDA out of memory") as caught:
        bench(request(tmp_path, batch_size=2))
    assert caught.value.hint.startswith("--batch-size 1 --gradient-accumulation-steps 2 takes")


@pytest.mark.usefixtures("_here")
def test_plain_loads_the_frozen_base_in_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cogtune.training import setup
    from cogtune.training.optimizers import build_optimizer as build

    seen = []

    def look(model: Any, config: Any) -> Any:
        frozen = {str(parameter.dtype) for parameter in model.parameters() if not parameter.requires_grad}
        seen.append((frozen, config.compile, config.gradient_checkpointing))
        return build(model, config)

    monkeypatch.setattr(setup, "build_optimizer", look)
    flags: dict[str, Any] = {"precision": "bf16", "gradient_checkpointing": False}
    bench(request(tmp_path, **flags), ("preset", "plain"))
    assert seen == [({"torch.bfloat16"}, None, False), ({"torch.float32"}, False, True)]


def test_a_model_of_unknown_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the size of me/mine is unknown"):
        bench(request(tmp_path, model="me/mine"))
    with pytest.raises(UsageError, match="5b-i2w is unknown; did you mean '5b-i2v'"):
        bench(request(tmp_path, model="5b-i2w"))


def test_nothing_is_made_where_nothing_could_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = cards.Gpu("NVIDIA Card", 24 * 10**9, 0)
    for there, told in (
        ((), "this machine has no NVIDIA GPU"),
        ((card,) * 2, "needs 8 GPUs, but this machine has 2 x"),
    ):
        monkeypatch.setattr("cogtune.planning.fit.gpus", lambda there=there: there)
        with pytest.raises(UsageError, match=told):
            bench(request(tmp_path, preset="8xa100-sft-5b-zero3"))
    assert list(tmp_path.iterdir()) == []


def test_what_the_model_cannot_do_is_refused_before_it_is_made(tmp_path: Path) -> None:
    for flags, told in (({"strategy": "zero3"}, "strategy zero3"), ({"size": "8x64x96"}, "size 8x64x96")):
        with pytest.raises(UsageError) as caught:
            bench(request(tmp_path, **flags))
        assert caught.value.details[0].startswith(told)
    assert list(tmp_path.iterdir()) == []


def test_a_bench_that_is_asked_to_stop_while_it_makes_its_model_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_words: Any, **_more: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("cogtune.modeling.random_weights.write_for_training", asked)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    job = run._job(run._narrowed(request(tmp_path)).resolved.config, tmp_path / "kept")
    files = LaunchFiles(tmp_path / "stage")
    write_json(files.plan, asdict(job))
    try:
        assert stage.main([str(files.plan)]) == 0
    finally:
        console.configure(quiet=False)
        for number, handler in before.items():
            signal.signal(number, handler)
    assert (files.report(0).read() or {})["status"] == "stopped"
    assert not Path(job.index).exists()


def test_what_only_a_run_needs_is_left_out_of_a_bench(tmp_path: Path) -> None:
    own = request(tmp_path, buckets=["5x64x64", "9x64x96"], num_machines=2, num_processes=2, tracker=["wandb"])
    config = run._narrowed(own).resolved.config
    assert (config.num_machines, config.num_processes, config.tracker) == (1, 2, ())
    assert (config.size, config.buckets) == ("9x64x96", ())  # the largest: what has to fit
    assert run._narrowed(request(tmp_path, frames=17)).resolved.config.size == "17x64x96"


def test_a_bench_of_a_file_says_what_the_file_set(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("preset: 4090-lora-5b\nrank: 64\nsteps: 900\nsize: null\ndata: clips\n")
    assert preset_and_changes(file) == ("4090-lora-5b", {"rank": 64})


def test_the_staged_model_says_what_the_published_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The full-size configs, without the weights."""
    monkeypatch.setattr(
        "cogtune.modeling.random_weights.build_transformer",
        lambda row, scale, **_: _ConfigOnly("transformer_config", row, scale),
    )
    monkeypatch.setattr(
        "cogtune.modeling.random_weights.build_vae", lambda row, scale, **_: _ConfigOnly("vae_config", row, scale)
    )
    from cogtune.modeling.random_weights import write_for_training

    for name in ("2b", "1.5-5b-i2v"):
        folder = write_for_training(variant(name), tmp_path / name, scale="full")
        assert read_spec(folder) == published_spec(variant(name))


class _ConfigOnly:
    def __init__(self, maker: str, row: Any, scale: Any) -> None:
        from cogtune.modeling import random_weights

        self.config = getattr(random_weights, maker)(row, scale)

    def save_pretrained(self, folder: Path, **_: Any) -> None:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(self.config))


def test_memory_of_child_processes_is_seen(tmp_path: Path) -> None:
    import subprocess
    import sys

    others = sum(map(watch._kept, psutil.Process().children(recursive=True)))  # those that other tests left
    hold = "x = bytearray(b'x') * 200_000_000; print(len(x), flush=True); input()"
    with watch.watched() as peaks:
        child = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        deadline = time.monotonic() + 600
        while peaks.processes - others < 200_000_000:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        child.communicate(b"\n")
    assert 200_000_000 < peaks.processes - others < 300_000_000
    assert peaks.cards == tuple(gpu.used for gpu in cards.gpus())


class _Driver:
    """Two cards, as NVML tells of them."""

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:
        handle._obj.value = index.value + 1
        return 0 if index.value < 2 else 6

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:
        handle._obj.value = 2
        return 0 if uuid == b"GPU-two" else 6

    def nvmlDeviceGetName(self, handle: Any, name: Any, length: Any) -> int:
        name.value = f"Card {handle.value}".encode()
        return 0

    def nvmlDeviceGetMemoryInfo_v2(self, handle: Any, memory: Any) -> int:
        if memory._obj.version != 40 | 2 << 24:  # size of nvmlMemory_v2_t, and its version
            return 25
        memory._obj.total, memory._obj.used = 24 << 30, handle.value << 30
        return 0


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["Card 1", "Card 2"]),
        ("", []),
        ("1", ["Card 2"]),
        ("GPU-two,0", ["Card 2", "Card 1"]),
        ("0,7,1", ["Card 1"]),
    ],
)
def test_cards_are_those_that_cuda_sees(visible: str | None, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "_library", _Driver)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = cards.gpus()
    assert [gpu.name for gpu in found] == names
    assert all(gpu.used == int(gpu.name[-1]) << 30 and gpu.total == 24 << 30 for gpu in found)
    assert ctypes.sizeof(cards._Memory) == 40


def test_a_new_measurement_takes_the_place_of_the_same_runs_old_one(tmp_path: Path) -> None:
    def row(**changes: Any) -> Measurement:
        given: dict[str, Any] = {
            "preset": "4090-lora-5b", "changes": {}, "recipe": "preset", "gpu": "NVIDIA H200", "gpus": 1,
            "reserved_gib": (18.0,), "allocated_gib": (17.0,), "step_s": 2.0, "versions": {}, "command": "c",
        }  # fmt: skip
        return Measurement(**(given | changes))

    file = tmp_path / "measurements.json"
    file.write_text("")
    assert measurements.add([row(), row(recipe="plain"), row(changes={"rank": 4})], file) == 3
    assert measurements.add([row(step_s=1.5)], file) == 3
    assert sorted(found.step_s for found in measurements.read(file)) == [1.5, 2.0, 2.0]


@pytest.mark.usefixtures("_here")
def test_presets_are_measured_one_after_another_and_it_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, keep = tmp_path / "new.json", ["--keep", str(tmp_path / "kept")]
    assert cli.main(["--measure", str(file), *keep, "--seconds", "5", "cpu-lora-tiny"]) == 1
    assert "cpu-lora-tiny: no time was left" in capsys.readouterr().err
    assert cli.main(["--measure", str(file), *keep, "cpu-lora-tiny", "8xa100-sft-5b-zero3"]) == 1
    assert "8xa100-sft-5b-zero3: cannot measure 8xa100-sft-5b-zero3 on this machine" in capsys.readouterr().err
    (before,) = measurements.read(file)
    assert (before.preset, before.command) == (
        "cpu-lora-tiny", "cogtune bench --preset cpu-lora-tiny --steps 3 --warmup 2",
    )  # fmt: skip
    assert cli.main(["--measure", str(file), *keep, "cpu-sft-tiny", "cpu-lora-tiny"]) == 0
    rows = measurements.read(file)
    assert [row.preset for row in rows] == ["cpu-lora-tiny", "cpu-sft-tiny"]
    assert rows[0] == before


def test_a_machine_measures_the_presets_that_fit_it() -> None:
    def measured(count: int, gb: float) -> dict[str, int]:
        card = cards.Gpu("NVIDIA Card", int(gb * 10**9), 0)
        found = cli.presets_for(Hardware((card,) * count, 512 << 30))
        return {name: resolved.config.num_processes for name, resolved in found}

    leanest = {row.name for row in PRESETS.values() if row.card.endswith("gb")}
    fitting = {"4080-lora-2b", "a100-lora-1.5-5b", "4090-sft-2b-zero2-offload", *leanest}
    assert set(measured(1, 14)) == fitting
    assert measured(2, 14)["8x4080-sft-2b-zero3-offload"] == 2
    assert set(measured(8, 141)) == {row.name for row in PRESETS.values() if row.card != "cpu"}
    assert measured(0, 0) == {}
    one = Hardware((cards.Gpu("NVIDIA Card", 80 * 10**9, 0),), 512 << 30)
    for alone, count in ((False, 1), (True, 8)):
        ((_, resolved),) = cli.presets_for(one, ["8xa100-sft-5b-zero2"], alone=alone)
        assert resolved.config.num_processes == count


def test_the_table_shows_what_was_measured_and_what_was_not() -> None:
    def row(**changes: Any) -> Measurement:
        given: dict[str, Any] = {
            "preset": "8xa100-sft-5b-zero2", "changes": {}, "recipe": "preset", "gpu": "NVIDIA H200", "gpus": 2,
            "reserved_gib": (40.0, 41.26), "allocated_gib": (39.0, 39.0), "card_gb": 45.67, "host_gib": 12.3,
            "start_gib": (1.0, 1.0), "step_s": 3.21, "versions": {"torch": "2.11.0"}, "date": "2026-11-21",
            "command": "cogtune bench x",
        }  # fmt: skip
        return Measurement(**(given | changes))

    rows = [row(), row(gpus=4, card_gb=33.3), row(gpus=8, recipe="plain"), row(gpus=8, changes={"rank": 4})]
    lines = {line.split("`")[1]: line for line in vram.page(rows).splitlines() if line.startswith("| `")}
    assert "| 42 GB | 33.3 GB | 4 x H200 | 41.3 GiB | 12 GiB | 3.21 s |" in lines["8xa100-sft-5b-zero2"]
    assert "| 24 GB | not measured |" in lines["4090-lora-5b"]
    assert "| 40.0 41.3 GiB | 12 GiB | 3.21 s |" in lines["cogtune bench x"]
    assert "torch 2.11.0" in lines["cogtune bench x"]
    alone = row(gpus=8, alone=True, card_gb=22.2)
    assert "| 42 GB | 33.3 GB | 4 x H200 |" in vram.page([*rows, alone])  # a whole run is told, where there is one
    assert "| 42 GB | 22.2 GB without NCCL | 1 of 8 x H200 |" in vram.page([alone])
    assert ["whole GPU without NCCL, GB of 10^9", "22.20"] in table([alone])[1]
    assert table([row()])[1][-1] == ["promised by the public guides, GB of 10^9", "42.00"]
    assert ["hours for the run's 1,000 steps", "0.89"] in table([row()], 1000)[1]
    assert ["waits for memory to be freed", "3"] in table([row(retries=3)])[1]
    assert "waits for memory to be freed" not in {cells[0] for cells in table([row(retries=0)])[1]}
    assert table([row(changes={"size": "9x64x96"})])[1][-1][0] == "reserved by each process, GiB"
    ((_, measured, estimated, off),) = vram.errors([row(gpus=4)])
    assert measured == "41.26"
    assert float(off.removesuffix(" %")) == pytest.approx(100 * (float(estimated) / 41.26 - 1), abs=0.1)


def test_alone_is_for_what_one_process_can_tell(tmp_path: Path) -> None:
    for strategy, count, told in (
        ("ddp", 8, "with ddp nothing is sharded over the processes"),
        ("zero3", 8, "with zero3 a process needs the weights of the others"),
        ("zero3-offload", 8, "with zero3-offload a process needs the weights of the others"),
        ("zero2-offload", 8, "is in host memory"),
        ("zero2", 1, "--alone requires a run of several processes"),
        ("zero2-offload", 1, "--alone requires a run of several processes"),
    ):
        flags: dict[str, Any] = {"strategy": strategy, "num_processes": count}
        with pytest.raises(UsageError, match=told):
            bench(replace(request(tmp_path, "cpu-sft-tiny", **flags), alone=True))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.exhaustive
def test_alone_a_process_holds_its_share(cogtune: Cogtune, clips: Path, tmp_path: Path) -> None:
    words = ["--preset", "cpu-sft-tiny", "--strategy", "zero2", "--num-processes", 8, "--alone"]
    ran = cogtune("bench", *words, "--steps", 1, "--warmup", 1, "--json", "-")
    assert "measuring one of 8 processes without the others" in ran.err
    (row,) = json.loads(ran.out)
    assert (row["alone"], row["gpus"], len(row["reserved_gib"]), row["tokens_per_s"]) == (True, 8, 1, None)
    plan = plan_for(clips, tmp_path / "out", type="sft", strategy="zero2", num_processes=8, steps=1)
    held, whole = map(int, alone_in_a_process(plan).split())
    assert 0 <= held * 8 - whole < whole / 100  # each group is padded to a multiple of twice the processes


def alone_in_a_process(plan: Plan) -> str:
    """What the optimizer of one of the plan's processes holds, and the model, in numbers."""
    files = LaunchFiles(plan.config.output / "launch")
    environment = {
        "RANK": "0", "LOCAL_RANK": "0", "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(files.deepspeed), "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    }  # fmt: skip
    code = f"""
from pathlib import Path
from cogtune.bench.worker import _without_the_others
from cogtune.run.plan import Plan
from cogtune.training.setup import set_up
_without_the_others(8)
train_state = set_up(Plan.read(Path({str(files.plan)!r})), lambda: False).train_state
held = [p.numel() for group in train_state.optimizer.param_groups for p in group["params"]]
assert len(held) > 3, held
print("held", sum(held), sum(p.numel() for p in train_state.transformer.parameters()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return next(line.removeprefix("held ") for line in done.stdout.splitlines() if line.startswith("held "))


@pytest.mark.slow
def test_two_processes_each_say_what_they_took(cogtune: Cogtune) -> None:
    words = ["--preset", "cpu-sft-tiny", "--num-processes", 2]
    ran = cogtune("bench", *words, "--steps", 2, "--warmup", 1, "--json", "-")
    (row,) = json.loads(ran.out)
    assert (row["gpus"], len(row["reserved_gib"])) == (2, 2)
    assert row["host_gib"] > max(row["reserved_gib"]) * 0.5
    assert row["start_s"] > 0


@pytest.mark.usefixtures("_here")
def test_another_preset_is_measured_beside_it(tmp_path: Path) -> None:
    flags: dict[str, Any] = {"type": "sft", "strategy": "stream", "precision": "bf16"}
    against = ("cpu-lora-tiny", resolve(preset_name="cpu-lora-tiny"))
    mine, other = bench(replace(request(tmp_path, preset="cpu-sft-tiny", **flags), against=against))
    assert (mine.preset, other.preset) == ("cpu-sft-tiny", "cpu-lora-tiny")
    assert (mine.config.strategy, other.config.strategy) == ("stream", "ddp")
    assert mine.arrangement is not None
    assert mine.arrangement["streamed_blocks"] == 2
    columns, _ = table([mine, other])
    assert columns[1:] == ["cpu-sft-tiny", "cpu-lora-tiny", "cpu-lora-tiny / cpu-sft-tiny"]
    with pytest.raises(UsageError, match="--compare 4090-lora-5b: it trains THUDM/CogVideoX-5b"):
        bench(replace(request(tmp_path), against=("4090-lora-5b", resolve(preset_name="4090-lora-5b"))))


def test_a_trace_is_not_written_to_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"--trace: {tmp_path} is a folder"):
        bench(replace(request(tmp_path), trace=tmp_path))


def test_a_step_is_traced_and_summed_up(tmp_path: Path, cogtune: Cogtune) -> None:
    trace = tmp_path / "traces" / "step.json.gz"
    words = ["--preset", "cpu-lora-tiny", "--steps", 1, "--warmup", 0, "--trace", trace]
    (row,) = json.loads(cogtune("bench", *words, "--json", "-").out)
    assert row["step_s_range"][0] == row["step_s_range"][1]  # of one step, which is not the one that was traced
    names = [event["name"] for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]]
    assert [name for name in names if name.startswith("ProfilerStep")] == ["ProfilerStep#1"]
    assert "aten::addmm" in names
    assert "aten::addmm" in (tmp_path / "traces" / "step.txt").read_text()
    assert sorted(file.name for file in trace.parent.iterdir()) == ["step.json.gz", "step.txt"]
