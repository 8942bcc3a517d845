"""Runs one piece of work again and again in processes forked from this one, each with another disk call that fails.

Started by ``test_disk_calls.py`` with ``disk_faults.so`` in LD_PRELOAD: ``disk_trials.py WHAT FOLDER`` reads lines
``N ERRNO`` (0: kill) from stdin and writes what came of each as a line of JSON. A first line ``0 0`` counts the calls.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cogtune.encoding import jobs
from cogtune.merge import merge_checkpoint
from cogtune.run.checkpoints import changed_files, checkpoints, read_state
from cogtune.system import console
from cogtune.system.digests import fingerprint_file
from cogtune.system.errors import CogtuneError
from cogtune.system.folders import remove_partials
from cogtune.training import checkpoint
from tests.merge.test_merge import random_model, random_weights, write_zero
from tests.support.runs_in_process import fill_here, plan_for, set_up_here, train_here

FAULTS: Any = ctypes.CDLL(None)


def tree(folder: Path) -> dict[str, str] | None:
    """The files of a folder by their content."""
    if not folder.is_dir():
        return None
    return {str(path.relative_to(folder)): fingerprint_file(path) for path in folder.rglob("*") if path.is_file()}


Work = tuple[Callable[[Path], None], Callable[[Path], None], Callable[[Path], str]]
"""What prepares a trial's folder, what is done in it, and what tells how it stands afterwards."""


def merging(root: Path) -> Work:
    """A merge over an earlier one of another checkpoint."""
    random_model(seed=1).save_pretrained(root / "base")
    old, new = (write_zero(root / name, random_weights(seed)) for seed, name in enumerate(("old", "new")))
    for source in (old, new):
        merge_checkpoint(source, root / f"{source.name}-merged", base=root / "base", max_shard_size="50KB")
    known = {name: tree(root / f"{name}-merged") for name in ("old", "new")}
    assert known["old"] != known["new"]

    def prepare(trial: Path) -> None:
        shutil.copytree(root / "old-merged", trial / "out")

    def work(trial: Path) -> None:
        merge_checkpoint(root / "new", trial / "out", base=root / "base", max_shard_size="50KB", warn=console.warn)

    def stands(trial: Path) -> str:
        found = tree(trial / "out")
        return next((name for name, content in known.items() if content == found), "neither")

    return prepare, work, stands


def saving(kind: str) -> Callable[[Path], Work]:
    """The second checkpoint of a run that keeps one."""

    def make(root: Path) -> Work:
        jobs.fill_cache = fill_here
        data, first = Path(os.environ["DISK_TRIALS_DATA"]), root / "first"
        flags: dict[str, Any] = {"type": kind, "keep_checkpoints": 1, "eval_every": 0}
        train_here(plan_for(data, first, steps=1, **flags))
        plan = plan_for(data, root / "second", steps=2, resume=str(first / "checkpoint-1"), **flags)
        training = set_up_here(plan)

        def prepare(trial: Path) -> None:
            shutil.copytree(first / "checkpoint-1", trial / "checkpoint-1")

        def work(trial: Path) -> None:
            config = plan.config.model_copy(update={"output": trial})
            checkpoint.save(training.train_state, config, 2, {**training.facts, "step": 2})

        def stands(trial: Path) -> str:
            whole = []
            for path in checkpoints(trial):
                if changed_files(path, read_state(path)) or not torch.load(path / "optimizer.pt", weights_only=True):
                    return "neither"
                whole.append(path.name)
            return " and ".join({"checkpoint-1": "old", "checkpoint-2": "new"}[name] for name in whole) or "neither"

        return prepare, work, stands

    return make


KINDS = {"merge": merging, "lora": saving("lora"), "sft": saving("sft")}


def main() -> None:
    """One trial for each line."""
    what, root = sys.argv[1], Path(sys.argv[2])
    prepare, work, stands = KINDS[what](root)
    for number, line in enumerate(sys.stdin):
        at, fault = map(int, line.split())
        trial = root / f"trial-{number}"
        trial.mkdir()
        prepare(trial)
        said = root / "said"
        said.write_text("")
        child = os.fork()
        if child == 0:
            os.environ["DISK_FAULTS_ROOT"] = str(trial)
            ended: dict[str, Any] = {"error": ""}
            FAULTS.disk_faults_arm(ctypes.c_long(at), fault)
            try:
                work(trial)
            except CogtuneError as error:
                ended["error"] = error.message
            except BaseException:
                ended["error"] = f"unforeseen: {traceback.format_exc()}"
            ended["calls"] = FAULTS.disk_faults_count()
            said.write_text(json.dumps(ended))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        outcome = {"at": at, "fault": fault, "killed": os.WIFSIGNALED(status), "stands": stands(trial)}
        outcome |= json.loads(said.read_text() or "{}")
        # Whatever was left, the next one goes through, and cleans up.
        if what != "merge":
            remove_partials(trial)  # as a run does when it starts
        work(trial)
        outcome |= {"again": stands(trial), "left": [path.name for path in trial.glob(".*")]}
        print(json.dumps(outcome), flush=True)
        shutil.rmtree(trial)


if __name__ == "__main__":
    main()
