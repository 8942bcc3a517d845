"""A training that begins with a LoRA: the model is the LoRA'd one from its first step on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogtune.commands import train
from cogtune.encoding import jobs
from cogtune.models.variants import LORA_WEIGHTS_NAME
from cogtune.run.checkpoints import read_lora_facts, read_state
from cogtune.run.run_yaml import read_run
from cogtune.system.errors import CogtuneError, UsageError
from tests.conftest import Cogtune
from tests.support.forked_workers import run_workers
from tests.support.in_process import run
from tests.support.runs_in_process import evaluations, fill_here, plan_for, train_here
from tests.support.sampling import sampled

ADAPTER: dict[str, Any] = {"rank": 4, "alpha": 2.0, "target_modules": ["to_q", "ff.net.2"]}
FAST: dict[str, Any] = {"learning_rate": 1e-3, "checkpoint_every": 2, "steps": 2}


@pytest.fixture(autouse=True)
def encode_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "fill_cache", fill_here)


@pytest.fixture
def trained(clips: Path, tmp_path: Path) -> tuple[Path, float]:
    """A finished run, and its loss at fixed noise at its end."""
    lines = train_here(plan_for(clips, tmp_path / "first", **ADAPTER, **FAST, seed=1))
    return tmp_path / "first", evaluations(lines)[2]


def losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in lines if "loss" in line]


def as_kohya(file: Path, to: Path, *, alpha: float | None) -> Path:
    """The LoRA of a run as kohya's programs write one."""
    tensors = {}
    for name, value in load_file(file).items():
        layer, _, matrix = name.removeprefix("transformer.").removesuffix(".weight").rpartition(".lora_")
        flat = f"lora_unet_{layer.replace('.', '_')}"
        tensors[f"{flat}.lora_{'down' if matrix == 'A' else 'up'}.weight"] = value
        if alpha is not None:
            tensors[f"{flat}.alpha"] = torch.tensor(alpha)
    save_file(tensors, to)
    return to


@pytest.mark.parametrize("given", ["the run", "its file", "kohya"])
def test_the_first_steps_loss_is_that_of_the_model_with_the_lora(
    given: str, trained: tuple[Path, float], clips: Path, tmp_path: Path
) -> None:
    run, loss = trained
    file = run / LORA_WEIGHTS_NAME
    start = {"the run": run, "its file": file}.get(given) or as_kohya(file, tmp_path / "k.safetensors", alpha=2.0)
    plan = plan_for(clips, tmp_path / "second", init_lora=start, **FAST, seed=1)
    assert (plan.config.rank, plan.config.lora_alpha, set(plan.config.target_modules)) == (4, 2.0, {"to_q", "ff.net.2"})
    second = evaluations(train_here(plan))
    fresh = evaluations(train_here(plan_for(clips, tmp_path / "fresh", **ADAPTER, **FAST, seed=1)))
    assert second[0] == loss
    assert fresh[0] != loss
    assert second[2] != loss


def test_the_first_training_loss_is_the_one_that_going_on_would_have_had(
    trained: tuple[Path, float], clips: Path, tmp_path: Path
) -> None:
    """The first step's samples and noise depend on the seed and the step alone."""
    run, _ = trained
    slow: dict[str, Any] = {**FAST, "learning_rate": 1e-12}
    once = losses(train_here(plan_for(clips, tmp_path / "once", init_lora=run, **slow, seed=1)))
    again = losses(train_here(plan_for(clips, tmp_path / "again", init_lora=tmp_path / "once", **slow, seed=1)))
    base = losses(train_here(plan_for(clips, tmp_path / "base", **ADAPTER, **slow, seed=1)))
    assert again == pytest.approx(once, rel=1e-6)
    assert once[0] != base[0]


@pytest.mark.slow
def test_where_it_began_is_recorded_and_a_resumed_run_needs_the_file_no_more(
    trained: tuple[Path, float], clips: Path, tmp_path: Path
) -> None:
    file = as_kohya(trained[0] / LORA_WEIGHTS_NAME, tmp_path / "k.safetensors", alpha=2.0)
    out = tmp_path / "out"
    flags: dict[str, Any] = {"init_lora": file, "learning_rate": 1e-3, "checkpoint_every": 1, "seed": 1}
    whole = train_here(plan_for(clips, tmp_path / "whole", **flags, steps=2))
    train_here(plan_for(clips, out, **flags, steps=2), stop_after=1)
    about = read_state(out / "checkpoint-1")["init_lora"]
    assert about["file"] == "k.safetensors"
    assert len(about["digest"]) == 32
    assert read_run(out).config.init_lora == file
    assert read_run(out).provenance["rank"] == str(file)
    file.unlink()
    resolved = train.configure(preset_name=None, file=None, flags={"output": out}, resume="latest")
    plan = train.prepare_run(resolved, resume="latest", overwrite=False, dry_run=False).plan
    assert losses(train_here(plan))[-1] == losses(whole)[-1]
    assert read_lora_facts(out / LORA_WEIGHTS_NAME)["init_lora"] == about
    with pytest.raises(UsageError, match="--init-lora cannot be used with --resume"):
        train.configure(preset_name=None, file=None, flags={"output": out, "init_lora": file}, resume="latest")


