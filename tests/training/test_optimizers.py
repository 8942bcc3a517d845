"""Optimizers and schedules: what the flags say arrives, and what does not go together is refused."""

from __future__ import annotations

import importlib.util
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers.optimization import get_scheduler
from torch.utils.cpp_extension import load

from cogtune.config.choices import LrScheduler
from cogtune.config.launchers import largest_group
from cogtune.config.optimizers import OPTIMIZERS
from cogtune.config.resolving import resolve
from cogtune.config.run_config import RunConfig
from cogtune.modeling.random_weights import build_transformer
from cogtune.models.checkpoint_configs import published_spec
from cogtune.models.variants import VARIANTS
from cogtune.run.plan import check_config
from cogtune.system.errors import UsageError
from cogtune.training.deepspeed_ops import ADAM, COLLECTIVES, building
from cogtune.training.optimizers import build_optimizer, learning_rate_at

TOY = {"learning_rate": 0.1, "beta2": 0.9, "weight_decay": 0.01}


def stepped(steps: int, *, break_at: int | None = None, device: str = "cpu", **flags: Any) -> torch.Tensor:
    """A matrix after ``steps`` steps towards zero, saved and loaded into a new optimizer after ``break_at``."""
    config = RunConfig(**{**TOY, **flags})
    weights = torch.nn.Parameter(torch.linspace(-2.0, 3.0, 12, device=device).view(3, 4))
    frozen = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
    optimizer = build_optimizer(torch.nn.ParameterList([weights, frozen]), config)
    for step in range(steps):
        if step == break_at:
            state, weights = optimizer.state_dict(), torch.nn.Parameter(weights.detach().clone())
            optimizer = build_optimizer(torch.nn.ParameterList([weights]), config)
            optimizer.load_state_dict(state)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * (step + 1)
        weights.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights.detach()


