"""Ctrl-C and kill at any moment of a run: nothing of ours is left running.

Eight patterns by default; ``COGTUNE_PATTERNS=0-199`` tries all 200, and ``17-17`` the eighteenth alone.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from cogtune import children
from cogtune.models import LORA_WEIGHTS_NAME

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SETUPS = (("1", "ddp"), ("2", "ddp"), ("2", "zero2"))
ACTIONS = ("once", "twice", "thrice", "terminate", "hang up", "kill", "kill launcher", "kill worker")
MOMENTS = ("start-up", "caching", "workers", "first step", "saving", "sampling", "end")
WITHIN = 10.0
"""Seconds after the end of the command within which everything else has ended."""


@dataclass(frozen=True)
class Pattern:
    """What happens to which run, and when."""

    number: int

    @property
    def setup(self) -> tuple[str, str]:
        return SETUPS[self.number % 3]

    @property
    def moment(self) -> str:
        return MOMENTS[self.number % 7]

    @property
    def action(self) -> str:
        return ACTIONS[self.number % 8]

    def pauses(self) -> Iterator[float]:
        """Seconds before each thing that is done, the same ones each time."""
        chance = random.Random(self.number)
        while True:
            yield chance.choice((0.0, chance.uniform(0, 0.3), chance.uniform(0.3, 1.0)))

    def __str__(self) -> str:
        return f"{self.number}-{'x'.join(self.setup)}-{self.moment}-{self.action}".replace(" ", "_")


def chosen() -> list[Pattern]:
    first, last = (int(number) for number in os.environ.get("COGTUNE_PATTERNS", "0-7").split("-"))
    return [Pattern(number) for number in range(first, last + 1)]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that is filled by whichever pattern comes first."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("pattern", chosen(), ids=str)
def test_nothing_is_left(pattern: Pattern, clips: Path, cache: Path, tmp_path: Path) -> None:
    mark, (processes, strategy), out = secrets.token_hex(8), pattern.setup, tmp_path / "out"
    fresh = tmp_path / "cache" if pattern.moment in ("start-up", "caching") else cache
    words = [
        sys.executable, "-m", "cogtune", "train", "--preset", "cpu-lora-tiny", "--data", clips, "--output", out,
        "--cache-dir", fresh, "--num-processes", processes, "--strategy", strategy, "--steps", "6", "--workers", "1",
        "--checkpoint-every", "2", "--sample-every", "2", "--sample-steps", "4", "--validation-prompts", "a:::b",
    ]  # fmt: skip
    with (tmp_path / "said").open("wb") as said:
        running = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env={**os.environ, "COGTUNE_TEST": mark}
        )
    try:
        wait_for(lambda: has_come(pattern.moment, out, fresh) or running.poll() is not None)
        act(pattern, running, out, fresh)
        acted = time.monotonic()
        wait_for(lambda: running.poll() is not None)
        ended = time.monotonic()
        while (left := children.members("COGTUNE_TEST", mark)) and time.monotonic() < ended + WITHIN:
            time.sleep(0.05)
        assert left == [], [process.cmdline() for process in left]
        print(f"nothing left {time.monotonic() - acted:.1f} s after the last of it")
        told = (tmp_path / "said").read_text()
        assert "Traceback" not in told
        assert "something unforeseen" not in told
    finally:
        running.kill()
        running.wait()
        for process in children.members("COGTUNE_TEST", mark):
            with suppress(psutil.Error):
                process.kill()


def wait_for(condition: Callable[[], bool]) -> None:
    """Until something is so; the end is for a machine that is very busy."""
    until = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def status(report: Path) -> str:
    """What a worker said last."""
    try:
        return str(json.loads(report.read_bytes())["status"])
    except (OSError, ValueError):
        return ""


def has_come(moment: str, out: Path, cache: Path) -> bool:
    """Whether a run has reached that moment."""
    match moment:
        case "start-up":
            return out.exists() or cache.exists()
        case "caching":
            return status(cache / "job" / "rank-0.json") == "running"
        case "workers":
            return status(out / "launch" / "rank-0.json") != ""
        case "first step":
            metrics = out / "metrics.jsonl"
            return metrics.is_file() and '"loss"' in metrics.read_text()
        case "saving":
            return any(out.glob(".checkpoint-*")) or any(out.glob("checkpoint-*"))
        case "sampling":
            return any((out / "samples").glob("*"))
        case _:
            return (out / LORA_WEIGHTS_NAME).exists()


def act(pattern: Pattern, running: subprocess.Popen[bytes], out: Path, cache: Path) -> None:
    """Do what the pattern says, in its rhythm."""
    pauses = pattern.pauses()
    time.sleep(next(pauses))
    times = {"once": 1, "twice": 2, "thrice": 3}.get(pattern.action, 0)
    for _ in range(times):
        running.send_signal(signal.SIGINT)
        time.sleep(next(pauses))
    if pattern.action == "terminate":
        running.terminate()
    elif pattern.action == "hang up":
        running.send_signal(signal.SIGHUP)
    elif pattern.action == "kill":
        running.kill()
    elif pattern.action == "kill launcher":
        with suppress(psutil.Error):
            for child in psutil.Process(running.pid).children():
                child.kill()
    elif pattern.action == "kill worker":
        for report in (out / "launch" / "rank-0.json", cache / "job" / "rank-0.json"):
            with suppress(OSError, ValueError, psutil.Error):
                psutil.Process(json.loads(report.read_bytes())["pid"]).kill()
                return
