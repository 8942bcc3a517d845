"""All checks of a dataset in one pass: each clip is opened, each caption is checked.

No model is needed; with a checkpoint's spec its limits are checked, too. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cogtune.data.cache.facts import Facts, Stamp
from cogtune.data.findings import SEVERITIES, Finding, finding
from cogtune.data.frames import FrameSettings
from cogtune.data.sources import Dataset, Sample
from cogtune.data.validation.captions import CAPTION_TOKENS, CountTokens, check_captions, check_repeats
from cogtune.data.validation.clips import check_clip, check_image
from cogtune.data.validation.inspection import Inspection, InspectionJob, inspect
from cogtune.data.video.container import VideoInfo
from cogtune.data.video.images import ImageInfo
from cogtune.models.checkpoint_configs import ModelSpec
from cogtune.system.errors import CogtuneError

REPORT_VERSION = 1
"""Version of the schema of :meth:`ValidationReport.to_json`."""


@dataclass(frozen=True)
class ValidationReport:
    """The result of checking a dataset.

    Args:
        root, layout: the dataset's.
        findings: the errors, then the warnings, then the notes, each in the order of the samples.
        infos: properties of each clip that could be opened, by sample id.
        counts: ``samples``, ``clips`` (that could be opened), ``error``, ``warning``, ``note``.
    """

    root: Path
    layout: str
    findings: tuple[Finding, ...]
    infos: dict[str, VideoInfo]
    counts: dict[str, int]

    @property
    def ok(self) -> bool:
        """Whether there are no errors, so that the dataset can be trained on."""
        return self.counts["error"] == 0

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON-able values; programs may rely on its keys."""
        return {
            "version": REPORT_VERSION,
            "dataset": str(self.root),
            "layout": self.layout,
            "ok": self.ok,
            "counts": dict(self.counts),
            "findings": [asdict(found) for found in self.findings],
            "clips": [{"id": sample_id, **_facts_of(info)} for sample_id, info in self.infos.items()],
        }


def _facts_of(info: VideoInfo) -> dict[str, Any]:
    """Return a clip's properties, without its timestamps, of which there may be thousands."""
    return {name: value for name, value in asdict(info).items() if name != "times"}


def check_dataset(
    dataset: Dataset,
    settings: FrameSettings,
    spec: ModelSpec | None = None,
    *,
    full: bool = False,
    workers: int | None = None,
    count_tokens: CountTokens | None = None,
    facts: Facts | None = None,
    tell: Callable[[int, str], None] = lambda _done, _doing: None,
) -> ValidationReport:
    """Open every clip and image and check every caption.

    The report has all findings, including those of reading the dataset. Clips are opened in separate processes, so that
    one that crashes or hangs its decoder is a finding like any other.

    Args:
        dataset: as read from its folder.
        settings: the training frames.
        spec: the model to be trained; with it, its limits of size and caption length are checked.
        full: decode every frame and image, not only one frame of each clip and the header of each image.
        workers: number of processes that open clips; by default one per core, eight at most.
        count_tokens: the number of tokens in captions; without it they are estimated from their words.
        facts: facts about files from earlier checks, and of this one: valid files that have not changed are not
            opened again unless ``full``.
        tell: called with 1 as each sample is done, and with 0 and a status text in between.

    Raises:
        CogtuneError: no clip can be opened on this machine.
    """
    told = {(found.where, found.code) for found in dataset.findings}
    findings = [*dataset.findings, *_check_sizes(settings, spec)]
    infos: dict[int, VideoInfo] = {}
    facts = facts or Facts(None)
    listed = (*dataset.samples, *dataset.unpaired.clips)
    with contextlib.closing(_look(listed, full, workers, facts)) as looks:
        for place, seen in looks:
            sample = listed[place]
            if seen.info is not None:
                infos[place] = seen.info
            findings += [
                found for found in _check_files(sample, seen, settings, spec) if (sample.id, found.code) not in told
            ]
            tell(1, "")
    limit = spec.max_text_seq_length if spec else CAPTION_TOKENS
    captioned = [
        sample for sample in dataset.samples if not told & {(sample.id, "missing-caption"), (sample.id, "not-utf8")}
    ]
    findings += check_captions([*captioned, *dataset.unpaired.captions], limit, count_tokens)
    findings += check_repeats(listed, facts.digest, lambda: tell(0, "comparing files of equal size"))

    places = {sample.id: place for place, sample in enumerate(listed)}
    findings.sort(key=lambda found: (SEVERITIES.index(found.severity), places.get(found.where, -1)))
    severities = Counter(found.severity for found in findings)
    counts = {"samples": len(dataset.samples), "clips": len(infos)}
    counts |= {severity: severities[severity] for severity in SEVERITIES}
    by_id = {listed[place].id: infos[place] for place in sorted(infos)}
    return ValidationReport(dataset.root, dataset.layout, tuple(findings), by_id, counts)


