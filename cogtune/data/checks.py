"""Everything that is wrong with a dataset, found in one pass: each clip opened, each caption looked at.

No model is needed: with a checkpoint's spec its own rules are checked too. Nothing here imports torch.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cogtune.data.findings import SEVERITIES, Finding, finding, listed
from cogtune.data.frames import FrameSettings, read_image
from cogtune.data.sources import Dataset, Sample
from cogtune.data.video import VideoError, VideoInfo, probe
from cogtune.errors import CogtuneError
from cogtune.geometry import (
    FRAME_STEP,
    Size,
    cropped_away,
    legal_frame_counts,
    longest_at,
    nearest_below,
)
from cogtune.models import ModelSpec

REPORT_VERSION = 1
"""The version of :meth:`Report.to_json`'s schema."""

MOST_CROPPED = 0.25
"""The share of a frame that may be cut away before it is worth a warning."""

SAME_RATE = 0.95
"""A clip at this share of the training frame rate or above counts as fast enough (23.976 passes for 24)."""

CAPTION_TOKENS = 226
"""The prompt limit of all five models' configs, when no spec is at hand."""

TOKENS_PER_WORD = 1.35
"""About what T5's tokenizer makes of an English word, for when it is not at hand."""


@dataclass(frozen=True)
class Report:
    """What a check of a dataset found.

    Args:
        root, layout: the dataset's.
        findings: the errors, then the warnings, then the notes, each in the order of the samples.
        infos: what each clip is that could be opened, by sample id.
        counts: ``samples``, ``clips`` (that could be opened), ``error``, ``warning``, ``note``.
    """

    root: Path
    layout: str
    findings: tuple[Finding, ...]
    infos: dict[str, VideoInfo]
    counts: dict[str, int]

    @property
    def ok(self) -> bool:
        """Whether there is no error: the dataset can be trained on."""
        return self.counts["error"] == 0

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-able values; programs may rely on its keys."""
        return {
            "version": REPORT_VERSION,
            "dataset": str(self.root),
            "layout": self.layout,
            "ok": self.ok,
            "counts": dict(self.counts),
            "findings": [asdict(found) for found in self.findings],
            "clips": [{"id": identity, **asdict(info)} for identity, info in self.infos.items()],
        }


def check_dataset(
    dataset: Dataset,
    settings: FrameSettings,
    spec: ModelSpec | None = None,
    *,
    workers: int = 2,
    count_tokens: Callable[[str], int] | None = None,
) -> Report:
    """Open every clip and image and look at every caption.

    The report holds all that is wrong, what reading the dataset found included.

    Args:
        dataset: as read from its folder.
        settings: the frames that training takes.
        spec: the model to be trained; its rules of size and caption length are checked when it is given.
        workers: clips opened at a time.
        count_tokens: the number of tokens in a caption; without it they are estimated from its words.
    """
    told = {(found.where, found.code) for found in dataset.findings}

    def look(sample: Sample) -> tuple[VideoInfo | None, list[Finding]]:
        info, findings = _check_files(sample, settings)
        return info, [found for found in findings if (found.where, found.code) not in told]

    with ThreadPoolExecutor(workers) as pool:
        looked = list(pool.map(look, dataset.samples))
    findings = [*dataset.findings, *_check_size(settings.size, spec)]
    infos: dict[str, VideoInfo] = {}
    limit = spec.max_text_seq_length if spec else CAPTION_TOKENS
    for sample, (info, found) in zip(dataset.samples, looked, strict=True):
        if info is not None:
            infos[sample.id] = info
        findings += found
        if not told & {(sample.id, "missing-caption"), (sample.id, "not-utf8")}:
            findings += _check_caption(sample, limit, count_tokens)
    findings += _check_repeats(dataset.samples)

    places = {sample.id: place for place, sample in enumerate(dataset.samples)}
    findings.sort(key=lambda found: (SEVERITIES.index(found.severity), places.get(found.where, -1)))
    severities = Counter(found.severity for found in findings)
    counts = {"samples": len(dataset.samples), "clips": len(infos)}
    counts |= {severity: severities[severity] for severity in SEVERITIES}
    return Report(dataset.root, dataset.layout, tuple(findings), infos, counts)


def _check_size(size: Size, spec: ModelSpec | None) -> list[Finding]:
    if spec is None:
        return []
    where, hint = str(size), f"the model was trained at {spec.native}"
    problems = [finding("model-size", where, problem, hint) for problem in spec.size_problems(size)]
    return problems + [finding("model-advice", where, advice, hint) for advice in spec.size_advice(size)]


def _check_files(sample: Sample, settings: FrameSettings) -> tuple[VideoInfo | None, list[Finding]]:
    findings = []
    info = None
    try:
        info = probe(sample.video)
    except VideoError as error:
        findings.append(finding(error.code, sample.id, f"{sample.video.name} {error.reason}", error.advice))
    else:
        findings += _check_clip(sample.id, info, settings)
    if sample.image is not None:
        if sample.image.is_file():
            try:
                read_image(sample.image)
            except CogtuneError as error:
                findings.append(finding("unreadable-image", sample.id, error.message, error.hint))
        else:
            message = f"{sample.image.name} is not there"
            findings.append(finding("missing-image", sample.id, message, "check the path"))
    return info, findings


def _check_clip(where: str, info: VideoInfo, settings: FrameSettings) -> Iterator[Finding]:
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


def _check_caption(sample: Sample, limit: int, count_tokens: Callable[[str], int] | None) -> Iterator[Finding]:
    words = len(sample.caption.split())
    if words == 0:
        yield finding("empty-caption", sample.id, "has an empty caption", "describe what the clip shows")
    elif words == 1:
        yield finding(
            "one-word-caption",
            sample.id,
            f"has a caption of one word: '{sample.caption[:60]}'",
            "describe what the clip shows in a sentence or more",
        )
    tokens = count_tokens(sample.caption) if count_tokens else round(words * TOKENS_PER_WORD)
    if tokens > limit:
        about = "" if count_tokens else "about "
        yield finding(
            "long-caption",
            sample.id,
            f"has a caption of {words} words, {about}{tokens} tokens: the model reads {limit}",
            "shorten it: the rest is ignored",
        )


def _check_repeats(samples: tuple[Sample, ...]) -> Iterator[Finding]:
    by_video: defaultdict[Path, list[str]] = defaultdict(list)
    by_caption: defaultdict[str, list[str]] = defaultdict(list)
    for sample in samples:
        by_video[sample.video].append(sample.id)
        if sample.caption:
            by_caption[sample.caption].append(sample.id)
    for ids in by_video.values():
        for repeat in ids[1:]:
            yield finding(
                "listed-twice",
                repeat,
                f"is the same clip as {ids[0]}",
                "keep one line of the two, unless it is meant to count twice",
            )
    for ids in by_caption.values():
        if len(ids) > 1:
            yield finding("same-caption", ids[0], f"has the same caption as {listed(ids[1:])}")
