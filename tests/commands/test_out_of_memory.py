"""What a run that was out of memory is told: the next leaner thing that fits the card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cogtune.config.resolving import resolve
from cogtune.models.checkpoint_configs import published_spec
from cogtune.models.variants import published
from cogtune.planning.fit import GB, Hardware, suggest_fit
from cogtune.run.launch import LaunchFiles
from cogtune.system.gpus import Gpu
from cogtune.system.out_of_memory import cannot_pin, is_out_of_memory, out_of_memory, room_of
from tests.support.forked_workers import run_workers, start_workers
from tests.support.runs_in_process import plan_for


def advice(preset: str, card_gb: int, cards: int = 1, *, host_gib: int = 512, **flags: Any) -> str:
    config = resolve(preset_name=preset, flags=flags).config
    row = published(config.model)
    assert row is not None
    machine = Hardware((Gpu("card", card_gb * GB, 0),) * cards, host_gib * 2**30)
    return suggest_fit(config, published_spec(row), machine)


@pytest.mark.parametrize(
    ("preset", "cards", "card_gb", "flags", "told"),
    [
        ("4090-lora-5b", 1, 24, {"vram": "off", "gradient_checkpointing": False}, "--gradient-checkpointing takes"),
        (
            "4090-lora-5b",
            1,
            24,
            {"vram": "off", "batch_size": 4},
            "--batch-size 1 --gradient-accumulation-steps 4 takes",
        ),
        ("4090-lora-5b", 1, 24, {"vram": "off", "size": "49x768x1360"}, "--size 49x480x720, the model's own, takes"),
        ("4090-lora-5b", 1, 24, {"vram": "off", "precision": "fp32"}, "--precision bf16 takes"),
        ("a100-sft-5b-zero2-offload", 1, 80, {"strategy": "ddp"}, "--strategy zero2-offload takes"),
        ("8xa100-sft-5b-zero2", 8, 80, {"strategy": "ddp"}, "--strategy zero2 takes"),
        (
            *("8xa100-sft-5b-zero2", 8, 80, {"strategy": "ddp", "optimizer": "came"}),
            "--optimizer adamw --strategy zero2 takes",
        ),
        ("4090-sft-2b-zero2-offload", 1, 10, {}, "--type lora --strategy ddp takes"),
        ("8xa100-sft-5b-zero2", 8, 32, {}, "--strategy zero3 takes"),
        ("8x4090-sft-2b-zero3", 8, 15, {}, "--strategy zero2 takes"),
        ("4090-lora-5b", 1, 16, {}, "--vram 16GB takes"),
        ("4090-lora-5b", 1, 24, {}, "--vram 20GB takes"),
        ("4090-lora-5b", 1, 24, {"batch_size": 4}, "--batch-size 1 --gradient-accumulation-steps 4 --vram 15GB takes"),
        ("8gb-lora-5b", 1, 8, {}, "no one option is enough; --preset 6gb-lora-2b takes"),  # --vram 6GB would be refused
        ("8gb-lora-5b", 1, 6, {}, "no one option is enough; --preset 6gb-lora-2b takes"),
        ("4090-lora-5b", 1, 2, {}, "use a smaller --size"),
        (
            "4090-lora-5b",
            0,
            0,
            {"vram": "off", "batch_size": 2},
            "--batch-size 1 --gradient-accumulation-steps 2 takes",
        ),
    ],
)
def test_the_next_leaner_thing_that_fits(
    preset: str, cards: int, card_gb: int, flags: dict[str, Any], told: str
) -> None:
    assert advice(preset, card_gb, cards, **flags).startswith(told)


def test_a_preset_is_named_with_what_it_takes_here() -> None:
    """It is for eight GPUs, and there are four; and a flag of the run, which stays, would not go with it."""
    told = advice("8xa100-sft-5b-zero2", 18, 4, host_gib=24)
    assert told.startswith("no one option is enough; --preset 8x4090-sft-2b-zero2 --num-processes 4 takes")
    told = advice("8xa100-sft-5b-zero2", 18, 4, host_gib=24, strategy="ddp", optimizer="came")
    assert "--preset 8x4090-sft-2b-zero2 --num-processes 4 --optimizer adamw takes" in told


def test_what_other_programs_use_is_not_offered() -> None:
    config = resolve(preset_name="4090-lora-5b").config
    row = published(config.model)
    assert row is not None
    machine = Hardware((Gpu("card", 24 * GB, 14 * GB),), 512 * 2**30)
    assert suggest_fit(config, published_spec(row), machine, free=10 * GB).startswith("--vram 10GB takes")


TORCHS = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 80.00 GiB of which 1.00 GiB is "
    "free. {allowed}{own}Of the allocated memory 5.00 GiB is allocated by PyTorch, and 512.00 MiB is reserved by "
    "PyTorch but unallocated. If reserved but unallocated memory is large try setting ..."
)


@pytest.mark.parametrize(
    ("allowed", "own", "free"),
    [
        ("", "Including non-PyTorch memory, this process has 6.50 GiB memory in use. ", 7.5),
        ("", "Process 123 has 77.00 GiB memory in use. ", 6.5),  # as in a container, where no number is its own
        ("4.00 GiB allowed; ", "Including non-PyTorch memory, this process has 6.50 GiB memory in use. ", 4.0),
    ],
)
def test_what_is_free_is_told_and_not_the_total(allowed: str, own: str, free: float) -> None:
    error = torch.OutOfMemoryError(TORCHS.format(allowed=allowed, own=own))
    room = room_of(error)
    assert room is not None
    assert (room.free, room.total) == (int(free * 2**30), 80 * 2**30)
    told = out_of_memory(error, "a smaller --size", doing="sampling")
    figure = f"{free * 2**30 / GB:.1f} GB of the GPU's 85.9 GB are available to this program"
    assert told.message == f"out of GPU memory while sampling: {figure}"


def test_the_driver_is_asked_where_an_error_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    assert room_of(error) is None
    monkeypatch.setattr("cogtune.system.out_of_memory.gpus", lambda: (Gpu("card", 24 * GB, 20 * GB),))
    assert str(room_of(error)) == "4.0 GB of the GPU's 24.0 GB are available to this program"


@pytest.mark.parametrize("card_gb", [24, 80])
def test_a_run_is_never_told_to_do_what_it_did(card_gb: int) -> None:
    """It was out of memory, whatever the estimate says."""
    assert "8xa100-sft-1.5-5b-zero3-offload" not in advice("8xa100-sft-1.5-5b-zero3-offload", card_gb, 8)
    assert "4090-lora-5b " not in advice("4090-lora-5b", card_gb)


def test_the_libraries_words_for_it() -> None:
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert is_out_of_memory(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize(
    ("function", "message", "pinning"),
    [
        ("pin_memory", "CUDA error: out of memory", True),
        ("pin_empty_like", "CUDA error: out of memory", True),
        ("pin_memory", "CUDA error: an illegal memory access was encountered", False),  # of an earlier kernel
        ("forward", "CUDA error: out of memory", False),
    ],
)
def test_pinned_memory_that_is_not_given_is_told_from_the_gpus(function: str, message: str, pinning: bool) -> None:
    scope: dict[str, Any] = {}
    exec(f"def {function}():\n    raise RuntimeError({message!r})", scope)
    with pytest.raises(RuntimeError) as caught:
        scope[function]()
    assert cannot_pin(caught.value) == pinning


def nothing_to_pin() -> None:
    """In a process: a system that gives no pinned memory, as CUDA tells of it under WSL."""
    from deepspeed.accelerator import get_accelerator

    def pin_memory(tensor: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        raise RuntimeError(f"CUDA error: out of memory\nat {tensor.shape}")

    get_accelerator().pin_memory = pin_memory


@pytest.mark.slow
def test_offload_without_pinned_memory_says_what_does_without_it(clips: Path, tmp_path: Path) -> None:
    def told(**flags: Any) -> tuple[str, str]:
        plan = plan_for(clips, tmp_path / "out", type="sft", num_processes=2, steps=2, overwrite=True, **flags)
        for process in start_workers(plan, nothing_to_pin):
            process.join(600)
        said = LaunchFiles(tmp_path / "out" / "launch").report(0).read()
        assert said is not None
        return said["message"], said["hint"]

    what = "cannot allocate the pinned host memory that offload needs: CUDA error: out of memory"
    message, hint = told(strategy="zero2-offload")
    assert (message, hint.split(",")[0]) == (what, "use --no-pin-memory")
    message, hint = told(strategy="zero3-offload")
    assert (message, hint.split(",")[0]) == (what, "use --no-pin-memory to pin only the weights")
    message, hint = told(strategy="zero3-offload", pin_memory=False)
    assert (message, hint.split(";")[0]) == (what, "zero3-offload always pins the weights")
    plan = plan_for(
        clips, tmp_path / "without", type="sft", num_processes=2, steps=2, strategy="zero2-offload", pin_memory=False
    )
    run_workers(plan, nothing_to_pin)
    assert (tmp_path / "without" / "checkpoint-2").is_dir()
