"""A failure or kill at every disk call of what writes: old or new is whole under its name."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import SUPPORT

FAULTS = (errno.ENOSPC, errno.EIO, 0)
"""No room, a broken disk, and kill -9."""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What counts the calls."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler, and a system that preloads libraries")
    made = tmp_path_factory.mktemp("faults") / "disk_faults.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", made, SUPPORT / "disk_faults.c", "-ldl"], check=True)
    return made


def trials(what: str, library: Path, clips: Path, folder: Path, *, share: int | None) -> list[dict[str, Any]]:
    """What came of the work with a fault at each call, or at a sample of so many of them."""
    environment = os.environ | {
        "LD_PRELOAD": str(library),
        "DISK_TRIALS_DATA": str(clips),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join((str(SUPPORT.parents[1]), str(SUPPORT))),
    }
    with subprocess.Popen(
        [sys.executable, SUPPORT / "disk_trials.py", what, folder],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        requests, answers = process.stdin, process.stdout
        assert requests is not None
        assert answers is not None

        def outcome(at: int, fault: int) -> dict[str, Any]:
            requests.write(f"{at} {fault}\n")
            requests.flush()
            line = answers.readline()
            assert line, f"the trials ended at call {at} with {fault}"
            return dict(json.loads(line))

        first = outcome(0, 0)
        assert (first["error"], first["stands"]) == ("", "new")
        every = [(at, fault) for at in range(1, first["calls"] + 1) for fault in FAULTS]
        chosen = every if share is None else random.Random(15).sample(every, min(share, len(every)))
        return [first, *(outcome(at, fault) for at, fault in chosen)]


def assert_nothing_lost(what: str, found: list[dict[str, Any]]) -> None:
    assert [one for one in found if one["stands"] == "neither"] == []
    assert [one["error"] for one in found if re.search("unforeseen|unexpected error", one.get("error", ""))] == []
    # who was told of a success has the new, and who was told of a failure still has the old
    assert [one for one in found if one.get("error") == "" and "new" not in one["stands"]] == []
    # (or, of a cache, whose entries come one by one and replace nothing, all entries already)
    with_error = [one for one in found if one.get("error") and not (what == "cache" and one["stands"] == "new")]
    assert [one for one in with_error if "old" not in one["stands"]] == []
    assert [one for one in found if one["killed"] != (one["fault"] == 0 and one["at"] > 0)] == []
    again = [(one["at"], one["fault"], one["again"], one["again_error"], one["left"]) for one in found]
    assert [one for one in again if one[2:] != ("new", "", [])] == []
    assert {one["stands"] for one in found} >= {"old", "new"}


KINDS = ("merge", "lora", "sft", "zero", "stream", "cache", "infer", "report", "push")
OF_LORAS = ("convert", "adapter", "blend", "extract", "fuse")


@pytest.mark.timeout(1200)  # two processes that import torch, and two merges a trial, beside whatever else is at work
@pytest.mark.parametrize("what", ["merge", "lora", "stream", "cache", "push", *OF_LORAS])
@pytest.mark.slow
def test_a_fault_at_some_disk_calls(what: str, library: Path, clips: Path, tmp_path: Path) -> None:
    found = trials(what, library, clips, tmp_path, share=12)
    assert found[0]["calls"] > 5
    assert_nothing_lost(what, found)


@pytest.mark.exhaustive
@pytest.mark.timeout(0)
@pytest.mark.parametrize("what", [*KINDS, *OF_LORAS])
def test_a_fault_at_every_disk_call(what: str, library: Path, clips: Path, tmp_path: Path) -> None:
    found = trials(what, library, clips, tmp_path, share=None)
    assert_nothing_lost(what, found)
    print(f"{what}: {found[0]['calls']} calls, {len(found) - 1} faults")
