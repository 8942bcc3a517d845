"""Which frames of a clip a video is made of, and what there is to say of the clip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cogtune.commands.infer.request import InferRequest, Problems, names_frames, size_asked
from cogtune.data.frames import ClipView, FrameSettings, available_frames, view
from cogtune.data.validation.clips import check_clip
from cogtune.data.video.clips import probe
from cogtune.models.checkpoint_configs import ModelSpec
from cogtune.models.geometry import FRAME_STEP, Size
from cogtune.system import console

_TOLD = frozenset(
    {"alpha", "barred", "cropped", "hdr", "interlaced", "joined", "no-rate", "pixel-aspect", "several-streams"}
)
"""Findings of :func:`cogtune.data.validation.clips.check_clip` that matter to sampling as to training."""


def frames_of(
    request: InferRequest, spec: ModelSpec, facts: Mapping[str, Any], clips: Sequence[Path], problems: Problems
) -> tuple[Size, dict[Path, ClipView], float]:
    """Return the size and rate of the videos, and which frames of each clip are used.

    Args:
        facts: what the run knows.
        problems: gets what is wrong with the size and the clips; what else there is to say of a clip is a warning.
    """
    size = Size.parse(facts["size"]) if facts.get("size") else spec.native
    fps = float(request.fps or facts.get("fps") or spec.variant.fps)
    with problems.gathered():
        size = size_asked(request, size)
    infos = {}
    for clip in clips:
        with problems.gathered():
            infos[clip] = probe(clip)
    if infos and not names_frames(request) and not spec.learned_positions:
        least = min(available_frames(info, FrameSettings(size=size, fps=fps)) for info in infos.values())
        most = (least - 1) // FRAME_STEP * FRAME_STEP + 1
        if 1 <= most < size.num_frames:
            console.note(f"making {most} frames instead of {size.num_frames}: --video has {least} at {fps:g} fps")
            size = replace(size, num_frames=most)
    views = {}
    for clip, info in infos.items():
        for found in check_clip(f"--video {clip}", info, FrameSettings(size=size, fps=fps)):
            if found.code in _TOLD:
                console.warn(f"{found.where} {found.message}")
        try:
            views[clip] = view(info, FrameSettings(size=size, fps=fps))
        except ValueError as error:
            problems.lines.append(f"--video {clip}: {error}")
    return size, views, fps
