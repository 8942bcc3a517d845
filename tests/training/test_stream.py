"""Runs under strategy ``stream``: resumed to the bit, saved for diffusers, and several processes as one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file

from cogtune.config.resolving import resolve
from cogtune.encoding import jobs
from cogtune.models.checkpoint_configs import published_spec
from cogtune.models.variants import LORA_WEIGHTS_NAME, VARIANTS
from cogtune.planning.estimate import GIB, estimate
from cogtune.planning.host_memory import with_state
from cogtune.run.checkpoints import read_state
from cogtune.run.plan import check_config
from cogtune.system.errors import CogtuneError, UsageError
from cogtune.training import stream
from tests.support.checkpoint_contents import differing, held
from tests.support.forked_workers import run_workers
from tests.support.runs_in_process import evaluations, fill_here, plan_for, read_lines, train_here

STREAM: dict[str, Any] = {"type": "sft", "strategy": "stream", "precision": "bf16", "learning_rate": 1e-3}


@pytest.fixture(autouse=True)
def encode_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "fill_cache", fill_here)


@pytest.fixture(scope="module")
def one_clip(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of one clip."""
    folder = tmp_path_factory.mktemp("one")
    for name in ("prompts.txt", "videos.txt"):
        (folder / name).write_text((clips / name).read_text().splitlines()[0] + "\n")
    (folder / "videos").mkdir()
    first = (folder / "videos.txt").read_text().strip()
    os.link(clips / first, folder / first)
    return folder


