"""What each process of a run does: read the plan, join data, model and training, say how it ended.

Started by ``accelerate launch --module cogtune.worker PLAN``. A library's noise goes to stderr, which the launcher
keeps in a log; the run's own words go to stdout.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from cogtune.checkpoints import checkpoints
from cogtune.files import remove_partials, write_atomic
from cogtune.launch import LaunchFiles
from cogtune.models import LORA_WEIGHTS_NAME
from cogtune.plan import Plan
from cogtune.process import StopRequest, alone_in, work


def run(plan: Plan, stop: StopRequest) -> bool:
    """Train as planned; True when the last step was reached.

    Raises:
        CogtuneError: anything the user can act on.
    """
    from cogtune.training.loop import train
    from cogtune.training.setup import set_up

    training = set_up(plan, lambda: bool(stop))
    accelerator = training.trainee.accelerator
    finished = train(training) >= plan.total_steps
    if finished and accelerator.is_main_process:
        publish_weights(plan.config.output, checkpoints(plan.config.output)[-1])
    accelerator.wait_for_everyone()
    return finished


def publish_weights(output: Path, newest: Path) -> None:
    """Put the finished run's weights at the top of its folder, where diffusers and ``infer`` look for them."""
    lora = newest / LORA_WEIGHTS_NAME
    if lora.is_file():
        write_atomic(output / LORA_WEIGHTS_NAME, lambda aside: shutil.copyfile(lora, aside))


def main(arguments: list[str] | None = None) -> int:
    """Run one process; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m cogtune.worker", description=__doc__)
    parser.add_argument("plan", type=Path, help="plan.json of a run")
    path: Path = parser.parse_args(arguments).plan
    rank = int(os.environ.get("RANK", "0"))
    files = LaunchFiles(path.parent)

    def job(stop: StopRequest) -> bool:
        plan = Plan.read(path)
        if rank != 0:
            return run(plan, stop)
        with alone_in(plan.config.output):
            remove_partials(plan.config.output)  # what a killed run left unfinished
            return run(plan, stop)

    return work(files.report(rank), files.log, job)


if __name__ == "__main__":
    raise SystemExit(main())
