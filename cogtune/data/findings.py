"""Findings of dataset validation: a table of codes, and the type that carries one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""From worst to mildest. An error means that the sample, or the whole dataset, cannot be used as is."""


@dataclass(frozen=True)
class FindingKind:
    """One row of :data:`FINDINGS`: its severity and, as a sentence for the docs, its meaning."""

    severity: Severity
    meaning: str


FINDINGS: dict[str, FindingKind] = {
    "missing-list": FindingKind("error", "One of the lists of captions and clips is missing."),
    "not-utf8": FindingKind("error", "A text file contains bytes that are not UTF-8."),
    "line-counts": FindingKind("error", "The lists have different numbers of lines, so nothing is paired."),
    "blank-line": FindingKind(
        "error", "A list contains a blank line, so its lines may be shifted and nothing is paired."
    ),
    "bad-row": FindingKind(
        "error", "A row of a table cannot be read because of its quotes, number of values, JSON or types."
    ),
    "missing-value": FindingKind("error", "A row of a table has no caption or no path."),
    "other-layout": FindingKind("note", "The folder also matches another layout; use --format to choose."),
    "read-as": FindingKind("note", "A file or column differs from the documentation but is unambiguous, and was read."),
    "left-out": FindingKind(
        "note", "The folder contains clips or images that no line, row or caption names; they are not read."
    ),
    "own-files": FindingKind("note", "The folder contains files that cogtune wrote; they are not read as data."),
    "no-samples": FindingKind("error", "The dataset has no samples."),
    "bad-path": FindingKind("error", "A path cannot be opened on this system."),
    "outside-folder": FindingKind("error", "A path leads out of the dataset's folder: an absolute path, .. or a link."),
    "missing-video": FindingKind("error", "A listed clip is missing."),
    "missing-image": FindingKind("error", "A listed image is missing."),
    "missing-caption": FindingKind("error", "A clip has no caption file next to it."),
    "stray-caption": FindingKind("warning", "A caption file has no clip next to it."),
    "empty-video": FindingKind("error", "A clip's file is empty."),
    "not-a-video": FindingKind("error", "A clip's file is not a video."),
    "no-video-stream": FindingKind("error", "A clip's file contains audio or data, but no video."),
    "cut-short": FindingKind("error", "A clip's file is incomplete, such as an unfinished copy or download."),
    "damaged-video": FindingKind("error", "A clip cannot be opened or decoded."),
    "decoder-died": FindingKind("error", "A clip crashes the decoder, which runs in a separate process."),
    "decoder-hung": FindingKind("error", "A clip hangs the decoder, which runs in a separate process."),
    "unreadable-image": FindingKind("error", "An image cannot be opened or decoded."),
    "too-short": FindingKind("error", "A clip has fewer frames than training requires."),
    "slow": FindingKind(
        "warning", "A clip's frame rate is lower than the training rate, so the model learns faster motion."
    ),
    "no-rate": FindingKind("warning", "A clip's file does not declare a frame rate, so it is a guess."),
    "variable-rate": FindingKind("warning", "A clip's picture freezes at times, which training does not reproduce."),
    "joined": FindingKind("warning", "A clip's file is several files joined end to end, not all of which may be read."),
    "several-streams": FindingKind("warning", "A clip's file contains several video streams, of which one is read."),
    "trimmed": FindingKind("note", "A clip's container crops its frames; they are read as players show them."),
    "rotated": FindingKind("note", "A clip is stored rotated or mirrored; it is read as players show it."),
    "interlaced": FindingKind("warning", "A clip is interlaced, so its frames have combing artifacts."),
    "pixel-aspect": FindingKind("warning", "A clip's pixels are not square, so its frames are distorted."),
    "upscaled": FindingKind("warning", "A clip is smaller than the training size and is upscaled."),
    "cropped": FindingKind("warning", "More than a quarter of each frame is cropped to fit the training size."),
    "deep-colour": FindingKind("note", "A clip has more than 8 bits per channel; 8 are used."),
    "hdr": FindingKind("warning", "A clip's colours are HDR or wide-gamut, so its frames look pale."),
    "alpha": FindingKind("warning", "A clip or an image has transparency, which is dropped."),
    "several-pictures": FindingKind("note", "An image file contains several pictures; the first is used."),
    "image-shape": FindingKind(
        "warning", "An image has a different aspect ratio than its clip, so the two are cropped differently."
    ),
    "barred": FindingKind("warning", "More than a quarter of each frame would be black bars (--reshape letterbox)."),
    "stretched": FindingKind("warning", "Frames are distorted to fit the training size (--reshape stretch)."),
    "only-part": FindingKind("note", "A clip is much longer than the part that training uses."),
    "other-speed": FindingKind(
        "note", "Frames are spread over the whole clip (--sampling uniform), which changes the speed of its motion."
    ),
    "empty-caption": FindingKind("warning", "A caption is empty."),
    "one-word-caption": FindingKind("warning", "A caption is a single word."),
    "long-caption": FindingKind("warning", "A caption is longer than the text encoder's limit, so its end is ignored."),
    "not-text": FindingKind(
        "warning", "A caption contains control characters, or the mark of a character that was lost in decoding."
    ),
    "not-english": FindingKind(
        "warning", "A caption does not seem to be in English, which the models were trained on."
    ),
    "listed-twice": FindingKind("warning", "A clip is listed more than once."),
    "copied-video": FindingKind("warning", "Two clips with different names have the same content."),
    "same-caption": FindingKind("note", "Several samples have the same caption."),
    "similar-caption": FindingKind("note", "Captions differ only in capitalization, punctuation or spaces."),
    "model-size": FindingKind("error", "The model does not support the requested size."),
    "model-advice": FindingKind(
        "note", "The requested size is supported, but differs from those the model was trained on."
    ),
}
"""Every finding by code."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a dataset, or worth knowing.

    Args:
        code: its row in :data:`FINDINGS`.
        severity: that row's severity.
        where: a sample's id, or a file of the dataset, with ``:line`` for a single line.
        message: what is wrong, with the figures.
        hint: what to do about it; empty if the message suffices.
    """

    code: str
    severity: Severity
    where: str
    message: str
    hint: str = ""


