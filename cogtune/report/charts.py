"""Charts as inline SVG: the lines stretch with the page, the words around them are HTML and keep their size."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from cogtune.report.page import Html, tag

Point = tuple[float, float]

MOST_POINTS = 1000
"""About how many points of a curve are drawn: more than a screen has columns."""

_SPAN = 1000
"""Width and height of a chart's own coordinates."""


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """About ``most`` of the points at most, in their order: each stretch's lowest and highest, and both ends."""
    if len(points) <= most:
        return list(points)
    stretches = max(1, most // 2 - 1)
    kept = {0, len(points) - 1}
    for number in range(stretches):
        stretch = range(number * len(points) // stretches, (number + 1) * len(points) // stretches)
        kept.add(min(stretch, key=lambda place: points[place][1]))
        kept.add(max(stretch, key=lambda place: points[place][1]))
    return [points[place] for place in sorted(kept)]


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers from ``low`` or below to ``high`` or above, about so many, evenly spaced."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def short(value: float) -> str:
    """A number in few characters: ``0.25``, ``1e-4``, ``20k``."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    if 0 < size < 1e-3:
        digits, exponent = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{value:.4g}"


@dataclass(frozen=True)
class Series:
    """One curve of a chart: its name, its points by rising x, and how it is drawn."""

    name: str
    points: Sequence[Point]
    style: Literal["line", "faint", "second"] = "line"


@dataclass(frozen=True)
class _Axis:
    """Maps values to a chart's coordinates, and names some of them."""

    marks: tuple[float, ...]
    log: bool = False

    @classmethod
    def over(cls, values: Iterable[float], *, log: bool = False, about: int = 4) -> _Axis:
        values = list(values)
        low, high = min(values), max(values)
        if log:
            powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high) + 1e-9) + 1)
            return cls(tuple(10.0**power for power in powers), True)
        if low == high:
            low, high = (0.0, high * 2) if high > 0 else (low - 1, low + 1)
        elif 0 <= low < 0.5 * high:
            low = 0.0
        return cls(tuple(ticks(low, high, about)))

    def share(self, value: float) -> float:
        """Where ``value`` is between the first mark (0) and the last (1)."""
        first, last = self.marks[0], self.marks[-1]
        if self.log:
            value, first, last = math.log10(value), math.log10(first), math.log10(last)
        return (value - first) / (last - first)


def line_chart(title: str, series: Sequence[Series], *, unit: str = "", log: bool = False, small: bool = False) -> Html:
    """Curves over optimizer steps. A lone point is a dot; without any point the chart says so.

    Args:
        series: the first to be drawn first; long ones are thinned, highest and lowest points kept.
        unit: of the values, shown beside the title.
        log: a logarithmic scale, for values above zero only.
        small: one of several side by side.
    """
    drawn = [(one, thin(one.points)) for one in series if one.points]
    remark = ", ".join(filter(None, (unit, "logarithmic" if log else "")))
    caption = tag("figcaption", title, tag("span", remark, class_="unit") if remark else None)
    kind = "chart small" if small else "chart"
    if not drawn:
        return tag("figure", caption, tag("p", "nothing measured yet", class_="none"), class_=kind)
    points = [point for _, some in drawn for point in some]
    vertical = _Axis.over((y for _, y in points), log=log, about=3 if small else 4)
    steps = [x for x, _ in points]
    low, high = min(steps), max(steps)
    across = [mark for mark in ticks(low, high, 3 if small else 6) if low <= mark <= high] if high > low else [low]

    def x_of(x: float) -> float:
        return (x - low) / (high - low) if high > low else 0.5

    grid = "".join(f"M0 {_SPAN * (1 - vertical.share(mark)):.1f}H{_SPAN}" for mark in vertical.marks)
    paths = [tag("path", d=grid, class_="grid")]
    for one, some in drawn:
        places = [f"{_SPAN * x_of(x):.1f} {_SPAN * (1 - vertical.share(y)):.1f}" for x, y in some]
        if len(places) > 1:
            paths.append(tag("path", d=f"M{'L'.join(places)}", class_=one.style))
        if len(places) <= 40:
            paths.append(tag("path", d="".join(f"M{place}h0" for place in places), class_=f"{one.style} dots"))
    told = "; ".join(_told(one) for one, _ in drawn)
    svg = tag(
        "svg",
        paths,
        viewBox=f"0 0 {_SPAN} {_SPAN}",
        preserveAspectRatio="none",
        role="img",
        aria_label=f"{title}: {told}",
    )
    rows = [tag("span", short(mark), style=f"top:{100 * (1 - vertical.share(mark)):.2f}%") for mark in vertical.marks]
    columns = [
        tag("span", short(mark), class_=_edge(x_of(mark)), style=f"left:{100 * x_of(mark):.2f}%") for mark in across
    ]
    names = [tag("span", one.name, class_=one.style) for one, _ in drawn] if len(drawn) > 1 else []
    widest = max(len(short(mark)) for mark in vertical.marks)
    plot = tag(
        "div",
        tag("div", rows, class_="y", aria_hidden="true"),
        svg,
        tag("div", columns, class_="x", aria_hidden="true"),
        class_="plot",
        style=f"--labels:{widest + 0.5}ch",
    )
    return tag("figure", caption, plot, tag("p", names, class_="legend") if names else None, class_=kind)


