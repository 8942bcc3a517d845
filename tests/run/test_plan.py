"""Launch files: read by accelerate's and DeepSpeed's own readers, and always of one mind with the run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from deepspeed.runtime.config import DeepSpeedConfig

from cogtune.config.launchers import deepspeed_config
from cogtune.config.presets import PRESETS
from cogtune.config.resolving import resolve
from cogtune.config.run_config import RunConfig
from cogtune.config.strategies import Strategy
from cogtune.models.checkpoint_configs import published_spec
from cogtune.models.variants import VARIANTS, published
from cogtune.run.launch import write_files
from cogtune.run.plan import Plan, check_config, fps_of, make_plan, resume_fingerprint, size_of
from cogtune.system.errors import CogtuneError, UsageError


def plan_of(preset: str, output: Path, **flags: Any) -> tuple[Plan, str]:
    resolved = resolve(preset_name=preset, flags={"output": output, **flags})
    row = published(PRESETS[preset].model)
    assert row is not None
    spec = published_spec(row)
    check_config(resolved.config, spec)
    plan = make_plan(
        resolved,
        base_model_dir=Path("/models/base"),
        spec=spec,
        samples=70,
        prompt="a boat",
        index=output / "launch" / "index.json",
        fingerprint=resume_fingerprint(resolved.config, base="b", data="d"),
        resume=None,
    )
    return plan, resolved.to_yaml()


@pytest.mark.parametrize("preset", [name for name, row in PRESETS.items() if row.promised_gb is not None])
def test_every_presets_launch_files_are_read_by_their_own_readers(preset: str, tmp_path: Path) -> None:
    plan, text = plan_of(preset, tmp_path)
    files = write_files(plan, text)
    config, row = plan.config, PRESETS[preset]
    read = load_config_from_file(str(files.accelerate))
    assert read.num_processes == row.gpus
    assert Plan.read(files.plan) == plan
    if row.strategy == "ddp":
        assert read.mixed_precision == row.precision
        assert read.distributed_type == ("MULTI_GPU" if row.gpus > 1 else "NO")
        assert not files.deepspeed.exists()
        return
    assert read.distributed_type == DistributedType.DEEPSPEED
    assert read.mixed_precision is None  # DeepSpeed's own file alone says it
    assert read.deepspeed_config["deepspeed_config_file"] == str(files.deepspeed)
    value = json.loads(files.deepspeed.read_text())
    value["train_batch_size"] //= row.gpus  # DeepSpeed's reader counts the processes that are here: one
    understood = DeepSpeedConfig(value)
    zero = understood.zero_config
    assert int(zero.stage) == (3 if "zero3" in row.strategy else 2)
    assert (zero.offload_optimizer is not None) == row.strategy.endswith("offload")
    assert (zero.offload_param is not None) == (row.strategy == "zero3-offload")
    assert zero.offload_optimizer is None or zero.offload_optimizer.pin_memory
    assert (zero.contiguous_gradients, zero.reduce_bucket_size) == ((True, 5e8) if zero.stage == 3 else (False, 1e8))
    assert understood.gradient_accumulation_steps == config.gradient_accumulation_steps
    assert understood.train_micro_batch_size_per_gpu == config.batch_size
    assert understood.gradient_clipping == config.max_grad_norm
    assert understood.bfloat16_config.enabled == (row.precision == "bf16")
    assert understood.float16_config.enabled == (row.precision == "fp16")


@pytest.mark.parametrize(("strategy", "parts"), [("zero2-offload", 1), ("zero3-offload", 2)])
def test_offload_does_without_pinned_memory_where_that_is_asked(strategy: Strategy, parts: int) -> None:
    value = deepspeed_config(RunConfig(type="sft", strategy=strategy, pin_memory=False))
    zero = DeepSpeedConfig(value).zero_config
    offloads = [part for part in (zero.offload_optimizer, zero.offload_param) if part is not None]
    assert [part.pin_memory for part in offloads] == [False] * parts


def test_deepspeeds_file_follows_every_flag() -> None:
    flags = {"batch_size": 3, "gradient_accumulation_steps": 5, "max_grad_norm": 0.25, "num_processes": 4}
    value = deepspeed_config(resolve(flags={**flags, "strategy": "zero2", "precision": "fp32"}).config)
    assert value is not None
    assert value["train_batch_size"] == 60
    assert (value["train_micro_batch_size_per_gpu"], value["gradient_accumulation_steps"]) == (3, 5)
    assert value["gradient_clipping"] == 0.25
    assert not value["bf16"]["enabled"]
    assert not value["fp16"]["enabled"]


def test_the_script_runs_what_the_program_runs(tmp_path: Path) -> None:
    plan, text = plan_of("8x4090-sft-2b-zero3", tmp_path / "with space")
    files = write_files(plan, text)
    script = files.script.read_text()
    assert "accelerate launch --config_file '" in script
    assert f"--module cogtune.training.worker '{files.plan}'" in script
    assert 'export TORCHINDUCTOR_COMPILE_THREADS="${TORCHINDUCTOR_COMPILE_THREADS:-4}"' in script  # what is set stays
    assert files.script.stat().st_mode & 0o111
    assert yaml.safe_load((files.folder / "run.yaml").read_text())["strategy"] == "zero3"


def test_a_change_of_strategy_leaves_no_stale_file(tmp_path: Path) -> None:
    write_files(*plan_of("8x4090-sft-2b-zero3", tmp_path))
    assert (tmp_path / "launch" / "deepspeed.json").exists()
    write_files(*plan_of("a100-sft-2b", tmp_path))
    assert not (tmp_path / "launch" / "deepspeed.json").exists()


def test_what_a_model_cannot_do_is_refused_all_at_once() -> None:
    config = resolve(flags={"precision": "fp16", "size": "48x480x700", "strategy": "zero3"}).config
    with pytest.raises(UsageError) as caught:
        check_config(config, published_spec(VARIANTS["5b"]))
    assert len(caught.value.details) == 4
    check_config(
        resolve(preset_name="4080-lora-2b").config, published_spec(VARIANTS["2b"])
    )  # fp16 is what 2b was trained in


def test_a_missing_deepspeed_is_told_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    config = resolve(preset_name="a100-sft-5b-zero2-offload").config
    with pytest.raises(UsageError) as caught:
        check_config(config, published_spec(VARIANTS["5b"]))
    assert "requires DeepSpeed" in caught.value.details[0]
    check_config(resolve(preset_name="4090-lora-5b").config, published_spec(VARIANTS["5b"]))


def test_size_and_rate_come_from_the_model_unless_asked() -> None:
    spec = published_spec(VARIANTS["1.5-5b"])
    assert str(size_of(RunConfig(), spec)) == "81x768x1360"  # not the rotary grid of 300 x 300 latents
    assert fps_of(RunConfig(), spec) == 16.0
    assert str(size_of(RunConfig(size="49x480x720"), spec)) == "49x480x720"
    assert fps_of(RunConfig(fps=12), spec) == 12.0


def test_what_may_change_on_a_resume_and_what_may_not() -> None:
    before = resume_fingerprint(RunConfig(), base="b", data="d")
    for harmless in (
        {"steps": 7},
        {"output": Path("x")},
        {"keep_checkpoints": 1},
        {"eval_every": 3},
        {"alpha": 128},
        {"learning_rate": 1e-3},
    ):
        assert resume_fingerprint(RunConfig(**harmless), base="b", data="d") == before
    for harmful in ({"rank": 4}, {"seed": 1}, {"batch_size": 2}, {"beta2": 0.99}, {"caption_dropout": 0.1}):
        assert resume_fingerprint(RunConfig(**harmful), base="b", data="d") != before
    one = resume_fingerprint(RunConfig(gradient_accumulation_steps=2), base="b", data="d")
    assert resume_fingerprint(RunConfig(num_processes=2), base="b", data="d") == one  # the same samples in each step
    zero = resume_fingerprint(RunConfig(num_processes=2, strategy="zero2"), base="b", data="d")
    assert zero != resume_fingerprint(
        RunConfig(num_processes=1, gradient_accumulation_steps=2, strategy="zero2"), base="b", data="d"
    )


def test_a_plan_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"format": 99}')
    with pytest.raises(CogtuneError, match="another version"):
        Plan.read(tmp_path / "plan.json")


def test_tokens_are_in_the_plan(tmp_path: Path) -> None:
    plan, _ = plan_of("4090-lora-5b", tmp_path)
    assert plan.to_dict()["tokens"] == 17_550
    assert plan.total_steps == 1000
    assert math.isclose(plan.config.lora_alpha, 128)
