"""The layout of the fine-tuning guides: lists of captions, clips and images, paired by line."""

from __future__ import annotations

from pathlib import Path

from cogtune.config import DataFormat
from cogtune.data.findings import Finding, finding, listed
from cogtune.data.layouts import Content, Entry, Layout, Place, Reading, not_utf8, read_text_bytes, to_samples

CAPTIONS, VIDEOS, IMAGES = "prompts.txt", "videos.txt", "images.txt"


def _read(root: Path, reading: Reading) -> Content:
    findings: list[Finding] = []
    lists: dict[str, list[str | None]] = {}
    complete = True
    for name, partner in ((CAPTIONS, VIDEOS), (VIDEOS, CAPTIONS), (IMAGES, "")):
        if (root / name).is_file():
            lines = _read_lines(root, name, findings)
            if lines is None:
                complete = False
            else:
                lists[name] = lines
        elif partner:
            complete = False
            state = f"{partner} is there, but {name} is not" if (root / partner).is_file() else f"there is no {name}"
            findings.append(finding("missing-list", name, state, f"a dataset is {LISTS.expects}"))
    if complete:
        unpaired = [*_blank_lines(lists), *_unequal_counts(lists)]
        findings += unpaired
        complete = not unpaired
    samples = to_samples(root, _entries(lists), reading, findings) if complete else []
    return Content(LISTS.name, samples, findings)


def _read_lines(root: Path, name: str, findings: list[Finding]) -> list[str | None] | None:
    """The stripped lines of a list, blank ones at its end left out; None for a line that is not UTF-8.

    None in place of the list when the whole file is in another encoding.
    """
    data = read_text_bytes(root, name, findings)
    if data is None:
        return None
    lines: list[str | None] = []
    for number, raw in enumerate(data.splitlines(), start=1):
        try:
            lines.append(raw.decode().strip())
        except UnicodeDecodeError as error:
            lines.append(None)
            findings.append(not_utf8(name, number, error))
    while lines and lines[-1] == "":
        lines.pop()
    return lines


def _blank_lines(lists: dict[str, list[str | None]]) -> list[Finding]:
    findings = []
    for name, lines in lists.items():
        blank = [number for number, line in enumerate(lines, start=1) if line == ""]
        if blank:
            lines_are = f"line {blank[0]} is" if len(blank) == 1 else f"lines {listed(blank)} are"
            findings.append(
                finding(
                    "blank-line",
                    f"{name}:{blank[0]}",
                    f"{lines_are} blank in {name}: lines may have shifted, so nothing is paired",
                    "line N of each list is one sample: fill the line in, or delete it from every list",
                )
            )
    return findings


def _unequal_counts(lists: dict[str, list[str | None]]) -> list[Finding]:
    counts = {name: len(lines) for name, lines in lists.items()}
    if len(set(counts.values())) <= 1:
        return []
    longest = max(counts, key=lambda name: counts[name])
    alone = min(counts.values()) + 1
    shown = [f"{name} has {count} line{'' if count == 1 else 's'}" for name, count in counts.items()]
    return [
        finding(
            "line-counts",
            f"{longest}:{alone}",
            f"{listed(shown)}: line {alone} of {longest} has no partner, so nothing is paired",
            "line N of each list is one sample: find the line that is missing or too many",
        )
    ]


def _entries(lists: dict[str, list[str | None]]) -> list[Entry]:
    """Line N of every list is one entry."""
    return [
        Entry(
            caption,
            Place(lists[VIDEOS][number - 1], f"{VIDEOS}:{number}"),
            Place(lists[IMAGES][number - 1], f"{IMAGES}:{number}") if IMAGES in lists else None,
        )
        for number, caption in enumerate(lists[CAPTIONS], start=1)
    ]


def _detect(root: Path, _reading: Reading) -> DataFormat | None:
    return "lists" if (root / CAPTIONS).is_file() or (root / VIDEOS).is_file() else None


LISTS = Layout(
    ("lists",),
    "lists",
    f"{CAPTIONS} and {VIDEOS}, with {IMAGES} if each clip has an image: line N of each is one sample",
    _detect,
    _read,
)
