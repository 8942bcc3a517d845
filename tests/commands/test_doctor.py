"""``cogtune doctor`` on machines that are made up, and on this one."""

from __future__ import annotations

import ctypes
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cogtune.commands import doctor
from cogtune.commands.doctor import Line, Machine, examine
from cogtune.config.presets import PRESETS
from cogtune.planning.fit import GB, Hardware
from cogtune.system import gpus
from cogtune.system.gpus import Driver, Gpu
from tests.support.in_process import run

TORCH: dict[str, Any] = {
    "version": "2.13.0",
    "cuda": "12.8",
    "sees": 1,
    "capability": [9, 0],
    "bf16": True,
    "attention": {"flash-attn-4": 520.0, "cudnn": 410.0, "flash": 330.0},
    "link": {"up": 54.9, "down": 55.1},
}
DECODERS = {"av": {"version": "18.1.0", "codecs": ["h264", "hevc", "vp9", "av1", "mpeg4"]}}


def machine(card: str = "NVIDIA H200", memory: float = 150.8, **changes: Any) -> Machine:
    """A machine that has everything, but for ``changes``."""
    whole = Machine(
        hardware=Hardware((Gpu(card, int(memory * GB), GB),), 256 * 2**30),
        driver=Driver("570.1", "12.8"),
        probed={"torch": TORCH, "decoders": DECODERS},
        host_free=200 * 2**30,
        disks={"the run": (Path("/run"), 900 * GB), "the Hub's cache": (Path("/hub"), 900 * GB)},
        programs={"cc": "/cc", "c++": "/c++", "nvcc": "/nvcc", "ninja": "/ninja"},
        headers=True,
        versions={"torch": "2.13.0", "av": "18.1.0", "deepspeed": "0.19.8", "flash-attn-4": "4.0", "wandb": None},
        requirements=("torch>=2.6", "av>=14.0"),
        login="HF_TOKEN",
    )
    return replace(whole, **changes)


def torch_with(**changes: Any) -> dict[str, Any]:
    return {"torch": {**TORCH, **changes}, "decoders": DECODERS}


def found(of: Machine) -> dict[str, Line]:
    lines = examine(of).lines
    assert len({line.name for line in lines}) == len(lines)
    for line in lines:
        assert line.state == "good" or line.advice, line
    return {line.name: line for line in lines}


def test_a_machine_that_has_everything_is_good() -> None:
    report = examine(machine())
    assert report.ok
    assert {line.state for line in report.lines} == {"good"}
    lines = found(machine())
    assert lines["attention"].found == "flash-attn-4 520 TFLOP/s, cudnn 410 TFLOP/s, flash 330 TFLOP/s"
    assert lines["link"].found == "54.9 GB/s to the GPU, 55.1 GB/s back"
    assert lines["GPU 0"].found == "NVIDIA H200, 150.8 GB, 149.8 GB free"
    assert "wandb for --tracker wandb" in lines["optional packages"].advice


WORSE: dict[str, tuple[Machine, str, str, str]] = {
    "a busy card": (
        machine(hardware=Hardware((Gpu("A", 24 * GB, 9 * GB),), 2**36)), "GPU 0", "poor", "15.0 GB free",
    ),
    "torch for the CPU": (machine(probed=torch_with(cuda=None, sees=0)), "torch", "missing", "built for CPU only"),
    "an old driver": (machine(probed=torch_with(sees=0)), "torch", "missing", "built for CUDA 12.8, sees no GPU"),
    "a broken torch": (machine(probed={"error": "Segmentation fault"}), "torch", "missing", "Segmentation fault"),
    "an old torch": (
        machine(versions={"torch": "2.1", "av": "18.1.0", "deepspeed": "1"}), "package torch", "poor", "2.1, and",
    ),
    "a card without bf16": (machine(probed=torch_with(bf16=False, capability=[7, 5])), "bf16", "poor", "no bf16"),
    "no kernels": (
        machine(probed=torch_with(attention={}, attention_error="out of memory")), "attention", "poor", "out of memory",
    ),
    "no FlashAttention 4": (machine(probed=torch_with(attention={"cudnn": 410.0})), "attention", "poor", "cudnn 410"),
    "a narrow slot": (machine(probed=torch_with(link={"up": 6.2, "down": 6.4})), "link", "poor", "6.2 GB/s"),
    "no link": (machine(probed=torch_with(link=None, link_error="full")), "link", "poor", "not measured: full"),
    "little memory": (machine(host_free=8 * GB), "host memory", "poor", "7 GiB free"),
    "a full disk": (machine(disks={"the run": (Path("/run"), 3 * GB)}), "disk for the run", "poor", "3 GB free"),
    "no C compiler": (
        machine(programs={"c++": "/c++", "nvcc": "/n", "ninja": "/n"}), "compiled steps", "missing", "a C compiler",
    ),
    "no headers": (machine(headers=False), "compiled steps", "missing", "Python's C headers"),
    "no ninja": (machine(programs={"cc": "/cc", "c++": "/c", "nvcc": "/n"}), "DeepSpeed's ops", "poor", "lacks ninja"),
    "no DeepSpeed": (machine(versions={"torch": "2.13", "av": "18"}), "DeepSpeed's ops", "missing", "not installed"),
    "no PyAV": (
        machine(probed={"torch": TORCH, "decoders": {"av_error": "no libav"}}), "decoder", "missing", "PyAV: no libav",
    ),
    "no AV1": (
        machine(probed={"torch": TORCH, "decoders": {"av": {"version": "14", "codecs": ["h264", "hevc", "vp9"]}}}),
        "decoder", "poor", "PyAV 14",
    ),
    "a broken decord": (
        machine(probed={"torch": TORCH, "decoders": {**DECODERS, "decord_error": "x"}}),
        "decoder decord", "poor", "x",
    ),
    "no login": (machine(login="", login_error="you are not logged in"), "Hub login", "poor", "not logged in"),
    "a small card": (machine("NVIDIA GTX 1050", 2.0), "presets", "poor", "of the real models none; cpu-lora-tiny"),
}  # fmt: skip


