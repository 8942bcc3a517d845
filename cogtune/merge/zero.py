"""Read ZeRO checkpoints: which values of which rank's file make up each parameter.

Source of the rules: DeepSpeed's own ``zero_to_fp32.py`` and the code that writes the files.

- Stages 1 and 2: every parameter group is one flat fp32 vector, cut into one consecutive part per rank; the
  parameters follow each other in it in the order of ``param_shapes``, and the end is padded.
- Stage 3: every rank holds ``ceil(numel / world size)`` values of every parameter, in one or more flat fp32
  vectors; the last rank's share of a parameter is padded.
- Frozen parameters are saved apart, whole (stage 2) or as one fragment per rank (stage 3), in the model's
  precision, or, if so asked, not at all. Buffers are in rank 0's module state.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cogtune.merge.archive import StoredTensor, name_when_saved, read_archive
from cogtune.merge.sources import Part, SavedWeights, Source
from cogtune.models.variants import Precision
from cogtune.system.errors import CogtuneError

_OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_LAYER_FILE = re.compile(r"layer_\d+.*_states\.pt")
_FLAT = {1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups", 3: "fp32_flat_groups"}
"""Where a rank's optimizer state has its weights, by stage."""
_MOST_NAMED = 64
"""Missing files that are named one by one."""
AGAIN = "copy the checkpoint again from where it was written, or use an earlier one"


def is_of_deepspeed(name: str) -> bool:
    """Return whether a file of that name is one that DeepSpeed saves a model or its optimizer in."""
    return bool(_OPTIMIZER_FILE.fullmatch(name) or _MODEL_FILE.fullmatch(name))


def read_zero(folder: Path, tag: str) -> SavedWeights:
    """Return where every parameter of DeepSpeed's checkpoint in ``folder / tag`` is. Reads no weights.

    Raises:
        CogtuneError: it is damaged or incomplete, or in a format that is not supported; all problems are listed.
    """
    checkpoint, problems, unknown = folder, list[str](), list[str]()
    optimizer_paths, model_paths = _find_files(folder / tag, unknown)
    _stop_on_unknown(unknown, checkpoint)
    models = _read_all(model_paths, "param_shapes" if optimizer_paths else "module", problems)
    if not optimizer_paths and (alone := models.get(0)) is not None and alone.get("param_shapes") is None:
        return _without_zero(folder, tag, alone)
    _name_missing(folder / tag, optimizer_paths, model_paths, problems)
    optimizers = _read_all(optimizer_paths, "optimizer_state_dict", problems)
    states = {rank: content["optimizer_state_dict"] for rank, content in optimizers.items()}
    try:
        stage, world_size = _stage_and_world_size(states, problems, unknown)
        if stage:
            _check_ranks(optimizer_paths, range(world_size), problems)
            _check_ranks(model_paths, range(world_size if stage == 3 else 1), problems)
            _check_steps(states, problems)
            own = {rank: state for rank, state in states.items() if rank < world_size}
            vectors = {rank: state.get(_FLAT[stage]) or [] for rank, state in own.items()}
            _check_copies(_under_their_names(vectors, optimizer_paths, problems), optimizer_paths, problems)
            frozen = {rank: models[rank].get("frozen_param_fragments") or {} for rank in own if rank in models}
            fragments = {rank: named.values() for rank, named in frozen.items()}
            _check_copies(_under_their_names(fragments, model_paths, problems), model_paths, problems)
        _stop_on(problems, checkpoint)
        _stop_on_unknown(unknown, checkpoint)
        shapes = _shapes(models[0])
        for rank, model in models.items():
            if _shapes(model) != shapes:
                problems.append(f"{model_paths[rank].name} lists other parameters than rank 0's file")
        ranks = [states[rank] for rank in range(world_size)]
        trained = _stage_3(shapes, ranks, problems) if stage == 3 else _stage_2(shapes, ranks, problems)
        kept = _kept([models[rank] for rank in sorted(models)], trained, problems)
        problems += [f"{name} has no values" for name, source in (trained | kept).items() if not source.parts]
        for alias, name in (models[0].get("shared_params") or {}).items():
            if isinstance(alias, str) and isinstance(name, str) and name in trained:
                trained[alias] = trained[name]
        precision = _precision(models[0].get("ds_config"))
    except _NOT_AS_KNOWN as error:
        raise _not_as_known(checkpoint, error) from error
    _stop_on(problems, checkpoint)
    return SavedWeights(folder, tag, stage, world_size, precision, trained, kept)


