"""How much memory a tree of processes takes, looked at from outside while it runs."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from cogtune.system.gpus import gpus

INTERVAL = 0.05
_FAMILY_INTERVAL = 1.0
"""Seconds between looks at which processes there are, which takes longer than looking at their memory."""

_CGROUP_PEAKS = ("/sys/fs/cgroup/memory.peak", "/sys/fs/cgroup/memory/memory.max_usage_in_bytes")


@dataclass
class Peaks:
    """The highest figures seen, in bytes."""

    cards: tuple[int, ...] = ()
    """Memory in use on each GPU, by whatever program; empty without NVIDIA's driver."""
    cards_before: tuple[int, ...] = ()
    """The same before the work began."""
    processes: int = 0
    """Memory of all child processes that is not a mapped file's: what cannot be dropped."""
    machine: int = 0
    """By how much the memory that is not available rose on the whole machine."""
    cgroup: int | None = None
    """The control group's peak since it was created, including page cache, if available."""


@contextlib.contextmanager
def watched() -> Iterator[Peaks]:
    """Watch the GPUs, and this process's children, from another thread while the block runs."""
    before = tuple(gpu.used for gpu in gpus())
    peaks = Peaks(cards=before, cards_before=before)
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(peaks, ended, _unavailable()), daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        ended.set()
        thread.join()
        peaks.cgroup = _cgroup_peak()


def _watch(peaks: Peaks, ended: threading.Event, unavailable_before: int) -> None:
    family: list[psutil.Process] = []
    looked = 0.0
    while not ended.wait(INTERVAL):
        if time.monotonic() - looked >= _FAMILY_INTERVAL:
            family, looked = psutil.Process().children(recursive=True), time.monotonic()
        peaks.cards = tuple(max(pair) for pair in zip(peaks.cards, (gpu.used for gpu in gpus()), strict=False))
        peaks.processes = max(peaks.processes, sum(_kept(process) for process in family))
        peaks.machine = max(peaks.machine, _unavailable() - unavailable_before)


def _unavailable() -> int:
    memory = psutil.virtual_memory()
    return int(memory.total - memory.available)


def _kept(process: psutil.Process) -> int:
    """Return a process's anonymous and shared memory in bytes; mapped files, which can be dropped, are left out."""
    kinds = ("RssAnon:", "RssShmem:")
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
        found = [int(line.split()[1]) for line in status.splitlines() if line.startswith(kinds)]
        return sum(found) * 1024 if found else int(process.memory_info().rss)
    except (OSError, psutil.Error):  # it has ended
        return 0


def _cgroup_peak() -> int | None:
    for path in _CGROUP_PEAKS:
        with contextlib.suppress(OSError, ValueError):
            return int(Path(path).read_text())
    return None
