"""Checks of one clip and its image, from their properties."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from cogtune.data.findings import Finding, finding
from cogtune.data.frames import FrameSettings, available_frames, settings_for, view
from cogtune.data.video.container import SPLIT_OR_JOIN, VideoInfo
from cogtune.data.video.images import ImageInfo
from cogtune.data.video.timing import standstill
from cogtune.models.geometry import FRAME_STEP, Reshape, fit, legal_frame_counts, nearest_below, shape_loss
from cogtune.system.errors import counted

MOST_CROPPED = 0.25
"""Largest fraction of a frame that may be cropped, or be black bars, without a warning."""

MOST_STRETCHED = 0.05
"""Largest change of a frame's aspect ratio without a warning."""

LEAST_TAKEN = 0.75
"""Smallest fraction of a clip that training uses without a note."""

SAME_RATE = 0.95
"""Smallest fraction of the training frame rate that counts as equal (23.976 passes for 24)."""

MOST_STANDSTILL = 0.02
"""Largest fraction of a clip's time in which its picture may freeze without a warning."""

STANDSTILL = 1.5
"""A freeze is a gap between frames of more than this many usual ones, and this many of training's."""

SAME_SHAPE = 0.05
"""Largest difference between the aspect ratios of an image and its clip."""


def check_clip(where: str, info: VideoInfo, settings: FrameSettings, *, any_frames: bool = True) -> Iterator[Finding]:
    """Yield findings about training on a clip with these settings.

    Args:
        any_frames: whether the model can be trained on another number of frames.
    """
    settings = settings_for(info, settings)
    yield from _check_length(where, info, settings, any_frames=any_frames)
    yield from _check_pauses(where, info, settings)
    if not info.rate_told:
        yield finding(
            "no-rate",
            where,
            f"does not declare a frame rate; assumed to be {info.fps:g}",
            "if that is wrong, the model learns too fast or too slow motion: remux it with its frame rate, "
            "ffmpeg -r RATE -i IN -c copy OUT.mp4",
        )
    if info.files > 1:
        yield finding(
            "joined",
            where,
            f"is {info.files} files joined end to end, of which {counted(info.num_frames, 'frame')} are read",
            SPLIT_OR_JOIN,
        )
    if info.streams > 1:
        yield finding(
            "several-streams",
            where,
            f"contains {info.streams} video streams; the largest, or the first of equal ones, is read",
            "to train on another one, extract it: ffmpeg -i IN -map 0:v:1 -c copy OUT",
        )
    if info.trimmed:
        yield finding(
            "trimmed", where, f"is cropped to {info.height}x{info.width} by its container, as players show it"
        )
    if info.rotation or info.mirrored:
        ways = ["mirrored"] if info.mirrored else []
        ways += [f"rotated by {info.rotation} degrees"] if info.rotation else []
        yield finding("rotated", where, f"is {' and '.join(ways)}, as players show it")
    if abs(info.pixel_aspect - 1) > 0.01:
        square = (info.width * max(1, info.pixel_aspect), info.height * max(1, 1 / info.pixel_aspect))
        width, height = (2 * round(side / 2) for side in square)
        yield finding(
            "pixel-aspect",
            where,
            f"has pixels {info.pixel_aspect:.3g} times as wide as high, so its frames are distorted",
            f"resize it to {width}x{height} (width x height) with square pixels: "
            f"ffmpeg -i IN -vf scale={width}:{height},setsar=1 OUT",
        )
    if info.interlaced:
        yield finding(
            "interlaced",
            where,
            "is interlaced, so its frames have combing artifacts",
            "deinterlace it: ffmpeg -i IN -vf bwdif=mode=send_frame OUT",
        )
    yield from _check_shape(where, (info.height, info.width), settings)
    yield from _check_pixels(where, info)


def _check_length(where: str, info: VideoInfo, settings: FrameSettings, *, any_frames: bool) -> Iterator[Finding]:
    count, given = settings.size.num_frames, available_frames(info, settings)
    if given < count:
        rate = "" if settings.sampling == "uniform" else f" at {settings.fps:g} fps"
        skipped = f" from frame {settings.skip_start} on" if settings.skip_start else ""
        skipped += f" without its last {settings.skip_end}" if settings.skip_end else ""
        otherwise = (
            "skip fewer frames, use a longer clip, or remove it" if skipped else "use a longer clip, or remove it"
        )
        fits = nearest_below(given, legal_frame_counts(FRAME_STEP, given))
        yield finding(
            "too-short",
            where,
            f"gives {counted(given, 'frame')}{rate}{skipped}, but training requires {count} "
            f"(it has {info.num_frames} at {info.fps:.4g} fps)",
            f"use a longer clip, or train on {fits} frames" if fits and any_frames else otherwise,
        )
    seconds = _seconds(info, settings.skip_start, info.num_frames - settings.skip_end - 1)
    if settings.sampling == "uniform":
        yield from _check_speed(where, seconds, settings)
        return
    if info.fps < SAME_RATE * settings.fps:
        yield finding(
            "slow",
            where,
            f"runs at {info.fps:.4g} fps, training at {settings.fps:g}: "
            f"its motion is learned {settings.fps / info.fps:.2g} times as fast",
            "use a source with a higher frame rate",
        )
    if count > given:
        return
    indices = view(info, replace(settings, sampling="head", reshape="center")).indices
    taken = _seconds(info, indices[0], indices[-1], 1 / min(settings.fps, info.fps))
    if taken < LEAST_TAKEN * seconds:
        first = info.time_of(indices[0])
        head = f"seconds {first:.3g} to {first + taken:.3g}"
        part = head if settings.sampling == "head" else f"{taken:.3g} seconds, from a start drawn for it,"
        hint = "split it into several clips, or choose other frames with --sampling"
        yield finding("only-part", where, f"is trained on {part} of {info.duration:.3g}", hint)


