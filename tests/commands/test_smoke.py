"""``train --smoke``: the run in small, in a folder of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cogtune.commands.smoke import SmokeResult, smoke
from cogtune.config.resolving import resolve
from cogtune.encoding import jobs
from cogtune.run import launch
from cogtune.run.plan import Plan
from cogtune.system.errors import CogtuneError, UsageError
from cogtune.system.json_files import read_json
from tests.conftest import Cogtune
from tests.support.runs_in_process import fill_here, plan_for, train_here


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "fill_cache", fill_here)
    monkeypatch.setattr(launch, "start", lambda plan, files: train_here(plan))


def smoked(data: Path, output: Path, **flags: object) -> SmokeResult:
    settings = {"data": data, "output": output, "cache_dir": output.parent / "cache", **flags}
    return smoke(resolve(preset_name="cpu-lora-tiny", flags=settings))


@pytest.mark.slow
def test_it_trains_one_clip_saves_and_samples_beside_a_run(clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train_here(plan_for(clips, out, steps=1))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    flags = {"steps": 5000, "batch_size": 2, "warmup_steps": 100, "validation_prompts": "a fox:::a dog", "rank": 4}
    seen = smoked(clips, out, **flags)
    assert {path: path.read_bytes() for path in before} == before
    assert (seen.real_steps, str(seen.size)) == (5000, "9x64x96")
    assert seen.checkpoint_bytes > 10_000
    assert seen.step > 0
    plan = Plan.read(out / "smoke" / "launch" / "plan.json")
    assert (plan.samples, plan.total_steps, plan.config.batch_size, plan.config.rank) == (1, 3, 2, 4)
    assert len(list((tmp_path / "cache").glob("latents/*/*.safetensors"))) == 1
    assert (out / "smoke" / "checkpoint-3").is_dir()
    assert len(read_json(out / "smoke" / "samples" / "step-000003" / "samples.json")) == 1
    told = "\n".join(seen.lines())
    assert "3 steps at 9x64x96" in told
    assert "full run: 5,000 steps" in told

    smoked(clips, out, **flags)  # takes the place of the first
    lines = (out / "smoke" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3, 3]


def test_epochs_are_counted_over_the_whole_dataset(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = smoked(clips, tmp_path / "out", epochs=2)
    assert seen.real_steps == 12


def test_what_would_stop_the_run_stops_it(clips: Path, tmp_path: Path) -> None:
    with pytest.raises(CogtuneError, match="step 2: the loss is nan"):
        smoked(clips, tmp_path / "out", learning_rate=1e30)


def test_a_folder_that_is_no_smoke_test_is_left_alone(clips: Path, tmp_path: Path) -> None:
    mine = tmp_path / "out" / "smoke"
    mine.mkdir(parents=True)
    (mine / "signals.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not a smoke test's folder"):
        smoked(clips, tmp_path / "out")
    assert (mine / "signals.txt").read_text() == "mine"


@pytest.mark.exhaustive
def test_the_command(cogtune: Cogtune, clips: Path, tmp_path: Path) -> None:
    flags = ["--preset", "cpu-lora-tiny", "--data", clips, "--cache-dir", tmp_path / "cache", "--smoke"]
    told = cogtune("train", *flags).out
    assert "smoke test passed" in told
    assert "full run: 20 steps" in told
    assert not (tmp_path / "out" / "run.yaml").exists()
    assert "--smoke cannot be used with --resume" in cogtune("train", *flags, "--resume", "latest", status=2).err
