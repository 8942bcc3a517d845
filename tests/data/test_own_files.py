"""What cogtune writes into a dataset is never read as data, and what a dataset names elsewhere is not read at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from cogtune.commands import validate
from cogtune.config.resolving import resolve
from cogtune.data.layouts import own_files
from cogtune.data.layouts.datasets_library import takes_every_file
from cogtune.data.sources import Dataset, LayoutOptions, read_dataset
from cogtune.data.validation.quarantine import write_quarantine
from cogtune.data.video.clips import write_video
from cogtune.encoding import jobs
from cogtune.run import launch
from cogtune.run.checkpoints import checkpoints
from cogtune.system.errors import CogtuneError, UsageError
from tests.support.in_process import run
from tests.support.runs_in_process import fill_here, start_here
from tests.support.sampling import sampled


def frames(grey: int = 0) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.full((9, 64, 96, 3), grey, np.uint8)


def sidecar(root: Path, *names: str) -> Path:
    for grey, name in enumerate(names):
        write_video(root / f"{name}.mp4", frames(grey * 40), 8)
        (root / f"{name}.txt").write_text(f"Caption {name}.")
    return root


def ids(dataset: Dataset) -> list[str]:
    return [sample.id for sample in dataset.samples]


def of_code(dataset: Dataset, code: str) -> list[str]:
    return [found.message for found in dataset.findings if found.code == code]


# --------------------------------------------------------------------------------------------- a run's own files


def test_a_sampled_video_is_known_by_its_mark(tmp_path: Path) -> None:
    root = sidecar(tmp_path, "a")
    write_video(root / "video.mp4", frames(9), 8, own_files.MARK)
    write_video(root / "other.mp4", frames(19), 8)
    assert own_files.is_generated(root / "video.mp4")
    assert not own_files.is_generated(root / "other.mp4")
    dataset = read_dataset(root)
    assert ids(dataset) == ["a", "other"]
    assert of_code(dataset, "missing-caption") == ["other.mp4 has no caption: other.txt does not exist"]
    assert of_code(dataset, "own-files") == ["cogtune wrote video.mp4: not read as data"]
    (root / "video.txt").write_text("With a caption it is data, as the user wants.")
    assert ids(read_dataset(root)) == ["a", "other", "video"]


def test_a_quarantine_file_is_no_caption(tmp_path: Path) -> None:
    root = sidecar(tmp_path, "a")
    dataset = read_dataset(root)
    write_quarantine(root / "bad.txt", dataset, ())
    again = read_dataset(root)
    assert ids(again) == ["a"]
    assert [(found.code, found.message) for found in again.findings] == [
        ("own-files", "cogtune wrote bad.txt: not read as data")
    ]


def test_only_what_looks_like_a_run_is_passed_by(tmp_path: Path) -> None:
    root = sidecar(tmp_path, "samples/step-1/a", "checkpoint-5/b", "launch/c", "logs/d", "latents/e")
    (root / "logs" / "run.yaml").write_text("mine: true\n")
    dataset = read_dataset(root)
    assert len(dataset.samples) == 5
    assert dataset.findings == ()


@pytest.mark.parametrize("where", sampled(["data/out", "data"], "data"))
def test_a_run_inside_its_dataset_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(jobs, "fill_cache", fill_here)
    monkeypatch.setattr(launch, "start", start_here)
    data, output = sidecar(tmp_path / "data", "a", "b"), tmp_path / where
    before = ids(read_dataset(data))
    flags = ["--data", data, "--output", output, "--preset", "cpu-lora-tiny", "--size", "9x64x96"]
    every = ["--checkpoint-every", "1", "--sample-every", "1", "--sample-steps", "1"]
    run(capsys, "train", *flags, *every, "--steps", 2)
    assert [path.name for path in checkpoints(output)] == ["checkpoint-1", "checkpoint-2"]
    videos = [path for path in output.rglob("*.mp4") if own_files.is_generated(path)]
    assert videos
    dataset = read_dataset(data)
    assert ids(dataset) == before
    assert [found.code for found in dataset.findings] == ["own-files"]
    shutil.copy(videos[0], data / "video.mp4")
    run(capsys, "train", "--output", output, "--resume", "latest", "--steps", 3)
    assert [path.name for path in checkpoints(output)][-1] == "checkpoint-3"
    assert ids(read_dataset(data)) == before
    validated = json.loads(run(capsys, "dataset", "validate", data, "--size", "9x64x96", "--json").out)
    assert validated["counts"]["samples"] == 2
    assert validated["counts"]["error"] == 0


def a_run(output: Path) -> None:
    """The files of a run that matter here, under their names."""
    write_video(output / "samples" / "step-000001" / "00-x.mp4", frames(70), 8, own_files.MARK)
    (output / "samples" / "step-000001" / "samples.json").write_text("[]")
    (output / "checkpoint-1").mkdir(parents=True)
    (output / "checkpoint-1" / "state.json").write_text("{}")
    (output / "launch").mkdir()
    (output / "launch" / "index.json").write_text("[]")
    (output / "logs" / "wandb").mkdir(parents=True)
    write_video(output / "logs" / "wandb" / "x.mp4", frames(80), 8)
    (output / "run.yaml").write_text("steps: 1\n")
    (output / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')


@pytest.mark.parametrize("layout", ["sidecar", "csv", "json"])
def test_a_run_in_the_datasets_own_folder_changes_nothing(tmp_path: Path, layout: str) -> None:
    root = sidecar(tmp_path, "a", "b")
    if layout != "sidecar":
        rows = [{"file_name": f"{name}.mp4", "text": name} for name in "ab"]
        text = json.dumps(rows) if layout == "json" else "file_name,text\na.mp4,a\nb.mp4,b\n"
        (root / f"x.{layout}").write_text(text)
        for name in "ab":
            (root / f"{name}.txt").unlink()
    before = read_dataset(root)
    a_run(root)
    a_run(root / "out")
    dataset = read_dataset(root)
    assert dataset.samples == before.samples
    assert [found for found in dataset.findings if found.code != "own-files"] == list(before.findings)


def test_the_datasets_library_is_not_given_a_runs_files(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    root = sidecar(tmp_path / "data", "train/a")
    (root / "train" / "metadata.jsonl").write_text('{"file_name": "a.mp4", "text": "a"}')
    assert takes_every_file(root)
    for output in (root / "out", root):
        config = resolve(flags={"data": root, "output": output, "format": "datasets"}).config
        with pytest.raises(
            UsageError, match="is inside the dataset, and the datasets library would read its videos as data"
        ):
            validate.check_output(config)
    validate.check_output(resolve(flags={"data": root, "output": root / "out"}).config)
    a_run(root / "out")
    with pytest.raises(
        CogtuneError, match="also contains output of cogtune, which the datasets library would read: out/"
    ):
        read_dataset(root, LayoutOptions(format="datasets"))


# ------------------------------------------------------------------------------------------- paths out of a dataset


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A folder outside of every dataset, with a clip, lists, tables and a saved dataset."""
    root = sidecar(tmp_path / "secret", "a")
    (root / "prompts.txt").write_text("secret caption\n")
    (root / "videos.txt").write_text("a.mp4\n")
    (root / "metadata.csv").write_text("file_name,text\na.mp4,secret caption\n")
    (root / "metadata.jsonl").write_text('{"file_name": "a.mp4", "text": "secret caption"}\n')
    (root / "metadata.json").write_text('[{"file_name": "a.mp4", "text": "secret caption"}]\n')
    return root


