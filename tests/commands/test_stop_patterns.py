"""Ctrl-C and kill at any moment of a run: nothing of ours is left running.

A seeded sample of 200 patterns by default. All of them: ``pytest -m exhaustive tests/commands/test_stop_patterns.py``,
and with ``COGTUNE_PATTERNS=17-23`` those from 17 to 23.
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
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from cogtune.models.variants import LORA_WEIGHTS_NAME
from cogtune.run.checkpoints import checkpoints, read_state
from cogtune.system import children

pytestmark = pytest.mark.timeout(900)

SETUPS = (("1", "ddp"), ("2", "ddp"), ("2", "zero2"))
SIGNALS = {"once": 1, "twice": 2, "thrice": 3}
ACTIONS = (*SIGNALS, "terminate", "hang up", "kill", "kill launcher", "kill worker")
MOMENTS = ("start-up", "caching", "workers", "first step", "saving", "sampling", "end")
COUNT = 200
SAMPLE = 3
"""Patterns that the slow tests try: about a minute on two cores."""

WITHIN = 10.0
"""Seconds after the end of the command within which everything else has ended."""


@dataclass(frozen=True)
class Pattern:
    """What happens to which run, and when."""

    number: int

    @property
    def setup(self) -> tuple[str, str]:
        return SETUPS[self.number % len(SETUPS)]

    @property
    def moment(self) -> str:
        return MOMENTS[self.number % len(MOMENTS)]

    @property
    def action(self) -> str:
        return ACTIONS[self.number % len(ACTIONS)]

    @property
    def encodes(self) -> bool:
        """Whether the run has to fill its cache first, so that its first worker is one that encodes."""
        return self.moment == "caching" or (self.moment == "start-up" and self.setup[0] == "1")

    @property
    def is_early(self) -> bool:
        """Whether a signal at start-up comes before the command has started any process that works."""
        return self.number // (len(MOMENTS) * len(ACTIONS)) % 2 == 0

    def __str__(self) -> str:
        return f"{self.number}-{'x'.join(self.setup)}-{self.moment}-{self.action}".replace(" ", "_")


def chosen() -> list[Pattern]:
    first, last = (int(number) for number in os.environ.get("COGTUNE_PATTERNS", f"0-{COUNT - 1}").split("-"))
    return [Pattern(number) for number in range(first, last + 1)]


def sample() -> list[Pattern]:
    return [Pattern(number) for number in random.Random(394).sample(range(COUNT), SAMPLE)]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that is filled by whichever pattern comes first."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
@pytest.mark.parametrize("pattern", sample(), ids=str)
def test_nothing_is_left(pattern: Pattern, clips: Path, cache: Path, tmp_path: Path) -> None:
    try_out(pattern, clips, cache, tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("pattern", chosen(), ids=str)
def test_nothing_is_left_of_any_pattern(pattern: Pattern, clips: Path, cache: Path, tmp_path: Path) -> None:
    try_out(pattern, clips, cache, tmp_path)


def try_out(pattern: Pattern, clips: Path, cache: Path, folder: Path) -> None:
    """Start a run, do to it what the pattern says, and see what is left of it."""
    (processes, strategy), out = pattern.setup, folder / "out"
    run = Run(secrets.token_hex(8), out, folder / "cache" if pattern.encodes else cache)
    words: list[str | Path] = [
        sys.executable, "-m", "cogtune", "train", "--preset", "cpu-lora-tiny", "--data", clips, "--output", out,
        "--cache-dir", run.cache, "--num-processes", processes, "--strategy", strategy, "--steps", "3",
        "--workers", "1", "--checkpoint-every", "2", "--sample-every", "2", "--sample-steps", "2",
        "--validation-prompts", "a",
    ]  # fmt: skip
    with (folder / "said").open("wb") as said:
        running = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env={**os.environ, "COGTUNE_TEST": run.mark}
        )
    try:
        wait_for(lambda: running.poll() is not None or run.has_come(pattern))
        hit = act(pattern, running, run)
        wait_for(lambda: running.poll() is not None)
        ended = time.monotonic()
        while (left := run.processes()) and time.monotonic() < ended + WITHIN:
            time.sleep(0.1)
        print(f"status {running.returncode}, {hit} hit, nothing left after {time.monotonic() - ended:.1f} s")
        told = (folder / "said").read_text()
        assert left == [], [process.cmdline() for process in left]
        assert hit or pattern.moment == "end", told
        assert "Traceback" not in told
        assert "unexpected error" not in told
        assert running.returncode in statuses(pattern), told
        for checkpoint in checkpoints(out):
            assert checkpoint.name == f"checkpoint-{read_state(checkpoint)['step']}"
    finally:
        running.kill()
        running.wait()
        for process in run.processes():
            with suppress(psutil.Error):
                process.kill()


def statuses(pattern: Pattern) -> set[int]:
    """What the command may exit with: 0 also where the run was over before it heard of anything."""
    over = {0} if pattern.moment in ("saving", "sampling", "end") else set()
    match pattern.action:
        case "kill":
            return {-signal.SIGKILL} | over
        case "terminate":
            return {128 + signal.SIGTERM} | over
        case "hang up":
            return {128 + signal.SIGHUP} | over
        case "kill launcher":  # its workers may stop in good order, as if they were asked to
            return {1, 128 + signal.SIGTERM} | over
        case "kill worker":
            return {1} | over
        case "once":
            return {128 + signal.SIGINT} | over
        case _:  # the last one may come when the command has said its word and ends
            return {128 + signal.SIGINT, -signal.SIGINT} | over


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


@dataclass(frozen=True)
class Run:
    """A run under test: the mark that all of its processes carry, and its folders."""

    mark: str
    out: Path
    cache: Path

    def processes(self) -> list[psutil.Process]:
        return children.members("COGTUNE_TEST", self.mark)

    def workers(self) -> list[psutil.Process]:
        """The processes that encode or train."""
        return [process for process in self.processes() if is_module(process, "encoding.worker", "training.worker")]

    def launcher(self) -> list[psutil.Process]:
        """What the command started to do its work: a launcher, or the worker where there is one only."""
        launchers = [process for process in self.processes() if is_module(process, "training.launcher")]
        return launchers or self.workers()

    def targets(self, pattern: Pattern) -> list[psutil.Process]:
        """What a pattern kills beside the command."""
        return self.workers() if pattern.action == "kill worker" else self.launcher()

    def has_come(self, pattern: Pattern) -> bool:
        """Whether the run has reached the pattern's moment, and there is what it kills."""
        if not self._has_come(pattern):
            return False
        return not pattern.action.startswith("kill ") or bool(self.targets(pattern))

    def _has_come(self, pattern: Pattern) -> bool:
        match pattern.moment:
            case "start-up" if pattern.is_early:
                return self.out.exists() or (pattern.encodes and self.cache.exists())
            case "start-up":
                return bool(self.launcher())
            case "caching":
                return status(self.cache / "job" / "rank-0.json") == "running"
            case "workers":
                return status(self.out / "launch" / "rank-0.json") != ""
            case "first step":
                metrics = self.out / "metrics.jsonl"
                return metrics.is_file() and '"loss"' in metrics.read_text()
            case "saving":
                return any(self.out.glob(".checkpoint-*")) or any(self.out.glob("checkpoint-*"))
            case "sampling":
                return any((self.out / "samples").glob("*"))
            case _:
                return (self.out / LORA_WEIGHTS_NAME).exists()


