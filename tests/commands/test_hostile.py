"""Whatever someone offers who means harm: nothing outside of its own folder is read, written, deleted, sent or run."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import close_session, constants

from cogtune.cli import main
from cogtune.data.synthetic import draw_dataset
from cogtune.encoding import jobs
from cogtune.models.locate import locate
from cogtune.run import launch
from tests.support.hostile import HostileTree, own_folders
from tests.support.hub_server import Hub, serve
from tests.support.runs_in_process import fill_here, plan_for, start_here, train_here

TOKEN = "hf_AnnasOwnTokenForWriting1234"

SECONDS = 30

_seen: dict[str, list[str]] | None = None
"""Paths that were touched and programs that were started while it is one; an audit hook cannot be taken away again."""

_TOUCHES = ("open", "os.listdir", "os.scandir", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate",
            "os.chmod", "os.link", "os.symlink", "os.utime")  # fmt: skip


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is None:
        return
    if event in _TOUCHES:
        named = (os.fsdecode(item) for item in arguments[:2] if isinstance(item, str | bytes))
        _seen["paths"] += map(os.path.realpath, named)
    elif event in ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system"):
        _seen["programs"].append(os.path.realpath(os.fsdecode(arguments[0])))


sys.addaudithook(_watch)


class Private:
    """Somebody's own files, which nobody has any business with."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir()
        for name in ("id_rsa", "config.json", "state.json", "run.yaml", "a.mp4", "a.txt", "a.arrow", "files.json"):
            (root / name).write_text(f'{{"secret": "of anna, in {name}"}}')
        for name in (".x.partial", ".lock"):
            (root / name).write_text("of anna")
        (root / "step-000002").mkdir()
        (root / "step-000002" / "a.mp4").write_bytes(b"a private video of anna")
        self.files = [path for path in sorted(root.rglob("*")) if path.is_file()]
        self.before = self._state()
        self.unread()

    def _state(self) -> dict[Path, tuple[bytes, int]]:
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in self.files}

    def unread(self) -> None:
        """Let the system write down when one is read, by whichever process, if this file system does that."""
        for path in self.files:
            os.utime(path, ns=(0, path.stat().st_mtime_ns))

    def read(self) -> list[str]:
        """The names of those that were read."""
        return [path.name for path in self.files if path.stat().st_atime_ns]

    def changed(self) -> list[str]:
        """The names of those that are not as they were, or are new."""
        now = self._state()
        self.unread()
        new = [path.name for path in self.root.rglob("*") if path.is_file() and path not in self.before]
        return new + [path.name for path, state in self.before.items() if now[path] != state]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with its cache, a model, and a run of two steps on them, as the program makes them."""
    root = tmp_path_factory.mktemp("good")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(jobs, "fill_cache", fill_here)
        shutil.copytree(locate("tiny:2b"), root / "model")
        draw_dataset(root / "data", clips=2)
        settings: dict[str, Any] = {"model": str(root / "model"), "size": "9x64x96", "steps": 2, "checkpoint_every": 2}
        shown: dict[str, Any] = {"validation_prompts": "A disc.", "sample_every": 2, "sample_steps": 1, "eval_every": 0}
        train_here(plan_for(root / "data", root / "out", **settings, **shown))
    return root


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty home, which is the working folder too; runs and encoders work in this process."""
    home = tmp_path / "home"
    home.mkdir()
    for name, value in (("HOME", home), ("HF_HOME", home / "hub"), ("HF_TOKEN", TOKEN), ("TMPDIR", home)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(jobs, "fill_cache", fill_here)
    monkeypatch.setattr(launch, "start", start_here)
    monkeypatch.chdir(home)
    before = signal.getsignal(signal.SIGTERM)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield home
    signal.signal(signal.SIGTERM, before)


def run(*words: object) -> tuple[int, str, dict[str, list[str]]]:
    """A command's status, what it said, and what it touched and started."""
    global _seen
    said = io.StringIO()
    _seen = {"paths": [], "programs": []}
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        return int(ended.value.code or 0), said.getvalue(), _seen
    finally:
        _seen = None


def stamps(root: Path) -> dict[Path, tuple[int, int]]:
    """How all that is in a folder stands."""
    found = {}
    for path in root.rglob("*"):
        stat = path.lstat()
        found[path] = (stat.st_mtime_ns, stat.st_size)
    return found


REFUSED_NOWHERE = {
    *("data-good", "model-good", "run-good", "data-code", "model-stray", "data-deep", "run-list", "lora-elsewhere"),
}
"""What is fine, or has something that is simply not looked at, or made again."""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_nothing_outside_is_touched(good: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private, ran = Private(tmp_path / "private"), tmp_path / "ran"
    tree = HostileTree(tmp_path / "hostile", good, private.root, ran)
    hub = Hub(users={TOKEN: "anna"})
    for name, value in (("HF_HUB_DISABLE_XET", True), ("HF_HUB_OFFLINE", False)):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)  # the client waits between attempts
    faults, noticed, names = [], set(), set()
    before = stamps(tree.root)
    with serve(hub) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        for name, given, words in tree.commands(home):
            began = time.process_time()
            status, said, seen = run(*words)
            after = stamps(tree.root)
            own = own_folders(given, name, home)
            written = [path for path in before.keys() | after.keys() if before.get(path) != after.get(path)]
            astray = [path for path in written if not any(path == one or one in path.parents for one in own)]
            programs = {*seen["programs"]} - {os.path.realpath(sys.executable)}
            inside = {path for path in seen["paths"] if f"{path}{os.sep}".startswith(f"{private.root}{os.sep}")}
            names.add(name)
            if status != 0:
                noticed.add(given.name)
            found = {
                "unforeseen": "unexpected error" in said or "Traceback" in said,
                "shown": "of anna" in said,
                "opened": inside,
                "read": private.read(),
                "changed": private.changed(),
                "ran": ran.exists(),
                "programs": programs,
                "written": [path for path in astray if path not in {one.parent for one in own}],
                "slow": time.process_time() - began > SECONDS,
                "refused": status != 0 and given.name.endswith("-good") and name not in ("merge",),
            }
            faults += [(name, given.name, what, value, said[-600:]) for what, value in found.items() if value]
            before = after
        close_session()
    assert not faults, "\n".join(map(str, faults))
    kinds = ("data", "model", "run", "zero", "lora")
    assert {path.name for kind in kinds for path in tree.named(kind)} - noticed <= REFUSED_NOWHERE
    assert len(names) == 12
    sent = [*hub.blobs.values(), *(data for one in hub.repositories.values() for data in one.files().values())]
    assert sent
    assert not any(b"of anna" in data or b"a note of anna's" in data for data in sent)
    kept = [path for path in home.rglob("*") if path.is_file()]
    assert not any(b"of anna" in path.read_bytes() for path in kept)
    assert {path.name for path in tmp_path.iterdir()} == {"hostile", "home", "private"}
