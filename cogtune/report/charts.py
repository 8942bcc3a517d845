"""Charts as inline SVG: lines scale with the page, while labels are HTML and keep their size."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cogtune.report.page import Html, tag

Point = tuple[float, float]

MOST_POINTS = 1000
"""About how many points of a curve are drawn: more than the columns of a screen."""

_SPAN = 1000
"""Width and height of a chart in its coordinates."""


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Return at most about ``most`` points in order: the lowest and highest of each interval, and both ends."""
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
    """Return about ``about`` evenly spaced round numbers from at most ``low`` to at least ``high``."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def short(value: float) -> str:
    """Format a number briefly: ``0.25``, ``1e-4``, ``20k``."""
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
    """One curve of a chart: its name, its points by ascending x, and its style."""

    name: str
    points: Sequence[Point]
    style: Literal["line", "faint", "second"] = "line"


@dataclass(frozen=True)
class _Axis:
    """A vertical axis: maps values to fractions of the height, and has at least two marks."""

    low: float
    high: float
    marks: tuple[float, ...]

    @classmethod
    def over(cls, values: Sequence[float], *, ceiling: float | None, about: int) -> _Axis:
        """Return an axis for these values, starting at zero if that costs little, and limited to ``ceiling``."""
        low, high = min(values), max(values)
        if ceiling is not None and low < ceiling < high:
            high = ceiling
        if high - low <= 1e-9 * max(abs(low), abs(high)):  # level, as far as anyone can see
            low, high = (0.0, high * 2) if high > 0 else (low - 1, low + 1)
        elif 0 <= low < 0.5 * high:
            low, high = 0.0, high * 1.04
        else:
            low, high = low - 0.04 * (high - low), high + 0.04 * (high - low)
        marks: list[float] = []
        while len(marks) < 2:
            marks = [mark for mark in ticks(low, high, about) if low <= mark <= high]
            about += 1
        return cls(low, high, tuple(marks))

    def share(self, value: float) -> float:
        """Return the position of ``value`` between bottom (0) and top (1); higher values are at the top."""
        return min(1.0, (value - self.low) / (self.high - self.low))


def ceiling_of(points: Sequence[Point]) -> float | None:
    """Return the value at which to cut off a chart so that spikes do not flatten the rest; None without spikes."""
    ordered = sorted(y for _, y in points)
    usual = ordered[(len(ordered) - 1) * 98 // 100] if ordered else 0.0
    return 1.2 * usual if ordered and 0 < 2 * usual < ordered[-1] else None


def line_chart(
    title: str, series: Sequence[Series], *, unit: str = "", ceiling: float | None = None, small: bool = False
) -> Html:
    """Return a chart of curves over optimizer steps. A single point is a dot; without points the chart says so.

    Args:
        series: drawn in order; long ones are thinned, keeping the highest and lowest points.
        unit: of the values, shown next to the title.
        ceiling: the upper limit of the scale; higher values are drawn at the edge, and the chart says so.
        small: one of several side by side, without a legend.
    """
    drawn = [(one, thin(one.points)) for one in series if one.points]
    kind = "chart small" if small else "chart"
    if not drawn:
        nothing = tag("p", "nothing measured yet", class_="none")
        return tag("figure", _caption(title, unit), nothing, class_=kind)
    points = [point for _, some in drawn for point in some]
    highest = max(points, key=lambda point: point[1])
    if ceiling is not None and highest[1] > ceiling:
        unit = ", ".join(filter(None, (unit, f"up to {short(highest[1])} (step {highest[0]:,.0f})")))
    vertical = _Axis.over([y for _, y in points], ceiling=ceiling, about=3 if small else 5)
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    across = [mark for mark in ticks(low, high, 3 if small else 5) if low <= mark <= high] if high > low else [low]

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
    told = f"{title}: {'; '.join(_told(one) for one, _ in drawn)}"
    rows = [(vertical.share(mark), short(mark)) for mark in vertical.marks]
    plot = _plot(paths, told, rows, [(x_of(mark), short(mark)) for mark in across])
    names = [tag("span", one.name, class_=one.style) for one, _ in drawn] if len(drawn) > 1 and not small else []
    return tag("figure", _caption(title, unit), plot, tag("p", names, class_="legend") if names else None, class_=kind)


def _caption(title: str, remark: str) -> Html:
    return tag("figcaption", title, tag("span", remark, class_="unit") if remark else None)


def _plot(
    shapes: Sequence[Html], told: str, rows: Sequence[tuple[float, str]], columns: Sequence[tuple[float, str]]
) -> Html:
    """Return shapes with the marks of both axes: each a position from 0 to 1, and a label."""
    svg = tag("svg", shapes, viewBox=f"0 0 {_SPAN} {_SPAN}", preserveAspectRatio="none", role="img", aria_label=told)
    left = [tag("span", words, style=f"top:{100 * (1 - share):.2f}%") for share, words in rows]
    below = [tag("span", words, class_=_edge(share), style=f"left:{100 * share:.2f}%") for share, words in columns]
    return tag(
        "div",
        tag("div", left, class_="y", aria_hidden="true"),
        svg,
        tag("div", below, class_="x", aria_hidden="true"),
        class_="plot",
        style=f"--labels:{max(len(words) for _, words in rows) + 0.5}ch",
    )


def _told(one: Series) -> str:
    values = [y for _, y in one.points]
    if len(values) == 1:
        return f"{one.name} {short(values[0])} at step {one.points[0][0]:g}"
    return (
        f"{one.name} from {short(values[0])} to {short(values[-1])} over steps {one.points[0][0]:g} to "
        f"{one.points[-1][0]:g}, lowest {short(min(values))}, highest {short(max(values))}"
    )


def _edge(share: float) -> str | None:
    """Return the class that keeps a label at the end of an axis inside the chart."""
    return "first" if share < 0.04 else "last" if share > 0.96 else None


FEW = 8
"""Most different values that are listed one by one; more are put in bins."""


def bars(title: str, rows: Sequence[tuple[str, int]], *, unit: str = "") -> Html:
    """Return counts as horizontal bars, each with its name and number."""
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
    body = tag("ul", lines) if lines else tag("p", "nothing to show", class_="none")
    return tag("figure", _caption(title, unit), body, class_="chart bars")


def distribution(title: str, values: Sequence[float], *, unit: str) -> Html:
    """Return the distribution of values: a bar for each if there are few, else a histogram."""
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
    every = -(-len(edges) // 5)
    columns = [(place / (len(edges) - 1), short(edge)) for place, edge in enumerate(edges) if place % every == 0]
    plot = _plot(shapes, told, [(1.0, f"{most:,}"), (0.0, "0")], columns)
    return tag("figure", _caption(title, f"{unit}, median {short(median)}"), plot, class_="chart histogram")
