"""Clips are read frame by frame as players show them, broken ones are named in plain words, and written ones play."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from cogtune.data.video import clips as video
from cogtune.data.video.clips import VideoInfo, iter_frames, probe, read_frames, write_video
from cogtune.data.video.container import (
    CutShort,
    DamagedVideo,
    EmptyVideo,
    MissingVideo,
    NotAVideo,
    NoVideoStream,
    VideoError,
    check_decoded,
    decode_all,
)
from cogtune.data.video.container import opened as open_container
from cogtune.data.video.stamp import FileChanged, Stamp, stamp_of
from cogtune.system.errors import CogtuneError

GREYS = 60
"""Frames of the clip ``greys``: frame k is filled with grey 4k."""


def greys(count: int = GREYS, height: int = 48, width: int = 64) -> np.ndarray:
    levels = np.arange(count, dtype=np.uint8)[:, None, None, None] * 4
    return np.broadcast_to(levels, (count, height, width, 3))


def numbers(frames: np.ndarray) -> list[int]:
    """Which frames of ``greys`` these are."""
    return [round(float(frame.mean()) / 4) for frame in frames]


def picture(height: int = 64, width: int = 96) -> np.ndarray:
    """A picture with no symmetry: grey, its upper left red, its upper right blue, its lower left green."""
    frame = np.full((height, width, 3), 128, np.uint8)
    frame[: height // 2, : width // 4] = (220, 30, 30)
    frame[: height // 4, width // 2 :] = (30, 30, 220)
    frame[-height // 4 :, : width // 2] = (30, 200, 30)
    return frame


def encode(
    path: Path,
    frames: Iterable[np.ndarray],
    *,
    codec: str = "libx264",
    rate: int = 25,
    **stream_traits: Any,
) -> Path:
    """A file as other programs write them: no colour tags, and whatever traits of the stream are given."""
    rotation = stream_traits.pop("rotation", 0)
    container_options = stream_traits.pop("container_options", {})
    pictures = list(frames)
    with av.open(str(path), "w", options=container_options) as container:
        stream = container.add_stream(codec, rate=rate, options={"crf": "10", "g": "20"})
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        for name, value in stream_traits.items():
            setattr(stream.codec_context, name, value)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))
    return path


def whole(path: Path) -> None:
    """What a full check of a clip comes down to."""
    check_decoded(path, probe(path).num_frames, decode_all(path))


def boxes(data: bytes) -> list[str]:
    """The names of an mp4 file's top-level boxes."""
    names, position = [], 0
    while position < len(data):
        names.append(data[position + 4 : position + 8].decode())
        position += int.from_bytes(data[position : position + 4], "big")
    return names


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "greys.mp4"
    write_video(path, greys(), 25)
    return path


# ------------------------------------------------------------------------------------------------ probing


def test_probe_says_what_a_clip_is(clip: Path) -> None:
    assert probe(clip) == VideoInfo(
        num_frames=60,
        fps=25.0,
        height=48,
        width=64,
        duration=2.4,
        codec="h264",
        pixel_format="yuv420p",
        rotation=0,
        pixel_aspect=1.0,
    )


