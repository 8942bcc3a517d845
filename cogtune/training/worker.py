"""A training process: reads the plan, sets up and trains, and reports how it ended.

Started by ``accelerate launch --module cogtune.training.worker PLAN``. Libraries' output goes to stderr, which the
launcher keeps in a log; the run's messages go to stdout.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from cogtune.config.run_config import RunConfig
from cogtune.models.variants import LORA_WEIGHTS_NAME
from cogtune.planning.fit import local_hardware, suggest_fit
from cogtune.report.run import State, record_machine, write_run_report
from cogtune.run.checkpoints import checkpoints_after
from cogtune.run.folder import AVERAGE_NAME, RunFolder
from cogtune.run.launch import LaunchFiles, checkpoints_of, how_to_go_on
from cogtune.run.plan import Plan
from cogtune.system import console
from cogtune.system.errors import CogtuneError
from cogtune.system.files import AGAIN, DiskFull, os_errors_explained, write_atomic, write_text
from cogtune.system.folders import remove_folder, remove_partials
from cogtune.system.garbage import no_collections
from cogtune.system.json_files import is_sealed, read_json
from cogtune.system.locks import WORKER_LOCK, exclusive_folder
from cogtune.system.out_of_memory import cannot_pin, is_out_of_memory, out_of_memory, room_of
from cogtune.system.processes import StopRequest, run_worker


def run(plan: Plan, files: LaunchFiles, stop: StopRequest) -> bool:
    """Train as planned; return whether the last step and its evaluation were done.

    Raises:
        CogtuneError: anything the user can act on.
    """
    with no_collections():
        from cogtune.training.loop import train
        from cogtune.training.sample_videos import remove_later_samples
        from cogtune.training.setup import set_up

    with explain_out_of_memory(plan):
        training = set_up(plan, lambda: bool(stop))
    accelerator = training.train_state.accelerator
    if accelerator.is_main_process:
        _delete_later_checkpoints(plan, training.first_step)
        remove_later_samples(plan.config.output, training.first_step)
        write_text(RunFolder(plan.config.output).run_yaml, files.run_yaml.read_text(encoding="utf-8"))
        record_machine(files.folder)
        after_each = partial(write_report, plan.config.output, "running")
        training = replace(training, schedule=replace(training.schedule, after_each=after_each))
    accelerator.wait_for_everyone()
    stop.begins()
    with explain_out_of_memory(plan):
        finished = train(training)
    if finished and accelerator.is_main_process:
        publish_weights(plan.config.output, RunFolder(plan.config.output).checkpoint(plan.total_steps))
    if accelerator.is_main_process:
        write_report(plan.config.output, "ended" if finished else "stopping")
    accelerator.wait_for_everyone()
    return finished


@contextlib.contextmanager
def explain_out_of_memory(plan: Plan) -> Iterator[None]:
    """Turn an error about GPU memory into a suggestion that fits, and one about pinned memory into how to avoid it.

    Raises:
        CogtuneError: instead of the errors of PyTorch, cuBLAS and CUDA.
    """
    try:
        yield
    except CogtuneError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        config = plan.config
        newest = checkpoints_of(plan)[-1:]
        kept = [
            f"{path.name} is complete: make that change and continue from it with --resume latest" for path in newest
        ]
        if config.sharding.offloads and cannot_pin(error):
            message = "cannot allocate the pinned host memory that offload needs"
            message = f"{message}: {str(error).splitlines()[0]}"
            raise CogtuneError(message, _without_pinning(config), details=kept) from error
        room = room_of(error)
        hint = suggest_fit(config, plan.spec, local_hardware(), free=room.free if room else None)
        raise out_of_memory(error, hint, details=tuple(kept)) from error


def _without_pinning(config: RunConfig) -> str:
    if not config.sharding.shards_weights:
        return "use --no-pin-memory, which makes steps slower"
    if config.pin_memory:
        return "use --no-pin-memory to pin only the weights, which makes steps slower"
    return "zero3-offload always pins the weights; zero2-offload with --no-pin-memory pins nothing"


@contextlib.contextmanager
def explain_full_disk(plan: Plan) -> Iterator[None]:
    """Add to an error about a full disk the command that continues once there is space.

    Raises:
        CogtuneError: instead of a :class:`DiskFull` or a library's error.
    """
    try:
        try:
            yield
        except OSError as error:
            with os_errors_explained(Path(error.filename or plan.config.output)):
                raise
    except DiskFull as error:
        newest = checkpoints_of(plan)[-1:]
        kept = [f"{path.name} is complete" for path in newest]
        go_on = how_to_go_on(plan) if newest else AGAIN
        raise CogtuneError(error.message, error.hint.removesuffix(AGAIN) + go_on, details=kept) from error


def _delete_later_checkpoints(plan: Plan, first_step: int) -> None:
    """Delete checkpoints after the run's first step, now that the run is certain to start.

    Raises:
        CogtuneError: there are some, but the plan does not allow deleting them.
    """
    output = plan.config.output
    later = checkpoints_after(output, first_step)
    if later and not plan.overwrite:
        raise CogtuneError(
            f"{output} holds {', '.join(path.name for path in later)}, which this run would replace",
            "use --overwrite to delete them, or choose another --output",
        )
    for path in later:
        if left := remove_folder(path):
            console.warn(left)
    if plan.overwrite:
        stale = first_step == 0 and RunFolder(output).comparison.is_dir()
        if stale and (left := remove_folder(RunFolder(output).comparison)):
            console.warn(left)
        (output / LORA_WEIGHTS_NAME).unlink(missing_ok=True)
        RunFolder(output).averaged_lora.unlink(missing_ok=True)


def publish_weights(output: Path, newest: Path) -> None:
    """Copy the finished run's weights to the top of its folder, where diffusers and ``infer`` look for them."""
    lora = newest / LORA_WEIGHTS_NAME
    if lora.is_file():
        write_atomic(output / LORA_WEIGHTS_NAME, lambda aside: shutil.copyfile(lora, aside))
    average, averaged = newest / AVERAGE_NAME / LORA_WEIGHTS_NAME, RunFolder(output).averaged_lora
    if average.is_file():
        with os_errors_explained(averaged):
            averaged.parent.mkdir(exist_ok=True)
        write_atomic(averaged, lambda aside: shutil.copyfile(average, aside))


