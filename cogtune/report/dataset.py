"""The report of a dataset: the frames of each clip that training sees, and all findings, on one page."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from cogtune import __version__
from cogtune.data.findings import SEVERITIES, Finding
from cogtune.data.frames import ClipView, FrameSettings, clips_per_bucket, settings_for, view
from cogtune.data.sources import Dataset, Sample
from cogtune.data.validation.captions import CountTokens
from cogtune.data.validation.checks import ValidationReport
from cogtune.data.video.clips import VideoInfo
from cogtune.models.geometry import Reshape, enlargement_loss, fit, shape_loss
from cogtune.report.charts import bars, distribution
from cogtune.report.drawing import Task, drawn
from cogtune.report.findings import MOST_FINDINGS, cut, filter_form, finding_list, findings_table, kinds
from cogtune.report.page import Html, facts, join, section, table, tag, write_page
from cogtune.report.pictures import Shown, bytes_each
from cogtune.system.digests import digest_file
from cogtune.system.errors import CogtuneError

MOST_CLIPS = 200
"""Default number of clips that are shown with pictures."""

WORKERS = 2
"""Default number of processes that decode clips."""

_CAPTION_CHARACTERS = 1200
_CLIP_FINDINGS = 12


@dataclass(frozen=True)
class CheckedDataset:
    """A dataset, its training frames, and the result of checking it."""

    dataset: Dataset
    settings: FrameSettings
    report: ValidationReport
    count_tokens: CountTokens | None = None


def write_dataset_report(
    path: Path,
    checked: CheckedDataset,
    *,
    most_clips: int = MOST_CLIPS,
    workers: int = WORKERS,
    progress: Callable[[], None] | None = None,
) -> int:
    """Write the page; return the number of clips that it shows with pictures.

    Clips with findings come first, worst first, then an even selection of the others. Besides the page's current part,
    the pictures of a few clips are in memory.

    Args:
        path: the HTML file, replaced if it exists.
        workers: processes that decode clips; 0 decodes in this one.
        progress: called after each clip.

    Raises:
        CogtuneError: the file cannot be written. Clips that cannot be shown are not errors.
    """
    by_sample = _by_sample(checked)
    samples = choose_samples(checked.dataset.samples, by_sample, most_clips)
    write_page(
        path, f"{checked.dataset.root.name} · dataset report", _parts(checked, samples, by_sample, workers, progress)
    )
    return len(samples)


def choose_samples(
    samples: Sequence[Sample], by_sample: dict[str, list[Finding]], most: int
) -> list[tuple[int, Sample]]:
    """Return the samples to show, with their positions: those with findings, worst first, then evenly chosen others."""
    ranked = sorted(
        (
            (SEVERITIES.index(by_sample[sample.id][0].severity), place)
            for place, sample in enumerate(samples)
            if sample.id in by_sample
        )
    )[:most]
    places = [place for _, place in ranked]
    clean = [place for place, sample in enumerate(samples) if sample.id not in by_sample]
    room = min(most - len(places), len(clean))
    places += [clean[number * len(clean) // room] for number in range(room)]
    return [(place, samples[place]) for place in places]


def _by_sample(checked: CheckedDataset) -> dict[str, list[Finding]]:
    """Return the findings of each sample, worst first, without those of the dataset as a whole."""
    ids = {sample.id for sample in checked.dataset.samples}
    grouped: defaultdict[str, list[Finding]] = defaultdict(list)
    for found in checked.report.findings:
        if found.where in ids:
            grouped[found.where].append(found)
    return dict(grouped)


def _parts(
    checked: CheckedDataset,
    samples: list[tuple[int, Sample]],
    by_sample: dict[str, list[Finding]],
    workers: int,
    progress: Callable[[], None] | None,
) -> Iterator[Html]:
    yield _header(checked)
    general = [found for found in checked.report.findings if found.where not in by_sample]
    if general:
        yield section("About the dataset as a whole", finding_list(general[:MOST_FINDINGS], named=True))
    yield from kinds(checked.report.findings)
    if checked.report.infos:
        yield section("Contents", tag("div", _distributions(checked), class_="charts"))
        yield _plan(checked)
    if samples:
        yield from _contact_sheet(checked, samples, by_sample, workers, progress)
    yield from findings_table(checked.report.findings, {sample.id: place for place, sample in samples})
    yield tag("footer", f"Made by cogtune {__version__}.")


def _header(checked: CheckedDataset) -> Html:
    report, settings = checked.report, checked.settings
    counts = report.counts
    seconds = sum(info.duration for info in report.infos.values())
    return tag(
        "header",
        tag("p", "Dataset report", class_="kind"),
        tag("h1", checked.dataset.root.name or str(checked.dataset.root)),
        tag("p", f"{checked.dataset.root} · read as {checked.dataset.layout}", class_="lead"),
        _verdict(counts),
        facts(
            [
                ("Samples", f"{counts['samples']:,}"),
                ("Readable clips", f"{counts['clips']:,}"),
                ("Video", _duration(seconds)),
                *((f"{severity.capitalize()}s", f"{counts[severity]:,}") for severity in SEVERITIES),
                ("Training size", [_sizes(settings), tag("small", _rate(settings))]),
            ]
        ),
    )


def _verdict(counts: dict[str, int]) -> Html:
    errors, warnings = counts["error"], counts["warning"]
    if errors:
        kind, word = "error", "Cannot be trained on as is."
        more = f"{_counted(errors, 'error')} to fix or leave out"
        more += f", and {_counted(warnings, 'warning')}." if warnings else "."
    elif warnings:
        kind, word, more = "warning", "Can be trained on.", f"{_counted(warnings, 'warning')} to look at first."
    else:
        kind, word, more = "ok", "Ready to train.", "No errors or warnings."
    return tag("p", tag("b", word), " ", tag("span", more), class_=f"verdict {kind}")


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


# -------------------------------------------------------------------------------- the dataset in numbers


def _distributions(checked: CheckedDataset) -> Iterator[Html]:
    infos = list(checked.report.infos.values())
    sizes = Counter(f"{info.height}x{info.width}" for info in infos).most_common()
    rows = sizes if len(sizes) <= 8 else [*sizes[:7], (f"{len(sizes) - 7} more", sum(count for _, count in sizes[7:]))]
    yield distribution("Duration", [info.duration for info in infos], unit="seconds")
    yield distribution("Frame rate", [info.fps for info in infos], unit="fps")
    yield bars("Size", rows, unit="height x width")
    captions = [sample.caption for sample in checked.dataset.samples]
    if checked.count_tokens:
        yield distribution("Captions", checked.count_tokens(captions), unit="tokens")
    else:
        yield distribution("Captions", [len(caption.split()) for caption in captions], unit="words")


def _plan(checked: CheckedDataset) -> Html:
    """Return the number of clips of each training size, and their losses."""
    settings, rows = checked.settings, []
    lost = _LOST[settings.reshape]
    for size, infos in clips_per_bucket(checked.report.infos.values(), settings).items():
        target = (size.height, size.width)
        shapes = [(info.height, info.width) for info in infos]
        shares = [shape_loss(shape, target) for shape in shapes]
        crops = [fit(shape, target, settings.reshape) for shape in shapes]
        enlarged = sum(enlargement_loss(shape, crop) > 0 for shape, crop in zip(shapes, crops, strict=True))
        figures = (f"{median(shares):.0%}", f"{max(shares):.0%}") if shares else ("", "")
        rows.append((tag("code", str(size)), f"{len(infos):,}", *figures, f"{enlarged:,}"))
    columns = ("frames x height x width", "clips", f"{lost} (median)", f"{lost} (most)", "enlarged")
    return section("Training sizes", table(columns, rows, label="Training sizes"))


_LOST: dict[Reshape, str] = {
    "center": "cropped",
    "random": "cropped",
    "letterbox": "black bars",
    "stretch": "distorted",
}
"""The loss of each way of reshaping."""


def _sizes(settings: FrameSettings) -> str:
    return str(settings.size) if len(settings.sizes) == 1 else f"{len(settings.sizes)} sizes"


def _rate(settings: FrameSettings) -> str:
    return "frames spread evenly" if settings.sampling == "uniform" else f"{settings.fps:g} frames per second"


def _view_of(checked: CheckedDataset, sample: Sample) -> ClipView | None:
    """Return the view of a clip that training sees, or all frames of a short one; None if it is unreadable."""
    info, settings = checked.report.infos.get(sample.id), checked.settings
    if info is None:
        return None
    try:
        return view(info, settings, digest_file(sample.video) if settings.draws else "")
    except CogtuneError:
        return None
    except ValueError:
        size = settings_for(info, settings).size
        return ClipView(tuple(range(info.num_frames)), size, (info.height, info.width), settings.reshape)


# ------------------------------------------------------------------------------------------ the contact sheet


def _contact_sheet(
    checked: CheckedDataset,
    samples: list[tuple[int, Sample]],
    by_sample: dict[str, list[Finding]],
    workers: int,
    progress: Callable[[], None] | None,
) -> Iterator[Html]:
    total = len(checked.dataset.samples)
    remark = (
        "The first, the middle and the last training frame of each clip. The bright part is what the model "
        "sees; dimmed parts are cropped."
    )
    if len(samples) < total:
        remark += (
            f" Showing {len(samples):,} of {total:,}: clips with findings first, then an even selection of the others; "
            "use --report-clips to show more."
        )
    yield Html('<section id="clips">\n')
    yield join(tag("h2", "Clips"), tag("p", remark, class_="remark"))
    if len(samples) > 3:
        yield filter_form("#clips article", (*SEVERITIES, "no findings"))

    most_bytes = bytes_each(sum(3 if sample.image is None else 4 for _, sample in samples))
    views = [_view_of(checked, sample) for _, sample in samples]
    tasks = (
        None if seen is None else Task(sample.video, seen, sample.image, most_bytes)
        for (_, sample), seen in zip(samples, views, strict=True)
    )
    with contextlib.closing(drawn(tasks, workers)) as pictures:
        for (place, sample), seen, shown in zip(samples, views, pictures, strict=True):
            yield _clip(checked, place, sample, seen, by_sample.get(sample.id, []), shown)
            if progress is not None:
                progress()
    yield Html("</section>\n")


def _clip(
    checked: CheckedDataset,
    place: int,
    sample: Sample,
    seen: ClipView | None,
    findings: list[Finding],
    shown: Shown | str | None,
) -> Html:
    info = checked.report.infos.get(sample.id)
    if sample.caption:
        caption = tag("p", cut(sample.caption, _CAPTION_CHARACTERS), class_="caption", dir="auto")
    else:
        caption = tag("p", "no caption", class_="caption empty")
    what = None if info is None else tag("p", _what(info, seen), class_="what")
    told = finding_list(findings[:_CLIP_FINDINGS]) if findings else None
    about = [tag("div", tag("h3", sample.id), caption), tag("div", what, told)]
    kinds = " ".join(dict.fromkeys(found.severity for found in findings)) or "no findings"
    whole = tag(
        "article",
        _pictures(sample, info, findings, shown),
        tag("div", about, class_="about"),
        class_="clip",
        id=f"clip-{place}",
        data_kinds=kinds,
    )
    return Html(f"{whole}\n")


def _what(info: VideoInfo, seen: ClipView | None) -> str:
    """Return a clip's properties in one line."""
    facts_of = [
        f"{info.duration:.3g} s",
        f"{info.num_frames:,} frames at {info.fps:.4g} fps",
        f"{info.height}x{info.width}",
        f"{info.codec} {info.pixel_format}",
    ]
    if seen is None or len(seen.indices) != seen.size.num_frames:  # too short to be trained on
        return " · ".join(facts_of)
    lost = f"{shape_loss(seen.source, (seen.size.height, seen.size.width)):.0%} {_LOST[seen.reshape]}"
    taken = f"trained as {seen.size}: frames {seen.indices[0]} to {seen.indices[-1]}, {lost}"
    return f"{' · '.join(facts_of)} · {taken}"


def _pictures(sample: Sample, info: VideoInfo | None, findings: list[Finding], shown: Shown | str | None) -> Html:
    """Return the clip's pictures, or the reason why there are none."""
    if info is not None and isinstance(shown, Shown):
        return _frames(sample, info, shown)
    reason = shown or (findings[0].message if findings else "the clip cannot be opened")
    return tag("div", tag("p", f"no pictures: {cut(str(reason), 300)}", class_="unseen"), class_="frames")


def _frames(sample: Sample, info: VideoInfo, shown: Shown) -> Html:
    words = {1: ("first",), 2: ("first", "last")}.get(len(shown.indices), ("first", "middle", "last"))
    figures = []
    if shown.image is not None:
        image = shown.image.html(f"The conditioning image of {sample.id}")
        figures.append(tag("figure", image, tag("figcaption", "image")))
    for word, index, picture in zip(words, shown.indices, shown.pictures, strict=True):
        alt = f"The {word} training frame of {sample.id}"
        label = f"{word} · frame {index} · {index / info.fps:.2f} s"
        figures.append(tag("figure", picture.html(alt), tag("figcaption", label)))
    return tag("div", figures, class_="frames four" if len(figures) > 3 else "frames")
