"""The whole road through the real program: encode, train, stop, kill, resume, merge, sample."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from safetensors.torch import load_file

from cogtune.commands.infer.request import InferRequest
from cogtune.data.synthetic import draw_dataset
from cogtune.data.video.clips import probe, read_frames
from cogtune.encoding import jobs
from cogtune.merge import merge_checkpoint
from cogtune.models.locate import locate
from cogtune.models.variants import LORA_WEIGHTS_NAME
from cogtune.run import launch
from cogtune.run.checkpoints import checkpoints
from cogtune.training.evaluate import MOST_TRAINING_SAMPLES
from tests.conftest import Cogtune
from tests.support import runs_in_process
from tests.support.forked_workers import run_workers
from tests.support.in_process import run
from tests.support.infer_frames import render_request
from tests.support.runs_in_process import fill_here, plan_for, start_here, train_here
from tests.support.sampling import sampled

FOREVER = ["--steps", "100000", "--checkpoint-every", "1", "--eval-every", "1000000"]


def start(folder: Path, *words: object) -> subprocess.Popen[str]:
    """The real program, left running."""
    return subprocess.Popen(
        [sys.executable, "-m", "cogtune", *map(str, words)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_checkpoints(output: Path, running: subprocess.Popen[str], count: int = 1) -> None:
    """Until a run has written its first checkpoints."""
    deadline = time.monotonic() + 600
    while not checkpoints(output) or int(checkpoints(output)[-1].name.split("-")[1]) < count:
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kill_all(running: subprocess.Popen[str], output: Path) -> None:
    """kill -9 the program and, at the same moment, every process it started."""
    worker = json.loads((output / "launch" / "rank-0.json").read_text())["pid"]
    os.killpg(os.getpgid(worker), signal.SIGKILL)
    running.kill()
    running.communicate()


def assert_whole(output: Path) -> None:
    """Everything under a final name can be read to its end."""
    for checkpoint in output.glob("checkpoint-*"):
        assert load_file(checkpoint / LORA_WEIGHTS_NAME)
        assert torch.load(checkpoint / "optimizer.pt", weights_only=True)["optimizer"]["state"]
        assert f"checkpoint-{json.loads((checkpoint / 'state.json').read_text())['step']}" == checkpoint.name


@pytest.mark.slow
def test_the_road_by_hand(cogtune: Cogtune, clips: Path, tmp_path: Path) -> None:
    preset = ["--preset", "cpu-lora-tiny"]
    cache = ["--cache-dir", tmp_path / "cache"]
    assert "0 errors" in cogtune("dataset", "validate", clips, *preset).out
    assert "encoded 6 clips, 7 captions" in cogtune("dataset", "cache", clips, *preset, *cache).out
    assert "nothing to do" in cogtune("dataset", "cache", clips, *preset, *cache).out

    dry = cogtune("train", *preset, "--data", clips, *cache, "--dry-run").out
    assert "rank\t8\tpreset cpu-lora-tiny" in dry
    assert f"--config_file {tmp_path / 'out' / 'dry-run' / 'accelerate.yaml'}" in dry  # which is there
    assert not (tmp_path / "out" / "checkpoint-10").exists()
    assert json.loads((tmp_path / "out" / "dry-run" / "plan.json").read_text())["total_steps"] == 20

    done = cogtune("train", *preset, "--data", clips, *cache)
    assert "next: cogtune infer --lora" in done.out
    assert "encoding" not in done.err
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-10", "checkpoint-20"]

    cogtune("infer", "--lora", "out", "--steps", 2, "--output", "video.mp4")
    info = probe(tmp_path / "video.mp4")
    assert (info.num_frames, info.height, info.width, info.fps) == (9, 64, 96, 8.0)


@pytest.mark.slow
def test_a_run_can_be_started_by_hand_from_its_launch_files(cogtune: Cogtune, clips: Path, tmp_path: Path) -> None:
    run = ["train", "--preset", "cpu-lora-tiny", "--data", clips, "--steps", 2, "--cache-dir", tmp_path / "a cache"]
    dry = cogtune(*run, "--output", "by hand", "--dry-run").out
    first, by_hand = (
        line.split(what)[1]
        for what in ("run: cogtune ", "run them with: ")
        for line in dry.splitlines()
        if what in line
    )
    cogtune(*shlex.split(first))
    done = subprocess.run(shlex.split(by_hand), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "loss at fixed noise" in done.stdout
    after = load_file(tmp_path / "by hand" / LORA_WEIGHTS_NAME)
    train_here(plan_for(clips, tmp_path / "out", steps=2, cache_dir=tmp_path / "a cache"))
    before = load_file(tmp_path / "out" / LORA_WEIGHTS_NAME)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.slow
def test_a_second_run_is_refused_and_ctrl_c_says_how_to_go_on(clips: Path, tmp_path: Path, cogtune: Cogtune) -> None:
    running = start(tmp_path, "train", "--preset", "cpu-lora-tiny", "--data", clips, *FOREVER)
    wait_for_checkpoints(tmp_path / "out", running, 3)
    told = cogtune("train", "--resume", "latest", "--steps", 100000, status=1).err
    assert "another process is using" in told
    running.send_signal(signal.SIGINT)
    _, told = running.communicate(timeout=600)
    assert running.returncode == 130
    assert "continue with: cogtune train --resume latest" in told
    assert "Traceback" not in told
    assert_whole(tmp_path / "out")
    last = int(checkpoints(tmp_path / "out")[-1].name.split("-")[1])
    done = cogtune("train", "--resume", "latest", "--steps", last + 2)
    assert f"resumed at step {last}" in done.err


@pytest.mark.slow
def test_workers_do_not_outlive_the_program(clips: Path, tmp_path: Path) -> None:
    running = start(tmp_path, "train", "--preset", "cpu-lora-tiny", "--data", clips, *FOREVER)
    wait_for_checkpoints(tmp_path / "out", running)
    report = tmp_path / "out" / "launch" / "rank-0.json"
    running.kill()
    deadline = time.monotonic() + 600
    while json.loads(report.read_text())["status"] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert json.loads(report.read_text())["status"] == "stopped"
    running.communicate(timeout=600)
    assert_whole(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_run_killed_at_any_moment_goes_on(clips: Path, tmp_path: Path, cogtune: Cogtune) -> None:
    moments = random.Random(7)
    output = tmp_path / "out"
    reached = 0
    for attempt in range(2):  # test_resume.py has twenty, on two processes, without the launcher
        resume = ["--resume", "latest"] if attempt else ["--preset", "cpu-lora-tiny", "--data", clips]
        running = start(tmp_path, "train", *resume, *FOREVER)
        wait_for_checkpoints(output, running, reached + 1)
        time.sleep(moments.uniform(0, 0.4))
        kill_all(running, output)
        assert_whole(output)
        reached = int(checkpoints(output)[-1].name.split("-")[1])
    done = cogtune("train", "--resume", "latest", "--steps", reached + 1)
    assert f"resumed at step {reached}" in done.err
    assert not list(output.glob(".*.partial"))


@pytest.mark.slow
def test_the_lora_in_plain_diffusers_gives_the_same_frames(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Alpha is a quarter of the rank, so a loader that takes it for the rank shows it."""
    monkeypatch.setattr(jobs, "fill_cache", fill_here)
    train_here(plan_for(clips, tmp_path / "out", steps=8, eval_every=0, rank=8, alpha=2, learning_rate=0.01))
    monkeypatch.chdir(tmp_path)
    run(capsys, "infer", "--lora", "out", "--steps", 3, "--prompt", "a red disc", "--output", "ours.mp4")

    pipeline = CogVideoXPipeline.from_pretrained(locate("tiny:2b"), dtype=torch.float32)
    pipeline.scheduler = CogVideoXDDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    pipeline.set_progress_bar_config(disable=True)

    def plainly() -> np.ndarray[Any, Any]:
        frames = pipeline(
            "a red disc", num_frames=9, height=64, width=96, num_inference_steps=3, guidance_scale=6.0,
            generator=torch.Generator().manual_seed(42), output_type="np",
        ).frames[0]  # fmt: skip
        rounded: np.ndarray[Any, Any] = (frames * 255).round().astype(np.uint8)
        return rounded

    without = plainly()
    pipeline.load_lora_weights(tmp_path / "out")
    with_lora = plainly()
    assert np.abs(with_lora.astype(int) - without).max() > 8

    request = InferRequest(loras=(str(tmp_path / "out"),), prompts=("a red disc",), steps=3)
    assert np.array_equal(render_request(request), with_lora)
    seen = read_frames(tmp_path / "ours.mp4", range(9)).astype(int)
    assert np.abs(seen - with_lora).mean() < np.abs(seen - without).mean()  # the file is compressed


