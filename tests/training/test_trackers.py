"""Trackers: they get what the run measured and nothing that is secret, and never stop it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cogtune.config.resolving import resolve
from cogtune.encoding import jobs
from cogtune.system.errors import UsageError
from cogtune.training import trackers as module
from cogtune.training.trackers import RunInfo, TrackedVideo, loggable_config
from tests.conftest import Cogtune
from tests.support.runs_in_process import fill_here, plan_for, train_here

SAMPLED: dict[str, Any] = {"validation_prompts": "a red disc", "sample_every": 2, "sample_steps": 1}


@pytest.fixture(autouse=True)
def encode_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "fill_cache", fill_here)


class Recorder:
    """Stands in for a tracker."""

    def __init__(self, about: RunInfo) -> None:
        self.about = about
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.shown: list[tuple[int, list[str]]] = []
        self.closed = False

    def log(self, figures: Any, step: int) -> None:
        self.logged.append((step, dict(figures)))

    def show(self, videos: Sequence[TrackedVideo], step: int) -> None:
        assert all(video.path.is_file() for video in videos)
        self.shown.append((step, [video.prompt for video in videos]))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """The runs that trackio was told of, which is a recorder here, and counts as installed."""
    made: list[Recorder] = []

    def start(about: RunInfo) -> Recorder:
        made.append(Recorder(about))
        return made[-1]

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: name == "trackio" or find(name, *more))
    monkeypatch.setitem(module.TRACKERS, "trackio", start)
    return made


def test_a_tracker_gets_figures_evaluations_and_videos(clips: Path, tmp_path: Path, recorders: list[Recorder]) -> None:
    lines = train_here(plan_for(clips, tmp_path / "out", steps=2, eval_every=1, tracker="trackio", **SAMPLED))
    (recorder,) = recorders
    losses = [(step, figures["loss"]) for step, figures in recorder.logged if "loss" in figures]
    assert losses == [(line["step"], line["loss"]) for line in lines if "loss" in line]
    evaluations = {step: figures for step, figures in recorder.logged if "eval_loss" in figures}
    assert list(evaluations) == [0, 1, 2]
    assert set(evaluations[0]) == {"eval_loss", *(f"eval_loss/timestep {at}" for at in (125, 375, 625, 875))}
    assert recorder.shown == [(0, ["a red disc"]), (2, ["a red disc"])]
    assert recorder.closed


def test_a_resumed_run_goes_on_under_its_id(clips: Path, tmp_path: Path, recorders: list[Recorder]) -> None:
    train_here(plan_for(clips, tmp_path / "out", steps=1, eval_every=0, tracker="trackio"))
    train_here(plan_for(clips, tmp_path / "out", steps=2, eval_every=0, tracker="trackio", resume="latest"))
    train_here(plan_for(clips, tmp_path / "out", steps=1, eval_every=0, tracker="trackio", overwrite=True))
    first, second, anew = (recorder.about for recorder in recorders)
    assert (first.id, first.first_step) == (second.id, 0)
    assert second.first_step == 1
    assert anew.id != first.id


@pytest.mark.parametrize("when", ["start", "log", "show", "close"])
def test_a_tracker_that_fails_is_told_once_and_stops_nothing(
    clips: Path,
    tmp_path: Path,
    recorders: list[Recorder],
    when: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no way to marker-key\nmore")

    monkeypatch.setenv("WANDB_API_KEY", "marker-key")
    if when == "start":
        monkeypatch.setitem(module.TRACKERS, "trackio", fail)
    else:
        monkeypatch.setattr(Recorder, when, fail)
    train_here(plan_for(clips, tmp_path / "out", steps=2, eval_every=1, tracker="trackio", **SAMPLED))
    told = capsys.readouterr().err
    assert told.count("logging to trackio failed and is turned off: ConnectionError: no way to ***") == 1
    assert (tmp_path / "out" / "checkpoint-2").is_dir()


def test_a_tracker_gets_no_folder_and_nothing_of_the_network() -> None:
    flags: dict[str, Any] = {
        "data": "/home/someone/data",
        "model": "/home/someone/models/mine",
        "validation_prompts": "a fox:::a /b",
        "validation_images": "/home/someone/a.png:::/home/someone/b.png",
        "validation_data": "/home/someone/held-out",
        "num_processes": 2,
        "main_process_ip": "10.1.2.3",
    }
    config = resolve(flags=flags).config
    shown = loggable_config(config)
    assert "someone" not in str(shown)
    assert "10.1.2.3" not in str(shown)
    assert (shown["data"], shown["model"], shown["validation_images"]) == ("data", "mine", "a.png:::b.png")
    assert shown["validation_prompts"] == "a fox:::a /b"
    assert shown["learning_rate"] == 1e-4


def test_a_tracker_that_is_not_installed_or_not_known_is_told_before_anything_else(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "wandb" else find(name, *more))
    with pytest.raises(UsageError) as caught:
        plan_for(clips, tmp_path / "out", tracker="tensorboard,wandb")
    assert caught.value.details == ("tracker wandb is not installed; run `pip install 'cogtune[wandb]'`",)
    with pytest.raises(UsageError) as caught:
        resolve(flags={"tracker": ["mlflow"]})
    assert "'tensorboard', 'wandb' or 'trackio'" in caught.value.details[0]


def test_tensorboard_shows_losses_and_moving_pictures(clips: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags: dict[str, Any] = {"eval_every": 1, "tracker": "tensorboard", **SAMPLED}
    plan = plan_for(clips, tmp_path / "out", steps=4, **flags)
    lines = train_here(plan, stop_after=3)
    lines = train_here(plan_for(clips, tmp_path / "out", steps=4, resume="latest", **flags))
    events = EventAccumulator(str(tmp_path / "out" / "logs" / "tensorboard"), size_guidance={"images": 0}).Reload()
    losses = {event.step: event.value for event in events.Scalars("loss")}
    assert losses == pytest.approx({line["step"]: line["loss"] for line in lines if "loss" in line}, rel=1e-6)
    pictures = events.Images("samples/00 a red disc")
    assert [picture.step for picture in pictures] == [0, 2, 4]
    assert pictures[0].encoded_image_string.startswith(b"GIF89a")
    assert (pictures[0].height, pictures[0].width) == (64, 96)


def records(file: Path) -> Iterator[Any]:
    """What an offline run of Weights & Biases hands over later: records in LevelDB's log format behind 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    data, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # no head of a part fits into the rest of a block
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(record)
            record = b""