def test_a_container_without_a_frame_count_is_counted(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.webm", greys(13), codec="libvpx-vp9")
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 0
    assert probe(path).num_frames == 13 == decode_all(path).frames


def test_frames_that_an_edit_list_hides_are_not_counted(tmp_path: Path) -> None:
    whole, cut = encode(tmp_path / "whole.mp4", greys(60)), tmp_path / "cut.mp4"
    skip = 30  # the 20 frames from the key frame at 20 on are kept, the first 10 of them hidden
    options = {"avoid_negative_ts": "disabled", "use_editlist": "1"}
    with av.open(str(whole)) as source, av.open(str(cut), "w", options=options) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        assert source.streams.video[0].time_base is not None
        frame = int(1 / (25 * source.streams.video[0].time_base))
        for packet in source.demux(video=0):
            if packet.dts is not None and packet.pts is not None and packet.pts >= 20 * frame:
                packet.pts, packet.dts, packet.stream = packet.pts - skip * frame, packet.dts - skip * frame, stream
                target.mux(packet)
    with av.open(str(cut)) as container:
        assert container.streams.video[0].frames == 40
    assert probe(cut).num_frames == 30 == decode_all(cut).frames
    assert numbers(read_frames(cut, [0, 29])) == [30, 59]
    with pytest.raises(CutShort):  # decord alone would give copies of the last frame
        read_frames(cut, [30], decoder="decord")


@pytest.mark.parametrize(("rotation", "turns"), [(90, 1), (180, 2), (270, 3), (-90, 3)])
@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_rotation_is_applied(tmp_path: Path, rotation: int, turns: int, decoder: video.Decoder) -> None:
    path = encode(tmp_path / "turned.mp4", [picture()] * 3, rotation=rotation)
    upright = np.rot90(picture(), turns)
    info = probe(path)
    assert (info.rotation, info.height, info.width) == (90 * turns, *upright.shape[:2])
    assert np.abs(read_frames(path, [1], decoder)[0].astype(int) - upright).mean() < 4


def test_pixels_that_are_not_square_are_told(tmp_path: Path) -> None:
    path = encode(tmp_path / "wide.mp4", greys(3), sample_aspect_ratio=Fraction(4, 3))
    assert probe(path).pixel_aspect == pytest.approx(4 / 3)


# ------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_frames_come_in_the_order_asked_for(clip: Path, decoder: video.Decoder) -> None:
    frames = read_frames(clip, [41, 0, 7, 7, 59, 22], decoder)
    assert frames.shape == (6, 48, 64, 3)
    assert frames.dtype == np.uint8
    assert numbers(frames) == [41, 0, 7, 7, 59, 22]


def test_frames_are_given_one_at_a_time_in_rising_order(clip: Path) -> None:
    frames = iter_frames(clip, [9, 3, 9])
    assert numbers(np.stack(list(frames))) == [3, 9]
    assert list(iter_frames(clip, [])) == []


def test_both_decoders_give_the_same_pixels(clips: Path, tmp_path: Path) -> None:
    untagged = encode(tmp_path / "untagged.mp4", [np.roll(picture(), 3 * k, axis=1) for k in range(30)])
    for path in [*sorted((clips / "videos").glob("*.mp4")), untagged]:
        indices = range(0, probe(path).num_frames, 3)
        assert np.array_equal(read_frames(path, indices, "pyav"), read_frames(path, indices, "decord")), path.name


@pytest.mark.parametrize("kind", ["mp4", "mkv", "open-gop", "uneven", "webm", "narrow"])
def test_so_they_do_deep_in_a_clip_where_auto_takes_the_one_that_seeks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = tmp_path / f"deep.{kind if kind in ('mkv', 'webm') else 'mp4'}"
    options = {"g": "60", "crf": "20", "preset": "ultrafast" if kind == "uneven" else "veryfast", "bf": "3"}
    codec = "libvpx-vp9" if kind == "webm" else "libx264"
    if kind == "webm":
        options = {"g": "60", "deadline": "realtime", "cpu-used": "8"}
    width = 48 if kind == "narrow" else 64  # on which decord fails
    if kind == "open-gop":
        options["x264-params"] = "open-gop=1"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = 32, width, "yuv420p"
        for number in range(480):
            level = np.full((32, width, 3), number % 2 * 100, np.uint8)
            level[:, : number % 47] = number // 2
            frame = av.VideoFrame.from_ndarray(level, format="rgb24")
            frame.pts, frame.time_base = number + (number // 7 if kind == "uneven" else 0), Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert probe(path).num_frames == 480
    seeks = []
    sound = video._open_decord
    monkeypatch.setattr(video, "_open_decord", lambda path: seeks.append(path) or sound(path))
    for wanted in ([421, 437, 440, 479], range(400, 480, 13), [460]):
        expected = read_frames(path, wanted, "pyav")
        assert np.array_equal(read_frames(path, wanted, "auto"), expected)
        assert np.array_equal(read_frames(path, wanted, "decord"), expected)
    assert len(seeks) == 6
    read_frames(path, [399, 420])
    assert len(seeks) == 6  # auto decodes from the start


def test_auto_does_without_decord(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode(tmp_path / "long.mp4", np.broadcast_to(greys(1), (420, 48, 64, 3)))
    monkeypatch.setattr(video, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "decord", None)
    assert read_frames(path, [403, 419]).shape == (2, 48, 64, 3)


def test_the_environment_chooses_the_decoder(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "decord", None)
    monkeypatch.setenv("COGTUNE_DECODER", "decord")
    with pytest.raises(CogtuneError, match="cannot import decord") as caught:
        read_frames(clip, [0])
    assert caught.value.hint == "run `pip install decord`, or unset COGTUNE_DECODER"
    monkeypatch.setenv("COGTUNE_DECODER", "decrod")
    with pytest.raises(CogtuneError, match=r"no such decoder: 'decrod'; did you mean 'decord'\?"):
        read_frames(clip, [0])
    monkeypatch.delenv("COGTUNE_DECODER")
    assert numbers(read_frames(clip, [5])) == [5]


def test_without_pyav_it_says_what_to_install(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(CogtuneError, match="cannot import PyAV") as caught:
        probe(clip)
    assert caught.value.hint == "run `pip install av`"


def test_a_frame_beyond_the_end_is_an_error(clip: Path) -> None:
    with pytest.raises(CutShort, match=r"greys.mp4 is incomplete: it ends after 60 frames, but frame 60 is needed"):
        read_frames(clip, [0, 60])
    with pytest.raises(ValueError, match="must not be negative: -1"):
        read_frames(clip, [-1])


def test_a_change_of_frame_size_is_an_error(tmp_path: Path) -> None:
    parts = [encode(tmp_path / f"{side}.h264", greys(5, side, side)) for side in (32, 48)]
    path = tmp_path / "both.h264"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    with pytest.raises(DamagedVideo, match="changes its frame size at frame 5"):
        read_frames(path, range(10))


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
@pytest.mark.parametrize("length", ["other", "same"])
def test_a_clip_that_is_exchanged_while_it_is_read_and_put_back_is_noticed(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoder: video.Decoder, length: str
) -> None:
    path, aside, other = tmp_path / "a.mp4", tmp_path / "aside.mp4", tmp_path / "other.mp4"
    shutil.copy(clip, path)
    write_video(other, 255 - greys(), 25)
    if length == "same":
        other.write_bytes(other.read_bytes().ljust(path.stat().st_size, b"\0"))
        path.write_bytes(path.read_bytes().ljust(other.stat().st_size, b"\0"))
    stamp = stamp_of(path)
    os.utime(other, ns=(stamp[1], stamp[1]))
    assert len(list(iter_frames(path, range(60), decoder, stamp=stamp))) == 60
    opened, chances = open_container, []

    @contextlib.contextmanager
    def exchanging(path: Path, stamp: Stamp | None = None) -> Iterator[Any]:
        chances.append(path)
        path.rename(aside)
        other.rename(path)
        try:
            with opened(path, stamp) as clip:
                yield clip
        finally:
            path.rename(other)
            aside.rename(path)

    monkeypatch.setattr(video, "opened", exchanging)
    with pytest.raises(FileChanged, match=r"a\.mp4 changed while it was being read"):
        list(iter_frames(path, range(60), decoder, stamp=stamp))
    assert chances
    assert stamp_of(path) == stamp


def test_a_clip_that_is_written_to_while_it_is_read_is_noticed(clip: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(clip, tmp_path / "a.mp4"))
    frames = iter_frames(path, range(60), stamp=stamp_of(path))
    next(frames)
    with path.open("ab") as handle:
        handle.write(b"more")
    with pytest.raises(FileChanged):
        list(frames)


# ------------------------------------------------------------------------------------------- broken files


def broken(kind: str, clip: Path, folder: Path) -> Path:
    whole, path = clip.read_bytes(), folder / f"{kind}.mp4"
    index_last = encode(folder / "plain.mp4", greys()).read_bytes()
    assert boxes(index_last)[-1] == "moov"
    contents = {
        "empty": b"",
        "text": b"no moving pictures here\n" * 50,
        "cut": whole[: len(whole) * 2 // 3],
        "cut-before-its-index": index_last[: len(index_last) // 3],
        "never-finished": index_last[: index_last.index(b"moov") - 4],
        "bad-index": whole.replace(b"stco", b"\xff" * 4).replace(b"stsz", b"\xff" * 4),
        "bad-pictures": whole[: whole.index(b"mdat") + 4]
        + bytes(np.random.default_rng(0).integers(0, 256, len(whole) - whole.index(b"mdat") - 4, np.uint8)),
    }
    if kind == "folder":
        path.mkdir()
    elif kind == "sound":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=16000, layout="mono")
            assert isinstance(stream, av.AudioStream)
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
            sound.sample_rate = 16000
            container.mux(stream.encode(sound))
            container.mux(stream.encode(None))
    elif kind in contents:
        path.write_bytes(contents[kind])
    return path


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("missing", MissingVideo, "does not exist"),
        ("folder", MissingVideo, "is a folder"),
        ("empty", EmptyVideo, "is empty"),
        ("text", NotAVideo, "is not a video"),
        ("sound", NoVideoStream, "has no video stream"),
        ("cut", CutShort, "is incomplete: [0-9,]+ of [0-9,]+ bytes are missing"),
        ("cut-before-its-index", CutShort, "is incomplete: [0-9,]+ of [0-9,]+ bytes are missing"),
        ("never-finished", CutShort, "is incomplete: it has no index"),
        ("bad-index", DamagedVideo, "cannot be opened: its header is damaged"),
        ("bad-pictures", DamagedVideo, "cannot be decoded beyond frame 0|has a video stream without frames"),
    ],
)
def test_a_broken_file_is_told_in_plain_words(
    clip: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str, error: type[VideoError], words: str
) -> None:
    path = broken(kind, clip, tmp_path)
    for read in (probe, whole, lambda path: read_frames(path, [0])):
        with pytest.raises(error, match=words) as caught:
            read(path)
        assert caught.value.message.startswith(f"{path} ")
        assert caught.value.hint
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("length", "words", "told"),
    [
        (400, "is damaged at frame 30", "is damaged: 1 of 60 frames, first frame 30"),
        (
            20_000,
            r"cannot be decoded beyond frame (2\d|30)",
            r"is damaged: .*\d packets without a frame \(invalid",
        ),
    ],
)
def test_a_clip_damaged_inside_opens_and_is_found_by_decoding(
    tmp_path: Path, length: int, words: str, told: str
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 48, 64, 3), np.uint8)
    path = encode(tmp_path / "a.mp4", noise)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + length] = b"\xff" * length  # within one frame's data, or over several frames' lengths
    path.write_bytes(data)
    assert probe(path).num_frames == 60
    with pytest.raises(DamagedVideo, match=told):
        whole(path)
    assert len(read_frames(path, range(25))) == 25
    with pytest.raises(DamagedVideo, match=words):
        read_frames(path, [0, 59])


