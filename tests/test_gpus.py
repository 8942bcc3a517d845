"""Two GPUs that talk over NCCL: all strategies train, save, go on and merge alike. Tiny models, no download.

Run with ``pytest -m gpu tests/test_gpus.py`` on a machine of two or more GPUs.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from conftest import Cogtune

from cogtune.data.synthetic import draw_dataset

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]


@pytest.fixture(scope="module", autouse=True)
def needs_two_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there are not two GPUs here")


STRATEGIES = ("ddp", "zero2", "zero2-offload", "zero3", "zero3-offload")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_strategy_trains_alike(precision: str, cogtune: Cogtune, tmp_path: Path) -> None:
    """The same batches give the same losses; gradients are accumulated, and reduced in many buckets.

    Under bf16, DDP computes with weights that stay in fp32, so there ZeRO is held to ZeRO.
    """
    data = draw_dataset(tmp_path / "data", clips=6)
    cogtune("dataset", "cache", data, "--preset", "cpu-sft-tiny", "--precision", precision)
    shared: list[object] = ["--preset", "cpu-sft-tiny", "--data", data, "--precision", precision, "--num-processes", 2]
    shared += ["--gradient-accumulation-steps", 2, "--learning-rate", 1e-4, "--checkpoint-every", 3, "--no-compile"]
    outputs = {strategy: tmp_path / strategy for strategy in STRATEGIES}
    for strategy, output in outputs.items():
        cogtune("train", *shared, "--strategy", strategy, "--output", output, "--steps", 3, "--dry-run")
    by_hand(outputs)
    for output in outputs.values():
        cogtune("train", "--resume", "latest", "--output", output, "--steps", 6, "--dry-run")
    by_hand(outputs)
    losses = {}
    for strategy, output in outputs.items():
        lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
        losses[strategy] = [line["loss"] for line in lines if "loss" in line]
        print(f"\n{precision} {strategy}: {[round(loss, 5) for loss in losses[strategy]]}")
    assert len(losses["ddp"]) == 6
    same = STRATEGIES if precision == "fp32" else STRATEGIES[1:]
    for strategy in same[1:]:
        within = 5e-4 if precision == "fp32" else 2e-2
        assert losses[strategy] == pytest.approx(losses[same[0]], rel=within), strategy
    for strategy in ("zero2", "zero3-offload"):
        cogtune("merge-zero", f"{strategy}/checkpoint-6", "--output", f"{strategy}-merged")


def by_hand(outputs: Mapping[str, Path]) -> None:
    """Start what was planned from its launch files, all at once, with buckets of which a tiny model fills many."""
    started = {}
    for strategy, output in outputs.items():
        launch = output / "dry-run"
        deepspeed = launch / "deepspeed.json"
        if deepspeed.is_file():
            value = json.loads(deepspeed.read_text())
            value["zero_optimization"]["reduce_bucket_size"] = 300_000
            deepspeed.write_text(json.dumps(value))
        with (launch / "said.log").open("w") as log:
            started[strategy] = subprocess.Popen([launch / "command.sh"], stdout=log, stderr=log)
    try:
        for strategy, process in started.items():
            assert process.wait(600) == 0, (outputs[strategy] / "dry-run" / "said.log").read_text()[-3000:]
    finally:
        for process in started.values():
            process.terminate()
