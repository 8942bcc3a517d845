"""cogtune.merge on what other libraries and settings save: DeepSpeed without ZeRO, FSDP, and what is not read."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict_saver import save

from cogtune.commands.infer.filling import fill_in
from cogtune.commands.infer.request import InferRequest
from cogtune.merge import merge_checkpoint
from cogtune.merge.archive import MOST_DESCRIPTION, read_archive
from cogtune.modeling.lora_files import read_lora
from cogtune.models.locate import locate
from cogtune.run.lora_paths import find_lora
from cogtune.system.errors import CogtuneError
from tests.support.forked_workers import run_script
from tests.support.merging import Bomb, assert_same, loaded, rank_file, train_with_deepspeed
from tests.support.zero_checkpoints import BUFFER, Weights, random_model, random_weights, write_zero


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    random_model(seed=1).save_pretrained(folder)
    return folder


def write_sharded(folder: Path, weights: Weights, **more: Any) -> Path:
    """What torch.distributed.checkpoint makes of a model, in the place where accelerate puts it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        save({"model": dict(weights), **more}, checkpoint_id=folder / "pytorch_model_fsdp_0", no_dist=True)
    return folder


def refusal(checkpoint: Path, base: Path) -> CogtuneError:
    with pytest.raises(CogtuneError) as caught:
        merge_checkpoint(checkpoint, base=base)
    assert not checkpoint.with_name(f"{checkpoint.name}-merged").exists()
    return caught.value


# ---- the programs themselves


def assert_lora_merges(checkpoint: Path, base: Path) -> None:
    """The merged LoRA of a checkpoint is the one that its processes held."""
    held = load_file(checkpoint / "held.safetensors")
    result = merge_checkpoint(checkpoint, base=base, lora_alpha=6)
    wanted = {f"transformer.{key.replace('.default', '')}": held[key] for key in held if "lora_" in key}
    assert (result.kind, len(wanted)) == ("lora", 16)
    assert_same(load_file(result.weights), wanted)


@pytest.mark.slow
def test_deepspeed_without_zero(tmp_path: Path) -> None:
    train_with_deepspeed(tmp_path, 0)
    for name in ("sft", "sft-bf16"):
        held = load_file(tmp_path / name / "held.safetensors")
        result = merge_checkpoint(tmp_path / name, base=tmp_path / "base")
        assert (result.kind, result.stage, result.world_size, result.tensors) == ("transformer", 0, 2, 65)
        assert result.dtype == ("bf16" if name == "sft-bf16" else "fp32")
        got = load_file(result.weights / "diffusion_pytorch_model.safetensors")
        assert_same(got, {key: value.to(got[key].dtype) for key, value in held.items()})
    for name in ("lora", "lora-only"):
        assert_lora_merges(tmp_path / name, tmp_path / "base")
    alone = merge_checkpoint(tmp_path / "sft" / "pytorch_model", base=tmp_path / "base")  # the folder of the tag
    assert alone.output == tmp_path.resolve() / "sft-merged"


@pytest.mark.slow
def test_fsdp_in_every_format(tmp_path: Path) -> None:
    run_script("fsdp_script", tmp_path)
    start = load_file(tmp_path / "base" / "diffusion_pytorch_model.safetensors")
    ranks = {"sharded": 2, "dcp": 2, "full": 1, "sharded-bf16": 2}
    for name, count in ranks.items():
        held = load_file(tmp_path / name / "held.safetensors")
        result = merge_checkpoint(tmp_path / name, base=tmp_path / "base")
        assert (result.kind, result.stage, result.world_size, result.tensors) == ("transformer", None, count, 65)
        assert result.dtype == ("bf16" if name == "sharded-bf16" else "fp32")
        got = load_file(result.weights / "diffusion_pytorch_model.safetensors")
        assert_same(got, held)
        assert [key for key, value in got.items() if torch.equal(value.float(), start[key].float())] in ([], [BUFFER])
    for name in ("lora", "lora-full"):
        assert_lora_merges(tmp_path / name, tmp_path / "base")
    inside = merge_checkpoint(tmp_path / "sharded" / "pytorch_model_fsdp_0", base=tmp_path / "base")
    assert inside.output == tmp_path.resolve() / "sharded-merged"


