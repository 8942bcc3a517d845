"""The report of a run is made from its files alone, whatever state they are in."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cogtune.data.video.clips import write_video
from cogtune.encoding import jobs
from cogtune.report.curves import curves, smooth
from cogtune.report.run import State, read_provenance, record_machine, write_run_report
from cogtune.report.videos import find_videos, spread
from cogtune.system.errors import CogtuneError
from cogtune.training import worker
from tests.support.html_pages import Element, parse, pixels
from tests.support.runs_in_process import fill_here, plan_for, train_here

RUN_YAML = """\
# The resolved configuration of this run. `cogtune train --config run.yaml` repeats it.
model: tiny:2b  # preset cpu-lora-tiny
id_token: 'a # b  # c'  # my  # file.yaml
rank: 8  # --rank
seed: 42  # default
"""


def a_run(output: Path, lines: Sequence[Mapping[str, Any]], total: int = 100) -> Path:
    """A run's folder with these lines of metrics."""
    (output / "launch").mkdir(parents=True)
    (output / "run.yaml").write_text(RUN_YAML)
    plan = {"total_steps": total, "config": {"model": "tiny:2b", "type": "lora"}, "identity": {"data": "d1ge57"}}
    (output / "launch" / "plan.json").write_text(json.dumps(plan))
    (output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return output


def step(number: int, loss: float = 0.5, **more: float) -> dict[str, float]:
    return {"step": number, "loss": loss, "grad_norm": 0.1, "learning_rate": 1e-4, "seconds": 2.0, **more}


def evaluation(number: int, loss: float, name: str = "eval_loss") -> dict[str, Any]:
    return {"step": number, name: loss, f"{name}_by_timestep": {"125": 2 * loss, "625": loss}}


def report(output: Path, state: State = "ended") -> Element:
    assert write_run_report(output, state) == output / "report.html"
    return parse(output / "report.html")


def charts(page: Element) -> dict[str, str]:
    """What each chart says of itself, by its title."""
    told = [chart.attributes["aria-label"] or "" for chart in page.all("svg")]
    return {label.partition(": ")[0]: label.partition(": ")[2] for label in told}


def head(page: Element) -> dict[str, str]:
    return {one.all("dt")[0].text: one.all("dd")[0].text for one in page.all("dl")[0].all("div")}


def test_the_curves_are_those_that_were_measured(tmp_path: Path) -> None:
    lines = [evaluation(0, 0.4) | evaluation(0, 0.6, "validation_loss")]
    lines += [step(number, 1 / number, memory_gib=11.5) for number in range(1, 51)]
    lines += [evaluation(50, 0.3) | evaluation(50, 0.5, "validation_loss")]
    page = report(a_run(tmp_path / "out", lines))
    drawn = charts(page)
    assert drawn["Loss at fixed noise"] == (
        "training samples from 0.4 to 0.3 over steps 0 to 50, lowest 0.3, highest 0.4; "
        "validation samples from 0.6 to 0.5 over steps 0 to 50, lowest 0.5, highest 0.6"
    )
    assert drawn["Training loss"].startswith(
        "each step from 1 to 0.02 over steps 1 to 50, lowest 0.02, highest 1; mean"
    )
    assert drawn["Timestep 125"].startswith("training samples from 0.8 to 0.6 over steps 0 to 50")
    assert set(drawn) >= {"Timestep 625", "Learning rate", "Gradient norm", "Time per step", "Memory"}
    figures = head(page)
    assert figures["Steps"] == "50of 100"
    assert figures["Loss at fixed noise"] == "0.3from 0.4, -25%"
    assert figures["Validation loss"] == "0.5from 0.6, -17%"
    assert figures["Time per step"] == "2 s2 min in all"
    assert figures["Time left"] == "2 minat this pace"
    assert figures["Memory"] == "11.5 GiB"
    assert page.all("p", "verdict")[0].text == "Not finished. 50 of 100 steps are done."


@pytest.mark.parametrize("lines", [[], [step(1)], [evaluation(0, 0.4)], [step(1, math.inf), step(2, math.nan)]])
def test_runs_of_which_little_is_known_have_a_page(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    page = report(a_run(tmp_path / "out", lines))
    text = (tmp_path / "out" / "report.html").read_text()
    assert not re.search(r"\b(nan|inf)\b", text)
    assert page.all("h1")[0].text == "out"


def test_a_run_without_metrics_or_plan_has_a_page(tmp_path: Path) -> None:
    run = a_run(tmp_path / "out", [])
    (run / "metrics.jsonl").unlink()
    shutil.rmtree(run / "launch")
    assert "Nothing has been measured yet." in report(run).text


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CogtuneError, match="is not a run folder"):
        write_run_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_was_measured_twice_counts_once() -> None:
    found = curves([step(1, 0.9), step(2, 0.8), evaluation(2, 0.5), step(2, 0.7), evaluation(2, 0.4), step(3, 0.6)])
    assert found["loss"] == [(1, 0.9), (2, 0.7), (3, 0.6)]
    assert found["eval_loss"] == [(2, 0.4)]
    assert found.by_timestep["eval_loss"] == {125: [(2, 0.8)], 625: [(2, 0.4)]}
    assert found.last_step == 3


def test_a_log_of_a_hundred_thousand_steps_stays_small_and_tells_its_peak(tmp_path: Path) -> None:
    lines = [step(number, 0.2 + 0.1 * math.sin(number)) for number in range(1, 100_001)]
    lines[54_320]["loss"] = 7.5
    lines[98_765]["grad_norm"] = 33.0
    page = report(a_run(tmp_path / "out", lines, total=100_000))
    assert (tmp_path / "out" / "report.html").stat().st_size < 400_000
    units = [unit.text for unit in page.all("span", "unit")]
    assert "up to 7.5 (step 54,321)" in units
    assert "before clipping, up to 33 (step 98,766)" in units
    assert page.all("p", "verdict")[0].text == "Finished. All 100,000 steps are done."
    longest = max(len(path.attributes["d"] or "") for path in page.all("path"))
    assert longest < 1000 * len("L1000.0 1000.0")


def test_smoothing_has_no_bias_at_its_start() -> None:
    assert smooth([(1, 4.0), (2, 4.0), (3, 4.0)], 10) == [(1, 4.0), (2, pytest.approx(4.0)), (3, pytest.approx(4.0))]
    assert smooth([(1, 0.0), (2, 1.0)], 10)[1][1] == pytest.approx(1 / 1.9)


def test_every_setting_is_there_with_its_source(tmp_path: Path) -> None:
    run = a_run(tmp_path / "out", [])
    assert read_provenance(run / "run.yaml") == [
        ("model", "tiny:2b", "preset cpu-lora-tiny"),
        ("id_token", "'a # b  # c'  # my", "file.yaml"),
        ("rank", "8", "--rank"),
        ("seed", "42", "default"),
    ]
    (part,) = (part for part in report(run).all("section") if part.all("h2")[0].text == "Configuration")
    rows = [[cell.text for cell in row.all("td")] for row in part.all("tr") if row.all("td")]
    assert ["rank", "8", "--rank"] in rows
    assert [cell.text for cell in part.all("details")[0].all("td")] == ["seed", "42", "default"]


def test_what_the_run_was_made_on_and_with_is_told(tmp_path: Path) -> None:
    run = a_run(tmp_path / "out", [])
    record_machine(run / "launch")
    text = report(run).all("section")[-1].text
    assert "d1ge57" in text
    assert "torch" in text
    assert "diffusers" in text


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    run = a_run(tmp_path / "out", [step(1)])
    (run / "launch" / "rank-0.json").write_text('{"pid": 1, "status": "failed", "message": "the <disk> is full"}')
    assert report(run).all("p", "verdict")[0].text == "Failed. the <disk> is full. 1 of 100 steps are done."
    (run / "launch" / "rank-0.json").write_text('{"pid": 1, "status": "running"}')
    assert report(run, state="running").all("p", "verdict")[0].text == "Running. 1 of 100 steps are done."


# ----------------------------------------------------------------------------------------------- sample videos


def samples(output: Path, steps: Sequence[int], prompts: Sequence[str] = ("A <b>disc</b>.",)) -> None:
    for number in steps:
        folder = output / "samples" / f"step-{number:06d}"
        folder.mkdir(parents=True)
        entries = []
        for place, prompt in enumerate(prompts):
            name = f"{place:02d}-a disc & more.mp4"
            write_video(folder / name, np.full((5, 64, 96, 3), min(number, 255), np.uint8), 8)
            entries.append({"prompt": prompt, "image": None, "seed": 42, "file": name})
        (folder / "samples.json").write_text(json.dumps(entries))


def test_sample_videos_stand_beside_the_one_from_before_training(tmp_path: Path) -> None:
    run = a_run(tmp_path / "out", [])
    samples(run, [0, 50, 100])
    page = report(run)
    (strip,) = page.all("article", "samples")
    assert strip.all("p", "prompt")[0].text == "A <b>disc</b>."
    assert [caption.text for caption in strip.all("figcaption")] == ["before training", "step 100", "step 50"]
    videos = strip.all("video")
    assert [video.attributes["src"] for video in videos] == [
        f"samples/step-{number:06d}/00-a%20disc%20%26%20more.mp4" for number in (0, 100, 50)
    ]
    for video, level in zip(videos, (0, 100, 50), strict=True):
        assert {"controls", "muted", "loop", "playsinline"} <= set(video.attributes)
        assert video.attributes["preload"] == "metadata"
        poster = pixels(video.attributes["poster"] or "")
        assert poster.shape == (64, 96, 3)
        assert abs(float(poster.mean()) - level) < 4


def test_damaged_lists_and_lost_videos_are_left_out(tmp_path: Path) -> None:
    run = a_run(tmp_path / "out", [])
    samples(run, [0, 10, 20, 30, 40])
    folders = sorted((run / "samples").iterdir())
    (folders[1] / "samples.json").write_text("{")
    next(folders[2].glob("*.mp4")).unlink()
    (folders[3] / "samples.json").write_text('[{"prompt": "p", "seed": 1, "file": "../../run.yaml"}, 7]')
    next(folders[4].glob("*.mp4")).write_bytes(b"no video")
    (scene,) = find_videos(run).values()
    assert list(scene) == [0, 40]
    assert "poster" not in report(run).all("video")[1].attributes


def test_of_many_steps_the_first_and_the_last_are_kept() -> None:
    chosen = spread(list(range(0, 1001, 10)))
    assert len(chosen) == 12
    assert (chosen[0], chosen[-1]) == (0, 1000)
    assert spread([0, 5]) == [0, 5]


# ------------------------------------------------------------------------------------------------ in the run


def test_a_run_draws_its_report_and_a_resumed_one_draws_it_anew(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "fill_cache", fill_here)
    output = tmp_path / "out"
    train_here(plan_for(clips, output, steps=4, checkpoint_every=2), stop_after=2)
    first = parse(output / "report.html")
    assert first.all("p", "verdict")[0].text == "Not finished. 2 of 4 steps are done."
    train_here(plan_for(clips, output, steps=4, checkpoint_every=2, resume="latest"))
    page = parse(output / "report.html")
    assert page.all("p", "verdict")[0].text == "Finished. All 4 steps are done."
    assert charts(page)["Training loss"].split("; ")[0].startswith("each step from ")
    assert "over steps 1 to 4" in charts(page)["Training loss"]
    assert {"torch", "cogtune"} <= set(json.loads((output / "launch" / "machine.json").read_text())["versions"])


def test_a_page_is_there_from_the_first_measurement_on(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "fill_cache", fill_here)
    drawn: list[tuple[str, int]] = []

    def look(output: Path, state: State) -> Path:
        page = report(output, state)
        drawn.append((page.all("p", "verdict")[0].text, len(page.all("video"))))
        return output / "report.html"

    monkeypatch.setattr(worker, "write_run_report", look)
    settings: dict[str, Any] = {
        "steps": 2,
        "eval_every": 1,
        "validation_prompts": "A disc.",
        "sample_every": 2,
        "sample_steps": 1,
    }
    train_here(plan_for(clips, tmp_path / "out", **settings))
    under_way = [f"Running. {step} of 2 steps are done." for step in (0, 0, 1, 2, 2)]
    assert drawn == list(zip([*under_way, "Finished. All 2 steps are done."], [0, 1, 1, 1, 2, 2], strict=True))


def test_a_report_that_cannot_be_written_is_told_and_stops_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worker.write_report(tmp_path, "ended")
    assert "cannot write the run's report" in capsys.readouterr().err


def test_the_command_makes_it_again(cogtune: Any, tmp_path: Path) -> None:
    a_run(tmp_path / "out", [step(1)])
    assert cogtune("report").out == "out/report.html\n"
    assert "run.yaml" in cogtune("report", "nothing", status=1).err


@pytest.mark.parametrize("name", ["machine.json", "plan.json", "rank-0.json"])
@pytest.mark.parametrize("content", ["5", "null", '"checksum"', "[]"])
def test_a_file_of_another_type_is_left_out_with_a_warning(
    name: str, content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / "run.yaml").write_text("steps: 1\n")
    (tmp_path / "launch" / name).write_text(content)
    assert write_run_report(tmp_path).is_file()
    assert name in capsys.readouterr().err
