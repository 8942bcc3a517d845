"""Merging a checkpoint, verifying the result, and writing the folder around it."""

from __future__ import annotations

import math
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import cogtune
from cogtune.merge.base import (
    Base,
    add_base_files,
    expected_shapes,
    find_base,
    folder_size,
    other_components,
    stored_weights,
)
from cogtune.merge.checkpoint_formats import read_checkpoint
from cogtune.merge.fit import fit_transformer, truncated
from cogtune.merge.lora import adapter_config, fit_lora, lora_header
from cogtune.merge.sources import SavedWeights, Values, check_bytes, records_of
from cogtune.merge.write import Output, Written, check_safetensors, one_thread, parse_size, split, write_safetensors
from cogtune.merge.zero import AGAIN
from cogtune.models.variants import LORA_WEIGHTS_NAME, Precision
from cogtune.run.checkpoints import STATE_NAME, changed_files
from cogtune.run.folder import MERGE_NAME
from cogtune.system.errors import CogtuneError, UsageError
from cogtune.system.files import os_errors_explained
from cogtune.system.folders import require_replaceable, written_folder
from cogtune.system.json_files import CHECKSUM, is_sealed, read_json, write_json, write_sealed

"""What a merge says about itself; a folder that holds nothing else than it names may be merged into again."""

_WEIGHTS = "diffusion_pytorch_model"
_DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class MergeResult:
    """What was made of a checkpoint.

    ``output`` is the folder; ``weights`` what diffusers loads: the transformer's folder, or the LoRA file;
    ``stage`` ZeRO's, 0 for DeepSpeed without it and None for FSDP; ``missing`` what the base pipeline lacks on this
    disk, for which the result is the transformer alone; ``from_base`` how many frozen tensors were not in the
    checkpoint and are the base model's.
    """

    output: Path
    weights: Path
    kind: Literal["transformer", "pipeline", "lora"]
    dtype: Precision
    tensors: int
    parameters: int
    seconds: float
    world_size: int
    stage: int | None
    missing: tuple[str, ...] = ()
    from_base: int = 0


