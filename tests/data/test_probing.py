"""A probe reports what decoding gives: frames and not packets, times and not claims, in every decoder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.codec.context import Flags as CodecFlags
from PIL import Image

from cogtune.data.findings import Finding
from cogtune.data.frames import FrameSettings, view
from cogtune.data.validation.clips import check_clip
from cogtune.data.validation.inspection import InspectionJob, inspect
from cogtune.data.video import clips, container, probing
from cogtune.data.video.clips import probe, read_frames
from cogtune.data.video.container import CutShort, DamagedVideo, NotAVideo, VideoInfo, check_decoded, decode_all
from cogtune.data.video.images import measure_image
from cogtune.data.video.orientation import orientation_of
from cogtune.models.geometry import Size
from cogtune.system.errors import CogtuneError

Decoders = pytest.mark.parametrize("decoder", ["pyav", "decord"])

QUIET = {"x265-params": "log-level=none"}


def numbered(count: int = 60, height: int = 48, width: int = 64) -> Iterator[np.ndarray]:
    """Frame k is filled with grey 4k, from black again after white."""
    for number in range(count):
        yield np.full((height, width, 3), 4 * number % 256, np.uint8)


def numbers(frames: np.ndarray) -> list[int]:
    """Which frames of :func:`numbered` these are."""
    return [round(float(frame.mean()) / 4) for frame in frames]


def corners(height: int = 64, width: int = 96) -> np.ndarray:
    """A picture whose four corners have a colour each."""
    frame = np.full((height, width, 3), 128, np.uint8)
    frame[: height // 2, : width // 2] = (220, 30, 30)
    frame[: height // 2, width // 2 :] = (30, 30, 220)
    frame[height // 2 :, : width // 2] = (30, 200, 30)
    return frame


def encode(
    path: Path,
    frames: Iterator[np.ndarray] | list[np.ndarray],
    *,
    codec: str = "libx264",
    times: list[int] | None = None,
    rate: int = 25,
    options: dict[str, str] | None = None,
    matrix: list[int] | None = None,
    pixel_format: str = "yuv420p",
    form: str | None = None,
    **traits: Any,
) -> Path:
    """A clip as other programs write them; ``times`` of its frames are in parts of a second, ``rate`` each."""
    pictures = list(frames)
    with av.open(str(path), "w", format=form) as target:
        stream = target.add_stream(codec, rate=rate, options={"crf": "10", "g": "20", **(options or {})})
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], pixel_format
        stream.codec_context.time_base = Fraction(1, rate)
        if matrix:
            stream.set_display_matrix(matrix)
        for name, value in traits.items():
            setattr(stream.codec_context, name, value)
        for time, pixels in zip(times or range(len(pictures)), pictures, strict=True):
            picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            picture.pts, picture.time_base = time, Fraction(1, rate)
            target.mux(stream.encode(picture))
        target.mux(stream.encode(None))
    return path


def copied(source: Path, target: Path, keep: Callable[[int], bool] = lambda _: True) -> Path:
    """A clip with some of another one's packets, as a program copies them that does not decode; it claims no rate."""
    with av.open(str(source)) as reading, av.open(str(target), "w") as writing:
        stream = writing.add_stream_from_template(reading.streams.video[0])
        for number, packet in enumerate(reading.demux(video=0)):
            if packet.size and keep(number):
                packet.stream = stream
                writing.mux(packet)
    return target


def keys(path: Path) -> list[int]:
    """The numbers of a clip's packets that hold key frames."""
    with av.open(str(path)) as reading:
        return [number for number, packet in enumerate(reading.demux(video=0)) if packet.is_keyframe]


def findings(path: Path, size: str = "9x48x64", **settings: Any) -> list[Finding]:
    return list(check_clip("a", probe(path), FrameSettings(size=Size.parse(size), fps=8, **settings)))


