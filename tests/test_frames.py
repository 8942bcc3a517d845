"""Training sees the right frames, upright, resized without stretching and cut in the middle."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cogtune.data import frames
from cogtune.data.frames import FrameSettings, choose, load_clip, load_image, read_image, reshape
from cogtune.data.video import VideoInfo, iter_frames, read_frames
from cogtune.errors import CogtuneError
from cogtune.geometry import Size


def settings(size: str = "9x48x64", fps: float = 8, start: int = 0) -> FrameSettings:
    return FrameSettings(size=Size.parse(size), fps=fps, start=start)


def info(num_frames: int, fps: float) -> VideoInfo:
    return VideoInfo(num_frames, fps, 48, 64, num_frames / fps, "h264", "yuv420p", 0, 1.0)


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
    ("clip", "wanted", "indices"),
    [
        ((195, 30.0), settings("9x48x64", 8), [0, 4, 8, 11, 15, 19, 23, 26, 30]),
        ((195, 30.0), settings("5x48x64", 8, start=100), [100, 104, 108, 111, 115]),
        ((20, 8.0), settings("5x48x64", 16), [0, 1, 2, 3, 4]),
        ((20, 16.0), settings("5x48x64", 16), [0, 1, 2, 3, 4]),
        ((40, 23.976), settings("3x48x64", 24), [0, 1, 2]),
    ],
)
def test_frames_are_chosen_by_time(clip: tuple[int, float], wanted: FrameSettings, indices: list[int]) -> None:
    assert choose(info(*clip), wanted) == indices


def test_a_clip_too_short_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match=r"needs 31 frames for 9 at 8 fps \(it runs at 30 fps\), but has 30"):
        choose(info(30, 30.0), settings())


def test_settings_are_the_cache_keys_part() -> None:
    wanted = settings("49x480x720", 8, start=3)
    assert wanted.to_dict() == {"size": "49x480x720", "fps": 8, "start": 3, "reshape": "center"}
    assert FrameSettings.from_dict(wanted.to_dict()) == wanted
    assert wanted.first_frame() == settings("1x480x720", 8, start=3)
    for wrong in ({"fps": 0.0}, {"fps": 8.0, "start": -1}):
        with pytest.raises(ValueError, match="from frame 0 or later"):
            FrameSettings(size=Size(9, 48, 64), **wrong)


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


# --------------------------------------------------------------------------------------------------- loading


def test_a_clip_is_loaded_as_training_sees_it(clips: Path) -> None:
    path = next((clips / "videos").glob("03-*"))  # 240x320 at 30 fps
    loaded = load_clip(path, settings("9x96x96", 8))
    indices = [0, 4, 8, 11, 15, 19, 23, 26, 30]
    assert loaded.shape == (9, 3, 96, 96)
    assert loaded.dtype == torch.uint8
    assert torch.equal(loaded, reshape(read_frames(path, indices), Size(9, 96, 96)))
    assert torch.equal(load_clip(path, settings("9x96x96", 8).first_frame()), loaded[:1])


def test_a_clip_too_short_is_an_error_with_its_name(clips: Path) -> None:
    path = next((clips / "videos").glob("01-*"))  # 20 frames at 8 fps
    with pytest.raises(CogtuneError, match=r"01-.*\.mp4 needs 49 frames for 49 at 8 fps .* but has 20"):
        load_clip(path, settings("49x96x96", 8))


def test_memory_holds_a_frame_at_a_time(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive, most = 0, 0

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def watched(path: Path, indices: list[int]) -> Iterator[np.ndarray]:
        nonlocal alive, most
        for frame in iter_frames(path, indices):
            copy = frame.copy()
            weakref.finalize(copy, gone)
            alive += 1
            most = max(most, alive)
            yield copy

    monkeypatch.setattr(frames, "iter_frames", watched)
    load_clip(next((clips / "videos").glob("03-*")), settings("17x48x64", 8))
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


@pytest.mark.parametrize("content", [None, b"", b"not an image", b"\x89PNG\r\n\x1a\n and then nothing"])
def test_an_unreadable_image_is_told(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    reason = "No such file or directory" if content is None else "it is no image, or damaged"
    with pytest.raises(CogtuneError) as caught:
        load_image(path, Size(1, 16, 16))
    assert caught.value.message == f"cannot read the image {path}: {reason}"


def test_an_image_cut_short_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(CogtuneError, match="it is no image, or damaged"):
        load_image(path, Size(1, 16, 16))
