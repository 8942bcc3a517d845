"""What lies in the folder that one works in is data: no process of ours imports a module from there."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import packages_distributions
from pathlib import Path

import psutil
import pytest

from cogtune.cli import main
from cogtune.system import safe_path
from cogtune.system.children import PARENT_PID, environment
from cogtune.system.safe_path import STANDARD_LIBRARY, search_path
from tests.conftest import Cogtune
from tests.support.in_process import Ran

PROGRAM = Path(sys.executable).with_name("cogtune")
TINY = ["--preset", "cpu-lora-tiny", "--data", "."]


@pytest.fixture
def hostile(clips: Path, tmp_path: Path) -> Path:
    """A dataset with a module of every name that Python or a library of ours could look for; each leaves a mark."""
    folder = tmp_path / "downloaded"
    shutil.copytree(clips, folder, ignore=shutil.ignore_patterns(".cogtune"))
    names = {name for name in (*sys.stdlib_module_names, *packages_distributions()) if name.isidentifier()}
    for name in names:
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r} + ' ')\n")
    return folder


def run(folder: Path, *words: object, look: Callable[[psutil.Process], None] = lambda _program: None) -> Ran:
    """The installed program in that folder, looked at while it runs; none of the modules there ran."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        running = psutil.Popen([PROGRAM, *map(str, words)], cwd=folder, stdout=out, stderr=err)
        while running.poll() is None:
            time.sleep(0.1)
            with contextlib.suppress(psutil.Error):  # it ended
                look(running)
        out.seek(0), err.seek(0)
        done = Ran(running.returncode, out.read(), err.read())
    ran = folder.parent / "ran"
    assert not ran.exists(), f"{words}: {ran.read_text()} ran"
    assert done.status == 0, done.out + done.err
    return done


def test_the_modules_would_run(hostile: Path) -> None:
    """So that the other tests can fail."""
    unsafe = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}  # set by any main() here
    subprocess.run([sys.executable, "-c", "import json"], cwd=hostile, check=True, env=unsafe)
    assert (hostile.parent / "ran").read_text() == "json "


def test_looking_at_a_dataset_runs_nothing_in_it(hostile: Path) -> None:
    assert "0 errors" in run(hostile, "dataset", "validate", ".", "--preset", "cpu-lora-tiny", "--report", "p.html").out


STARTED = (
    "cogtune.encoding.worker",
    "cogtune.training.launcher",
    "cogtune.training.worker",
    "multiprocessing",
)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_command_runs_what_lies_in_the_working_folder(hostile: Path, tmp_path: Path) -> None:
    """Nor a process that one of them starts: decoders, accelerate's launcher, its workers, what compiles for them.

    Each starts where there is nothing to import, the only thing that helps on Python 3.10, which puts the folder that a
    process starts in first on its path.
    """
    seen = set()

    def look(command: psutil.Process) -> None:
        for process in command.children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it ended
                words = " ".join(process.cmdline())
                parent = process.parent()
                if parent is not None and parent.cmdline() == process.cmdline():
                    continue  # forked by a server that started there; its path is that of the process that asked for it
                kind = next((kind for kind in STARTED if kind in words), words)
                seen.add((kind, process.cwd()))

    cache = ["--cache-dir", tmp_path / "cache"]
    two = ["--num-processes", 2, "--strategy", "zero2", "--workers", 2]
    run(hostile, "train", *TINY, *cache, "--steps", 1, *two, "--output", tmp_path / "zero", look=look)
    assert {kind for kind, _ in seen} >= {*STARTED}
    assert {folder for kind, folder in seen if kind in STARTED} == {os.path.realpath(STANDARD_LIBRARY)}
    assert "nothing to do" in run(hostile, "dataset", "cache", ".", "--preset", "cpu-lora-tiny", *cache).out
    run(hostile, "merge-zero", tmp_path / "zero" / "checkpoint-1", "--output", tmp_path / "merged")
    run(hostile, "infer", "--lora", tmp_path / "merged", "--steps", 1, "--output", tmp_path / "video.mp4")
    run(hostile, "push", tmp_path / "zero", "someone/something", "--dry-run")


@pytest.mark.exhaustive
def test_no_bench_runs_what_lies_in_the_working_folder(hostile: Path) -> None:
    run(hostile, "bench", "--preset", "cpu-lora-tiny", "--steps", 2)  # trains in one process
    run(hostile, "dataset", "bench", "--model", "tiny:2b", "--clips", 2, "--size", "9x64x96")


def test_the_path_of_a_process_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.setattr(sys, "path", ["", ".", str(tmp_path), str(tmp_path / "link"), "lib", "/usr/lib/x"])
    assert search_path() == [str(tmp_path / "lib"), "/usr/lib/x"]
    monkeypatch.setattr(safe_path, "_HOME", str(tmp_path))  # cogtune itself was imported from here
    assert search_path()[0] == str(tmp_path)
    monkeypatch.setattr(safe_path, "_HOME", "/elsewhere")
    monkeypatch.setenv("HF_HOME", "hub")
    monkeypatch.setenv("WANDB_DIR", "~/wandb")
    ours = environment({"HF_HOME": "x", "MORE": "1"})
    assert (ours["HF_HOME"], ours["WANDB_DIR"], ours["MORE"]) == (str(tmp_path / "hub"), "~/wandb", "1")
    assert (ours["PYTHONSAFEPATH"], ours[PARENT_PID]) == ("1", str(os.getpid()))


def test_a_folder_that_was_deleted_is_no_obstacle(tmp_path: Path, cogtune: Cogtune) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f"cd {gone} && rmdir {gone} && exec {PROGRAM} presets"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("words", [["infer", "--model", "tiny:2b"], ["dataset", "validate", "data"], ["train"]])
def test_what_needs_the_folder_says_that_it_was_deleted(
    tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith("error: the working folder is no longer there\n")
