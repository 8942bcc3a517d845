"""Temporary folders go with their block; what a killed process left is deleted by the next, and nothing else is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cogtune.system import scratch
from cogtune.system.locks import exclusive_folder
from cogtune.system.scratch import scratch_folder

KILLED = """
import os, signal, sys
from pathlib import Path
from cogtune.system.scratch import scratch_folder
with scratch_folder("cogtune-push-", Path(sys.argv[1])) as own:
    (own / "0.safetensors").write_text("weights")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_folder_goes_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path], check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert (left / "0.safetensors").read_text() == "weights"
    with scratch_folder("cogtune-push-", tmp_path) as own:
        assert {path.name for path in tmp_path.iterdir()} == {left.name, own.name}  # it may only be about to be locked
    monkeypatch.setattr(scratch, "SETTLED", -1.0)
    with scratch_folder("cogtune-push-", tmp_path) as own:
        assert list(tmp_path.iterdir()) == [own]
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_a_killed_process_folder_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "SETTLED", -1.0)
    place, elsewhere = tmp_path / "place", tmp_path / "elsewhere"
    for folder in (place / "cogtune-push-busy", place / "cogtune-bench-x", elsewhere):
        folder.mkdir(parents=True)
        (folder / ".lock").touch()
        (folder / "own.txt").touch()
    (place / "cogtune-push-link").symlink_to(elsewhere)
    (place / "cogtune-push-file").touch()
    (place / "cogtune-push-full").mkdir()
    (place / "cogtune-push-full" / "own.txt").touch()  # not locked yet
    (place / "cogtune-push-old").mkdir()
    (place / "cogtune-push-old" / "0.safetensors").touch()  # its lock was deleted, and it could not be
    os.utime(place / "cogtune-push-old", (0, 0))
    with exclusive_folder(place / "cogtune-push-busy"), scratch_folder("cogtune-push-", place):
        pass
    assert {path.name for path in place.iterdir()} == {
        *("cogtune-push-busy", "cogtune-bench-x", "cogtune-push-link", "cogtune-push-file", "cogtune-push-full"),
    }
    assert (elsewhere / "own.txt").exists()
    assert (place / "cogtune-push-busy" / "own.txt").exists()


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="Windows has no owners of this kind")
def test_another_users_folder_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "SETTLED", -1.0)
    (tmp_path / "cogtune-push-other").mkdir()
    (tmp_path / "cogtune-push-other" / ".lock").touch()
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with scratch_folder("cogtune-push-", tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["cogtune-push-other"]
