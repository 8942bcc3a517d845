"""A run's metrics: one JSON line per step, and moving averages for display."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from cogtune.system.files import os_errors_explained, write_text

WINDOW = 10
"""Steps over which the loss and the pace are averaged for whoever watches."""
_MOST_STEPS = 10**12


class MetricsFile:
    """``metrics.jsonl``: a line for every optimizer step and every evaluation."""

    def __init__(self, path: Path, *, first_step: int, enabled: bool = True) -> None:
        """Open for appending; lines after ``first_step``, which a resumed run makes again, are dropped first.

        Args:
            enabled: False on all processes but the main one, where nothing is written.
        """
        self._path = path
        self._handle: TextIO | None = None
        if enabled:
            kept = [line for line in read_metrics(path) if line["step"] <= first_step] if first_step else []
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
            self._handle = path.open("a", encoding="utf-8")

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one line and hand it to the system, so that a killed run loses none.

        Raises:
            CogtuneError: it cannot be written.
        """
        if self._handle is not None:
            with os_errors_explained(self._path):
                self._handle.write(json.dumps(dict(values)) + "\n")
                self._handle.flush()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._handle is not None:
            with contextlib.suppress(OSError):  # of what write() has told already
                self._handle.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a metrics file that have a step, ignoring damaged ones. Empty without a file."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and type(line.get("step")) is int and 0 <= line["step"] <= _MOST_STEPS:
            lines.append(line)
    return lines


class MovingAverage:
    """An exponential moving average over about ``window`` values, without the bias of its start."""

    def __init__(self, window: float) -> None:
        self._keep = 1 - 1 / window
        self._sum = 0.0
        self._weight = 0.0

    def add(self, value: float) -> float:
        """Add a value; the average with it."""
        self._sum = self._keep * self._sum + (1 - self._keep) * value
        self._weight = self._keep * self._weight + (1 - self._keep)
        return self._sum / self._weight
