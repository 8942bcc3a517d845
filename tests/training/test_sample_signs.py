"""Signs of a problem in sample videos are told once while a run trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cogtune.config.run_config import RunConfig
from cogtune.data.cache.index import Index, SampleKeys
from cogtune.data.frames import FrameSettings
from cogtune.data.layouts.base import Sample
from cogtune.data.prompts import PromptRow
from cogtune.data.video.clips import Pixels, write_video
from cogtune.encoding import jobs
from cogtune.models.geometry import Size
from cogtune.quality.references import choose_clips, write_clips
from cogtune.run.comparison import Sign
from cogtune.run.metrics import read_metrics
from cogtune.run.sample_videos import SampleEntry, step_folder, write_list
from cogtune.training import sample_signs
from cogtune.training.sample_signs import SIGNS, SampleSigns
from tests.support.drawn import disc
from tests.support.runs_in_process import fill_here, plan_for, train_here

SIZE = Size(9, 64, 96)


def round_of(output: Path, step: int, videos: Sequence[Pixels], averaged: bool = False) -> None:
    """Write the sample videos of a step, one for each prompt."""
    folder = step_folder(output, step)
    entries = []
    for number, video in enumerate(videos):
        write_video(folder / f"{number}.mp4", video, 8)
        entries.append(SampleEntry(f"prompt {number}", None, 42, f"{number}.mp4", averaged))
    write_list(folder, entries)


def coloured(video: Pixels, red: float) -> Pixels:
    """The same with the red channel changed."""
    changed = video.astype(np.float64)
    changed[..., 0] *= red
    return np.clip(changed, 0, 255).astype(np.uint8)


def left(speed: float) -> Pixels:
    """A disc that moves to the left: like the clips, and a copy of none."""
    return np.ascontiguousarray(coloured(disc(speed), 0.9)[:, :, ::-1])


@pytest.fixture
def run(tmp_path: Path) -> SimpleNamespace:
    """A run of 100 steps on three clips of a moving disc, and its sample videos from before training."""
    samples = []
    for number, speed in enumerate((2.0, 3.0, 4.0)):
        write_video(tmp_path / f"{number}.mp4", coloured(disc(speed), 0.9), 8)
        samples.append(Sample(f"clip-{number}", tmp_path / f"{number}.mp4", "x"))
    output = tmp_path / "out"
    clips = choose_clips(samples, FrameSettings(size=SIZE, fps=8.0), 16)
    write_clips(output / "launch" / "clips.json", clips)
    round_of(output, 0, [coloured(disc(2.5), 0.8), coloured(disc(1.5), 0.7)])
    config = RunConfig(output=output, learning_rate=1e-3)
    plan = SimpleNamespace(config=config, total_steps=100, samples=3, index=output / "launch" / "index.json")
    keys = SampleKeys("clip-0", "latents", "trained", None, SIZE)
    rows = (PromptRow("prompt 0", "trained", None, None), PromptRow("prompt 1", "other", None, None))
    watch = SampleSigns(plan, Index((keys,), "null"), rows)  # type: ignore[arg-type]
    return SimpleNamespace(output=output, watch=watch, again=lambda: SampleSigns(plan, Index((keys,), "null"), rows))  # type: ignore[arg-type]


def names(signs: Sequence[Sign]) -> list[str]:
    return [sign.name for sign in signs]


def test_good_videos_are_not_accused(run: Any) -> None:
    round_of(run.output, 50, [coloured(disc(3.0), 0.85), left(2.2)])
    assert run.watch.new_at(0) == run.watch.new_at(50) == []


def test_frozen_and_burnt_videos_are_told_once(run: Any) -> None:
    round_of(run.output, 50, [coloured(disc(0.0), 0.5), coloured(disc(0.0), 0.4)])
    told = run.watch.new_at(50)
    assert names(told) == ["frozen", "burnt"]
    assert "--learning-rate, such as 0.0003 instead of 0.001" in told[0].advice
    round_of(run.output, 100, [coloured(disc(0.0), 0.4), coloured(disc(0.0), 0.4)])
    assert run.watch.new_at(100) == []
    (run.output / "metrics.jsonl").write_text('{"step": 50, "signs": ["burnt"]}\n{"step": 50, "signs": "x"}\n')
    assert names(run.again().new_at(100)) == ["frozen"], "the other was told before the run was resumed"


def test_no_effect_is_told_only_once_half_of_the_run_is_done(run: Any) -> None:
    same = [coloured(disc(2.5), 0.8), coloured(disc(1.5), 0.7)]
    round_of(run.output, 40, same)
    round_of(run.output, 60, same)
    assert run.watch.new_at(40) == []
    assert names(run.watch.new_at(60)) == ["no effect"]


def test_a_copy_of_a_clip_counts_for_prompts_that_were_not_trained_on(run: Any) -> None:
    copy = coloured(disc(4.0), 0.9)
    round_of(run.output, 50, [copy, left(2.2)])
    assert run.watch.new_at(50) == [], "its prompt is the caption of that clip"
    round_of(run.output, 60, [coloured(disc(3.0), 0.85), copy])
    (sign,) = run.watch.new_at(60)
    assert (sign.name, "clip-2" in sign.why) == ("memorised", True)


def test_without_videos_from_before_training_nothing_is_said(run: Any) -> None:
    round_of(run.output, 50, [disc(0.0)], averaged=True)
    assert run.watch.new_at(50) == [], "averages are not compared with the weights"
    for path in step_folder(run.output, 0).iterdir():
        path.unlink()
    round_of(run.output, 60, [disc(0.0)])
    assert run.again().new_at(60) == []


def test_a_run_warns_of_each_sign_once_and_goes_on(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jobs, "fill_cache", fill_here)
    frozen = Sign(name="frozen", why="nothing moves", advice="train on clips that move")
    monkeypatch.setattr(sample_signs, "find_signs", lambda *_: [frozen])
    settings: dict[str, Any] = {"validation_prompts": "A disc.", "sample_every": 1, "sample_steps": 1, "eval_every": 0}
    output = tmp_path / "out"
    lines = train_here(plan_for(clips, output, steps=2, **settings))
    told = "the sample videos look frozen: nothing moves; to change it, train on clips that move"
    assert capsys.readouterr().err.count(told) == 1
    assert [line for line in lines if SIGNS in line] == [{"step": 1, "signs": ["frozen"]}]
    broken = ValueError("no such codec")

    def fails(*_: object) -> list[Sign]:
        raise broken

    monkeypatch.setattr(sample_signs, "find_signs", fails)
    train_here(plan_for(clips, output, steps=3, resume="latest", **settings))
    assert "cannot measure the sample videos: no such codec" in capsys.readouterr().err
    assert read_metrics(output / "metrics.jsonl")[-1]["step"] == 3
