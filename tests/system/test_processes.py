"""Worker processes, watched: their words and exit codes are passed on, and silence is told too."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cogtune.system import children, locks
from cogtune.system.errors import CogtuneError, StoppedError
from cogtune.system.locks import exclusive_folder
from cogtune.system.processes import WorkerReport, supervise
from tests.support.waiting import wait_until

WORKER = """
import pathlib, signal, sys, time
from cogtune.system.errors import CogtuneError
from cogtune.system.processes import WorkerReport, run_worker
def job(stop):
    {body}
report, log = (pathlib.Path(word) for word in sys.argv[1:])
sys.exit(run_worker(WorkerReport(report), log, job))
"""


def watched(folder: Path, body: str, *, is_last: bool = False) -> None:
    report, log = folder / "rank-0.json", folder / "logs" / "log"
    program = WORKER.format(body=body.replace("\n", "\n    "))
    supervise(
        [sys.executable, "-c", program, str(report), str(log)],
        [WorkerReport(report)],
        log,
        environment={},
        if_stopped=lambda: "go on so",
        is_last=is_last,
    )


def test_a_worker_that_ends_well_is_no_news(tmp_path: Path) -> None:
    watched(tmp_path, "return True")
    assert json.loads((tmp_path / "rank-0.json").read_text())["status"] == "done"


def test_a_workers_error_arrives_whole(tmp_path: Path) -> None:
    with pytest.raises(CogtuneError) as caught:
        watched(tmp_path, "raise CogtuneError('what', 'do', details=['a', 'b'], exit_code=7)")
    error = caught.value
    assert (error.message, error.hint, error.details, error.exit_code) == ("what", "do", ("a", "b"), 7)


def test_a_bug_is_a_line_for_the_user_and_a_traceback_in_the_log(tmp_path: Path) -> None:
    with pytest.raises(CogtuneError, match="ZeroDivisionError: division by zero") as caught:
        watched(tmp_path, "return 1 / 0")
    assert str(tmp_path / "logs" / "log") in caught.value.hint
    assert "Traceback" in (tmp_path / "logs" / "log").read_text()


def test_what_libraries_print_goes_to_the_log_and_its_own_words_to_the_user(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    noise = "from cogtune.system import console\nimport os\nprint('print', flush=True)\nos.write(1, b'write')"
    watched(tmp_path, f"{noise}\nconsole.note('mine')\nreturn True")
    assert capfd.readouterr().err == "mine\n"
    assert (tmp_path / "logs" / "log").read_text() == "print\nwrite"


def test_out_of_memory_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CogtuneError) as caught:
        watched(tmp_path, "raise type('OutOfMemoryError', (RuntimeError,), {})('CUDA out of memory')")
    assert "smaller --size" in caught.value.hint


def test_a_worker_that_is_killed_is_told_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(CogtuneError, match="died without an error message") as caught:
        watched(tmp_path, "print('last words', file=sys.stderr, flush=True)\nimport os\nos.kill(os.getpid(), 9)")
    assert caught.value.details[-1] == "last words"
    assert "go on so" in caught.value.hint


def test_a_worker_that_stopped_is_told_with_how_to_go_on(tmp_path: Path) -> None:
    with pytest.raises(CogtuneError) as caught:
        watched(tmp_path, "return False")
    assert caught.value.hint == "go on so"
    assert caught.value.exit_code == 128 + signal.SIGTERM


def test_a_stop_is_told_while_the_main_thread_cannot_look(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    busy = (
        "import hashlib, os, signal\nfrom cogtune.system import console\n"
        "stop.begins()\nos.kill(os.getppid(), signal.SIGTERM)\n"
        "hashlib.pbkdf2_hmac('sha256', b'', b'', 3_000_000)\n"
        "console.note('the end of a long step')\nreturn not stop"
    )
    with pytest.raises(StoppedError):
        watched(tmp_path, busy)
    told = capfd.readouterr().err.splitlines()
    assert told == ["stopping cleanly (press again to stop at once)", "the end of a long step"]


def test_a_signal_that_comes_too_late_for_the_work_stops_what_would_follow(tmp_path: Path) -> None:
    late = (
        "import os, signal, time\nstop.begins()\nos.kill(os.getppid(), signal.SIGTERM)\n"
        "while not stop:\n    time.sleep(0.01)\nreturn True"
    )
    watched(tmp_path, late, is_last=True)
    with pytest.raises(StoppedError, match="stopped before the end") as caught:
        watched(tmp_path, late)
    assert (caught.value.hint, caught.value.exit_code) == ("go on so", 143)


@pytest.mark.parametrize("blocked", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_hears_signals_that_its_parent_had_blocked(tmp_path: Path, blocked: signal.Signals) -> None:
    body = f"import os\nstop.begins()\nos.kill(os.getpid(), {int(blocked)})\nreturn not stop"
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {blocked})
    try:
        with pytest.raises(StoppedError):
            watched(tmp_path, body)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_a_report_of_an_earlier_run_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / "rank-0.json").write_text('{"pid": 1, "status": "done"}')
    with pytest.raises(CogtuneError, match="died without an error message"):
        supervise(
            [sys.executable, "-c", "pass"], [WorkerReport(tmp_path / "rank-0.json")], tmp_path / "log",
            environment={}, if_stopped=str,
        )  # fmt: skip


def test_a_folder_belongs_to_one_process_at_a_time(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys, time\nfrom cogtune.system.locks import exclusive_folder\n"
        "with exclusive_folder(pathlib.Path(sys.argv[1])):\n    print('in', flush=True); time.sleep(1000)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "in\n"
    with pytest.raises(CogtuneError, match="another process is using"), exclusive_folder(tmp_path):
        pytest.fail("got in")
    holder.kill()
    holder.communicate()
    with exclusive_folder(tmp_path):  # a killed holder lets go
        pass


@pytest.mark.parametrize(("untold", "told"), [(60.0, ""), (0.0, "waiting for another process that is using")])
def test_one_may_wait_for_the_other_and_says_so_when_it_takes_long(
    untold: float, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(locks, "_UNTOLD", untold)
    order: list[str] = []

    def second() -> None:
        with exclusive_folder(tmp_path, wait=True):
            order.append("second")

    with exclusive_folder(tmp_path):
        waiting = threading.Thread(target=second)
        waiting.start()
        waiting.join(0.5)
        order.append("first")
    waiting.join(600)
    assert order == ["first", "second"]
    assert (told in capsys.readouterr().err) if told else capsys.readouterr().err == ""


def test_a_signal_that_the_system_gave_to_another_thread_is_heard(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys, threading, time\nfrom cogtune.system.processes import WorkerReport, supervise\n"
        "threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()\n"
        "folder, sleep = pathlib.Path(sys.argv[1]), [sys.executable, '-c', 'import time; time.sleep(1000)']\n"
        "supervise(sleep, [WorkerReport(folder / 'rank-0.json')], folder / 'log', environment={}, if_stopped=str)\n"
    )
    running = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stderr=subprocess.PIPE, text=True)
    watched, deadline = psutil.Process(running.pid), time.monotonic() + 600
    while not watched.children():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)  # until it waits
    os.kill(max(thread.id for thread in watched.threads()), signal.SIGINT)
    assert "stopped before the end" in running.communicate(timeout=600)[1]


COMMAND = """
import pathlib, sys
from cogtune.system.processes import WorkerReport, supervise
from tests.support.waiting import wait_until
folder = pathlib.Path(sys.argv[1])
supervise([sys.executable, "-c", sys.argv[2], str(folder / "rank-0.json"), str(folder / "log")],
      [WorkerReport(folder / "rank-0.json")], folder / "log", environment={}, if_stopped=str)
