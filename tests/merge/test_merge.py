"""cogtune.merge: ZeRO checkpoints, made by DeepSpeed itself and made up here, against what they should become."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file

from cogtune.merge import merge_checkpoint
from cogtune.merge.archive import read_archive
from cogtune.merge.checkpoint_formats import read_checkpoint
from cogtune.merge.sources import Source
from cogtune.merge.write import parse_size, write_safetensors
from cogtune.modeling.adapters import save_lora
from cogtune.models.variants import LORA_WEIGHTS_NAME
from cogtune.run.checkpoints import fingerprints, read_lora_facts
from cogtune.system.errors import CogtuneError, UsageError
from tests.support.merging import Bomb, assert_same, loaded, rank_file, train_with_deepspeed
from tests.support.sampling import sampled
from tests.support.zero_checkpoints import BUFFER, CONFIG, random_model, random_weights, write_zero

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder with a real transformer; of the other components there is a file each."""
    folder = tmp_path_factory.mktemp("base")
    random_model(seed=1).save_pretrained(folder / "transformer")
    index: dict[str, Any] = {"_class_name": "CogVideoXPipeline", "_diffusers_version": "0.42.1"}
    for name in ("scheduler", "text_encoder", "tokenizer", "vae"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({"of": name}))
        index[name] = ["diffusers", "Some"]
    for name in ("text_encoder", "vae"):
        (folder / name / "model.safetensors").touch()
    for name, config in (("scheduler", "scheduler_config.json"), ("tokenizer", "tokenizer_config.json")):
        (folder / name / "config.json").rename(folder / name / config)
    index |= {"transformer": ["diffusers", "CogVideoXTransformer3DModel"], "feature_extractor": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def flip(path: Path, record: str) -> None:
    """Change one bit in the middle of a zip member's bytes."""
    with zipfile.ZipFile(path) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith(record))
        content = archive.read(info)
    data = bytearray(path.read_bytes())
    data[data.index(content) + len(content) // 2] ^= 16
    path.write_bytes(data)


# ---- formats


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_format_gives_every_weight(tmp_path: Path, base: Path, stage: int, ranks: int) -> None:
    weights = random_weights()
    checkpoint = write_zero(tmp_path / "checkpoint-7", weights, stage=stage, ranks=ranks)
    result = merge_checkpoint(checkpoint, base=base / "transformer")
    assert (result.kind, result.stage, result.world_size) == ("transformer", stage, ranks)
    assert (result.tensors, result.parameters) == (41, sum(value.numel() for value in weights.values()))
    assert result.output == result.weights == tmp_path / "checkpoint-7-merged"
    assert_same(load_file(result.weights / "diffusion_pytorch_model.safetensors"), weights)


def test_it_loads_with_from_pretrained_and_computes_the_same(tmp_path: Path, base: Path) -> None:
    model = random_model()
    checkpoint = write_zero(tmp_path / "c", random_weights(), stage=3)
    merged = CogVideoXTransformer3DModel.from_pretrained(merge_checkpoint(checkpoint, base=base).weights).float()
    torch.manual_seed(0)
    inputs = (torch.randn(1, 3, 4, 4, 4), torch.randn(1, 5, 17), torch.tensor([500]))
    with torch.no_grad():
        got, want = (each(*inputs, return_dict=False)[0] for each in (merged, model))
    # mapped weights are not aligned in memory as others are, for which matrix products round differently
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-3)
    assert want.abs().mean() > 100


def test_values_between_parameters_are_skipped(tmp_path: Path, base: Path) -> None:
    weights = random_weights()
    checkpoint = write_zero(tmp_path / "c", weights, alignment=3)
    assert_same(loaded(merge_checkpoint(checkpoint, base=base).weights), weights)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_frozen_parameters_come_along(tmp_path: Path, base: Path, stage: int) -> None:
    weights = random_weights()
    frozen = [name for name in weights if "attn1" not in name]
    checkpoint = write_zero(tmp_path / "c", weights, stage=stage, ranks=3, frozen=frozen)
    assert_same(loaded(merge_checkpoint(checkpoint, base=base).weights), weights)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "transformer."])
def test_wrappers_leave_no_trace_in_the_names(tmp_path: Path, base: Path, prefix: str) -> None:
    weights = random_weights()
    wrapped = {prefix + name: value for name, value in weights.items() if name != BUFFER}
    checkpoint = write_zero(tmp_path / "c", wrapped)
    path = next(checkpoint.glob("*/*_model_states.pt"))
    state = torch.load(path)
    state["module"] |= {prefix + BUFFER: weights[BUFFER], "ema.decay": torch.ones(1)}
    torch.save(state, path)
    result = merge_checkpoint(checkpoint, base=base)
    assert_same(loaded(result.weights), weights)
    assert json.loads((result.output / "merge.json").read_text())["left_out"] == ["ema.decay"]


def test_blocks_compiled_one_by_one(tmp_path: Path, base: Path) -> None:
    weights = random_weights()
    wrapped = {re.sub(r"(transformer_blocks\.\d+\.)", r"\1_orig_mod.", name): value for name, value in weights.items()}
    assert sum("_orig_mod" in name for name in wrapped) == 24
    assert_same(loaded(merge_checkpoint(write_zero(tmp_path / "c", wrapped), base=base).weights), weights)


# ---- the folder


def test_the_whole_pipeline_where_the_base_is_one(tmp_path: Path, base: Path) -> None:
    checkpoint = write_zero(tmp_path / "run" / "checkpoint-500", random_weights())
    result = merge_checkpoint(checkpoint, base=base)
    assert result.kind == "pipeline"
    assert result.output == tmp_path / "run" / "checkpoint-500-merged"
    assert result.weights == result.output / "transformer"
    assert (result.output / "model_index.json").read_bytes() == (base / "model_index.json").read_bytes()
    assert {path.name for path in result.output.iterdir()} == {
        *("model_index.json", "merge.json", "transformer", "scheduler", "text_encoder", "tokenizer", "vae")
    }
    moved = result.output.rename(tmp_path / "elsewhere")
    assert (moved / "vae").is_symlink()
    assert json.loads((moved / "vae" / "config.json").read_text()) == {"of": "vae"}
    assert_same(loaded(moved / "transformer"), random_weights())


