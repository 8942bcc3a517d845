"""Processes that may be killed: what comes back, in what order, and what is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil
import pytest

from cogtune.system import pool
from cogtune.system.children import forking
from cogtune.system.errors import CogtuneError
from cogtune.system.pool import Beat, Lost, PoolOptions, processing

Answer = tuple[int, npt.NDArray[np.int64]]


def answer(job: int, beat: Beat) -> Answer:
    """The job and an array; the first jobs take longest, and the third dies."""
    if job == 2:
        os.abort()
    time.sleep(max(0.0, 0.3 - 0.1 * job))
    return job, np.arange(job * 1000)


def first_waits_for_third(job: tuple[int, Path], beat: Beat) -> int:
    number, file = job
    if number == 2:
        file.touch()
    while number == 0 and not file.exists():
        time.sleep(0.01)
    return number


def slow_but_alive(job: int, beat: Beat) -> int:
    for _ in range(6):
        time.sleep(0.5)
        beat(2)
    if job:
        time.sleep(1000)
    return job


def allowed_more(job: int, beat: Beat) -> int:
    beat(30.0)
    time.sleep(1.0)
    return job


def results(workers: int, *, ordered: bool) -> list[Answer | Lost]:
    options = PoolOptions[int](patience=60, preload=["numpy"], ordered=ordered, most_held=4)
    with processing(answer, range(8), workers, options) as found:
        return [item[2] for item in found if item is not None]


def test_results_come_in_order_with_their_arrays() -> None:
    found = results(3, ordered=True)
    assert found[2] == Lost("SIGABRT")
    for place, one in enumerate(found):
        if not isinstance(one, Lost):
            number, array = one
            assert number == place
            np.testing.assert_array_equal(array, np.arange(place * 1000))
            array[:] = 0  # it is ours
    assert len(found) == 8


def test_or_as_they_are_ready() -> None:
    numbers = [one[0] for one in results(3, ordered=False) if not isinstance(one, Lost)]
    assert sorted(numbers) == [0, 1, 3, 4, 5, 6, 7]


def test_one_that_waits_keeps_no_other_from_being_given_back(tmp_path: Path) -> None:
    options = PoolOptions[tuple[int, Path]](patience=600, preload=[], ordered=False)
    jobs = [(number, tmp_path / "done") for number in range(3)]
    with processing(first_waits_for_third, jobs, 2, options) as found:
        numbers = [item[2] for item in found if item is not None]
    assert set(numbers) == {0, 1, 2}
    assert numbers[0] == 1


def test_a_sign_of_life_is_enough_and_silence_ends_a_process() -> None:
    options = PoolOptions[int](patience=2, preload=[], ordered=True)
    with processing(slow_but_alive, [0, 1], 2, options) as found:
        assert [item[2] for item in found if item is not None] == [0, Lost(silence=2)]
    with processing(allowed_more, [5], 1, options) as found:
        assert [item[2] for item in found if item is not None] == [5]


def test_jobs_are_taken_up_as_there_is_room_and_nothing_is_left_at_work() -> None:
    taken: list[int] = []

    def jobs() -> range:
        return range(100)

    options = PoolOptions[int](patience=60, preload=["numpy"], most_held=4, cost=lambda _: 1, most_cost=100)
    with processing(answer, (taken.append(job) or job for job in jobs()), 2, options) as found:
        next(found)
        time.sleep(1.0)
        assert len(taken) <= 6  # held, one given out, one looked at
    left = [one for child in psutil.Process().children() for one in child.children()]
    assert left == []


def dies(job: int, beat: Beat) -> None:
    os.abort()


def test_a_death_is_told_while_another_process_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that starts a process reads the exit codes of all others; who reads one second gets 255."""
    read, reading = forkserver.read_signed, threading.Event()

    def slowly(descriptor: int) -> int:
        reading.set()
        time.sleep(0.3)
        code: int = read(descriptor)
        return code

    context = forking(["numpy"], deaf=True)
    first = pool._Process(context, dies, pool._nothing)
    monkeypatch.setattr(forkserver, "read_signed", slowly)
    ends: list[Lost | None] = []
    thread = threading.Thread(target=lambda: ends.append(first.do(0, 60)))
    thread.start()
    assert reading.wait(60)
    second = pool._Process(context, dies, pool._nothing)
    thread.join()
    assert [*ends, second.do(0, 60)] == [Lost("SIGABRT"), Lost("SIGABRT")]
    assert first.process.exitcode == -signal.SIGABRT


def test_an_error_of_the_job_itself_is_one_of_ours() -> None:
    options = PoolOptions[int](patience=60, preload=[])
    with pytest.raises(CogtuneError, match="ZeroDivisionError"), processing(divide, [1, 0], 1, options) as found:
        list(found)


def divide(job: int, beat: Beat) -> float:
    return 1 / job


def test_without_processes_the_jobs_are_done_here() -> None:
    with processing(divide, [1, 2], 0, PoolOptions[int](patience=1, preload=[])) as found:
        assert list(found) == [(0, 1, 1.0), (1, 2, 0.5)]


@pytest.mark.parametrize("deaf", [True, False])
def test_processes_are_deaf_to_signals_from_their_start_where_that_is_wanted(deaf: bool, tmp_path: Path) -> None:
    """In a process of its own: the fork server of this one may have been started by another test."""
    program = (
        "import signal\n"
        "from cogtune.system.children import forking\n"
        "def tell(): print(*(s.name for s in sorted(signal.pthread_sigmask(signal.SIG_BLOCK, []))))\n"
        "if __name__ == '__main__':\n"
        f"    process = forking([], deaf={deaf}).Process(target=tell)\n"
        "    process.start(), process.join()\n"
    )
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run([sys.executable, tmp_path / "program.py"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == (["SIGINT", "SIGTERM"] if deaf else [])
