"""Waiting for events, with an end that only a machine that hangs reaches."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(true: Callable[[], object], seconds: float = 600) -> None:
    """Wait until something is so; ``seconds`` are for a machine that is very busy."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)
