"""GPUs that talk over NCCL: all strategies train, save, go on and merge alike; a checkpoint of the real size merges.

Run with ``pytest -m gpu -s tests/gpu/test_several_gpus.py`` on a machine of two or more GPUs of 80 GB, with 120 GB of
disk. Weights are random, nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cogtune.bench.watch import watched
from cogtune.data.synthetic import draw_dataset
from cogtune.modeling.random_weights import write_pipeline
from cogtune.models.variants import VARIANTS
from cogtune.planning.estimate import GIB
from tests.conftest import Cogtune

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module", autouse=True)
def needs_two_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there are not two GPUs here")


STRATEGIES = ("ddp", "zero2", "zero2-offload", "zero3", "zero3-offload")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_strategy_trains_alike(precision: str, cogtune: Cogtune, tmp_path: Path) -> None:
    """The same batches give the same losses and gradients, which are accumulated, and reduced in many buckets.

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
    same = STRATEGIES if precision == "fp32" else STRATEGIES[1:]
    # Adam steps alike however long its gradients are, so losses alone would not show them.
    for name in ("loss", "grad_norm"):
        measured = {}
        for strategy, output in outputs.items():
            lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
            measured[strategy] = [line[name] for line in lines if name in line]
            print(f"\n{precision} {strategy} {name}: {[round(value, 5) for value in measured[strategy]]}")
        assert len(measured["ddp"]) == 6
        for strategy in same[1:]:
            within = 5e-4 if precision == "fp32" else 2e-2
            assert measured[strategy] == pytest.approx(measured[same[0]], rel=within), (strategy, name)
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
            process.wait()


def test_a_checkpoint_of_5b_under_zero3_merges(film: Path, cogtune: Cogtune, tmp_path: Path) -> None:
    """After one step no weight is further from the base's than the learning rate and bf16's rounding."""
    model, cores = tmp_path / "5b", {"OMP_NUM_THREADS": str(os.cpu_count())}
    write_pipeline(VARIANTS["5b"], model, scale="full", device="cuda")
    torch.cuda.empty_cache()
    run: list[object] = ["--preset", "8xa100-sft-5b-zero3", "--num-processes", torch.cuda.device_count()]
    run += ["--model", model, "--data", film, "--learning-rate", 1e-3, "--steps", 1, "--eval-every", 0]
    began = time.perf_counter()
    cogtune("train", *run, seconds=900, env=cores)
    trained = time.perf_counter()
    with watched() as peaks:
        cogtune("merge-zero", "out/checkpoint-1", "--output", "merged", seconds=900, env=cores)
    took, processes = time.perf_counter() - trained, torch.cuda.device_count()
    print(
        f"\n5b, ZeRO-3 of {processes}: trained and saved in {trained - began:.0f} s, merged in {took:.0f} s with "
        f"{peaks.processes / GIB:.2f} GiB beside the page cache"
    )
    assert peaks.processes < 16 * GIB
    base, changed = base_of(model / "transformer"), 0
    for file in sorted((tmp_path / "merged" / "transformer").glob("*.safetensors")):
        for name, value in load_file(file).items():
            before, after = (weights.to("cuda") for weights in (base[name], value))
            torch.testing.assert_close(after.float(), before.float(), rtol=2**-7, atol=1.1e-3)
            changed += int((after != before).sum())
    assert changed > 1_000_000_000


def base_of(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a folder."""
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
