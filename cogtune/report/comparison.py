"""The page of ``cogtune compare``, and its section on a run's page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from cogtune import __version__
from cogtune.quality.limits import LIMITS
from cogtune.report.page import Child, Html, facts, join, section, table, tag, write_page
from cogtune.report.pictures import bytes_each
from cogtune.report.videos import strip, video_figure
from cogtune.run.comparison import FIGURES, LOOKS, PAGE, Comparison, FigureKind, Row, SceneKind, read_comparison
from cogtune.system import console, names
from cogtune.system.errors import CogtuneError, counted

_KINDS: dict[SceneKind, str] = {
    "prompt": "prompt",
    "held-out": "caption of a held-out clip",
    "unrelated": "unrelated to the training data",
}


def write_comparison_page(folder: Path, comparison: Comparison) -> Path:
    """Write the page of a comparison to its folder; return its path.

    Raises:
        CogtuneError: it cannot be written.
    """
    name = folder.absolute().parent.name if folder.name == names.COMPARISON else folder.absolute().name
    write_page(folder / PAGE, f"{name} · comparison", _parts(folder, name, comparison))
    return folder / PAGE


def _parts(folder: Path, name: str, found: Comparison) -> Iterator[Html]:
    best = found.best
    yield tag(
        "header",
        tag("p", "Comparison", class_="kind"),
        tag("h1", name),
        tag("p", f"{found.model} · the same prompts, first frames and seeds for all", class_="lead"),
        _verdict(found),
        facts(
            [
                ("Compared", counted(len(found.rows), "row")),
                ("Prompts and seeds", str(len(found.scenes))),
                ("Training clips", str(found.clip_count) if found.clip_count else "not known"),
                ("Best", best.title if best else "none"),
            ]
        ),
    )
    yield _signs(found.rows)
    yield section(
        "Figures",
        tag("p", "The range of the training clips leaves out the lowest and highest 5 %.", class_="remark"),
        _table(found),
        tag("ul", [tag("li", tag("b", f"{one.title}: "), one.meaning) for one in _known(found)], class_="findings"),
    )
    if found.grid is not None and (folder / found.grid).is_file():
        whole = video_figure(folder / found.grid, folder, "all of them side by side", "", bytes_each(1))
        yield section("Grid", tag("div", whole, class_="whole"))
    yield _videos(folder, found)
    limits = [(limit.sign, limit.told, limit.reason) for limit in LIMITS]
    yield section("Limits", table(("sign", "named if", "why"), limits, label="Limits of the signs", wide=(1, 2)))
    yield tag("footer", f"Made by cogtune {__version__}; `cogtune compare` makes it again.")


def _verdict(found: Comparison) -> Html:
    kind = "ok" if found.chosen is not None else "warning"
    first, _, rest = found.verdict.partition(": ")
    return tag("p", tag("b", f"{first}:" if rest else first), " ", tag("span", rest), class_=f"verdict {kind}")


def _signs(rows: Sequence[Row]) -> Html:
    """Return the signs of all rows, with what to change."""
    items = [
        tag(
            "li",
            tag("b", f"{row.title}: {sign.name}"),
            tag("div", sign.why),
            tag("div", f"To change it, {sign.advice}.", class_="hint"),
            class_="warning",
        )
        for row in rows
        for sign in row.signs
    ]
    if not items:
        return section("Signs of a problem", tag("p", "None.", class_="remark"))
    return section("Signs of a problem", tag("ul", items, class_="findings"))


def _known(found: Comparison) -> list[FigureKind]:
    """Return the columns of which something was measured."""
    rows = (found.base, *found.rows)
    return [one for one in FIGURES if any(getattr(row.figures, one.name) is not None for row in rows)]


def _table(found: Comparison) -> Html:
    columns = _known(found)
    rows: list[Sequence[Child]] = []
    for row in (found.base, *found.rows):
        title = tag("b", row.title, " ✓") if row is found.best else row.title
        signs = ", ".join(sign.name for sign in row.signs) or ("-" if row is found.base else "none")
        rows.append([title, signs, *(_cell(row, found.base, one) for one in columns)])
    if found.clips:
        rows.append(["training clips", "-", *(_range(found, one) for one in columns)])
    return table(("", "signs", *(one.title for one in columns)), rows, label="Figures", sortable=True, compact=True)


def _cell(row: Row, base: Row, column: FigureKind) -> Child:
    value, before = getattr(row.figures, column.name), getattr(base.figures, column.name)
    if value is None:
        return "-"
    written = column.form(value)
    if row is base or not before or column.name not in (*LOOKS, "loss", "training_loss"):
        return written
    return join(written, tag("small", f" {(value - before) / before:+.0%}"))


def _range(found: Comparison, column: FigureKind) -> str:
    usual = found.clips.get(column.name)
    return "-" if usual is None else f"{column.form(usual.low)} to {column.form(usual.high)}"


def _videos(folder: Path, found: Comparison) -> Html:
    rows = (found.base, *found.rows)
    most_bytes = bytes_each(len(found.scenes) * len(rows))
    strips = []
    for number, scene in enumerate(found.scenes):
        shown = [
            video_figure(folder / row.videos[number], folder, row.title, scene.prompt, most_bytes)
            for row in rows
            if (folder / row.videos[number]).is_file()
        ]
        about = [_KINDS[scene.kind], f"seed {scene.seed}", f"from {scene.image}" if scene.image else ""]
        about += ["also trained on"] if scene.trained else []
        strips.append(strip(scene.prompt, " · ".join(filter(None, about)), shown, label="Videos by weights"))
    return section("Videos", tag("p", "The base first.", class_="remark"), strips, id="videos")


def comparison_section(folder: Path) -> Iterator[Html]:
    """Yield the section of a run's page with the figures of its comparison, if there is one.

    Args:
        folder: the comparison's, in the run's folder.
    """
    try:
        found = read_comparison(folder)
    except CogtuneError as error:
        console.warn(f"not in the report: {error.message}")
        return
    if found is None:
        return
    link = tag("a", "Videos, signs and explanations", href=f"{folder.name}/{PAGE}")
    yield section("Comparison", _verdict(found), _table(found), tag("p", link, class_="remark"), id="comparison")
