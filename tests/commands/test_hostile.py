"""A dataset, a model and a run of someone who means harm: nothing outside of their folders is touched, sent or run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from cogtune.cli import main
from cogtune.data.synthetic import draw_dataset
from cogtune.encoding import jobs
from cogtune.models.locate import locate
from tests.support.hub_server import Hub, serve
from tests.support.runs_in_process import fill_here, plan_for, train_here

TOKEN = "hf_AnnasOwnTokenForWriting1234"

_opened: list[str] | None = None
"""Paths that were opened while it is a list; an audit hook cannot be taken away again."""


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event in ("open", "os.listdir", "os.scandir", "os.remove", "os.rename", "os.rmdir"):
        _opened.extend(os.path.realpath(os.fsdecode(item)) for item in arguments[:2] if isinstance(item, str | bytes))


sys.addaudithook(_watch)


class Payload:
    """Runs when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


class World:
    """Someone's own files in ``private``, and in ``hostile`` what was downloaded."""

    def __init__(self, root: Path) -> None:
        self.root, self.private, self.ran = root, root / "private", root / "ran"
        self.private.mkdir()
        for name in ("id_rsa", "config.json", "state.json", "run.yaml", "a.mp4", "a.txt", ".x.partial", ".lock"):
            (self.private / name).write_text(f'{{"secret": "of anna, in {name}"}}')
        (self.private / "step-000002").mkdir()
        (self.private / "step-000002" / "a.mp4").write_bytes(b"a private video")

    def state(self) -> dict[str, tuple[bytes, int]]:
        """What the private files hold, and when they were written."""
        return {
            str(path.relative_to(self.private)): (path.read_bytes(), path.stat().st_mtime_ns)
            for path in sorted(self.private.rglob("*"))
            if path.is_file()
        }


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with its cache, a model, and a run of two steps on them, as the program makes them."""
    root = tmp_path_factory.mktemp("good")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(jobs, "fill_cache", fill_here)
        shutil.copytree(locate("tiny:2b"), root / "model")
        draw_dataset(root / "data", clips=2)
        settings = {"model": str(root / "model"), "size": "9x64x96", "steps": 2, "checkpoint_every": 2}
        shown = {"validation_prompts": "A disc.", "sample_every": 2, "sample_steps": 1, "eval_every": 0}
        train_here(plan_for(root / "data", root / "out", **settings, **shown))
    return root


@pytest.fixture
def world(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Copies of the good ones to be made hostile, and a home of their own."""
    shutil.copytree(good, tmp_path / "hostile", symlinks=True)
    path = tmp_path / "hostile" / "out" / "run.yaml"
    path.write_text(path.read_text().replace(str(good), str(tmp_path / "hostile")))
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(jobs, "fill_cache", fill_here)
    monkeypatch.chdir(tmp_path / "home")
    before = signal.getsignal(signal.SIGTERM)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield World(tmp_path)
    signal.signal(signal.SIGTERM, before)


def run(*words: object) -> tuple[int, str, list[str]]:
    """A command's status, what it said, and the paths that it touched."""
    global _opened
    said = io.StringIO()
    _opened = []
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        return int(ended.value.code or 0), said.getvalue(), _opened
    finally:
        _opened = None


def make_hostile(world: World, part: str) -> None:
    """Plant one kind of malice in the downloaded folders."""
    hostile, private = world.root / "hostile", world.private
    data, model, out = hostile / "data", hostile / "model", hostile / "out"

    def linked(path: Path, target: Path) -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)

    def changed(path: Path, **values: Any) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    if part == "cache":
        for name in ("latents", "text", "job", "logs"):
            linked(data / ".cogtune" / name, private)
        linked(data / ".cogtune" / ".lock", private / ".lock")
    elif part == "whole cache":
        linked(data / ".cogtune", private)
    elif part == "run's folders":
        for name in ("launch", "logs", "checkpoint-2"):
            linked(out / name, private)
        linked(out / ".lock", private / ".lock")
        linked(out / "metrics.jsonl", private / "id_rsa")
    elif part == "run's samples":
        linked(out / "samples", private)
    elif part == "run.yaml":
        linked(out / "run.yaml", private / "run.yaml")
    elif part == "YAML that runs":
        (out / "run.yaml").write_text(f"model: !!python/object/apply:os.mkdir ['{world.ran}']\n")
    elif part == "pickled weights":
        for weights in (model / "text_encoder").glob("*.safetensors"):
            weights.unlink()
        (model / "text_encoder" / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(world.ran)))
    elif part == "pickled optimizer":
        (out / "checkpoint-2" / "optimizer.pt").write_bytes(pickle.dumps(Payload(world.ran)))
    elif part == "code in the model":
        (model / "evil.py").write_text(f"import os\nos.mkdir({str(world.ran)!r})\n")
        (model / "transformer" / "evil.py").write_text(f"import os\nos.mkdir({str(world.ran)!r})\n")
        changed(model / "model_index.json", _class_name=["evil", "CogVideoXPipeline"], vae=["evil", "Model"])
        changed(model / "tokenizer" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]})
    elif part == "components elsewhere":
        changed(model / "model_index.json", **{".": ["diffusers", "X"], str(private): ["diffusers", "X"]})
    elif part == "dimensions":
        changed(model / "transformer" / "config.json", sample_width=10**15, num_layers=10**15)
        changed(model / "vae" / "config.json", layers_per_block=10**9)
        changed(model / "text_encoder" / "config.json", num_layers=10**9, vocab_size=10**15)
    else:
        raise AssertionError(part)