class Progress:
    """Adds up bytes, from several threads, for a callback that wants (done, total)."""

    def __init__(self, total: int, report: Callable[[int, int], None] | None) -> None:
        self._total, self._report, self._done = total, report, 0
        self._lock = threading.Lock()

    def advance(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self._report is not None:
                self._report(self._done, self._total)


def merge_checkpoint(
    checkpoint: Path,
    output: Path | None = None,
    *,
    base: Path | None = None,
    dtype: Precision | None = None,
    max_shard_size: str | int = "5GB",
    copy_base: bool = False,
    force: bool = False,
    lora_alpha: float | None = None,
    progress: Callable[[int, int], None] | None = None,
    warn: Callable[[str], object] | None = None,
) -> MergeResult:
    """Merge a checkpoint of DeepSpeed (ZeRO or not) or FSDP into weights that diffusers loads.

    A full fine-tune gives a pipeline folder whose other components are links to (or copies of) the base's,
    when the base pipeline is whole and at hand, else the transformer's folder alone. A LoRA run gives a folder with
    ``pytorch_lora_weights.safetensors``. A few MB are in memory at a time. Nothing stands under ``output``
    before every tensor was compared with the base model's key and shape, found finite, and read back.

    Args:
        checkpoint: the folder that ``Accelerator.save_state``, DeepSpeed's ``save_checkpoint`` or
            ``torch.distributed.checkpoint.save`` wrote.
        output: the folder to make; ``<checkpoint>-merged`` when None.
        base: the base model's pipeline or transformer folder; None takes the one that a checkpoint of cogtune
            names. Other checkpoints need it, except for a LoRA.
        dtype: the type of the written weights; None takes the run's own precision, and fp32 for a LoRA.
        max_shard_size: the largest weights file, such as ``5GB``.
        copy_base: copy the base's other components in place of linking them.
        force: replace an output folder that holds other things than an earlier merge.
        lora_alpha: the LoRA's alpha, for a checkpoint that does not say it.
        progress: called with (bytes done, bytes in all); the bytes are read twice, to check and to merge.
        warn: told what is left of an earlier merge that was replaced, if that cannot be deleted.

    Raises:
        CogtuneError: no such checkpoint, or a damaged or incomplete one; no base; weights that do not fit the
            base, or are not finite; the output is in the way, or does not fit on the disk.
    """
    started = time.monotonic()
    limit = parse_size(max_shard_size)
    if lora_alpha is not None and not 0 < lora_alpha < math.inf:
        raise UsageError(f"--lora-alpha {lora_alpha}: must be greater than 0", "a common choice is the rank")
    zero = read_checkpoint(checkpoint)
    state = _run_state(zero.folder)
    _check_files(zero, state)
    state = {key: value for key, value in state.items() if key not in ("files", CHECKSUM)}  # of the checkpoint alone
    if lora_alpha is not None and not _is_lora(zero):
        raise UsageError(f"--lora-alpha requires a LoRA, but {checkpoint} is a full fine-tune", "remove --lora-alpha")
    output = output or _beside(zero.folder)
    output = output.resolve() if output.is_symlink() else output  # the folder that it leads to is what is replaced
    found = find_base(base, state, needed=not _is_lora(zero))
    inputs = [checkpoint, zero.folder / zero.tag, *([found.transformer] if found else [])]
    if found and found.pipeline:
        inputs += [found.pipeline, *other_components(found.pipeline)[0]]
    check_output(output, inputs, force)
    content = _content(zero, found, state, dtype, lora_alpha)
    copied = sum(folder_size(folder) for folder in content.others) if copy_base else 0
    check_space(output, sum(tensor.size for tensor in content.tensors.values()) + copied)

    records = sum(record.size for record in records_of(content.sources))
    read = sum(source.numel * source.dtype.itemsize for source in content.sources)
    bar = Progress(records + read, progress)
    if problems := check_bytes(content.sources, bar.advance):
        raise CogtuneError(f"{checkpoint} is damaged", AGAIN, details=problems)
    is_lora = content.kind == "lora"
    with written_folder(output, warn) as folder:
        place = folder / "transformer" if content.kind == "pipeline" else folder
        with os_errors_explained(output):
            place.mkdir(exist_ok=True)
        shards = [content.tensors] if is_lora else split(content.tensors, limit)
        with one_thread():
            written, files = write_shards(place, shards, content.metadata, bar, LORA_WEIGHTS_NAME if is_lora else None)
        if found and not is_lora:
            with os_errors_explained(output):
                others = content.others if content.kind == "pipeline" else None
                add_base_files(found, folder, place, others, copy=copy_base)
        record = _record(zero, state, content, compared=found is not None)
        write_sealed(folder / MERGE_NAME, {**record, "files": files, **norms(written), "contents": contents(folder)})
    return MergeResult(
        output=output,
        weights=output / place.relative_to(folder) / (LORA_WEIGHTS_NAME if is_lora else ""),
        kind=content.kind,
        dtype=content.dtype,
        tensors=len(content.tensors),
        parameters=content.parameters,
        seconds=round(time.monotonic() - started, 3),
        world_size=zero.world_size,
        stage=zero.stage,
        missing=tuple(content.missing),
        from_base=len(content.from_base),
    )


def _record(zero: SavedWeights, state: Mapping[str, Any], content: _Content, *, compared: bool) -> dict[str, Any]:
    """Return what ``merge.json`` says of a checkpoint and of the weights made of it."""
    return {
        "format": 1,
        "cogtune": cogtune.__version__,
        "kind": content.kind,
        "checkpoint": zero.folder.resolve().name,
        "step": state.get("step"),
        "zero_stage": zero.stage,
        "world_size": zero.world_size,
        "trained_in": zero.precision,
        "dtype": content.dtype,
        "tensors": len(content.tensors),
        "parameters": content.parameters,
        "compared_with_base": compared,
        "left_out": content.left_out,
        "from_base": content.from_base,
        "run": {key: value for key, value in state.items() if key != "config"} or None,
    }


@dataclass(frozen=True)
class _Content:
    """What a checkpoint becomes: the weights, and the folders of the base model beside them."""

    kind: Literal["transformer", "pipeline", "lora"]
    dtype: Precision
    sources: list[Values]
    tensors: dict[str, Output]
    metadata: dict[str, str]
    left_out: list[str]
    from_base: list[str]
    others: list[Path]
    missing: list[str]

    @property
    def parameters(self) -> int:
        return sum(source.numel for source in self.sources)


def _is_lora(zero: SavedWeights) -> bool:
    return any(".lora_" in name for name in zero.trained)


def _content(
    zero: SavedWeights,
    base: Base | None,
    state: Mapping[str, Any],
    dtype: Precision | None,
    lora_alpha: float | None,
) -> _Content:
    """Return what a checkpoint becomes, compared with the base model's keys and shapes."""
    expected = expected_shapes(base.transformer) if base else None
    left_out: list[str] = []
    from_base: list[str] = []
    metadata: dict[str, str] = {}
    others: list[Path] = []
    missing: list[str] = []
    kind: Literal["transformer", "pipeline", "lora"]
    if _is_lora(zero):
        kind = "lora"
        sources, config = fit_lora(zero, expected, adapter_config(zero.folder, state, lora_alpha))
        metadata = lora_header(config, state)
    else:
        fitted = fit_transformer(zero, expected or {}, lambda: stored_weights(base.transformer) if base else {})
        sources, left_out, from_base = fitted.sources, fitted.left_out, fitted.from_base
        if base and base.pipeline:
            others, missing = other_components(base.pipeline)
        kind = "pipeline" if base and base.pipeline and not missing else "transformer"
    precision = dtype or ("fp32" if kind == "lora" else zero.precision)
    tensors = {
        name: Output(source, _DTYPES[precision] if source.dtype.is_floating_point else source.dtype)
        for name, source in sources.items()
    }
    beside = others if kind == "pipeline" else []
    return _Content(kind, precision, list(sources.values()), tensors, metadata, left_out, from_base, beside, missing)


def _beside(checkpoint: Path) -> Path:
    """Return where a merge goes when nothing else is said: ``checkpoint-500-merged`` beside ``checkpoint-500``."""
    named = checkpoint if checkpoint.name.strip(".") else checkpoint.resolve()
    return named.with_name(f"{named.name}-merged")


def _run_state(folder: Path) -> dict[str, Any]:
    """Return what a checkpoint of cogtune says about its run; empty for another program's."""
    path = folder / STATE_NAME
    state = read_json(path) if path.is_file() else None
    if not isinstance(state, dict) or "format" not in state:
        return {}
    if CHECKSUM in state and not is_sealed(state):
        raise CogtuneError(f"{path} is damaged: checksum mismatch", AGAIN)
    return state


def _check_files(zero: SavedWeights, state: Mapping[str, Any]) -> None:
    """Check that a checkpoint of cogtune has the files that were saved with it."""
    shards = f"{zero.tag}/"
    if wrong := changed_files(zero.folder, state, lambda name: name.startswith(shards)):
        raise CogtuneError(f"{zero.folder} is damaged or incomplete", AGAIN, details=wrong)


def check_output(output: Path, inputs: Iterable[Path], force: bool) -> None:
    for path in inputs:
        if path.resolve().is_relative_to(output.resolve()):
            raise UsageError(f"--output {output} contains {path}, which is read", "choose another --output")
    if output.is_file():
        raise UsageError(f"{output} is a file", "choose another --output")
    require_replaceable(output)
    if force or not output.is_dir() or not any(output.iterdir()):
        return
    hint = "choose another --output, or use --force to replace it"
    if not (output / MERGE_NAME).is_file():
        raise UsageError(f"{output} already exists and is not an earlier merge", hint)
    made = read_json(output / MERGE_NAME)
    if isinstance(made, dict) and CHECKSUM in made and not is_sealed(made):
        raise UsageError(f"{output / MERGE_NAME} is damaged: checksum mismatch", hint)
    of_the_merge = made.get("contents", ()) if isinstance(made, dict) else ()
    if foreign := sorted(set(contents(output)) - {MERGE_NAME, *of_the_merge}):
        raise UsageError(
            f"{output} contains files that the earlier merge did not write", hint, details=truncated(foreign)
        )


def contents(folder: Path) -> list[str]:
    """Return all files and links in ``folder``, by their paths inside it."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def check_space(output: Path, needed: int) -> None:
    there = next(folder for folder in output.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise CogtuneError(
            f"not enough disk space for {output}: it needs {_size(needed)}, and {_size(free)} are free",
            "free some space, choose an --output on another disk, or use --dtype bf16",
        )


def write_shards(
    folder: Path,
    shards: list[dict[str, Output]],
    metadata: Mapping[str, str],
    bar: Progress,
    file: str | None,
) -> tuple[dict[str, Written], dict[str, int]]:
    """Write the shards and read them back; what was written, and the files' sizes."""
    written: dict[str, Written] = {}
    weight_map: dict[str, str] = {}
    sizes: dict[str, int] = {}
    problems = []
    for number, shard in enumerate(shards, start=1):
        suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        path = folder / (file or f"{_WEIGHTS}{suffix}.safetensors")
        own, not_finite = write_safetensors(path, shard, metadata, bar.advance)
        problems += not_finite or check_safetensors(path, shard, own)
        written |= own
        weight_map |= dict.fromkeys(shard, path.name)
        sizes[path.name] = path.stat().st_size
    if problems:
        raise CogtuneError(
            "the merged weights are invalid",
            "use an earlier checkpoint, or --dtype bf16 or fp32 if values are too large",
            details=truncated(problems),
        )
    if len(shards) > 1:
        total = sum(tensor.size for shard in shards for tensor in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / f"{_WEIGHTS}.safetensors.index.json", index)
    return written, sizes


def norms(written: Mapping[str, Written]) -> dict[str, Any]:
    """Return the norm of all written weights, and of each block's, to tell two merges apart at a glance."""
    blocks: dict[str, float] = {}
    for name, tensor in written.items():
        words = name.removeprefix("transformer.").split(".")
        block = ".".join(words[: 2 if words[0] == "transformer_blocks" else 1])
        blocks[block] = blocks.get(block, 0.0) + tensor.square
    return {
        "norm": math.sqrt(sum(blocks.values())),
        "norms": {block: math.sqrt(square) for block, square in blocks.items()},
    }