def test_bytes_after_the_last_box_do_no_harm(clip: Path, tmp_path: Path) -> None:
    path = tmp_path / "longer.mp4"
    path.write_bytes(clip.read_bytes() + b"made by a camera of some kind")
    assert probe(path).num_frames == 60


# ------------------------------------------------------------------------------------------------ writing


def test_a_written_video_plays_everywhere(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "out.mp4"
    write_video(path, greys(9), 8)
    assert boxes(path.read_bytes())[:2] == ["ftyp", "moov"]  # it starts before it is downloaded
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
    assert (probe(path).num_frames, probe(path).fps) == (9, 8.0)
    assert [entry.name for entry in path.parent.iterdir()] == ["out.mp4"]
    assert capfd.readouterr() == ("", "")


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "colours.mp4"
    write_video(path, [picture()] * 4, 8)
    back = read_frames(path, [3])[0].astype(int)
    for row, column in ((10, 5), (5, 80), (60, 20), (40, 60)):  # well inside each patch
        assert np.abs(back[row, column] - picture()[row, column]).max() <= 4, (row, column)


@pytest.mark.parametrize("fps", [8, 12.5, 16, 23.976, 30000 / 1001])
def test_the_frame_rate_is_kept(tmp_path: Path, fps: float) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, greys(3), fps)
    assert probe(path).fps == pytest.approx(fps, abs=1e-4)


