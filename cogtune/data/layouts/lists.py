"""The layout of the public CogVideoX fine-tuning guides: lists of captions, clips and images, paired by line."""

from __future__ import annotations

from pathlib import Path

from cogtune.config.choices import DataFormat
from cogtune.data.findings import Finding, finding, listed, not_utf8
from cogtune.data.layouts.base import DatasetEntry, Layout, LayoutContent, ListedPath, Sample, Unpaired, to_samples
from cogtune.data.layouts.folder import Folder
from cogtune.data.layouts.lines import listed_lines
from cogtune.data.layouts.nearest import same_name
from cogtune.system.errors import counted

CAPTIONS, VIDEOS, IMAGES = "prompts.txt", "videos.txt", "images.txt"

_OTHER_NAMES = {
    CAPTIONS: ("prompt.txt", "captions.txt", "caption.txt"),
    VIDEOS: ("video.txt",),
    IMAGES: ("image.txt",),
}
"""Other names of the lists, in the order of preference; case is ignored."""

Lines = dict[str, list[str | None]]
"""The lines of each list, by its documented name; None for one that is not UTF-8, which is a finding."""


def _read(folder: Folder) -> LayoutContent:
    findings: list[Finding] = []
    files = _files(folder)
    lists: Lines = {}
    for name, partner in ((CAPTIONS, VIDEOS), (VIDEOS, CAPTIONS), (IMAGES, "")):
        if name in files:
            lines = _read_lines(folder, files[name], findings)
            if lines is not None:
                lists[name] = lines
        elif partner:
            state = f"{files[partner]} exists, but {name} does not" if partner in files else f"{name} does not exist"
            findings.append(finding("missing-list", name, state, f"a dataset is {LISTS.expects}"))
    unpaired = [*_blank_lines(files, lists), *_unequal_counts(files, lists)]
    findings += unpaired
    if unpaired or lists.keys() != files.keys() or not {CAPTIONS, VIDEOS} <= lists.keys():
        return LayoutContent(LISTS.name, [], findings, _look_at_each(folder, files, lists, findings))
    return LayoutContent(LISTS.name, to_samples(folder, _entries(files, lists), findings), findings)


def _files(folder: Folder) -> dict[str, str]:
    """Return the file of each list by its documented name, with a note about other names."""
    found = {}
    for name, others in _OTHER_NAMES.items():
        file = same_name(name, folder.top, others)
        if file is not None:
            found[name] = file
    if CAPTIONS in found or VIDEOS in found:
        for name, file in found.items():
            if file != name:
                folder.taken(file, f"read as {name}")
    return found


def _read_lines(folder: Folder, file: str, findings: list[Finding]) -> list[str | None] | None:
    """Return the lines of a list; None if the file cannot be read."""
    data = folder.read_text(file, findings)
    if data is None:
        return None
    lines: list[str | None] = []
    for number, line in enumerate(listed_lines(data), start=1):
        if isinstance(line, UnicodeDecodeError):
            findings.append(not_utf8(file, number, line))
        lines.append(line if isinstance(line, str) else None)
    return lines


def _blank_lines(files: dict[str, str], lists: Lines) -> list[Finding]:
    findings = []
    for name, lines in lists.items():
        blank = [number for number, line in enumerate(lines, start=1) if line == ""]
        if blank:
            lines_are = f"line {blank[0]} is" if len(blank) == 1 else f"lines {listed(blank)} are"
            findings.append(
                finding(
                    "blank-line",
                    f"{files[name]}:{blank[0]}",
                    f"{lines_are} blank in {files[name]}: lines may be shifted, so nothing is paired",
                    "line N of each list is one sample: fill in the line, or delete it from every list",
                )
            )
    return findings


def _unequal_counts(files: dict[str, str], lists: Lines) -> list[Finding]:
    counts = {files[name]: len(lines) for name, lines in lists.items()}
    if len(set(counts.values())) <= 1:
        return []
    longest = max(counts, key=lambda name: counts[name])
    alone = min(counts.values()) + 1
    shown = [f"{name} has {counted(count, 'line')}" for name, count in counts.items()]
    return [
        finding(
            "line-counts",
            f"{longest}:{alone}",
            f"{listed(shown)}: line {alone} of {longest} has no partner, so nothing is paired",
            "line N of each list is one sample: find the missing or extra line",
        )
    ]


def _entries(files: dict[str, str], lists: Lines) -> list[DatasetEntry]:
    """Yield an entry for line N of all lists."""
    videos, images = lists[VIDEOS], lists.get(IMAGES)
    return [
        DatasetEntry(
            caption,
            ListedPath(videos[number - 1], f"{files[VIDEOS]}:{number}"),
            ListedPath(images[number - 1], f"{files[IMAGES]}:{number}") if images is not None else None,
        )
        for number, caption in enumerate(lists[CAPTIONS], start=1)
    ]


def _look_at_each(folder: Folder, files: dict[str, str], lists: Lines, findings: list[Finding]) -> Unpaired:
    """Check the lines of lists that cannot be paired, so that other problems are reported at the same time."""
    clips: list[Sample] = []
    for name in (VIDEOS, IMAGES):
        entries = [
            DatasetEntry("", ListedPath(line, f"{files[name]}:{number}"), None)
            for number, line in enumerate(lists.get(name, []), start=1)
            if line
        ]
        samples = to_samples(folder, entries, findings, role="video" if name == VIDEOS else "image")
        clips += samples if name == VIDEOS else []
    captions = [
        Sample(f"{files[CAPTIONS]}:{number}", Path(), line)
        for number, line in enumerate(lists.get(CAPTIONS, []), start=1)
        if line
    ]
    return Unpaired(tuple(clips), tuple(captions))


def _detect(folder: Folder) -> DataFormat | None:
    return "lists" if CAPTIONS in folder.top or VIDEOS in folder.top else None


def _almost(folder: Folder) -> DataFormat | None:
    both = all(same_name(name, folder.top, _OTHER_NAMES[name]) is not None for name in (CAPTIONS, VIDEOS))
    return "lists" if both else None


LISTS = Layout(
    ("lists",),
    "lists",
    f"{CAPTIONS} and {VIDEOS}, with {IMAGES} if each clip has an image: line N of each is one sample",
    _detect,
    _read,
    _almost,
    names_clips=True,
)
