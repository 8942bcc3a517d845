"""What a run is watched by: losses on held-out samples, and sample videos that leave training as it was."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cogtune.commands.infer.request import InferRequest
from cogtune.data.cache.index import Index
from cogtune.data.prompts import load_prompts
from cogtune.data.synthetic import draw_dataset
from cogtune.data.video.clips import probe
from cogtune.encoding import jobs
from cogtune.modeling.pipelines import UnbatchedGuidance
from cogtune.models.variants import LORA_WEIGHTS_NAME
from cogtune.run.checkpoints import checkpoints, read_state
from cogtune.run.launch import LaunchFiles
from cogtune.system.errors import CogtuneError, UsageError
from cogtune.training import worker
from tests.support.forked_workers import start_workers
from tests.support.infer_frames import render_request
from tests.support.runs_in_process import (
    StopWhen,
    evaluations,
    fill_here,
    forget_earlier_runs,
    is_done,
    plan_for,
    read_lines,
    set_up_here,
    train_here,
)
from tests.support.sampling import sampled


@pytest.fixture(autouse=True)
def encode_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "fill_cache", fill_here)


@pytest.fixture(scope="module")
def held_out(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV dataset of three clips that differ from the training ones."""
    drawn = draw_dataset(tmp_path_factory.mktemp("drawn"), seed=9)
    folder = tmp_path_factory.mktemp("held-out")
    captions = (drawn / "prompts.txt").read_text().splitlines()
    videos = (drawn / "videos.txt").read_text().splitlines()
    rows = ["video,caption"]
    for number in (0, 2, 4):
        name = Path(videos[number]).name
        os.link(drawn / videos[number], folder / name)
        rows.append(f'{name},"{captions[number]}"')
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    return folder


def losses(lines: list[dict[str, Any]], name: str) -> dict[int, float]:
    return {line["step"]: line[name] for line in lines if name in line}


def listed(output: Path, step: int) -> list[dict[str, Any]]:
    """What ``samples.json`` of a step says."""
    return list(json.loads((output / "samples" / f"step-{step:06d}" / "samples.json").read_text()))


# ------------------------------------------------------------------------------------------- validation data


def test_the_loss_on_held_out_clips_is_measured_beside_that_on_trained_ones(
    clips: Path, held_out: Path, tmp_path: Path
) -> None:
    plan = plan_for(clips, tmp_path / "out", steps=4, eval_every=2, validation_data=held_out)
    lines = train_here(plan)
    assert list(losses(lines, "validation_loss")) == [0, 2, 4]
    assert list(losses(lines, "eval_loss")) == [0, 2, 4]
    assert losses(lines, "validation_loss")[0] != losses(lines, "eval_loss")[0]
    assert set(lines[0]["validation_loss_by_timestep"]) == {"125", "375", "625", "875"}
    assert lines[0]["validation_loss"] == pytest.approx(
        sum(lines[0]["validation_loss_by_timestep"].values()) / 4, rel=1e-12
    )
    assert plan.validation is not None
    about = read_state(tmp_path / "out" / "checkpoint-4")["validation"]
    assert about == {"samples": 3, "digest": Index.read(plan.validation).digest}


