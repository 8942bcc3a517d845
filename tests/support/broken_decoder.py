"""A look at a clip with a decoder that fails as real ones do on clips whose names say how."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable
from pathlib import Path

from cogtune.data.validation import inspection
from cogtune.data.validation.inspection import Inspection, InspectionJob
from cogtune.data.video.container import VideoInfo
from cogtune.data.video.probing import probe as sound
from cogtune.system.pool import Beat

sound_look = inspection.look


def look(limit: float, job: InspectionJob, beat: Beat) -> Inspection:
    """What stands in for :func:`cogtune.data.validation.inspection.look`."""
    inspection.probe = probe  # type: ignore[attr-defined]
    return sound_look(limit, job, beat)


def probe(path: Path, tick: Callable[[], None] = lambda: None) -> VideoInfo:
    kind = path.stem.split("-")[0]
    if kind == "crash":
        ctypes.string_at(0)
    elif kind == "abort":
        os.abort()
    elif kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "hang":
        ctypes.PyDLL(None).sleep(1000)  # holds the interpreter's lock, so that no other thread of Python runs
    elif kind == "greedy":
        bytearray(8 << 30)
    elif kind == "once" and not path.with_suffix(".died").exists():
        path.with_suffix(".died").touch()
        os.abort()
    return sound(path, tick)