def sound(path: Path) -> VideoInfo:
    """What a clip is, of which every check and every decoder gives the same."""
    (_, seen), *_ = inspect([InspectionJob(path, None, full=True)], workers=1)
    assert seen.problems == ()
    info = probe(path)
    assert seen.info == info
    check_decoded(path, info.num_frames, decode_all(path))
    frames = read_frames(path, range(info.num_frames))
    assert np.array_equal(frames, read_frames(path, range(info.num_frames), "decord"))
    assert frames.shape[1:3] == (info.height, info.width)
    with pytest.raises(container.CutShort):
        read_frames(path, [info.num_frames])
    return info


# ------------------------------------------------------------------------------------------------- orientation

MATRICES: dict[str, tuple[list[int], Callable[[np.ndarray], np.ndarray]]] = {
    "as stored": ([1, 0, 0, 1], lambda frame: frame),
    "mirrored": ([-1, 0, 0, 1], np.fliplr),
    "upside down": ([1, 0, 0, -1], np.flipud),
    "half a turn": ([-1, 0, 0, -1], lambda frame: np.rot90(frame, 2)),
    "transposed": ([0, 1, 1, 0], lambda frame: frame.transpose(1, 0, 2)),
    "a quarter to the left": ([0, -1, 1, 0], np.rot90),
    "a quarter to the right": ([0, 1, -1, 0], lambda frame: np.rot90(frame, -1)),
    "transposed the other way": ([0, -1, -1, 0], lambda frame: np.rot90(frame, 2).transpose(1, 0, 2)),
}
"""Every display matrix (a, b, c, d) there is, and what players make of a frame by it."""