@pytest.mark.exhaustive
def test_a_universal_checkpoint_is_named_as_one(tmp_path: Path) -> None:
    train_with_deepspeed(tmp_path, 3)
    made_from = tmp_path / "sft" / "pytorch_model"
    universal = tmp_path / "sft" / "universal"
    subprocess.run(
        [
            *(sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(made_from)),
            *("--output_folder", str(universal), "--num_extract_workers", "1", "--num_merge_workers", "1"),
        ],
        check=True,
        capture_output=True,
    )
    for folder in (universal, tmp_path / "sft"):
        (tmp_path / "sft" / "latest").write_text("universal")
        told = refusal(folder, tmp_path / "base")
        assert told.message == f"{universal} is a DeepSpeed universal checkpoint, which is not supported"
        assert told.hint == "pass the checkpoint that ds_to_universal was run on"
    (tmp_path / "sft" / "latest").write_text("pytorch_model")  # both stand in one folder: the other is merged
    merge_checkpoint(tmp_path / "sft", base=tmp_path / "base")


# ---- FSDP, in one process


def test_shards_of_torch_become_weights(tmp_path: Path, base: Path) -> None:
    weights = random_weights()
    checkpoint = write_sharded(tmp_path / "c", weights, step=7, optim={"exp_avg": torch.ones(3)})
    result = merge_checkpoint(checkpoint, base=base)
    assert (result.output, result.dtype) == (tmp_path / "c-merged", "fp32")
    assert_same(loaded(result.weights), weights)
    shutil.copytree(checkpoint / "pytorch_model_fsdp_0", tmp_path / "raw")
    assert_same(loaded(merge_checkpoint(tmp_path / "raw", base=base).weights), weights)


def test_a_weight_that_fsdp_lacks_is_not_taken_from_the_base(tmp_path: Path, base: Path) -> None:
    """Its files do not say what was frozen."""
    weights = random_weights()
    del weights["proj_out.bias"]
    assert refusal(write_sharded(tmp_path / "c", weights), base).details == ("proj_out.bias is missing",)


def test_damage_to_shards_of_torch_is_refused_or_harmless(tmp_path: Path, base: Path) -> None:
    weights = random_weights()
    checkpoint = write_sharded(tmp_path / "c", weights)
    paths = sorted((checkpoint / "pytorch_model_fsdp_0").iterdir())
    assert [path.suffix for path in paths] == ["", ".distcp"]
    chance, refusals = random.Random(3), list[str]()
    for number in range(80):
        path = paths[number % 2]
        whole = path.read_bytes()
        damaged = bytearray(whole)
        for _ in range(chance.choice([1, 1, 16])):
            damaged[chance.randrange(len(whole))] = chance.randrange(256)
        path.write_bytes(damaged if chance.random() < 0.8 else damaged[: chance.randrange(len(whole))])
        try:
            result = merge_checkpoint(checkpoint, tmp_path / "out", base=base)
            assert_same(load_file(result.weights / "diffusion_pytorch_model.safetensors"), weights)
        except CogtuneError as error:
            refusals.append(error.message)
        path.write_bytes(whole)
    assert 25 < len(refusals) < 80
    assert [said for said in refusals if str(checkpoint) not in said and "does not fit" not in said] == []


def test_what_is_missing_of_shards_is_named(tmp_path: Path, base: Path) -> None:
    checkpoint = write_sharded(tmp_path / "c", random_weights())
    folder = checkpoint / "pytorch_model_fsdp_0"
    (folder / "__0_0.distcp").rename(tmp_path / "aside")
    told = refusal(checkpoint, base)
    assert (told.message, told.details) == (f"{checkpoint} is damaged or incomplete", ("__0_0.distcp is missing",))
    os.mkfifo(folder / "__0_0.distcp")
    assert refusal(checkpoint, base).details == ("cannot read __0_0.distcp: is not an ordinary file",)
    (folder / "__0_0.distcp").unlink()
    (tmp_path / "aside").rename(folder / "__0_0.distcp")
    (folder / ".metadata").unlink()
    told = refusal(checkpoint, base)
    assert told.message == f"{checkpoint} is neither a ZeRO nor an FSDP checkpoint"
    assert told.hint == f".metadata is written last, so this save was not finished; its files are in {folder}"


def test_nothing_pickled_in_shards_of_torch_is_run(tmp_path: Path, base: Path) -> None:
    checkpoint = write_sharded(tmp_path / "c", random_weights(), bomb=Bomb(tmp_path / "ran"))
    merge_checkpoint(checkpoint, base=base)  # torch itself would unpickle it with all else that is no tensor
    metadata = checkpoint / "pytorch_model_fsdp_0" / ".metadata"
    metadata.write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    shutil.rmtree(tmp_path / "c-merged")
    assert refusal(checkpoint, base).message.startswith(
        f"{metadata} is damaged: it cannot be read (it names builtins.eval"
    )
    assert not (tmp_path / "ran").exists()