def test_a_prompt_that_the_model_does_not_read_to_its_end_is_told(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = f"a red disc:::{'a red disc moves ' * 60}"
    plan_for(clips, tmp_path / "out", steps=1, validation_prompts=prompts, sample_steps=1)
    told = [line for line in capsys.readouterr().err.splitlines() if "validation prompt" in line]
    assert len(told) == 1
    assert "the model reads only 226; the rest is ignored" in told[0]


def test_denoising_steps_beyond_the_models_timesteps_are_refused(clips: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        plan_for(clips, tmp_path / "out", steps=1, sample_steps=1001, sample_every=1)
    assert caught.value.details == (
        "sample_steps 1001: must not exceed the model's 1000 timesteps; 50 steps are usual",
    )


def test_validation_changes_nothing_in_the_training(clips: Path, held_out: Path, tmp_path: Path) -> None:
    without = train_here(plan_for(clips, tmp_path / "without", steps=3))
    watched = train_here(plan_for(clips, tmp_path / "with", steps=3, eval_every=1, validation_data=held_out))
    assert losses(watched, "loss") == losses(without, "loss")
    assert losses(watched, "eval_loss")[3] == losses(without, "eval_loss")[3]


def test_a_run_may_go_on_with_other_validation_data(clips: Path, held_out: Path, tmp_path: Path) -> None:
    train_here(plan_for(clips, tmp_path / "out", steps=1))
    lines = train_here(plan_for(clips, tmp_path / "out", steps=2, resume="latest", validation_data=held_out))
    assert list(losses(lines, "validation_loss")) == [2]


def test_the_validation_samples_are_spread_over_the_data_and_only_they_are_encoded(
    clips: Path, held_out: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    plan = plan_for(clips, tmp_path / "out", cache_dir=cache, validation_data=held_out, validation_samples=2)
    assert plan.validation is not None
    names = [line.split(".")[0] for line in (held_out / "metadata.csv").read_text().splitlines()[1:]]
    assert [row.id for row in Index.read(plan.validation).rows] == names[:2]
    assert len(list(cache.glob("latents/*/*.safetensors"))) == 6 + 2


def test_validation_data_is_checked_as_training_data_is(clips: Path, tmp_path: Path) -> None:
    bad = draw_dataset(tmp_path / "bad")
    broken = bad / (bad / "videos.txt").read_text().splitlines()[1]
    broken.write_bytes(b"no video")
    with pytest.raises(CogtuneError, match="bad has errors and cannot be used for training") as caught:
        plan_for(clips, tmp_path / "out", validation_data=bad)
    assert broken.stem in caught.value.details[0]
    with pytest.raises(UsageError, match="--validation-data is the training data"):
        plan_for(clips, tmp_path / "out", validation_data=clips)


def test_clips_that_are_in_both_are_told(clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    draw_dataset(copy)
    plan_for(clips, tmp_path / "out", validation_data=copy, validation_samples=1)
    assert "the validation loss is less meaningful, since these samples are also trained on" in capsys.readouterr().err


def test_an_evaluation_that_was_due_when_a_run_was_stopped_is_made_up_for(clips: Path, tmp_path: Path) -> None:
    straight = train_here(plan_for(clips, tmp_path / "straight", steps=4, eval_every=2))
    train_here(plan_for(clips, tmp_path / "broken", steps=4, eval_every=2), stop_after=2)
    resumed = train_here(plan_for(clips, tmp_path / "broken", steps=4, eval_every=2, resume="latest"))
    assert resumed == straight


def test_a_stop_while_a_loss_is_measured_does_not_wait_for_it(clips: Path, tmp_path: Path) -> None:
    flags: dict[str, Any] = {"steps": 4, "eval_every": 2}
    straight = train_here(plan_for(clips, tmp_path / "straight", **flags))
    out, asked = tmp_path / "out", Counter[bool]()

    def stop_when() -> bool:
        asked[is_done(out, 2)] += 1
        return asked[True] >= 4  # once after the step, then before each piece of the measurement

    lines = train_here(plan_for(clips, out, **flags), stop_when=stop_when)
    assert list(losses(lines, "eval_loss")) == [0]
    assert asked[True] == 4
    assert [path.name for path in checkpoints(out)] == ["checkpoint-2"]
    assert train_here(plan_for(clips, out, resume="latest", **flags)) == straight


# --------------------------------------------------------------------------------------------- sample videos


SAMPLED: dict[str, Any] = {
    "validation_prompts": "a red disc:::a Blue/square, moving!",
    "sample_every": 2,
    "sample_steps": 2,
}


def test_sample_videos_are_made_before_the_first_step_then_every_n_and_at_the_end(clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train_here(plan_for(clips, out, steps=3, **SAMPLED))
    assert sorted(path.name for path in (out / "samples").iterdir()) == ["step-000000", "step-000002", "step-000003"]
    assert listed(out, 2) == [
        {"prompt": "a red disc", "image": None, "seed": 42, "file": "00-a-red-disc.mp4", "averaged": False},
        {
            "prompt": "a Blue/square, moving!", "image": None, "seed": 42,
            "file": "01-a-blue-square-moving.mp4", "averaged": False,
        },
    ]  # fmt: skip
    info = probe(out / "samples" / "step-000002" / "00-a-red-disc.mp4")
    assert (info.num_frames, info.height, info.width, info.fps) == (9, 64, 96, 8.0)


SFT: dict[str, Any] = {"type": "sft", "learning_rate": 1e-4}


@pytest.mark.parametrize(
    "flags", sampled([{}, SFT, {"precision": "bf16"}, SFT | {"precision": "bf16"}], SFT | {"precision": "bf16"})
)
def test_sampling_leaves_the_training_as_it_was_to_the_bit(clips: Path, tmp_path: Path, flags: dict[str, Any]) -> None:
    torch.manual_seed(1)
    without = train_here(plan_for(clips, tmp_path / "without", steps=3, **flags))
    state = torch.get_rng_state()
    torch.manual_seed(1)
    sampled = train_here(plan_for(clips, tmp_path / "with", steps=3, **flags, **SAMPLED | {"sample_every": 1}))
    assert torch.equal(torch.get_rng_state(), state)
    assert sampled == without
    one, other = (tmp_path / name / "checkpoint-3" for name in ("without", "with"))
    for file in sorted(one.rglob("*.safetensors")):
        ours, theirs = load_file(file), load_file(other / file.relative_to(one))
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    ours, theirs = (
        torch.load(folder / "optimizer.pt", weights_only=True)["optimizer"]["state"] for folder in (one, other)
    )
    assert all(torch.equal(ours[key][name], theirs[key][name]) for key in ours for name in ("exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("model", sampled(["tiny:2b", "tiny:5b", "tiny:1.5-5b"], "tiny:5b"))
def test_a_sample_video_shows_what_infer_shows(
    clips: Path, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cogtune.training import sample_videos as module

    frames: list[np.ndarray[Any, Any]] = []
    monkeypatch.setattr(module, "write_video", lambda path, made, *_: frames.append(made))
    monkeypatch.setattr(module, "_entries", lambda scenes, folder: [])
    flags: dict[str, Any] = {
        "sample_every": 2,
        "sample_steps": 2,
        "validation_prompts": "a red disc",
        "learning_rate": 1e-2,
    }
    size = "17x64x96" if "1.5" in model else "9x64x96"
    train_here(plan_for(clips, tmp_path / "out", steps=2, model=model, size=size, **flags))
    shown = render_request(InferRequest(loras=(str(tmp_path / "out"),), prompts=("a red disc",), steps=2))
    first, last = (video.astype(int) for video in frames)
    assert np.abs(last - first).max() > 8
    assert np.abs(last - shown).max() <= 1


def test_image_to_video_starts_from_the_images_given_or_from_the_first_clips(clips: Path, tmp_path: Path) -> None:
    from PIL import Image

    picture = tmp_path / "first.png"
    Image.new("RGB", (96, 64), (250, 10, 10)).save(picture)
    flags: dict[str, Any] = {
        "model": "tiny:5b-i2v",
        "steps": 1,
        "sample_every": 1,
        "sample_steps": 1,
        "validation_prompts": "a:::b",
    }
    own = plan_for(clips, tmp_path / "own", validation_images=f"{picture}:::{picture}", **flags)
    train_here(own)
    assert [entry["image"] for entry in listed(tmp_path / "own", 1)] == [str(picture)] * 2
    lent = plan_for(clips, tmp_path / "lent", **flags)
    assert lent.prompts is not None
    rows, _ = load_prompts(lent.prompts)
    assert [row.image for row in rows] == [row.image for row in Index.read(lent.index).rows[:2]]
    train_here(lent)
    assert len(listed(tmp_path / "lent", 0)) == 2


def test_prompts_come_from_a_file_or_the_first_caption(clips: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffein Boot\r\n a red disc \r\n\r\n".encode())
    plan = plan_for(clips, tmp_path / "out", validation_prompts=str(file), id_token="sks")
    assert plan.prompts is not None
    assert [row.prompt for row in load_prompts(plan.prompts)[0]] == ["ein Boot", "a red disc"]
    plan = plan_for(clips, tmp_path / "out", sample_every=5, id_token="sks")
    assert plan.prompts is not None
    assert [row.prompt for row in load_prompts(plan.prompts)[0]] == [plan.prompt]
    assert plan_for(clips, tmp_path / "out", validation_prompts="a", sample_every=0).prompts is None
    assert plan_for(clips, tmp_path / "out").prompts is None


def test_everything_wrong_with_the_prompts_is_told_at_once(clips: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\nthree\n\n")
    flags: dict[str, Any] = {"validation_prompts": str(file), "validation_images": "x.png:::y.png"}
    with pytest.raises(UsageError) as caught:
        plan_for(clips, tmp_path / "out", model="tiny:5b-i2v", **flags)
    assert caught.value.details[0] == f"validation_prompts: {file} is blank in line 2"
    assert "2 images for 3 prompts" in caught.value.details[1]
    assert "no such file: " in caught.value.details[2]
    with pytest.raises(UsageError) as caught:
        plan_for(clips, tmp_path / "out", **flags | {"validation_prompts": str(tmp_path / "none.txt")})
    assert "cannot read" in caught.value.details[0]
    assert "not supported by a text-to-video model" in caught.value.details[1]
    with pytest.raises(UsageError, match="validation_images requires validation_prompts"):
        plan_for(clips, tmp_path / "out", model="tiny:5b-i2v", validation_images="x.png")
    with pytest.raises(UsageError, match="1 error in the configuration") as caught:
        plan_for(clips, tmp_path / "out", sample_every=1, sample_epochs=1)
    assert "sample_epochs: cannot be used with sample_every" in caught.value.details[0]


def test_videos_may_be_made_every_so_many_epochs(clips: Path, tmp_path: Path) -> None:
    plan = plan_for(clips, tmp_path / "out", sample_epochs=2, batch_size=2)
    assert plan.config.sample_interval(plan.samples) == 6
    assert plan.prompts is not None


@pytest.mark.parametrize("in_the_midst_of", ["a loss", "the videos"])
def test_a_run_stopped_in_what_is_due_at_its_end_is_not_done(in_the_midst_of: str, clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan = plan_for(clips, out, steps=2, **SAMPLED)
    forget_earlier_runs()
    measured = in_the_midst_of == "the videos"

    def asked() -> bool:
        return is_done(out, 2) and (2 in evaluations(read_lines(out))) is measured

    assert worker.run(plan, LaunchFiles(out / "launch"), StopWhen(asked)) is False  # type: ignore[arg-type]
    assert (2 in evaluations(read_lines(out))) is measured
    assert not (out / "samples" / "step-000002").exists()
    assert not (out / LORA_WEIGHTS_NAME).exists()
    assert "<b>Not finished.</b>" in (out / "report.html").read_text()
    train_here(plan_for(clips, out, steps=2, resume="latest", **SAMPLED))
    assert "<b>Finished.</b>" in (out / "report.html").read_text()
    assert 2 in evaluations(read_lines(out))
    assert (out / "samples" / "step-000002").is_dir()
    assert (out / LORA_WEIGHTS_NAME).is_file()


def test_a_run_stopped_after_its_last_step_with_nothing_due_is_done(clips: Path, tmp_path: Path) -> None:
    train_here(plan_for(clips, tmp_path / "out", steps=2, eval_every=0), stop_after=2)
    assert (tmp_path / "out" / LORA_WEIGHTS_NAME).is_file()


def test_videos_that_were_due_when_a_run_was_stopped_are_made_up_for(clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train_here(plan_for(clips, out, steps=4, **SAMPLED), stop_after=2)
    assert not (out / "samples" / "step-000002").exists()
    train_here(plan_for(clips, out, steps=4, resume="latest", **SAMPLED))
    assert sorted(path.name for path in (out / "samples").iterdir()) == ["step-000000", "step-000002", "step-000004"]


@pytest.mark.parametrize("checkpoint_every", sampled([100, 2], 100))
def test_a_stop_while_videos_are_made_waits_for_one_denoising_step(
    checkpoint_every: int, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a checkpoint was due before the videos or not, it is there, and the run goes on to the bit."""
    flags: dict[str, Any] = SAMPLED | {"steps": 4, "eval_every": 2, "checkpoint_every": checkpoint_every}
    straight = train_here(plan_for(clips, tmp_path / "straight", **flags))
    out, denoise, calls = tmp_path / "out", UnbatchedGuidance.__call__, Counter[str]()

    def counted(self: UnbatchedGuidance, **given: Any) -> tuple[torch.Tensor]:
        calls["denoising"] += 1
        return denoise(self, **given)

    with monkeypatch.context() as patch:
        patch.setattr(UnbatchedGuidance, "__call__", counted)
        train_here(plan_for(clips, out, **flags), stop_when=(out / "samples" / ".step-000002.partial").is_dir)
    assert calls["denoising"] == 2 * 2 + 1  # both videos of step 0, and of step 2 what was under way
    assert [path.name for path in (out / "samples").iterdir()] == ["step-000000"]
    assert [path.name for path in checkpoints(out)] == ["checkpoint-2"]
    assert [line["step"] for line in read_lines(out) if "loss" in line] == [1, 2]
    assert train_here(plan_for(clips, out, resume="latest", **flags)) == straight
    assert sorted(path.name for path in (out / "samples").iterdir()) == ["step-000000", "step-000002", "step-000004"]


@pytest.mark.slow
def test_a_stop_before_the_first_step_leaves_nothing_to_go_on_from(clips: Path, tmp_path: Path) -> None:
    flags: dict[str, Any] = SAMPLED | {"steps": 2}
    straight = train_here(plan_for(clips, tmp_path / "straight", **flags))
    out = tmp_path / "out"
    lines = train_here(plan_for(clips, out, **flags), stop_when=(out / "samples").is_dir)
    assert [line["step"] for line in lines] == [0]
    assert checkpoints(out) == []
    assert train_here(plan_for(clips, out, **flags)) == straight


@pytest.mark.parametrize("strategy", sampled(["ddp", "zero3"], "zero3"))
def test_two_processes_stop_at_the_same_denoising_step(strategy: str, clips: Path, tmp_path: Path) -> None:
    """One of them is asked to, with three videos to be made on two."""
    flags: dict[str, Any] = {
        "strategy": strategy,
        "num_processes": 2,
        "sample_every": 1,
        "sample_steps": 12,
        "eval_every": 0,
    }
    plan = plan_for(clips, tmp_path / "out", steps=9, validation_prompts="a:::b:::c", **flags)
    started = start_workers(plan)
    try:
        while not (tmp_path / "out" / "samples" / ".step-000001.partial").is_dir():
            assert all(process.is_alive() for process in started)
            time.sleep(0.01)
        started[1].terminate()
        for process in started:
            process.join(600)
    finally:
        for process in started:
            process.kill()
    reports = [LaunchFiles(tmp_path / "out" / "launch").report(rank).read() for rank in (0, 1)]
    assert [report and report["status"] for report in reports] == ["stopped", "stopped"]
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-1"]
    assert [path.name for path in (tmp_path / "out" / "samples").iterdir()] == ["step-000000"]


def test_videos_of_another_branch_do_not_stay(clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags: dict[str, Any] = SAMPLED | {"sample_every": 1, "checkpoint_every": 1}
    train_here(plan_for(clips, out, steps=3, **flags))
    train_here(plan_for(clips, out, steps=2, resume=str(out / "checkpoint-1"), overwrite=True, **flags))
    assert sorted(path.name for path in (out / "samples").iterdir()) == [f"step-00000{step}" for step in range(3)]


def test_what_a_killed_run_left_of_its_videos_does_not_stay(clips: Path, tmp_path: Path) -> None:
    left = tmp_path / "out" / "samples" / ".step-000002.partial"
    left.mkdir(parents=True)
    train_here(plan_for(clips, tmp_path / "out", steps=1))
    assert not left.exists()


def test_sample_videos_are_shared_out_over_the_processes(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three prompts on two processes: each is in two rounds, and the fourth place is worked for the others' sake."""
    from cogtune.training import sample_videos as module

    plan = plan_for(clips, tmp_path / "out", steps=1, **SAMPLED | {"validation_prompts": "a:::b:::c"})
    training = set_up_here(plan)
    assert training.schedule.validation_videos is not None
    rounds: list[int] = []
    rank = 0
    monkeypatch.setattr(module, "_pipeline", lambda *_: None)
    monkeypatch.setattr(module, "render", lambda *_, **__: rounds.append(rank))
    monkeypatch.setattr(module, "write_video", lambda path, *_: written[rank].append(path.name))
    written: dict[int, list[str]] = {0: [], 1: []}
    for rank in (0, 1):
        accelerator = SimpleNamespace(num_processes=2, process_index=rank, device=torch.device("cpu"))
        share = replace(training.train_state, accelerator=accelerator)
        module._render_share(share, training.schedule.validation_videos, tmp_path, lambda _: None)
    assert written == {0: ["00-a.mp4", "02-c.mp4"], 1: ["01-b.mp4"]}
    assert rounds == [0, 0, 1, 1]


def test_a_video_that_is_not_finite_is_left_out_and_told(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cogtune.modeling.pipelines import NotFinite
    from cogtune.training import sample_videos as module

    def overflows(*_: Any, **__: Any) -> None:
        raise NotFinite("the video has values that are not finite")

    monkeypatch.setattr(module, "render", overflows)
    train_here(plan_for(clips, tmp_path / "out", steps=1, **SAMPLED))
    assert listed(tmp_path / "out", 0) == []
    assert "cannot sample 'a red disc'" in capsys.readouterr().err
    assert (tmp_path / "out" / LORA_WEIGHTS_NAME).is_file()


def test_training_needs_no_text_encoder(
    clips: Path, tmp_path: Path, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import T5EncoderModel

    plan = plan_for(clips, tmp_path / "out", steps=1, **SAMPLED)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the text encoder was loaded")

    monkeypatch.setattr(T5EncoderModel, "from_pretrained", refuse)
    train_here(plan)
    assert len(listed(tmp_path / "out", 0)) == 2


# --------------------------------------------------------------------------------------------- out of memory


def test_a_step_that_is_out_of_memory_says_what_would_fit_and_keeps_the_checkpoint(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cogtune.training.objective import Objective

    plan = plan_for(
        clips, tmp_path / "out", steps=4, batch_size=2, checkpoint_every=2, eval_every=0, gradient_checkpointing=False
    )
    losses_of, calls = Objective.losses, []

    def exhausted(self: Objective, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(args)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation")
        return losses_of(self, *args, **kwargs)

    monkeypatch.setattr(Objective, "losses", exhausted)
    with pytest.raises(CogtuneError) as caught:
        train_here(plan)
    assert caught.value.message == "out of GPU memory: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert caught.value.hint.startswith("--gradient-checkpointing takes ")
    assert caught.value.details == (
        "checkpoint-2 is complete: make that change and continue from it with --resume latest",
    )
    monkeypatch.undo()
    monkeypatch.setattr(jobs, "fill_cache", fill_here)
    lines = train_here(plan_for(clips, tmp_path / "out", steps=4, batch_size=2, eval_every=0, resume="latest"))
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


def test_sample_videos_that_are_out_of_memory_can_be_done_without(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cogtune.training import sample_videos as module

    def exhausted(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(module, "render", exhausted)
    with pytest.raises(CogtuneError, match="out of GPU memory while making the sample videos of step 0") as caught:
        train_here(plan_for(clips, tmp_path / "out", steps=1, **SAMPLED))
    assert caught.value.hint.startswith("use --sample-every 0")
    assert list((tmp_path / "out" / "samples").iterdir()) == []


def test_the_report_is_drawn_at_each_evaluation(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cogtune.training import worker

    drawn: list[tuple[str, int]] = []

    def draw(output: Path, state: str) -> None:
        drawn.append((state, max(line["step"] for line in read_lines(output))))

    monkeypatch.setattr(worker, "write_report", draw)
    train_here(plan_for(clips, tmp_path / "out", steps=3, eval_every=2))
    assert drawn == [("running", 0), ("running", 2), ("running", 3), ("ended", 3)]
