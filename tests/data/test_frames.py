"""Training sees the right frames, upright, resized without stretching and cut in the middle."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cogtune.data import frames
from cogtune.data.frames import (
    FrameSettings,
    available_frames,
    bucket_loss,
    clips_per_bucket,
    load_clip,
    load_image,
    reshape,
    settings_for,
    view,
)
from cogtune.data.video.clips import VideoInfo, iter_frames, probe, read_frames
from cogtune.data.video.images import read_image
from cogtune.data.video.stamp import Stamp
from cogtune.models.geometry import Crop, Reshape, Size, fit
from cogtune.system.errors import CogtuneError


def settings(size: str = "9x48x64", fps: float = 8, start: int = 0, **more: Any) -> FrameSettings:
    return FrameSettings(size=Size.parse(size), fps=fps, skip_start=start, **more)


def info(num_frames: int, fps: float, height: int = 48, width: int = 64) -> VideoInfo:
    return VideoInfo(num_frames, fps, height, width, num_frames / fps, "h264", "yuv420p", 0, 1.0)


def indices(clip: VideoInfo, wanted: FrameSettings, identity: str = "") -> list[int]:
    return list(view(clip, wanted, identity).indices)


def disc(height: int, width: int, radius: float) -> np.ndarray:
    """A white disc in the middle of a black frame."""
    y, x = np.mgrid[0:height, 0:width] + 0.5
    inside = np.hypot(x - width / 2, y - height / 2) < radius
    return np.repeat(inside[..., None], 3, axis=2).astype(np.uint8) * 255


def extent(frame: torch.Tensor) -> tuple[tuple[int, int], tuple[float, float]]:
    """How many rows and columns something bright in ``[3, H, W]`` covers, and its middle row and column."""
    y, x = np.nonzero((frame[0] > 127).numpy())
    return (len(set(y)), len(set(x))), (y.mean() + 0.5, x.mean() + 0.5)


# -------------------------------------------------------------------------------------------- choosing frames


@pytest.mark.parametrize(
    ("clip", "wanted", "expected"),
    [
        ((195, 30.0), settings("9x48x64", 8), [0, 4, 8, 11, 15, 19, 23, 26, 30]),
        ((195, 30.0), settings("5x48x64", 8, start=100), [100, 104, 108, 111, 115]),
        ((20, 8.0), settings("5x48x64", 16), [0, 1, 2, 3, 4]),
        ((20, 16.0), settings("5x48x64", 16), [0, 1, 2, 3, 4]),
        ((40, 23.976), settings("3x48x64", 24), [0, 1, 2]),
    ],
)
def test_frames_are_chosen_by_time(clip: tuple[int, float], wanted: FrameSettings, expected: list[int]) -> None:
    assert indices(info(*clip), wanted) == expected


def test_a_clip_too_short_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match=r"needs 31 frames for 9 at 8 fps \(it runs at 30 fps\), but has 30"):
        view(info(30, 30.0), settings())
    with pytest.raises(ValueError, match=r"needs 31 frames .* but has 30"):
        view(info(40, 30.0), settings(skip_end=10))
    with pytest.raises(ValueError, match="needs 9 frames to spread 9 over it, but has 8"):
        view(info(20, 30.0), settings(start=7, skip_end=5, sampling="uniform"))


@pytest.mark.parametrize(
    ("clip", "wanted", "expected"),
    [
        ((195, 30.0), settings("5x48x64"), [0, 49, 97, 146, 194]),
        ((195, 30.0), settings("5x48x64", start=100, skip_end=14), [100, 120, 140, 160, 180]),
        ((9, 30.0), settings(), list(range(9))),
        ((11, 8.0), settings(), [0, 1, 3, 4, 5, 6, 8, 9, 10]),
        ((12, 8.0), settings("1x48x64", start=3), [3]),
    ],
)
def test_uniform_frames_reach_from_the_first_to_the_last(
    clip: tuple[int, float], wanted: FrameSettings, expected: list[int]
) -> None:
    assert indices(info(*clip), replace(wanted, sampling="uniform")) == expected


@pytest.mark.parametrize("sampling", ["head", "uniform", "random-start"])
def test_no_frame_comes_twice_and_none_is_from_what_is_skipped(sampling: Any) -> None:
    for count in range(14, 60):
        for fps in (4.0, 7.9, 8.0, 23.976, 60.0):
            clip, wanted = info(count, fps), settings(start=2, skip_end=3, sampling=sampling)
            if available_frames(clip, wanted) < 9:
                continue
            chosen = indices(clip, wanted, "ab")
            assert len(set(chosen)) == 9
            assert chosen == sorted(chosen)
            assert chosen[0] >= 2
            assert chosen[-1] < count - 3


def test_frames_given_is_just_what_can_be_taken() -> None:
    for sampling in ("head", "uniform", "random-start"):
        for count in range(12, 40):
            clip = info(count, 11.0)
            wanted = settings(start=1, skip_end=2, sampling=sampling)
            given = available_frames(clip, wanted)
            assert len(indices(clip, replace(wanted, size=Size(given, 48, 64)), "ab")) == given
            with pytest.raises(ValueError, match="needs"):
                view(clip, replace(wanted, size=Size(given + 1, 48, 64)), "ab")


def uneven(seed: int) -> VideoInfo:
    """A clip of 30 frames a second or so, with pauses."""
    gaps = np.random.default_rng(seed).choice(
        [0.03, 0.033, 0.036, 0.07, 0.4, 2.0], 60, p=[0.3, 0.3, 0.3, 0.06, 0.02, 0.02]
    )
    times = tuple(float(time) for time in np.cumsum([0.0, *gaps]))
    return replace(info(len(times), 30.0), times=times)


@pytest.mark.parametrize("sampling", ["head", "uniform", "random-start"])
def test_what_can_be_taken_of_an_uneven_clip_is_taken(sampling: Any) -> None:
    for seed in range(50):
        clip, wanted = uneven(seed), settings(start=1, skip_end=2, sampling=sampling)
        given = available_frames(clip, wanted)
        for number in range(5):
            chosen = indices(clip, replace(wanted, size=Size(max(1, given - number), 48, 64)), f"clip {number}")
            assert len(set(chosen)) == max(1, given - number)
            assert chosen == sorted(chosen)
            assert 1 <= chosen[0] <= chosen[-1] < clip.num_frames - 2
        with pytest.raises(ValueError, match="need"):
            view(clip, replace(wanted, size=Size(given + 1, 48, 64)), "ab")


def test_a_drawn_start_belongs_to_the_clip_and_the_seed() -> None:
    clip, wanted = info(300, 8.0), settings(sampling="random-start")
    starts = [indices(clip, wanted, f"clip {number}")[0] for number in range(2000)]
    assert starts[:3] == [indices(clip, wanted, f"clip {number}")[0] for number in range(3)]
    assert indices(clip, replace(wanted, seed=1), "clip 0") != indices(clip, wanted, "clip 0")
    assert indices(clip, wanted, "a") == [indices(clip, wanted, "a")[0] + frame for frame in range(9)]
    assert min(starts) == 0
    assert max(starts) == 291
    assert np.mean(starts) == pytest.approx(145.5, abs=8)
    with pytest.raises(TypeError, match="which was not given"):
        view(clip, wanted)
    assert not settings().draws


def test_the_view_of_the_first_frame_is_cut_as_the_clips() -> None:
    seen = view(info(195, 30.0), settings("5x48x64", reshape="random"), "ab")
    first = seen.first_frame()
    assert (first.indices, first.size, first.crop) == ((0,), Size(1, 48, 64), seen.crop)


def test_settings_that_make_no_sense_are_refused() -> None:
    mistakes: list[dict[str, Any]] = [{"fps": 0.0}, {"fps": 8.0, "skip_start": -1}, {"fps": 8.0, "skip_end": -1}]
    for wrong in mistakes:
        with pytest.raises(ValueError, match="skipped frames at least 0"):
            FrameSettings(size=Size(9, 48, 64), **wrong)


# --------------------------------------------------------------------------------------------------- buckets

BUCKETS = tuple(map(Size.parse, ("49x480x720", "49x480x848", "25x512x512", "49x720x480")))


@pytest.mark.parametrize(
    ("clip", "expected"),
    [
        (info(150, 24.0, 1080, 1920), "49x480x848"),  # 1% is cut away, of 480x720 16%
        (info(150, 24.0, 480, 720), "49x480x720"),
        (info(150, 24.0, 720, 480), "49x720x480"),
        (info(100, 24.0, 1080, 1920), "25x512x512"),  # 33 frames at 8 fps: too short for the others
        (info(150, 24.0, 1024, 1024), "49x480x720"),  # a third of it cut away, where 25 frames leave out half
        (info(1000, 24.0, 1024, 1024), "25x512x512"),  # most of a long clip is left out in any case
        (info(70, 24.0, 1080, 1920), "25x512x512"),  # too short for any
    ],
)
def test_each_clip_goes_to_the_bucket_that_loses_least(clip: VideoInfo, expected: str) -> None:
    wanted = settings("49x480x848", buckets=BUCKETS)
    assert settings_for(clip, wanted) == settings(expected)
    if available_frames(clip, wanted) >= 25:
        assert view(clip, wanted).size == Size.parse(expected)


def test_the_loss_is_the_sum_of_three_shares() -> None:
    wanted = settings("49x480x720")
    square = info(147, 24.0, 1024, 1024)  # 49 frames at 8 fps
    assert bucket_loss(square, wanted, Size(49, 512, 512)) == 0
    assert bucket_loss(square, wanted, Size(49, 480, 720)) == pytest.approx(1 / 3)
    assert bucket_loss(square, wanted, Size(25, 512, 512)) == pytest.approx(24 / 49)
    assert bucket_loss(square, wanted, Size(49, 2048, 2048)) == pytest.approx(3 / 4)
    assert bucket_loss(square, wanted, Size(25, 2048, 4096)) == pytest.approx(1 / 2 + 24 / 49 + 15 / 16)


def test_of_equal_buckets_the_one_named_first_is_taken() -> None:
    clip = info(147, 24.0, 1024, 1024)
    for buckets in (("49x256x256", "49x512x512"), ("49x512x512", "49x256x256")):
        sizes = tuple(map(Size.parse, buckets))
        assert settings_for(clip, settings(buckets=sizes)).size == sizes[0]


def test_the_bucket_plan_names_every_bucket() -> None:
    wide, tall = info(150, 24.0, 1080, 1920), info(150, 24.0, 720, 480)
    plan = clips_per_bucket([wide, tall, wide], settings("49x480x848", buckets=BUCKETS))
    assert [len(clips) for clips in plan.values()] == [0, 2, 0, 1]
    assert tuple(plan) == BUCKETS
    assert clips_per_bucket([wide], settings()) == {Size(9, 48, 64): [wide]}


# ------------------------------------------------------------------------------------------------- reshaping


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((90, 160), (96, 96)),
        ((160, 90), (96, 96)),
        ((100, 100), (48, 80)),
        ((100, 100), (200, 120)),
        ((64, 96), (64, 96)),
    ],
)
def test_a_disc_stays_round_and_in_the_middle(source: tuple[int, int], target: tuple[int, int]) -> None:
    radius = 0.2 * min(source)
    reshaped = reshape(disc(*source, radius)[np.newaxis], Size(1, *target))
    assert reshaped.shape == (1, 3, *target)
    assert reshaped.dtype == torch.uint8
    assert reshaped.is_contiguous()
    (rows, columns), (middle_row, middle_column) = extent(reshaped[0])
    scale = max(target[0] / source[0], target[1] / source[1])
    assert abs(rows - columns) <= 1
    assert abs(rows - 2 * radius * scale) <= 2
    assert abs(middle_row - target[0] / 2) <= 0.75
    assert abs(middle_column - target[1] / 2) <= 0.75


def test_the_sides_are_cut_and_the_middle_kept() -> None:
    thirds = np.zeros((60, 180, 3), np.uint8)
    for third in range(3):
        thirds[:, 60 * third : 60 * (third + 1), third] = 200
    middle = reshape(thirds[np.newaxis], Size(1, 60, 60))[0]
    assert torch.equal(middle, torch.tensor([0, 200, 0], dtype=torch.uint8)[:, None, None].expand(3, 60, 60))


def test_a_frame_of_the_right_size_is_not_touched() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), np.uint8)
    assert np.array_equal(reshape(noise, Size(3, 16, 24)).permute(0, 2, 3, 1).numpy(), noise)


def test_shrinking_is_antialiased() -> None:
    """One pixel in eight of a fine grid would be all black or all white without a filter."""
    board = ((np.indices((256, 256)).sum(0) % 2) * 255).astype(np.uint8)
    small = reshape(np.repeat(board[..., None], 3, axis=2)[np.newaxis], Size(1, 32, 32)).float()
    assert float(small.mean()) == pytest.approx(127.5, abs=1)
    assert float(small.std()) < 2


def test_resizing_agrees_with_pillow() -> None:
    random = np.random.default_rng(0).integers(0, 256, (9, 16, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(random).resize((160, 90), Image.Resampling.BICUBIC))
    for size in ((45, 80), (180, 320)):
        ours = reshape(smooth[np.newaxis], Size(1, *size))[0].permute(1, 2, 0).numpy().astype(int)
        theirs = np.asarray(Image.fromarray(smooth).resize(size[::-1], Image.Resampling.BICUBIC))
        assert np.abs(ours - theirs).max() <= 2


def test_a_letterbox_keeps_all_between_black_bars() -> None:
    white = np.full((1, 60, 180, 3), 255, np.uint8)
    size = Size(1, 64, 96)
    wide = reshape(white, size, fit((60, 180), (64, 96), "letterbox"))[0]
    assert wide.shape == (3, 64, 96)
    assert [int(row.min()) for row in wide.unbind(1)] == [0] * 16 + [255] * 32 + [0] * 16
    tall = reshape(white.transpose(0, 2, 1, 3), size, fit((180, 60), (64, 96), "letterbox"))[0]
    assert [int(column.min()) for column in tall.unbind(2)] == [0] * 38 + [255] * 21 + [0] * 37


def test_stretching_loses_nothing_but_the_shape() -> None:
    halves = np.zeros((1, 40, 200, 3), np.uint8)
    halves[:, :, 100:] = 255
    stretched = reshape(halves, Size(1, 64, 64), fit((40, 200), (64, 64), "stretch"))[0]
    assert stretched.shape == (3, 64, 64)
    assert float(stretched[:, :, :28].max()) == 0
    assert float(stretched[:, :, 36:].min()) == 255


@pytest.mark.parametrize(("place", "colour"), [(0.0, 0), (0.5, 1), (1.0, 2)])
def test_a_random_cut_is_where_it_was_drawn(place: float, colour: int) -> None:
    thirds = np.zeros((1, 60, 180, 3), np.uint8)
    for third in range(3):
        thirds[:, :, 60 * third : 60 * (third + 1), third] = 200
    part = reshape(thirds, Size(1, 60, 60), fit((60, 180), (60, 60), "random", place))[0]
    assert [int(channel.min()) for channel in part] == [200 * (n == colour) for n in range(3)]


def test_random_cuts_belong_to_the_clip_and_reach_both_ends() -> None:
    wanted, clip = settings(reshape="random"), info(12, 8.0, 48, 200)
    lefts = [view(clip, wanted, f"clip {number}").crop.left for number in range(1000)]
    assert lefts[:3] == [view(clip, wanted, f"clip {number}").crop.left for number in range(3)]
    assert min(lefts) <= 1
    assert max(lefts) >= 134
    assert np.mean(lefts) == pytest.approx(68, abs=4)
    assert {view(clip, wanted, f"clip {number}").crop.top for number in range(9)} == {0}


@pytest.mark.parametrize(
    ("way", "box", "crop"),
    [
        ("center", (0, 226, 1080, 1446), Crop((48, 85), 0, 10)),
        ("letterbox", (0, 0, 1080, 1920), Crop((36, 64), -6, 0)),
        ("stretch", (0, 0, 1080, 1920), Crop((48, 64), 0, 0)),
    ],
)
def test_the_part_of_the_clips_own_frame_that_training_sees(
    way: Reshape, box: tuple[int, int, int, int], crop: Crop
) -> None:
    seen = view(info(12, 8.0, 1080, 1920), settings(reshape=way))
    assert seen.crop == crop
    assert seen.box == box


# --------------------------------------------------------------------------------------------------- loading


def test_a_clip_is_loaded_as_training_sees_it(clips: Path) -> None:
    path = next((clips / "videos").glob("03-*"))  # 240x320 at 30 fps
    seen = view(probe(path), settings("9x96x96", 8))
    loaded = load_clip(path, seen)
    indices = [0, 4, 8, 11, 15, 19, 23, 26, 30]
    assert loaded.shape == (9, 3, 96, 96)
    assert loaded.dtype == torch.uint8
    assert torch.equal(loaded, reshape(read_frames(path, indices), Size(9, 96, 96)))
    assert torch.equal(load_clip(path, seen.first_frame()), loaded[:1])


@pytest.mark.parametrize("way", ["random", "letterbox", "stretch", "center"])
def test_frames_and_image_are_fitted_alike(clips: Path, tmp_path: Path, way: Reshape) -> None:
    path = next((clips / "videos").glob("03-*"))
    seen = view(probe(path), settings("9x96x64", reshape=way), "ab")
    loaded = load_clip(path, seen)
    (first,) = read_frames(path, [0])
    assert torch.equal(loaded[0], reshape(first[np.newaxis], seen.size, seen.crop)[0])
    Image.fromarray(first).save(tmp_path / "first.png")
    assert torch.equal(load_image(tmp_path / "first.png", seen.size, seen), loaded[0])


def test_memory_holds_a_frame_at_a_time(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive, most = 0, 0

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def watched(path: Path, indices: list[int], *, stamp: Stamp | None) -> Iterator[np.ndarray]:
        nonlocal alive, most
        for frame in iter_frames(path, indices, stamp=stamp):
            copy = frame.copy()
            weakref.finalize(copy, gone)
            alive += 1
            most = max(most, alive)
            yield copy

    monkeypatch.setattr(frames, "iter_frames", watched)
    path = next((clips / "videos").glob("03-*"))
    load_clip(path, view(probe(path), settings("17x48x64", 8)))
    assert most == 2  # the next one is decoded before the last one is let go


def test_an_image_is_turned_upright(tmp_path: Path) -> None:
    stored = np.zeros((32, 64, 3), np.uint8)
    stored[:, :32] = 255  # its left half white; shown, its upper half is
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stored).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    assert read_image(tmp_path / "turned.jpg").shape == (64, 32, 3)
    image = load_image(tmp_path / "turned.jpg", Size(9, 64, 32))
    assert image.shape == (3, 64, 32)
    assert float(image[:, :28].float().mean()) > 250
    assert float(image[:, 36:].float().mean()) < 5


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_any_kind_of_image_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    Image.new("RGB", (24, 16), (255, 255, 255)).convert(mode).save(path)
    assert torch.equal(load_image(path, Size(1, 16, 24)), torch.full((3, 16, 24), 255, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file or directory"),
        (b"", "it is empty"),
        (b"not an image", "it is in no known image format"),
        (b"\x89PNG\r\n\x1a\n and then nothing", "it is in no known image format"),
    ],
)
def test_an_unreadable_image_is_refused(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CogtuneError) as caught:
        load_image(path, Size(1, 16, 16))
    assert caught.value.message == f"cannot read the image {path}: {reason}"


def test_an_image_cut_short_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(CogtuneError, match="it is damaged"):
        load_image(path, Size(1, 16, 16))