def test_a_shard_in_another_folder_is_not_read(tmp_path: Path, base: Path) -> None:
    checkpoint = write_sharded(tmp_path / "c", random_weights())
    metadata = checkpoint / "pytorch_model_fsdp_0" / ".metadata"
    content = pickle.loads(metadata.read_bytes())
    for info in content.storage_data.values():
        info.relative_path = "../../elsewhere.distcp"
    metadata.write_bytes(pickle.dumps(content))
    assert "../../elsewhere.distcp, which is not in its folder" in refusal(checkpoint, base).message


def test_a_tensor_whose_parts_leave_a_gap_is_refused(tmp_path: Path, base: Path) -> None:
    """Torch would leave in the gap what happened to be in memory."""
    checkpoint = write_sharded(tmp_path / "c", random_weights())
    metadata = checkpoint / "pytorch_model_fsdp_0" / ".metadata"
    content = pickle.loads(metadata.read_bytes())
    content.state_dict_metadata["model.proj_out.bias"].chunks.clear()
    metadata.write_bytes(pickle.dumps(content))
    told = refusal(checkpoint, base)
    assert told.details == ("the parts of model.proj_out.bias do not make up the whole of it",)


# ---- sound, and not read


def test_what_is_not_read_is_named_and_not_called_damaged(tmp_path: Path, base: Path) -> None:
    rank_only = tmp_path / "ranks"
    rank_only.mkdir()
    torch.save({}, rank_only / "pytorch_model_fsdp_0_rank0.bin")
    assert "each process saved its own part" in refusal(rank_only, base).hint

    pipeline = write_zero(tmp_path / "pipeline", random_weights())
    torch.save({}, pipeline / "pytorch_model" / "layer_00-model_states.pt")
    told = refusal(pipeline, base)
    assert told.message == f"{pipeline} is in a checkpoint format that is not supported"
    assert told.details == ("layer_00-model_states.pt is of a run with pipeline parallelism or experts: not supported",)

    other = write_zero(tmp_path / "other", random_weights())
    for path in (other / "pytorch_model").glob("*_optim_states.pt"):
        torch.save({"optimizer_state_dict": {"state": {}, "param_groups": []}}, path)
    told = refusal(other, base)
    assert told.message == f"{other} is in a checkpoint format that is not supported"
    assert len(told.details) == 2

    plain = tmp_path / "plain"
    plain.mkdir()
    torch.save({}, plain / "pytorch_model.bin")
    assert refusal(plain, base).hint.startswith("it holds pytorch_model.bin: such a file needs no merging; to sample")


# ---- hostile descriptions: refused, or read, within seconds and without gigabytes


def rewrite(path: Path, description: bytes) -> None:
    """Give a file of torch.save another description of its objects."""
    with zipfile.ZipFile(path) as archive:
        content = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in content.items():
            archive.writestr(name, description if name.endswith("/data.pkl") else data)


def doubled(key: bool) -> bytes:
    """A container of two of a container of two ..., 60 deep: as the key of a dict, or inside an optimizer's state."""
    code = b"\x80\x02" + (b")" if key else b"]") + b"q\x00"
    for depth in range(60):
        inner = b"h" + bytes([depth])
        code += (inner + inner + b"\x86" if key else b"](" + inner + inner + b"e") + b"q" + bytes([depth + 1])
    last = b"h" + bytes([60])
    names = [
        b"X" + len(name).to_bytes(4, "little") + name for name in (b"optimizer_state_dict", b"base_optimizer_state")
    ]
    return code + (b"}" + last + b"K\x01s." if key else b"}" + names[0] + b"}" + names[1] + last + b"ss.")


