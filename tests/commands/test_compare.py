"""``cogtune compare`` on tiny models, through the real command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cogtune.cli import _status
from cogtune.commands.compare import CompareRequest, grid
from cogtune.commands.compare.candidates import find_candidates
from cogtune.commands.compare.scenes import RunData, scenes_of
from cogtune.commands.infer import making
from cogtune.commands.infer.request import InferRequest
from cogtune.data.cache.index import caption_of
from cogtune.data.frames import FrameSettings, load_clip, view
from cogtune.data.prompts import Prompt
from cogtune.data.sources import Sample, read_dataset
from cogtune.data.synthetic import draw_dataset
from cogtune.data.video.clips import probe, read_frames, write_video
from cogtune.data.video.generated import frames_of, write_generated
from cogtune.encoding import jobs
from cogtune.models.checkpoint_configs import ModelSpec, read_spec
from cogtune.models.geometry import Size
from cogtune.models.variants import LORA_WEIGHTS_NAME
from cogtune.run.comparison import FIGURES, Comparison, read_comparison
from cogtune.run.metrics import read_metrics
from cogtune.system.errors import UsageError
from cogtune.training import worker
from cogtune.training.evaluate import MOST_TRAINING_SAMPLES
from tests.support import runs_in_process
from tests.support.drawn import disc
from tests.support.html_pages import Element, parse
from tests.support.in_process import run
from tests.support.infer_frames import render_request
from tests.support.runs_in_process import fill_here, plan_for, train_here

QUICK = ("--steps", "2", "--guidance", "1", "--held-out", "1", "--unrelated", "a dog")


@pytest.fixture(scope="module")
def trained(home: Path, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on tiny:2b with two checkpoints and validation data."""
    root = tmp_path_factory.mktemp("trained")
    held_out = draw_dataset(root / "held-out", clips=2, seed=5)
    settings: dict[str, Any] = {
        "steps": 2,
        "checkpoint_every": 1,
        "learning_rate": 3e-3,
        "rank": 4,
        "validation_data": held_out,
        "validation_prompts": "A disc.",
        "sample_every": 2,
        "sample_steps": 1,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "fill_cache", fill_here)
        patch.setattr(runs_in_process, "EVALUATED_SAMPLES", MOST_TRAINING_SAMPLES)  # as in the real program
        train_here(plan_for(clips, root / "out", **settings))
    return root / "out"