_NOT_AS_KNOWN = (ArithmeticError, AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError)
"""What is raised on the way through a checkpoint that is not built like those known here."""


def _not_as_known(checkpoint: Path, error: Exception) -> CogtuneError:
    return CogtuneError(
        f"{checkpoint} is not laid out like any ZeRO checkpoint known here ({error})",
        "was it written by a DeepSpeed much newer or older than 0.19?",
    )


def _without_zero(folder: Path, tag: str, model: Mapping[str, Any]) -> SavedWeights:
    """Return what DeepSpeed saves at stage 0: every weight whole, as the model holds it, and the optimizer with it."""
    try:
        buffers = {name for name in model.get("buffer_names") or () if isinstance(name, str)}
        weights = {
            name: Source(value.shape, (Part(value, 0, value.numel),))
            for name, value in model["module"].items()
            if isinstance(name, str) and isinstance(value, StoredTensor) and value.numel
        }
        lora = [name for name in weights if ".lora_" in name]
        trained = {name: weights[name] for name in lora or weights if name not in buffers}
        kept = {name: source for name, source in weights.items() if name not in trained}
        ranks = model.get("dp_world_size")
        precision = _precision(model.get("ds_config"))
    except _NOT_AS_KNOWN as error:
        raise _not_as_known(folder, error) from error
    return SavedWeights(folder, tag, 0, ranks if isinstance(ranks, int) else 1, precision, trained, kept)


def _stop_on(problems: list[str], checkpoint: Path) -> None:
    if problems:
        raise CogtuneError(f"{checkpoint} is damaged or incomplete", AGAIN, details=problems)


def _stop_on_unknown(unknown: list[str], checkpoint: Path) -> None:
    if unknown:
        raise CogtuneError(
            f"{checkpoint} is in a checkpoint format that is not supported",
            "supported are ZeRO stages 1 to 3, DeepSpeed without ZeRO, and FSDP; for any other, have the program that "
            "wrote it save full weights",
            details=unknown,
        )


def _find_files(folder: Path, unknown: list[str]) -> tuple[dict[int, Path], dict[int, Path]]:
    """Return the files of the optimizer and of the model, by rank."""
    optimizers: dict[int, Path] = {}
    models: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        optimizer = _OPTIMIZER_FILE.fullmatch(path.name)
        match = optimizer or _MODEL_FILE.fullmatch(path.name)
        if match is None:
            if _LAYER_FILE.fullmatch(path.name):
                unknown.append(f"{path.name} is of a run with pipeline parallelism or experts: not supported")
            continue
        if int(match[2]):
            unknown.append(f"{path.name} is of a run with model parallelism: not supported")
            continue
        found, rank = (optimizers if optimizer else models), int(match[1] or 0)
        if rank in found:
            unknown.append(f"{found[rank].name} and {path.name} are of one rank: which is of this save?")
        found[rank] = path
    return optimizers, models


def _name_missing(
    folder: Path, optimizers: Mapping[int, Path], models: Mapping[int, Path], problems: list[str]
) -> None:
    if not optimizers:
        problems.append(f"{folder.name} has no file *_optim_states.pt, where the weights are in fp32")
    if not models:
        problems.append(f"{folder.name} has no file *_model_states.pt, where the shapes are")


def _read_all(paths: Mapping[int, Path], needed: str, problems: list[str]) -> dict[int, dict[str, Any]]:
    contents = {}
    for rank, path in sorted(paths.items()):
        try:
            content = read_archive(path)
        except CogtuneError as error:
            problems.append(error.message.replace(str(path), path.name))
            continue
        if not isinstance(content, dict) or not isinstance(content.get(needed), (dict, list)):
            problems.append(f"{path.name} is not a file of a ZeRO run: it has no '{needed}'")
            continue
        contents[rank] = content
    return contents


def _stage_and_world_size(
    states: Mapping[int, dict[str, Any]], problems: list[str], unknown: list[str]
) -> tuple[int, int]:
    """Return the stage and the number of ranks that the run had; 0, 0 when no file says it."""
    found = set()
    for rank, state in states.items():
        count = state.get("partition_count")
        if isinstance(count, list):  # one for each parameter group
            count = max((each for each in count if isinstance(each, int)), default=0)
        stage = 3 if _FLAT[3] in state else 2 if _FLAT[2] in state else 0
        if not stage or not isinstance(count, int) or count < 1:
            unknown.append(f"rank {rank}'s optimizer state is not of ZeRO stage 1, 2 or 3")
            continue
        # stages 1 and 2 keep weights alike; the optimizer that DeepSpeed uses for bf16 alone names no stage
        stage = 1 if stage == 2 and state.get("zero_stage") in (1, None) else stage
        found.add((stage, count))
    if len(found) > 1:
        told = ", ".join(f"stage {stage} on {count} ranks" for stage, count in sorted(found))
        problems.append(f"the files are from different runs: {told}")
    return min(found, default=(0, 0))