PARTS = (
    "cache",
    "whole cache",
    "run's folders",
    "run's samples",
    "run.yaml",
    "YAML that runs",
    "pickled weights",
    "pickled optimizer",
    "code in the model",
    "components elsewhere",
    "dimensions",
)


def commands(world: World) -> dict[str, tuple[object, ...]]:
    """Every command that reads a folder of others."""
    hostile = world.root / "hostile"
    data, model, out = hostile / "data", hostile / "model", hostile / "out"
    dataset = (data, "--model", model, "--size", "9x64x96")
    return {
        "validate": ("dataset", "validate", *dataset, "--report", world.root / "home" / "page.html"),
        "status": ("dataset", "cache", *dataset, "--status"),
        "cache": ("dataset", "cache", *dataset),
        "verify": ("dataset", "cache", *dataset, "--verify"),
        "prune": ("dataset", "cache", *dataset, "--prune", "--yes"),
        "plan": ("plan", "--model", model, "--size", "9x64x96"),
        "train": ("train", "--config", out / "run.yaml", "--output", out, "--dry-run", "--overwrite"),
        "resume": ("train", "--resume", "latest", "--output", out, "--dry-run"),
        "infer": ("infer", "--model", model, "--prompt", "x", "--steps", 1, "--size", "9x64x96", "--output", "v.mp4"),
        "lora": ("infer", "--lora", out, "--steps", 1, "--output", "w.mp4"),
        "merge": ("merge-zero", out / "checkpoint-2", "--output", world.root / "home" / "merged"),
        "report": ("report", out),
        "push": ("push", out, "anna/boats"),
        "push model": ("push", model, "anna/boats"),
    }


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("part", PARTS)
def test_nothing_outside_is_touched(world: World, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_hostile(world, part)
    before, refused = world.state(), 0
    hub = Hub(users={TOKEN: "anna"})
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name, value in (("HF_HUB_DISABLE_XET", True), ("HF_HUB_OFFLINE", False)):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)  # the client waits between attempts
    with serve(hub) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        for name, words in commands(world).items():
            if (name, part) in (("train", "run.yaml"), ("merge", "run's folders")):  # they name the link themselves
                continue
            status, said, touched = run(*words)
            refused += status != 0
            assert "unexpected error" not in said, (name, said)
            assert "Traceback" not in said, (name, said)
            assert "of anna" not in said, (name, said)
            inside = [path for path in touched if path.startswith(f"{world.private}{os.sep}")]
            assert inside == [], name
            assert not world.ran.exists(), name
            assert world.state() == before, name
        close_session()
    assert refused
    published = [repository.files() for repository in hub.repositories.values()]
    sent = [*hub.blobs.values(), *(data for files in published for data in files.values())]
    assert not any(b"of anna" in data or b"a private video" in data for data in sent)
    written = [path for path in (world.root / "home").rglob("*") if path.is_file()]
    assert not any(b"of anna" in path.read_bytes() for path in written)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_same_folders_are_fine_without_malice(world: World) -> None:
    for name, words in commands(world).items():
        if name in ("merge", "push", "push model"):  # of a LoRA without ZeRO there is nothing to merge
            continue
        status, said, _ = run(*words)
        assert status == 0, (name, said)