@pytest.mark.parametrize("case", WORSE)
def test_what_is_poor_or_missing_is_said_with_what_to_do(case: str) -> None:
    of, name, state, told = WORSE[case]
    line = found(of)[name]
    assert line.state == state
    assert told in line.found
    assert line.advice


def test_without_a_gpu_the_exit_code_is_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = machine(hardware=Hardware((), 2**35), driver=None, probed=torch_with(sees=0, cuda=None))
    lines = found(bare)
    assert (lines["GPU"].state, lines["GPU"].found) == ("missing", "no NVIDIA driver")
    assert lines["torch"].state == "good"
    assert "compiled steps" not in lines
    monkeypatch.setattr(doctor, "look", lambda: bare)
    told = json.loads(run(capsys, "doctor", "--json", status=1).out)
    assert told["ok"] is False
    assert told["presets"] == ["cpu-lora-tiny", "cpu-sft-tiny"]
    assert {"name", "state", "found", "advice", "required"} == set(told["lines"][0])
    monkeypatch.setattr(doctor, "look", machine)
    table = run(capsys, "doctor").out
    assert "54.9 GB/s to the GPU" in table


def test_a_missing_requirement_is_named_with_the_command_that_installs_it() -> None:
    of = machine(versions={"torch": "2.13.0", "av": None, "deepspeed": "1"})
    line = found(of)["package av"]
    assert (line.state, line.advice, line.required) == ("missing", "pip install 'av>=14.0'", True)
    assert not examine(of).ok


@pytest.mark.parametrize(("memory", "card", "host"), [(24, "4090", 64), (8, "8gb", 64), (80, "a100", 512)])
def test_the_presets_of_a_card_are_those_that_run_on_it(memory: float, card: str, host: int) -> None:
    hardware = Hardware((Gpu("NVIDIA", int(memory * GB), 0),), host * 2**30)
    fitting = set(doctor.fitting_presets(hardware))
    assert {name for name in PRESETS if name.startswith("cpu-")} < fitting
    assert f"{card}-lora-5b" in fitting or card == "a100"
    assert not any(PRESETS[name].gpus > 1 for name in fitting)
    assert ("a100-sft-5b-zero2-offload" in fitting) == (card == "a100")


def test_a_probe_that_dies_is_told_by_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'ImportError: libcudart.so.12' >&2\nexit 139\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    assert doctor.probe() == {"error": "ImportError: libcudart.so.12"}
    script.write_text("#!/bin/sh\nkill -SEGV $$\n")
    assert doctor.probe() == {"error": "exit status -11"}
    script.write_text("#!/bin/sh\nprintf 'kaputt \\351\\n' >&2\nexit 1\n")
    assert doctor.probe() == {"error": "kaputt \ufffd"}


def test_the_drivers_version_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(buffer: Any, _size: Any) -> int:
        buffer.value = b"570.124"
        return 0

    def cuda(pointer: Any) -> int:
        ctypes.cast(pointer, ctypes.POINTER(ctypes.c_int))[0] = 12080
        return 0

    fake = SimpleNamespace(nvmlSystemGetDriverVersion=version, nvmlSystemGetCudaDriverVersion_v2=cuda)
    monkeypatch.setattr(gpus, "_library", lambda: fake)
    assert gpus.driver() == Driver("570.124", "12.8")
    monkeypatch.setattr(gpus, "_library", lambda: None)
    assert gpus.driver() is None


@pytest.mark.slow
def test_this_machine_is_looked_at_in_seconds() -> None:
    seen = doctor.look()
    lines = found(seen)
    assert "torch_error" not in seen.probed
    assert lines["decoder"].state == "good"
    assert lines["torch"].state == "good"
