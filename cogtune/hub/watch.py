"""Pushing the checkpoints of a running training, so that they survive the loss of its machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from cogtune.hub.checkpoints import BRANCH, public_checkpoint
from cogtune.hub.remote import (
    InterruptedUpload,
    Target,
    access_token,
    check_repo_id,
    hub_address,
    make_repository,
    upload,
)
from cogtune.run.checkpoints import checkpoints, read_state, stamp
from cogtune.run.folder import RunFolder
from cogtune.system import console
from cogtune.system.containment import refuse_links_out
from cogtune.system.errors import CogtuneError, UsageError
from cogtune.system.locks import LOCK, WORKER_LOCK, is_held
from cogtune.system.scratch import scratch_folder

Tell = Callable[[Sequence[tuple[str, int]]], None]

_LOOK_SECONDS = 2.0
"""Seconds between checks whether the run has ended; its last checkpoint is then pushed at once."""
_FIRST_WAIT, _LONGEST_WAIT = 15.0, 300.0
"""Seconds before the first retry, which double each time, and their maximum."""
_ATTEMPTS = 10
"""Attempts to push the last checkpoint of a run that has ended: about half an hour."""


def push_checkpoints(
    run: Path,
    repo_id: str,
    *,
    every: float,
    private: bool = False,
    token: str | None = None,
    message: str = "",
    dry_run: bool = False,
    tell: Tell = lambda _files: None,
    pause: Callable[[float], None] | None = None,
) -> tuple[str, list[int]]:
    """Push the newest checkpoint of a run whenever there is a new one, until the run has ended.

    Each replaces the one before, on the branch :data:`BRANCH`; `cogtune train --resume` finds it there. A failure of
    the network is reported and the push repeated.

    Args:
        every: seconds between checks for a new checkpoint.
        dry_run: list the files of the newest checkpoint, then return.
        tell: called before each upload with the path and size of each file.
        pause: waits for some seconds.

    Returns:
        The address of the branch, and the steps of the checkpoints that were pushed.

    Raises:
        UsageError: ``repo_id`` is not one, or ``run`` is not a run.
        CogtuneError: the Hub rejects the upload, cannot be reached after the run has ended, or there is no checkpoint.
    """
    check_repo_id(repo_id)
    if not run.is_dir() or not (RunFolder(run).is_run or is_running(run)):
        raise UsageError(f"{run} is not a run folder", "pass the --output folder of a training run, after starting it")
    pause = pause or time.sleep
    target = Target(repo_id, hub_address(), BRANCH, private, message, None)
    ready, done, last, failures = dry_run, list[int](), "", 0
    while True:
        running = is_running(run)  # checked first, so that the last checkpoint is not missed
        newest = next(iter(checkpoints(run)[::-1]), None)
        mark = _mark(newest)
        try:
            if not ready:
                make_repository(target, *access_token(token))  # a wrong token is reported before an hour of training
                ready = True
                if newest is None and running:
                    console.note(f"waiting for the first checkpoint of {run}")
            if newest is not None and mark != last:
                done.append(_push(newest, target, token, dry_run, tell))
                last = mark
            failures = 0
        except InterruptedUpload as error:
            failures += 1
            if not running and failures >= _ATTEMPTS:
                raise
            seconds = min(_FIRST_WAIT * 2 ** (failures - 1), _LONGEST_WAIT)
            console.warn(f"{error.message}; trying again in {seconds:g} seconds")
            pause(seconds)
            continue
        except (CogtuneError, OSError):
            if newest is None or _mark(newest) == mark:
                raise
            console.note(f"{newest.name} was replaced by the run before it was pushed")
            continue
        if not running or dry_run:
            break
        _wait(run, every, pause)
    if not done:
        raise CogtuneError(f"{run} has no checkpoint to push", "start the run, then run the same command again")
    return f"{target.endpoint}/{repo_id}/tree/{BRANCH}", done


def is_running(run: Path) -> bool:
    """Return whether a training is using the run's folder."""
    return is_held(run, LOCK) or is_held(run, WORKER_LOCK)


def _wait(run: Path, seconds: float, pause: Callable[[float], None]) -> None:
    """Wait for some seconds, at least one check, or until the run has ended."""
    left = max(seconds, _LOOK_SECONDS)
    while left > 0 and is_running(run):
        pause(min(left, _LOOK_SECONDS))
        left -= _LOOK_SECONDS


def _mark(checkpoint: Path | None) -> str:
    """Return a value that differs for a later checkpoint of the same name; empty if it is gone."""
    if checkpoint is None:
        return ""
    try:
        return f"{checkpoint.name} {stamp(checkpoint)}"
    except OSError:
        return ""


def _push(checkpoint: Path, target: Target, token: str | None, dry_run: bool, tell: Tell) -> int:
    """Push one checkpoint; return its step."""
    run, step = checkpoint.parent, int(read_state(checkpoint)["step"])
    refuse_links_out(run)
    with scratch_folder(".push-", run) as aside:  # on the run's own disk, for hard links
        contents = public_checkpoint(checkpoint, target.repo_id, aside)
        sizes = [len(item) if isinstance(item, bytes) else item.stat().st_size for item in contents.values()]
        tell(tuple(zip(contents, sizes, strict=True)))
        if dry_run:
            return step
        value, origin = access_token(token)
        message = target.message.strip() or f"Checkpoint of step {step}"
        remarks = upload(contents, replace(target, step=step, message=message), value, origin)[2]
    for remark in remarks:
        console.note(remark)
    console.note(f"pushed {checkpoint.name}")
    return step
