"""A failure or kill at every disk call of what writes: old or new is whole under its name."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import shutil
import subprocess
import sys
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest

from tests.support import SUPPORT
from tests.support.disk_trials import TrialsProcess, serve_trials

FAULTS = (errno.ENOSPC, errno.EIO, 0)
"""No room, a broken disk, and kill -9."""


@pytest.fixture(scope="module", autouse=True)
def calls_counted(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The server of the trials has loaded what counts the calls."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler, and a system that preloads libraries")
    made = tmp_path_factory.mktemp("faults") / "disk_faults.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", made, SUPPORT / "disk_faults.c", "-ldl"], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_PRELOAD", str(made))
        patch.setenv("PYTHONDONTWRITEBYTECODE", "1")
        patch.setenv("PYTHONPATH", str(SUPPORT.parents[1]), prepend=os.pathsep)
        TrialsProcess.server.ensure_running()


def trials(what: str, clips: Path, folder: Path, *, share: int | None) -> list[dict[str, Any]]:
    """What came of the work with a fault at each call, or at a sample of so many of them."""
    connection, theirs = Pipe()
    process = TrialsProcess(target=serve_trials, args=(what, folder, clips, theirs))
    process.start()
    theirs.close()

    def outcome(at: int, fault: int) -> dict[str, Any]:
        connection.send((at, fault))
        try:
            return dict(connection.recv())
        except EOFError:
            raise AssertionError(f"the trials ended at call {at} with {fault}") from None

    try:
        first = outcome(0, 0)
        assert (first["error"], first["stands"]) == ("", "new")
        every = [(at, fault) for at in range(1, first["calls"] + 1) for fault in FAULTS]
        chosen = every if share is None else random.Random(15).sample(every, min(share, len(every)))
        return [first, *(outcome(at, fault) for at, fault in chosen)]
    finally:
        with contextlib.suppress(BrokenPipeError):
            connection.send(None)
        process.join()


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


@pytest.mark.timeout(1200)  # two merges a trial, beside whatever else is at work
@pytest.mark.parametrize("what", ["merge", "lora", "stream", "cache", "push", *OF_LORAS])
@pytest.mark.slow
def test_a_fault_at_some_disk_calls(what: str, clips: Path, tmp_path: Path) -> None:
    found = trials(what, clips, tmp_path, share=12)
    assert found[0]["calls"] > 5
    assert_nothing_lost(what, found)


@pytest.mark.exhaustive
@pytest.mark.timeout(0)
@pytest.mark.parametrize("what", [*KINDS, *OF_LORAS])
def test_a_fault_at_every_disk_call(what: str, clips: Path, tmp_path: Path) -> None:
    found = trials(what, clips, tmp_path, share=None)
    assert_nothing_lost(what, found)
    print(f"{what}: {found[0]['calls']} calls, {len(found) - 1} faults")
