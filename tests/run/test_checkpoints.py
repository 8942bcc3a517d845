"""A checkpoint is the one that was saved, whole and of its step, or it is refused by name."""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from cogtune.commands import train
from cogtune.data.cache.index import Index
from cogtune.data.prompts import load_prompts
from cogtune.encoding import jobs
from cogtune.models.variants import LORA_WEIGHTS_NAME
from cogtune.quality.references import read_clips
from cogtune.run import launch
from cogtune.run.checkpoints import check_fits, checkpoints, read_lora_facts, read_state
from cogtune.run.plan import Plan
from cogtune.system import console
from cogtune.system.errors import CogtuneError, UsageError
from cogtune.system.json_files import is_sealed, read_json, sealed
from cogtune.training import checkpoint, worker
from tests.support.runs_in_process import fill_here, plan_for, read_lines, train_here


@pytest.fixture(autouse=True)
def encode_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "fill_cache", fill_here)


def everything(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", ["lora", "sft"])
def test_any_file_of_another_run_is_refused(kind: str, clips: Path, tmp_path: Path) -> None:
    for name, seed in (("out", 1), ("other", 2)):
        train_here(plan_for(clips, tmp_path / name, steps=1, type=kind, seed=seed, learning_rate=1e-2))
    plan = plan_for(clips, tmp_path / "out", steps=2, resume="latest", type=kind, seed=1)
    mine, other = (tmp_path / name / "checkpoint-1" for name in ("out", "other"))
    names = [path.relative_to(mine).as_posix() for path in everything(mine)]
    assert len(names) == (3 if kind == "lora" else 4)
    assert set(read_state(mine)["files"]) == {*names} - {"state.json"}
    for name in names:
        before = (mine / name).read_bytes()
        if before == (other / name).read_bytes():
            assert name == "transformer/config.json"
            (mine / name).write_bytes(before.replace(b"2", b"3", 1))
        else:
            shutil.copyfile(other / name, mine / name)
        with pytest.raises(CogtuneError) as caught:
            train_here(plan)
        if name == "state.json":  # a whole one, of another run
            assert "does not fit this run" in caught.value.message
        else:
            told = f"{mine} is damaged: {name} is not the file that was saved with this checkpoint"
            assert caught.value.message == told
        (mine / name).write_bytes(before)
        (mine / name).rename(tmp_path / "aside")
        with pytest.raises(CogtuneError, match=f"{name} is missing|there is no checkpoint|is not a checkpoint"):
            train_here(plan)
        (tmp_path / "aside").rename(mine / name)
    assert len(train_here(plan)) > 1


def test_a_file_more_is_refused_where_it_would_be_read_and_harmless_elsewhere(clips: Path, tmp_path: Path) -> None:
    train_here(plan_for(clips, tmp_path / "out", steps=1, type="sft"))
    mine = tmp_path / "out" / "checkpoint-1"
    (mine / "notes.txt").write_text("the best one")
    index = mine / "transformer" / "diffusion_pytorch_model.safetensors.index.json"  # diffusers would prefer it
    index.write_text('{"metadata": {}, "weight_map": {}}')
    plan = plan_for(clips, tmp_path / "out", steps=2, resume="latest", type="sft")
    with pytest.raises(CogtuneError, match=f"transformer/{index.name} was not saved with this checkpoint"):
        train_here(plan)
    index.unlink()
    assert len(train_here(plan)) > 1


def test_every_flipped_bit_of_a_checkpoint_is_told(clips: Path, tmp_path: Path) -> None:
    """Refused, or the resumed run is the one that it would have been."""
    train_here(plan_for(clips, tmp_path / "out", steps=1, learning_rate=1e-2))
    mine = tmp_path / "out" / "checkpoint-1"
    train_here(plan_for(clips, tmp_path / "straight", steps=2, resume=str(mine), learning_rate=1e-2))
    wanted = load_file(tmp_path / "straight" / LORA_WEIGHTS_NAME)
    chance, refused = random.Random(5), 0
    for number in range(18):
        path = everything(mine)[number % 3]
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        output = tmp_path / f"again-{number}"
        try:
            train_here(plan_for(clips, output, steps=2, resume=str(mine), learning_rate=1e-2, eval_every=0))
            got = load_file(output / LORA_WEIGHTS_NAME)
            assert path.suffix == ".pt"  # of a zip there are bytes that nobody reads
            assert all(got[name].equal(wanted[name]) for name in wanted)
        except CogtuneError:
            refused += 1
        path.write_bytes(whole)
    assert refused >= 12


def test_step_and_folder_agree(clips: Path, tmp_path: Path) -> None:
    train_here(plan_for(clips, tmp_path / "out", steps=2, checkpoint_every=1))
    mine = tmp_path / "out" / "checkpoint-2"
    mine.rename(tmp_path / "out" / "checkpoint-3")
    with pytest.raises(CogtuneError) as caught:
        plan_for(clips, tmp_path / "out", steps=4, resume="latest")
    assert caught.value.message == f"{tmp_path / 'out' / 'checkpoint-3'} is at step 2 according to its state.json"
    assert caught.value.hint == "rename it to checkpoint-2, or resume from another checkpoint"
    (tmp_path / "out" / "checkpoint-3").rename(tmp_path / "out" / "the best one")  # a name that claims no step
    plan_for(clips, tmp_path / "elsewhere", steps=4, resume=str(tmp_path / "out" / "the best one"))

    state = tmp_path / "out" / "checkpoint-1" / "state.json"
    state.write_text(state.read_text().replace('"step": 1', '"step": 0'))
    with pytest.raises(CogtuneError, match=r"state\.json is damaged: checksum mismatch"):
        read_state(state.parent)


def test_a_resume_that_does_not_fit_says_so_by_name(clips: Path, tmp_path: Path) -> None:
    train_here(plan_for(clips, tmp_path / "out", steps=1, rank=2))
    told = []
    changes: list[dict[str, Any]] = [{"model": "tiny:5b"}, {"rank": 4}]
    for change in changes:
        with pytest.raises(CogtuneError, match="does not fit this run") as caught:
            plan_for(clips, tmp_path / "out", steps=2, resume="latest", **{"rank": 2, **change})
        told.append(caught.value.details)
    assert told[0] == ("model: tiny:2b in the checkpoint, tiny:5b now",)  # which encodes the data for itself
    assert told[1] == ("rank: 2 in the checkpoint, 4 now", "alpha: 2.0 in the checkpoint, 4.0 now")

    state = {"identity": {"model": "x", "data": "y"}, "base_model": "tiny:5b", "dataset": {"samples": 6}}
    with pytest.raises(CogtuneError) as caught:
        check_fits(tmp_path, state, {"model": "z", "data": "y"}, model="tiny:5b", samples=6)
    assert caught.value.details == ("model: its weights differ from those the checkpoint was trained from",)
    with pytest.raises(CogtuneError) as caught:
        check_fits(tmp_path, state, {"model": "x", "data": "z"}, model="tiny:5b", samples=5)
    assert caught.value.details == ("data: 6 samples in the checkpoint, 5 samples now",)


def test_a_run_yaml_that_says_otherwise_than_the_checkpoint_is_told(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    train_here(plan_for(clips, out, steps=1, learning_rate=0.005, keep_checkpoints=50))

    def resumed(**flags: Any) -> str:
        capsys.readouterr()
        train.configure(preset_name=None, file=None, flags={"output": out, **flags}, resume="latest")
        return " ".join(capsys.readouterr().err.split())

    assert resumed(steps=9) == ""
    file = out / "run.yaml"
    file.write_text(file.read_text().replace("learning_rate: 0.005", "learning_rate: 0.0001"))
    told = "learning_rate: 0.005 in checkpoint-1, 0.0001 in run.yaml"
    assert resumed() == f"warning: run.yaml has changed since checkpoint-1 was saved: {told}"
    assert resumed(learning_rate=0.3) == ""
    file.write_text(file.read_text().replace("keep_checkpoints: 50", "keep_checkpoints: 3"))
    assert "keep_checkpoints: 50 in checkpoint-1, 3 in run.yaml" in resumed()


def test_a_clock_that_was_set_back_hides_no_checkpoint(clips: Path, tmp_path: Path) -> None:
    plan = plan_for(clips, tmp_path / "out", steps=3, checkpoint_every=1)
    train_here(plan)
    for path in tmp_path.glob("out/checkpoint-*/state.json"):
        os.utime(path, (1, 1))
    assert [path.name for path in launch.checkpoints_of(plan)] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert launch.how_to_go_on(plan).startswith("continue with: cogtune train --resume latest")
    again = plan_for(clips, tmp_path / "out", steps=3, checkpoint_every=1, overwrite=True)
    assert launch.checkpoints_of(again) == []  # those of the run that it is about to overwrite are not its own
    train_here(again)
    assert len(launch.checkpoints_of(again)) == 3


def test_an_old_checkpoint_that_cannot_be_deleted_ends_no_run(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    remove = shutil.rmtree

    def refuse(path: Any, *words: Any, **more: Any) -> None:
        if "checkpoint" in str(path) and "ignore_errors" not in more:
            raise PermissionError(1, "Operation not permitted")
        remove(path, *words, **more)

    rename = Path.rename

    def stay(path: Path, target: Path) -> Path:
        if path.name == "checkpoint-2":
            raise PermissionError(1, "Operation not permitted")
        return rename(path, target)

    monkeypatch.setattr("shutil.rmtree", refuse)
    monkeypatch.setattr(Path, "rename", stay)
    out = tmp_path / "out"
    train_here(plan_for(clips, out, steps=4, checkpoint_every=1, keep_checkpoints=1))
    assert [path.name for path in checkpoints(out)] == ["checkpoint-2", "checkpoint-4"]
    told = capsys.readouterr().err
    assert "warning:" in told
    assert "(Operation not permitted); it is no longer needed" in told
    assert f"cannot delete {out / 'checkpoint-2'}: Operation not permitted; the checkpoint is kept" in told
    assert (out / LORA_WEIGHTS_NAME).is_file()
    monkeypatch.undo()
    monkeypatch.setattr(jobs, "fill_cache", fill_here)
    train_here(plan_for(clips, out, steps=5, resume="latest", keep_checkpoints=1))
    assert [path.name for path in checkpoints(out)] == ["checkpoint-5"]


def test_a_pipe_in_place_of_a_file_is_told(clips: Path, tmp_path: Path) -> None:
    train_here(plan_for(clips, tmp_path / "out", steps=1))
    mine = tmp_path / "out" / "checkpoint-1"
    plan = plan_for(clips, tmp_path / "out", steps=2, resume="latest")
    for path in everything(mine):
        whole = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(CogtuneError, match=r"is not an ordinary file|is not a checkpoint"):
            train_here(plan)
        path.unlink()
        path.write_bytes(whole)
    assert not any(stat.S_ISFIFO(path.stat().st_mode) for path in mine.rglob("*"))


def test_a_state_that_was_sealed_again_by_hand_is_taken(clips: Path, tmp_path: Path) -> None:
    """A checksum is no lock: who changes a file on purpose can."""
    train_here(plan_for(clips, tmp_path / "out", steps=1))
    path = tmp_path / "out" / "checkpoint-1" / "state.json"
    state = {key: value for key, value in json.loads(path.read_text()).items() if key != "checksum"}
    path.write_text(json.dumps(sealed({**state, "note": "mine"})))
    assert read_state(path.parent)["note"] == "mine"
    assert [line["step"] for line in read_lines(tmp_path / "out") if "loss" in line] == [1]
    assert checkpoint.OPTIMIZER_NAME in state["files"]


def test_a_checkpoint_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(CogtuneError, match=r"is not a checkpoint: state\.json is missing"):
        read_state(tmp_path / "checkpoint-1")
    with pytest.raises(UsageError, match="has no checkpoint to resume from"):
        plan_for(tmp_path, tmp_path, resume="latest", steps=1)


def damages(whole: bytes, count: int, seed: int) -> Iterator[bytes]:
    chance = random.Random(seed)
    for _ in range(count):
        damaged = bytearray(whole)
        for _ in range(chance.choice([1, 1, 8])):
            damaged[chance.randrange(len(whole))] = chance.randrange(256)
        yield bytes(damaged if chance.random() < 0.8 else damaged[: chance.randrange(len(whole))])


def test_what_a_run_writes_for_its_processes_is_read_as_it_was_or_refused(clips: Path, tmp_path: Path) -> None:
    plan_for(clips, tmp_path / "out", steps=1, sample_every=1, validation_prompts="a fox")
    launch_files = tmp_path / "out" / "launch"
    readers: dict[str, Callable[[Path], Any]] = {
        "plan.json": Plan.read,
        "index.json": Index.read,
        "prompts.json": load_prompts,
        "clips.json": read_clips,
    }
    for seed, (name, read) in enumerate(readers.items()):
        path = launch_files / name
        whole, wanted, refused = path.read_bytes(), read(path), 0
        for damaged in damages(whole, 120, seed):
            path.write_bytes(damaged)
            try:
                found = read(path)
            except CogtuneError as error:
                refused += 1
                assert str(path) in error.message  # noqa: PT017
                continue
            # A plan may be changed by hand, and the worker says when it was.
            assert found == wanted or (name == "plan.json" and not is_sealed(read_json(path)))
        assert refused > 30
        path.write_bytes(whole)


def test_a_plan_that_was_changed_by_hand_is_taken_and_told(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plan_for(clips, tmp_path / "out", steps=1)
    path = tmp_path / "out" / "launch" / "plan.json"
    told = f"{path} has been modified since `cogtune train` wrote it"
    monkeypatch.setattr(worker, "run", lambda *_: True)
    monkeypatch.setattr(console, "_settings", console._Settings())  # which a worker changes for its process
    assert worker.main([str(path)]) == 0
    assert told not in " ".join("".join(capfd.readouterr()).split("\n"))
    path.write_text(path.read_text().replace('"total_steps": 1,', '"total_steps": 2,'))
    assert Plan.read(path).total_steps == 2
    assert worker.main([str(path)]) == 0
    assert told in " ".join("".join(capfd.readouterr()).split("\n"))
    path.write_text(path.read_text().replace('"total_steps": 2,', '"total_steps": "two",'))
    with pytest.raises(CogtuneError, match=r"plan\.json is not a valid plan") as caught:
        Plan.read(path)
    assert caught.value.details == ("total_steps: Input should be a valid integer",)


def test_a_damaged_header_of_a_lora_is_told(clips: Path, tmp_path: Path) -> None:
    train_here(plan_for(clips, tmp_path / "out", steps=1, rank=2, alpha=4))
    path = tmp_path / "out" / LORA_WEIGHTS_NAME
    whole, wanted, refused = path.read_bytes(), read_lora_facts(path), 0
    assert wanted["alpha"] == 4
    assert not {"checksum", "adapter"} & wanted.keys()
    size = 8 + int.from_bytes(whole[:8], "little")
    for damaged in damages(whole[:size], 150, 9):
        path.write_bytes(damaged + whole[size:])
        try:
            assert read_lora_facts(path) == wanted
        except CogtuneError as error:
            refused += 1
            assert str(path) in error.message  # noqa: PT017
    assert refused > 60
    path.write_bytes(whole.replace(b'lora_alpha\\": 4.0', b'lora_alpha\\": 9.0'))
    with pytest.raises(CogtuneError, match="its header has another LoRA's configuration"):
        read_lora_facts(path)