def test_the_same_frames_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, iter(greys(20)), 16)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_bytes_do_not_follow_where_in_memory_the_frames_lie(tmp_path: Path) -> None:
    """x264's fastest way shared the bits of such scenes out in nearly as many ways as they were written."""
    draws = np.random.default_rng(0)
    scenes = draws.integers(0, 256, (17, 8, 12, 3)).repeat(8, 1).repeat(8, 2) + draws.integers(-10, 11, (17, 64, 96, 3))
    held: list[np.ndarray] = []
    frames, seen = scenes.clip(0, 255).astype(np.uint8), set()
    for size in draws.integers(100, 200_000, 12):
        held = [*held[-5:], np.full(size, 255, np.uint8)]
        write_video(tmp_path / "a.mp4", frames, 8)
        seen.add((tmp_path / "a.mp4").read_bytes())
    assert len(seen) == 1


def _second_frame_differs() -> Iterator[np.ndarray]:
    yield np.zeros((32, 32, 3), np.uint8)
    yield np.zeros((32, 34, 3), np.uint8)


@pytest.mark.parametrize(
    ("frames", "fps", "words"),
    [
        ([], 8, "it would have no frames"),
        (np.zeros((2, 33, 32, 3), np.uint8), 8, "H.264 requires even heights and widths, got 33x32"),
        (
            np.zeros((2, 32, 32, 3), np.float32),
            8,
            r"expected frames of uint8 \[height, width, 3\], got float32 \[32, 32, 3\]",
        ),
        (np.zeros((2, 32, 32, 4), np.uint8), 8, r"got uint8 \[32, 32, 4\]"),
        (_second_frame_differs(), 8, r"frame 1 is uint8 \[32, 34, 3\], the first one uint8 \[32, 32, 3\]"),
        (np.zeros((2, 32, 32, 3), np.uint8), 0, "0 frames per second"),
    ],
)
def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path, frames: Any, fps: float, words: str) -> None:
    path = tmp_path / "out.mp4"
    path.write_bytes(b"old")
    with pytest.raises(CogtuneError, match=words):
        write_video(path, frames, fps)
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == {"out.mp4": b"old"}


def test_a_place_that_refuses_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CogtuneError, match=r"cannot write .*out.mp4"):
        write_video(tmp_path / "file" / "out.mp4", greys(2), 8)


def test_importing_loads_neither_a_decoder_nor_torch() -> None:
    code = (
        "import sys, cogtune.data.validation.checks, cogtune.data.synthetic\n"
        "print(sorted({'av', 'decord', 'torch', 'diffusers', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
