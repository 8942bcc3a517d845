"""Runs one piece of work again and again in processes forked from this one, each with another disk call that fails.

``test_disk_calls.py`` starts the processes, whose server has ``disk_faults.so`` in LD_PRELOAD. Each reads pairs of a
call and an error number (0: kill) from its connection and answers what came of each; a first (0, 0) counts the calls.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import io
import json
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.forkserver import ForkServer
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file

from cogtune.cli import main as cogtune
from cogtune.data.synthetic import draw_dataset
from cogtune.data.validation import inspection
from cogtune.encoding import jobs
from cogtune.encoding import worker as encoding
from cogtune.merge import merge_checkpoint
from cogtune.merge.base import stored_weights
from cogtune.modeling import encoders
from cogtune.models.locate import locate
from cogtune.run.checkpoints import changed_files, checkpoints, read_state
from cogtune.system import console, processes
from cogtune.system.digests import fingerprint_file
from cogtune.system.errors import CogtuneError
from cogtune.system.files import os_errors_explained
from cogtune.system.folders import remove_partials
from cogtune.training import checkpoint
from tests.support.forked_workers import ForkedProcess, free_port, launch_variables
from tests.support.hub_server import Hub, serve
from tests.support.runs_in_process import fill_here, plan_for, set_up_here, train_here
from tests.support.zero_checkpoints import random_model, random_weights, write_zero

FAULTS: Any = ctypes.CDLL(None)

SERVERS = contextlib.ExitStack()
"""What is not to end before this process does."""

TOKEN = "hf_AnnasOwnTokenForWriting1234"

Files = dict[str, str]
"""The files of a folder by their content."""


def tree(folder: Path) -> Files:
    return {str(path.relative_to(folder)): _print_of(path) for path in folder.rglob("*") if path.is_file()}


def _print_of(path: Path) -> str:
    """A digest of a file, the same for any order of a safetensors header's metadata, which is new each time."""
    if path.suffix == ".safetensors":
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        with contextlib.suppress(ValueError):
            header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True)
            return hashlib.sha256(header.encode() + data[8 + size :]).hexdigest()
    return fingerprint_file(path)


def standing(found: Files, old: Files, new: Files) -> str:
    """Whether what stands is the old or the new, as a whole."""
    return next((name for name, files in (("old", old), ("new", new)) if found == files), "neither")


@dataclass(frozen=True)
class Work:
    """What prepares a trial's folder, what is done in it, and what tells how it stands afterwards.

    Args:
        clean: done in the trial's folder before the work is done again, as a run does at its start.
    """

    prepare: Callable[[Path], object]
    do: Callable[[Path], None]
    stands: Callable[[Path], str]
    clean: Callable[[Path], None] = lambda _trial: None


def run(*words: object) -> None:
    """One command in this process.

    Raises:
        CogtuneError: with the words of the error that it showed.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            cogtune([str(word) for word in words])
    except SystemExit as end:
        if end.code:
            raise CogtuneError(said.getvalue().partition("error: ")[2] or f"nothing: {said.getvalue()}") from end


def merging(root: Path) -> Work:
    """A merge over an earlier one of another checkpoint."""
    random_model(seed=1).save_pretrained(root / "base")
    old, new = (write_zero(root / name, random_weights(seed)) for seed, name in enumerate(("old", "new")))
    for source in (old, new):
        merge_checkpoint(source, root / f"{source.name}-merged", base=root / "base", max_shard_size="50KB")

    def work(trial: Path) -> None:
        merge_checkpoint(root / "new", trial / "out", base=root / "base", max_shard_size="50KB", warn=console.warn)

    known = [tree(root / f"{name}-merged") for name in ("old", "new")]
    return Work(
        lambda trial: shutil.copytree(root / "old-merged", trial / "out"),
        work,
        lambda trial: standing(tree(trial / "out"), *known),
    )


def saving(kind: str, strategy: str = "ddp", **more: Any) -> Callable[[Path], Work]:
    """The second checkpoint of a run that keeps one; ``more`` are flags of it."""

    def make(root: Path) -> Work:
        jobs.fill_cache = fill_here
        data, first = Path(os.environ["DISK_TRIALS_DATA"]), root / "first"
        flags: dict[str, Any] = {"type": kind, "strategy": strategy, "keep_checkpoints": 1, "eval_every": 0, **more}
        plan = plan_for(data, first, steps=1, **flags)
        if plan.config.sharding.uses_deepspeed:
            os.environ.update(launch_variables(plan, 0, free_port()))
        train_here(plan)
        plan = plan_for(data, root / "second", steps=2, resume=str(first / "checkpoint-1"), **flags)
        training = set_up_here(plan)

        if plan.config.sharding.uses_deepspeed:
            _alone()

        def work(trial: Path) -> None:
            config = plan.config.model_copy(update={"output": trial})
            checkpoint.save(training.train_state, config, 2, {**training.facts, "step": 2})

        def stands(trial: Path) -> str:
            whole = []
            for path in checkpoints(trial):
                if changed_files(path, read_state(path)) or not _states(path):
                    return "neither"
                whole.append(path.name)
            return " and ".join({"checkpoint-1": "old", "checkpoint-2": "new"}[name] for name in whole) or "neither"

        def prepare(trial: Path) -> None:
            shutil.copytree(first / "checkpoint-1", trial / "checkpoint-1")

        return Work(prepare, work, stands, remove_partials)

    return make


def _alone() -> None:
    """From here on, collectives end at once: in a forked process, gloo's threads are gone, and there is one process."""

    def gather(gathered: list[Any], value: Any, *_: Any, **__: Any) -> None:
        gathered[0] = value

    assert torch.distributed.get_world_size() == 1
    torch.distributed.all_gather_object = gather  # type: ignore[assignment]
    for name in ("barrier", "all_reduce", "broadcast"):
        setattr(torch.distributed, name, lambda *_, **__: None)