def _told(one: Series) -> str:
    values = [y for _, y in one.points]
    if len(values) == 1:
        return f"{one.name} {short(values[0])} at step {one.points[0][0]:g}"
    return (
        f"{one.name} from {short(values[0])} to {short(values[-1])} over steps {one.points[0][0]:g} to "
        f"{one.points[-1][0]:g}, lowest {short(min(values))}, highest {short(max(values))}"
    )


def _edge(share: float) -> str | None:
    """The class that keeps a label at an end of the axis inside the chart."""
    return "first" if share < 0.04 else "last" if share > 0.96 else None


FEW = 8
"""Up to so many different values are listed one by one; more are put into bins."""


def bars(title: str, rows: Sequence[tuple[str, int]], *, unit: str = "") -> Html:
    """Counts as horizontal bars, one a line, each with its name and number."""
    most = max((count for _, count in rows), default=0) or 1
    lines = [
        tag(
            "li",
            tag("span", name, class_="name"),
            tag("span", tag("i", style=f"width:{100 * count / most:.1f}%"), class_="bar", aria_hidden="true"),
            tag("span", f"{count:,}", class_="count"),
        )
        for name, count in rows
    ]
    caption = tag("figcaption", title, tag("span", unit, class_="unit") if unit else None)
    body = tag("ul", lines) if lines else tag("p", "nothing to show", class_="none")
    return tag("figure", caption, body, class_="chart bars")


def distribution(title: str, values: Sequence[float], *, unit: str) -> Html:
    """How often which value occurs: a line for each when they are few, else a histogram."""
    counted = Counter(short(value) for value in values)
    if len(counted) <= FEW:
        first = {short(value): value for value in values}
        return bars(title, [(name, counted[name]) for name in sorted(counted, key=first.__getitem__)], unit=unit)
    return _histogram(title, values, unit)


def _histogram(title: str, values: Sequence[float], unit: str) -> Html:
    edges = ticks(min(values), max(values), 12)
    counts = [0] * (len(edges) - 1)
    width = edges[1] - edges[0]
    for value in values:
        counts[min(int((value - edges[0]) / width + 1e-9), len(counts) - 1)] += 1
    most = max(counts)
    column = _SPAN / len(counts)
    shapes = [
        tag(
            "rect",
            tag("title", f"{short(edges[place])} to {short(edges[place + 1])} {unit}: {count:,}"),
            x=f"{place * column + column * 0.04:.1f}",
            y=f"{_SPAN * (1 - count / most):.1f}",
            width=f"{column * 0.92:.1f}",
            height=f"{_SPAN * count / most:.1f}",
        )
        for place, count in enumerate(counts)
        if count
    ]
    ordered = sorted(values)
    median = ordered[len(ordered) // 2]
    told = f"{title}: {len(values):,} from {short(ordered[0])} to {short(ordered[-1])} {unit}, median {short(median)}"
    svg = tag("svg", shapes, viewBox=f"0 0 {_SPAN} {_SPAN}", preserveAspectRatio="none", role="img", aria_label=told)
    every = -(-len(edges) // 5)
    marks = [
        tag("span", short(edge), class_=_edge(share), style=f"left:{100 * share:.2f}%")
        for place, edge in enumerate(edges)
        if place % every == 0
        for share in [place / (len(edges) - 1)]
    ]
    plot = tag(
        "div",
        tag(
            "div",
            tag("span", f"{most:,}", style="top:0%"),
            tag("span", "0", style="top:100%"),
            class_="y",
            aria_hidden="true",
        ),
        svg,
        tag("div", marks, class_="x", aria_hidden="true"),
        class_="plot",
        style=f"--labels:{len(f'{most:,}') + 0.5}ch",
    )
    remark = f"{unit}, median {short(median)}"
    caption = tag("figcaption", title, tag("span", remark, class_="unit"))
    return tag("figure", caption, plot, class_="chart histogram")