def is_module(process: psutil.Process, *names: str) -> bool:
    """Whether a process runs one of these modules of ours."""
    with suppress(psutil.Error):
        words: Sequence[str] = process.cmdline()
        return any(f"cogtune.{name}" in words[1:4] for name in names)  # python [-u] -m MODULE
    return False


def act(pattern: Pattern, running: subprocess.Popen[bytes], run: Run) -> int:
    """Do what the pattern says, in its rhythm, the same one each time; how many processes it was done to."""
    chance = random.Random(pattern.number)

    def pause() -> None:
        time.sleep(chance.choice((0.0, chance.uniform(0, 0.3), chance.uniform(0.3, 1.0))))

    if running.poll() is not None:
        return 0
    if pattern.action == "kill worker":  # at once: at start-up, it is there before it has said a word
        chance.choice(run.targets(pattern) or [psutil.Process(running.pid)]).kill()
        return 1
    if pattern.action == "kill launcher":
        for process in (targets := run.targets(pattern)):
            with suppress(psutil.Error):
                process.kill()
        return len(targets)
    pause()
    for _ in range(SIGNALS.get(pattern.action, 0)):
        running.send_signal(signal.SIGINT)
        pause()
    others = {"terminate": signal.SIGTERM, "hang up": signal.SIGHUP, "kill": signal.SIGKILL}
    if pattern.action in others:
        running.send_signal(others[pattern.action])
    return 1