def test_adam_and_adamw_are_torchs_own() -> None:
    for name, kind in (("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)):
        weights = torch.nn.Parameter(torch.linspace(-2.0, 3.0, 12).view(3, 4).clone())
        optimizer = kind([weights], lr=0.1, betas=(0.9, 0.9), eps=1e-8, weight_decay=0.01, fused=True)
        weights.square().sum().backward()
        optimizer.step()
        assert torch.equal(stepped(1, optimizer=name), weights.detach())


def test_on_the_host_it_is_the_same_adamw() -> None:
    torch.testing.assert_close(stepped(5, optimizer="adamw-offload"), stepped(5), rtol=1e-6, atol=1e-7)


def test_where_deepspeeds_does_not_build_torchs_own_is_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_compiler(*_: Any, **__: Any) -> None:
        raise RuntimeError("no g++ here")

    monkeypatch.setattr("deepspeed.ops.adam.DeepSpeedCPUAdam", no_compiler)
    config = RunConfig(strategy="zero2-offload", type="sft")
    optimizer = build_optimizer(torch.nn.Linear(2, 2), config)
    assert type(optimizer) is torch.optim.AdamW
    assert "failed to build (no g++ here)" in capsys.readouterr().err


@pytest.mark.parametrize("kernel", [ADAM, COLLECTIVES])
def test_the_first_build_of_each_kernel_is_announced(
    kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name in (COLLECTIVES, ADAM):
        with building(name):
            built = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / name
            told = capsys.readouterr().err
            assert told == f"compiling DeepSpeed's {name} for this machine; this takes a few minutes, once\n"
            if name != kernel:
                built.mkdir()
                (built / f"{name}.so").touch()
    for name in (COLLECTIVES, ADAM):
        with building(name):
            assert ("compiling" in capsys.readouterr().err) is (name == kernel)


@pytest.mark.timeout(600)
def test_a_build_that_was_killed_hinders_no_later_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own lock, and a kernel that compiles in a second; without the mending this waits for ever."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with building("kernel"):
        folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    left = folder / "kernel" / "lock"
    left.parent.mkdir()
    left.touch()
    source = tmp_path / "kernel.cpp"
    source.write_text("int answer() { return 42; }")

    def compiled(*_: Any, **__: Any) -> torch.optim.Optimizer:
        load("kernel", [str(source)], is_python_module=False)
        return torch.optim.SGD([torch.nn.Parameter(torch.ones(2))])

    monkeypatch.setattr("deepspeed.ops.adam.DeepSpeedCPUAdam", compiled)
    config = RunConfig(strategy="zero2-offload", type="sft")
    assert type(build_optimizer(torch.nn.Linear(2, 2), config)) is torch.optim.SGD
    assert (folder / "kernel" / "kernel.so").is_file()
    assert not left.exists()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(tmp_path)


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_zero2_gets_groups_of_which_a_process_holds_a_power_of_two(processes: int) -> None:
    """Those of the real 5b, without its weights; DeepSpeed copies one of them at a time."""
    model = build_transformer(VARIANTS["5b"], "full", device="meta", dtype=torch.bfloat16)
    config = RunConfig(strategy="zero2", type="sft", num_processes=processes)
    groups = [group["params"] for group in build_optimizer(model, config).param_groups]
    assert [id(p) for group in groups for p in group] == [id(p) for p in model.parameters()]
    sizes = [sum(parameter.numel() for parameter in group) for group in groups]
    most = largest_group(sum(sizes), processes)
    assert (most / processes).is_integer()
    assert (most // processes).bit_count() == 1
    assert 4 <= len(sizes) <= 9
    assert all(0.95 * most < size <= most for size in sizes[:-1])  # a pinned buffer of it is rounded up by at most 5 %
    assert sizes[-1] <= most
    for other in ("ddp", "zero3", "zero3-offload"):
        assert len(build_optimizer(model, config.model_copy(update={"strategy": other})).param_groups) == 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on_from_its_state(name: str) -> None:
    if name == "adamw-8bit":
        pytest.importorskip("bitsandbytes")
    rates = {"came": 1e-3, "prodigy": 1.0}  # came's first steps are long, prodigy's are found out
    flags: dict[str, Any] = {"optimizer": name, "learning_rate": rates.get(name, 0.1)}
    straight = stepped(6, **flags)
    assert float(straight.square().sum()) < 32.5453  # where it began, to one in a million
    assert torch.equal(stepped(6, break_at=3, **flags), straight)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_on_a_gpu_too(name: str) -> None:
    if name == "adamw-8bit":
        pytest.importorskip("bitsandbytes")
    flags: dict[str, Any] = {"optimizer": name, "learning_rate": 1e-3}
    here = stepped(6, device="cuda", **flags)
    assert torch.equal(stepped(6, break_at=3, device="cuda", **flags), here)
    torch.testing.assert_close(here.cpu(), stepped(6, **flags), rtol=1e-4, atol=1e-5)


def test_prodigys_switches_and_cames_decays_arrive(capsys: pytest.CaptureFixture[str]) -> None:
    weights = torch.nn.Linear(2, 2)
    on = build_optimizer(weights, RunConfig(optimizer="prodigy")).param_groups[0]
    assert (on["decouple"], on["use_bias_correction"], on["safeguard_warmup"]) == (True, True, True)
    switches: dict[str, Any] = {
        "prodigy_decouple": False,
        "prodigy_bias_correction": False,
        "prodigy_safeguard_warmup": False,
    }
    off = build_optimizer(weights, RunConfig(optimizer="prodigy", beta3=0.5, **switches)).param_groups[0]
    assert (off["decouple"], off["use_bias_correction"], off["safeguard_warmup"]) == (False, False, False)
    assert (on["beta3"], off["beta3"]) == (None, 0.5)
    assert capsys.readouterr().out == ""  # the library prints
    came = build_optimizer(weights, RunConfig(optimizer="came", beta2=0.99)).param_groups[0]
    assert came["betas"] == (0.9, 0.99, 0.9999)


def test_prodigy_starts_from_its_own_rate_unless_one_is_given_with_it(tmp_path: Path) -> None:
    assert resolve(preset_name="4090-lora-5b", flags={"optimizer": "prodigy"}).config.learning_rate == 1.0
    given = resolve(preset_name="4090-lora-5b", flags={"optimizer": "prodigy", "learning_rate": 0.5})
    assert given.config.learning_rate == 0.5
    file = tmp_path / "x.yaml"
    file.write_text("optimizer: prodigy\n")
    resolved = resolve(file=file)
    assert (resolved.config.learning_rate, resolved.provenance["learning_rate"]) == (1.0, str(file))
    assert resolve(file=file, flags={"learning_rate": 2}).config.learning_rate == 2.0
    assert resolve(file=file, flags={"optimizer": "came"}).config.learning_rate == 1e-4
    assert resolve(preset_name="a100-sft-2b", flags={"optimizer": "adam"}).config.learning_rate == 2e-5
    file.write_text(resolved.to_yaml())
    assert resolve(file=file).config == resolved.config


def test_the_schedules_are_diffusers_own() -> None:
    """At steps 0, 5, 10, 15, ... of 40 with 10 of warm-up."""

    def rates(name: LrScheduler, **flags: Any) -> list[float]:
        config = RunConfig(learning_rate=0.5, lr_scheduler=name, **flags)
        return [learning_rate_at(config, 40)(step) for step in range(0, 41, 5)]

    up = [0.0, 0.25]
    assert rates("constant") == [0.5] * 9
    assert rates("constant_with_warmup", warmup_steps=10) == [*up, *[0.5] * 7]
    assert rates("linear", warmup_steps=10) == pytest.approx([*up, *(0.5 * left / 6 for left in range(6, -1, -1))])
    cosine = [0.25 * (1 + math.cos(math.pi * done / 6)) for done in range(7)]
    assert rates("cosine", warmup_steps=10) == pytest.approx([*up, *cosine])
    assert rates("cosine_with_restarts", warmup_steps=10) == pytest.approx([*up, *cosine])
    thrice = rates("cosine_with_restarts", warmup_steps=10, lr_cycles=3)
    assert thrice == pytest.approx([*up, 0.5, 0.25, 0.5, 0.25, 0.5, 0.25, 0.0])
    squared = [0.5 * (left / 6) ** 2 for left in range(6, -1, -1)]
    assert rates("polynomial", warmup_steps=10, lr_power=2) == pytest.approx([*up, *squared], abs=2e-7)
    assert rates("polynomial", warmup_steps=10, lr_power=2)[-1] == pytest.approx(1e-7)
    assert rates("piecewise_constant", lr_pieces="1:10,0.1:20,0.01") == pytest.approx(
        [0.5] * 2 + [0.05] * 2 + [5e-3] * 5
    )


@pytest.mark.parametrize(
    "name", ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant_with_warmup", "piecewise_constant"]
)
def test_a_rate_is_what_stepping_a_scheduler_would_give(name: LrScheduler) -> None:
    flags: dict[str, Any] = {"lr_pieces": "1:4,0.5"} if name == "piecewise_constant" else {"warmup_steps": 3}
    config = RunConfig(learning_rate=0.2, lr_scheduler=name, lr_cycles=2, lr_power=1.5, **flags)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=0.2)
    scheduler = get_scheduler(
        name, optimizer, step_rules=config.lr_pieces, num_warmup_steps=3, num_training_steps=12, num_cycles=2, power=1.5
    )
    rate = learning_rate_at(config, 12)
    for step in range(12):
        assert rate(step) == scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()


def test_what_does_not_go_together_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "came_pytorch" else real(name))
    flags: dict[str, Any] = {
        "optimizer": "came",
        "strategy": "zero2",
        "lr_scheduler": "constant",
        "warmup_steps": 5,
        "lr_pieces": "1:2,0.5",
        "timestep_range": "900,1000",
    }
    with pytest.raises(UsageError) as caught:
        check_config(resolve(flags=flags).config, published_spec(VARIANTS["5b"]))
    assert [detail.split(":")[0] for detail in caught.value.details] == [
        "optimizer came cannot be used with strategy zero2",
        "optimizer came requires came-pytorch, which is not installed; run `pip install 'cogtune[optimizers]'`",
        "lr_scheduler constant has no warm-up; remove warmup_steps, or use constant_with_warmup",
        "lr_pieces requires lr_scheduler piecewise_constant, not constant",
        "timestep_range 900,1000",
    ]
    assert "cogtune[optimizers]" in caught.value.details[1]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_deepspeed_runs_adam_and_adamw_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: object())
    config = resolve(flags={"optimizer": name, "strategy": "zero2"}).config
    if name in ("adam", "adamw"):
        check_config(config, published_spec(VARIANTS["5b"]))
        return
    with pytest.raises(UsageError, match="invalid configuration"):
        check_config(config, published_spec(VARIANTS["5b"]))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"lr_pieces": "1:10"}, "'1:10' is not a list of pieces; write FACTOR:STEP,...,FACTOR, such as 1:100,0.1"),
        ({"lr_pieces": "1:10,0.5:5,0.1"}, "'1:10,0.5:5,0.1': the steps must be increasing"),
        ({"timestep_range": "900"}, "'900' is not a range; write LOW,HIGH, such as 500,999"),
        ({"image_noise": "-3"}, "'-3' is not valid; write MEAN,STD of the noise's log, such as -3,0.5, or off"),
        ({"image_noise": "-3,-1"}, "'-3,-1' is not valid; write MEAN,STD of the noise's log, such as -3,0.5, or off"),
    ],
)
def test_values_that_do_not_read_are_told(values: dict[str, str], told: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(flags=values)
    assert told in caught.value.details[0]


def test_pairs_survive_yaml(tmp_path: Path) -> None:
    flags: dict[str, Any] = {"image_noise": "-2.5,1e-3", "timestep_range": "500,999", "lr_pieces": "1:10,1e-2"}
    resolved = resolve(flags={**flags, "lr_scheduler": "piecewise_constant"})
    file = tmp_path / "x.yaml"
    file.write_text(resolved.to_yaml())
    config = resolve(file=file).config
    assert config == resolved.config
    assert (config.image_noise_log, config.timestep_bounds) == ((-2.5, 1e-3), (500, 999))
    for text in ("image_noise: off", yaml.safe_dump({"image_noise": "off"})):
        file.write_text(text)
        assert resolve(file=file).config.image_noise_log is None