def refused(clips: Path, tmp_path: Path, **flags: Any) -> CogtuneError:
    with pytest.raises(CogtuneError) as caught:
        plan_for(clips, tmp_path / "refused", **{**FAST, **flags})
    assert not (tmp_path / "refused").exists()
    return caught.value


def test_what_the_run_asks_for_and_the_file_lacks_is_told_at_once(
    trained: tuple[Path, float], clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = trained
    asked = {"rank": 8, "alpha": 4, "target_modules": ["to_q"], "dora": True}
    error = refused(clips, tmp_path, init_lora=run, **asked)
    assert error.details == (
        "rank: 8 (--rank), but the file has 4",
        "alpha: 4 (--alpha), but the file has 2",
        "target_modules: to_q (--target-modules), but the file has to_q, ff.net.2",
        "dora: on (--dora), but the file has it not",
    )
    same: dict[str, Any] = {**ADAPTER, "target_modules": ["ff.net.2", "attn1.to_q"]}
    assert plan_for(clips, tmp_path / "same", init_lora=run, **same, **FAST).config.target_modules == (
        "ff.net.2",
        "attn1.to_q",
    )
    assert "cannot be used with --type sft" in refused(clips, tmp_path, init_lora=run, type="sft").message
    assert f"starting from {run / LORA_WEIGHTS_NAME}: rank 4, alpha 2, on" in capsys.readouterr().err
    assert "no such file or folder" in refused(clips, tmp_path, init_lora=tmp_path / "gone").message
    assert "does not fit tiny" in refused(clips, tmp_path, init_lora=wide(tmp_path)).message


def wide(tmp_path: Path) -> Path:
    name = "transformer.transformer_blocks.0.attn1.to_q.lora_"
    save_file({f"{name}A.weight": torch.ones(4, 99), f"{name}B.weight": torch.ones(99, 4)}, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def test_a_file_that_does_not_say_alpha_takes_the_runs(
    trained: tuple[Path, float], clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, loss = trained
    silent = as_kohya(run / LORA_WEIGHTS_NAME, tmp_path / "k.safetensors", alpha=None)
    plan = plan_for(clips, tmp_path / "told", init_lora=silent, alpha=2.0, **FAST, seed=1)
    assert evaluations(train_here(plan))[0] == loss
    capsys.readouterr()
    assumed = plan_for(clips, tmp_path / "assumed", init_lora=silent, **FAST, seed=1)
    assert "does not record the alpha; assuming the rank, 4. Use --alpha to change it" in capsys.readouterr().err
    assert assumed.config.lora_alpha == 4


def test_layers_of_several_ranks_cannot_be_one_runs(clips: Path, tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for number, kind in enumerate("qk", 1):
        name = f"transformer.transformer_blocks.0.attn1.to_{kind}.lora_"
        tensors |= {f"{name}A.weight": torch.ones(number, 256), f"{name}B.weight": torch.ones(256, number)}
    save_file(tensors, tmp_path / "two.safetensors")
    error = refused(clips, tmp_path, init_lora=tmp_path / "two.safetensors")
    assert error.details == ("its layers have different ranks, 1 to 2, but a run has one rank",)
    assert "cogtune lora resize" in error.hint


def test_a_lora_on_some_blocks_alone_is_named_layer_by_layer(clips: Path, tmp_path: Path) -> None:
    name = "transformer_blocks.1.attn1.to_q"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 256), f"{name}.lora_B.weight": torch.ones(256, 2)}
    save_file(tensors, tmp_path / "one.safetensors", {"lora_config": json.dumps({"lora_alpha": 2})})
    plan = plan_for(clips, tmp_path / "out", init_lora=tmp_path / "one.safetensors", **FAST)
    assert plan.config.target_modules == (name,)
    train_here(plan)
    assert len(load_file(tmp_path / "out" / LORA_WEIGHTS_NAME)) == 2


@pytest.mark.parametrize("strategy", sampled(["ddp", "zero2"], "zero2"))
def test_two_processes_begin_with_it_too(
    strategy: str, trained: tuple[Path, float], clips: Path, tmp_path: Path
) -> None:
    run, _ = trained
    flags: dict[str, Any] = {"steps": 1, "learning_rate": 1e-12, "eval_every": 1, "seed": 1}
    run_workers(plan_for(clips, tmp_path / "out", init_lora=run, num_processes=2, strategy=strategy, **flags))
    ours, theirs = load_file(tmp_path / "out" / LORA_WEIGHTS_NAME), load_file(run / LORA_WEIGHTS_NAME)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-7)


def test_plan_shows_the_adapter_of_the_file(
    trained: tuple[Path, float], clips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--preset", "cpu-lora-tiny", "--data", clips, "--init-lora", trained[0]]
    run(capsys, "plan", *words)
    told = run(capsys, "plan", *words, "--rank", 9, status=2).err
    assert "rank: 9 (--rank), but the file has 4" in told


def test_bench_has_no_such_flag(command: Cogtune, tiny: Callable[[str], Path]) -> None:
    assert "--init-lora" in command("bench", "--init-lora", "x", status=2).err
