"""A process that looks at clips, started by :mod:`cogtune.data.validation.inspection`.

A damaged file can make a decoder hang, crash or ask for all the memory there is. Here it takes this process with it
and nothing else. Jobs come on stdin and answers go to stdout, each a line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cogtune.data.video.container import DamagedVideo, VideoError, check_decoded, decode_all, import_av
from cogtune.data.video.images import HINT, measure_image
from cogtune.data.video.probing import probe
from cogtune.system.children import end_with_command
from cogtune.system.errors import CogtuneError

STALL_VARIABLE = "COGTUNE_STALL_SECONDS"
"""Environment variable: how long a decoder may go without giving anything before it counts as hung."""

STALL_SECONDS = 30.0

HUNG = -int(getattr(signal, "SIGALRM", -142))
"""The exit status of a process whose decoder gave nothing for too long."""

SECONDS_PER_BYTE = 1e-7
"""What a file's size adds to that while it is opened: some have to be read to their end for it."""

MOST_MEMORY = 4 << 30
"""Bytes of address space; a damaged header may ask for any amount. A clip of 8K takes about a quarter of it."""


def stall_seconds() -> float:
    """The time limit, from the environment or by default."""
    try:
        return max(0.01, float(os.environ[STALL_VARIABLE]))
    except (KeyError, ValueError):
        return STALL_SECONDS


def look(job: dict[str, Any], limit: float) -> dict[str, Any]:
    """What there is to say of one clip and its image: ``info`` and ``image`` as dicts, and ``problems``.

    Args:
        job: ``video``, ``image`` or None, and ``full``: whether every frame is decoded.
        limit: seconds without progress after which the system ends this process.
    """
    video, image = Path(job["video"]), job["image"]
    answer: dict[str, Any] = {"info": None, "image": None, "problems": []}

    def tick() -> None:
        _end_in(limit)

    try:
        _allow_for_size(video, limit)
        info = probe(video, tick)
        answer["info"] = asdict(info)
        if job["full"]:
            decoded = decode_all(video, tick)
            answer["info"]["interlaced"] |= decoded.interlaced
            check_decoded(video, info.num_frames, decoded)
    except Exception as error:
        problem = error if isinstance(error, VideoError) else _unforeseen(video, error)
        answer["problems"].append([problem.code, f"{video.name} {problem.reason}", problem.hint])
    if image is not None:
        _look_at_image(Path(image), answer, limit, full=job["full"])
    _end_in(None)
    return answer


def _look_at_image(image: Path, answer: dict[str, Any], limit: float, *, full: bool) -> None:
    if not image.is_file():
        answer["problems"].append(["missing-image", f"{image.name} is not there", "check the path"])
        return
    try:
        _allow_for_size(image, limit)
        answer["image"] = asdict(measure_image(image, full=full))
    except Exception as error:
        if not isinstance(error, CogtuneError):
            error = CogtuneError(f"cannot read the image {image}: {error}", HINT)
        answer["problems"].append(["unreadable-image", error.message, error.hint])


def _allow_for_size(path: Path, limit: float) -> None:
    """Start the clock for opening a file. Python need not get its turn: the signal ends the process by itself."""
    with contextlib.suppress(OSError):
        limit += path.stat().st_size * SECONDS_PER_BYTE
    _end_in(limit)


_timers: list[threading.Timer] = []


def _end_in(seconds: float | None) -> None:
    """Have this process end in so many seconds, unless this is called again until then."""
    if hasattr(signal, "setitimer"):  # heard even where a decoder keeps Python's threads from running
        signal.setitimer(signal.ITIMER_REAL, seconds or 0)
        return
    while _timers:
        _timers.pop().cancel()
    if seconds is not None:
        _timers.append(threading.Timer(seconds, os._exit, [HUNG]))
        _timers[0].start()


def _unforeseen(video: Path, error: Exception) -> VideoError:
    if isinstance(error, MemoryError):
        return DamagedVideo(video, f"asks for more memory than {MOST_MEMORY >> 30} GiB")
    return DamagedVideo(video, f"makes the decoder fail: {type(error).__name__}: {error}")


def _prepare() -> None:
    """Let this process be the one that ends when a decoder goes wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the one that started us ends us
    try:
        import resource
    except ImportError:  # Windows
        return

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = MOST_MEMORY if hard == resource.RLIM_INFINITY else min(MOST_MEMORY, hard)
    with contextlib.suppress(OSError, ValueError):  # not every system has this limit
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def main() -> int:
    """Answer every line of stdin, until there are no more."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints is no answer
    end_with_command()
    _prepare()
    try:
        import_av()
    except CogtuneError as error:
        json.dump({"failed": [error.message, error.hint]}, answers)
        return error.exit_code
    limit = stall_seconds()
    for line in sys.stdin:
        answers.write(json.dumps(look(json.loads(line), limit)) + "\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # the one that asked is gone
        raise SystemExit(main())
