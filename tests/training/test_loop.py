"""Training on a tiny model: it learns, it resumes to the bit, and nothing is lost when it fails."""

from __future__ import annotations

import errno
import importlib.util
import json
import math
import os
import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file

from cogtune.commands import run_summary, train
from cogtune.config.resolving import resolve
from cogtune.config.run_config import RunConfig
from cogtune.data import batches as reading
from cogtune.data.batches import RankSampler, batches
from cogtune.data.cache.index import Index
from cogtune.data.cache.store import Store
from cogtune.encoding import jobs
from cogtune.modeling.random_weights import write_pipeline
from cogtune.models.checkpoint_configs import published_spec
from cogtune.models.geometry import Size, latent_frames
from cogtune.models.layers import names
from cogtune.models.variants import LORA_WEIGHTS_NAME, VARIANTS
from cogtune.run.checkpoints import check_fits, checkpoints, choose_checkpoint, read_state
from cogtune.run.launch import LaunchFiles, how_to_go_on
from cogtune.run.plan import Plan, resume_fingerprint
from cogtune.run.run_yaml import read_run
from cogtune.system.errors import CogtuneError, UsageError
from cogtune.training import checkpoint, setup
from cogtune.training.objective import Objective
from tests.support.forked_workers import start_workers
from tests.support.infer_frames import first_of
from tests.support.plain_training import plain_losses
from tests.support.runs_in_process import evaluations, fill_here, plan_for, read_lines, set_up_here, train_here
from tests.support.sampling import sampled, sampled_by_name
from tests.support.waiting import wait_until


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


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's weights, LoRA or full."""
    if (folder / LORA_WEIGHTS_NAME).is_file():
        return load_file(folder / LORA_WEIGHTS_NAME)
    return {
        name: value
        for file in (folder / "transformer").glob("*.safetensors")
        for name, value in load_file(file).items()
    }


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_twenty_lora_steps_on_one_clip_lower_the_loss_at_fixed_noise(one_clip: Path, tmp_path: Path) -> None:
    """Trained, the loss falls from 2.10 to 1.25; with a learning rate next to nothing it stays at 2.10.

    (The random model starts worse than one that answers zero, whose loss is near 1.1: most of the fall is unlearning.)
    """
    trained = evaluations(train_here(plan_for(one_clip, tmp_path / "trained", steps=20)))
    untrained = evaluations(train_here(plan_for(one_clip, tmp_path / "untrained", steps=20, learning_rate=1e-12)))
    assert trained[0] == untrained[0]
    assert trained[0] - trained[20] > 0.6
    assert abs(untrained[0] - untrained[20]) < 1e-5


@pytest.mark.parametrize("name", ["2b", "5b", "1.5-5b"])
def test_five_steps_are_the_steps_written_out_plainly(name: str, one_clip: Path, tmp_path: Path) -> None:
    plan = plan_for(one_clip, tmp_path / "out", model=f"tiny:{name}", size="9x64x96", steps=5, eval_every=0)
    ours = [line["loss"] for line in train_here(plan)]
    assert len(ours) == 5
    assert ours == pytest.approx(plain_losses(plan, torch.device("cpu")), rel=1e-5)


needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


RESUMED: dict[str, dict[str, Any]] = {
    # several at once, each of which keeps something that the others do not
    "sft-cosine": {"type": "sft", "learning_rate": 1e-4, "lr_scheduler": "cosine", "warmup_steps": 2},
    "accumulation-prodigy": {
        "batch_size": 2, "gradient_accumulation_steps": 2, "caption_dropout": 0.5, "optimizer": "prodigy",
        "learning_rate": 1,
    },
    "image-to-video-came-logit-normal": {
        "model": "tiny:1.5-5b-i2v", "size": "17x64x96", "optimizer": "came", "timestep_sampling": "logit-normal",
        "timestep_range": "500,999",
    },
    "dropout-dora-rslora-offload": {
        "lora_dropout": 0.3, "dora": True, "rslora": True, "optimizer": "adamw-offload",
    },
    "lora": {"type": "lora"},
    "sft": {"type": "sft", "learning_rate": 1e-4},
    "accumulation": {"batch_size": 2, "gradient_accumulation_steps": 2, "caption_dropout": 0.5},
    "image-to-video": {"model": "tiny:5b-i2v"},
    "1.5-image-to-video": {"model": "tiny:1.5-5b-i2v", "size": "17x64x96"},
    "cosine": {"lr_scheduler": "cosine", "warmup_steps": 2},
    "dropout-dora-rslora": {"lora_dropout": 0.3, "dora": True, "rslora": True},
    "logit-normal": {"timestep_sampling": "logit-normal", "timestep_range": "500,999"},
    "adam": {"optimizer": "adam"},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1},
    "came": {"optimizer": "came"},
    "adamw-offload": {"optimizer": "adamw-offload"},
}  # fmt: skip