def finding(code: str, where: str, message: str, hint: str = "") -> Finding:
    """Return the finding with this code and its row's severity.

    Raises:
        KeyError: the code has no row, which is a bug.
    """
    return Finding(code, FINDINGS[code].severity, where, message, hint)


def not_utf8(name: str, number: int, error: UnicodeDecodeError) -> Finding:
    """Return the finding for a line of ``name`` that is not UTF-8, from the decoding error."""
    return finding(
        "not-utf8",
        f"{name}:{number}",
        f"byte {error.start + 1} of line {number}, 0x{error.object[error.start]:02x}, is not UTF-8",
        f"save {name} as UTF-8",
    )


def as_rows(findings: Sequence[Finding], most: int | None = None) -> list[tuple[str, str, str, str]]:
    """Return findings as rows of severity, place, message and hint; at most ``most`` per code, then a count."""
    counts = Counter(found.code for found in findings)
    shown: Counter[str] = Counter()
    rows: list[tuple[str, str, str, str]] = []
    for found in findings:
        shown[found.code] += 1
        if most is None or shown[found.code] <= most:
            rows.append((found.severity, found.where, found.message, found.hint))
        elif shown[found.code] == most + 1:
            more = f"{counts[found.code] - most:,} more like this ({found.code})"
            rows.append((found.severity, "...", more, "use --json, or redirect the output to a file, to see all"))
    return rows


def listed(items: Sequence[object], most: int = 8) -> str:
    """Format the first ``most`` of ``items`` as text: ``3, 7 and 9``, or ``3, 7, 9 and 12 more``."""
    shown = [str(item) for item in items[:most]]
    if len(items) > most:
        shown.append(f"{len(items) - most} more")
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