def _check_ranks(paths: Mapping[int, Path], wanted: range, problems: list[str]) -> None:
    if not paths:  # told already
        return
    some = next(iter(paths.values())).name
    missing = (rank for rank in wanted if rank not in paths)
    for rank in itertools.islice(missing, _MOST_NAMED):  # a damaged file may tell of any number of ranks
        name = re.sub(r"zero_pp_rank_\d+", f"zero_pp_rank_{rank}", some)
        problems.append(f"{name} is missing: the run had {len(wanted)} ranks")
    if next(missing, None) is not None:
        problems.append("and so are files of further ranks")
    for rank in sorted(rank for rank in paths if rank not in wanted):
        problems.append(f"{paths[rank].name} does not belong here: the run had ranks 0 to {wanted[-1]}")


def _check_steps(states: Mapping[int, dict[str, Any]], problems: list[str]) -> None:
    """Check that all files are of one step: an interrupted save over an older one leaves two."""
    steps = {rank: max(_steps(state), default=None) for rank, state in states.items()}
    if len(set(steps.values())) > 1:
        told = ", ".join(f"rank {rank} at {step}" for rank, step in sorted(steps.items()))
        problems.append(f"the optimizer files are of different steps: {told}")


def _under_their_names(
    weights: Mapping[int, Iterable[Any]], paths: Mapping[int, Path], problems: list[str]
) -> dict[int, Iterable[Any]]:
    """Return those of the ranks whose file was saved under the name that it has, so far as it says."""
    known = {}
    for rank, saved in weights.items():
        before = name_when_saved(paths[rank])
        is_one = _OPTIMIZER_FILE.fullmatch(before) or _MODEL_FILE.fullmatch(before)
        if is_one and before != paths[rank].name:
            problems.append(f"{paths[rank].name} was saved as {before}: it is another rank's")
        else:
            known[rank] = saved
    return known


def _check_copies(weights: Mapping[int, Iterable[Any]], paths: Mapping[int, Path], problems: list[str]) -> None:
    """Check that no rank's file is a copy of another's, which passes every other check."""
    first: dict[tuple[tuple[int, int, int, int], ...], int] = {}
    for rank, saved in sorted(weights.items()):
        tensors = [value for value in saved if isinstance(value, StoredTensor) and value.numel]
        checksums = [tensor.record.crc for tensor in tensors]
        content = tuple(
            (tensor.record.size, crc, tensor.offset, tensor.numel)
            for tensor, crc in zip(tensors, checksums, strict=True)
            if crc is not None
        )
        if not content or len(content) < len(tensors):  # only the bytes would tell
            continue
        other = first.setdefault(content, rank)
        if other != rank and not all(_is_constant(tensor) for tensor in tensors):  # as padding alone is
            names = f"{paths[other].name} and {paths[rank].name}"
            problems.append(f"{names} hold the same weights: one was copied over the other")


def _is_constant(tensor: StoredTensor) -> bool:
    value = next(tensor.chunks(0, 1))
    return all(bool((chunk == value).all()) for chunk in tensor.chunks(0, tensor.numel))


def _steps(value: Any) -> Iterator[int]:
    """Yield every optimizer step that is named anywhere inside a saved optimizer state."""
    left, seen = [value], set[int]()
    while left:
        value = left.pop()
        if id(value) in seen:  # containers may hold each other, and the same ones any number of times
            continue
        seen.add(id(value))
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            if key == "step" and isinstance(inner, StoredTensor) and inner.numel == 1:
                yield int(next(inner.chunks(0, 1)))
            elif key == "step" and isinstance(inner, (int, float)):
                yield int(inner)
            else:
                left.append(inner)


def _cut(vector: Sequence[StoredTensor], start: int, length: int) -> list[Part]:
    """Return the parts of ``start`` to ``start + length`` of flat tensors laid end to end."""
    parts = []
    for tensor in vector:
        take = min(length, tensor.numel - start)
        if start < tensor.numel and take > 0:
            parts.append(Part(tensor, start, take))
            length -= take
        start = max(0, start - tensor.numel)
    return parts


def _flat_tensors(state: dict[str, Any], key: str) -> list[StoredTensor]:
    return [item for item in state.get(key) or [] if isinstance(item, StoredTensor)]


