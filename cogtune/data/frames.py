"""The frames of a clip that training reads: which ones, at which size, cropped how."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cogtune.data.video import timing
from cogtune.data.video.clips import Pixels, iter_frames
from cogtune.data.video.container import VideoInfo
from cogtune.data.video.images import read_image
from cogtune.data.video.stamp import Stamp
from cogtune.models.geometry import (
    Crop,
    FrameSampling,
    Reshape,
    Size,
    cover,
    enlargement_loss,
    fit,
    frame_indices,
    longest_at,
    shape_loss,
    spread_indices,
)
from cogtune.system.digests import digest
from cogtune.system.errors import counted

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class FrameSettings:
    """Settings for turning a run's clips into frames of one size, or of one of several.

    Args:
        size: the training size; the largest of ``buckets`` if there are any.
        fps: the training frame rate; see :func:`cogtune.models.geometry.frame_indices`.
        buckets: the sizes that clips are assigned to, see :func:`settings_for`; empty for only ``size``.
        sampling: how frames are chosen.
        skip_start, skip_end: frames to ignore at a clip's start and end.
        reshape: how frames are fitted to the size.
        seed: seed of random choices, which also depend on the clip's bytes.
    """

    size: Size
    fps: float
    buckets: tuple[Size, ...] = ()
    sampling: FrameSampling = "head"
    skip_start: int = 0
    skip_end: int = 0
    reshape: Reshape = "center"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.fps > 0 or min(self.skip_start, self.skip_end) < 0:
            raise ValueError(f"fps must be greater than 0 and skipped frames at least 0: {self}")

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Every size that a clip may be trained at."""
        return self.buckets or (self.size,)

    @property
    def draws(self) -> bool:
        """Whether the view of a clip depends on its bytes."""
        return self.sampling == "random-start" or self.reshape == "random"


@dataclass(frozen=True)
class ClipView:
    """The view of one clip that training sees: its frames, and how they are fitted.

    Args:
        indices: the frames' numbers in the clip, ascending.
        size: frames, height and width of the result.
        source: height and width of the clip's frames.
        reshape, place: arguments of :func:`cogtune.models.geometry.fit`.
        trimmed: whether the clip's frames are what its container's cropping rectangle leaves of them.
    """

    indices: tuple[int, ...]
    size: Size
    source: tuple[int, int]
    reshape: Reshape = "center"
    place: float = 0.5
    trimmed: bool = False

    @property
    def crop(self) -> Crop:
        """The fit of the clip's frames."""
        return self.crop_of(self.source)

    def crop_of(self, source: tuple[int, int]) -> Crop:
        """Return the fit of a picture of another ``source`` (height, width), such as the conditioning image."""
        return fit(source, (self.size.height, self.size.width), self.reshape, self.place)

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The part of a frame that training sees: top, left, height and width in the clip's pixels."""
        crop, spans = self.crop, []
        for offset, resized, want, have in zip(
            (crop.top, crop.left), crop.resized, (self.size.height, self.size.width), self.source, strict=True
        ):
            first, last = max(0, offset), min(resized, offset + want)
            spans.append((round(first * have / resized), round(last * have / resized)))
        (top, bottom), (left, right) = spans
        return top, left, bottom - top, right - left

    def first_frame(self) -> ClipView:
        """Return the view of only the first frame."""
        return replace(self, indices=self.indices[:1], size=replace(self.size, num_frames=1))


def available_frames(info: VideoInfo, settings: FrameSettings) -> int:
    """Return how many frames a clip can give after skipping, at the settings' rate or, if uniform, in all."""
    if settings.sampling == "uniform":
        return max(0, info.num_frames - settings.skip_end - settings.skip_start)
    return _longest_at_rate(info, settings)


def _longest_at_rate(info: VideoInfo, settings: FrameSettings) -> int:
    end = info.num_frames - settings.skip_end
    if info.times:
        return len(timing.at_rate(info.times[: max(0, end)], settings.fps, settings.skip_start))
    return longest_at(end, info.fps, settings.fps, settings.skip_start)


def settings_for(info: VideoInfo, settings: FrameSettings) -> FrameSettings:
    """Return the settings with the single size that a clip is trained at.

    This is the bucket of the least :func:`bucket_loss` among those that the clip is long enough for, the first of equal
    ones; if the clip is too short for all, the shortest bucket.
    """
    if not settings.buckets:
        return settings
    given = available_frames(info, settings)
    long_enough = [size for size in settings.buckets if size.num_frames <= given]
    if long_enough:
        chosen = min(long_enough, key=lambda size: round(bucket_loss(info, settings, size), 9))
    else:
        chosen = min(settings.buckets, key=lambda size: size.num_frames)
    return replace(settings, size=chosen, buckets=())


def clips_per_bucket(infos: Iterable[VideoInfo], settings: FrameSettings) -> dict[Size, list[VideoInfo]]:
    """Return the bucket plan: the clips of every size."""
    plan: dict[Size, list[VideoInfo]] = {size: [] for size in settings.sizes}
    for info in infos:
        plan[settings_for(info, settings).size].append(info)
    return plan