@pytest.mark.parametrize(
    "formats",
    [
        {},
        pytest.param({"master_weights": "split", "moments": "8bit"}, marks=pytest.mark.slow),
        pytest.param({"master_weights": "stochastic", "moments": "bf16"}, marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_to_the_bit(formats: dict[str, Any], clips: Path, tmp_path: Path) -> None:
    flags: dict[str, Any] = {**STREAM, **formats, "ema": 0.5, "gradient_accumulation_steps": 2, "eval_every": 0}
    flags |= {"lr_scheduler": "cosine", "checkpoint_every": 1, "max_grad_norm": 0.5}
    straight = train_here(plan_for(clips, tmp_path / "straight", steps=3, **flags))
    before = str(tmp_path / "straight" / "checkpoint-1")
    resumed = train_here(plan_for(clips, tmp_path / "resumed", steps=3, resume=before, **flags))
    one, other = (held(tmp_path / name / "checkpoint-3") for name in ("straight", "resumed"))
    assert len(one) == 3  # weights, their average, the optimizer's state
    assert differing(one, other) == []
    assert differing(one, held(Path(before))) != []
    assert resumed == straight[1:]
    assert len(resumed) == 2
    chosen = {"master_weights": "fp32", "moments": "fp32", **formats}
    assert {key: read_state(Path(before))["identity"][key] for key in chosen} == chosen


def test_a_checkpoint_is_a_folder_that_diffusers_loads(clips: Path, tmp_path: Path) -> None:
    """The average of one step, with the base, is half way between the two."""
    plan = plan_for(clips, tmp_path / "out", model="tiny:5b-i2v", steps=1, ema=0.5, eval_every=0, **STREAM)
    train_here(plan)
    made = tmp_path / "out" / "checkpoint-1"
    assert sorted(path.name for path in made.iterdir()) == [
        "ema", "state.json", "stream-state-00.safetensors", "transformer",
    ]  # fmt: skip
    base, trained, average = (
        CogVideoXTransformer3DModel.from_pretrained(folder, dtype=torch.float32)
        for folder in (plan.base_model_dir / "transformer", made / "transformer", made / "ema" / "transformer")
    )
    before, after, middle = (dict(one.named_parameters()) for one in (base, trained, average))
    assert before.keys() == after.keys()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(moved) > 50
    for name in moved:
        assert torch.allclose(middle[name], (before[name] + after[name]) / 2, atol=0.01, rtol=0.02)
    assert {value.dtype for value in load_file(made / "transformer" / f"{stream.WEIGHTS}.safetensors").values()} >= {
        torch.bfloat16
    }


def test_weights_are_saved_in_several_files(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags: dict[str, Any] = {**STREAM, "steps": 1, "eval_every": 0}
    train_here(plan_for(clips, tmp_path / "one", **flags))
    monkeypatch.setattr(stream, "SHARD_BYTES", 1)
    train_here(plan_for(clips, tmp_path / "several", **flags))
    one, several = (
        CogVideoXTransformer3DModel.from_pretrained(tmp_path / name / "checkpoint-1" / "transformer").state_dict()
        for name in ("one", "several")
    )
    assert len(list((tmp_path / "several" / "checkpoint-1" / "transformer").glob("*-of-00003.safetensors"))) == 3
    assert differing(one, several) == []
    train_here(plan_for(clips, tmp_path / "several", resume="latest", **{**flags, "steps": 2}))
    train_here(plan_for(clips, tmp_path / "one", resume="latest", **{**flags, "steps": 2}))
    lines = [read_lines(tmp_path / name) for name in ("one", "several")]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 2


def test_a_damaged_state_is_told(clips: Path, tmp_path: Path) -> None:
    train_here(plan_for(clips, tmp_path / "out", steps=1, eval_every=0, **STREAM))
    state = tmp_path / "out" / "checkpoint-1" / stream.state_name(0)
    state.write_bytes(state.read_bytes()[:-8] + b"\1" * 8)
    with pytest.raises(CogtuneError, match=f"{state.name} is not the file that was saved"):
        train_here(plan_for(clips, tmp_path / "out", steps=2, eval_every=0, resume="latest", **STREAM))


def test_another_format_is_refused_on_resume(clips: Path, tmp_path: Path) -> None:
    train_here(plan_for(clips, tmp_path / "out", steps=1, eval_every=0, **STREAM))
    with pytest.raises(CogtuneError) as caught:
        plan_for(clips, tmp_path / "out", steps=2, resume="latest", moments="8bit", **STREAM)
    assert caught.value.details == ("moments: 'fp32' in the checkpoint, '8bit' now",)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"type": "lora"}, "strategy stream: only supported for type sft, not lora"),
        ({"precision": "fp16", "model": "tiny:2b"}, "precision fp16: not supported by strategy stream; use bf16"),
        ({"num_machines": 2, "num_processes": 2}, "num_machines 2: strategy stream runs on one machine"),
        ({"stream_blocks": 1}, "stream_blocks: strategy stream streams every block; remove stream_blocks"),
        (
            {"precision": "fp32", "master_weights": "split"},
            "master_weights split: only supported for precision bf16",
        ),
        ({"optimizer": "adamw-offload"}, "optimizer adamw-offload cannot be used with strategy stream"),
        ({"strategy": "ddp", "moments": "8bit"}, "moments: only supported for strategy stream, not ddp"),
        ({"strategy": "zero2", "ema": 0.9}, "ema: only supported for strategies ddp and stream, not zero2"),
    ],
)
def test_what_does_not_go_together_is_told(flags: dict[str, Any], told: str) -> None:
    config = resolve(preset_name="cpu-sft-tiny", flags={**STREAM, **flags}).config
    with pytest.raises(UsageError) as caught:
        check_config(config, published_spec(VARIANTS["2b"]))
    assert [detail for detail in caught.value.details if detail.startswith(told)]


@pytest.mark.parametrize(("room", "formats"), [("110GiB", ("fp32", "fp32")), ("70GiB", ("split", "8bit"))])
def test_the_formats_follow_from_the_hosts_memory(room: str, formats: tuple[str, str]) -> None:
    flags: dict[str, Any] = {"strategy": "stream", "host_memory": room, "vram": "12GB"}
    resolved = resolve(preset_name="a100-sft-5b-zero2-offload", flags=flags)
    spec = published_spec(VARIANTS["5b"])
    found = with_state(resolved, spec)
    assert (found.config.master_weights, found.config.moments) == formats
    assert found.provenance["moments"] == "--host-memory"
    assert estimate(found.config, spec).host <= int(room.removesuffix("GiB")) * GIB
    given = resolve(preset_name="a100-sft-5b-zero2-offload", flags={**flags, "moments": "bf16"})
    assert with_state(given, spec).config.moments == "bf16"


def test_too_little_host_memory_is_told() -> None:
    flags: dict[str, Any] = {"strategy": "stream", "host_memory": "20GiB"}
    resolved = resolve(preset_name="a100-sft-5b-zero2-offload", flags=flags)
    with pytest.raises(UsageError, match="--host-memory 20GiB is not enough: this run is estimated to need"):
        with_state(resolved, published_spec(VARIANTS["5b"]))


