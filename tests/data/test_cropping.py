"""Cropping rectangles of containers are applied."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import pytest

from cogtune.config.choices import Decoder
from cogtune.data.cache.index import image_key
from cogtune.data.frames import FrameSettings, view
from cogtune.data.video.clips import probe, read_frames
from cogtune.data.video.cropping import Crop, crop_of
from cogtune.models.geometry import Size
from tests.support.containers import CLAP, HEIGHT, WIDTH, clip, with_clean_aperture, with_pixel_crop


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
@pytest.mark.parametrize("kind", ["mp4", "mkv"])
def test_a_containers_cropping_is_applied_as_players_do(tmp_path: Path, kind: str, decoder: Decoder) -> None:
    path = clip(tmp_path / f"a.{kind}")
    whole = read_frames(path, [3], decoder)[0]
    if kind == "mp4":
        with_clean_aperture(path, CLAP)
    else:
        with_pixel_crop(path, bottom=6, top=10, left=12, right=20)
    info = probe(path)
    assert (info.height, info.width, info.trimmed, info.files) == (48, 64, True, 1)
    assert (read_frames(path, [3], decoder)[0] == whole[10:58, 12:76]).all()


@pytest.mark.parametrize(
    "content",
    [
        struct.pack(">IIIIiIiI", WIDTH, 1, HEIGHT, 1, 0, 1, 0, 1),  # the whole frame, as editors write it
        struct.pack(">IIIIiIiI", 2 * WIDTH, 1, HEIGHT, 1, 0, 1, 0, 1),  # wider than the frame
        struct.pack(">IIIIiIiI", 64, 0, 48, 1, 0, 1, 0, 1),  # divided by zero
        b"\0" * 8,  # cut short
    ],
)
def test_a_rectangle_that_crops_nothing_or_is_none_changes_nothing(tmp_path: Path, content: bytes) -> None:
    path = with_clean_aperture(clip(tmp_path / "a.mp4"), content)
    info = probe(path)
    assert (info.height, info.width, info.trimmed) == (HEIGHT, WIDTH, False)


def test_the_rectangle_is_that_of_the_track(tmp_path: Path) -> None:
    path = with_clean_aperture(clip(tmp_path / "a.mp4"), CLAP)
    assert crop_of(path, 0, (HEIGHT, WIDTH)) == Crop(top=10, left=12, height=48, width=64)
    assert crop_of(path, 1, (HEIGHT, WIDTH)) is None


def test_a_clip_that_was_cached_with_what_is_cropped_is_encoded_again(tmp_path: Path) -> None:
    """A square cut out of a square is fitted alike, and shows other pixels."""
    settings = FrameSettings(size=Size(9, 64, 96), fps=8)
    path = clip(tmp_path / "a.mp4")
    whole = view(replace(probe(path), height=80, width=112), settings)
    cropped = view(replace(probe(with_clean_aperture(path, CLAP)), height=80, width=112), settings)
    assert (whole.trimmed, cropped.trimmed) == (False, True)
    assert replace(cropped, trimmed=False) == whole
    assert image_key("a", cropped, from_video=True) != image_key("a", whole, from_video=True)