HOSTILE = {
    "a huge memo number": b"\x80\x02]r\xff\xff\xff\x7f.",
    "a huge memo number in text": b"]p2000000000\n.",
    "a key of doubled containers": doubled(key=True),
    "a value of doubled containers": doubled(key=False),
    "nested too deep": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "a text of that many bytes": b"\x80\x04\x8d" + (1 << 40).to_bytes(8, "little") + b"x.",
    "too long": b"\x80\x02" + b"]0" * (MOST_DESCRIPTION // 2) + b"N.",
    "many objects": b"\x80\x02(" + b"]" * (MOST_DESCRIPTION - 5) + b"l.",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_description_takes_neither_time_nor_memory(tmp_path: Path, base: Path, what: str) -> None:
    checkpoint = write_zero(tmp_path / "c", random_weights())
    for rank in (0, 1):
        rewrite(rank_file(checkpoint, rank), HOSTILE[what])
    before, started = psutil.Process().memory_info().vms, time.process_time()
    with pytest.raises(CogtuneError) as caught:
        merge_checkpoint(checkpoint, base=base)
    assert caught.value.details
    assert time.process_time() - started < 30
    assert psutil.Process().memory_info().vms - before < 1 << 30


def test_a_pipe_in_place_of_a_file_is_refused(tmp_path: Path, base: Path) -> None:
    for name in ("pytorch_model/mp_rank_00_model_states.pt", "latest"):
        checkpoint = write_zero(tmp_path / Path(name).stem, random_weights())
        (checkpoint / name).unlink()
        os.mkfifo(checkpoint / name)
        assert "is not an ordinary file" in str(refusal(checkpoint, base))


def test_tensors_that_repeat_their_bytes_are_read(tmp_path: Path) -> None:
    row = torch.arange(6.0)
    torch.save({"wide": row.expand(4, 6), "many": torch.ones(1).expand(1000, 1000, 1000)}, tmp_path / "file.pt")
    stored = read_archive(tmp_path / "file.pt")
    assert torch.cat([*stored["wide"].chunks(3, 9)]).tolist() == row.repeat(4)[3:12].tolist()
    assert next(stored["many"].chunks(0, 10**9)).numel() == 1 << 20  # a piece of it at a time


@pytest.mark.parametrize("place", ["shape", "stride", "offset"])
def test_a_tensor_of_a_shape_that_is_none_is_damage(tmp_path: Path, base: Path, place: str) -> None:
    checkpoint = write_zero(tmp_path / "c", random_weights())
    path = rank_file(checkpoint, 0)
    with zipfile.ZipFile(path) as archive:
        description = archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
    at = description.index(b"_rebuild_tensor_v2")
    zero = description.index(b"QK\x00", at)  # the storage, its offset, then shape and stride
    half = b"G" + bytes.fromhex("3fe0000000000000")
    cut = {"offset": (zero + 1, zero + 3)}
    first = zero + 3
    end = description.index(b"\x85", first)
    cut["shape"] = (first, end)
    second = description.index(b"K", end)
    cut["stride"] = (second, second + 2)
    start, stop = cut[place]
    rewrite(path, description[:start] + half + description[stop:])
    assert refusal(checkpoint, base).details == (f"{path.name} is damaged: its index cannot be read",)


SAT = {
    "weights": ("transformer.layers.0.attention.query_key_value.weight", "tools/convert_weight_sat2hf.py"),
    "lora": ("mixins.lora.layers.0.attention.query_key_value.matrix_A.0", "tools/export_sat_lora_weight.py"),
}


@pytest.mark.parametrize("kind", SAT)
@pytest.mark.parametrize("given", ["", "1000"])
def test_a_checkpoint_of_sat_is_told_for_what_it_is(tmp_path: Path, base: Path, kind: str, given: str) -> None:
    error = refusal(sat_checkpoint(tmp_path, kind) / given, base)
    assert "is a checkpoint of CogVideo's SAT" in str(error)
    assert SAT[kind][1] in error.hint
    assert not error.details


@pytest.mark.parametrize("kind", SAT)
@pytest.mark.parametrize(
    "given", ["", "transformer", "transformer/1000", "transformer/1000/mp_rank_00_model_states.pt"]
)
def test_as_a_model_or_a_lora_too(tmp_path: Path, kind: str, given: str) -> None:
    """Its own folder, its numbered one, the file, and the folder of a published model."""
    sat_checkpoint(tmp_path / "transformer", kind)
    ways: list[Callable[[Path], Any]] = [
        lambda path: locate(str(path)),
        lambda path: read_lora(find_lora(path)),
        lambda path: fill_in(InferRequest(model=str(path), prompts=("x",))),
    ]
    for read in ways:
        with pytest.raises(CogtuneError, match="is a checkpoint of CogVideo's SAT") as caught:
            read(tmp_path / given)
        assert SAT[kind][1] in f"{caught.value}"


def sat_checkpoint(folder: Path, kind: str) -> Path:
    name, _ = SAT[kind]
    (folder / "1000").mkdir(parents=True)
    (folder / "latest").write_text("1000")
    module = {
        f"model.diffusion_model.{name}": torch.ones(4, 8),
        "model.diffusion_model.mixins.patch_embed.proj.weight": torch.ones(2, 2),
        "first_stage_model.encoder.conv_in.weight": torch.ones(2, 2),
    }
    torch.save({"module": module, "iteration": 1000, "dp_world_size": 8}, folder / "1000/mp_rank_00_model_states.pt")
    return folder


def test_what_needs_no_merging_is_told_how_it_is_used(tmp_path: Path, base: Path) -> None:
    for name, advice in (("adapter_model.safetensors", "infer --lora"), ("boat_lora.safetensors", "infer --lora")):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_bytes(b"x")
        assert advice in refusal(tmp_path / name, base).hint
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    assert "pass it as --model" in refusal(tmp_path / "model", base).hint
