"""Every kind of file that cogtune reads, damaged: refused by name, harmless, or the same result; never unforeseen."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from cogtune.cli import main
from cogtune.data.synthetic import draw_dataset
from cogtune.encoding import jobs
from cogtune.models.locate import locate
from cogtune.run import launch
from cogtune.run.launch import LaunchFiles
from cogtune.system.digests import digest_file
from cogtune.system.errors import CogtuneError
from cogtune.training import worker
from tests.support.damages import damaged
from tests.support.runs_in_process import (
    StopWhen,
    fill_here,
    forget_earlier_runs,
    plan_for,
    read_lines,
    start_here,
    train_here,
)

SEED = int(os.environ.get("COGTUNE_DAMAGES_SEED", "2026"))
COUNT = int(os.environ.get("COGTUNE_DAMAGES", "2000"))
"""Damages of the whole test; each has a number, so that ``COGTUNE_DAMAGES_FROM`` starts behind those before it."""
FIRST = int(os.environ.get("COGTUNE_DAMAGES_FROM", "0"))
ONLY = [int(number) for number in os.environ.get("COGTUNE_DAMAGES_ONLY", "").split(",") if number]
"""Those to be looked at again."""

pytestmark = pytest.mark.timeout(1800)

SAMPLED = 60
SECONDS = 30
EXTRA_BYTES = 1 << 30

SIZE = "9x64x96"


@dataclass(frozen=True)
class Outcome:
    """What a command gave: its status, its words, and what it made."""

    status: int
    out: str
    err: str
    made: str = ""


@dataclass(frozen=True)
class Kind:
    """Files of one kind, and the commands that read them.

    Args:
        pattern: of the files, in the tree.
        commands: by their names in :class:`Tree`.
        is_ours: only cogtune writes them, and a change that nobody notices is a fault.
    """

    pattern: str
    commands: tuple[str, ...]
    is_ours: bool = False


KINDS = {
    "clip list": Kind("data/*.txt", ("validate",)),
    "clip": Kind("data/videos/*.mp4", ("validate",)),
    "what is known of clips": Kind("data/.cogtune/files.json", ("status",), is_ours=True),
    "cache entry": Kind("data/.cogtune/*/??/*.safetensors", ("verify",)),
    "pipeline index": Kind("model/model_index.json", ("encode", "infer", "push_model")),
    "transformer config": Kind("model/transformer/config.json", ("infer", "plan", "push_model")),
    "VAE config": Kind("model/vae/config.json", ("encode", "infer", "push_model")),
    "text encoder config": Kind("model/text_encoder/config.json", ("encode", "infer", "push_model")),
    "scheduler config": Kind("model/scheduler/*.json", ("infer", "plan", "push_model")),
    "tokenizer": Kind("model/tokenizer/*", ("encode", "infer")),
    "base weights": Kind("model/*/*.safetensors", ("encode", "infer", "push_model")),
    "run.yaml": Kind("out/run.yaml", ("resume_dry", "report", "push")),
    "checkpoint's state": Kind("out/checkpoint-*/state.json", ("resume",), is_ours=True),
    "checkpoint's LoRA": Kind("out/checkpoint-*/*.safetensors", ("resume",), is_ours=True),
    "optimizer state": Kind("out/checkpoint-*/*.pt", ("resume",), is_ours=True),
    "plan": Kind("out/launch/plan.json", ("work", "report"), is_ours=True),
    "cache index": Kind("out/launch/index.json", ("work",), is_ours=True),
    "prompts": Kind("out/launch/prompts.json", ("work",), is_ours=True),
    "machine": Kind("out/launch/machine.json", ("report",)),
    "process report": Kind("out/launch/rank-0.json", ("report",)),
    "metrics": Kind("out/metrics.jsonl", ("report",)),
    "sample list": Kind("out/samples/*/samples.json", ("report",)),
    "sample video": Kind("out/samples/*/*.mp4", ("report", "push")),
    "LoRA": Kind("out/pytorch_lora_weights.safetensors", ("infer_lora", "push")),
    "full fine-tune's state": Kind("full/checkpoint-*/state.json", ("infer_full", "push_full")),
    "full fine-tune's config": Kind("full/checkpoint-*/transformer/config.json", ("infer_full", "push_full")),
    "full fine-tune's weights": Kind("full/checkpoint-*/transformer/*.safetensors", ("infer_full", "push_full")),
}


class Tree:
    """A dataset with its cache, a model, a LoRA run and a full one, all made by the program; and commands on them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home = locate("tiny:2b").parent
        shutil.copytree(locate("tiny:2b"), root / "model")
        draw_dataset(root / "data", clips=2)
        settings: dict[str, Any] = {"model": str(root / "model"), "size": SIZE, "eval_every": 0}
        shown: dict[str, Any] = {"validation_prompts": "A disc.", "sample_every": 2, "sample_steps": 1}
        plan = plan_for(root / "data", root / "out", steps=2, checkpoint_every=1, **settings, **shown)
        train_here(plan)
        shutil.rmtree(root / "out" / "checkpoint-2")
        assert self.resume().status == 0  # so that the launch files are those of a run that goes on
        LaunchFiles(root / "out" / "launch").report(0).write("done")
        full: dict[str, Any] = {"type": "sft", "steps": 1, "checkpoint_every": 1}
        train_here(plan_for(root / "data", root / "full", **settings, **full))
        shutil.rmtree(root / "out" / "checkpoint-2")
        self.saved = self._contents()

    def _contents(self) -> dict[Path, tuple[bytes, tuple[int, int]]]:
        found = {}
        for path in sorted(self.root.rglob("*")):
            if path.is_file() and not path.is_symlink():
                stat = path.stat()
                found[path] = (path.read_bytes(), (stat.st_atime_ns, stat.st_mtime_ns))
        return found

    def restore(self) -> None:
        """The tree as it was made."""
        for path in self.root.rglob("*"):
            if path not in self.saved and not path.is_dir():
                path.unlink()
        for path, (data, times) in self.saved.items():
            if not path.is_file() or path.stat().st_mtime_ns != times[1] or path.stat().st_size != len(data):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
                os.utime(path, ns=times)

    def files(self, kind: Kind) -> list[Path]:
        """The files of a kind."""
        return sorted(path for path in self.root.glob(kind.pattern) if path in self.saved)

    # ------------------------------------------------------------------------------------------ the commands

    def _run(self, *words: object) -> Outcome:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        return Outcome(int(ended.value.code or 0), out.getvalue(), err.getvalue())

    def _made(self, path: Path, *words: object) -> Outcome:
        done = self._run(*words)
        return Outcome(done.status, done.out, done.err, digest_file(path) if path.is_file() else "")

    def _dataset(self, verb: str, *flags: object) -> Outcome:
        return self._run("dataset", verb, self.root / "data", "--model", self.root / "model", "--size", SIZE, *flags)

    def validate(self) -> Outcome:
        return self._dataset("validate", "--json")

    def status(self) -> Outcome:
        return self._dataset("cache", "--config", self.root / "out" / "launch" / "run.yaml", "--status", "--json")

    def verify(self) -> Outcome:
        return self._dataset("cache", "--config", self.root / "out" / "launch" / "run.yaml", "--verify")

    def encode(self) -> Outcome:
        return self._dataset("cache", "--cache-dir", self.root / "fresh")

    def plan(self) -> Outcome:
        return self._run("plan", "--model", self.root / "model", "--preset", "cpu-lora-tiny", "--size", SIZE, "--json")

    def infer(self) -> Outcome:
        return self._infer("--model", self.root / "model", "--size", SIZE)

    def infer_lora(self) -> Outcome:
        return self._infer("--lora", self.root / "out")

    def infer_full(self) -> Outcome:
        return self._infer("--model", self.root / "full")

    def _infer(self, *words: object) -> Outcome:
        video = self.root / "video.mp4"
        return self._made(video, "infer", *words, "--prompt", "a disc", "--steps", "1", "--output", video)

    def push(self) -> Outcome:
        return self._run("push", self.root / "out", "anna/boats", "--dry-run")

    def push_model(self) -> Outcome:
        return self._run("push", self.root / "model", "anna/boats", "--dry-run")

    def push_full(self) -> Outcome:
        return self._run("push", self.root / "full", "anna/boats", "--dry-run")

    def report(self) -> Outcome:
        return self._made(self.root / "out" / "report.html", "report", self.root / "out")

    def resume_dry(self) -> Outcome:
        return self._run("train", "--resume", "latest", "--output", self.root / "out", "--dry-run")

    def resume(self) -> Outcome:
        done = self._run("train", "--resume", "latest", "--output", self.root / "out", "--force")
        return Outcome(done.status, done.out, done.err, self._measured() if done.status == 0 else "")

    def work(self) -> Outcome:
        """What a process of the run does, from the launch files alone."""
        files = LaunchFiles(self.root / "out" / "launch")
        forget_earlier_runs()
        err = io.StringIO()
        try:
            with contextlib.redirect_stderr(err):
                worker.run(worker.read_plan(files.plan), files, StopWhen(lambda: False))  # type: ignore[arg-type]
        except CogtuneError as error:
            return Outcome(error.exit_code, "", f"error: {error}")
        except Exception as error:  # what the command line would call unforeseen
            return Outcome(1, "", f"unexpected error: {type(error).__name__}: {error}")
        return Outcome(0, "", err.getvalue(), self._measured())

    def _measured(self) -> str:
        return json.dumps(read_lines(self.root / "out"))


