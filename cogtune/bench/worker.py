"""What each process of a bench does: the steps of a real run, with nothing saved, and its memory written down."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from cogtune.run.folder import RunFolder
from cogtune.run.launch import LaunchFiles
from cogtune.run.plan import Plan
from cogtune.system.json_files import write_json
from cogtune.system.processes import StopRequest, run_worker
from cogtune.training.worker import explain_out_of_memory


def memory_file(files: LaunchFiles, rank: int) -> Path:
    """Return where process ``rank`` writes what it took."""
    return files.folder / f"bench-{rank}.json"


def run(
    plan: Plan,
    files: LaunchFiles,
    rank: int,
    stop: StopRequest,
    *,
    plain: bool,
    alone: bool,
    trace: Path | None = None,
) -> bool:
    """Train as planned and write down the time of each step and this process's peak memory; False when stopped.

    Args:
        trace: of the step before the last, written by the first process.

    Raises:
        CogtuneError: as for :func:`cogtune.training.worker.explain_out_of_memory`.
    """
    import torch

    if alone:
        _without_the_others(plan.config.num_processes)

    from cogtune.bench.profile import traced
    from cogtune.training.loop import train
    from cogtune.training.setup import set_up

    # What would fit is not the guides' recipe, nor one of several processes.
    explained = contextlib.nullcontext() if plain or alone else explain_out_of_memory(plan)
    with explained, traced(trace if rank == 0 else None, plan.total_steps) as after_step:

        def stopped() -> bool:
            after_step()
            return bool(stop)

        training = set_up(plan, stopped, base_dtype=torch.float32 if plain else None)
        ready, at_start = time.time(), _peaks()
        finished = train(replace(training, saves=False))
    write_json(
        memory_file(files, rank),
        {
            "ready": ready,
            "seconds": _seconds(RunFolder(plan.config.output).metrics) if rank == 0 else [],
            "reserved_at_start": at_start[0],
            "reserved": _peaks()[0],
            "allocated": _peaks()[1],
            "retries": torch.cuda.memory_stats()["num_alloc_retries"] if torch.cuda.is_available() else 0,
            "arrangement": training.arrangement.to_dict() if training.arrangement is not None else None,
        },
    )
    return finished


def _without_the_others(processes: int) -> None:
    """Make this process the first of ``processes`` that do not exist: what it sends goes nowhere.

    DeepSpeed takes up the group that it finds, and gives this process its share of what it parts.
    """
    import torch

    os.environ["WORLD_SIZE"] = str(processes)
    torch.distributed.init_process_group("fake", rank=0, world_size=processes)


def _seconds(metrics: Path) -> list[float]:
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [line["seconds"] for line in lines if "seconds" in line]


def _peaks() -> tuple[int, int]:
    """Return bytes that PyTorch reserved and that it handed out, each at its peak; of the process, without a GPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()
    import resource

    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return resident, resident


def main(arguments: list[str] | None = None) -> int:
    """Run one process; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m cogtune.bench.worker", description=__doc__)
    parser.add_argument("plan", type=Path, help="plan.json of a bench")
    parser.add_argument("--plain", action="store_true", help="load the base in fp32, as the guides' trainer does")
    parser.add_argument("--alone", action="store_true", help="be one of the plan's processes, without the others")
    parser.add_argument("--trace", type=Path, help="file for a trace of the step before the last")
    given: Any = parser.parse_args(arguments)
    files, rank = LaunchFiles(given.plan.parent), int(os.environ.get("RANK", "0"))
    return run_worker(
        files.report(rank),
        files.log,
        lambda stop: run(
            Plan.read(given.plan), files, rank, stop, plain=given.plain, alone=given.alone, trace=given.trace
        ),
    )


if __name__ == "__main__":
    raise SystemExit(main())
