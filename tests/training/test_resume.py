"""A run that was broken off, on two processes: it goes on to the bit, whenever and however it was broken off."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cogtune.data.batches import RankSampler
from cogtune.encoding import jobs
from cogtune.merge import merge_checkpoint
from cogtune.models.variants import LORA_WEIGHTS_NAME
from cogtune.run.checkpoints import checkpoints, fingerprints
from cogtune.run.launch import LaunchFiles
from cogtune.system.json_files import write_sealed
from cogtune.training.deepspeed_ops import ADAM, building
from tests.support.checkpoint_contents import assert_whole, differing, held
from tests.support.forked_workers import kill_workers, run_workers, start_workers
from tests.support.payload import Payload
from tests.support.runs_in_process import fill_here, plan_for, read_lines, train_here
from tests.support.sampling import sampled, sampled_pairs

LORA = {"type": "lora", "dora": True, "rslora": True, "lora_dropout": 0.2}
SFT = {"type": "sft", "learning_rate": 1e-4}


@pytest.fixture(autouse=True)
def encode_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "fill_cache", fill_here)


@pytest.mark.parametrize(
    ("kind", "strategy"),
    sampled_pairs(["lora", "sft"], ["ddp", "zero2", "zero3"], ("lora", "ddp"), ("sft", "zero3")),
)
def test_two_processes_go_on_to_the_bit(kind: str, strategy: str, clips: Path, tmp_path: Path) -> None:
    """Broken off after step 4 of 8: sample 16 of a dataset of 6, with accumulation, so in the middle of an epoch."""
    flags: dict[str, Any] = {
        **(LORA if kind == "lora" else SFT),
        "strategy": strategy,
        "num_processes": 2,
        "checkpoint_every": 4,
    }
    flags |= {"gradient_accumulation_steps": 2, "caption_dropout": 0.5, "lr_scheduler": "cosine", "warmup_steps": 1}
    run_workers(plan_for(clips, tmp_path / "straight", steps=8, **flags))
    before = str(tmp_path / "straight" / "checkpoint-4")
    run_workers(plan_for(clips, tmp_path / "resumed", steps=8, resume=before, **flags))
    one, other = (held(tmp_path / name / "checkpoint-8") for name in ("straight", "resumed"))
    assert len(one) >= 2
    assert differing(one, other) == []
    straight, resumed = (
        [line for line in read_lines(tmp_path / name) if line["step"] > 4] for name in ("straight", "resumed")
    )
    assert resumed == straight
    assert len(straight) == 5
    moved = held(tmp_path / "straight" / "checkpoint-4")
    assert differing(one, moved) != []
    if kind == "lora" and strategy != "ddp":
        merged = merge_checkpoint(tmp_path / "resumed" / "checkpoint-8", output=tmp_path / "merged")
        assert differing(load_file(merged.weights), load_file(tmp_path / "resumed" / LORA_WEIGHTS_NAME)) == []


@pytest.mark.parametrize("strategy", sampled(["zero2", "zero3"], "zero3"))
def test_a_damaged_shard_is_told_and_a_hostile_one_runs_nothing(strategy: str, clips: Path, tmp_path: Path) -> None:
    flags: dict[str, Any] = {**SFT, "strategy": strategy, "num_processes": 2, "eval_every": 0}
    run_workers(plan_for(clips, tmp_path / "out", steps=1, **flags))
    shards = tmp_path / "out" / "checkpoint-1" / "pytorch_model"
    models = {0: "mp_rank_00_model_states.pt"} if strategy == "zero2" else {}
    optimizers = {rank: next(shards.glob(f"*zero_pp_rank_{rank}_*_optim_states.pt")).name for rank in (0, 1)}
    for rank, name in (*models.items(), *optimizers.items()):
        whole, middle = (shards / name).read_bytes(), (shards / name).stat().st_size // 2
        flipped = bytes(255 - byte for byte in whole[middle : middle + 8])
        (shards / name).write_bytes(whole[:middle] + flipped + whole[middle + 8 :])
        plan = plan_for(clips, tmp_path / "out", steps=2, resume="latest", **flags)
        started = start_workers(plan)
        started[rank].join(600)
        for process in started:
            process.kill()
        said = LaunchFiles(tmp_path / "out" / "launch").report(rank).read()
        assert said is not None
        assert said["message"].startswith(f"{shards.parent} is damaged: checksum mismatch in {name} ")
        (shards / name).write_bytes(whole)

    name = optimizers[0]  # what a stranger made of it, and whose fingerprint he renewed
    whole, state = (shards / name).read_bytes(), (shards.parent / "state.json").read_bytes()
    torch.save(Payload(tmp_path / "ran"), shards / name)
    content = {key: value for key, value in json.loads(state).items() if key != "checksum"}
    files = [shards.parent / file for file in content["files"]]
    write_sealed(shards.parent / "state.json", content | {"files": fingerprints(files, shards.parent)})
    started = start_workers(plan_for(clips, tmp_path / "out", steps=2, resume="latest", **flags))
    started[0].join(600)
    for process in started:
        process.kill()
    said = LaunchFiles(tmp_path / "out" / "launch").report(0).read()
    assert said is not None
    assert re.search(r"checkpoint-1 contains \w+\.mkdir, which no checkpoint does", said["message"])
    assert not (tmp_path / "ran").exists()
    (shards / name).write_bytes(whole)
    (shards.parent / "state.json").write_bytes(state)
    run_workers(plan_for(clips, tmp_path / "out", steps=2, resume="latest", **flags))


@pytest.mark.parametrize("strategy", sampled(["ddp", "zero3"], "zero3"))
def test_buckets_on_two_processes_are_those_of_one_and_go_on_to_the_bit(
    strategy: str, clips: Path, tmp_path: Path
) -> None:
    """Two passes a step, in some steps of two sizes, so that the processes work on unlike ones at a time."""
    flags: dict[str, Any] = {"buckets": "17x64x96,9x96x64", "batch_size": 2, "epochs": 4, "checkpoint_every": 2}
    several = {**flags, "strategy": strategy, "num_processes": 2}
    plan = plan_for(clips, tmp_path / "straight", **several)
    assert (sorted(plan.buckets.values()), plan.total_steps) == ([1, 5], 6)
    ranks = [
        RankSampler(seed=plan.config.seed, batch_size=2, accumulation=1, world_size=2, rank=rank) for rank in (0, 1)
    ]
    counts = tuple(plan.buckets.values())
    unlike = [
        step for step in range(6) if len({one.bucket for share in ranks for one in share.passes(step, counts)}) > 1
    ]
    assert unlike
    run_workers(plan)
    before = str(tmp_path / "straight" / "checkpoint-2")
    run_workers(plan_for(clips, tmp_path / "resumed", resume=before, **several))
    one, other = (held(tmp_path / name / "checkpoint-6") for name in ("straight", "resumed"))
    assert differing(one, other) == []
    straight, resumed = (read_lines(tmp_path / name) for name in ("straight", "resumed"))
    assert resumed == [line for line in straight if line["step"] > 2 or (line["step"] == 2 and "eval_loss" in line)]

    alone = train_here(plan_for(clips, tmp_path / "alone", gradient_accumulation_steps=2, **flags))
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (straight, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_what_a_run_killed_while_it_built_left_stops_no_other(clips: Path, tmp_path: Path) -> None:
    anyones = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    with building(ADAM):
        for kernel in ("cpu_adam", "deepspeed_shm_comm"):
            lock = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / kernel / "lock"
            lock.parent.mkdir(exist_ok=True)
            lock.touch()
    there = set(anyones.iterdir())
    run_workers(plan_for(clips, tmp_path / "out", steps=1, strategy="zero2-offload", num_processes=2, type="sft"))
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-1"]
    assert set(anyones.iterdir()) == there  # nothing was built where others build


@pytest.mark.timeout(2400)
@pytest.mark.parametrize(
    ("kind", "strategy", "kills"),
    sampled(
        [
            ("lora", "ddp", 20), ("lora", "ddp", 4), ("sft", "ddp", 20),
            ("lora", "zero3", 6), ("sft", "zero2", 6), ("sft", "zero2", 4), ("sft", "stream", 20), ("sft", "stream", 4),
        ],
        ("sft", "zero2", 4),
    ),
)  # fmt: skip
def test_a_run_killed_at_many_moments_is_the_run_that_was_not(
    kind: str, strategy: str, kills: int, clips: Path, tmp_path: Path
) -> None:
    """Every second time within a few milliseconds of having begun to save; more often where too few of those hit it."""
    moments = random.Random(7)
    flags: dict[str, Any] = {
        "strategy": strategy,
        "num_processes": 2,
        "checkpoint_every": 1,
        "eval_every": 0,
        "keep_checkpoints": 2,
    }
    flags |= {"type": kind, "learning_rate": 1e-4}
    output, resume, reached, while_saving = tmp_path / "killed", None, 0, 0

    def saved() -> bool:
        return bool(there := checkpoints(output)) and int(there[-1].name.split("-")[1]) > reached

    def saving() -> bool:
        return saved() and any(output.glob(".checkpoint-*.partial"))

    for attempt in range(3 * kills):
        if attempt >= kills and while_saving >= kills // 4:
            break
        started = start_workers(plan_for(clips, output, steps=1000, resume=resume, **flags))
        if attempt % 2:
            kill_workers(started, output, when=saving, seconds=moments.uniform(0, 0.01))
        else:
            kill_workers(started, output, when=saved, seconds=moments.uniform(0, 0.25))
        while_saving += any(output.glob(".checkpoint-*.partial"))
        assert_whole(output)
        resume, reached = "latest", int(checkpoints(output)[-1].name.split("-")[1])
    assert while_saving >= kills // 4
    last = reached + 1
    run_workers(plan_for(clips, output, steps=last, resume=resume, **flags))
    assert list(output.glob(".*.partial")) == []
    run_workers(plan_for(clips, tmp_path / "straight", steps=last, **{**flags, "checkpoint_every": 1000}))
    one, other = (held(folder / f"checkpoint-{last}") for folder in (output, tmp_path / "straight"))
    assert differing(one, other) == []
