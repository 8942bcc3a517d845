"""The process that opens clips, with a decoder that fails as real ones do on clips whose names say how."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable
from pathlib import Path

from cogtune.data import inspector
from cogtune.data.container import VideoInfo

sound = inspector.probe


def probe(path: Path, tick: Callable[[], None]) -> VideoInfo:
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


inspector.probe = probe
raise SystemExit(inspector.main())