STRATEGIES = ("ddp", "zero2", "zero2-offload", "zero3", "zero3-offload")


def test_the_command_that_starts_a_training_needs_no_torch() -> None:
    """Its worker processes do, and importing it twice costs three seconds and 200 MB."""
    program = "import sys, cogtune.commands.train; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "False\n"


@pytest.mark.timeout(2400)
@pytest.mark.parametrize(
    ("kind", "strategies"),
    sampled(
        [("sft", STRATEGIES), ("lora", STRATEGIES), ("sft", ("zero3",)), ("lora", ("zero2-offload", "zero3"))],
        ("sft", ("zero3",)), ("lora", ("zero2-offload", "zero3")),
    ),
)  # fmt: skip
def test_every_strategy_on_two_ranks_trains_resumes_and_merges_as_one_rank_does(
    kind: str,
    strategies: tuple[str, ...],
    cogtune: Cogtune,
    clips: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two processes against one with twice the accumulation: the same batches, so the same losses to 2e-4.

    Gradients are accumulated, and reduced in many buckets, each too small for some parameters. Three prompts over two
    processes, so that one has a video more to make. Full training under ZeRO-3 goes on through the real launcher (and
    in one bucket); the other processes are forked.
    """
    monkeypatch.setattr(jobs, "fill_cache", fill_here)
    monkeypatch.setattr("cogtune.config.launchers.REDUCE_BUCKET", {2: 3000, 3: 3000})
    monkeypatch.setattr(runs_in_process, "EVALUATED_SAMPLES", MOST_TRAINING_SAMPLES)  # as in the real program
    shared: dict[str, Any] = {
        "type": kind,
        "learning_rate": 1e-4,
        "checkpoint_every": 2,
        "validation_data": draw_dataset(tmp_path / "held-out", clips=3, seed=9),
        "validation_prompts": "a red disc:::a green disc:::a blue square",
        "sample_steps": 2,
    }
    train_here(plan_for(clips, tmp_path / "one", gradient_accumulation_steps=4, steps=4, **shared))
    expected = {name: measured(tmp_path / "one", name) for name in ("loss", "eval_loss", "validation_loss")}
    assert [len(losses) for losses in expected.values()] == [4, 3, 3]
    for strategy in strategies:
        output = tmp_path / strategy
        two = {**shared, "strategy": strategy, "num_processes": 2, "gradient_accumulation_steps": 2}
        run_workers(plan_for(clips, output, steps=2, **two))
        if (kind, strategy) == ("sft", "zero3"):
            cogtune("train", "--resume", "latest", "--output", strategy, "--steps", 4)
        else:
            run_workers(plan_for(clips, output, steps=4, resume="latest", **two))
        for name in ("loss", "eval_loss", "validation_loss"):
            for step, loss in measured(output, name).items():
                assert loss == pytest.approx(expected[name][step], rel=2e-4), (strategy, name, step)
        for step in (0, 2, 4):
            videos = output / "samples" / f"step-00000{step}"
            assert len(json.loads((videos / "samples.json").read_text())) == 3
            for video in tmp_path.glob(f"one/samples/step-00000{step}/*.mp4"):
                ours, theirs = (read_frames(path, range(9)).astype(int) for path in (videos / video.name, video))
                assert np.abs(ours - theirs).mean() < 3, (strategy, step, video.name)  # the codec magnifies
        if strategy == "ddp":
            continue
        merged = merge_checkpoint(output / "checkpoint-4", tmp_path / f"{strategy}-merged", dtype="fp32").output
        if kind == "lora":
            saved, made = (load_file(folder / LORA_WEIGHTS_NAME) for folder in (output, merged))
            assert saved.keys() == made.keys()
            assert all(torch.equal(saved[name], made[name]) for name in saved)
        else:
            one = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "one" / "checkpoint-4" / "transformer")
            other = CogVideoXTransformer3DModel.from_pretrained(merged / "transformer").state_dict()
            for name, value in one.state_dict().items():
                torch.testing.assert_close(other[name], value, rtol=0, atol=2e-4)
    shards = [*(tmp_path / "zero3" / "checkpoint-4" / "pytorch_model").glob("*_optim_states.pt")]
    one_file, other_file = (path.read_bytes() for path in shards)
    shards[0].write_bytes(other_file)
    shards[1].write_bytes(one_file)
    told = cogtune("train", "--resume", "latest", "--output", "zero3", "--steps", 6, status=1).err
    assert "is not the file that was saved with this checkpoint" in told
    where = ["--lora", "zero3-merged"] if kind == "lora" else ["--model", "zero3-merged"]
    monkeypatch.chdir(tmp_path)
    run(capsys, "infer", *where, "--prompt", "a disc", "--steps", 2, "--size", "9x64x96")
    assert probe(tmp_path / "a-disc-42.mp4").num_frames == 9


def measured(output: Path, name: str = "loss") -> dict[int, float]:
    """A loss by step."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


@pytest.mark.slow
def test_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "fill_cache", fill_here)
    monkeypatch.setattr(launch, "start", start_here)
    monkeypatch.chdir(tmp_path)
    told = run(capsys, "demo").out
    video = tmp_path / "cogtune-demo" / "video.mp4"
    info = probe(video)
    assert (info.num_frames, info.height, info.width, info.codec) == (9, 64, 96, "h264")
    assert str(Path("cogtune-demo") / "video.mp4") in told
    assert "next, with a 24 GB GPU" in told
    (tmp_path / "mine").mkdir()
    assert "already exists" in run(capsys, "demo", "mine", status=2).err
