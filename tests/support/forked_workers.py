"""Real worker processes without the seconds that each takes to import its libraries: forked from one that has them."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from cogtune.run.launch import LaunchFiles
from cogtune.run.plan import Plan
from cogtune.training import worker

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["cogtune.training.worker", "cogtune.training.setup", "deepspeed", "deepspeed.ops.adam"])


def _work(plan: str, environment: dict[str, str], log: str, prepare: Callable[[], None]) -> None:
    with Path(log).open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    prepare()
    sys.exit(worker.main([plan]))


def _nothing() -> None: ...


def free_port() -> str:
    """A port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def launch_variables(plan: Plan, rank: int, port: str) -> dict[str, str]:
    """The environment that ``accelerate launch`` gives the plan's process ``rank``."""
    count = str(plan.config.num_processes)
    variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if plan.config.sharding.uses_deepspeed:
        variables |= {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(LaunchFiles(plan.config.output / "launch").deepspeed),
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
        }
    return variables


def start_workers(plan: Plan, prepare: Callable[[], None] = _nothing) -> list[BaseProcess]:
    """The plan's processes, with the environment that ``accelerate launch`` gives them.

    Args:
        prepare: called in each before it works; a function of a module.
    """
    files, count = LaunchFiles(plan.config.output / "launch"), plan.config.num_processes
    port = free_port()
    files.log.parent.mkdir(parents=True, exist_ok=True)
    workers: list[BaseProcess] = []
    for rank in range(count):
        files.report(rank).reserve()
        own = launch_variables(plan, rank, port) if count > 1 else {"RANK": "0", "LOCAL_RANK": "0"}
        workers.append(CONTEXT.Process(target=_work, args=(str(files.plan), own, f"{files.log}.{rank}", prepare)))
        workers[-1].start()
    return workers


def run_workers(plan: Plan, prepare: Callable[[], None] = _nothing) -> None:
    """Run the plan to its end; ``prepare`` as above."""
    for rank, process in enumerate(started := start_workers(plan, prepare)):
        process.join(600)  # the first of all compiles what DeepSpeed runs on a CPU
        log = Path(f"{LaunchFiles(plan.config.output / 'launch').log}.{rank}")
        if process.exitcode != 0:
            for other in started:
                other.kill()
            raise AssertionError(f"rank {rank} ended with {process.exitcode}:\n{log.read_text()[-4000:]}")


def kill_workers(started: list[BaseProcess], output: Path, *, when: Callable[[], bool], seconds: float) -> None:
    """kill -9 all of them, ``seconds`` after ``when`` came true."""
    log = Path(f"{LaunchFiles(output / 'launch').log}.0")
    deadline = time.monotonic() + 600
    while not when():
        assert all(process.is_alive() for process in started), log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.001)
    time.sleep(seconds)
    for process in started:
        process.kill()
    for process in started:
        process.join()
