"""Every command block of README and the guides runs, in order, on tiny models and a few drawn clips.

The program's own command line answers, in this process; presets have tiny models and two steps, and the Hub is the
local server. What is left out is listed with its reason.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cogtune.config import presets
from cogtune.config.presets import PRESETS
from cogtune.data.synthetic import draw_dataset
from cogtune.encoding import jobs
from cogtune.models.geometry import Size
from cogtune.models.locate import locate
from cogtune.models.variants import published
from cogtune.run import launch
from tests.cli.test_docs import FENCE, PAGES
from tests.hub.conftest import TOKEN
from tests.support.adapters import adapted
from tests.support.hub_server import Hub
from tests.support.in_process import run
from tests.support.lora_files import with_its_metadata
from tests.support.runs_in_process import fill_here, plan_for, start_here, train_here

TINY_WORDS = {
    "5b": "tiny:5b",
    "32": "2",
    "49x480x720,49x480x848,25x512x512": "9x64x96,9x64x112,9x96x96",
}
"""What stands in for a word of a command."""

TRAIN = ("--data", "data", "--steps", "2", "--sample-steps", "1", "--eval-every", "0")
MORE = {
    "train": TRAIN,
    "train without a preset": (*TRAIN, "--model", "tiny:5b", "--size", "9x64x96", "--precision", "fp32"),
    "infer": ("--steps", "2"),
    "compare": ("--steps", "1", "--guidance", "1", "--held-out", "1", "--unrelated", "a dog"),
}
"""Flags that are added to a command's own."""

LEFT_OUT = {
    "train_ddp_t2v.sh": "another program's script: tests/config/test_importers.py",
    "--config run.yaml": "what was imported from it: tests/config/test_importers.py",
    "--machine-rank": "two machines: tests/commands/test_several_processes.py",
    "cogtune bench": "measures in processes of its own: tests/bench/test_bench.py",
    "8x4090-sft-2b-zero2": "DeepSpeed: tests/commands/test_train.py",
    "--fit": "needs a GPU: tests/planning/test_estimate.py",
    "cogtune doctor": "a missing GPU is an error: tests/commands/test_doctor.py",
    "--every": "waits for a run of another process: tests/hub/test_watch.py",
    "--lora user/name": "what another put on the Hub: tests/commands/test_infer.py",
    "--resume user/name": "the run that it put there: tests/hub/test_resume.py",
    "checkpoint-1000": "DeepSpeed's shards: tests/commands/test_train.py, tests/modeling/test_weights_in_diffusers.py",
    "./theirs": "DeepSpeed's shards: tests/merge/test_merge.py",
    "./new": "DeepSpeed's shards: tests/merge/test_merge.py",
    "out/ema": "an averaged run: tests/training/test_stream.py",
    "--vae-compile on": "compiles the VAE: tests/modeling/test_encoders.py",
    "--smoke": "tests/commands/test_smoke.py",
}


def blocks(page: Path) -> Iterator[list[str]]:
    """The commands of each block of a page."""
    for block in FENCE.finditer(page.read_text()):
        if block["language"] in ("", "sh", "bash", "console"):
            lines = [line.strip().removeprefix("$ ") for line in block["body"].replace("\\\n", " ").splitlines()]
            if commands := [line for line in lines if line.startswith("cogtune ")]:
                yield commands


KEPT = {
    f"{page.stem}-{number}": kept
    for page in PAGES
    for number, commands in enumerate(blocks(page), 1)
    if (kept := [line for line in commands if not any(part in line for part in LEFT_OUT)])
}


@pytest.fixture(scope="module")
def belongings(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a reader has by then: clips, a run, a LoRA of another program, settings."""
    root = tmp_path_factory.mktemp("belongings")
    for name, seed in (("data", 0), ("held-out", 5)):
        draw_dataset(root / name, clips=3, seed=seed)
    style = with_its_metadata(root / "style", adapted(locate("tiny:5b")))
    shutil.copy(style / "pytorch_lora_weights.safetensors", root / "style.safetensors")
    shutil.copy(style / "pytorch_lora_weights.safetensors", root / "boats.safetensors")
    (root / "mine.yaml").write_text("preset: cpu-lora-tiny\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "fill_cache", fill_here)
        sampled: dict[str, Any] = {"validation_prompts": "A disc.", "sample_steps": 1}
        train_here(plan_for(root / "data", root / "out", model="tiny:5b", steps=1, rank=4, **sampled))
    shutil.copytree(root / "out", root / "other-run")
    return root


@pytest.fixture
def small_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Presets with their own names, on one process and tiny models."""
    for name, row in PRESETS.items():
        variant = published(row.model)
        assert variant is not None
        size = Size(variant.frame_multiple + 1, 64, 96)
        tiny = replace(row, model=f"tiny:{variant.name}", gpus=1, size=size, precision="fp32", more=())
        monkeypatch.setitem(presets.PRESETS, name, tiny)


def tiny_words(line: str) -> list[str]:
    """A command's words with tiny models and few steps."""
    words = [TINY_WORDS.get(word, word) for word in shlex.split(line, comments=True)[1:]]
    kind = words[0] if words[0] != "train" or "--preset" in words else "train without a preset"
    own = set(words)
    added = MORE.get(kind, ())
    pairs = [added[start : start + 2] for start in range(0, len(added), 2)]
    return [*words, *(word for pair in pairs if pair[0] not in own for word in pair)]


@pytest.mark.slow
@pytest.mark.usefixtures("small_presets")
@pytest.mark.parametrize("commands", KEPT.values(), ids=KEPT)
def test_the_commands_of_a_block_run_one_after_another(
    commands: list[str],
    belongings: Path,
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(jobs, "fill_cache", fill_here)
    monkeypatch.setattr(launch, "start", start_here)
    hub.users[TOKEN] = "user"
    here = tmp_path / "here"
    shutil.copytree(belongings, here, symlinks=True)
    monkeypatch.chdir(here)
    for line in commands:
        words = tiny_words(line)
        if words[0] == "train":
            shutil.rmtree(here / "out")
        run(capfd, *words)


def test_what_is_left_out_is_still_there() -> None:
    every = [line for page in PAGES for commands in blocks(page) for line in commands]
    assert [part for part in LEFT_OUT if not any(part in line for line in every)] == []
    assert sum(map(len, KEPT.values())) > len(every) / 2