@pytest.mark.parametrize(
    "flags",
    [
        *sampled_by_name(RESUMED, *list(RESUMED)[:4]),
        pytest.param({"optimizer": "adamw-8bit"}, id="adamw-8bit", marks=needs_bitsandbytes),
    ],
)
def test_a_resumed_run_is_the_same_run_to_the_bit(clips: Path, tmp_path: Path, flags: dict[str, Any]) -> None:
    straight = train_here(plan_for(clips, tmp_path / "straight", steps=8, **flags))
    first = train_here(plan_for(clips, tmp_path / "broken", steps=8, **flags), stop_after=5)
    assert [line["step"] for line in first if "loss" in line] == [1, 2, 3, 4, 5]
    second = train_here(plan_for(clips, tmp_path / "broken", steps=8, resume="latest", **flags))
    assert second == straight
    assert_same(weights(tmp_path / "broken" / "checkpoint-8"), weights(tmp_path / "straight" / "checkpoint-8"))


BUCKETS = [("tiny:2b", Size(9, 96, 64)), ("tiny:1.5-5b-i2v", Size(9, 64, 64))]


@pytest.mark.parametrize(("model", "other"), sampled(BUCKETS, BUCKETS[1]))
def test_a_run_with_buckets_resumes_within_an_epoch_to_the_bit(
    clips: Path, tmp_path: Path, model: str, other: Size
) -> None:
    flags: dict[str, Any] = {"model": model, "buckets": f"17x64x96,{other}", "batch_size": 2, "epochs": 2}
    plan = plan_for(clips, tmp_path / "straight", **flags)
    assert dict(plan.buckets) == {str(other): 1, "17x64x96": 5}
    assert plan.total_steps == 6  # each passes of 2: 5 for two epochs of five samples, 1 for two of one
    assert plan.size == Size(17, 64, 96)
    assert ("training sizes (samples)", f"17x64x96 (5), {other} (1)", "buckets") in run_summary.describe(plan)
    straight = train_here(plan)
    train_here(plan_for(clips, tmp_path / "broken", **flags), stop_after=4)
    assert read_state(tmp_path / "broken" / "checkpoint-4")["step"] == 4
    assert train_here(plan_for(clips, tmp_path / "broken", resume="latest", **flags)) == straight
    assert_same(weights(tmp_path / "broken"), weights(tmp_path / "straight"))

    index, seen = Index.read(plan.index), Counter[str]()
    share = RankSampler(seed=plan.config.seed, batch_size=2, accumulation=1, world_size=1, rank=0)
    for passes in batches(
        Store(plan.config.cache_dir or Path()), index, share, 0, plan.total_steps, lambda batch: batch
    ):
        for batch in passes:
            seen.update(batch.ids)
            sizes = {row.size for row in index.rows if row.id in batch.ids}
            assert len(sizes) == 1
            (size,) = sizes
            assert batch.moments.shape[2:] == (latent_frames(size.num_frames), size.height // 8, size.width // 8)
            assert (batch.image is not None) == plan.spec.image_to_video
    assert dict(seen) == dict.fromkeys((row.id for row in index.rows), 2)


def test_a_run_may_not_mix_buckets_that_the_model_cannot_have(clips: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        plan_for(clips, tmp_path / "out", model="tiny:5b-i2v", buckets="10x64x96,9x64x4096,9x32x96")
    assert [detail.split(":")[0] for detail in caught.value.details] == [
        "size 10x64x96", "size 10x64x96", "size 9x64x4096", "size 9x64x4096", "size 9x32x96", "size 9x32x96",
    ]  # fmt: skip


def test_the_adapter_is_fp32_on_a_base_in_the_runs_precision(clips: Path, tmp_path: Path) -> None:
    train_here(plan_for(clips, tmp_path / "out", steps=1, precision="bf16", model="tiny:5b"))
    saved = weights(tmp_path / "out")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert len(saved) == 2 * 4 * 2  # A and B, four targets, two layers
    assert any(value.abs().max() > 0 for name, value in saved.items() if "lora_B" in name)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32, None])
