"""What Windows lacks is needed by nothing of ours that works there; tried by hiding it, for want of a Windows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LIKE_WINDOWS = """
import builtins, multiprocessing, types

HIDDEN = {"fcntl", "grp", "pwd", "resource", "syslog", "termios", "tty"}
LACKS = {
    "os": {"fork", "killpg", "getpgid", "memfd_create", "sched_getaffinity", "setsid", "statvfs", "uname"},
    "signal": {"SIGALRM", "SIGHUP", "SIGKILL", "SIGQUIT", "alarm", "setitimer", "pthread_sigmask", "ITIMER_REAL"},
}

class Lacking(types.ModuleType):
    def __init__(self, module, lacks):
        super().__init__(module.__name__)
        self.__dict__.update({name: value for name, value in vars(module).items() if name not in lacks})

def importing(name, globals=None, locals=None, fromlist=(), level=0):
    ours = str((globals or {}).get("__package__", "")).startswith("cogtune")
    if ours and name in HIDDEN:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    if ours and name == "msvcrt":
        return types.SimpleNamespace(LK_NBLCK=2, locking=lambda descriptor, mode, count: None)
    module = original(name, globals, locals, fromlist, level)
    return Lacking(module, LACKS[name]) if ours and name in LACKS else module

original, builtins.__import__ = builtins.__import__, importing
multiprocessing.get_all_start_methods = lambda: ["spawn"]
"""


@pytest.fixture
def like_windows(tmp_path: Path) -> Path:
    """A folder of a module that makes every interpreter which finds it hide from cogtune what Windows lacks."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(LIKE_WINDOWS)
    return tmp_path / "site"


def test_every_module_can_be_imported(like_windows: Path) -> None:
    import_all = (
        "import importlib, pkgutil, cogtune\n"
        "for module in pkgutil.walk_packages(cogtune.__path__, 'cogtune.'):\n"
        "    if not module.name.endswith('__main__'):\n"
        "        importlib.import_module(module.name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", LIKE_WINDOWS + import_all], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["dataset", "validate", "{clips}", "--preset", "cpu-lora-tiny", "--full"],
        ["plan", "--preset", "4090-lora-5b"],
        ["train", "--preset", "cpu-lora-tiny", "--data", "{clips}", "--dry-run"],
    ],
)
def test_commands_that_work_there(
    words: list[str], like_windows: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(like_windows), prepend=":")
    done = subprocess.run(
        [sys.executable, "-m", "cogtune", *(word.format(clips=clips) for word in words)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, "error:" in done.stderr) == (0, False), done.stderr
