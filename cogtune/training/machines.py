"""Checks that several machines have the same settings and a shared output folder, before the first step."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from cogtune.config.run_config import tagged
from cogtune.run.plan import Plan
from cogtune.system.errors import CogtuneError
from cogtune.system.files import PARTIAL_SUFFIX, write_text

LOOK_SECONDS = 10.0
"""Seconds to wait for a file that another machine wrote; a network file system may show it late."""


def require_same_settings(plan: Plan) -> None:
    """Check that all machines were started with the same settings. Collective.

    Raises:
        CogtuneError: with every difference, in every process alike.
    """
    if plan.config.num_machines == 1:
        return
    own = tagged("machine")  # what model and data are is compared by their content
    settings = {key: value for key, value in plan.config.to_dict().items() if key not in own}
    settings |= {**plan.resume_fingerprint, "total steps": plan.total_steps}
    told = gather_object([(plan.config.machine_rank, settings)])
    (_, first), *others = sorted(told, key=lambda pair: pair[0])
    problems = {
        f"{key}: {first.get(key)!r} on machine 0, {value!r} on machine {machine}"
        for machine, theirs in others
        for key, value in theirs.items()
        if first.get(key) != value
    }
    if problems:
        raise CogtuneError(
            "the machines were started with different settings",
            "run the same command on each, with its own --machine-rank",
            details=sorted(problems),
        )


def require_shared_output(accelerator: Accelerator, plan: Plan) -> None:
    """Check that all machines share the main process's output folder, if the run needs that. Collective.

    With ZeRO each process writes its part of a checkpoint there, and reads it to resume. A new DDP run writes from the
    main process only, so the other machines may have separate folders.

    Raises:
        CogtuneError: a machine has another folder, or it cannot be written, in every process alike.
    """
    config = plan.config
    if config.num_machines == 1 or not any(gather_object([config.sharding.uses_deepspeed or plan.resume is not None])):
        return
    mark = config.output / f".{os.urandom(16).hex()}{PARTIAL_SUFFIX}"  # which the next run removes, if this is killed
    failure = None
    try:
        if accelerator.is_main_process:
            try:
                write_text(mark, "")
            except CogtuneError as error:
                failure = error
        name, failure = gather_object([(mark.name, failure)])[0]
        if failure is not None:
            raise failure
        missed = gather_object([None if _appears(config.output / name) else config.machine_rank])
    finally:
        if accelerator.is_main_process:
            with contextlib.suppress(OSError):  # it was not written
                mark.unlink()
    apart = sorted({rank for rank in missed if rank is not None})
    if apart:
        numbers = ", ".join(map(str, apart))
        who = f"machine {numbers} does" if len(apart) == 1 else f"machines {numbers} do"
        is_zero = config.sharding.uses_deepspeed
        raise CogtuneError(
            f"{who} not see the output folder of machine 0, which "
            + (f"strategy {config.strategy} requires" if is_zero else "resuming requires"),
            "use the same --output on every machine, on a shared file system"
            + ("; a new run with --strategy ddp does not need one" if is_zero else ""),
        )


def _appears(path: Path) -> bool:
    until = time.monotonic() + LOOK_SECONDS
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True