def bucket_loss(info: VideoInfo, settings: FrameSettings, size: Size) -> float:
    """Return what a clip loses when it is trained at ``size``: the sum of three fractions.

    They are the loss by its change of shape (:func:`cogtune.models.geometry.shape_loss`), the frames at the training
    rate that are not used, and the pixels that upscaling adds.
    """
    source, target = (info.height, info.width), (size.height, size.width)
    unused = max(0.0, 1.0 - size.num_frames / max(1, _longest_at_rate(info, settings)))
    return shape_loss(source, target) + unused + enlargement_loss(source, fit(source, target, settings.reshape))


def view(info: VideoInfo, settings: FrameSettings, clip_digest: str = "") -> ClipView:
    """Return the view of a clip that training sees.

    Args:
        clip_digest: the digest of the clip's bytes; required if :attr:`FrameSettings.draws`.

    Raises:
        ValueError: the clip has too few frames; the message says how many it needs.
    """
    mine = settings_for(info, settings)
    return ClipView(
        tuple(_indices(info, mine, clip_digest)),
        mine.size,
        (info.height, info.width),
        mine.reshape,
        _drawn(mine.seed, clip_digest, "place") if mine.reshape == "random" else 0.5,
        info.trimmed,
    )


def _indices(info: VideoInfo, settings: FrameSettings, clip_digest: str) -> list[int]:
    first, end, count = settings.skip_start, info.num_frames - settings.skip_end, settings.size.num_frames
    if settings.sampling == "uniform":
        if info.times:
            return timing.spread(info.times, first, end, count)
        return spread_indices(first, end, count)
    if info.times:
        return _indices_by_time(info, settings, clip_digest)
    indices = frame_indices(end, info.fps, count, settings.fps, first)
    if settings.sampling == "random-start":
        later = int(_drawn(settings.seed, clip_digest, "start") * (end - indices[-1]))
        indices = [index + later for index in indices]
    return indices


def _indices_by_time(info: VideoInfo, settings: FrameSettings, clip_digest: str) -> list[int]:
    """Return the frames to read at a given rate from a clip with uneven timestamps."""
    first, end, count = settings.skip_start, info.num_frames - settings.skip_end, settings.size.num_frames
    times = info.times[: max(0, end)]
    given = len(timing.at_rate(times, settings.fps, first))
    if given < count:
        raise ValueError(
            f"gives {counted(given, 'frame')} at {settings.fps:g} fps by their timestamps, and {count} are needed"
        )
    if settings.sampling == "random-start":
        last = timing.last_start(times, settings.fps, count, first, end)
        first += int(_drawn(settings.seed, clip_digest, "start") * (last - first + 1))
    return timing.at_rate(times, settings.fps, first)[:count]


def _drawn(seed: int, clip_digest: str, what: str) -> float:
    """Return a number in [0, 1) that is fixed for one clip."""
    if not clip_digest:
        raise TypeError(f"the {what} is drawn from the clip's digest, which was not given")
    return int(digest([seed, clip_digest, what])[:12], 16) / 16**12


def reshape(frames: Pixels, size: Size, crop: Crop | None = None) -> torch.Tensor:
    """Return frames ``uint8 [F, H, W, 3]`` fitted to a height and width: ``uint8 [F, 3, height, width]``.

    The resize is bicubic and antialiased. Without a ``crop`` the aspect ratio is kept and the center is cropped.
    """
    import torch

    crop = crop or cover((frames.shape[1], frames.shape[2]), (size.height, size.width))
    pixels = torch.from_numpy(np.require(frames, requirements=("C", "W"))).permute(0, 3, 1, 2)
    if pixels.shape[2:] != crop.resized:
        pixels = torch.nn.functional.interpolate(pixels, crop.resized, mode="bicubic", antialias=True)
    top, left = max(0, crop.top), max(0, crop.left)
    pixels = pixels[:, :, top : top + size.height, left : left + size.width].contiguous()
    above, before = max(0, -crop.top), max(0, -crop.left)
    below, behind = size.height - above - pixels.shape[2], size.width - before - pixels.shape[3]
    return (
        torch.nn.functional.pad(pixels, (before, behind, above, below)) if above + before + below + behind else pixels
    )


def load_clip(path: Path, seen: ClipView, stamp: Stamp | None = None) -> torch.Tensor:
    """Return the frames of a clip as training sees them: ``uint8 [F, 3, height, width]``.

    Besides the result, one frame of the clip's size is in memory at a time.

    Args:
        stamp: the file's expected state while it is read.

    Raises:
        CogtuneError: the clip cannot be read, does not match the view, or changed.
    """
    import torch

    size = seen.size
    clip = torch.empty((size.num_frames, 3, size.height, size.width), dtype=torch.uint8)
    for position, frame in enumerate(iter_frames(path, seen.indices, stamp=stamp)):
        clip[position] = reshape(frame[np.newaxis], size, seen.crop_of((frame.shape[0], frame.shape[1])))[0]
    return clip


def load_image(path: Path, size: Size, seen: ClipView | None = None, stamp: Stamp | None = None) -> torch.Tensor:
    """Return a conditioning image ``uint8 [3, height, width]``, fitted like the frames of its clip's view.

    Without a view, as for sampling, its aspect ratio is kept and the center is cropped.

    Args:
        stamp: the file's expected state while it is read.

    Raises:
        CogtuneError: the file is not an image, cannot be read, or changed.
    """
    pixels = read_image(path, stamp)
    crop = seen.crop_of((pixels.shape[0], pixels.shape[1])) if seen else None
    return reshape(pixels[np.newaxis], size, crop)[0]