@pytest.fixture(scope="module")
def compared(trained: Path) -> Path:
    """The folder of a comparison of both checkpoints at two strengths."""
    assert _status(["compare", str(trained), "--lora-scale", "0.5,1", *QUICK], False) == 0
    return trained / "compare"


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model may be loaded."""

    def refuse(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(making, "VideoSampler", refuse)


def found_in(folder: Path) -> Comparison:
    found = read_comparison(folder)
    assert found is not None
    return found


def test_every_checkpoint_is_compared_at_every_strength(compared: Path) -> None:
    found = found_in(compared)
    assert [(row.label, row.step, row.strength) for row in found.rows] == [
        ("checkpoint-1", 1, 0.5),
        ("checkpoint-1", 1, 1.0),
        ("checkpoint-2", 2, 0.5),
        ("checkpoint-2", 2, 1.0),
    ]
    assert [(scene.kind, scene.trained) for scene in found.scenes] == [
        ("prompt", False),
        ("held-out", False),
        ("unrelated", False),
    ]
    assert [scene.prompt for scene in found.scenes][::2] == ["A disc.", "a dog"]
    assert (found.base.figures.change, found.base.figures.drift, found.model) == (0, 0, "tiny:2b")
    changes = [row.figures.change or 0 for row in found.rows]
    assert 0 < changes[0] < changes[1], "more strength changes more"
    assert 0 < changes[2] < changes[3]
    assert (found.clip_count, set(found.clips)) == (
        6,
        {"motion", "flicker", "saturation", "contrast", "sharpness", "clipped"},
    )
    assert all((compared / video).is_file() for row in (found.base, *found.rows) for video in row.videos)


def test_losses_are_those_that_training_measured(compared: Path, trained: Path) -> None:
    lines = {line["step"]: line for line in read_metrics(trained / "metrics.jsonl") if "eval_loss" in line}
    found = found_in(compared)
    by_step = {0: found.base, **{row.step: row for row in found.rows if row.strength == 1}}
    assert by_step.keys() == lines.keys() == {0, 1, 2}
    for step, row in by_step.items():
        assert row.figures.training_loss == pytest.approx(lines[step]["eval_loss"], rel=1e-5)
        assert row.figures.loss == pytest.approx(lines[step]["validation_loss"], rel=1e-5)


def test_videos_are_those_that_infer_makes(compared: Path, trained: Path, tmp_path: Path) -> None:
    """With all LoRAs loaded and switched, the base's and a checkpoint's frames are those of each alone."""
    found = found_in(compared)
    lora = str(trained / "checkpoint-2" / LORA_WEIGHTS_NAME)
    shared: dict[str, Any] = {"prompts": ("A disc.",), "steps": 2, "guidance": 1.0, "size": "9x64x96", "fps": 8.0}
    alone = {
        "base": InferRequest(model="tiny:2b", precision="fp32", **shared),
        "checkpoint-2 at strength 0.5": InferRequest(loras=(lora,), lora_scales=(0.5,), **shared),
    }
    for row in (found.base, *found.rows):
        if row.title in alone:
            write_generated(tmp_path / "x.mp4", render_request(alone[row.title]), 8.0, {}, "mark")
            assert np.array_equal(frames_of(tmp_path / "x.mp4"), frames_of(compared / row.videos[0])), row.title


def texts(page: Element, name: str) -> list[str]:
    return [element.text for element in page.all(name)]


def test_the_page_shows_and_explains_everything(compared: Path) -> None:
    page, found = parse(compared / "compare.html"), found_in(compared)
    assert page.all("p", "verdict")[0].text.replace(":  ", ": ") == found.verdict
    explained = [item.partition(": ")[0] for item in texts(page, "li")]
    measured = [one.title for one in FIGURES if getattr(found.base.figures, one.name) is not None]
    assert "CLIP" not in measured
    assert set(measured) <= set(explained)
    assert texts(page, "th")[: 2 + len(measured)] == ["", "signs", *measured]
    assert page.all("tr")[1].all("td")[0].text == "base"
    videos = [video.attributes["src"] or "" for video in page.all("video")]
    assert len(videos) == 1 + len(found.scenes) * 5
    assert all((compared / video).is_file() for video in videos)
    assert {"no effect", "frozen", "burnt", "memorised", "forgot", "too strong"} <= set(texts(page, "td"))


def test_the_grid_has_a_row_for_each_prompt_and_a_column_for_each_strength(compared: Path) -> None:
    whole = compared / str(found_in(compared).grid)
    assert read_frames(whole, [0]).shape == (1, 20 + 3 * (20 + 160), 5 * 240, 3)
    assert probe(whole).num_frames == 9


def test_what_is_done_is_not_done_again(
    compared: Path, trained: Path, no_model: None, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in compared.rglob("*.mp4")}
    told = run(capsys, "compare", trained, "--lora-scale", "0.5,1", *QUICK)
    assert {path: path.stat().st_mtime_ns for path in compared.rglob("*.mp4")} == before
    assert told.out.splitlines()[-2:] == [found_in(compared).verdict, str(compared / "compare.html")]
    answer = json.loads(run(capsys, "compare", trained / "checkpoint-2", *QUICK, "--json").out)
    assert [row["label"] for row in answer["rows"]] == ["checkpoint-2"]
    assert answer == {
        key: value for key, value in json.loads((compared / "compare.json").read_text()).items() if key != "checksum"
    }
    run(capsys, "compare", trained, "--lora-scale", "0.5,1", *QUICK)


def test_a_video_that_is_gone_is_made_again(compared: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = compared / found_in(compared).rows[3].videos[1]
    before, data = (
        {path: path.stat().st_mtime_ns for path in compared.rglob("*.mp4") if path != gone},
        gone.read_bytes(),
    )
    gone.unlink()
    told = run(capsys, "compare", trained, "--lora-scale", "0.5,1", *QUICK)
    assert gone.read_bytes() == data
    assert "measuring the loss" not in told.err
    assert {path: path.stat().st_mtime_ns for path in compared.rglob("*.mp4") if path != gone} == before


def test_the_runs_page_and_the_model_card_show_it(
    compared: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from cogtune.hub.compared import compared as found_for
    from cogtune.hub.compared import comparison_section
    from cogtune.hub.local import find_weights

    run(capsys, "report", trained)
    page = parse(trained / "report.html")
    (part,) = (part for part in page.all("section") if part.attributes.get("id") == "comparison")
    assert part.all("a")[0].attributes["href"] == "compare/compare.html"
    assert "checkpoint-2 at strength 0.5" in part.text
    row, _ = found_for(find_weights(trained)[0], trained)
    assert row is not None
    assert row.row.label == "checkpoint-2", "the finished LoRA is that of the last checkpoint"
    best = found_in(compared).best
    assert row.is_best == (best is not None and best.label == "checkpoint-2")
    card = comparison_section(row)
    assert f"| {row.comparison.base.figures.loss:.4f} | {row.row.figures.loss:.4f} |" in card
    assert "Training loss, at fixed noise" in card


def test_a_damaged_comparison_is_told_and_left_out(
    compared: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "out"
    shutil.copytree(trained, copy)
    file = copy / "compare" / "compare.json"
    file.write_text(file.read_text().replace('"tiny:2b"', '"tiny:5b"'))
    assert "not in the report" in run(capsys, "report", copy).err
    told = run(capsys, "compare", copy, *QUICK, status=2).err
    assert "checksum mismatch" in told
    assert f"delete {file}" in told


def test_a_lora_alone_is_compared_without_what_is_not_known(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = tmp_path / "style.safetensors"
    shutil.copyfile(trained / LORA_WEIGHTS_NAME, lora)
    run(capsys, "compare", lora, *QUICK, "--output", tmp_path / "compared")
    found = found_in(tmp_path / "compared")
    assert [(row.label, row.weights) for row in found.rows] == [("style", "style.safetensors")]
    assert [scene.kind for scene in found.scenes] == ["prompt", "unrelated"]
    assert found.scenes[0].trained, "it is the run's first caption"
    figures = found.rows[0].figures
    assert (figures.loss, figures.training_loss, figures.nearest, found.clips) == (None, None, None, {})
    assert figures.drift is not None


@pytest.mark.parametrize(("first_step", "overwrite"), [(0, True), (5, True), (0, False)])
def test_a_run_that_starts_over_deletes_the_comparison(first_step: int, overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / "compare").mkdir()
    (tmp_path / "compare" / "compare.json").write_text("{}")
    plan: Any = SimpleNamespace(config=SimpleNamespace(output=tmp_path), overwrite=overwrite)
    worker._delete_later_checkpoints(plan, first_step)
    assert (tmp_path / "compare").exists() == (first_step == 5 or not overwrite)


# ------------------------------------------------------------------------------------------------------ mistakes


def test_mistakes_are_told_before_a_model_is_loaded(
    trained: Path, tmp_path: Path, no_model: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "pass a run" in run(capsys, "compare", "base", status=2).err
    assert "no such file or folder" in run(capsys, "compare", tmp_path / "nothing", status=2).err
    (tmp_path / "new").mkdir()
    shutil.copyfile(trained / "run.yaml", tmp_path / "new" / "run.yaml")
    assert "has no weights yet" in run(capsys, "compare", tmp_path / "new", status=2).err
    assert "hf download" in run(capsys, "compare", trained, "--clip", "openai/none", status=2).err
    said = run(capsys, "compare", trained, "--image", __file__, status=2).err
    assert "--image is not supported" in said
    assert "there is no --prompt that it could be the first frame of" in said
    missing = run(capsys, "compare", trained, "--prompt", tmp_path / "missing.txt", status=2).err
    assert "missing.txt" in missing
    assert "not a list of numbers" in run(capsys, "compare", trained, "--lora-scale", "1;2", status=2).err
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "compare.html").write_text("my own page")
    assert "already exists" in run(capsys, "compare", trained, "--output", mine, status=2).err
    assert (mine / "compare.html").read_text() == "my own page"


def test_a_run_whose_clips_are_gone_is_compared_without_them(
    trained: Path, tmp_path: Path, no_model: None, capsys: pytest.CaptureFixture[str]
) -> None:
    from cogtune.commands.compare.scenes import read_run_data

    copy = tmp_path / "out"
    copy.mkdir()
    text = (trained / "run.yaml").read_text()
    line = next(line for line in text.splitlines() if line.startswith("data: "))
    (copy / "run.yaml").write_text(text.replace(line, f"data: {tmp_path / 'gone'}"))
    found = read_run_data(copy, None, read_spec_of("2b"))
    assert found.samples == ()
    assert "--data FOLDER says where they are" in capsys.readouterr().err


def read_spec_of(name: str) -> ModelSpec:
    from cogtune.models.locate import locate

    return read_spec(locate(f"tiny:{name}"))


# ------------------------------------------------------------------------------------------- weights and scenes


def test_what_is_named_becomes_candidates(trained: Path, tmp_path: Path) -> None:
    both = find_candidates([str(trained), "base", str(trained / "checkpoint-1"), str(trained)])
    assert [(one.label, one.is_lora, one.step) for one in both] == [
        ("checkpoint-1", True, 1),
        ("checkpoint-2", True, 2),
    ]
    full = tmp_path / "sft" / "checkpoint-5"
    (full / "transformer").mkdir(parents=True)
    (full / "transformer" / "config.json").write_text("{}")
    (full / "state.json").write_text("{}")
    (tmp_path / "sft" / "run.yaml").write_text("")
    two = find_candidates([str(trained), str(tmp_path / "sft"), "anna/boats"])
    assert [(one.label, one.is_lora) for one in two] == [
        ("out-checkpoint-1", True),
        ("out-checkpoint-2", True),
        ("sft-checkpoint-5", False),
        ("anna-boats", True),
    ]
    (full / "transformer" / "config.json").unlink()
    (full / "latest").write_text("pytorch_model")
    (full / "pytorch_model").mkdir()
    with pytest.raises(UsageError, match="in ZeRO shards"):
        find_candidates([str(tmp_path / "sft")])


def test_an_image_to_video_model_gets_first_frames(tiny: Callable[[str], Path], film: Path, tmp_path: Path) -> None:
    spec, size = read_spec(tiny("5b-i2v")), Size(9, 64, 96)
    dataset = read_dataset(film)
    (sample,) = dataset.samples
    settings = FrameSettings(size=size, fps=8.0)
    from cogtune.config.run_config import RunConfig

    own = Sample("own", sample.video, "held out", tmp_path / "own.png")
    Image.new("RGB", (96, 64)).save(tmp_path / "own.png")
    data = RunData(RunConfig(), settings, (sample,), (own,), (Prompt("a dog", sample.video, from_video=True),))
    found = scenes_of(CompareRequest(targets=()), data, {}, spec, size, tmp_path)
    assert [(one.kind, one.trained) for one in found] == [
        ("prompt", True),
        ("held-out", False),
        *[("unrelated", False)] * 3,
    ]
    assert found[0].image is not None
    first = load_clip(sample.video, view(probe(sample.video), settings))[0].permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(Image.open(found[0].image)), first)
    assert found[1].image == tmp_path / "own.png"
    assert len({one.image for one in found}) == 5
    with pytest.raises(UsageError) as caught:
        scenes_of(CompareRequest(targets=(), prompts=("x",)), RunData(), {}, spec, size, tmp_path)
    assert "--image is required" in caught.value.details[0]


def test_prompts_are_each_asked_once_and_known_ones_are_marked(clips: Path, tmp_path: Path) -> None:
    from cogtune.config.run_config import RunConfig

    samples = read_dataset(clips).samples
    config = RunConfig(id_token="sks")
    data = RunData(config, FrameSettings(size=Size(9, 64, 96), fps=8.0), samples, samples[:2])
    request = CompareRequest(targets=(), prompts=(samples[0].caption, "a boat"), unrelated=("a dog", "a dog"))
    found = scenes_of(request, data, {"id_token": "sks"}, read_spec_of("2b"), Size(9, 64, 96), tmp_path)
    assert [(one.prompt, one.kind, one.trained) for one in found] == [
        (caption_of(samples[0], "sks"), "prompt", True),
        ("sks a boat", "prompt", False),
        (caption_of(samples[1], "sks"), "held-out", True),
        ("a dog", "unrelated", False),
    ]


@pytest.mark.parametrize("rows", [1, 3, 24])
@pytest.mark.parametrize("columns", [1, 2, 16])
@pytest.mark.parametrize("size", [(64, 96), (480, 720), (768, 1360), (1360, 768)])
def test_a_grid_stays_within_what_players_show(rows: int, columns: int, size: tuple[int, int]) -> None:
    height, width = grid._cell(*size, rows, columns)
    assert height % 2 == width % 2 == 0
    assert columns * width <= 3840
    assert 20 + rows * (20 + height) <= 4096
    assert abs(height / width - size[0] / size[1]) < 0.1
    assert 40 < width <= 240


def test_a_grid_of_many_shows_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "MOST_ROWS", 2)
    monkeypatch.setattr(grid, "MOST_COLUMNS", 1)
    write_video(tmp_path / "a.mp4", disc(1.0, count=3), 8)
    grid.write_grid(tmp_path / "grid.mp4", [("x", [tmp_path / "a.mp4"] * 2)] * 3, ["y", "z"], 8, {})
    info = probe(tmp_path / "grid.mp4")
    assert (info.height, info.width, info.num_frames) == (20 + 2 * 180, 240, 3)
