"""What can be wrong with a dataset: one table of codes, and the finding that carries one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""From worst to mildest. An error means that the sample, or the whole dataset, cannot be used as it is."""


@dataclass(frozen=True)
class FindingKind:
    """One row of :data:`FINDINGS`: how bad it is and, in a sentence for the docs, what it means."""

    severity: Severity
    meaning: str


FINDINGS: dict[str, FindingKind] = {
    "missing-list": FindingKind("error", "One of the files that list captions and clips is not there."),
    "not-utf8": FindingKind("error", "A text file holds bytes that are not UTF-8."),
    "line-counts": FindingKind("error", "The lists have unequal numbers of lines, so nothing is paired."),
    "blank-line": FindingKind("error", "A list has a blank line inside: lines may have shifted, so nothing is paired."),
    "bad-row": FindingKind(
        "error", "A row of a table cannot be read: its quotes, its number of values, its JSON or a type."
    ),
    "missing-value": FindingKind("error", "A row of a table has no caption or no path."),
    "other-layout": FindingKind("note", "The folder could be read in another way too; --format chooses."),
    "read-as": FindingKind("note", "Something is not as documented, and was read because it is plain what is meant."),
    "left-out": FindingKind(
        "note", "Clips or images in the folder that no line, row or caption names: they are not read."
    ),
    "own-files": FindingKind("note", "Files that cogtune itself wrote into the folder; they are not read as data."),
    "no-samples": FindingKind("error", "The dataset holds no sample at all."),
    "bad-path": FindingKind("error", "A line is not a path that this system can open."),
    "outside-folder": FindingKind("error", "A path leaves the dataset's folder: absolute, by .. or by a link."),
    "missing-video": FindingKind("error", "A listed clip is not there."),
    "missing-image": FindingKind("error", "A listed image is not there."),
    "missing-caption": FindingKind("error", "A clip has no caption file beside it."),
    "stray-caption": FindingKind("warning", "A caption file has no clip beside it."),
    "empty-video": FindingKind("error", "A clip's file has no bytes."),
    "not-a-video": FindingKind("error", "A clip's file is no video."),
    "no-video-stream": FindingKind("error", "A clip's file holds sound or data, but no pictures."),
    "cut-short": FindingKind("error", "A clip's file ends before it should: an unfinished copy or download."),
    "damaged-video": FindingKind("error", "A clip cannot be opened or decoded."),
    "decoder-died": FindingKind("error", "A clip makes the decoder crash; only the process that opened it was lost."),
    "decoder-hung": FindingKind(
        "error", "A clip makes the decoder stand still; only the process that opened it was lost."
    ),
    "unreadable-image": FindingKind("error", "An image cannot be opened or decoded."),
    "too-short": FindingKind("error", "A clip gives fewer frames than training takes."),
    "slow": FindingKind("warning", "A clip has fewer frames a second than training: its motion is learned sped up."),
    "no-rate": FindingKind("warning", "A clip's file says nothing of time: the rate of its frames is a guess."),
    "variable-rate": FindingKind("warning", "A clip's picture stands still now and then, which training passes over."),
    "rotated": FindingKind("note", "A clip is stored turned or mirrored; it is trained as players show it."),
    "interlaced": FindingKind("warning", "A clip is interlaced: it is trained with combed edges."),
    "pixel-aspect": FindingKind("warning", "A clip's pixels are not square: it is trained squeezed."),
    "upscaled": FindingKind("warning", "A clip is smaller than the training size and gets enlarged."),
    "cropped": FindingKind("warning", "More than a quarter of each frame is cut away to fit the training shape."),
    "deep-colour": FindingKind("note", "A clip has more than 8 bits a colour; it is trained with 8."),
    "hdr": FindingKind("warning", "A clip's colours are meant for an HDR or wide-gamut screen: it is trained pale."),
    "alpha": FindingKind("warning", "A clip or an image has transparency, which is dropped."),
    "several-pictures": FindingKind("note", "An image holds several pictures, of which the first is trained."),
    "image-shape": FindingKind(
        "warning", "An image is of another shape than its clip, so the two are cut differently."
    ),
    "barred": FindingKind(
        "warning", "More than a quarter of what is trained would be black bars (--reshape letterbox)."
    ),
    "stretched": FindingKind("warning", "Frames are distorted to the training shape (--reshape stretch)."),
    "only-part": FindingKind("note", "A clip is much longer than what training takes of it; which seconds is said."),
    "other-speed": FindingKind(
        "note", "Frames spread over a whole clip (--sampling uniform) give its motion another speed."
    ),
    "empty-caption": FindingKind("warning", "A caption holds no words."),
    "one-word-caption": FindingKind("warning", "A caption is a single word."),
    "long-caption": FindingKind("warning", "A caption is longer than the text encoder reads: its end is ignored."),
    "not-english": FindingKind(
        "warning", "A caption does not seem to be in English, which the models were trained on."
    ),
    "listed-twice": FindingKind("warning", "A clip is listed more than once."),
    "copied-video": FindingKind("warning", "Two clips of different names have the same bytes."),
    "same-caption": FindingKind("note", "Several samples have the same caption."),
    "similar-caption": FindingKind("note", "Captions differ in capitals, punctuation or blanks only."),
    "model-size": FindingKind("error", "The model cannot be trained at the size asked for."),
    "model-advice": FindingKind("note", "The size asked for is legal, but unlike what the model was trained on."),
}
"""Every finding by code."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a dataset, or worth knowing.

    Args:
        code: its row in :data:`FINDINGS`.
        severity: that row's severity.
        where: a sample's id, or a file of the dataset, with ``:line`` when one line is meant.
        message: what is wrong, with the figures.
        hint: what to do about it; empty when the message says it all.
    """

    code: str
    severity: Severity
    where: str
    message: str
    hint: str = ""


def finding(code: str, where: str, message: str, hint: str = "") -> Finding:
    """Return the finding with this code and its row's severity.

    Raises:
        KeyError: the code has no row: a fault of the program, not of the data.
    """
    return Finding(code, FINDINGS[code].severity, where, message, hint)


def not_utf8(name: str, number: int, error: UnicodeDecodeError) -> Finding:
    """Return the finding about a line of ``name``, from the error of decoding that line."""
    return finding(
        "not-utf8",
        f"{name}:{number}",
        f"byte {error.start + 1} of line {number}, 0x{error.object[error.start]:02x}, is not UTF-8",
        f"save {name} again as UTF-8",
    )


def as_rows(findings: Sequence[Finding], most: int | None = None) -> list[tuple[str, str, str, str]]:
    """Return findings as rows of severity, place, message and hint; of each code the first ``most``, then how many
    more."""
    counts = Counter(found.code for found in findings)
    shown: Counter[str] = Counter()
    rows: list[tuple[str, str, str, str]] = []
    for found in findings:
        shown[found.code] += 1
        if most is None or shown[found.code] <= most:
            rows.append((found.severity, found.where, found.message, found.hint))
        elif shown[found.code] == most + 1:
            more = f"{counts[found.code] - most:,} more like this ({found.code})"
            rows.append((found.severity, "...", more, "--json has them all, and so has this into a file"))
    return rows


def listed(items: Sequence[object], most: int = 8) -> str:
    """Format the first ``most`` of ``items`` as text: ``3, 7 and 9``, or ``3, 7, 9 and 12 more``."""
    shown = [str(item) for item in items[:most]]
    if len(items) > most:
        shown.append(f"{len(items) - most} more")
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