"""

ALONE = """
import subprocess, sys
worker = [sys.executable, "-c", sys.argv[1], *sys.argv[2:]]
subprocess.run(worker, start_new_session=True)  # as torch's launcher does
"""


@contextlib.contextmanager
def a_command(folder: Path, body: str, *, launched: bool = False) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A command that watches a worker; with the mark that all of its processes carry in their environment."""
    mark = secrets.token_hex(8)
    program = WORKER.format(body=body.replace("\n", "\n    "))
    if launched:
        program = f"import sys\nsys.argv[1:1] = [{program!r}]\n{ALONE}"
    words = [sys.executable, "-c", COMMAND, str(folder), program]
    running = subprocess.Popen(words, env={**os.environ, "COGTUNE_TEST": mark}, stderr=subprocess.DEVNULL)
    try:
        yield running, mark
    finally:
        running.kill()
        running.wait()
        for process in children.members("COGTUNE_TEST", mark):
            process.kill()


def test_a_worker_whose_command_is_gone_stops_in_good_order(tmp_path: Path) -> None:
    body = "import time\nstop.begins()\nwhile not stop:\n    time.sleep(0.01)\nreturn False"
    with a_command(tmp_path, body) as (running, mark):
        report = WorkerReport(tmp_path / "rank-0.json")
        wait_until(lambda: (report.read() or {}).get("status") == "running")
        running.kill()
        wait_until(lambda: (report.read() or {}).get("status") == "stopped")
        wait_until(lambda: not children.members("COGTUNE_TEST", mark))