def _seconds(info: VideoInfo, first: int, last: int, last_for: float | None = None) -> float:
    """Return how long frames ``first`` to ``last`` are shown; the last one as long as most, or for ``last_for``."""
    if last < first:
        return 0.0
    return info.time_of(last) - info.time_of(first) + (last_for or 1 / info.fps)


def _check_pauses(where: str, info: VideoInfo, settings: FrameSettings) -> Iterator[Finding]:
    """Yield a finding about a clip with freezes longer than a training frame."""
    times = info.times[settings.skip_start : info.num_frames - settings.skip_end]
    paused = standstill(times, STANDSTILL / min(settings.fps, info.fps))
    if paused > MOST_STANDSTILL * info.duration:
        yield finding(
            "variable-rate",
            where,
            f"has a variable frame rate: its picture freezes for {paused:.3g} of its {info.duration:.3g} seconds, "
            "which training does not reproduce",
            f"to train on the pauses, too, encode it at a constant rate: ffmpeg -i IN -vf fps={settings.fps:g} OUT",
        )


def _check_speed(where: str, seconds: float, settings: FrameSettings) -> Iterator[Finding]:
    """Yield a finding about motion that changes speed since frames are spread over many seconds."""
    speed = seconds * settings.fps / settings.size.num_frames
    if not SAME_RATE < speed < 1 / SAME_RATE:
        yield finding(
            "other-speed",
            where,
            f"has its {settings.size.num_frames} frames spread over {seconds:.3g} seconds: "
            f"at {settings.fps:g} fps its motion is learned {speed:.2g} times as fast",
            "use --sampling head or random-start to keep the frame rate",
        )


_RESHAPED: dict[Reshape, tuple[str, float, str]] = {
    "center": ("cropped", MOST_CROPPED, "{:.0%} of each frame is cropped to make {} fit {}"),
    "random": ("cropped", MOST_CROPPED, "{:.0%} of each frame is cropped to make {} fit {}"),
    "letterbox": ("barred", MOST_CROPPED, "{:.0%} of each frame is black bars to make {} fit {}"),
    "stretch": ("stretched", MOST_STRETCHED, "is distorted by {:.0%} to make {} fit {}"),
}
"""For each way to reshape: the finding's code, the tolerance, and the message."""


def _check_shape(where: str, source: tuple[int, int], settings: FrameSettings) -> Iterator[Finding]:
    target = (settings.size.height, settings.size.width)
    resized = fit(source, target, settings.reshape).resized
    shape, wanted = (f"{height}x{width}" for height, width in (source, target))
    enlarged = max(now / was for now, was in zip(resized, source, strict=True))
    if enlarged > 1:
        fill = "fit" if settings.reshape == "letterbox" else "cover"
        yield finding(
            "upscaled",
            where,
            f"{shape} is enlarged {enlarged:.3g} times to {fill} {wanted}",
            "use a larger source, or train at a smaller size",
        )
    code, most, words = _RESHAPED[settings.reshape]
    lost = shape_loss(source, target)
    if lost > most:
        hint = "crop it to what matters, or train at a size of its aspect ratio"
        yield finding(code, where, words.format(lost, shape, wanted), hint)


def _check_pixels(where: str, info: VideoInfo) -> Iterator[Finding]:
    if info.bits > 8:
        yield finding("deep-colour", where, f"has {info.bits} bits per channel ({info.pixel_format}); 8 are used")
    if info.hdr:
        yield finding(
            "hdr",
            where,
            f"has HDR or wide-gamut colours ({info.hdr}), which look pale without tone mapping",
            "convert it to BT.709 with tone mapping first",
        )
    if info.alpha:
        yield finding(
            "alpha",
            where,
            f"has transparency ({info.pixel_format}), which is dropped; the colours beneath it are used",
            "put it on a background",
        )


def check_image(where: str, image: ImageInfo, info: VideoInfo) -> Iterator[Finding]:
    """Yield findings about a sample's image, including a different aspect ratio than the clip's."""
    if image.transparency:
        yield finding(
            "alpha",
            where,
            f"has an image with transparency ({image.transparency}), which is dropped; the colours beneath it are used",
            "put it on a background",
        )
    if image.pictures > 1:
        message = f"has an image that holds {image.pictures} pictures; the first is used"
        yield finding("several-pictures", where, message)
    height, width, shape = image.height, image.width, (info.height, info.width)
    ratio = (width / height) / (shape[1] / shape[0])
    if max(ratio, 1 / ratio) > 1 + SAME_SHAPE:
        yield finding(
            "image-shape",
            where,
            f"has an image of {height}x{width} and a clip of {shape[0]}x{shape[1]}, so they are cropped differently",
            "use the clip's first frame, or an image of its aspect ratio",
        )
