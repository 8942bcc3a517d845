"""What each process of a run does: read the plan, join data, model and training, say how it ended.

Started by ``accelerate launch --module cogtune.training.worker PLAN``. A library's noise goes to stderr, which the
launcher keeps in a log; the run's own words go to stdout.
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
from cogtune.system.json_files import is_sealed, read_json
from cogtune.system.locks import WORKER_LOCK, exclusive_folder
from cogtune.system.out_of_memory import cannot_pin, is_out_of_memory, out_of_memory, room_of
from cogtune.system.processes import StopRequest, run_worker


def run(plan: Plan, files: LaunchFiles, stop: StopRequest) -> bool:
    """Train as planned; True when the last step, and what is due there, was done.

    Raises:
        CogtuneError: anything the user can act on.
    """
    from cogtune.training.loop import train
    from cogtune.training.samples import remove_later_samples
    from cogtune.training.setup import set_up

    with explain_out_of_memory(plan):
        training = set_up(plan, lambda: bool(stop))
    accelerator = training.train_state.accelerator
    if accelerator.is_main_process:
        _delete_later_checkpoints(plan, training.first_step)
        remove_later_samples(plan.config.output, training.first_step)
        write_text(RunFolder(plan.config.output).run_yaml, files.run_yaml.read_text(encoding="utf-8"))
        record_machine(files.folder)
        after_each = partial(write_report, plan.config.output, "under way")
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
    """Tell an error of exhausted GPU memory as what would fit, and one of pinned memory with what does without.

    Raises:
        CogtuneError: in place of PyTorch's error, and of those of cuBLAS and CUDA.
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
        kept = [f"{path.name} is whole: with that changed, --resume latest goes on from it" for path in newest]
        if config.sharding.offloads and cannot_pin(error):
            message = "the system does not give the pinned host memory that offload asked for"
            message = f"{message}: {str(error).splitlines()[0]}"
            raise CogtuneError(message, _without_pinning(config), details=kept) from error
        room = room_of(error)
        hint = suggest_fit(config, plan.spec, local_hardware(), free=room.free if room else None)
        raise out_of_memory(error, hint, details=tuple(kept)) from error


def _without_pinning(config: RunConfig) -> str:
    if not config.sharding.shards_weights:
        return "--no-pin-memory does without, and takes longer a step"
    if config.pin_memory:
        return "--no-pin-memory pins the weights alone, and takes longer a step"
    return "zero3-offload pins the weights in any case; zero2-offload with --no-pin-memory pins nothing"


@contextlib.contextmanager
def explain_full_disk(plan: Plan) -> Iterator[None]:
    """Tell a full disk with the command that goes on once there is room.

    Raises:
        CogtuneError: in place of a :class:`DiskFull` and of a library's own error.
    """
    try:
        try:
            yield
        except OSError as error:
            with os_errors_explained(Path(error.filename or plan.config.output)):
                raise
    except DiskFull as error:
        newest = checkpoints_of(plan)[-1:]
        kept = [f"{path.name} is whole" for path in newest]
        go_on = how_to_go_on(plan) if newest else AGAIN
        raise CogtuneError(error.message, error.hint.removesuffix(AGAIN) + go_on, details=kept) from error


def _delete_later_checkpoints(plan: Plan, first_step: int) -> None:
    """Delete the checkpoints behind the step that this run starts from, now that it is sure to start.

    Raises:
        CogtuneError: there are some, and the plan does not allow it.
    """
    output = plan.config.output
    later = checkpoints_after(output, first_step)
    if later and not plan.overwrite:
        raise CogtuneError(
            f"{output} holds {', '.join(path.name for path in later)}, which this run would make anew",
            "use --overwrite to delete them, or choose another --output",
        )
    for path in later:
        if left := remove_folder(path):
            console.warn(left)
    if plan.overwrite:
        (output / LORA_WEIGHTS_NAME).unlink(missing_ok=True)
        RunFolder(output).averaged_lora.unlink(missing_ok=True)


def publish_weights(output: Path, newest: Path) -> None:
    """Put the finished run's weights at the top of its folder, where diffusers and ``infer`` look for them."""
    lora = newest / LORA_WEIGHTS_NAME
    if lora.is_file():
        write_atomic(output / LORA_WEIGHTS_NAME, lambda aside: shutil.copyfile(lora, aside))
    average, averaged = newest / AVERAGE_NAME / LORA_WEIGHTS_NAME, RunFolder(output).averaged_lora
    if average.is_file():
        with os_errors_explained(averaged):
            averaged.parent.mkdir(exist_ok=True)
        write_atomic(averaged, lambda aside: shutil.copyfile(average, aside))


def write_report(output: Path, state: State) -> None:
    """Write the run's page; what stands in the way is told, and stops nothing."""
    try:
        write_run_report(output, state)
    except Exception as error:  # a page is never worth a run
        console.warn(f"the run's report could not be written: {error}")


def main(arguments: list[str] | None = None) -> int:
    """Run one process; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m cogtune.training.worker", description=__doc__)
    parser.add_argument("plan", type=Path, help="plan.json of a run")
    path: Path = parser.parse_args(arguments).plan
    rank = int(os.environ.get("RANK", "0"))
    files = LaunchFiles(path.parent)

    def job(stop: StopRequest) -> bool:
        plan = Plan.read(path)
        if rank == 0 and not is_sealed(read_json(path)):  # as command.sh invites to
            console.note(f"{path} was changed since `cogtune train` wrote it")
        with explain_full_disk(plan):
            if rank != 0:
                return run(plan, files, stop)
            with exclusive_folder(plan.config.output, WORKER_LOCK):
                remove_partials(plan.config.output)  # what a killed run left unfinished
                return run(plan, files, stop)

    return run_worker(files.report(rank), files.log, job)


if __name__ == "__main__":
    raise SystemExit(main())
