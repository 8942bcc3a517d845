"""What can be wrong with one clip and its image, from what a look at them showed."""

from __future__ import annotations

from collections.abc import Iterator

from cogtune.data.container import VideoInfo
from cogtune.data.findings import Finding, finding
from cogtune.data.frames import FrameSettings
from cogtune.geometry import FRAME_STEP, cropped_away, legal_frame_counts, longest_at, nearest_below

MOST_CROPPED = 0.25
"""The share of a frame that may be cut away before it is worth a warning."""

SAME_RATE = 0.95
"""A clip at this share of the training frame rate or above counts as fast enough (23.976 passes for 24)."""

MOST_UNEVEN = 0.02
"""The share of a clip's frames that may be out of step with the others before it is worth a warning."""

SAME_SHAPE = 0.05
"""By how much the aspect of an image may differ from its clip's."""


def check_clip(where: str, info: VideoInfo, settings: FrameSettings) -> Iterator[Finding]:
    """What stands against training on a clip at these settings, and what is worth knowing about it."""
    size = settings.size
    given = longest_at(info.num_frames, info.fps, settings.fps, settings.start)
    if given < size.num_frames:
        from_start = f" from frame {settings.start} on" if settings.start else ""
        fits = nearest_below(given, legal_frame_counts(FRAME_STEP, given))
        yield finding(
            "too-short",
            where,
            f"gives {given} frames at {settings.fps:g} fps{from_start}, and training takes {size.num_frames} "
            f"(it has {info.num_frames} at {info.fps:.4g} fps)",
            f"use a longer clip, or ask for {fits} frames" if fits else "use a longer clip, or leave it out",
        )
    if info.fps < SAME_RATE * settings.fps:
        yield finding(
            "slow",
            where,
            f"runs at {info.fps:.4g} fps, training at {settings.fps:g}: "
            f"its motion is learned {settings.fps / info.fps:.2g} times as fast",
            "use a source with more frames a second",
        )
    if info.uneven > MOST_UNEVEN:
        yield finding(
            "variable-rate",
            where,
            f"has a variable frame rate: {info.uneven:.0%} of its frames come much sooner or later than the others, "
            f"and training takes them as {info.fps:.4g} a second throughout",
            f"encode it again at a constant rate: ffmpeg -i IN -vf fps={settings.fps:g} OUT",
        )
    if info.rotation:
        yield finding("rotated", where, f"is turned by {info.rotation} degrees, as players turn it")
    if abs(info.pixel_aspect - 1) > 0.01:
        yield finding(
            "pixel-aspect",
            where,
            f"has pixels {info.pixel_aspect:.3g} times as wide as high: it is trained squeezed or stretched",
            f"resize it to {round(info.width * info.pixel_aspect)}x{info.height} with square pixels",
        )
    source, target = (info.height, info.width), (size.height, size.width)
    shape, fit = f"{info.height}x{info.width}", f"{size.height}x{size.width}"
    enlarged = max(size.height / info.height, size.width / info.width)
    if enlarged > 1:
        yield finding(
            "upscaled",
            where,
            f"{shape} is enlarged {enlarged:.3g} times to cover {fit}",
            "use a larger source, or train at a smaller size",
        )
    cropped = cropped_away(source, target)
    if cropped > MOST_CROPPED:
        yield finding(
            "cropped",
            where,
            f"{cropped:.0%} of each frame is cut away to make {shape} fit {fit}",
            "crop it yourself to what matters, or train at a size of its shape",
        )
    yield from _check_pixels(where, info)


def _check_pixels(where: str, info: VideoInfo) -> Iterator[Finding]:
    if info.bits > 8:
        yield finding(
            "deep-colour", where, f"has {info.bits} bits a colour ({info.pixel_format}); it is trained with 8"
        )
    if info.hdr:
        yield finding(
            "hdr",
            where,
            f"has HDR or wide-gamut colours ({info.hdr}): it is trained pale, as no tone mapping is applied",
            "convert it to BT.709 with tone mapping first",
        )
    if info.alpha:
        yield finding(
            "alpha",
            where,
            f"has transparency ({info.pixel_format}), which is dropped: what lies under it is trained",
            "put it on a background first",
        )


def check_image(where: str, image: tuple[int, int], info: VideoInfo) -> Iterator[Finding]:
    """Whether an image (height, width) has the shape of its clip: both are cut to the training size, each by itself."""
    (height, width), shape = image, (info.height, info.width)
    ratio = (width / height) / (shape[1] / shape[0])
    if max(ratio, 1 / ratio) > 1 + SAME_SHAPE:
        yield finding(
            "image-shape",
            where,
            f"has an image of {height}x{width} and a clip of {shape[0]}x{shape[1]}: they are not cut alike",
            "use the clip's first frame, or an image of its shape",
        )