def test_full_training_starts_from_the_bases_own_values_in_fp32(
    stored: torch.dtype | None, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read as they are stored, in which they take no memory of the host; None is for some in fp32 among bf16."""
    base = write_pipeline(VARIANTS["2b"], tmp_path / "base", dtype=stored or torch.bfloat16)
    file = base / "transformer" / "diffusion_pytorch_model.safetensors"
    if stored is None:
        values = load_file(file)
        save_file(values | {"norm_out.linear.weight": values["norm_out.linear.weight"].float() + 1e-4}, file)
    read, load = [], CogVideoXTransformer3DModel.from_pretrained
    expected = load(base / "transformer", dtype=torch.float32)

    def noted(*args: Any, dtype: torch.dtype) -> CogVideoXTransformer3DModel:
        read.append(dtype)
        return load(*args, dtype=dtype)

    monkeypatch.setattr(CogVideoXTransformer3DModel, "from_pretrained", noted)
    plan = plan_for(clips, tmp_path / "out", model=str(base), steps=1, type="sft", precision="bf16")
    transformer = set_up_here(plan).train_state.transformer
    assert read == [stored or torch.float32]
    assert {weight.dtype for weight in transformer.parameters()} == {torch.float32}
    assert_same(dict(transformer.named_parameters()), dict(expected.named_parameters()))
    assert_same(dict(transformer.named_buffers()), dict(expected.named_buffers()))


def test_only_the_newest_checkpoints_are_kept(clips: Path, tmp_path: Path) -> None:
    train_here(plan_for(clips, tmp_path / "out", steps=5, checkpoint_every=1, keep_checkpoints=2))
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-4", "checkpoint-5"]


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_sample(clips: Path, tmp_path: Path) -> None:
    plan = plan_for(clips, tmp_path / "out", steps=12, checkpoint_every=1, eval_every=0, cache_dir=tmp_path / "cache")
    index = Index.read(plan.index)
    store = Store(tmp_path / "cache")
    poisoned = index.rows[3]
    store.write("latents", poisoned.latents, torch.full_like(store.read("latents", poisoned.latents), torch.nan))
    with pytest.raises(CogtuneError, match=r"step \d+: the (loss|gradient norm) is nan") as caught:
        train_here(plan)
    assert caught.value.details == (f"sample {poisoned.id}",)
    start = "resume from an earlier checkpoint" if checkpoints(tmp_path / "out") else "start over"
    assert caught.value.hint.startswith(start)
    for newest in checkpoints(tmp_path / "out")[-1:]:
        assert all(value.isfinite().all() for value in weights(newest).values())


def test_a_gradient_that_is_not_finite_stops_the_run_and_names_the_sample(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of every process: the norm is of them all."""
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    monkeypatch.setattr("cogtune.training.loop.gather_object", lambda mine: ["another's", *mine])
    with pytest.raises(CogtuneError, match="step 1: the gradient norm is inf") as caught:
        train_here(plan_for(clips, tmp_path / "out", steps=1))
    another, own = caught.value.details
    assert (own.split()[0], another) == ("sample", "sample another's")
    assert caught.value.hint.startswith("start over with a lower --learning-rate")
    assert checkpoints(tmp_path / "out") == []


def test_what_a_killed_run_measured_after_its_checkpoint_is_measured_anew(clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags: dict[str, Any] = {"steps": 4, "checkpoint_every": 2}
    straight = train_here(plan_for(clips, out, **flags))
    shutil.rmtree(out / "checkpoint-4")
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert train_here(plan_for(clips, out, resume="latest", overwrite=True, **flags)) == straight


def test_a_full_disk_during_a_save_leaves_the_earlier_checkpoint(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(clips, tmp_path / "out", steps=4, checkpoint_every=2)
    save, calls = torch.save, []

    def full(value: Any, path: Any) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(value, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CogtuneError, match="No space left"):
        train_here(plan)
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-2"]
    assert list((tmp_path / "out").glob(".*.partial")) == []
    monkeypatch.undo()
    monkeypatch.setattr(jobs, "fill_cache", fill_here)
    train_here(plan_for(clips, tmp_path / "out", steps=4, checkpoint_every=2, resume="latest"))
    assert (tmp_path / "out" / "checkpoint-4").is_dir()


def test_a_checkpoint_of_another_run_is_refused_with_every_difference(clips: Path, tmp_path: Path) -> None:
    train_here(plan_for(clips, tmp_path / "out", steps=1))
    with pytest.raises(CogtuneError, match="does not fit this run") as caught:
        plan_for(clips, tmp_path / "out", steps=2, resume="latest", rank=4, seed=1)
    assert [detail.split(":")[0] for detail in caught.value.details] == ["seed", "rank", "alpha"]
    assert "8 in the checkpoint, 4 now" in caught.value.details[1]


def test_a_checkpoint_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no checkpoint to resume from"):
        choose_checkpoint("latest", tmp_path)
    for path in (str(tmp_path / "checkpoint-3"), ""):
        with pytest.raises(UsageError, match=f"no such checkpoint: '{path}'"):
            choose_checkpoint(path, tmp_path)
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(CogtuneError, match=r"state\.json is missing"):
        read_state(tmp_path / "checkpoint-3")
    assert checkpoints(tmp_path) == []


def test_a_path_that_turned_out_empty_starts_no_new_run(clips: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such checkpoint: ''"):
        plan_for(clips, tmp_path / "out", steps=1, resume="")


def test_identities_are_compared_key_by_key(tmp_path: Path) -> None:
    check_fits(tmp_path, {"identity": {"a": 1, "old": 2}}, {"a": 1})
    with pytest.raises(CogtuneError):
        check_fits(tmp_path, {"identity": {"a": 1}}, {"a": 2})


def test_a_checkpoint_that_lacks_what_its_strategy_says_is_another_versions(tmp_path: Path) -> None:
    def told(**before: Any) -> str:
        with pytest.raises(CogtuneError) as caught:
            check_fits(tmp_path, {"identity": before}, resume_fingerprint(now, base="b", data="d"))
        return "; ".join([caught.value.message, *caught.value.details])

    now = RunConfig(strategy="zero2", num_processes=2)
    ours = resume_fingerprint(now, base="b", data="d")
    check_fits(tmp_path, {"identity": ours}, ours)
    older = {key: value for key, value in ours.items() if key != "shards"}
    assert "another version of cogtune: it does not record shards" in told(**older)
    other = told(**resume_fingerprint(RunConfig(num_processes=2), base="b", data="d"))
    assert other.endswith("does not fit this run; strategy: 'ddp' in the checkpoint, 'zero2' now")


def test_a_new_run_does_not_mix_with_an_old_one(clips: Path, tmp_path: Path) -> None:
    train_here(plan_for(clips, tmp_path / "out", steps=1))
    with pytest.raises(UsageError, match="already holds a run: checkpoint-1, pytorch_lora"):
        plan_for(clips, tmp_path / "out", steps=1)


def test_a_damaged_checkpoint_is_told(clips: Path, tmp_path: Path) -> None:
    train_here(plan_for(clips, tmp_path / "out", steps=1))
    optimizer = tmp_path / "out" / "checkpoint-1" / "optimizer.pt"
    whole, middle = optimizer.read_bytes(), optimizer.stat().st_size // 2
    flipped = whole[:middle] + bytes(255 - byte for byte in whole[middle : middle + 8]) + whole[middle + 8 :]
    lora = optimizer.with_name(LORA_WEIGHTS_NAME)
    weights = load_file(lora)
    broken = {name: torch.full_like(weight, math.nan) for name, weight in weights.items()}
    plan = plan_for(clips, tmp_path / "out", steps=2, resume="latest")
    for damage in (whole[:-100], flipped):
        optimizer.write_bytes(damage)
        with pytest.raises(CogtuneError, match="checkpoint-1 is damaged"):
            train_here(plan)
    train_here(plan_for(clips, tmp_path / "other", steps=1, seed=7))
    optimizer.write_bytes((tmp_path / "other" / "checkpoint-1" / "optimizer.pt").read_bytes())
    with pytest.raises(CogtuneError, match=r"optimizer\.pt is not the file that was saved with this checkpoint"):
        train_here(plan)
    optimizer.write_bytes(whole)
    saved = lora.read_bytes()
    save_file(broken, lora)
    with pytest.raises(CogtuneError, match=r"pytorch_lora_weights\.safetensors is not the file that was saved"):
        train_here(plan)
    state, sealed = optimizer.with_name("state.json"), optimizer.with_name("state.json").read_text()
    content = json.loads(sealed)
    earlier = {key: value for key, value in content.items() if key not in ("files", "checksum")}
    state.write_text(json.dumps(earlier))  # as an earlier version wrote it
    with pytest.raises(CogtuneError, match=r"checkpoint-1 is damaged: .* has values that are not finite"):
        train_here(plan)
    lora.write_bytes(saved)
    state.write_text(sealed)
    assert len(train_here(plan)) > 1


def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_encoded(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_here(plan_for(clips, tmp_path / "out", steps=2))
    monkeypatch.setattr(jobs, "fill_cache", None)
    with pytest.raises(CogtuneError, match="checkpoint-2 does not fit this run"):
        plan_for(clips, tmp_path / "out", steps=4, resume="latest", size="9x64x64", rank=4)
    with pytest.raises(UsageError, match="is at step 2, but the run ends at step 1"):
        plan_for(clips, tmp_path / "out", steps=1, resume="latest", validation_prompts="another one", sample_every=1)


def test_a_run_without_its_configuration_is_told(clips: Path, tmp_path: Path) -> None:
    train_here(plan_for(clips, tmp_path / "out", steps=1))
    (tmp_path / "out" / "run.yaml").unlink()
    with pytest.raises(UsageError, match=r"out/run\.yaml is missing") as caught:
        train.configure(preset_name=None, file=None, flags={"output": str(tmp_path / "out")}, resume="latest")
    assert "--preset or --config" in caught.value.hint


def test_the_lora_file_says_how_to_use_it(clips: Path, tmp_path: Path) -> None:
    train_here(plan_for(clips, tmp_path / "out", steps=1, alpha=4, id_token="sks"))
    from safetensors import safe_open

    with safe_open(tmp_path / "out" / LORA_WEIGHTS_NAME, framework="pt") as handle:
        metadata = handle.metadata()
    adapter, facts = json.loads(metadata["lora_adapter_metadata"]), json.loads(metadata["cogtune"])
    assert (adapter["transformer.r"], adapter["transformer.lora_alpha"]) == (8, 4.0)
    assert (facts["alpha"], facts["base_model"], facts["size"], facts["fps"], facts["step"]) == (
        4.0,
        "tiny:2b",
        "9x64x96",
        8.0,
        1,
    )
    assert facts["prompt"].startswith("sks ")


def test_metrics_hold_a_line_for_every_step(clips: Path, tmp_path: Path) -> None:
    train_here(plan_for(clips, tmp_path / "out", steps=3, eval_every=2))
    lines = read_lines(tmp_path / "out")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert list(evaluations(lines)) == [0, 2, 3]
    assert evaluations(train_here(plan_for(clips, tmp_path / "none", steps=1, eval_every=0))) == {}
    assert set(lines[0]["eval_loss_by_timestep"]) == {"125", "375", "625", "875"}


def test_targets_that_match_no_layer_are_told_before_anything_is_encoded(clips: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        plan_for(clips, tmp_path / "out", steps=1, target_modules=["to_q", "to_vv", "2", "attn1"])
    told = caught.value.details
    assert [line.split(";")[0] for line in told] == [
        "target_modules to_vv: no layer has this name",
        "target_modules 2: no layer has this name",
        "target_modules attn1: no layer has this name",
    ]
    assert "did you mean 'to_v'?" in told[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["2b", "1.5-5b-i2v"])
def test_an_adapter_on_every_layer_that_can_have_one_is_trained_and_loads(
    name: str, clips: Path, tmp_path: Path
) -> None:
    targets = names(published_spec(VARIANTS[name]))
    model: dict[str, Any] = {"model": f"tiny:{name}", "size": "9x64x96" if name == "2b" else "17x64x96"}
    plan = plan_for(clips, tmp_path / "out", steps=1, rank=2, learning_rate=1e-2, target_modules=targets, **model)
    train_here(plan)
    weights = load_file(tmp_path / "out" / LORA_WEIGHTS_NAME)
    trained = {key.split(".lora_")[0] for key in weights if "lora_B" in key and weights[key].any()}
    assert {key.removeprefix("transformer.") for key in trained} >= {"patch_embed.proj", "proj_out", "norm_out.linear"}
    plain = CogVideoXTransformer3DModel.from_pretrained(plan.base_model_dir / "transformer")
    plain.load_lora_adapter(tmp_path / "out", weight_name=LORA_WEIGHTS_NAME)
    loaded = plain.state_dict()
    for key, value in weights.items():
        layer, matrix, _ = key.removeprefix("transformer.").rsplit(".", 2)
        assert torch.equal(loaded[f"{layer}.{matrix}.default_0.weight"], value)


def test_plans_survive_the_disk(clips: Path, tmp_path: Path) -> None:
    plan = plan_for(clips, tmp_path / "out", steps=1)
    assert Plan.read(tmp_path / "out" / "launch" / "plan.json") == plan


def test_full_fine_tuning_is_sampled_from_its_run_with_the_runs_size_and_prompt(clips: Path, tmp_path: Path) -> None:
    from cogtune.commands.infer.filling import fill_in
    from cogtune.commands.infer.request import InferRequest

    train_here(plan_for(clips, tmp_path / "out", type="sft", steps=2, learning_rate=1e-2))
    request = InferRequest(model=str(tmp_path / "out"), steps=1)
    recipe = fill_in(request)
    assert recipe.transformer == tmp_path / "out" / "checkpoint-2" / "transformer"
    assert (str(recipe.size), recipe.fps, recipe.precision) == ("9x64x96", 8.0, "fp32")
    assert recipe.rows[0].prompt == (clips / "prompts.txt").read_text().splitlines()[0]
    trained = first_of(recipe)
    assert trained.shape == (9, 64, 96, 3)
    assert not np.array_equal(trained, first_of(replace(recipe, transformer=None)))


def test_overwrite_loses_nothing_when_the_new_run_cannot_start(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **_more: Any) -> None:
        raise CogtuneError("what only the worker finds")

    out = tmp_path / "out"
    train_here(plan_for(clips, out, steps=1))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and "launch" not in path.parts}
    for data, size in ((tmp_path / "typo", "9x64x96"), (clips, "10x10x10")):
        with pytest.raises(CogtuneError):
            plan_for(data, out, overwrite=True, steps=1, size=size)
    plan = plan_for(clips, out, overwrite=True, steps=1)
    with monkeypatch.context() as patch:
        patch.setattr("cogtune.training.setup.add_lora", broken)
        with pytest.raises(CogtuneError, match="what only the worker finds"):
            train_here(plan)
    assert {path: path.read_bytes() for path in before} == before
    train_here(plan_for(clips, out, overwrite=True, steps=2, seed=3))
    assert [path.name for path in checkpoints(out)] == ["checkpoint-2"]
    assert read_run(out).config.seed == 3


def test_a_finished_lora_alone_counts_as_a_run(clips: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LORA_WEIGHTS_NAME).write_bytes(b"precious")
    with pytest.raises(UsageError, match="already holds a run: pytorch_lora"):
        plan_for(clips, tmp_path / "out", steps=1)
    assert (tmp_path / "out" / LORA_WEIGHTS_NAME).read_bytes() == b"precious"


def test_a_run_from_an_older_checkpoint_leaves_no_trace_of_the_other_branch(clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train_here(plan_for(clips, out, steps=6, checkpoint_every=2, keep_checkpoints=9))
    older = str(out / "checkpoint-2")
    with pytest.raises(UsageError, match="holds checkpoint-4, checkpoint-6, which a run from checkpoint-2"):
        plan_for(clips, out, steps=3, resume=older)
    plan = plan_for(clips, out, steps=3, resume=older, overwrite=True, learning_rate=5e-3, keep_checkpoints=1)
    lines = train_here(plan)
    assert [path.name for path in checkpoints(out)] == ["checkpoint-3"]
    assert_same(load_file(out / LORA_WEIGHTS_NAME), weights(out / "checkpoint-3"))
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]


def test_resuming_into_another_folder_leaves_the_first_alone(clips: Path, tmp_path: Path) -> None:
    train_here(plan_for(clips, tmp_path / "out", steps=2, checkpoint_every=1))
    resume, flags = str(tmp_path / "out" / "checkpoint-1"), {"output": tmp_path / "other", "steps": 3}
    resolved = train.configure(preset_name=None, file=None, flags=flags, resume=resume)
    assert resolved.config.rank == 8
    ready = train.prepare_run(resolved, resume=resume, overwrite=False, dry_run=False)
    train_here(ready.plan)
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-1", "checkpoint-2"]
    assert checkpoints(tmp_path / "other")[-1].name == "checkpoint-3"


def test_a_dry_run_leaves_a_run_as_it_was(clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train_here(plan_for(clips, out, steps=1))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    resolved = resolve(preset_name="cpu-lora-tiny", flags={"data": clips, "output": out, "rank": 4})
    ready = train.prepare_run(resolved, resume=None, overwrite=True, dry_run=True)
    assert ready.files.folder == out / "dry-run"
    assert {path: path.read_bytes() for path in before} == before


def test_a_finished_run_cannot_end_before_its_checkpoint(clips: Path, tmp_path: Path) -> None:
    train_here(plan_for(clips, tmp_path / "out", steps=2))
    with pytest.raises(UsageError, match="is at step 2, but the run ends at step 1"):
        plan_for(clips, tmp_path / "out", steps=1, resume="latest")
    newest = str(tmp_path / "out" / "checkpoint-2")
    with pytest.raises(UsageError, match="is at step 2, but the run ends at step 2"):
        plan_for(clips, tmp_path / "other", steps=2, resume=newest)
    (tmp_path / "out" / LORA_WEIGHTS_NAME).unlink()  # as if killed between the last checkpoint and its publishing
    train_here(plan_for(clips, tmp_path / "out", steps=2, resume="latest"))
    assert (tmp_path / "out" / LORA_WEIGHTS_NAME).is_file()


def test_weights_that_have_diverged_are_neither_saved_nor_published(clips: Path, tmp_path: Path) -> None:
    plan = plan_for(clips, tmp_path / "out", steps=1, learning_rate=1e30)
    with pytest.raises(CogtuneError, match=r"the loss at fixed noise is (nan|inf); training has diverged"):
        train_here(plan)
    assert checkpoints(tmp_path / "out") == []
    assert not (tmp_path / "out" / LORA_WEIGHTS_NAME).exists()


def test_a_run_stopped_before_it_overwrites_another_does_not_go_on_with_that(clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = plan_for(clips, out, steps=2)
    train_here(first)
    assert how_to_go_on(first) == f"continue with: cogtune train --resume latest --output {out}"
    time.sleep(0.01)
    again = plan_for(clips, out, steps=9, overwrite=True)
    assert how_to_go_on(again) == "no checkpoint has been written yet; run the same command again to start over"
    train_here(again, stop_after=1)
    assert "--resume latest" in how_to_go_on(again)
    assert "--resume latest" in how_to_go_on(plan_for(clips, out, steps=9, resume="latest"))


def test_another_batch_size_is_another_run(clips: Path, tmp_path: Path) -> None:
    """Even with as many samples a step: batches of several sizes, and what layers drop, follow from it."""
    train_here(plan_for(clips, tmp_path / "out", steps=1, batch_size=2))
    with pytest.raises(CogtuneError, match="does not fit this run") as caught:
        plan_for(clips, tmp_path / "out", steps=2, resume="latest", batch_size=1, gradient_accumulation_steps=2)
    assert caught.value.details == ("batch_size: 2 in the checkpoint, 1 now",)


def test_the_time_of_a_checkpoint_is_no_steps(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = checkpoint.save

    def slowly(*words: Any) -> None:
        save(*words)
        time.sleep(5)

    monkeypatch.setattr(checkpoint, "save", slowly)
    train_here(plan_for(clips, tmp_path / "out", steps=2, checkpoint_every=1, eval_every=0))
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert lines[1]["seconds"] < 5


def test_a_checkpoint_holds_the_resolved_configuration(clips: Path, tmp_path: Path) -> None:
    plan = plan_for(clips, tmp_path / "out", steps=1, learning_rate=3e-4, lr_scheduler="cosine")
    train_here(plan)
    state = read_state(tmp_path / "out" / "checkpoint-1")
    assert RunConfig.model_validate(state["config"]) == plan.config
    assert (state["config"]["learning_rate"], state["config"]["lr_scheduler"]) == (3e-4, "cosine")


def test_a_warm_up_that_is_longer_than_the_epochs_is_refused(clips: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="50 must be less than the 12 steps of 2 epochs"):
        plan_for(clips, tmp_path / "out", epochs=2, warmup_steps=50)


@pytest.mark.parametrize(
    "error", [AssertionError(), TypeError("list indices must be integers"), AttributeError("x"), IndexError("y")]
)
def test_whatever_a_library_says_of_a_damaged_checkpoint_is_told(error: Exception, tmp_path: Path) -> None:
    class Engine:
        def load_checkpoint(self, *_words: Any, **_more: Any) -> None:
            raise error

    accelerator = SimpleNamespace(process_index=0)
    train_state = SimpleNamespace(is_zero=True, model=Engine(), is_lora=False, accelerator=accelerator)
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "state.json").write_text('{"format": 1, "step": 4, "identity": {}}')
    with pytest.raises(CogtuneError, match=r"checkpoint-4 is damaged: .+") as caught:
        checkpoint.load(train_state, tmp_path / "checkpoint-4")  # type: ignore[arg-type]
    assert caught.value.hint == "resume from an earlier checkpoint"


def test_a_damaged_state_is_told(clips: Path, tmp_path: Path) -> None:
    train_here(plan_for(clips, tmp_path / "out", steps=1))
    state = tmp_path / "out" / "checkpoint-1" / "state.json"
    state.write_text('{"format": 1, "step": 1, "identity": null}')
    with pytest.raises(CogtuneError, match=r"state\.json is damaged"):
        plan_for(clips, tmp_path / "out", steps=2, resume="latest")
    for step in ("", ', "step": -3, "identity": {}', ', "step": true, "identity": {}'):
        state.write_text('{"format": 1' + step + "}")
        with pytest.raises(CogtuneError, match=r"state\.json is damaged"):
            plan_for(clips, tmp_path / "out", steps=2, resume="latest")


def overflow_until(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the gradient of each step infinite before ``step``, the loss being as it is."""
    losses_of, calls = Objective.losses, []

    def overflowing(self: Objective, *args: Any, **kwargs: Any) -> torch.Tensor:
        losses = losses_of(self, *args, **kwargs)
        if losses.requires_grad:
            calls.append(args)
            if len(calls) < step:
                losses.register_hook(lambda gradient: gradient * math.inf)
        return losses

    monkeypatch.setattr(Objective, "losses", overflowing)


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    """What accelerate does under fp16 on a GPU, done on a CPU."""
    make = setup._accelerator

    def with_scaler(plan: Plan) -> Accelerator:
        accelerator = make(plan)
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")
        return accelerator

    monkeypatch.setattr(setup, "_accelerator", with_scaler)


@pytest.mark.slow
@pytest.mark.usefixtures("scaling")
def test_a_scaled_gradient_that_never_gets_finite_stops_the_run_and_names_the_sample(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overflow_until(1000, monkeypatch)
    plan = plan_for(clips, tmp_path / "out", steps=40, precision="fp16", checkpoint_every=5, eval_every=0)
    with pytest.raises(CogtuneError, match=r"step 16: the gradient norm is (inf|nan)") as caught:
        train_here(plan)
    assert [detail.split()[0] for detail in caught.value.details] == ["sample"]
    newest = checkpoints(tmp_path / "out")[-1]
    assert newest.name == "checkpoint-15"
    assert all(not value.any() for name, value in weights(newest).items() if "lora_B" in name)  # as they began


def overflow_always() -> None:
    overflow_until(1000, pytest.MonkeyPatch())


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_fp16_supported(), reason="DeepSpeed has no fp16 on this CPU")
@pytest.mark.parametrize("strategy", sampled(["zero2", "zero3-offload"], "zero3-offload"))
def test_one_that_deepspeed_scales_stops_the_run_too(strategy: str, clips: Path, tmp_path: Path) -> None:
    flags: dict[str, Any] = {"type": "sft", "strategy": strategy, "num_processes": 2, "precision": "fp16"}
    plan = plan_for(clips, tmp_path / "out", steps=40, checkpoint_every=5, eval_every=0, **flags)
    for process in start_workers(plan, overflow_always):
        process.join(600)
    for rank in (0, 1):
        said = LaunchFiles(tmp_path / "out" / "launch").report(rank).read()
        assert said is not None
        assert said["message"] == "step 17: the gradient norm is inf"
        assert [detail.split()[0] for detail in said["details"]] == ["sample", "sample"]  # one of each process
    assert checkpoints(tmp_path / "out")[-1].name == "checkpoint-15"


@pytest.mark.slow
@pytest.mark.usefixtures("scaling")
def test_a_scaled_gradient_may_overflow_for_a_while(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overflow_until(16, monkeypatch)
    lines = train_here(plan_for(clips, tmp_path / "out", steps=18, precision="fp16", eval_every=0))
    assert [math.isfinite(line["grad_norm"]) for line in lines] == [False] * 15 + [True] * 3
    assert any(value.any() for name, value in weights(tmp_path / "out").items() if "lora_B" in name)


def test_the_loss_scale_comes_before_the_mean_over_accumulated_passes(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Else a step of two passes overflows at another scale than the same step on two processes."""
    losses_of, scales = Objective.losses, list[float]()

    def seen(self: Objective, *args: Any, **kwargs: Any) -> torch.Tensor:
        losses = losses_of(self, *args, **kwargs)
        if losses.requires_grad:
            losses.register_hook(lambda gradient: scales.append(float(gradient.sum())))
        return losses

    monkeypatch.setattr(Objective, "losses", seen)
    flags: dict[str, Any] = {"steps": 2, "precision": "fp16", "eval_every": 0, "learning_rate": 1e-3}
    accumulated: dict[str, Any] = {**flags, "gradient_accumulation_steps": 2}
    unscaled = train_here(plan_for(clips, tmp_path / "unscaled", **accumulated))
    assert scales == [0.5] * 4
    request.getfixturevalue("scaling")
    scales.clear()
    scaled = train_here(plan_for(clips, tmp_path / "scaled", **accumulated))
    train_here(plan_for(clips, tmp_path / "alone", **flags))
    assert scales == [65536.0] * 6
    for one, other in zip(scaled, unscaled, strict=True):
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.02)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch's compiler uses what torch deprecates
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # and looks at what it warns of
def test_compiled_blocks_train_as_eager_ones_do(one_clip: Path, tmp_path: Path) -> None:
    eager = train_here(plan_for(one_clip, tmp_path / "eager", steps=3, compile=False))
    before = torch._dynamo.config.cache_size_limit
    compiled = train_here(plan_for(one_clip, tmp_path / "compiled", steps=3, compile=True))
    assert [line["loss"] for line in compiled if "loss" in line] == pytest.approx(
        [line["loss"] for line in eager if "loss" in line], rel=1e-5
    )
    assert torch._dynamo.config.cache_size_limit == before
    ours, theirs = (weights(tmp_path / name / "checkpoint-3") for name in ("compiled", "eager"))
    assert ours.keys() == theirs.keys()  # a compiled module's names have no prefix of their own
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-3, atol=1e-5)


def test_the_loss_scale_of_fp16_is_in_the_checkpoint(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scaler that has already come down from its start is not sent up again by a resume; fp16 itself needs a GPU."""
    plan = plan_for(clips, tmp_path / "out", steps=1)
    train_state = set_up_here(plan).train_state
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=50)
    monkeypatch.setattr(train_state.accelerator, "scaler", scaler)
    scaler.scale(torch.ones(()))
    monkeypatch.setattr(scaler, "_growth_tracker", torch.tensor(7, dtype=torch.int32))
    checkpoint.save(train_state, plan.config, 1, {"identity": {}})
    fresh = torch.amp.GradScaler("cpu", init_scale=65536.0)
    monkeypatch.setattr(train_state.accelerator, "scaler", fresh)
    checkpoint.load(train_state, tmp_path / "out" / "checkpoint-1")
    assert fresh.get_scale() == 1024.0
    assert fresh.state_dict()["_growth_tracker"] == 7
    assert fresh.get_growth_interval() == 50


@pytest.mark.parametrize(("room", "ahead"), [(64 << 20, 8), (1, 2)])
def test_more_of_small_batches_are_read_ahead(
    clips: Path, tmp_path: Path, room: int, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as there are cores for, since drawing their noise may take longer than a step; of large ones a few."""
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(reading, "_BYTES_AHEAD", room)
    plan = plan_for(clips, tmp_path / "out", batch_size=2, steps=20)
    train_here(plan, stop_after=1)
    seen: list[tuple[int, ...]] = []
    share = RankSampler(seed=0, batch_size=2, accumulation=1, world_size=1, rank=0)
    store, index = Store(plan.config.cache_dir or Path()), Index.read(plan.index)
    steps = batches(store, index, share, 0, 20, lambda batch: seen.append(batch.ordinals))
    next(steps)  # the first says how large they are
    next(steps)
    wait_until(lambda: len(seen) == ahead + 2)
    del steps  # waits for its threads
    assert len(seen) == ahead + 2
    assert sorted(seen) == [(2 * step, 2 * step + 1) for step in range(ahead + 2)]