def test_copies_on_request(tmp_path: Path, base: Path) -> None:
    result = merge_checkpoint(write_zero(tmp_path / "c", random_weights()), base=base, copy_base=True)
    assert not any(path.is_symlink() for path in result.output.rglob("*"))
    assert json.loads((result.output / "vae" / "config.json").read_text()) == {"of": "vae"}


def test_a_checkpoint_of_cogtune_names_its_base(tmp_path: Path, base: Path) -> None:
    checkpoint = write_zero(tmp_path / "c", random_weights())
    state = {"format": 1, "step": 500, "type": "sft", "base_model": "5b-i2v", "model_path": str(base)}
    (checkpoint / "state.json").write_text(json.dumps(state))
    result = merge_checkpoint(checkpoint, tmp_path / "out")
    assert result.kind == "pipeline"
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["step"] == 500
    assert record["run"] == state


def test_without_a_base_it_says_what_is_missing(tmp_path: Path) -> None:
    checkpoint = write_zero(tmp_path / "c", random_weights())
    with pytest.raises(CogtuneError, match="does not record its base model") as caught:
        merge_checkpoint(checkpoint)
    assert "--model" in caught.value.hint
    (checkpoint / "state.json").write_text(json.dumps({"format": 1, "model_path": "/gone"}))
    with pytest.raises(CogtuneError, match="no base model in /gone"):
        merge_checkpoint(checkpoint)


def test_an_incomplete_base_gives_the_transformer(tmp_path: Path, base: Path) -> None:
    configs_only = shutil.copytree(base, tmp_path / "base")
    (configs_only / "vae" / "model.safetensors").unlink()
    shutil.rmtree(configs_only / "tokenizer")
    result = merge_checkpoint(write_zero(tmp_path / "c", random_weights()), base=configs_only, copy_base=True)
    assert (result.kind, result.weights) == ("transformer", tmp_path / "c-merged")
    assert result.missing == ("tokenizer/", "the weights in vae/")
    assert_same(loaded(result.weights), random_weights())


def test_it_does_not_overwrite_what_it_did_not_make(tmp_path: Path, base: Path) -> None:
    checkpoint = write_zero(tmp_path / "c", random_weights())
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not an earlier merge"):
        merge_checkpoint(checkpoint, output, base=base)
    assert (output / "thesis.txt").read_text() == "years of work"
    merge_checkpoint(checkpoint, output, base=base, force=True)
    assert not (output / "thesis.txt").exists()
    merge_checkpoint(checkpoint, output, base=base / "transformer")  # an earlier merge is replaced whole
    assert not (output / "transformer").exists()
    merge_checkpoint(checkpoint, output, base=base, copy_base=True)
    (output / "vae" / "notes.txt").write_text("years of work")
    with pytest.raises(UsageError, match="contains files that the earlier merge did not write") as caught:
        merge_checkpoint(checkpoint, output, base=base)
    assert caught.value.details == ("vae/notes.txt",)
    (output / "vae" / "notes.txt").unlink()
    for _ in range(2):
        merge_checkpoint(checkpoint, output, base=base)
    assert (output / "vae").is_symlink()
    for _ in range(2):
        merge_checkpoint(checkpoint, checkpoint / "merged", base=base)
    for inside in (checkpoint, checkpoint / "pytorch_model", tmp_path, base, base / "transformer", base / "vae"):
        with pytest.raises(UsageError, match="which is read"):
            merge_checkpoint(checkpoint, inside, base=base, force=True)


# ---- types, shards, proof


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", None), ("fp16", None), ("fp32", None), ("fp32", "bf16")])
def test_the_type_is_the_runs_own_or_the_one_asked_for(tmp_path: Path, base: Path, precision: str, dtype: Any) -> None:
    weights = random_weights()
    checkpoint = write_zero(tmp_path / "c", weights, stage=3, precision=precision)
    result = merge_checkpoint(checkpoint, base=base, dtype=dtype)
    assert result.dtype == (dtype or precision)
    low = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[result.dtype]
    got = load_file(result.weights / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in got.values()} == {low}
    assert_same(got, {name: value.to(low) for name, value in weights.items()})


def test_fp32_keeps_the_master_weights_of_a_bf16_run(tmp_path: Path, base: Path) -> None:
    weights = random_weights()
    checkpoint = write_zero(tmp_path / "c", weights, precision="bf16")
    got = loaded(merge_checkpoint(checkpoint, base=base, dtype="fp32").weights)
    weights[BUFFER] = weights[BUFFER].bfloat16().float()  # buffers have no master
    assert_same(got, weights)


