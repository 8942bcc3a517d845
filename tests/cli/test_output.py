"""Where what is said goes: no work is lost because nobody reads it, and results that cannot be written are an error."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import secrets
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from cogtune.models.variants import LORA_WEIGHTS_NAME
from cogtune.run.checkpoints import checkpoints
from cogtune.system import children
from tests.conftest import Cogtune
from tests.support.sampling import sampled
from tests.support.waiting import wait_until

LOST = "error: cannot write the results to stdout: "
PROGRAM = f"{sys.executable} -m cogtune"


def in_shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sh", "-c", line], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("words", ["presets", "presets --json", "--version", "--help", "plan --preset 4090-lora-5b"])
@pytest.mark.parametrize(("where", "why"), [(">/dev/full", "No space left on device"), (">&-", "Bad file descriptor")])
def test_results_that_cannot_be_written_are_an_error(words: str, where: str, why: str, tmp_path: Path) -> None:
    done = in_shell(f"exec {PROGRAM} {words} {where}", tmp_path)
    assert (done.returncode, done.stderr.splitlines()[0]) == (1, LOST + why)
    assert len(done.stderr.splitlines()) == 2  # and a hint


def test_remarks_that_cannot_be_written_are_dropped(clips: Path, tmp_path: Path) -> None:
    for where in ("2>/dev/full", "2>&-", "2>&- <&-"):
        done = in_shell(f"exec {PROGRAM} dataset validate {clips} --preset cpu-lora-tiny {where}", tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert "0 errors" in done.stdout


def test_a_reader_that_has_enough_is_no_news(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "cogtune", "presets"], stdout=writing, stderr=subprocess.PIPE, cwd=tmp_path, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_command_without_words_shows_its_help_and_no_error(cogtune: Cogtune) -> None:
    for words in ([], ["dataset"]):
        ran = cogtune(*words, status=2)
        assert "Usage: " in ran.out
        assert ran.err == ""


WORKER = """
import os, pathlib, sys
from cogtune.system import console
from cogtune.system.processes import WorkerReport, supervise, run_worker
folder = pathlib.Path(sys.argv[1])
report = WorkerReport(folder / "rank-0.json")
if len(sys.argv) > 2:
    def job(stop):
        for _ in range(100):
            console.note("a remark")
            with console.dashboard("training", 2) as shown:
                shown.advance({"loss": "1"}, seconds_left=1)
            print("of a library", file=sys.stderr, flush=True)
            print("of another", flush=True)
        return True
    sys.exit(run_worker(report, folder / "log", job))
command = [sys.executable, "-c", os.environ["WORKER"], str(folder), "work"]
supervise(command, [report], pathlib.Path(sys.argv[1], "log"), environment={}, if_stopped=str)
(folder / "went well").touch()
"""


@pytest.mark.parametrize("log", ["log", "full"])
@pytest.mark.parametrize("where", ["a full disk", "no reader", "no terminal"])
def test_a_workers_remarks_stop_no_work(where: str, log: str, tmp_path: Path) -> None:
    if log == "full":
        (tmp_path / "log").symlink_to("/dev/full")
    if where == "a full disk":
        stderr = os.open("/dev/full", os.O_WRONLY)
    elif where == "no reader":
        reading, stderr = os.pipe()
        os.close(reading)
    else:
        terminal, stderr = pty.openpty()
        os.close(terminal)
    words = [sys.executable, "-c", WORKER, str(tmp_path)]
    done = subprocess.run(words, stderr=stderr, env={**os.environ, "WORKER": WORKER}, check=False)
    os.close(stderr)
    assert done.returncode == 0
    assert (tmp_path / "went well").is_file()


@pytest.mark.parametrize("gone", sampled(["reader", "terminal", "hung up"], "reader"))
def test_a_run_outlives_whoever_reads_it(gone: str, clips: Path, tmp_path: Path) -> None:
    """It goes on to its end; but for one whose own terminal hangs up, which is stopped in good order."""
    mark = secrets.token_hex(8)
    ours, theirs = pty.openpty() if gone != "reader" else os.pipe()
    steps = "4" if gone != "hung up" else "100000"
    line = (
        f"exec {PROGRAM} train --preset cpu-lora-tiny --data {clips} --steps {steps} --checkpoint-every 1"
        f" --output {tmp_path / 'out'} --cache-dir {tmp_path / 'cache'}"
    )
    if gone == "hung up":
        line = f"trap - HUP; {line}"
    running = subprocess.Popen(
        ["sh", "-c", line],
        stdin=theirs if gone == "hung up" else subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env={**os.environ, "COGTUNE_TEST": mark},
        preexec_fn=(lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)) if gone == "hung up" else None,
    )
    os.close(theirs)
    try:
        if gone == "hung up":
            os.set_blocking(ours, False)
            while not checkpoints(tmp_path / "out"):
                assert running.poll() is None
                time.sleep(0.05)
                read_all(ours)
        os.close(ours)
        running.wait(1000)
        assert running.returncode == (128 + signal.SIGHUP if gone == "hung up" else 1)  # it had results to show
        assert checkpoints(tmp_path / "out")
        if gone != "hung up":
            assert (tmp_path / "out" / LORA_WEIGHTS_NAME).is_file()
        wait_until(lambda: not children.members("COGTUNE_TEST", mark))
    finally:
        for process in children.members("COGTUNE_TEST", mark):
            process.kill()
        running.wait()


def read_all(terminal: int) -> bytes:
    """What a terminal shows that was not read yet."""
    shown = b""
    while True:
        try:
            shown += os.read(terminal, 65536)
        except OSError:  # nothing is there, or nobody will write there any more
            return shown


LIVE = """
import os, sys, time
from cogtune.system import console
console.configure(quiet=False, remarks=os.fdopen(int(sys.argv[1]), "w"))
figures = {"loss": "0.1234", "eval": "0.2345", "grad": "0.999", "lr": "1.00e-03", "s/step": "12.34", "GiB": "23.4"}
with console.dashboard("training", 100_000) as shown:
    for _ in range(8):
        shown.advance(figures, seconds_left=5000)
        time.sleep(0.2)
        console.note("said")
with console.progress("clips of the first of 8 processes", 100_000) as bar:
    for _ in range(8):
        bar.advance(1, "0.25 clips/s, mostly waiting for decoding")
        time.sleep(0.2)
"""


@pytest.mark.parametrize("wide", [30, 50, 200])
def test_the_live_lines_fit_the_terminal(wide: int) -> None:
    """Of the stream that they are drawn on: stdin, stdout and stderr of a worker are none."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, wide, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    running = subprocess.Popen(
        [sys.executable, "-c", LIVE, str(theirs)],
        pass_fds=[theirs],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**environment, "TERM": "xterm"},
    )
    os.close(theirs)
    os.set_blocking(ours, False)
    shown = b""
    while running.poll() is None:
        shown += read_all(ours)
        time.sleep(0.02)
    shown += read_all(ours)
    os.close(ours)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", plain)]
    assert "training" in plain
    assert "clips of" in plain
    assert max(map(len, lines)) <= wide
    assert wide < 100 or max(map(len, lines)) > 100  # and uses it