LINKED = {
    "prompts.txt": {"prompts.txt": "prompts.txt"},
    "videos.txt": {"videos.txt": "videos.txt"},
    "metadata.csv": {"metadata.csv": "metadata.csv"},
    "metadata.jsonl": {"metadata.jsonl": "metadata.jsonl"},
    "a clip": {"b.mp4": "a.mp4"},
    "a caption": {"a.txt": "prompts.txt"},
    "a caption elsewhere": {"a.caption": "prompts.txt"},
}


@pytest.mark.parametrize("case", LINKED)
def test_a_link_out_of_the_dataset_is_refused_unless_allowed(tmp_path: Path, secret: Path, case: str) -> None:
    root = tmp_path / "data"
    write_video(root / "a.mp4", frames(), 8)
    if case == "prompts.txt":
        (root / "videos.txt").write_text("a.mp4\n")
    elif case == "videos.txt":
        (root / "prompts.txt").write_text("one\n")
    elif case == "a clip":
        (root / "a.txt").write_text("one")
        (root / "b.txt").write_text("one")
    for name, target in LINKED[case].items():
        (root / name).symlink_to(secret / target)
    dataset = read_dataset(root)
    refused = [found for found in dataset.findings if found.code == "outside-folder"]
    assert len(refused) == 1
    assert "is a link that leads out of the dataset's folder" in refused[0].message
    assert "--allow-outside" in refused[0].hint
    assert all("secret" not in sample.caption for sample in dataset.samples)
    assert "secret caption" not in repr(dataset)
    allowed = read_dataset(root, LayoutOptions(allow_outside=True))
    assert [found for found in allowed.findings if found.severity == "error"] == []
    assert allowed.samples


