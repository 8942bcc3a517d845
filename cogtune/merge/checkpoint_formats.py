"""Which library saved a checkpoint, and what to do with one that is not read here."""

from __future__ import annotations

from pathlib import Path

from cogtune.merge.fsdp import METADATA, read_full, read_sharded
from cogtune.merge.sources import SavedWeights
from cogtune.merge.zero import AGAIN, is_of_deepspeed, read_zero
from cogtune.models.sat import refuse_sat_names
from cogtune.system.errors import CogtuneError
from cogtune.system.files import open_regular, os_errors_explained
from cogtune.system.numbers import whole_number

_NO_WEIGHTS = ("optimizer", "scheduler", "sampler", "random_states", "scaler")
"""How the names of accelerate's other files begin."""

_WHOLE = (
    "such a file needs no merging; to sample with a transformer's weights, put them into a copy of the base's folder, "
    "as transformer/diffusion_pytorch_model.safetensors (.bin if they are a file of torch.save)"
)

_ADAPTER = "adapter_model"
"""How PEFT calls the file of an adapter."""

_FSDP = "pytorch_model_fsdp"
"""What accelerate calls a model's files and folders under FSDP."""


def read_checkpoint(checkpoint: Path) -> SavedWeights:
    """Return where every weight of ``checkpoint`` is: a folder of ZeRO shards, of DeepSpeed without ZeRO, or of FSDP.

    The folder of the shards itself is taken too. Reads no weights.

    Raises:
        CogtuneError: it is none of these, or damaged or incomplete; all problems are listed.
    """
    if not checkpoint.is_dir():
        if checkpoint.is_file():
            raise CogtuneError(f"{checkpoint} is a file, not a checkpoint's folder", _WHOLE)
        raise CogtuneError(f"no such folder: {checkpoint}", "pass a checkpoint's folder")
    _refuse_universal(checkpoint)
    if (checkpoint / "latest").exists():
        tag = _named_by(checkpoint / "latest")
        _refuse_universal(checkpoint / tag)
        return _not_of_sat(read_zero(checkpoint, tag), checkpoint)
    whole = checkpoint.resolve()
    if any(is_of_deepspeed(path.name) for path in checkpoint.iterdir()):
        return _not_of_sat(read_zero(whole.parent, whole.name), checkpoint)
    if (checkpoint / METADATA).exists():
        inside = whole.name.startswith(_FSDP)
        return read_sharded(whole.parent, whole.name) if inside else read_sharded(checkpoint, "")
    if len(sharded := _sharded(checkpoint)) == 1:
        return read_sharded(checkpoint, sharded[0].name)
    if (checkpoint / f"{_FSDP}.bin").exists():
        return read_full(checkpoint, f"{_FSDP}.bin")
    raise CogtuneError(f"{checkpoint} is neither a ZeRO nor an FSDP checkpoint", _what_instead(checkpoint, sharded))


def _not_of_sat(saved: SavedWeights, checkpoint: Path) -> SavedWeights:
    """Return ``saved``, unless CogVideo's SAT wrote it, which saves with DeepSpeed under names of its own."""
    refuse_sat_names(checkpoint, (*saved.trained, *saved.kept))
    return saved


def _named_by(latest: Path) -> str:
    with os_errors_explained(latest, "read"), open_regular(latest) as file:
        tag = file.read(4096).decode(errors="replace").strip()
    if not tag or tag != Path(tag).name or not (latest.parent / tag).is_dir():
        says = f"names '{tag}', but {latest.parent} has no such folder" if tag else "is empty"
        raise CogtuneError(f"{latest} {says}", AGAIN)
    return tag


def _refuse_universal(folder: Path) -> None:
    if next(folder.glob("zero/*/fp32.pt"), None) is not None:
        raise CogtuneError(
            f"{folder} is a DeepSpeed universal checkpoint, which is not supported",
            "pass the checkpoint that ds_to_universal was run on",
        )


def _sharded(checkpoint: Path) -> list[Path]:
    """Return the folders of shards in a checkpoint that may be a model's."""
    found = sorted(path.parent for path in checkpoint.glob(f"*/{METADATA}"))
    models = [path for path in found if not path.name.startswith("optim")]
    return [path for path in models if path.name == f"{_FSDP}_0"] or models


def _what_instead(folder: Path, sharded: list[Path]) -> str:
    if sharded:
        return f"it contains several; pass one of {', '.join(str(path) for path in sharded)}"
    if checkpoints := [path for path in folder.glob("checkpoint-*") if (path / "latest").is_file()]:
        newest = max(checkpoints, key=_number)
        return f"pass one of its checkpoints, such as {newest}"
    if unfinished := sorted(path.parent for path in folder.glob("*/*_states.pt")):
        return (
            f"the file 'latest' is missing, which is written last; if the save in {unfinished[0]} was finished "
            "(save_latest=False), pass that folder"
        )
    if shards := [*sorted(folder.glob("*.distcp")), *sorted(folder.glob("*/*.distcp"))]:
        return f"{METADATA} is written last, so this save was not finished; its files are in {shards[0].parent}"
    if own := sorted(folder.glob(f"{_FSDP}*_rank*.bin")):
        return (
            f"it holds {own[0].name}: each process saved its own part, which only that run can load; "
            "use SHARDED_STATE_DICT or FULL_STATE_DICT to save"
        )
    kinds = ("*.safetensors", "transformer/*.safetensors", "*.bin", "*.pth", "*.pt", "*.ckpt", "*/*.pt")
    weights = [path for kind in kinds for path in sorted(folder.glob(kind)) if not path.name.startswith(_NO_WEIGHTS)]
    if weights and (_ADAPTER in weights[0].name or "lora" in weights[0].name.lower()):
        return f"it holds {weights[0].relative_to(folder)}: a LoRA needs no merging; pass it to `cogtune infer --lora`"
    if (folder / "model_index.json").is_file():
        return "it is a complete model, which needs no merging: pass it as --model"
    if weights:
        return f"it holds {weights[0].relative_to(folder)}: {_WHOLE}"
    return "pass a folder written by Accelerator.save_state or DeepSpeed's save_checkpoint"


def _number(checkpoint: Path) -> int:
    number = whole_number(checkpoint.name.rpartition("-")[2])
    return -1 if number is None else number
