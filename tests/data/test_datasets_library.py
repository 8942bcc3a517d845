"""What the datasets library saves and loads gives the samples that a folder of files gives."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogtune.commands import validate
from cogtune.config.resolving import resolve
from cogtune.data.sources import Dataset, LayoutOptions, read_dataset
from cogtune.data.video.clips import write_video
from cogtune.models.checkpoint_configs import read_spec
from cogtune.system.errors import CogtuneError

datasets = pytest.importorskip("datasets", reason="the extra 'datasets' is not installed")

CAPTIONS = ["A black frame.", 'He says "hello",\nand goes.', "Grau, 猫."]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))


@pytest.fixture
def videos(tmp_path: Path) -> list[Path]:
    made = [tmp_path / "made" / f"{name}.mp4" for name in "abc"]
    for grey, path in enumerate(made):
        write_video(path, np.full((12, 64, 96, 3), 80 * grey, np.uint8), 8)
    return made


def picture(grey: int) -> bytes:
    made = io.BytesIO()
    Image.new("L", (96, 64), grey).convert("RGB").save(made, "PNG")
    return made.getvalue()


def same(dataset: Dataset, videos: list[Path]) -> None:
    """The dataset is of these clips and the captions, and nothing is wrong with it."""
    assert dataset.findings == ()
    assert [sample.caption for sample in dataset.samples] == CAPTIONS
    assert [sample.video.read_bytes() for sample in dataset.samples] == [path.read_bytes() for path in videos]


def written(root: Path) -> list[Path]:
    return sorted(path for path in (root / ".cogtune" / "media").rglob("*") if path.is_file())


def test_clips_inside_a_saved_dataset_are_written_out_once(tmp_path: Path, videos: list[Path]) -> None:
    root = tmp_path / "saved"
    columns = {
        "video": [path.read_bytes() for path in videos],
        "prompt": CAPTIONS,
        "image": [{"bytes": picture(grey), "path": None} for grey in (0, 80, 160)],
        "score": [1, 2, 3],
    }
    datasets.Dataset.from_dict(columns).save_to_disk(root)
    dataset = read_dataset(root)  # detected by what save_to_disk leaves
    same(dataset, videos)
    assert dataset.layout == "the train split that the datasets library reads: video, prompt, image"
    assert [sample.id for sample in dataset.samples] == ["train/000001", "train/000002", "train/000003"]
    assert [sample.image.read_bytes() for sample in dataset.samples if sample.image] == [
        picture(grey) for grey in (0, 80, 160)
    ]
    times = {path: path.stat().st_mtime_ns for path in written(root)}
    assert len(times) == 6
    assert read_dataset(root) == dataset
    assert {path: path.stat().st_mtime_ns for path in written(root)} == times
    damaged = written(root)[0]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    same(read_dataset(root), videos)


def test_video_and_image_features_keep_their_names(tmp_path: Path, videos: list[Path]) -> None:
    features = datasets.Features(
        {"video": datasets.Video(), "text": datasets.Value("string"), "image": datasets.Image()}
    )
    rows = [
        {"video": {"bytes": path.read_bytes(), "path": path.name}, "text": caption, "image": None}
        for path, caption in zip(videos, CAPTIONS, strict=True)
    ]
    table = datasets.Dataset.from_list(rows, features=features)
    datasets.DatasetDict({"test": table.select([0]), "train": table}).save_to_disk(tmp_path / "saved")
    dataset = read_dataset(tmp_path / "saved", LayoutOptions(media=tmp_path / "elsewhere"))
    same(dataset, videos)
    assert [sample.id for sample in dataset.samples] == ["a", "b", "c"]
    assert all(sample.video.is_relative_to(tmp_path / "elsewhere") for sample in dataset.samples)


def test_paths_in_a_saved_dataset_follow_the_rules_of_paths(tmp_path: Path, videos: list[Path]) -> None:
    root = tmp_path / "saved"
    columns = {"clip": ["a.mp4", "../made/b.mp4", str(videos[2]), "gone.mp4"], "caption": [*CAPTIONS, "Gone."]}
    datasets.Dataset.from_dict(columns).save_to_disk(root)
    (root / "a.mp4").write_bytes(videos[0].read_bytes())
    told = [(found.code, found.where) for found in read_dataset(root).findings]
    assert told == [("outside-folder", "train:2"), ("outside-folder", "train:3"), ("missing-video", "gone")]
    assert len(read_dataset(root, LayoutOptions(allow_outside=True)).samples) == 4


def test_rows_without_a_value_are_told_by_their_number(tmp_path: Path, videos: list[Path]) -> None:
    columns = {"video": [videos[0].read_bytes(), None], "prompt": [None, "A caption."]}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "saved")
    dataset = read_dataset(tmp_path / "saved")
    assert [(found.code, found.where, found.message) for found in dataset.findings] == [
        ("missing-value", "train:1", "row 1 has no caption: its 'prompt' is missing"),
        ("missing-value", "train:2", "row 2 has no video: its 'video' is missing"),
    ]


def test_webdataset_shards_are_read(tmp_path: Path, videos: list[Path]) -> None:
    root = tmp_path / "shards"
    root.mkdir()
    with tarfile.open(root / "train-0000.tar", "w") as shard:
        for path, caption in zip(videos, CAPTIONS, strict=True):
            for suffix, data in (("mp4", path.read_bytes()), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{path.stem}.{suffix}")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
    dataset = read_dataset(root, LayoutOptions(format="datasets"))
    same(dataset, videos)
    assert dataset.layout.endswith("reads: mp4, txt")


def test_a_video_folder_is_read(tmp_path: Path, videos: list[Path]) -> None:
    root = tmp_path / "folder"
    (root / "train").mkdir(parents=True)
    lines = []
    for path, caption in zip(videos, CAPTIONS, strict=True):
        (root / "train" / path.name).write_bytes(path.read_bytes())
        lines.append(json.dumps({"file_name": path.name, "text": caption}))
    (root / "train" / "metadata.jsonl").write_text("\n".join(lines))
    dataset = read_dataset(root, LayoutOptions(format="datasets"))
    same(dataset, videos)
    assert [sample.id for sample in dataset.samples] == ["train/a", "train/b", "train/c"]
    assert written(root) == []


def test_parquet_with_clips_inside_is_read(tmp_path: Path, videos: list[Path]) -> None:
    root = tmp_path / "parquet"
    root.mkdir()
    columns = {"video": [path.read_bytes() for path in videos], "caption": CAPTIONS}
    datasets.Dataset.from_dict(columns).to_parquet(root / "train-00000-of-00001.parquet")
    same(read_dataset(root, LayoutOptions(format="datasets")), videos)


def test_what_cannot_be_read_is_an_error_in_words(
    tmp_path: Path, videos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CogtuneError, match="the datasets library cannot read"):
        read_dataset(tmp_path / "empty", LayoutOptions(format="datasets"))
    table = datasets.Dataset.from_dict({"video": ["a.mp4"], "prompt": ["A frame."]})
    datasets.DatasetDict({"a": table, "b": table}).save_to_disk(tmp_path / "splits")
    with pytest.raises(CogtuneError, match="has the splits a and b, but none is called train"):
        read_dataset(tmp_path / "splits")
    table.rename_column("prompt", "prmpt").save_to_disk(tmp_path / "columns")
    with pytest.raises(CogtuneError, match="did you mean 'prmpt'"):
        read_dataset(tmp_path / "columns")
    table.save_to_disk(tmp_path / "cut")
    (tmp_path / "cut" / "data-00000-of-00001.arrow").write_bytes(b"no arrow")
    with pytest.raises(CogtuneError, match="the datasets library cannot read"):
        read_dataset(tmp_path / "cut")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CogtuneError) as caught:
        read_dataset(tmp_path / "splits")
    assert caught.value.hint == "run `pip install 'cogtune[datasets]'`"


def test_a_saved_dataset_can_be_trained_on(tmp_path: Path, videos: list[Path], tiny: Callable[[str], Path]) -> None:
    columns = {"video": [path.read_bytes() for path in videos], "prompt": CAPTIONS}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "saved")
    config = resolve(preset_name="cpu-lora-tiny", flags={"data": tmp_path / "saved"}).config.with_absolute_paths()
    dataset = validate.checked_dataset(config, read_spec(tiny("2b")))
    assert [sample.video.parent.parent.name for sample in dataset.samples] == ["media"] * 3