def _look(
    samples: Sequence[Sample], full: bool, workers: int | None, facts: Facts
) -> Generator[tuple[int, Inspection], None, None]:
    """Yield each sample's position and the inspection of its files, from memory if they have not changed.

    Files that several samples share are inspected once.
    """
    places: dict[tuple[Path, Path | None], list[int]] = {}
    for place, sample in enumerate(samples):
        places.setdefault((sample.video, sample.image), []).append(place)
    asked: list[tuple[tuple[Path, Path | None], list[Stamp]]] = []
    for files, sharing in places.items():
        stamps = _stamps(files, facts)
        seen = None if full or not stamps else _remembered(samples[sharing[0]], stamps, facts)
        if seen is None:
            asked.append((files, stamps))
        else:
            yield from ((place, seen) for place in sharing)
    jobs = (InspectionJob(video, image, full) for (video, image), _ in asked)
    with contextlib.closing(inspect(jobs, workers=workers)) as looks:
        for number, seen in looks:
            (video, image), stamps = asked[number]
            if stamps and not seen.problems and seen.info is not None and stamps == _stamps((video, image), facts):
                facts.learn_probe(video, seen.info, stamps[0])
                if image is not None and seen.image is not None:
                    facts.learn(image, "picture", asdict(seen.image), stamps[1])
            yield from ((place, seen) for place in places[video, image])


def _stamps(files: Iterable[Path | None], facts: Facts) -> list[Stamp]:
    """Return the stamps of a sample's files; None if one is missing, which the inspection reports."""
    with contextlib.suppress(CogtuneError):
        return [facts.stamp(path) for path in files if path is not None]
    return []


def _remembered(sample: Sample, stamps: Sequence[Stamp], facts: Facts) -> Inspection | None:
    info = facts.known_probe(sample.video, stamps[0])
    known = facts.known(sample.image, "picture", stamps[1]) if sample.image is not None else None
    image = ImageInfo(**known) if isinstance(known, dict) and known.keys() == _IMAGE_FIELDS else None
    if info is None or (sample.image is not None and image is None):
        return None
    return Inspection(info, image, ())


_IMAGE_FIELDS = {field.name for field in fields(ImageInfo)}


def _check_sizes(settings: FrameSettings, spec: ModelSpec | None) -> Iterator[Finding]:
    if spec is None:
        return
    hint = f"the model was trained at {spec.native}"
    for size in settings.sizes:
        problems = spec.bucket_problems(size) if settings.buckets else spec.size_problems(size)
        for problem in problems:
            yield finding("model-size", str(size), problem, hint)
        for advice in spec.size_advice(size) if not problems else ():
            yield finding("model-advice", str(size), advice, hint)


def _check_files(
    sample: Sample, seen: Inspection, settings: FrameSettings, spec: ModelSpec | None
) -> Iterator[Finding]:
    for code, message, hint in seen.problems:
        yield finding(code, sample.id, message, hint)
    if seen.info is not None:
        yield from check_clip(sample.id, seen.info, settings, any_frames=spec is None or not spec.learned_positions)
        if seen.image is not None:
            yield from check_image(sample.id, seen.image, seen.info)