def _states(path: Path) -> list[Any]:
    """The optimizer's states in a checkpoint: one file, or a shard of each process."""
    shards = sorted(path.glob("optimizer.pt")) + sorted(path.glob("pytorch_model/*optim_states.pt"))
    if streamed := sorted(path.glob("stream-state-*.safetensors")):
        return [load_file(share) for share in streamed]
    return [torch.load(shard, map_location="cpu", weights_only=shard.name == "optimizer.pt") for shard in shards]


def caching(root: Path) -> Work:
    """A clip more for a dataset that is cached: the worker and the program that waits for it, in one process."""

    def supervise(command: Sequence[str], reports: Sequence[processes.WorkerReport], log: Path, **more: Any) -> None:
        for report in reports:
            report.reserve()
        with os_errors_explained(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_bytes(b"")
        try:
            status = encoding.main([command[-1]])
        finally:
            console.configure(quiet=False)  # the worker's remarks went into its log, which is closed now
        said = [report.read() for report in reports]
        processes._raise_for(said, None, log, status, [], lambda: "run it again", lambda _log: None, is_last=False)

    jobs.process.supervise = supervise  # type: ignore[attr-defined]
    encoding.default_workers = lambda *_: 0  # type: ignore[attr-defined]
    inspection.usable_cores = lambda: 0  # type: ignore[attr-defined] # a pool's server would be no child of the forked processes
    encoders.TextEncoder = functools.cache(encoders.TextEncoder)  # type: ignore[assignment,misc]
    words = ("--model", "tiny:2b", "--size", "9x64x96")
    draw_dataset(root / "new", clips=2)
    shutil.copytree(root / "new", root / "old")
    for name in ("prompts.txt", "videos.txt"):
        first_line = (root / "new" / name).read_text().splitlines()[0]
        (root / "old" / name).write_text(f"{first_line}\n")
    run("dataset", "cache", root / "old", *words)

    def prepare(trial: Path) -> None:
        shutil.copytree(root / "old" / ".cogtune", trial / "data" / ".cogtune")
        for path in (root / "new").iterdir():
            copy = shutil.copytree if path.is_dir() else shutil.copy2
            copy(path, trial / "data" / path.name)

    def entries(data: Path) -> Files:
        return {name: value for name, value in tree(data / ".cogtune").items() if name.endswith(".safetensors")}

    (root / "whole").mkdir()
    prepare(root / "whole")
    run("dataset", "cache", root / "whole" / "data", *words)
    old, new = entries(root / "old"), entries(root / "whole" / "data")
    assert set(old.items()) < set(new.items())

    def stands(trial: Path) -> str:
        """Entries come one by one: each is there, as it has to be, or is not."""
        found = entries(trial / "data")
        if not set(old.items()) <= set(found.items()) <= set(new.items()):
            return "neither"
        return "new" if found == new else "old"

    return Work(prepare, lambda trial: run("dataset", "cache", trial / "data", *words), stands)


def _small_run(root: Path) -> Path:
    """The folder of a LoRA run of two steps that has shown a video."""
    jobs.fill_cache = fill_here
    shown: dict[str, Any] = {"validation_prompts": "A disc.", "sample_every": 2, "sample_steps": 1, "eval_every": 0}
    train_here(plan_for(Path(os.environ["DISK_TRIALS_DATA"]), root / "run", steps=2, **shown))
    return root / "run"


def inferring(root: Path) -> Work:
    """A video in the place of another one."""
    out = _small_run(root)

    def sampled(trial: Path, prompt: str = "a disc") -> None:
        video = trial / "video.mp4"
        run("infer", "--lora", out, "--prompt", prompt, "--steps", 1, "--size", "9x64x96", "--force", "--output", video)

    for name, prompt in (("old", "a square"), ("new", "a disc")):
        (root / name).mkdir()
        sampled(root / name, prompt)
    known = tree(root / "old"), tree(root / "new")
    return Work(
        lambda trial: shutil.copy2(root / "old" / "video.mp4", trial / "video.mp4"),
        sampled,
        lambda trial: standing({"video.mp4": tree(trial).get("video.mp4", "")}, *known),
    )


def reporting(root: Path) -> Work:
    """The page of a run in the place of an older one; nothing else in the folder changes."""
    out = _small_run(root)
    run("report", out)
    new = tree(out)
    page = (out / "report.html").read_text()

    def prepare(trial: Path) -> None:
        shutil.copytree(out, trial / "run")
        (trial / "run" / "report.html").write_text(page.replace("Run report", "Older report"))

    (root / "old").mkdir()
    prepare(root / "old")
    old = tree(root / "old" / "run")

    def stands(trial: Path) -> str:
        found = tree(trial / "run")
        return standing({name: value for name, value in found.items() if not name.endswith(".partial")}, old, new)

    return Work(prepare, lambda trial: run("report", trial / "run"), stands)


def pushing(root: Path) -> Work:
    """A run whose LoRA names paths of this machine, so that a copy without them is made, over an earlier push."""
    from huggingface_hub import close_session, constants

    out = _small_run(root)
    hub = Hub(users={TOKEN: "anna"})
    address = SERVERS.enter_context(serve(hub))
    os.environ |= {"HF_ENDPOINT": address, "HF_TOKEN": TOKEN}
    constants.HF_HUB_DISABLE_XET, constants.HF_HUB_OFFLINE = True, False
    before = tree(out)

    def push() -> None:
        close_session()  # a connection of the process that this one was forked from
        run("push", out, "anna/boats")

    def aside(trial: Path) -> None:
        (trial / "temporary").mkdir(exist_ok=True)
        tempfile.tempdir = str(trial / "temporary")

    aside(root)
    (out / "samples").rename(root / "samples")
    push()
    (root / "samples").rename(out / "samples")
    first = hub.repositories["anna/boats"]
    old = dict(first.files())
    push()
    new = dict(first.files())
    assert old != new

    def prepare(trial: Path) -> None:
        first.branches["main"] = [{}, old]
        hub.blobs.clear()
        aside(trial)

    def stands(_trial: Path) -> str:
        if tree(out) != before:
            return "neither"
        return next((name for name, files in (("old", old), ("new", new)) if first.files() == files), "neither")

    return Work(prepare, lambda _trial: push(), stands)


def editing(name: str, *words: object) -> Callable[[Path], Work]:
    """A command that writes LoRAs or a fused model over what it wrote of another one.

    Args:
        name: of what it writes.
        words: the command; ``LORA`` stands for a LoRA file, ``OTHER`` for a fine-tuned model.
    """

    def make(root: Path) -> Work:
        files = {}
        for seed, which in enumerate(("old", "new")):
            torch.manual_seed(seed)
            base = "transformer.transformer_blocks.0.attn1.to_q.lora_"
            width = model_width()
            matrices = {f"{base}A.weight": torch.randn(4, width), f"{base}B.weight": torch.randn(width, 4)}
            files[which] = root / f"{which}.safetensors"
            save_file(matrices, files[which])
            run("lora", "fuse", files[which], "--model", "tiny:2b", "--output", root / f"{which}-model")

        def write(which: str, folder: Path) -> None:
            def word_of(word: object) -> object:
                text = str(word).replace("LORA", str(files[which]))
                return text.replace("OTHER", str(root / f"{which}-model"))

            run(*(word_of(word) for word in words), "--output", folder / name, "--force")

        for which in ("old", "new"):
            (root / f"{which}-made").mkdir()
            write(which, root / f"{which}-made")
        known = [tree(root / f"{which}-made") for which in ("old", "new")]
        return Work(
            lambda trial: shutil.copytree(root / "old-made", trial, dirs_exist_ok=True, symlinks=True),
            lambda trial: write("new", trial),
            lambda trial: standing({k: v for k, v in tree(trial).items() if k.startswith(name)}, *known),
        )

    return make


def model_width() -> int:
    """How many inputs a layer of attention has in the tiny model."""
    return int(stored_weights(locate("tiny:2b") / "transformer")["transformer_blocks.0.attn1.to_q.weight"].shape[1])


KINDS: dict[str, Callable[[Path], Work]] = {
    "merge": merging,
    "lora": saving("lora"),
    "sft": saving("sft"),
    "zero": saving("sft", "zero2"),
    "stream": saving("sft", "stream", ema=0.9),
    "cache": caching,
    "infer": inferring,
    "report": reporting,
    "push": pushing,
    "convert": editing("x.safetensors", "lora", "convert", "LORA", "--to", "kohya", "--lora-alpha", 4),
    "adapter": editing("adapter", "lora", "convert", "LORA", "--to", "peft", "--lora-alpha", 4),
    "blend": editing("x.safetensors", "lora", "merge", "LORA:0.5", "LORA:2", "--rank", 2, "--to", "kohya"),
    "extract": editing("x.safetensors", "lora", "extract", "OTHER", "tiny:2b", "--rank", 4, "--to", "kohya"),
    "fuse": editing("fused", "lora", "fuse", "LORA", "--model", "tiny:2b"),
}


def attempt(work: Work, trial: Path, said: Path, at: int, fault: int) -> tuple[bool, dict[str, Any]]:
    """Do the work in a process of its own with a fault at one call; whether it was killed, and what it said."""
    said.write_text("")
    child = os.fork()
    if child == 0:
        for number in (1, 2):  # what a worker says there is not for whoever reads this process
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        os.environ["DISK_FAULTS_ROOT"] = str(trial)
        ended: dict[str, Any] = {"error": ""}
        FAULTS.disk_faults_arm(ctypes.c_long(at), fault)
        try:
            work.do(trial)
        except CogtuneError as error:
            ended["error"] = error.message
        except BaseException:
            ended["error"] = f"unforeseen: {traceback.format_exc()}"
        ended["calls"] = FAULTS.disk_faults_count()
        said.write_text(json.dumps(ended))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status), json.loads(said.read_text() or "{}")