def test_a_linked_array_or_sub_folder_is_not_looked_into(tmp_path: Path, secret: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    (root / "metadata.json").symlink_to(secret / "metadata.json")
    (root / "train").symlink_to(secret)
    with pytest.raises(CogtuneError, match="is not a dataset"):
        read_dataset(root)


def _saved(root: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"video": ["a.mp4"], "text": ["secret caption"]})
    datasets.DatasetDict({"train": table}).save_to_disk(root)
    write_video(root / "a.mp4", frames(), 8)
    return root


def _state(root: Path, change: Callable[[dict[str, object]], object]) -> None:
    path = root / "train" / "state.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def _card(root: Path, files: object) -> Path:
    root.mkdir()
    head = yaml.safe_dump({"configs": [{"config_name": "default", "data_files": files}]})
    (root / "README.md").write_text(f"---\n{head}---\n# A dataset\n")
    write_video(root / "a.mp4", frames(), 8)
    return root


@pytest.mark.parametrize(
    "named", ["../../other/train/data-00000-of-00001.arrow", "/etc/hostname", "https://a.b/c.arrow"]
)
def test_a_saved_state_that_names_files_elsewhere_is_refused(tmp_path: Path, named: str) -> None:
    _saved(tmp_path / "other")
    root = _saved(tmp_path / "data")
    assert ids(read_dataset(root)) == ["a"]
    _state(root, lambda value: value.update(_data_files=[{"filename": named}]))
    dataset = read_dataset(root)
    assert dataset.samples == ()
    (found,) = dataset.findings
    assert (found.code, found.where) == ("outside-folder", "train/state.json")
    assert found.message == f"train/state.json names '{named}', which is outside the dataset's folder"


@pytest.mark.parametrize("link", ["data-00000-of-00001.arrow", "state.json"])
def test_a_saved_file_that_is_a_link_out_is_refused(tmp_path: Path, link: str) -> None:
    other, root = _saved(tmp_path / "other"), _saved(tmp_path / "data")
    (root / "train" / link).unlink()
    (root / "train" / link).symlink_to(other / "train" / link)
    dataset = read_dataset(root)
    assert [(found.code, found.where) for found in dataset.findings] == [("outside-folder", f"train/{link}")]
    assert ids(read_dataset(root, LayoutOptions(allow_outside=True))) == ["a"]


