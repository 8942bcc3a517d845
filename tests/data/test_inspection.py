"""Clips are opened in processes of their own: one that breaks its decoder costs nothing but its own place."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from cogtune.data.validation import inspection
from cogtune.data.validation.inspection import Inspection, InspectionJob, inspect, prepare
from cogtune.data.video.clips import write_video
from cogtune.data.video.images import ImageInfo
from cogtune.system import pool
from cogtune.system.errors import CogtuneError
from cogtune.system.pool import Beat
from tests.support import broken_decoder


@pytest.fixture
def clip(tmp_path: Path) -> Callable[[str], Path]:
    """A clip of that name; all are the same."""
    write_video(tmp_path / "first.mp4", np.zeros((12, 64, 96, 3), np.uint8), 8)

    def make(name: str) -> Path:
        return Path(shutil.copy(tmp_path / "first.mp4", tmp_path / f"{name}.mp4"))

    return make


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that clips of certain names break."""
    monkeypatch.setattr(inspection, "look", broken_decoder.look)
    monkeypatch.setenv("COGTUNE_STALL_SECONDS", "1.5")


def look(jobs: list[InspectionJob], workers: int = 2) -> list[Inspection]:
    seen = dict(inspect(jobs, workers=workers))
    return [seen[place] for place in range(len(jobs))]


def problems(seen: Inspection) -> list[str]:
    return [f"{code}: {message}" for code, message, _ in seen.problems]


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_decoder_that_breaks_takes_only_its_own_clip_with_it(clip: Callable[[str], Path], workers: int) -> None:
    names = ["crash", "good-1", "abort", "hang", "good-2", "killed", "greedy", "once", "good-3"]
    told = dict(zip(names, look([InspectionJob(clip(name)) for name in names], workers), strict=True))
    assert {name: problems(seen) for name, seen in told.items()} == {
        "crash": ["decoder-died: crash.mp4 crashes the decoder (SIGSEGV)"],
        "abort": ["decoder-died: abort.mp4 crashes the decoder (SIGABRT)"],
        "killed": [
            "decoder-died: killed.mp4 crashes the decoder (SIGKILL, as when memory runs out)",
        ],
        "hang": ["decoder-hung: hang.mp4 hangs the decoder: no output for 1.5 seconds"],
        "greedy": ["damaged-video: greedy.mp4 asks for more memory than 4 GiB"],
        "once": [],
        "good-1": [],
        "good-2": [],
        "good-3": [],
    }
    assert [name for name, seen in told.items() if seen.info is not None] == ["good-1", "good-2", "once", "good-3"]
    left = [one.cmdline() for one in psutil.Process().children(recursive=True)]
    left = [
        one for one in left if "tests.support" not in str(one) and "cogtune.training" not in str(one)
    ]  # other servers
    assert all(
        "multiprocessing.resource_tracker" in str(one) or "multiprocessing.forkserver" in str(one) for one in left
    )
    assert sum("multiprocessing.forkserver" in str(one) for one in left) == 1  # a decoder has the server's command line


def without_av() -> None:
    sys.modules["av"] = None  # type: ignore[assignment]
    prepare()


def with_a_fault_of_ours(limit: float, job: InspectionJob, beat: Beat) -> Inspection:
    raise ValueError("a fault of ours")


def ending() -> None:
    raise SystemExit(3)


def test_a_process_that_cannot_work_at_all_is_an_error_and_no_finding(
    clip: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "prepare", without_av)
    with pytest.raises(CogtuneError, match="cannot import PyAV: import of av halted"):
        look([InspectionJob(clip("a"))])
    monkeypatch.setattr(inspection, "prepare", ending)
    with pytest.raises(CogtuneError, match=r"does not start \(status 3\)"):
        look([InspectionJob(clip("a"))])
    monkeypatch.undo()
    monkeypatch.setattr(inspection, "look", with_a_fault_of_ours)
    with pytest.raises(CogtuneError, match="a fault of ours"):
        look([InspectionJob(clip("a"))])


def test_without_jobs_no_process_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "Pool", None)
    assert look([]) == []


def test_full_finds_what_lies_behind_the_first_frame(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 64, 96, 3), np.uint8)
    write_video(tmp_path / "a.mp4", noise, 8)
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 400] = b"\xff" * 400
    (tmp_path / "a.mp4").write_bytes(data)
    Image.fromarray(noise[0]).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:-900])
    quick, full = look([InspectionJob(tmp_path / "a.mp4", tmp_path / "a.png", full=full) for full in (False, True)])
    assert problems(quick) == []
    assert quick.image == full.image or full.image is None
    assert [code for code, _, _ in full.problems] == ["damaged-video", "unreadable-image"]
    assert "of 40 frames, first frame" in full.problems[0][1]


def test_images_are_measured_as_they_are_shown(clip: Callable[[str], Path], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    Image.new("RGB", (30, 20)).save(tmp_path / "b.jpg")
    seen = look([InspectionJob(clip("a"), tmp_path / name) for name in ("a.jpg", "b.jpg", "gone.jpg")])
    assert [one.image for one in seen] == [ImageInfo(30, 20), ImageInfo(20, 30), None]
    assert problems(seen[2]) == ["missing-image: gone.jpg does not exist"]


@pytest.mark.e2e
@pytest.mark.parametrize("to", ["the group", "a thread"])
def test_ctrl_c_ends_at_once_and_leaves_nothing_running(clip: Callable[[str], Path], tmp_path: Path, to: str) -> None:
    """The system gives a signal to any thread of a program, and the main one may be about to wait for the clips."""
    for number in range(40):
        clip(f"hang-{number}").with_suffix(".txt").write_text("A black frame.")
    code = (
        "import sys, threading, time; threading.Thread(target=time.sleep, args=(1000,), daemon=True).start(); "
        "from cogtune.data.validation import inspection; "
        "from tests.support import broken_decoder; inspection.look = broken_decoder.look; "
        "from cogtune.cli import main; main(['dataset', 'validate', '.'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COGTUNE_STALL_SECONDS": "10000"},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    watched = psutil.Process(process.pid)
    deadline = time.monotonic() + 600
    while len(workers := decoders(watched)) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    if to == "a thread":
        time.sleep(1)  # until it waits for the clips
        os.kill(max(thread.id for thread in watched.threads()), signal.SIGINT)
    else:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=600)  # long before the decoders' own time limit
    assert (process.returncode, out) == (130, b"")
    assert b"Traceback" not in err
    assert b"interrupted" in err
    assert psutil.wait_procs(workers, timeout=600)[1] == []


def decoders(process: psutil.Process) -> list[psutil.Process]:
    """The processes that open clips for this one: forked by the server that is its child."""
    with contextlib.suppress(psutil.Error):
        return [one for child in process.children() for one in child.children()]
    return []
