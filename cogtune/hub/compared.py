"""What `cogtune compare` found of published weights, for their model card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cogtune.hub.local import Weights
from cogtune.models.checkpoint_configs import fingerprint
from cogtune.run.comparison import FIGURES, Comparison, Row, read_comparison
from cogtune.run.folder import RunFolder
from cogtune.system.digests import digest_file
from cogtune.system.errors import CogtuneError


@dataclass(frozen=True)
class Compared:
    """The row of the published weights, and the comparison that it is from."""

    row: Row
    comparison: Comparison

    @property
    def is_best(self) -> bool:
        """Whether it is the row that the comparison chose."""
        return self.row == self.comparison.best


def compared(weights: Weights, run: Path | None) -> tuple[Compared | None, list[str]]:
    """Return what the run's comparison says of weights, if it is about them, and remarks.

    Of several strengths it is the chosen one, else that of training.
    """
    if run is None:
        return None, []
    try:
        found = read_comparison(RunFolder(run).comparison)
    except CogtuneError as error:
        return None, [f"the model card is without the comparison: {error.message}"]
    if found is None or weights.kind == "pipeline":
        return None, []
    lora = weights.kind == "lora"
    own = digest_file(weights.path) if lora else fingerprint(weights.path.parent, weights.path.name)
    rows = [row for row in found.rows if row.digest == own]
    best = found.best
    if not rows:
        return None, [f"`cogtune compare` chose {best.title}, not these weights"] if best else []
    if best in rows:
        return Compared(best, found), []
    notes = [f"`cogtune compare` chose {best.title}, not these weights"] if best else []
    return Compared(min(rows, key=lambda row: abs((row.strength or 1) - 1)), found), notes


def comparison_section(found: Compared) -> str:
    """Return the section of the card, in Markdown."""
    row, base, clips = found.row, found.comparison.base, found.comparison.clips
    at = "" if row.strength is None else f" at strength {row.strength:g}"
    said = f"Sampled{at} with the same prompts and seeds as the base model, and measured by `cogtune compare`."
    if found.is_best:
        said += f" It chose these weights{at}."
    elif row.signs:
        said += f" Signs of a problem: {', '.join(sign.name for sign in row.signs)}."
    lines = ["| | base model | this model | training clips |", "|---|---|---|---|"]
    for figure in FIGURES:
        name, form = figure.name, figure.form
        value, before = getattr(row.figures, name), getattr(base.figures, name)
        if value is None:
            continue
        usual = clips.get(name)
        cells = ["" if before is None or name in ("change", "drift") else form(before), form(value)]
        cells.append(f"{form(usual.low)} to {form(usual.high)}" if usual else "")
        lines.append(f"| {figure.heading} | {' | '.join(cells)} |")
    return "\n".join([said, "", *lines])