def test_a_split_that_is_a_link_out_is_refused(tmp_path: Path) -> None:
    other, root = _saved(tmp_path / "other"), _saved(tmp_path / "data")
    shutil.rmtree(root / "train")
    (root / "train").symlink_to(other / "train")
    assert [(found.code, found.where) for found in read_dataset(root).findings] == [("outside-folder", "train")]


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ([], "all of it is list"),
        ({"_data_files": 7}, "_data_files is int"),
        ({"_data_files": [7]}, "_data_files is int"),
    ],
)
def test_a_saved_state_of_another_shape_is_told(tmp_path: Path, value: object, what: str) -> None:
    root = _saved(tmp_path / "data")
    (root / "train" / "state.json").write_text(json.dumps(value))
    with pytest.raises(CogtuneError, match=f"was not written by save_to_disk: {what}"):
        read_dataset(root)


@pytest.mark.parametrize(
    "files",
    [
        "../secret/metadata.csv",
        [{"split": "train", "path": "../secret/*.csv"}],
        {"train": ["/etc/hostname"]},
        "https://example.org/x.csv",
        "zip://x.csv::https://example.org/x.zip",
    ],
)
def test_a_card_that_names_files_elsewhere_is_refused(tmp_path: Path, secret: Path, files: object) -> None:
    pytest.importorskip("datasets")
    root = _card(tmp_path / "data", files)
    dataset = read_dataset(root, LayoutOptions(format="datasets"))
    assert dataset.samples == ()
    assert {(found.code, found.where) for found in dataset.findings} == {("outside-folder", "README.md")}


def _with_override(root: Path) -> Path:
    """The folder with what its card says moved to the file that overrides it."""
    (root / ".huggingface.yaml").write_text((root / "README.md").read_text().split("---\n")[1])
    (root / "README.md").write_text("---\npretty_name: ok\n---\n")
    return root


def test_what_overrides_a_card_is_held_to_the_same(tmp_path: Path, secret: Path) -> None:
    pytest.importorskip("datasets")
    root = _with_override(_card(tmp_path / "data", "../secret/metadata.csv"))
    dataset = read_dataset(root, LayoutOptions(format="datasets"))
    assert dataset.samples == ()
    assert {(found.code, found.where) for found in dataset.findings} == {("outside-folder", ".huggingface.yaml")}
    (tmp_path / "elsewhere.yaml").write_text("{}")
    (root / ".huggingface.yaml").unlink()
    (root / ".huggingface.yaml").symlink_to(tmp_path / "elsewhere.yaml")
    (found,) = read_dataset(root, LayoutOptions(format="datasets")).findings
    assert found.message == ".huggingface.yaml is a link that leads out of the dataset's folder"


def test_a_card_ends_where_the_library_ends_it(tmp_path: Path, secret: Path) -> None:
    pytest.importorskip("datasets")
    root = _card(tmp_path / "data", "../secret/metadata.csv")
    card = (root / "README.md").read_text()
    (root / "README.md").write_text(card.replace("configs:", "---x: 1\nconfigs:"))
    dataset = read_dataset(root, LayoutOptions(format="datasets"))
    assert {(found.code, found.where) for found in dataset.findings} == {("outside-folder", "README.md")}


def test_a_card_that_names_its_own_files_is_read(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    root = _card(tmp_path / "data", [{"split": "train", "path": "tables/*.csv"}])
    (root / "tables").mkdir()
    (root / "tables" / "x.csv").write_text("file_name,text\na.mp4,one\n")
    assert ids(read_dataset(root, LayoutOptions(format="datasets"))) == ["a"]


def test_a_card_whose_head_is_damaged_is_told(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    root = _card(tmp_path / "data", "x.csv")
    (root / "README.md").write_text("---\na: [\n---\n")
    with pytest.raises(CogtuneError, match=r"the metadata of .*README\.md is not YAML"):
        read_dataset(root, LayoutOptions(format="datasets"))
