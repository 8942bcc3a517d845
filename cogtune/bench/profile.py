"""A trace of one training step by PyTorch's profiler."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cogtune.system.files import write_atomic, write_text

if TYPE_CHECKING:
    from torch.profiler import profile

EXTRA_STEPS = 2
"""Steps after the timed ones: the one that is traced, and one after it, before which the trace ends."""
_ROWS = 40
"""Operations in the summary."""


def summary_of(trace: Path) -> Path:
    """Return where the operations of a trace are summed up: ``step.txt`` for ``step.json`` and ``step.json.gz``."""
    return trace.with_name(f"{trace.name.removesuffix('.gz').removesuffix('.json')}.txt")


@contextlib.contextmanager
def traced(trace: Path | None, steps: int) -> Iterator[Callable[[], None]]:
    """Trace the step before the last of ``steps``, of which there are three or more, inside the context.

    Writes ``trace``, in Chrome's format, and :func:`summary_of` it.

    Args:
        trace: None for no trace.

    Yields:
        A function to call after every step but the last.
    """
    if trace is None:
        yield lambda: None
        return
    import torch
    from torch.profiler import ProfilerActivity, profile, schedule

    on_gpu = torch.cuda.is_available()

    def write(done: profile) -> None:
        write_atomic(trace, lambda aside: _export(done, aside, "".join(trace.suffixes)))
        by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        table = done.key_averages().table(sort_by=by, row_limit=_ROWS, max_name_column_width=80)
        write_text(summary_of(trace), f"{table}\n")

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    when = schedule(wait=steps - 3, warmup=1, active=1, repeat=1)
    with profile(activities=activities, schedule=when, on_trace_ready=write) as profiler:
        yield profiler.step


def _export(done: profile, target: Path, suffixes: str) -> None:
    """Write a trace to ``target``; PyTorch compresses it if its name ends with ``.gz``."""
    named = target.with_name(f"{target.name}{suffixes}")
    try:
        done.export_chrome_trace(str(named))
        named.replace(target)
    finally:
        named.unlink(missing_ok=True)