@pytest.mark.slow
def test_weights_and_biases_offline_holds_the_figures_and_a_resumed_run_goes_on_under_its_id(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    for name, value in (("MODE", "offline"), ("API_KEY", "markerOfTheTracker" + "0" * 22), ("PROJECT", "mine")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    flags: dict[str, Any] = {"eval_every": 1, "tracker": "wandb", **SAMPLED}
    train_here(plan_for(clips, tmp_path / "out", steps=4, **flags), stop_after=3)
    lines = train_here(plan_for(clips, tmp_path / "out", steps=4, resume="latest", **flags))
    wandb.teardown()
    parts = sorted((tmp_path / "out" / "logs" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(parts) == 2
    runs, losses, evaluated, shown = set(), [], [], []
    for record in (record for part in parts for record in records(part)):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            runs.add((record.run.run_id, record.run.project, record.run.display_name, record.run.host))
            settings = {update.key: json.loads(update.value_json) for update in record.run.config.update}
            assert (settings["data"], settings["rank"]) == (clips.name, 8)
        elif kind == "history":
            row = {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
            losses += [(row["_step"], row["loss"])] if "loss" in row else []
            evaluated += [row["_step"]] if "eval_loss" in row else []
            shown += [(row["_step"], row["samples/00/caption"])] if "samples/00/caption" in row else []
    assert losses == [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert (evaluated, shown) == ([0, 1, 2, 3, 4], [(step, "a red disc") for step in (0, 2, 4)])
    ids = json.loads((tmp_path / "out" / "logs" / "trackers.json").read_text())
    assert runs == {(ids["wandb"], "mine", "out", "")}
    handed_over = [*parts, *(path for part in parts for path in (part.parent / "files").rglob("*") if path.is_file())]
    assert [path.suffix for path in handed_over].count(".mp4") == 3
    for word in (str(tmp_path), str(clips), "markerOfTheTracker"):
        assert [path.name for path in handed_over if word.encode() in path.read_bytes()] == []


@pytest.mark.slow
def test_no_secret_reaches_a_file_of_the_run_or_its_log(cogtune: Cogtune, clips: Path, tmp_path: Path) -> None:
    """Trackio takes part where it is installed; Weights & Biases does so offline."""
    installed = [name for name in module.TRACKERS if importlib.util.find_spec(name) is not None]
    secrets = {"HF_TOKEN": "hf_markerOfTheHub", "WANDB_API_KEY": "markerOfTheTracker" + "0" * 22}
    env = {**secrets, "WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio"), "HOME": str(tmp_path / "home")}
    done = cogtune(
        "train", "--preset", "cpu-lora-tiny", "--data", clips, "--cache-dir", tmp_path / "cache", "--steps", 2,
        "--validation-prompts", "a red disc", "--sample-steps", 1, "--tracker", ",".join(installed),
        env=env,
    )  # fmt: skip
    assert "left out" not in done.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("tensorboard" in path.parts for path in files) == ("tensorboard" in installed)
    assert any(path.suffix == ".wandb" for path in files) == ("wandb" in installed)
    for secret in secrets.values():
        assert [path for path in files if secret.encode() in path.read_bytes()] == []
        assert secret not in done.out + done.err