def names(trial: Path) -> set[str]:
    return {str(path.relative_to(trial)) for path in trial.rglob("*")}


def serve_trials(what: str, root: Path, data: Path, connection: Connection) -> None:
    """One trial for each request, until there are no more."""
    os.environ["DISK_TRIALS_DATA"] = str(data)
    work = KINDS[what](root)
    said = root / "said"
    usual: set[str] = set()
    for number, (at, fault) in enumerate(iter(connection.recv, None)):
        trial = root / f"trial-{number}"
        trial.mkdir()
        work.prepare(trial)
        killed, ended = attempt(work, trial, said, at, fault)
        outcome = {"at": at, "fault": fault, "killed": killed, "stands": work.stands(trial), **ended}
        usual = usual or names(trial)
        # Whatever was left, the next one goes through later, and cleans up.
        for path in (*trial.rglob(".*"), *trial.rglob("cogtune-*")):
            os.utime(path, (0, 0))
        work.clean(trial)
        _, again = attempt(work, trial, said, 0, 0)
        outcome |= {"again": work.stands(trial), "again_error": again["error"]}
        connection.send(outcome | {"left": sorted(names(trial) - usual)})
        shutil.rmtree(trial)
    os._exit(0)


class TrialsProcess(ForkedProcess):
    """A process of trials, which starts with what they need imported."""

    server: ClassVar = ForkServer()


TrialsProcess.server.set_forkserver_preload(["tests.support.disk_trials"])