@Decoders
@pytest.mark.parametrize("name", MATRICES)
def test_the_whole_display_matrix_is_applied(tmp_path: Path, name: str, decoder: clips.Decoder) -> None:
    (a, b, c, d), shown = MATRICES[name]
    matrix = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
    path = encode(tmp_path / "a.mp4", [corners()] * 3, matrix=matrix)
    expected = shown(corners())
    (frame,) = read_frames(path, [1], decoder)
    assert frame.shape == expected.shape
    assert np.abs(frame.astype(int) - expected).mean() < 4
    info = probe(path)
    assert (info.height, info.width) == expected.shape[:2]
    undone = np.rot90(expected, -info.rotation // 90)
    assert np.array_equal(np.fliplr(undone) if info.mirrored else undone, corners())
    words = [found.message for found in findings(path, "1x64x96") if found.code == "rotated"]
    assert len(words) == (name != "as stored")
    assert all(("mirrored" in word) == info.mirrored for word in words)


def test_asking_for_the_orientation_leaves_nothing_behind_that_keeps_the_frame(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", [corners()], matrix=[-1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30])
    with av.open(str(path)) as reading:
        frame = next(reading.decode(video=0))
    before = sys.getrefcount(frame)
    assert orientation_of(frame).mirrored
    assert sys.getrefcount(frame) == before


@pytest.mark.parametrize(("aspect", "turned", "hint"), [(4, False, "128x64"), (4, True, "64x128"), (2, True, "96x96")])
def test_square_pixels_are_advised_for_the_clip_as_it_is_shown(
    tmp_path: Path, aspect: int, turned: bool, hint: str
) -> None:
    matrix = [0, -(1 << 16), 0, 1 << 16, 0, 0, 0, 0, 1 << 30] if turned else None
    path = encode(tmp_path / "a.mp4", [corners()] * 3, matrix=matrix, sample_aspect_ratio=Fraction(aspect, 3))
    (found,) = (found for found in findings(path, "1x64x96") if found.code == "pixel-aspect")
    assert f"resize it to {hint} (width x height)" in found.hint
    assert probe(path).pixel_aspect == pytest.approx(3 / aspect if turned else aspect / 3)


# ----------------------------------------------------------------------------------------------------- colours


@Decoders
@pytest.mark.parametrize(
    ("size", "tag", "used"),
    [
        ((704, 1276), 2, 5),
        ((720, 960), 2, 1),
        ((704, 1280), 2, 1),
        ((720, 960), 5, 5),
        ((128, 128), 1, 1),
    ],
)
def test_colours_without_a_tag_are_those_of_players(
    tmp_path: Path, size: tuple[int, int], tag: int, used: int, decoder: clips.Decoder
) -> None:
    """By the numbers of ITU-T H.273: 1 is BT.709, 5 is BT.601, and 2 says nothing."""
    stored = {1: (63, 102, 240), 5: (81, 90, 240)}[used]  # pure red, in limited range
    with av.open(str(tmp_path / "a.mp4"), "w") as target:
        stream = target.add_stream("libx264", rate=8, options={"crf": "1"})
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.colorspace = tag
        picture = av.VideoFrame(size[1], size[0], "yuv420p")
        for plane, value in zip(picture.planes, stored, strict=True):
            plane.update(bytes([value]) * plane.buffer_size)
        target.mux([*stream.encode(picture), *stream.encode(None)])
    (frame,) = read_frames(tmp_path / "a.mp4", [0], decoder)
    assert np.abs(frame.astype(int) - (255, 0, 0)).max() <= 4


def test_interlaced_clips_get_a_finding(tmp_path: Path) -> None:
    flags = int(CodecFlags.interlaced_dct | CodecFlags.interlaced_me)
    for name in ("a.mp4", "a.ts"):
        path = encode(tmp_path / name, numbered(30), flags=flags)
        (found,) = (found for found in findings(path) if found.code == "interlaced")
        assert "bwdif" in found.hint
        assert sound(path).num_frames == 30


@pytest.mark.parametrize(("codec", "form"), [("libx264", "h264"), ("libx265", "hevc"), ("mpeg2video", "mpeg2video")])
def test_a_bare_stream_has_the_rate_of_its_head(tmp_path: Path, codec: str, form: str) -> None:
    rate = 30 if codec == "mpeg2video" else 16
    options = QUIET if codec == "libx265" else {}
    path = encode(tmp_path / f"a.{form}", numbered(40), codec=codec, rate=rate, options=options, form=form)
    info = probe(path)
    assert (info.num_frames, info.fps, info.times, info.rate_told) == (40, rate, (), True)


def test_a_bare_stream_without_a_rate_is_taken_for_what_libav_assumes(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mjpeg", numbered(40), codec="mjpeg", pixel_format="yuvj420p", rate=16, form="mjpeg")
    info = probe(path)
    assert (info.num_frames, info.fps, info.rate_told) == (40, 25, False)


def test_jpegs_as_a_camera_sends_them_end_with_a_boundary(tmp_path: Path) -> None:
    """FFmpeg reads every frame of its own file, then calls the last boundary invalid."""
    path = encode(tmp_path / "a.mjpeg", numbered(20), codec="mjpeg", pixel_format="yuvj420p", rate=16, form="mpjpeg")
    info = probe(path)
    assert (info.num_frames, info.fps, info.rate_told) == (20, 25, False)
    assert decode_all(path).frames == 20
    whole = path.read_bytes()
    boundary = b"\r\n--ffmpeg\r\n"
    assert whole.endswith(boundary)
    pictures = whole.removesuffix(boundary)
    ends = (b"", b"\r\n--ffmpeg", boundary[:-2] + b"--", boundary + b"Content-type: image/jpeg\r\n\r\n", b"\0\0\n")
    for end in ends:
        path.write_bytes(pictures + end)
        assert (decode_all(path).frames, probe(path).num_frames) == (20, 20), end
    path.write_bytes(whole[:-100])
    with pytest.raises(CutShort, match="is incomplete: it ends in the middle of a picture"):
        decode_all(path)
    middle = whole.index(b"Content-type", len(whole) // 2)
    path.write_bytes(whole[:middle] + b"X" * 200 + whole[middle + 200 :])
    with pytest.raises(DamagedVideo, match="cannot be read completely"):
        decode_all(path)


def test_an_animated_webp_is_named(tmp_path: Path) -> None:
    pictures = [Image.fromarray(frame) for frame in numbered(3)]
    pictures[0].save(tmp_path / "a.webp", save_all=True, append_images=pictures[1:])
    with pytest.raises(NotAVideo, match="is an animated WebP, which this build of PyAV cannot decode"):
        probe(tmp_path / "a.webp")
    pictures[0].save(tmp_path / "still.webp")
    with pytest.raises(NotAVideo, match="is an image, not a clip"):
        probe(tmp_path / "still.webp")


@pytest.mark.parametrize(
    ("content", "told", "hint"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n", "a Git LFS pointer", "git lfs pull"),
        (b"\xef\xbb\xbf \n<!DOCTYPE html><html></html>", "a web page", "hf download"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n../a.ts\n#EXT-X-ENDLIST\n", "a list of other files", "join"),
        (b"ffconcat version 1.0\nfile a.ts\n", "a list of other files", "join"),
        (b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"/>', "a list of other files", "join"),
    ],
)
def test_what_stands_in_the_place_of_a_clip_is_named_and_never_followed(
    tmp_path: Path, content: bytes, told: str, hint: str
) -> None:
    encode(tmp_path / "a.ts", numbered(30))
    for name in ("b.mp4", "b.m3u8"):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(NotAVideo) as caught:
            probe(path)
        assert caught.value.reason == f"is {told}, not a clip"
        ((_, seen),) = inspect([InspectionJob(path)], workers=1)
        assert [(code, message) for code, message, _ in seen.problems] == [
            ("not-a-video", f"{name} is {told}, not a clip")
        ]
        assert hint in seen.problems[0][2]
    (tmp_path / "b.png").write_bytes(content)
    with pytest.raises(CogtuneError, match=f"b.png is {told}, not an image"):
        measure_image(tmp_path / "b.png", full=False)


def test_a_still_of_an_mp4s_kin_is_not_cut_short(tmp_path: Path) -> None:
    Image.fromarray(next(numbered(1))).save(tmp_path / "a.avif")
    with pytest.raises(NotAVideo, match="is an image, not a clip"):
        probe(tmp_path / "a.avif")


def joined(path: Path, *parts: Path) -> Path:
    """Transport streams, one after the other."""
    with av.open(str(path), "w") as target, av.open(str(parts[0])) as first:
        out, past = target.add_stream_from_template(first.streams.video[0]), 0
        for part in parts:
            with av.open(str(part)) as source:
                packets = [packet for packet in source.demux(video=0) if packet.size]
            times = [packet.dts or 0 for packet in packets]
            for packet, decoded in zip(packets, times, strict=True):
                assert packet.pts is not None
                later = past - times[0]
                packet.pts, packet.dts, packet.stream = packet.pts + later, decoded + later, out
                target.mux(packet)
            past += times[-1] - times[0] + times[1] - times[0]
    return path


@pytest.mark.parametrize(("parts", "full"), [("pii", False), ("piiip", False), ("ppppi", True)])
def test_fields_are_looked_for_beyond_the_beginning(tmp_path: Path, parts: str, full: bool) -> None:
    flags = int(CodecFlags.interlaced_dct | CodecFlags.interlaced_me)
    kinds = {"p": encode(tmp_path / "p.ts", numbered(20)), "i": encode(tmp_path / "i.ts", numbered(20), flags=flags)}
    path = joined(tmp_path / "a.ts", *(kinds[part] for part in parts))
    assert probe(path).interlaced is not full
    ((_, whole),) = inspect([InspectionJob(path, full=True)], workers=1)
    assert whole.problems == ()
    assert whole.info is not None
    assert whole.info.interlaced
    assert not probe(joined(tmp_path / "b.ts", kinds["p"], kinds["p"])).interlaced


# ------------------------------------------------------------------------------------------- packets and frames


def test_packets_that_build_on_what_was_cut_away_are_no_frames(tmp_path: Path) -> None:
    options = {"x265-params": "log-level=none:open-gop=1:keyint=20:min-keyint=20:bframes=4:scenecut=0"}
    whole = encode(tmp_path / "whole.mkv", numbered(), codec="libx265", options=options)
    begin = keys(whole)[1]
    for name in ("cut.mkv", "cut.ts", "cut.mp4"):
        path = copied(whole, tmp_path / name, lambda number: number >= begin)
        assert sound(path).num_frames == 40
        assert numbers(read_frames(path, [0, 39])) == [20, 59]


@pytest.mark.parametrize("suffix", ["ts", "mkv", "flv", "avi", "h264"])
def test_a_clip_that_begins_between_key_frames_begins_at_the_next_one(tmp_path: Path, suffix: str) -> None:
    whole = encode(tmp_path / f"whole.{suffix}", numbered(), options={"sc_threshold": "0"})
    first = keys(whole)[1]
    path = copied(whole, tmp_path / f"cut.{suffix}", lambda number: number >= first - 9)
    info = sound(path)
    assert (info.num_frames, round(info.fps, 2)) == (40, 25.0)
    assert numbers(read_frames(path, [0, 39])) == [20, 59]


@pytest.mark.parametrize("suffix", ["webm", "mkv"])
def test_frames_of_vp8_that_are_never_shown_are_not_counted(tmp_path: Path, suffix: str) -> None:
    """Every tenth packet comes twice, the first time with its bit ``show_frame`` cleared, as an alternate reference."""
    whole, path = encode(tmp_path / "whole.webm", numbered(), codec="libvpx"), tmp_path / f"a.{suffix}"
    with av.open(str(whole)) as reading, av.open(str(path), "w") as writing:
        stream, packets = writing.add_stream_from_template(reading.streams.video[0]), 0
        for number, packet in enumerate(reading.demux(video=0)):
            if number % 10 == 5:
                data = bytes(packet)
                hidden = av.Packet(bytes([data[0] & ~0x10]) + data[1:])
                hidden.pts = hidden.dts = packet.pts
                hidden.time_base, hidden.stream = packet.time_base, stream
                writing.mux(hidden)
                packets += 1
            if packet.size:
                packet.stream = stream
                writing.mux(packet)
                packets += 1
    assert packets == 66
    info = sound(path)
    assert (info.num_frames, info.times) == (60, ())


@pytest.mark.parametrize("suffix", ["webm", "mp4"])
def test_frames_of_vp9_that_are_never_shown_are_not_counted(tmp_path: Path, suffix: str) -> None:
    options = {"auto-alt-ref": "1", "lag-in-frames": "16", "b": "100k", "g": "100"}
    path = encode(tmp_path / f"a.{suffix}", numbered(), codec="libvpx-vp9", options=options)
    assert sound(path).num_frames == 60


def test_hidden_frames_of_vp9_are_known_by_their_headers() -> None:
    shown, hidden, existing = bytes([0b10000010]), bytes([0b10000000]), bytes([0b10001000])
    deep_shown, deep_hidden = bytes([0b10110001]), bytes([0b10110000])
    superframe = hidden + b"\0" * 9 + bytes([0b11000001, 10, 1, 0b11000001])
    assert [probing._SHOWN["vp9"](data) for data in (shown, existing, deep_shown, superframe)] == [True] * 4
    assert [probing._SHOWN["vp9"](data) for data in (hidden, deep_hidden)] == [False] * 2


@pytest.mark.parametrize("begins", [0, 30])
def test_two_recordings_joined_into_one_go_on(tmp_path: Path, begins: int) -> None:
    """Their clocks start alike, or the second in the middle of the first."""
    first = encode(tmp_path / "first.ts", numbered(60)).read_bytes()
    second = encode(tmp_path / "second.ts", numbered(60), times=list(range(begins, begins + 60))).read_bytes()
    path = tmp_path / "a.ts"
    path.write_bytes(first + second)
    info = sound(path)
    assert (info.num_frames, info.fps) == (120, pytest.approx(25))
    assert info.duration == pytest.approx(4.8, abs=0.1)
    indices = view(info, FrameSettings(size=Size(25, 48, 64), fps=8)).indices
    assert np.diff([info.time_of(index) for index in indices]) == pytest.approx([0.125] * 24, abs=0.06)


@pytest.mark.parametrize(
    ("codec", "suffix"),
    [
        ("libx264", "mkv"),
        ("libx264", "flv"),
        ("libx264", "avi"),
        ("libx264", "ts"),
        ("libx265", "mov"),
        ("mpeg4", "avi"),
        ("mpeg4", "mp4"),
        ("mpeg2video", "mpg"),
        ("mpeg2video", "ts"),
        ("wmv2", "wmv"),
        ("flv", "flv"),
        ("mjpeg", "avi"),
        ("prores", "mov"),
        ("ffv1", "mkv"),
    ],
)
def test_every_usual_container_gives_what_it_promises(tmp_path: Path, codec: str, suffix: str) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"this build of PyAV has no {codec}")
    traits: dict[str, Any] = {"prores": {"pixel_format": "yuv422p10le"}, "mjpeg": {"pixel_format": "yuvj420p"}}.get(
        codec, {}
    )
    path = encode(tmp_path / f"a.{suffix}", numbered(40), codec=codec, options=QUIET, **traits)
    info = sound(path)
    assert (info.num_frames, info.times, info.interlaced) == (40, (), False)
    assert info.fps == pytest.approx(25.0)
    assert info.duration == pytest.approx(1.6)


# ------------------------------------------------------------------------------------------------------- times


def seconds_taken(path: Path, size: str = "9x48x64", **settings: Any) -> list[float]:
    info = probe(path)
    return [
        info.time_of(index) for index in view(info, FrameSettings(size=Size.parse(size), fps=8, **settings)).indices
    ]


@pytest.mark.parametrize("suffix", ["mkv", "webm", "flv", "mp4"])
def test_a_container_that_knows_no_rate_is_measured(tmp_path: Path, suffix: str) -> None:
    """As a browser records: a frame every 33 ms or so, and a header that says nothing."""
    times = [33 * number + (7 * number) % 5 for number in range(90)]
    codec = "libvpx" if suffix == "webm" else "libx264"
    whole = encode(tmp_path / f"whole.{suffix}", numbered(90), codec=codec, times=times, rate=1000)
    path = copied(whole, tmp_path / f"a.{suffix}")
    info = sound(path)
    assert (info.num_frames, info.fps) == (90, pytest.approx(30.3, abs=0.1))
    assert info.duration == pytest.approx(2.97, abs=0.05)
    assert seconds_taken(path, "17x48x64") == pytest.approx([k / 8 for k in range(17)], abs=0.02)
    assert {found.code for found in findings(path, "17x48x64")} == {"only-part"}


def test_jitter_in_a_long_recording_does_not_change_its_speed(tmp_path: Path) -> None:
    times = [33 * number + (11 * number) % 17 for number in range(2700)]  # 90 s
    blank = [np.zeros((16, 16, 3), np.uint8)] * 2700
    whole = encode(tmp_path / "whole.mkv", blank, times=times, rate=1000, options={"preset": "ultrafast"})
    info = probe(copied(whole, tmp_path / "a.mkv"))
    assert info.fps == pytest.approx(30.3, abs=0.2)
    assert info.duration == pytest.approx(89.1, abs=0.1)


def with_a_pause(path: Path) -> Path:
    """Two seconds of 30 frames each, and two seconds between them in which nothing comes."""
    return encode(path, numbered(60), rate=30, times=[*range(30), *range(90, 120)])


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_pause_moves_no_frame_and_is_reported_in_seconds(tmp_path: Path, suffix: str) -> None:
    path = with_a_pause(tmp_path / f"a.{suffix}")
    info = sound(path)
    assert (info.fps, info.duration) == (pytest.approx(30, abs=0.1), pytest.approx(4.0, abs=0.01))
    assert info.uneven == pytest.approx(0.5, abs=0.02)
    assert list(view(info, FrameSettings(size=Size(5, 48, 64), fps=8)).indices) == [0, 4, 8, 11, 15]
    codes = {found.code: found for found in findings(path, "5x48x64")}
    assert codes.keys() == {"variable-rate", "only-part"}
    assert "freezes for 1.85 of its 4 seconds" in codes["variable-rate"].message
    assert "seconds 0 to 0.625 of 4" in codes["only-part"].message
    beyond = seconds_taken(path, "17x48x64")
    assert [time < 1 for time in beyond] == [True] * 9 + [False] * 8
    assert beyond[9:] == pytest.approx([3.0 + k / 8 for k in range(8)], abs=0.0626)
    assert "only-part" not in {found.code for found in findings(path, "17x48x64")}


@pytest.mark.parametrize("sampling", ["uniform", "random-start"])
def test_other_ways_of_sampling_go_by_time_too(tmp_path: Path, sampling: Any) -> None:
    info = probe(with_a_pause(tmp_path / "a.mp4"))
    starts = set()
    for number in range(50):
        settings = FrameSettings(size=Size(5, 48, 64), fps=8, sampling=sampling)
        times = [info.time_of(index) for index in view(info, settings, f"clip {number}").indices]
        steps = np.diff(times)
        assert (steps > 0).all()
        starts.add(times[0])
        if sampling == "random-start":
            assert sum(abs(step - 0.125) > 0.04 for step in steps) <= 2  # into the pause, and out of it
        else:
            assert times == pytest.approx([0.0, 0.6, 3.0, 3.4, 3.97], abs=0.4)
    assert (len(starts) > 10) == (sampling == "random-start")


@pytest.mark.parametrize("see_through", [False, True])
def test_a_gif_is_see_through_only_if_it_is(tmp_path: Path, see_through: bool) -> None:
    from PIL import Image

    picture = Image.new("P", (64, 48), 1)
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.paste(0, (20, 0, 21, 48))
    path = tmp_path / "a.gif"
    options: dict[str, Any] = {"transparency": 0} if see_through else {}
    picture.save(path, save_all=True, append_images=[picture] * 11, duration=40, **options)
    assert probe(path).alpha == see_through


def test_the_last_frame_of_a_gif_may_stay(tmp_path: Path) -> None:
    from PIL import Image

    pictures = [Image.fromarray(pixels) for pixels in numbered(50)]
    path = tmp_path / "a.gif"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=[40] * 49 + [5000])
    info = sound(path)
    assert (info.num_frames, info.fps, info.uneven, info.duration) == (50, 25.0, 0.0, pytest.approx(2.0))
    assert seconds_taken(path) == pytest.approx([k / 8 for k in range(9)], abs=0.0201)


# ----------------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("sizes", [((32, 32), (48, 64)), ((48, 64), (32, 32))])
def test_the_film_is_read_and_not_its_preview(tmp_path: Path, suffix: str, sizes: tuple[tuple[int, int], ...]) -> None:
    path = tmp_path / f"a.{suffix}"
    with av.open(str(path), "w") as target:
        streams = []
        for height, width in sizes:
            stream = target.add_stream("libx264", rate=25)
            assert isinstance(stream, av.VideoStream)
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            streams.append(stream)
        for pictures in zip(*(numbered(20, *size) for size in sizes), strict=True):
            for stream, pixels in zip(streams, pictures, strict=True):
                target.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        for stream in streams:
            target.mux(stream.encode(None))
    info = sound(path)
    assert (info.num_frames, info.height, info.width) == (20, 48, 64)
    assert numbers(read_frames(path, [19])) == [19]


def test_a_large_poster_is_not_the_film(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as target:
        poster = target.add_stream("mjpeg", rate=25)
        assert isinstance(poster, av.VideoStream)
        film = target.add_stream("libx264", rate=25)
        assert isinstance(film, av.VideoStream)
        poster.height, poster.width, poster.pix_fmt = 480, 640, "yuvj420p"
        film.height, film.width, film.pix_fmt = 48, 64, "yuv420p"
        target.mux(poster.encode(av.VideoFrame.from_ndarray(next(numbered(1, 480, 640)), format="rgb24")))
        for pixels in numbered(20):
            target.mux(film.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        for stream in (poster, film):
            target.mux(stream.encode(None))
    assert (probe(path).num_frames, probe(path).width) == (20, 64)