def write_report(output: Path, state: State) -> None:
    """Write the run's report; a failure is only a warning."""
    try:
        write_run_report(output, state)
    except Exception as error:  # a report must never stop a run
        console.warn(f"cannot write the run's report: {error}")


def read_plan(path: Path) -> Plan:
    """Read a run's plan, and report if it was edited, which ``command.sh`` allows.

    Raises:
        CogtuneError: as for :meth:`Plan.read`.
    """
    plan = Plan.read(path)
    if not is_sealed(read_json(path)):
        console.note(f"{path} has been modified since `cogtune train` wrote it")
    return plan


def main(arguments: list[str] | None = None) -> int:
    """Run one process; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m cogtune.training.worker", description=__doc__)
    parser.add_argument("plan", type=Path, help="plan.json of a run")
    path: Path = parser.parse_args(arguments).plan
    rank = int(os.environ.get("RANK", "0"))
    files = LaunchFiles(path.parent)

    def job(stop: StopRequest) -> bool:
        plan = read_plan(path) if rank == 0 else Plan.read(path)
        with explain_full_disk(plan):
            if rank != 0:
                return run(plan, files, stop)
            with exclusive_folder(plan.config.output, WORKER_LOCK):
                remove_partials(plan.config.output)  # what a killed run left unfinished
                return run(plan, files, stop)

    return run_worker(files.report(rank), files.log, job)


if __name__ == "__main__":
    raise SystemExit(main())
