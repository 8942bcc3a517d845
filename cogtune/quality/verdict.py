"""The checkpoint and strength to take, and why, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from cogtune.quality.limits import SAME_LOSS
from cogtune.quality.signs import loss_of
from cogtune.run.comparison import LOOKS, Range, Row


def choose(rows: Sequence[Row], base: Row, clips: Mapping[str, Range]) -> tuple[int | None, str]:
    """Return the number of the row to take, and why; None if all rows have signs.

    Of the rows without signs it is that of the lowest loss at fixed noise; among equal ones that which changes
    unrelated prompts least. Without losses it is the row that looks most like the training clips.
    """
    clean = [number for number, row in enumerate(rows) if not row.signs]
    if not clean:
        return None, _none(rows)
    losses = {number: loss for number in clean if (loss := loss_of(rows[number].figures)) is not None}
    if losses:
        least = min(losses.values())
        equal = [number for number, loss in losses.items() if loss <= least * (1 + SAME_LOSS)]
        number = min(equal, key=lambda one: (rows[one].figures.drift or 0.0, rows[one].step or 0))
    else:
        number = min(clean, key=lambda one: outside(rows[one], clips) + (rows[one].figures.drift or 0.0))
    return number, _why(rows[number], base, clips, min(losses.values(), default=None), len(rows) - len(clean))


def outside(row: Row, clips: Mapping[str, Range]) -> float:
    """Return how far a row's looks are outside the training clips' ranges: the sum of the ratios' logarithms."""
    total = 0.0
    for name in LOOKS:
        value, usual = getattr(row.figures, name), clips.get(name)
        if usual is not None and name != "clipped":
            nearest = min(max(value, usual.low), usual.high)
            total += abs(math.log((value + 1e-3) / (nearest + 1e-3)))
    return total


def _why(row: Row, base: Row, clips: Mapping[str, Range], least: float | None, accused: int) -> str:
    figures, before = row.figures, base.figures
    parts = []
    loss, of_base = loss_of(figures), loss_of(before)
    if loss is not None:
        kind = "held-out loss" if figures.loss is not None else "loss on training samples"
        less = f", {(loss - of_base) / of_base:+.0%} from the base's {of_base:.4g}" if of_base else ""
        low = f"the lowest {kind}" if loss == least else f"a {kind} within {SAME_LOSS:.0%} of the lowest"
        parts.append(f"{low} of those without signs of a problem: {loss:.4g}{less}")
    else:
        parts.append("it looks most like the training clips")
    if (usual := clips.get("motion")) is not None:
        parts.append(
            f"its motion is {figures.motion:.2g} pixels per frame (training clips: {usual.low:.2g} to {usual.high:.2g})"
        )
    if figures.drift is not None:
        parts.append(f"unrelated prompts changed by {figures.drift:.2g}, where 1 is the difference of two prompts")
    told = f"Take {row.title}: {'; '.join(parts)}."
    if accused:
        told += f" {accused} of the others {'has' if accused == 1 else 'have'} signs of a problem."
    return told


def _none(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(sign.name for row in rows for sign in row.signs))
    if not names:
        return "There is nothing to choose from: only the base was sampled."
    if names == ["no effect"]:
        return "None of them has an effect: their videos are those of the base."
    if len(rows) == 1:
        return f"It has signs of a problem: {', '.join(names)}."
    told = f"All of them have signs of a problem: {', '.join(names)}."
    fewest = min(len(row.signs) for row in rows)
    few = [row for row in rows if len(row.signs) == fewest]
    signs = " and ".join(sign.name for sign in few[0].signs)
    if len(few) == 1:
        return f"{told} {few[0].title} has the fewest: {signs}."
    losses = {row.title: loss for row in few if (loss := loss_of(row.figures)) is not None}
    if len(losses) < len(few):
        return told
    of_them = "" if len(few) == len(rows) else f" of the {len(few)} with the fewest"
    return f"{told} {min(losses, key=losses.__getitem__)} has the lowest loss{of_them}."
