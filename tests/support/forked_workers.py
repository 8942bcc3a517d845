"""Real worker processes without the seconds that each takes to import its libraries: forked from one that has them."""

from __future__ import annotations

import os
import pkgutil
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver, popen_forkserver
from multiprocessing.context import ForkServerProcess
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import ClassVar
from unittest import mock

from cogtune.run.launch import LaunchFiles
from cogtune.run.plan import Plan
from cogtune.training import worker
from tests.conftest import KERNELS
from tests.support import runs_in_process


class _Popen(popen_forkserver.Popen):
    def _launch(self, process_obj: ForkedProcess) -> None:
        with mock.patch.object(forkserver, "connect_to_new_process", process_obj.server.connect_to_new_process):
            super()._launch(process_obj)  # type: ignore[misc] # typeshed leaves it out


class ForkedProcess(ForkServerProcess):
    """A process forked from a server of its class, apart from multiprocessing's, which decoders start with less."""

    server: ClassVar = forkserver.ForkServer()

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> popen_forkserver.Popen:
        assert isinstance(process_obj, ForkedProcess)
        return _Popen(process_obj)


ForkedProcess.server.set_forkserver_preload(
    [
        *("cogtune.training.worker", "cogtune.training.setup", "deepspeed", "deepspeed.ops.adam"),
        *("cogtune.encoding.worker", "cogtune.modeling.encoders"),
    ]
)


def _called(do: Callable[..., int | None], words: tuple[object, ...], environment: dict[str, str], log: str) -> None:
    with Path(log).open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    sys.exit(do(*words))


def _work(plan: str, prepare: Callable[[], None], evaluated: int) -> int:
    prepare()
    runs_in_process.EVALUATED_SAMPLES = evaluated
    with runs_in_process.few_evaluated():
        return worker.main([plan])


def _nothing() -> None: ...


def start_process(
    do: Callable[..., int | None], *words: object, log: str | Path, variables: dict[str, str] | None = None
) -> BaseProcess:
    """Call a module's function in a process of its own, which exits with what it returns and prints into ``log``."""
    process = ForkedProcess(target=_called, args=(do, words, variables or {}, str(log)))
    process.start()
    return process


def free_port() -> str:
    """A port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def rank_variables(rank: int, count: int, port: str, deepspeed: Path | None = None) -> dict[str, str]:
    """The environment that ``accelerate launch`` gives process ``rank``.

    Args:
        deepspeed: the file of DeepSpeed's configuration.
    """
    variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if deepspeed is not None:
        variables |= {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(deepspeed),
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
        }
    return variables


def launch_variables(plan: Plan, rank: int, port: str) -> dict[str, str]:
    """The environment that ``accelerate launch`` gives the plan's process ``rank``."""
    deepspeed = LaunchFiles(plan.config.output / "launch").deepspeed if plan.config.sharding.uses_deepspeed else None
    return rank_variables(rank, plan.config.num_processes, port, deepspeed)


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
        words = (str(files.plan), prepare, runs_in_process.EVALUATED_SAMPLES)
        workers.append(start_process(_work, *words, log=f"{files.log}.{rank}", variables=own))
    return workers


def run_workers(plan: Plan, prepare: Callable[[], None] = _nothing) -> None:
    """Run the plan to its end; ``prepare`` as above."""
    _join(start_workers(plan, prepare), LaunchFiles(plan.config.output / "launch").log)


def start_forked(_plan: Plan, files: LaunchFiles, *_worker: str, **_more: object) -> None:
    """Stands in for :func:`cogtune.run.launch.start`: the run's processes, forked."""
    run_workers(Plan.read(files.plan))


def _run_script(name: str, folder: Path) -> None:
    pkgutil.resolve_name(f"tests.support.{name}:main")(folder)


def run_script(name: str, folder: Path, *, count: int = 2, deepspeed: Path | None = None) -> None:
    """Run a script of this package in several processes, with the environment that ``accelerate launch`` gives them.

    Args:
        folder: what its ``main`` is called with; the processes' output goes to ``log.N`` in it.
        deepspeed: as for :func:`rank_variables`.
    """
    port, log = free_port(), folder / "log"
    built = {"TORCH_EXTENSIONS_DIR": str(KERNELS)}
    variables = [rank_variables(rank, count, port, deepspeed) | built for rank in range(count)]
    started = [
        start_process(_run_script, name, folder, log=f"{log}.{rank}", variables=own)
        for rank, own in enumerate(variables)
    ]
    _join(started, log)


def _join(started: list[BaseProcess], log: Path) -> None:
    for rank, process in enumerate(started):
        process.join(600)  # the first of all compiles what DeepSpeed runs on a CPU
        if process.exitcode != 0:
            for other in started:
                other.kill()
            said = Path(f"{log}.{rank}").read_text()
            raise AssertionError(f"rank {rank} ended with {process.exitcode}:\n{said[-4000:]}")


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