STUCK = (
    "import signal, subprocess, time\nfrom pathlib import Path\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
    "report.with_name('stuck').touch()\n"
    "time.sleep(600)"
)


@pytest.mark.parametrize(
    ("how", "at_work", "launched"),
    [
        ("killed", False, True),
        ("killed", True, False),
        ("killed", True, True),
        ("launcher killed", True, True),
        ("hung up", False, True),
        ("once", False, True),
        ("twice", False, True),
        ("twice", True, False),
        ("twice", True, True),
    ],
)
def test_nothing_is_left_of_a_command(tmp_path: Path, how: str, at_work: bool, launched: bool) -> None:
    """Though the worker is deaf to signals, has a child in a session of its own, and is in one itself."""
    with a_command(tmp_path, ("stop.begins()\n" if at_work else "") + STUCK, launched=launched) as (running, mark):
        wait_until((tmp_path / "stuck").is_file)
        if how == "killed":
            running.kill()
        elif how == "launcher killed":
            psutil.Process(running.pid).children()[0].kill()
        elif how == "hung up":
            running.send_signal(signal.SIGHUP)
        else:
            running.send_signal(signal.SIGINT)
        if how == "twice":
            wait_until(lambda: running.poll() is not None or running.send_signal(signal.SIGINT))
        running.wait(600)
        wait_until(lambda: not children.members("COGTUNE_TEST", mark))


@pytest.mark.parametrize(
    ("killed_by", "first", "foreseen", "told"),
    [
        (9, 101, False, "process 1 of 2 was killed by signal 9"),
        (0, 101, True, "the cause"),
        (0, 100, True, "what followed"),
        (0, 100, False, "the cause"),
    ],
)
def test_of_several_deaths_the_first_is_told(
    tmp_path: Path, killed_by: int, first: int, foreseen: bool, told: str
) -> None:
    """The other processes fail because of it, and say so first; often in words that are not ours."""
    reports = [WorkerReport(tmp_path / f"rank-{rank}.json") for rank in range(2)]
    ends: dict[str, dict[str, Any]] = {
        "rank-0.json": {"pid": 100, "status": "failed", "message": "what followed", "foreseen": foreseen},
        "rank-1.json": {"pid": 101, "status": "running" if killed_by else "failed", "message": "the cause"},
    }
    rest: dict[str, Any] = {"hint": "", "details": [], "exit_code": 1, "foreseen": True}
    launcher = (
        f"import pathlib, sys\nfolder = pathlib.Path({str(tmp_path)!r})\n"
        f"for name, end in { ({name: json.dumps(rest | end) for name, end in ends.items()})!r}.items():\n"
        "    (folder / name).write_text(end)\n"
        "from cogtune.system.first_death import Death\n"
        f"Death({first}, {killed_by}).tell()\n"
        "sys.exit(1)\n"
    )
    with pytest.raises(CogtuneError, match=told):
        supervise(
            [sys.executable, "-c", launcher],
            reports,
            tmp_path / "logs" / "log",
            environment={},
            if_stopped=lambda: "go on so",
        )