def test_shards_of_the_asked_for_size(tmp_path: Path, base: Path) -> None:
    weights = random_weights()
    result = merge_checkpoint(write_zero(tmp_path / "c", weights), base=base, max_shard_size="30KB")
    names = sorted(path.name for path in result.weights.glob("*.safetensors"))
    total = sum(value.numel() * 4 for value in weights.values())
    assert names == [
        f"diffusion_pytorch_model-{n:05d}-of-{len(names):05d}.safetensors" for n in range(1, len(names) + 1)
    ]
    assert total / 30e3 < len(names) < 2 * total / 30e3
    assert max(sum(v.numel() * 4 for v in load_file(result.weights / name).values()) for name in names) <= 30e3
    index = json.loads((result.weights / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total
    assert set(index["weight_map"]) == set(weights)
    assert_same(loaded(result.weights), weights)


def test_sizes() -> None:
    assert [parse_size(text) for text in ("5GB", "1.5 GiB", "200kb", 77)] == [5 * 10**9, 3 * 2**29, 200_000, 77]
    for wrong in ("5 parsecs", "", "0GB", "-1"):
        with pytest.raises(UsageError, match="not a size"):
            parse_size(wrong)


def test_merge_json_has_the_norms_of_what_was_written(tmp_path: Path, base: Path) -> None:
    weights = random_weights()
    result = merge_checkpoint(write_zero(tmp_path / "c", weights), base=base)
    record = json.loads((result.output / "merge.json").read_text())
    norm = math.sqrt(sum(float(value.double().pow(2).sum()) for value in weights.values()))
    assert record["norm"] == pytest.approx(norm, rel=1e-12)
    block = [value for name, value in weights.items() if name.startswith("transformer_blocks.0.")]
    assert record["norms"]["transformer_blocks.0"] == pytest.approx(
        math.sqrt(sum(float(value.double().pow(2).sum()) for value in block)), rel=1e-12
    )
    assert math.sqrt(sum(value**2 for value in record["norms"].values())) == pytest.approx(norm, rel=1e-12)
    assert record["tensors"] == 41
    assert record["compared_with_base"] is True


@pytest.mark.parametrize(("value", "dtype"), [(math.nan, "fp32"), (math.inf, "bf16"), (70000.0, "fp16")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, base: Path, value: float, dtype: Any) -> None:
    weights = random_weights()
    weights["proj_out.weight"][1, 2] = value
    weights["norm_final.bias"][0] = value
    with pytest.raises(CogtuneError, match="are invalid") as caught:
        merge_checkpoint(write_zero(tmp_path / "c", weights), base=base, dtype=dtype)
    assert sorted(detail.split()[0] for detail in caught.value.details) == ["norm_final.bias", "proj_out.weight"]
    assert all(("too large for torch.float16" if dtype == "fp16" else "not finite") in d for d in caught.value.details)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_progress_ends_at_its_total(tmp_path: Path, base: Path) -> None:
    calls: list[tuple[int, int]] = []
    merge_checkpoint(
        write_zero(tmp_path / "c", random_weights()),
        base=base,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == sorted(calls)
    assert calls[-1][0] == calls[-1][1]
    assert len({total for _, total in calls}) == 1


def test_pieces_are_not_shared_out_over_threads(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread more costs more than it brings: two write 0.2 GB/s where one writes 1.5."""
    seen = []

    def write(*arguments: Any) -> Any:
        seen.append(torch.get_num_threads())
        return write_safetensors(*arguments)

    monkeypatch.setattr("cogtune.merge.checkpoint.write_safetensors", write)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        merge_checkpoint(write_zero(tmp_path / "c", random_weights()), base=base)
        assert (seen, torch.get_num_threads()) == ([1], 3)
    finally:
        torch.set_num_threads(before)


def test_another_model_is_refused_with_every_difference(tmp_path: Path, base: Path) -> None:
    checkpoint = write_zero(tmp_path / "c", random_weights(time_embed_dim=12, num_layers=2))
    with pytest.raises(CogtuneError, match="does not fit") as caught:
        merge_checkpoint(checkpoint, base=base)
    details = "\n".join(caught.value.details)
    assert "transformer_blocks.1.norm1.linear.weight was trained but does not exist in the base model" in details
    assert "and 11 more" in details
    small = write_zero(tmp_path / "d", random_weights(time_embed_dim=12))
    with pytest.raises(CogtuneError) as caught:
        merge_checkpoint(small, base=base)
    assert "time_embedding.linear_1.weight is 12x32, but 13x32 in the base model" in caught.value.details


def test_parameters_that_were_not_saved_are_named(tmp_path: Path, base: Path) -> None:
    frozen = ["proj_out.weight", "norm_final.bias"]
    checkpoint = write_zero(tmp_path / "c", random_weights(), frozen=frozen, with_frozen=False)
    (tmp_path / "base").mkdir()
    shutil.copy(base / "transformer" / "config.json", tmp_path / "base")  # its weights are on another machine
    with pytest.raises(CogtuneError, match="does not fit") as caught:
        merge_checkpoint(checkpoint, base=tmp_path / "base")
    assert sorted(caught.value.details) == ["norm_final.bias is missing", "proj_out.weight is missing"]


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_frozen_parameters_that_were_not_saved_are_the_base_models(
    tmp_path: Path, base: Path, stage: int, shards: int
) -> None:
    start, weights = random_model(seed=1), random_weights()
    if shards > 1:
        start.save_pretrained(tmp_path / "base", max_shard_size="30KB")
    own = dict(start.state_dict())
    frozen = [name for name in weights if "attn1" not in name and name != BUFFER]
    checkpoint = write_zero(tmp_path / "c", weights, stage=stage, frozen=frozen, with_frozen=False)
    result = merge_checkpoint(checkpoint, base=base if shards == 1 else tmp_path / "base")
    assert result.from_base == len(frozen) > 10
    assert json.loads((result.output / "merge.json").read_text())["from_base"] == [n for n in own if n in frozen]
    assert_same(loaded(result.weights), {name: own[name] if name in frozen else weights[name] for name in weights})


# ---- damage


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a rank's file is missing": (
        lambda folder: rank_file(folder, 1).unlink(),
        ["zero_pp_rank_1_mp_rank_00_optim_states.pt is missing: the run had 3 ranks"],
    ),
    "a model file is missing": (
        lambda folder: rank_file(folder, 2, "model").unlink(),
        ["zero_pp_rank_2_mp_rank_00_model_states.pt is missing: the run had 3 ranks"],
    ),
    "a file is cut short": (
        lambda folder: cut_short(rank_file(folder, 1)),
        ["zero_pp_rank_1_mp_rank_00_optim_states.pt is truncated, or was not written by torch.save"],
    ),
    "a file is empty": (
        lambda folder: rank_file(folder, 0).write_bytes(b""),
        ["zero_pp_rank_0_mp_rank_00_optim_states.pt is truncated, or was not written by torch.save"],
    ),
    "two things at once": (
        lambda folder: (cut_short(rank_file(folder, 2)), rank_file(folder, 0, "model").unlink()),
        [
            "zero_pp_rank_2_mp_rank_00_optim_states.pt is truncated, or was not written by torch.save",
            "zero_pp_rank_0_mp_rank_00_model_states.pt is missing: the run had 3 ranks",
        ],
    ),
    "a bit of the weights has changed": (
        lambda folder: flip(rank_file(folder, 1), "/data/0"),
        ["zero_pp_rank_1_mp_rank_00_optim_states.pt is damaged: checksum mismatch in its weights"],
    ),
    "a bit of the description has changed": (
        lambda folder: flip(rank_file(folder, 1), "/data.pkl"),
        ["zero_pp_rank_1_mp_rank_00_optim_states.pt is damaged: checksum mismatch in its index"],
    ),
    "a file of a larger run was left": (
        lambda folder: shutil.copy(rank_file(folder, 1), rank_file(folder, 3)),
        ["zero_pp_rank_3_mp_rank_00_optim_states.pt does not belong here: the run had ranks 0 to 2"],
    ),
    "all optimizer files are missing": (
        lambda folder: [rank_file(folder, rank).unlink() for rank in range(3)],
        ["pytorch_model has no file *_optim_states.pt, where the weights are in fp32"],
    ),
    "a rank saved another model": (
        lambda folder: torch.save(
            {"optimizer_state_dict": {"zero_stage": 3, "partition_count": 3, "fp32_flat_groups": [torch.ones(5)]}},
            rank_file(folder, 1),
        ),
        ["the optimizer files are of different steps: rank 0 at 7, rank 1 at None, rank 2 at 7"],
    ),
    "a rank's share is short": (
        lambda folder: _shorten(rank_file(folder, 1)),
        ["rank 1's share is 7,160 values in fp32, its file holds 7,158"],
    ),
    "not a ZeRO run's file": (
        lambda folder: torch.save([1, 2], rank_file(folder, 0)),
        ["zero_pp_rank_0_mp_rank_00_optim_states.pt is not a file of a ZeRO run: it has no 'optimizer_state_dict'"],
    ),
}


def _shorten(path: Path) -> None:
    content = torch.load(path)
    state = content["optimizer_state_dict"]
    state["fp32_flat_groups"][1] = state["fp32_flat_groups"][1][:-2].clone()
    torch.save(content, path)


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_refused_by_name_and_leaves_nothing(tmp_path: Path, base: Path, what: str) -> None:
    damage, problems = DAMAGE[what]
    checkpoint = write_zero(tmp_path / "checkpoint-7", random_weights(), stage=3, ranks=3)
    damage(checkpoint)
    with pytest.raises(CogtuneError, match=r"checkpoint-7 is damaged") as caught:
        merge_checkpoint(checkpoint, base=base)
    assert list(caught.value.details) == problems
    assert "earlier" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-7"]


def test_files_of_two_saves(tmp_path: Path, base: Path) -> None:
    checkpoint = write_zero(tmp_path / "c", random_weights(), ranks=3, step=500)
    later = write_zero(tmp_path / "later", random_weights(1), ranks=3, step=1000)
    shutil.copy(rank_file(later, 1), rank_file(checkpoint, 1))
    with pytest.raises(CogtuneError) as caught:
        merge_checkpoint(checkpoint, base=base)
    assert caught.value.details == (
        "the optimizer files are of different steps: rank 0 at 500, rank 1 at 1000, rank 2 at 500",
    )
    write_zero(tmp_path / "pair", random_weights(), ranks=2, step=500)
    shutil.copy(rank_file(tmp_path / "pair", 1), rank_file(checkpoint, 1))
    with pytest.raises(CogtuneError, match="damaged or incomplete") as caught:
        merge_checkpoint(checkpoint, base=base)
    assert "the files are from different runs: stage 2 on 2 ranks, stage 2 on 3 ranks" in caught.value.details


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_ranks_file_in_place_of_anothers(tmp_path: Path, base: Path, stage: int) -> None:
    weights = random_weights()
    checkpoint = write_zero(tmp_path / "c", weights, stage=stage, ranks=3, frozen=[*weights][:4])
    kinds = ["optim", "model"] if stage == 3 else ["optim"]  # frozen weights are shared out at stage 3 alone
    for kind in kinds:
        shutil.copy(rank_file(checkpoint, 0, kind), rank_file(checkpoint, 2, kind))
    with pytest.raises(CogtuneError, match="damaged or incomplete") as caught:
        merge_checkpoint(checkpoint, base=base)
    assert list(caught.value.details) == [
        f"zero_pp_rank_2_mp_rank_00_{kind}_states.pt was saved as zero_pp_rank_0_mp_rank_00_{kind}_states.pt: it is "
        "another rank's"
        for kind in kinds
    ]
    for kind in kinds:  # written through a buffer, they do not say under which name
        with rank_file(checkpoint, 2, kind).open("wb") as file:
            torch.save(torch.load(rank_file(checkpoint, 0, kind)), file)
    with pytest.raises(CogtuneError, match="damaged or incomplete") as caught:
        merge_checkpoint(checkpoint, base=base)
    assert list(caught.value.details) == [
        f"zero_pp_rank_0_mp_rank_00_{kind}_states.pt and zero_pp_rank_2_mp_rank_00_{kind}_states.pt hold the same "
        "weights: one was copied over the other"
        for kind in kinds
    ]


@pytest.mark.parametrize("stage", [2, 3])
def test_files_of_two_ranks_that_were_exchanged(tmp_path: Path, base: Path, stage: int) -> None:
    checkpoint = write_zero(tmp_path / "c", random_weights(), stage=stage, ranks=2)
    rank_file(checkpoint, 0).rename(tmp_path / "aside")
    rank_file(checkpoint, 1).rename(rank_file(checkpoint, 0))
    (tmp_path / "aside").rename(rank_file(checkpoint, 1))
    with pytest.raises(CogtuneError, match="damaged or incomplete") as caught:
        merge_checkpoint(checkpoint, base=base)
    assert len(caught.value.details) == 2
    assert not (tmp_path / "c-merged").exists()


def test_a_file_of_another_run_with_the_same_shapes_and_step(tmp_path: Path, base: Path) -> None:
    checkpoint = write_zero(tmp_path / "c", random_weights(), ranks=2)
    files = fingerprints((checkpoint / "pytorch_model").glob("*.pt"), checkpoint)
    (checkpoint / "state.json").write_text(json.dumps({"format": 1, "files": files}))
    merge_checkpoint(checkpoint, base=base)
    assert "files" not in json.loads((tmp_path / "c-merged" / "merge.json").read_text())["run"]
    shutil.rmtree(tmp_path / "c-merged")
    other = write_zero(tmp_path / "other", random_weights(1), ranks=2)
    shutil.copy(rank_file(other, 1), rank_file(checkpoint, 1))
    with pytest.raises(CogtuneError, match="damaged or incomplete") as caught:
        merge_checkpoint(checkpoint, base=base)
    assert caught.value.details == (
        f"pytorch_model/{rank_file(other, 1).name} is not the file that was saved with this checkpoint",
    )
    assert not (tmp_path / "c-merged").exists()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ranks_that_hold_padding_alone_are_no_copies(tmp_path: Path, stage: int) -> None:
    weights = {"a": torch.randn(1), "b": torch.randn(2), "frozen": torch.randn(2)}
    checkpoint = write_zero(tmp_path / "c", weights, stage=stage, ranks=8, frozen=["frozen"])
    for path in (checkpoint / "pytorch_model").glob("*_optim_states.pt"):  # each with bytes of its own, as of DeepSpeed
        content = torch.load(path)
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        state = content["optimizer_state_dict"]
        state[key] = [flat.clone() for flat in state[key]]
        torch.save(content, path)
    read = read_checkpoint(checkpoint)
    assert_same({name: torch.cat([*read.trained[name].chunks()]) for name in "ab"}, {n: weights[n] for n in "ab"})


@pytest.mark.parametrize("stage", [2, 3])
def test_a_file_without_checksums_is_read(tmp_path: Path, base: Path, stage: int) -> None:
    weights = random_weights()
    torch.serialization.set_crc32_options(False)
    try:
        checkpoint = write_zero(tmp_path / "c", weights, stage=stage)
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(loaded(merge_checkpoint(checkpoint, base=base).weights), weights)


def test_what_is_not_a_zero_checkpoint(tmp_path: Path, base: Path) -> None:
    def refusal(folder: Path) -> CogtuneError:
        with pytest.raises(CogtuneError) as caught:
            merge_checkpoint(folder, base=base)
        return caught.value

    assert refusal(tmp_path / "nowhere").message == f"no such folder: {tmp_path / 'nowhere'}"
    (tmp_path / "last.ckpt").touch()
    assert refusal(tmp_path / "last.ckpt").message == f"{tmp_path / 'last.ckpt'} is a file, not a checkpoint's folder"
    (tmp_path / "last.ckpt").unlink()
    assert "pass a folder written by" in refusal(tmp_path).hint

    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "model.safetensors").touch()
    (plain / "optimizer.bin").touch()
    assert "neither a ZeRO nor" in refusal(plain).message
    assert refusal(plain).hint.startswith("it holds model.safetensors: such a file needs no merging; to sample")
    (plain / "transformer").mkdir()
    (plain / "model.safetensors").rename(plain / "transformer" / "model.safetensors")  # full training without ZeRO
    assert refusal(plain).hint.startswith(
        "it holds transformer/model.safetensors: such a file needs no merging; to sample"
    )

    run = tmp_path / "run"
    checkpoint = write_zero(run / "checkpoint-500", random_weights())
    assert refusal(run).hint == f"pass one of its checkpoints, such as {checkpoint}"

    (checkpoint / "latest").write_text("global_step7\n")
    assert refusal(checkpoint).message.startswith(f"{checkpoint / 'latest'} names 'global_step7', but")
    (checkpoint / "latest").write_text("\n")
    assert refusal(checkpoint).message == f"{checkpoint / 'latest'} is empty"
    (checkpoint / "latest").write_text("../checkpoint-500/pytorch_model")
    assert "has no such folder" in refusal(checkpoint).message

    (checkpoint / "latest").unlink()
    assert "the file 'latest' is missing, which is written last" in refusal(checkpoint).hint
    result = merge_checkpoint(checkpoint / "pytorch_model", base=base)  # asked for by name, it is tried
    assert result.output == run.resolve() / "checkpoint-500-merged"


@pytest.mark.parametrize("stage", [2, 3])
def test_damage_anywhere_is_refused_or_harmless(tmp_path: Path, base: Path, stage: int) -> None:
    weights = random_weights()
    checkpoint = write_zero(tmp_path / "c", weights, stage=stage)
    paths = sorted((checkpoint / "pytorch_model").iterdir())
    chance = random.Random(20)
    refusals: list[tuple[str, CogtuneError]] = []
    for _ in range(60):
        path = chance.choice(paths)
        whole = path.read_bytes()
        damaged = bytearray(whole)
        for _ in range(chance.choice([1, 1, 16])):  # half of it near the end, where the zip's own index is
            place = chance.randrange(len(whole)) if chance.random() < 0.5 else -chance.randrange(1, 2000)
            damaged[place] = chance.randrange(256)
        path.write_bytes(damaged if chance.random() < 0.8 else damaged[: chance.randrange(len(whole))])
        try:
            result = merge_checkpoint(checkpoint, tmp_path / "out", base=base / "transformer")
            assert_same(load_file(result.weights / "diffusion_pytorch_model.safetensors"), weights)
        except CogtuneError as error:
            refusals.append((path.name, error))
        path.write_bytes(whole)
    assert 30 < len(refusals) < 60
    assert [name for name, error in refusals if not any(name in detail for detail in error.details)] == []


def test_a_full_disk(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write_zero(tmp_path / "c", random_weights())

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Source, "chunks", full)
    with pytest.raises(CogtuneError, match="No space left") as caught:
        merge_checkpoint(checkpoint, base=base)
    assert "free some space" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["c"]

    usage = shutil.disk_usage(tmp_path)._replace(free=50_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CogtuneError, match=r"c-merged: it needs 0\.09 MB, and 0\.05 MB are free"):
        merge_checkpoint(checkpoint, base=base)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_every_kind_of_stored_tensor(tmp_path: Path) -> None:
    grid = torch.arange(24.0).reshape(4, 6)
    named = torch.nn.Parameter(torch.ones(2))
    named.note = "an attribute"  # type: ignore[attr-defined]
    tensors = {
        "transposed": grid.t(),
        "sliced": grid[1:3, ::2],
        "tail": grid.flatten()[20:],
        "scalar": torch.tensor(3),
        "half": torch.full((2, 3), 0.5, dtype=torch.bfloat16),
        "flags": torch.tensor([True, False]),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "with attributes": named,
    }
    torch.save(tensors | {"empty": torch.empty(0)}, tmp_path / "file.pt")
    stored = read_archive(tmp_path / "file.pt")
    assert stored.pop("empty").shape == (0,)
    for name, tensor in tensors.items():
        assert (stored[name].shape, stored[name].dtype) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(torch.cat(list(stored[name].chunks(0, tensor.numel()))), tensor.detach().flatten())
    assert next(stored["transposed"].chunks(5, 3)).tolist() == [7.0, 13.0, 19.0]


def test_nothing_pickled_in_a_checkpoint_is_run(tmp_path: Path, base: Path) -> None:
    weights = random_weights()
    checkpoint = write_zero(tmp_path / "c", weights)
    path = next(checkpoint.glob("*/mp_rank_00_model_states.pt"))
    bombs = [Bomb(tmp_path / "ran"), {"a": (1, Bomb(tmp_path / "ran"))}]
    torch.save(torch.load(path) | {"client_state": bombs}, path)
    result = merge_checkpoint(checkpoint, base=base)
    assert not (tmp_path / "ran").exists()
    assert_same(loaded(result.weights), weights)
    pickle.loads(pickle.dumps(bombs))  # the bomb is a real one
    assert (tmp_path / "ran").exists()


def test_descriptions_without_end_or_measure_are_refused(tmp_path: Path, base: Path) -> None:
    endless: list[Any] = []
    endless.append(endless)
    path = rank_file(write_zero(tmp_path / "endless", random_weights()), 0)
    content = torch.load(path)
    content["optimizer_state_dict"]["base_optimizer_state"] = endless
    torch.save(content, path)
    with pytest.raises(CogtuneError, match="damaged or incomplete") as caught:
        merge_checkpoint(tmp_path / "endless", base=base)
    assert caught.value.details == ("the optimizer files are of different steps: rank 0 at None, rank 1 at 7",)
    for path in write_zero(tmp_path / "huge", random_weights(), stage=3).glob("*/*_optim_states.pt"):
        content = torch.load(path)
        content["optimizer_state_dict"]["partition_count"] = 10**12
        torch.save(content, path)
    with pytest.raises(CogtuneError) as caught:
        merge_checkpoint(tmp_path / "huge", base=base)
    assert len(caught.value.details) == 130
    assert caught.value.details[-1] == "and so are files of further ranks"


def test_a_damaged_base_is_told(tmp_path: Path, base: Path) -> None:
    checkpoint = write_zero(tmp_path / "c", random_weights())
    config = json.loads((base / "transformer" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_layers": "x"}))
    with pytest.raises(
        CogtuneError,
        match=r"no transformer can be made from .*config\.json\n  - num_layers: input",
    ):
        merge_checkpoint(checkpoint, base=tmp_path)


@pytest.mark.parametrize("content", ["[]", "3", '"x"', "null", "{", '{"scheduler": [], "../c": ["a", "B"]}'])
def test_a_base_whose_files_hold_something_else_is_told(tmp_path: Path, base: Path, content: str) -> None:
    checkpoint = write_zero(tmp_path / "c", random_weights())
    for name in ("model_index.json", "transformer/config.json"):
        damaged = shutil.copytree(base, tmp_path / Path(name).stem)
        (damaged / name).write_text(content)
        with pytest.raises(CogtuneError) as caught:
            merge_checkpoint(checkpoint, base=damaged)
        assert str(damaged / name) in caught.value.message
    state = {"format": 1, "model_path": json.loads(content) if content != "{" else 5}
    (checkpoint / "state.json").write_text(json.dumps(state))
    with pytest.raises(CogtuneError, match=r"does not record its base model|no base model"):
        merge_checkpoint(checkpoint)


def test_a_link_is_followed_to_the_folder_that_it_names(tmp_path: Path, base: Path) -> None:
    checkpoint = write_zero(tmp_path / "c", random_weights())
    (tmp_path / "large-disk").mkdir()
    (tmp_path / "merged").symlink_to(tmp_path / "large-disk")
    merge_checkpoint(checkpoint, tmp_path / "merged", base=base)
    assert (tmp_path / "merged").is_symlink()
    assert (tmp_path / "large-disk" / "merge.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"c", "large-disk", "merged"}


# ---- LoRA


def lora_model(**config: Any) -> CogVideoXTransformer3DModel:
    model = random_model()
    model.requires_grad_(False)
    lora = {"r": 3, "lora_alpha": 12, "target_modules": ["to_q", "to_out.0"]} | config
    model.add_adapter(LoraConfig(**lora))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    return model


def write_lora(folder: Path, model: CogVideoXTransformer3DModel, *, prefix: str = "", **arguments: Any) -> Path:
    named = {prefix + name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    frozen = [name for name in named if "lora_" not in name]
    return write_zero(folder, named, frozen=frozen, **arguments)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("with_frozen", [True, False])
def test_a_lora_loads_in_diffusers_at_its_strength(tmp_path: Path, base: Path, stage: int, with_frozen: bool) -> None:
    model = lora_model()
    checkpoint = write_lora(tmp_path / "c", model, stage=stage, ranks=3, with_frozen=with_frozen, precision="bf16")
    result = merge_checkpoint(checkpoint, base=base, lora_alpha=12)
    assert (result.kind, result.dtype, result.tensors) == ("lora", "fp32", 4)
    assert result.weights == result.output / "pytorch_lora_weights.safetensors"
    assert {path.name for path in result.output.iterdir()} == {"merge.json", "pytorch_lora_weights.safetensors"}

    plain = random_model()
    weights, metadata = CogVideoXPipeline.lora_state_dict(result.output, return_lora_metadata=True)
    CogVideoXPipeline.load_lora_into_transformer(weights, plain, metadata=metadata)
    torch.manual_seed(0)
    inputs = (torch.randn(1, 3, 4, 4, 4), torch.randn(1, 5, 17), torch.tensor([500]))
    with torch.no_grad():
        got, want = (each(*inputs, return_dict=False)[0] for each in (plain, model))
        plain.disable_adapters()
        without = plain(*inputs, return_dict=False)[0]
    assert torch.equal(got, want)
    assert not torch.allclose(got, without, rtol=0.1)


def test_a_lora_of_cogtune_brings_its_config_and_its_facts(tmp_path: Path) -> None:
    model = lora_model(rank_pattern={"to_out.0": 2}, use_rslora=True)
    checkpoint = write_lora(tmp_path / "c", model)
    facts = {"format": 1, "base_model": "5b", "model_path": "/gone", "rank": 3, "alpha": 12, "size": "9x32x32"}
    (checkpoint / "state.json").write_text(json.dumps(facts | {"step": 500}))
    save_lora(checkpoint / LORA_WEIGHTS_NAME, model, facts)
    result = merge_checkpoint(checkpoint)
    assert read_lora_facts(result.weights) == facts | {"step": 500}
    assert_same(load_file(result.weights), load_file(checkpoint / LORA_WEIGHTS_NAME))

    weights, metadata = CogVideoXPipeline.lora_state_dict(result.output, return_lora_metadata=True)
    assert metadata == CogVideoXPipeline.lora_state_dict(checkpoint, return_lora_metadata=True)[1]
    plain = random_model()
    CogVideoXPipeline.load_lora_into_transformer(weights, plain, metadata=metadata)
    attention = plain.transformer_blocks[0].attn1
    scalings = [next(iter(layer.scaling.values())) for layer in (attention.to_q, attention.to_out[0])]
    assert scalings == pytest.approx([12 / math.sqrt(3), 12 / math.sqrt(2)])
    assert json.loads((result.output / "merge.json").read_text())["compared_with_base"] is False

    (checkpoint / LORA_WEIGHTS_NAME).write_bytes(b"not safetensors")
    with pytest.raises(CogtuneError, match=r"pytorch_lora_weights.safetensors is damaged"):
        merge_checkpoint(checkpoint)


def test_alpha_from_the_state_alone(tmp_path: Path) -> None:
    checkpoint = write_lora(tmp_path / "c", lora_model())
    (checkpoint / "state.json").write_text(json.dumps({"format": 1, "rank": 3, "alpha": 12}))
    metadata = CogVideoXPipeline.lora_state_dict(merge_checkpoint(checkpoint).output, return_lora_metadata=True)[1]
    assert (metadata["transformer.r"], metadata["transformer.lora_alpha"]) == (3, 12)


def test_the_kind_from_the_weights_and_the_state_alone(tmp_path: Path) -> None:
    checkpoint = write_lora(tmp_path / "c", lora_model(use_dora=True))
    (checkpoint / "state.json").write_text(json.dumps({"format": 1, "rank": 3, "alpha": 12, "rslora": True}))
    metadata = CogVideoXPipeline.lora_state_dict(merge_checkpoint(checkpoint).output, return_lora_metadata=True)[1]
    assert (metadata["transformer.use_dora"], metadata["transformer.use_rslora"]) == (True, True)


# peft takes the bias of a lora_B for a weight that was cut up
@pytest.mark.filterwarnings("ignore:Adapter 'default'")
@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"lora_bias": True}])
def test_the_names_are_those_that_peft_gives(tmp_path: Path, base: Path, config: dict[str, Any]) -> None:
    model = lora_model(**config)
    checkpoint = write_lora(tmp_path / "c", model, prefix="module.base_model.model.")
    result = merge_checkpoint(checkpoint, base=base, lora_alpha=12)
    wanted = {f"transformer.{name}": value for name, value in get_peft_model_state_dict(model).items()}
    assert_same(load_file(result.weights), wanted)


def test_different_ranks_without_a_config(tmp_path: Path, base: Path) -> None:
    model = lora_model(rank_pattern={"to_out.0": 2})
    result = merge_checkpoint(write_lora(tmp_path / "c", model), base=base, lora_alpha=6)
    with safe_open(result.weights, framework="pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
        assert file.metadata()["format"] == "pt"
    block = "transformer_blocks.0.attn1"
    assert metadata == {
        "transformer.r": 3,
        "transformer.lora_alpha": 6,
        "transformer.target_modules": [f"{block}.to_out.0", f"{block}.to_q"],
        "transformer.rank_pattern": {f"{block}.to_out.0": 2},
    }


def test_a_lora_that_does_not_say_its_alpha_is_refused(tmp_path: Path, base: Path) -> None:
    with pytest.raises(CogtuneError, match="alpha") as caught:
        merge_checkpoint(write_lora(tmp_path / "c", lora_model()), base=base)
    assert caught.value.hint == "pass it as --lora-alpha (the rank is 3)"
    assert not (tmp_path / "c-merged").exists()


@pytest.mark.parametrize("alpha", [0.0, math.nan, math.inf])
def test_an_alpha_that_is_none_is_refused(tmp_path: Path, alpha: float) -> None:
    with pytest.raises(UsageError, match="must be greater than 0"):
        merge_checkpoint(tmp_path, lora_alpha=alpha)


def test_another_alpha_is_told_everywhere_and_a_full_fine_tune_has_none(tmp_path: Path, base: Path) -> None:
    checkpoint = write_lora(tmp_path / "c", lora_model())
    (checkpoint / "state.json").write_text(json.dumps({"format": 1, "rank": 3, "alpha": 12}))
    result = merge_checkpoint(checkpoint, lora_alpha=5)
    metadata = CogVideoXPipeline.lora_state_dict(result.output, return_lora_metadata=True)[1]
    assert (metadata["transformer.lora_alpha"], read_lora_facts(result.weights)["alpha"]) == (5, 5)
    with pytest.raises(UsageError, match="--lora-alpha requires a LoRA"):
        merge_checkpoint(write_zero(tmp_path / "full", random_weights()), base=base, lora_alpha=5)


@pytest.mark.parametrize("stage", [2, 3])
def test_weights_without_values_are_refused(tmp_path: Path, stage: int) -> None:
    named = dict(lora_model().named_parameters())
    named = {name: value[:0] if "lora_A" in name else value.detach() for name, value in named.items()}
    frozen = [name for name in named if "lora_" not in name]
    checkpoint = write_zero(tmp_path / "c", named, frozen=frozen, stage=stage)
    with pytest.raises(CogtuneError, match="damaged or incomplete") as caught:
        merge_checkpoint(checkpoint, lora_alpha=1)
    assert "to_q.lora_A.default.weight has no values" in caught.value.details[0]


def test_a_lora_of_another_model_is_refused(tmp_path: Path) -> None:
    random_model(num_attention_heads=4).save_pretrained(tmp_path / "other")
    checkpoint = write_lora(tmp_path / "c", lora_model())
    with pytest.raises(CogtuneError, match="cannot be merged") as caught:
        merge_checkpoint(checkpoint, base=tmp_path / "other", lora_alpha=1)
    assert sorted(caught.value.details) == [
        f"transformer_blocks.0.attn1.{name} adapts a weight of 32x32, in the base model 64x64"
        for name in ("to_out.0", "to_q")
    ]


def test_what_a_lora_file_cannot_hold_is_refused(tmp_path: Path, base: Path) -> None:
    named = {name: parameter.detach().clone() for name, parameter in lora_model().named_parameters()}
    named |= {name.replace("default", "second"): value for name, value in named.items() if "lora_" in name}
    frozen = [name for name in named if "lora_" not in name and name != "proj_out.bias"]
    with pytest.raises(CogtuneError) as caught:
        merge_checkpoint(write_zero(tmp_path / "c", named, frozen=frozen), base=base, lora_alpha=1)
    assert caught.value.details == (
        "proj_out.bias was trained as well as the LoRA, but a LoRA file cannot contain it",
        "it contains several adapters: default, second",
    )


# ---- DeepSpeed itself, and memory


@pytest.mark.parametrize("stage", sampled([2, 3], 3))
def test_every_weight_is_what_the_ranks_held(tmp_path: Path, stage: int) -> None:
    train_with_deepspeed(tmp_path, stage)
    base = tmp_path / "base"
    held = {name: load_file(tmp_path / name / "held.safetensors") for name in ("sft", "sft-bf16", "lora", "lora-only")}
    start = load_file(base / "diffusion_pytorch_model.safetensors")
    for name in ("sft", "sft-bf16"):
        result = merge_checkpoint(tmp_path / name, base=base, dtype="fp32", max_shard_size="200KB")
        assert (result.stage, result.world_size, result.tensors) == (stage, 2, 65)
        assert len(list(result.weights.glob("*.safetensors"))) == 3
        assert_same(loaded(result.weights), held[name])
        unmoved = [key for key, value in held[name].items() if torch.equal(value, start[key].float())]
        assert unmoved == [BUFFER]
    result = merge_checkpoint(tmp_path / "sft-bf16", base=base)
    assert result.dtype == "bf16"
    assert_same(
        load_file(result.weights / "diffusion_pytorch_model.safetensors"),
        {name: value.bfloat16() for name, value in held["sft-bf16"].items()},
    )
    for name in ("lora", "lora-only"):
        result = merge_checkpoint(tmp_path / name, base=base, lora_alpha=6)
        wanted = {
            f"transformer.{key.replace('.default', '')}": value for key, value in held[name].items() if "lora_" in key
        }
        assert (result.kind, len(wanted)) == ("lora", 16)
        assert_same(load_file(result.weights), wanted)


MEASURE = """
import json, sys
from pathlib import Path
from cogtune.merge import merge_checkpoint

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024

small, small_base, large_base, *large = map(Path, sys.argv[1:])
merge_checkpoint(small, base=small_base)
for checkpoint in large:
    before, seen = anonymous(), []
    result = merge_checkpoint(
        checkpoint, base=large_base, dtype="bf16", progress=lambda *_: seen.append(anonymous())
    )
    print(json.dumps({"grown": max(seen) - before, "looks": len(seen), "parameters": result.parameters}))
assert "deepspeed" not in sys.modules
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's own account of memory")
def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path, base: Path) -> None:
    size = {"num_attention_heads": 16, "attention_head_dim": 64, "num_layers": 4, "time_embed_dim": 512}
    with torch.device("meta"):
        shapes = CogVideoXTransformer3DModel(**(CONFIG | size)).state_dict()
    weights = {name: torch.full(value.shape, 0.5) for name, value in shapes.items()}
    config = json.loads((base / "transformer" / "config.json").read_text()) | size
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    large = [write_zero(tmp_path / f"stage-{stage}", weights, stage=stage) for stage in (2, 3)]
    small = write_zero(tmp_path / "small", random_weights())
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, (small, base, tmp_path / "base", *large))],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for line in done.stdout.splitlines():
        found = json.loads(line)
        assert found["parameters"] * 4 > 290e6
        assert found["looks"] > 100
        assert found["grown"] < 80e6, f"{found['grown'] / 1e6:.0f} MB"
    assert len(done.stdout.splitlines()) == 2
