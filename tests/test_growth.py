"""Reading and comparing take as much more work as there is more data, and no more: lines of Python are counted."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from cogtune.data.checks import check_dataset
from cogtune.data.frames import FrameSettings
from cogtune.data.sources import read_dataset
from cogtune.data.video import write_video
from cogtune.errors import CogtuneError
from cogtune.geometry import Size

SETTINGS = FrameSettings(size=Size(9, 64, 96), fps=8)
COUNT = 400


def work(function: Callable[[], object]) -> int:
    """The lines of Python that a call takes in this thread."""
    lines = 0

    def trace(_frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return lines


def one_clip(root: Path, count: int) -> None:
    (root / "prompts.txt").write_text("".join(f"Caption number {number}.\n" for number in range(count)))
    (root / "videos.txt").write_text("a.mp4\n" * count)


def one_caption(root: Path, count: int) -> None:
    rows = "".join(f"{number}.mp4,A caption that all share\n" for number in range(count))
    (root / "metadata.csv").write_text(f"file_name,text\n{rows}")
    links(root, count)


def links(root: Path, count: int) -> None:
    for number in range(count):
        os.link(root / "a.mp4", root / f"{number}.mp4")


def beside(root: Path, count: int) -> None:
    links(root, count)
    for number in range(count):
        (root / f"{number}.txt").write_text(f"Caption {number} here")


def labels(root: Path, count: int) -> None:
    links(root, count)
    (root / "labels").mkdir()
    for number in range(count):
        (root / "labels" / f"{number}.txt").write_text(f"Caption {number} here")


def elsewhere(root: Path, count: int) -> None:
    for number in range(count):
        (root / "train" / str(number)).mkdir(parents=True)
        os.link(root / "a.mp4", root / "train" / str(number) / "video.mp4")
    rows = "".join(f"{number}/video.mp4,Caption {number} here\n" for number in range(count))
    (root / "metadata.csv").write_text(f"file_name,text\n{rows}")


def misspelt(root: Path, count: int) -> None:
    links(root, count)
    rows = "".join(f"{number}x.mp4,Caption {number} here\n" for number in range(count))
    (root / "metadata.csv").write_text(f"file_name,text\n{rows}")


def bad_rows(root: Path, count: int) -> None:
    (root / "metadata.csv").write_text("file_name,text\n" + 'a.mp4,"open and\n' * count)


def unpaired(root: Path, count: int) -> None:
    one_clip(root, count)
    with (root / "prompts.txt").open("a") as file:
        file.write("\n" * 3 + "one more\n")


@pytest.mark.parametrize(
    "make",
    [one_clip, one_caption, beside, labels, elsewhere, misspelt, bad_rows, unpaired],
    ids=lambda make: make.__name__,
)
def test_twice_the_samples_take_twice_the_work(tmp_path: Path, make: Callable[[Path, int], None]) -> None:
    took = []
    for count in (COUNT, 2 * COUNT):
        root = tmp_path / str(count)
        write_video(root / "a.mp4", np.zeros((9, 64, 96, 3), np.uint8), 8)
        (root / "a.txt").write_text("A caption of its own.")
        make(root, count)
        dataset = read_dataset(root)

        def read(root: Path = root) -> None:
            read_dataset(root)

        took.append(work(read))
        if make in (one_clip, one_caption, unpaired):  # files that several samples share are opened once
            assert len(check_dataset(dataset, SETTINGS, workers=1).infos) >= count
    assert took[1] < 2.3 * took[0], took


def test_a_clip_that_many_samples_share_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "a.mp4", np.zeros((9, 64, 96, 3), np.uint8), 8)
    one_clip(tmp_path, 50)
    asked: list[Path] = []

    def inspect(jobs: Any, *, workers: int | None = None) -> Any:
        asked.extend(job.video for job in jobs)
        yield from ()
        raise CogtuneError("enough")

    monkeypatch.setattr("cogtune.data.checks.inspect", inspect)
    with pytest.raises(CogtuneError, match="enough"):
        check_dataset(read_dataset(tmp_path), SETTINGS)
    assert asked == [tmp_path / "a.mp4"]


def test_reading_tells_how_far_it_is(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", np.zeros((9, 64, 96, 3), np.uint8), 8)
    one_clip(tmp_path, 2500)
    told: list[tuple[int, int]] = []
    read_dataset(tmp_path, tell=lambda done, total: told.append((done, total)))
    assert told == [(1000, 2500), (2000, 2500), (2500, 2500)]
