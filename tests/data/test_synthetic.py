"""The drawn dataset is real, varied, true to its captions, small and the same each time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cogtune.data import synthetic
from cogtune.data.frames import FrameSettings
from cogtune.data.sources import Sample, read_dataset
from cogtune.data.synthetic import COLOURS, FORMATS, MOTIONS, SHAPES, draw_dataset
from cogtune.data.validation.checks import check_dataset
from cogtune.data.video.clips import probe, read_frames
from cogtune.models.geometry import Size


@pytest.fixture(scope="module")
def samples(clips: Path) -> tuple[Sample, ...]:
    dataset = read_dataset(clips)
    assert dataset.findings == ()
    return dataset.samples


def words(caption: str) -> tuple[str, str, str]:
    """The colour, the shape and the motion that a caption names."""
    _, colour, shape, rest = caption.split(" ", 3)
    return colour, shape, next(motion for motion in MOTIONS if rest.startswith(motion))


def centres(sample: Sample) -> np.ndarray:
    """Where the shape is in each frame, in shares of width and height, and its pixels: ``[F, 3]``."""
    info = probe(sample.video)
    paint = np.array(COLOURS[words(sample.caption)[0]])
    found = []
    for frame in read_frames(sample.video, range(info.num_frames)).astype(int):
        y, x = np.nonzero(np.abs(frame - paint).max(axis=2) < 45)
        found.append((x.mean() / info.width, y.mean() / info.height, len(x)))
    return np.array(found)


def test_clips_differ_in_size_and_rate(samples: tuple[Sample, ...]) -> None:
    infos = [probe(sample.video) for sample in samples]
    assert [(info.height, info.width, info.fps) for info in infos] == list(FORMATS)
    assert [info.num_frames for info in infos] == [20, 60, 75, 31, 40, 62]
    assert [round(info.duration, 2) for info in infos] == [2.5, 2.5, 2.5, 2.48, 2.5, 2.48]


@pytest.mark.parametrize(("size", "fps"), [("9x64x96", 8), ("17x64x96", 16)])
def test_every_tiny_model_can_be_trained_on_them(clips: Path, size: str, fps: float) -> None:
    report = check_dataset(read_dataset(clips), FrameSettings(size=Size.parse(size), fps=fps))
    assert report.ok
    assert {found.code for found in report.findings} <= {"slow", "cropped", "only-part"}


def test_captions_are_sentences_that_all_differ(samples: tuple[Sample, ...]) -> None:
    captions = [sample.caption for sample in samples]
    assert all(caption.startswith(("A ", "An ")) and caption.endswith(".") for caption in captions)
    assert all(("An " in caption) == (words(caption)[0] == "orange") for caption in captions)
    for part in range(3):
        assert len({words(caption)[part] for caption in captions}) == 6


def test_captions_are_true(samples: tuple[Sample, ...]) -> None:
    """The named colour is there, and moves as the caption says."""
    paths = {words(sample.caption)[2].split()[0]: centres(sample) for sample in samples}
    assert set(paths) == {"slides", "bounces", "rises", "grows", "circles", "spins"}
    x, y, area = 0, 1, 2
    assert np.all(np.diff(paths["slides"][:, x]) > 0)
    assert np.ptp(paths["slides"][:, x]) > 0.5
    assert np.ptp(paths["slides"][:, y]) < 0.02
    assert np.all(np.diff(paths["rises"][:, y]) < 0.005)
    assert np.ptp(paths["rises"][:, y]) > 0.45
    heights = np.diff(paths["bounces"][:, y])
    assert np.count_nonzero(np.diff(np.sign(heights[np.abs(heights) > 0.004]))) >= 4  # up and down, thrice
    assert np.ptp(paths["bounces"][:, x]) < 0.02
    assert paths["grows"][:, area].max() > 3 * paths["grows"][:, area].min()
    around = np.unwrap(np.arctan2(paths["circles"][:, y] - 0.5, paths["circles"][:, x] - 0.5))
    assert around[-1] - around[0] == pytest.approx(2 * np.pi, abs=0.3)  # y goes down: a growing angle is clockwise
    assert np.ptp(paths["spins"][:, :2], axis=0).max() < 0.03
    assert np.ptp(paths["spins"][:, area]) < 0.05 * paths["spins"][:, area].mean()


def test_a_spinning_shape_turns_clockwise(samples: tuple[Sample, ...]) -> None:
    sample = next(sample for sample in samples if "spins" in sample.caption)
    info = probe(sample.video)
    paint = np.array(COLOURS[words(sample.caption)[0]])
    angles = []
    for frame in read_frames(sample.video, range(info.num_frames // 3)).astype(int):
        y, x = np.nonzero(np.abs(frame - paint).max(axis=2) < 45)
        x, y = x - x.mean(), y - y.mean()
        angles.append(0.5 * np.arctan2(2 * (x * y).mean(), (x * x).mean() - (y * y).mean()))  # of its long axis
    turned = np.unwrap(np.array(angles), period=np.pi)
    assert turned[-1] - turned[0] == pytest.approx(2 * np.pi / 3, abs=0.2)


def test_edges_are_antialiased(samples: tuple[Sample, ...]) -> None:
    sample = next(sample for sample in samples if "disc" in sample.caption)
    frame = read_frames(sample.video, [10])[0].astype(int)
    paint = np.array(COLOURS[words(sample.caption)[0]])
    row = np.abs(frame[48] - paint).sum(axis=1)  # along a line through the disc: background, edge, paint
    between = np.count_nonzero((row > 60) & (row < 0.8 * row[0]))
    assert 2 <= between <= 20


def test_the_same_seed_draws_the_same_files(tmp_path: Path, clips: Path) -> None:
    draw_dataset(tmp_path / "again", clips=2, seed=0)
    draw_dataset(tmp_path / "other", clips=2, seed=1)
    names = (clips / "videos.txt").read_text().split()[:2]
    assert (tmp_path / "again" / "videos.txt").read_text().split() == names
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (clips / name).read_bytes()
    assert (tmp_path / "other" / "prompts.txt").read_text() != (tmp_path / "again" / "prompts.txt").read_text()


def test_six_clips_are_small(clips: Path) -> None:
    assert sum(path.stat().st_size for path in (clips / "videos").iterdir()) < 200_000


def test_more_clips_go_on_without_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "write_video", lambda path, frames, fps: path.parent.mkdir(exist_ok=True))
    draw_dataset(tmp_path, clips=14)
    captions = (tmp_path / "prompts.txt").read_text().splitlines()
    assert len(set(captions)) == 14
    assert {words(caption)[1] for caption in captions} == set(SHAPES)
    assert not [caption for caption in captions if "spins" in caption and words(caption)[1] in ("disc", "ring")]
