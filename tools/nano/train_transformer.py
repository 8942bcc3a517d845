"""Train one of nano's transformers with cogtune itself, from random weights.

    python -m tools.nano.train_transformer 5b --parts build/nano --data build/nano/data --seconds 560

The text encoder and the VAE have to be among the parts. The first call writes a pipeline whose transformer is new,
fills the cache, measures how fast a step is, and starts ``cogtune train --type sft``. When its time is up the run is
stopped as by Ctrl-C, which saves a checkpoint; the same command goes on from there. When the last step is done, or
nearly, the transformer goes to the parts, in fp16.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel

from cogtune.data.nano import world
from cogtune.modeling.nano import new_transformer, write_nano
from cogtune.models.nano_models import SHARED_PARTS, transformer_part
from cogtune.models.variants import NANO_VARIANTS
from cogtune.run.checkpoints import checkpoints
from tools.nano.common import Deadline, best_device, machine, note, say

_PROBE_STEPS = 120
_STOP_SECONDS = 25.0
"""What a stopped run may take to save, and what comes after it."""
_START_SECONDS = 60.0
"""What a run takes before its first step, with four of them at once."""
_ENOUGH = 0.9
"""Share of its steps after which a run that had to stop is done: its rate is a fortieth of the highest by then."""


def cogtune(*arguments: str | Path, log: Path, deadline: Deadline | None = None) -> int | None:
    """Run the program, its output into ``log``; its exit code, or None when it was stopped for lack of time."""
    command = [sys.executable, "-m", "cogtune", *map(str, arguments)]
    say(shlex.join(["cogtune", *command[3:]]))
    with log.open("ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            return process.wait(None if deadline is None else max(1.0, deadline.left))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            process.wait()
            return None


def settings(given: argparse.Namespace, model: Path, output: Path, steps: int) -> list[str]:
    """The flags of a run; ``--learning-rate`` falls along a cosine to nothing, which does what an average would."""
    flags: dict[str, Any] = {
        "type": "sft",
        "model": model,
        "data": given.data,
        "cache-dir": given.cache_dir,
        "output": output,
        "precision": given.precision,
        "fps": world.FPS,
        "size": world.SIZE,
        "steps": steps,
        "batch-size": given.batch_size,
        "learning-rate": given.learning_rate,
        "lr-scheduler": "cosine",
        "warmup-steps": min(200, steps // 10),
        "beta2": 0.99,
        "weight-decay": 0.0,
        "caption-dropout": 0.1,
        "checkpoint-every": max(1, min(2000, steps)),
        "keep-checkpoints": 1,
        "seed": given.seed,
    }
    switches = ["--no-gradient-checkpointing", "--compile" if given.compile else "--no-compile"]
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))] + switches


def pace(output: Path) -> float:
    """Seconds a step, by the last half of a run's figures."""
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    seconds: list[float] = [line["seconds"] for line in steps if "seconds" in line]
    return median(seconds[len(seconds) // 2 :])


def losses(output: Path, points: int = 60) -> list[list[float]]:
    """Return the run's loss, averaged over ``points`` stretches of it: ``[last step, loss]`` each."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    width = max(1, len(steps) // points)
    blocks = [steps[start : start + width] for start in range(0, len(steps), width)]
    return [[block[-1][0], round(sum(loss for _, loss in block) / len(block), 5)] for block in blocks]


@torch.no_grad()
def take_over(transformer: CogVideoXTransformer3DModel, start: Path) -> list[str]:
    """Copy the weights of another variant's transformer as far as they fit; return the names of those that do not.

    Of weights that differ in how many channels they read, the channels that both have are copied, and the others are
    zero: an image-to-video model starts as a text-to-video model that ignores the image.
    """
    known = CogVideoXTransformer3DModel.from_pretrained(start, dtype=torch.float32).state_dict()
    left = []
    for name, own in transformer.state_dict().items():
        other = known.get(name)
        if other is not None and other.shape == own.shape:
            own.copy_(other)
        elif other is not None and other.shape[:1] + other.shape[2:] == own.shape[:1] + own.shape[2:]:
            own.zero_()
            own[:, : other.shape[1]] = other[:, : own.shape[1]]
        else:
            left.append(name)
    return left


def with_new_transformer(given: argparse.Namespace, folder: Path) -> Path:
    """Return the pipeline that training starts from, written at the first call."""
    target = folder / "model"
    if not target.is_dir():
        aside = folder / "parts"
        shutil.rmtree(aside, ignore_errors=True)
        for part in SHARED_PARTS:
            shutil.copytree(given.parts / part, aside / part)
        transformer = new_transformer(given.variant, given.seed)
        if given.start is not None:
            left = take_over(transformer, given.start)
            say(f"weights of {given.start.name}, but for {', '.join(left) or 'none'}")
        transformer.save_pretrained(aside / transformer_part(given.variant))
        write_nano(given.variant, aside, target)
        shutil.rmtree(aside)
    return target


def finish(given: argparse.Namespace, output: Path, done: int, planned: int) -> None:
    """Put the trained transformer among the parts, in fp16, and write down how it came to be."""
    folder = given.parts / transformer_part(given.variant)
    trained = CogVideoXTransformer3DModel.from_pretrained(checkpoints(output)[-1] / "transformer")
    trained.half().save_pretrained(folder)
    facts = {
        "steps": done,
        "steps_planned": planned,
        "batch_size": given.batch_size,
        "learning_rate": given.learning_rate,
        "seed": given.seed,
        "started_from": given.start.name if given.start is not None else "random weights",
        "data": json.loads((given.data / "world.json").read_text()),
        "seconds_a_step": round(pace(output), 4),
        "losses": losses(output),
        **machine(best_device(None)),
    }
    note(given.parts, transformer_part(given.variant), facts)
    say(f"{folder} written; loss {facts['losses'][-1][1]}")


def probed_pace(given: argparse.Namespace, model: Path, work: Path, log: Path) -> float | None:
    """Return the seconds of a step by a short run, or None if it failed."""
    probe = work / "probe"
    if cogtune("train", *settings(given, model, probe, _PROBE_STEPS), "--overwrite", log=log) != 0:
        say(f"the probe failed: see {log}")
        return None
    seconds = pace(probe)
    shutil.rmtree(probe)
    return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variant", choices=NANO_VARIANTS)
    parser.add_argument("--parts", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache-dir", type=Path, help="[default: DATA/.cogtune, and DATA/.cogtune-1.5 for 1.5]")
    parser.add_argument("--work", type=Path, help="where the run is kept [default: PARTS/runs/VARIANT]")
    parser.add_argument("--seconds", type=float, default=560.0, help="of this call")
    parser.add_argument("--total-seconds", type=float, help="of training in all calls together [default: SECONDS]")
    parser.add_argument("--steps", type=int, help="in all; by default as many as fit into the total")
    parser.add_argument("--pace", type=float, help="seconds of a step, where they are known [default: measured]")
    parser.add_argument("--start", type=Path, help="a transformer to start from [default: random weights]")
    parser.add_argument("--cache-only", action="store_true", help="fill the cache and stop")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--precision", default="bf16" if torch.cuda.is_available() else "fp32")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    # its VAE's config is another one, so that it shares no entry, and both can be filled at the same time
    given.cache_dir = given.cache_dir or given.data / (
        ".cogtune-1.5" if given.variant.startswith("1.5") else ".cogtune"
    )
    deadline = Deadline(given.seconds - _STOP_SECONDS)
    work = given.work or given.parts / "runs" / given.variant
    work.mkdir(parents=True, exist_ok=True)
    output, log, chosen = work / "out", work / "log.txt", work / "steps.json"
    model = with_new_transformer(given, work)

    if given.cache_only:
        flags = settings(given, model, output, 1)
        fit = [flags[flags.index(name) + at] for name in _CACHED for at in (0, 1)]
        if cogtune("dataset", "cache", given.data, *fit, log=log) != 0:
            say(f"the cache could not be filled: see {log}")
            return 1
        say("the cache is full")
        return 0
    if not chosen.is_file():
        steps = given.steps
        if steps is None:
            seconds = given.pace or probed_pace(given, model, work, log)
            if seconds is None:
                return 1
            left = given.total_seconds or deadline.left - _START_SECONDS
            steps = int(0.96 * left / seconds)
            say(f"{1000 * seconds:.0f} ms a step: {steps} steps fit")
        chosen.write_text(json.dumps(steps))
    steps = json.loads(chosen.read_text())
    goes_on = bool(checkpoints(output))
    how = (
        ["--resume", "latest", "--output", output]
        if goes_on
        else [*settings(given, model, output, steps), "--overwrite"]
    )
    code = cogtune("train", *how, log=log, deadline=deadline)
    if code:
        say(f"the run failed: see {log}")
        return code
    done = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()][-1]
    say(f"step {done} of {steps}, loss {losses(output)[-1][1]}, {1000 * pace(output):.0f} ms a step")
    if done == steps or (code is None and done >= _ENOUGH * steps):
        finish(given, output, done, steps)
    return 0


_CACHED = ("--model", "--cache-dir", "--precision", "--fps", "--size")
"""The flags that ``dataset cache`` takes too."""

if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