@pytest.mark.slow
@pytest.mark.parametrize("formats", [{}, {"master_weights": "split", "moments": "8bit"}])
def test_two_processes_are_one_with_accumulation(formats: dict[str, Any], clips: Path, tmp_path: Path) -> None:
    """To the bit where nothing is clipped; the norm is summed up in another order."""
    flags: dict[str, Any] = {**STREAM, **formats, "steps": 6, "ema": 0.9, "eval_every": 3, "checkpoint_every": 3}
    flags |= {"max_grad_norm": 100}
    alone = train_here(plan_for(clips, tmp_path / "alone", gradient_accumulation_steps=2, **flags))
    run_workers(plan_for(clips, tmp_path / "both", num_processes=2, **flags))
    both = read_lines(tmp_path / "both")
    for key, within in (("loss", 1e-7), ("grad_norm", 1e-6), ("eval_loss", 1e-7), ("ema_eval_loss", 1e-7)):
        mine, theirs = ([line[key] for line in lines if key in line] for lines in (alone, both))
        assert mine == pytest.approx(theirs, rel=within)
        assert len(set(mine)) >= 3
    before = str(tmp_path / "both" / "checkpoint-3")
    run_workers(plan_for(clips, tmp_path / "resumed", num_processes=2, resume=before, **flags))
    one, other = (held(tmp_path / name / "checkpoint-6") for name in ("both", "resumed"))
    assert len(one) == 4
    assert differing(one, other) == []


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [("lora", "ddp"), *(pytest.param("sft", name, marks=pytest.mark.slow) for name in ("ddp", "stream"))],
)
def test_an_average_of_the_weights_is_measured_and_goes_on_to_the_bit(
    kind: str, strategy: str, one_clip: Path, tmp_path: Path
) -> None:
    flags: dict[str, Any] = {"type": kind, "strategy": strategy, "ema": 0.5, "checkpoint_every": 1, "eval_every": 1}
    straight = train_here(plan_for(one_clip, tmp_path / "straight", steps=2, **flags))
    before = str(tmp_path / "straight" / "checkpoint-1")
    resumed = train_here(plan_for(one_clip, tmp_path / "resumed", steps=2, resume=before, **flags))
    one, other = (held(tmp_path / name / "checkpoint-2") for name in ("straight", "resumed"))
    assert differing(one, other) == []
    assert resumed[-1] == straight[-1]
    figures = straight[-1]
    assert figures["ema_eval_loss"] != figures["eval_loss"]
    assert evaluations(straight)[0] == straight[0]["ema_eval_loss"]  # it begins with the weights
    folder = tmp_path / "straight"
    if kind == "lora":
        average = load_file(folder / "ema" / LORA_WEIGHTS_NAME)
        raw = [load_file(folder / f"checkpoint-{step}" / LORA_WEIGHTS_NAME) for step in (1, 2)]
        name = next(name for name in average if "lora_B" in name)
        assert torch.allclose(average[name], raw[0][name] / 4 + raw[1][name] / 2, atol=1e-7)  # B begins with zero
    else:
        assert (folder / "checkpoint-2" / "ema" / "transformer" / "config.json").is_file()


def test_a_checkpoint_without_an_average_is_refused(clips: Path, tmp_path: Path) -> None:
    train_here(plan_for(clips, tmp_path / "out", steps=1, eval_every=0))
    with pytest.raises(CogtuneError, match="has no moving average of the weights"):
        plan_for(clips, tmp_path / "out", steps=2, resume="latest", ema=0.9)


@pytest.mark.exhaustive
@pytest.mark.parametrize("model", ["tiny:5b", "tiny:5b-i2v"])
def test_compact_state_overfits_a_clip_as_exact_state_does(model: str, one_clip: Path, tmp_path: Path) -> None:
    """The loss at fixed noise after 300 steps, in the loss before."""
    flags: dict[str, Any] = {**STREAM, "learning_rate": 3e-4, "model": model, "steps": 300, "eval_every": 300}
    found = {}
    kinds: dict[str, dict[str, Any]] = {"exact": {}, "compact": {"master_weights": "split", "moments": "8bit"}}
    for name, formats in kinds.items():
        losses = evaluations(train_here(plan_for(one_clip, tmp_path / name, checkpoint_every=300, **formats, **flags)))
        found[name] = losses[300] / losses[0]
    assert found["exact"] < 0.5
    assert found["compact"] == pytest.approx(found["exact"], abs=0.02)
