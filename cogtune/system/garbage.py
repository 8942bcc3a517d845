"""Importing large libraries without garbage collections."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Pause the garbage collector.

    Importing torch, diffusers and PEFT makes a million objects that stay. Going through them again and again takes up
    to a fifth of the time that the imports take.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