def _stage_2(
    shapes: Sequence[Mapping[str, tuple[int, ...]]], ranks: Sequence[dict[str, Any]], problems: list[str]
) -> dict[str, Source]:
    groups = [_flat_tensors(state, _FLAT[2]) for state in ranks]
    for rank, tensors in enumerate(groups):
        if len(tensors) != len(shapes):
            problems.append(f"rank {rank} holds {len(tensors)} parameter groups, the model has {len(shapes)}")
    if any(len(tensors) != len(shapes) for tensors in groups):
        return {}
    paddings = ranks[0].get("param_alignment_paddings") or [[0] * len(group) for group in shapes]
    sources = {}
    for index, group in enumerate(shapes):
        vector = [tensors[index] for tensors in groups]
        available = sum(tensor.numel for tensor in vector)
        position = 0
        for (name, shape), padding in zip(group.items(), paddings[index], strict=True):
            sources[name] = Source(shape, tuple(_cut(vector, position, math.prod(shape))))
            position += math.prod(shape) + padding
        # the end of a group may be padded to a multiple of twice the ranks, and the padding cut off again
        align = 2 * len(ranks)
        if -(-position // align) != -(-available // align) or available < position - paddings[index][-1]:
            problems.append(f"parameter group {index} has {position:,} values, the files hold {available:,}")
    return sources


def _stage_3(
    shapes: Sequence[Mapping[str, tuple[int, ...]]], ranks: Sequence[dict[str, Any]], problems: list[str]
) -> dict[str, Source]:
    vectors = [_flat_tensors(state, _FLAT[3]) for state in ranks]
    sources = {}
    position = 0
    for name, shape in ((name, shape) for group in shapes for name, shape in group.items()):
        share = -(-math.prod(shape) // len(ranks))
        parts: list[Part] = []
        left = math.prod(shape)
        for vector in vectors:
            parts += _cut(vector, position, min(share, left))
            left -= min(share, left)
        sources[name] = Source(shape, tuple(parts))
        position += share
    for rank, vector in enumerate(vectors):
        available = sum(tensor.numel for tensor in vector)
        if available != position:
            problems.append(f"rank {rank}'s share is {position:,} values in fp32, its file holds {available:,}")
    return sources


def _shapes(model: Mapping[str, Any]) -> list[dict[str, tuple[int, ...]]]:
    """Return the trained parameters of every group, in the order of their values."""
    return [_named_shapes(group) for group in model["param_shapes"]]


def _named_shapes(group: Mapping[Any, Any]) -> dict[str, tuple[int, ...]]:
    shapes = {name: tuple(shape) for name, shape in group.items()}
    for name, shape in shapes.items():
        if not isinstance(name, str) or not all(isinstance(size, int) for size in shape):
            raise TypeError("a parameter without a name or a shape")
    return shapes


def _kept(models: Sequence[dict[str, Any]], trained: Mapping[str, Source], problems: list[str]) -> dict[str, Source]:
    """Return frozen parameters and buffers. ``models`` has one entry, or one for each rank (stage 3)."""
    sources = {
        name: Source(value.shape, (Part(value, 0, value.numel),))
        for name, value in models[0].get("module", {}).items()
        if isinstance(name, str) and isinstance(value, StoredTensor) and value.numel and name not in trained
    }
    for name, shape in _named_shapes(models[0].get("frozen_param_shapes") or {}).items():
        fragments = [(model.get("frozen_param_fragments") or {}).get(name) for model in models]
        parts: list[Part] = []
        left = math.prod(shape)
        for fragment in fragments:
            if isinstance(fragment, StoredTensor) and left:
                parts.append(Part(fragment, 0, min(left, fragment.numel)))
                left -= min(left, fragment.numel)
        if left:
            problems.append(f"frozen parameter {name} lacks {left:,} of its {math.prod(shape):,} values")
        sources[name] = Source(shape, tuple(parts))
    return sources


def _precision(config: Any) -> Precision:
    """Return the precision that DeepSpeed ran the model in, from its own configuration."""
    config = config if isinstance(config, dict) else {}
    autocast = config.get("torch_autocast") or {}
    dtype = autocast.get("dtype", "")
    named = str(dtype) if autocast.get("enabled") and isinstance(dtype, (str, torch.dtype)) else ""
    if (config.get("bf16") or config.get("bfloat16") or {}).get("enabled") or "bfloat16" in named:
        return "bf16"
    if (config.get("fp16") or {}).get("enabled") or "float16" in named:
        return "fp16"
    return "fp32"
