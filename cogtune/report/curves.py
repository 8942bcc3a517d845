"""A run's metrics as curves over optimizer steps, and their charts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cogtune.report.charts import Point, Series, ceiling_of, line_chart
from cogtune.report.page import Html, join, section, tag
from cogtune.run.metrics import MovingAverage
from cogtune.system.numbers import whole_number

_BY_TIMESTEP = "_by_timestep"

AT_FIXED_NOISE = {"eval_loss": "training samples", "validation_loss": "validation samples"}
"""The losses at fixed noise, by their names in ``metrics.jsonl``, with their samples."""

_PER_STEP = {
    "learning_rate": ("Learning rate", ""),
    "grad_norm": ("Gradient norm", "before clipping"),
    "seconds": ("Time per step", "seconds"),
    "memory_gib": ("Memory", "GiB"),
}
"""The other metrics of a step: title and unit of each chart."""

_AVERAGED = ("loss", "grad_norm")
"""Metrics that vary strongly from step to step: drawn pale, with their mean."""

_CUT = (*_AVERAGED, "seconds")
"""Metrics whose spikes would flatten the rest: cut off above usual values."""


@dataclass(frozen=True)
class Curves:
    """The metrics in ``metrics.jsonl`` by name.

    Args:
        plain: points ``(step, value)`` by ascending step, only finite values.
        by_timestep: for a loss at fixed noise, such points for each timestep.
        last_step: the last step with a measurement; 0 if there is none.
    """

    plain: Mapping[str, Sequence[Point]]
    by_timestep: Mapping[str, Mapping[int, Sequence[Point]]]
    last_step: int

    def __getitem__(self, name: str) -> Sequence[Point]:
        """Return the points of one metric; empty if it was not measured."""
        return self.plain.get(name, ())


def curves(lines: Iterable[Mapping[str, Any]]) -> Curves:
    """Return the curves in the lines of ``metrics.jsonl``; the last line for a step counts."""
    plain: defaultdict[str, dict[float, float]] = defaultdict(dict)
    nested: defaultdict[str, defaultdict[int, dict[float, float]]] = defaultdict(lambda: defaultdict(dict))
    last = 0
    for line in lines:
        step = line["step"]
        last = max(last, step)
        for name, value in line.items():
            if name != "step" and _is_finite(value):
                plain[name][step] = value
            elif name.endswith(_BY_TIMESTEP) and isinstance(value, dict):
                for timestep, loss in value.items():
                    number = whole_number(str(timestep))
                    if number is not None and _is_finite(loss):
                        nested[name.removesuffix(_BY_TIMESTEP)][number][step] = loss
    return Curves(
        {name: sorted(points.items()) for name, points in plain.items()},
        {
            name: {timestep: sorted(points.items()) for timestep, points in sorted(parts.items())}
            for name, parts in nested.items()
        },
        last,
    )


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def window_of(points: Sequence[Point]) -> int:
    """Return the smoothing window, in steps, for a curve of ``points`` points."""
    return max(10, len(points) // 40)


def smooth(points: Sequence[Point], window: int) -> list[Point]:
    """Return an exponential moving average over about ``window`` points, without the bias of its start."""
    average = MovingAverage(window)
    return [(step, average.add(value)) for step, value in points]


def loss_charts(found: Curves) -> Iterator[Html]:
    """Yield charts of the losses: at fixed noise, for each timestep, and of training steps."""
    measured = [(name, words) for name, words in AT_FIXED_NOISE.items() if found[name]]
    charts = []
    if measured:
        charts.append(line_chart("Loss at fixed noise", [_series(words, found[name]) for name, words in measured]))
    if found["loss"]:
        charts.append(_step_chart("loss", "Training loss", "", found["loss"], small=False))
    remark = (
        "The loss at fixed noise uses the same samples, noise and timesteps each time, so it can be compared between "
        "steps. The loss of a training step depends on its random timestep and says little by itself."
    )
    if not charts:
        yield section("Loss", tag("p", "Nothing has been measured yet.", class_="remark"))
        return
    yield section("Loss", tag("p", remark, class_="remark"), tag("div", charts, class_="charts large"))
    timesteps = sorted({timestep for name, _ in measured for timestep in found.by_timestep.get(name, {})})
    if timesteps:
        yield section(
            "By timestep",
            tag("p", "From low to high noise, each chart on its own scale.", class_="remark"),
            tag("div", [_timestep_chart(found, measured, timestep) for timestep in timesteps], class_="charts"),
        )


def _series(words: str, points: Sequence[Point]) -> Series:
    return Series(words, points, "second" if words == AT_FIXED_NOISE["validation_loss"] else "line")


def _timestep_chart(found: Curves, measured: Sequence[tuple[str, str]], timestep: int) -> Html:
    some = [_series(words, found.by_timestep.get(name, {}).get(timestep, ())) for name, words in measured]
    return line_chart(f"Timestep {timestep}", some, small=True)


def step_charts(found: Curves) -> Iterator[Html]:
    """Yield small charts of the other metrics of steps."""
    known = {"loss", *AT_FIXED_NOISE}
    rest = [name for name in found.plain if name not in known and name not in _PER_STEP]
    charts = []
    for name in (*(name for name in _PER_STEP if found[name]), *rest):
        title, unit = _PER_STEP.get(name, (name.replace("_", " "), ""))
        charts.append(_step_chart(name, title, unit, found[name], small=True))
    if charts:
        yield section("Speed and memory", tag("div", charts, class_="charts"))


def _step_chart(name: str, title: str, unit: str, points: Sequence[Point], *, small: bool) -> Html:
    series = [Series("each step", points)]
    if name in _AVERAGED and len(points) > 1:
        window = window_of(points)
        mean = Series(f"mean of about {window} steps", smooth(points, window))
        series = [Series("each step", points, "faint"), mean]
    return line_chart(title, series, unit=unit, ceiling=ceiling_of(points) if name in _CUT else None, small=small)


def change(points: Sequence[Point]) -> Html | None:
    """Return a curve's first and last value, and their difference, for the head of the page."""
    if not points:
        return None
    first, last = points[0][1], points[-1][1]
    if len(points) == 1 or not first:
        return join(f"{last:.4g}")
    return join(f"{last:.4g}", tag("small", f"from {first:.4g}, {(last - first) / first:+.0%}"))