class TooSlow(BaseException):
    """A command ran over its time."""


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Raise in a command that takes too long, and give it no more than so much memory above what there is."""

    def late(_number: int, _frame: FrameType | None) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, late)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2 * EXTRA_BYTES, hard))
    signal.alarm(20 * SECONDS)  # of the clock; what counts are this process's own seconds, whatever else is running
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tree]:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as they are for users
        patch.setattr(jobs, "fill_cache", fill_here)
        patch.setattr(launch, "start", start_here)
        patch.setenv("HF_TOKEN", "")
        yield Tree(tmp_path_factory.mktemp("tree"))
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def usual(tree: Tree) -> Callable[[str], Outcome]:
    """What each command gives on the whole tree."""
    known: dict[str, Outcome] = {}

    def outcome(command: str) -> Outcome:
        if command not in known:
            tree.restore()
            known[command] = getattr(tree, command)()
            tree.restore()
            assert known[command].status == 0, f"{command}: {known[command]}"
        return known[command]

    return outcome


def _is_named(path: Path, root: Path, said: str) -> bool:
    """Whether words name a file, or a folder of the tree that holds it."""
    folders = [folder for folder in path.parents if root in folder.parents]
    return path.name in said or path.parent.name in said or any(str(folder) in said for folder in folders)


def _fault(kind: Kind, path: Path, root: Path, before: Outcome, after: Outcome, seconds: float) -> str:
    """What is wrong with how a damaged file was taken; empty when nothing is."""
    said = after.out + after.err
    if "unexpected error" in said or "Traceback" in said:
        return "unforeseen"
    if seconds > SECONDS:
        return f"took {seconds:.0f} s"
    if torch.get_default_dtype() != torch.float32:
        torch.set_default_dtype(torch.float32)
        return "torch's default number format was left changed"
    if after.status != 0:
        return "" if _is_named(path, root, said) else "refused without a name"
    is_told = _is_named(path, root, after.err)
    if kind.is_ours and not is_told and (after.out, after.made) != (before.out, before.made):
        return f"another result, and nothing said: {after.out} {after.made}, not {before.out} {before.made}"
    return ""


def _tried(tree: Tree, usual: Callable[[str], Outcome], number: int) -> str:
    """One damage by its number, which decides everything about it; what was wrong, in a line, or nothing."""
    rng = random.Random(f"{SEED} {number}")
    name = rng.choice(sorted(KINDS))
    kind = KINDS[name]
    path, command = rng.choice(tree.files(kind)), rng.choice(kind.commands)
    before = usual(command)
    how, data = damaged(path, path.read_bytes(), rng)
    path.write_bytes(data)
    began = time.process_time()
    try:
        with limits():
            after = getattr(tree, command)()
        fault = _fault(kind, path, tree.root, before, after, time.process_time() - began)
        said = (after.err.partition("error:")[2] or after.err[-300:]).strip()[:300]
    except TooSlow:
        fault, said = "never ended", ""
    finally:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        tree.restore()
    where = path.relative_to(tree.root)
    return f"{number}: {how} of the {name} {where}, {command}: {fault}: {said}" if fault else ""


def _all_tried(tree: Tree, usual: Callable[[str], Outcome], numbers: Sequence[int]) -> list[str]:
    log = os.environ.get("COGTUNE_DAMAGES_LOG")
    faults = []
    for number in numbers:
        fault = _tried(tree, usual, number)
        if fault:
            faults.append(fault)
        if log:
            with Path(log).open("a") as file:
                file.write(f"{fault or number}\n")
    return faults


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.slow
def test_there_are_files_of_each_kind(tree: Tree, name: str) -> None:
    assert tree.files(KINDS[name])


@pytest.mark.slow
def test_a_sample_of_the_damages(tree: Tree, usual: Callable[[str], Outcome]) -> None:
    assert _all_tried(tree, usual, range(SAMPLED)) == []


def _with_a_pipe(tree: Tree, path: Path, command: str) -> tuple[bool, Outcome]:
    """Whether a command waited for a pipe in a file's place, and its outcome; one that waits is helped on its way."""
    path.unlink()
    os.mkfifo(path)
    is_waited_for = threading.Event()

    def come() -> None:
        is_waited_for.set()
        while not is_done.wait(0.1):
            os.close(os.open(path, os.O_RDWR))

    is_done = threading.Event()
    helper = threading.Timer(SECONDS, come)
    helper.start()
    try:
        outcome = getattr(tree, command)()
    finally:
        is_done.set()
        helper.cancel()
        helper.join()
        path.unlink(missing_ok=True)
        tree.restore()
    return is_waited_for.is_set(), outcome


@pytest.mark.exhaustive
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes in folders on Windows")
def test_a_pipe_in_the_place_of_any_file_is_not_waited_for(tree: Tree, usual: Callable[[str], Outcome]) -> None:
    faults = []
    for name, kind in KINDS.items():
        for command in kind.commands:
            path, before = tree.files(kind)[0], usual(command)
            waited, after = _with_a_pipe(tree, path, command)
            fault = "waited" if waited else _fault(kind, path, tree.root, before, after, 0.0)
            faults += [f"{command}, a pipe as the {name} {path.name}: {fault}: {after.err[-300:]}"] if fault else []
    assert faults == []


@pytest.mark.exhaustive
@pytest.mark.timeout(0)
def test_all_damages(tree: Tree, usual: Callable[[str], Outcome]) -> None:
    assert _all_tried(tree, usual, ONLY or range(FIRST, COUNT)) == []
