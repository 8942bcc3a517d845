"""A disk that is really full: a run that meets one says so, loses nothing, and goes on to the bit given room."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cogtune.encoding import jobs
from cogtune.run.checkpoints import checkpoints
from cogtune.run.launch import LaunchFiles
from cogtune.run.plan import Plan
from cogtune.system.errors import CogtuneError
from tests.conftest import Cogtune
from tests.support.checkpoint_contents import assert_whole, differing, held
from tests.support.forked_workers import kill_workers, run_workers, start_workers
from tests.support.runs_in_process import fill_here, plan_for, read_lines
from tests.support.sampling import sampled

FLAGS: dict[str, Any] = {"num_processes": 2, "checkpoint_every": 1, "keep_checkpoints": 9, "eval_every": 2}
PLENTY = 1 << 30


@dataclass(frozen=True)
class Disk:
    """A small file system of its own."""

    root: Path

    def leave(self, free: int) -> None:
        """Let it have room for that many bytes more than it holds."""
        for _ in range(50):
            state = os.statvfs(self.root)
            size = (state.f_blocks - state.f_bfree) * state.f_frsize + free
            done = subprocess.run(["mount", "-o", f"remount,size={size}", self.root], capture_output=True, check=False)
            if done.returncode == 0:
                return
        done.check_returncode()  # refused when somebody wrote in between, but not each time


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """It has plenty of room at first."""
    root = tmp_path / "disk"
    root.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", root], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"a file system can be mounted by root, or under `unshare -rm`, alone: {done.stderr.strip()}")
    try:
        yield Disk(root)
    finally:
        subprocess.run(["umount", "--lazy", root], check=True)


def taken(folder: Path) -> int:
    """The bytes that a folder takes on a disk."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*"))


def ends(plan: Plan, disk: Disk, free: int) -> list[dict[str, Any]]:
    """Run the plan to its failure on a disk with so much room; what each process reports of it."""
    started = start_workers(plan)
    disk.leave(free)
    for process in started:
        process.join(600)
        if process.is_alive():
            kill_workers(started, plan.config.output, when=lambda: True, seconds=0)
    assert [process.exitcode for process in started] == [1, 1]
    said = [LaunchFiles(plan.config.output / "launch").report(rank).read() for rank in range(2)]
    assert [report and report["status"] for report in said] == ["failed", "failed"]
    return [report for report in said if report]


def assert_kept(output: Path, *steps: int) -> None:
    """The run has the checkpoints of those steps, whole, and nothing that is half-written."""
    assert [path.name for path in checkpoints(output)] == [f"checkpoint-{step}" for step in steps]
    assert list(output.glob(".*.partial")) == []
    assert_whole(output)


@pytest.mark.parametrize(
    ("kind", "strategy"),
    sampled(
        [("lora", "ddp"), ("sft", "ddp"), ("lora", "zero2"), ("sft", "zero2"), ("sft", "stream")],
        ("lora", "ddp"),
        ("sft", "zero2"),
        ("sft", "stream"),
    ),
)
def test_wherever_the_disk_fills_up_nothing_is_lost(
    kind: str, strategy: str, clips: Path, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the processes print goes to that disk, too."""
    monkeypatch.setattr(jobs, "fill_cache", fill_here)
    flags = {**FLAGS, "type": kind, "strategy": strategy}
    output = disk.root / "out"
    run_workers(plan_for(clips, output, steps=1, **flags))
    size, go_on = taken(output / "checkpoint-1"), f"cogtune train --resume latest --output {output}"

    def end_with(free: int) -> list[dict[str, Any]]:
        disk.leave(PLENTY)
        plan = plan_for(clips, output, steps=4, resume="latest", **flags)
        return ends(plan, disk, free)

    disk.leave(0)
    with pytest.raises(CogtuneError, match="No space left on device") as caught:
        plan_for(clips, output, steps=4, resume="latest", **flags)
    assert caught.value.message.startswith(f"cannot write {output}/launch/")
    assert caught.value.hint == "free some space on that disk, then run the same command again"

    # Not even for what the run measures, or what a process has to say.
    for free in (0, 12288) if kind == "lora" else ():
        cause = next(report for report in end_with(free) if report["foreseen"])
        assert cause["message"].startswith(f"cannot write {output}")
        assert cause["hint"] == f"free some space on that disk, then continue with: {go_on}"
        assert_kept(output, 1)

    reached = 1
    for share in (0.25, 0.5, 0.8, 1.5) if kind == "lora" else (0.5, 1.5):
        said = end_with(40960 + int(share * size))
        reached += int(share)
        for report in said:
            told = report["message"].removeprefix("cannot write ").removesuffix(": No space left on device")
            assert Path(told).relative_to(output).parts[0].strip(".").split(".")[0] == f"checkpoint-{reached + 1}"
            assert report["hint"] == f"free some space on that disk, then continue with: {go_on}"
            assert report["details"] == [f"checkpoint-{reached} is complete"]
        assert_kept(output, *range(1, reached + 1))

    disk.leave(PLENTY)
    run_workers(plan_for(clips, output, steps=4, resume="latest", **flags))
    run_workers(plan_for(clips, tmp_path / "straight", steps=4, **{**flags, "checkpoint_every": 4}))
    assert differing(held(output / "checkpoint-4"), held(tmp_path / "straight" / "checkpoint-4")) == []
    resumed, straight = (
        [line for line in read_lines(folder) if "loss" in line] for folder in (output, tmp_path / "straight")
    )
    assert resumed == straight


@pytest.mark.slow
def test_the_program_tells_of_a_full_disk_and_what_to_do(
    clips: Path, tmp_path: Path, disk: Disk, cogtune: Cogtune, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "fill_cache", fill_here)
    output, flags = disk.root / "out", {**FLAGS, "strategy": "zero2"}
    run_workers(plan_for(clips, output, steps=1, **flags))
    disk.leave(131072 + taken(output / "checkpoint-1") // 2)
    go_on = ("train", "--resume", "latest", "--output", str(output))
    done = cogtune(*go_on, "--steps", 2, status=1)
    said = done.err[done.err.index("error: ") :].splitlines()
    assert said[0].startswith(f"error: cannot write {output}/")
    assert "checkpoint-2" in said[0]
    assert said[0].endswith(": No space left on device")
    assert said[1:] == [
        "  - checkpoint-1 is complete",
        f"hint: free some space on that disk, then continue with: cogtune {' '.join(go_on)}",
    ]
    assert_kept(output, 1)
