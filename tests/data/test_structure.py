"""cogtune.data.video.structure: files joined end to end, and cropping rectangles of containers."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from cogtune.config.choices import Decoder
from cogtune.data.cache.index import image_key
from cogtune.data.frames import FrameSettings, view
from cogtune.data.video.clips import probe, read_frames, write_video
from cogtune.data.video.structure import Crop, crop_of
from cogtune.models.geometry import Size
from tests.support.containers import CLAP, with_clean_aperture, with_pixel_crop

HEIGHT, WIDTH = 64, 96


def picture() -> np.ndarray:
    across, down = np.meshgrid(np.arange(WIDTH) * 2, np.arange(HEIGHT) * 3)
    return np.stack([across, down, np.full_like(across, 128)], axis=-1).astype(np.uint8)


def clip(path: Path) -> Path:
    """A clip in the container that the suffix names."""
    plain = path.with_name("plain.mp4")
    write_video(plain, [picture()] * 12, 8)
    if path.suffix in (".wmv", ".avi", ".flv"):
        with av.open(str(path), "w") as made:
            stream = made.add_stream({".wmv": "wmv2", ".avi": "mpeg4", ".flv": "flv"}[path.suffix], rate=8)
            assert isinstance(stream, av.VideoStream)
            stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
            for _ in range(12):
                made.mux(stream.encode(av.VideoFrame.from_ndarray(picture(), format="rgb24")))
            made.mux(stream.encode(None))
        return path
    options = {"movflags": "frag_keyframe+empty_moov"} if path.stem == "fragments" else {}
    with av.open(str(plain)) as source, av.open(str(path), "w", options=options) as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                copy.mux(packet)
    return path


@pytest.mark.parametrize("name", ["a.mp4", "fragments.mp4", "a.mov", "a.3gp", "a.avi", "a.wmv", "a.flv"])
def test_files_joined_end_to_end_are_counted(tmp_path: Path, name: str) -> None:
    one = clip(tmp_path / name)
    assert probe(one).files == 1
    three = tmp_path / f"three{one.suffix}"
    three.write_bytes(one.read_bytes() * 3)
    assert probe(three).files == 3


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
