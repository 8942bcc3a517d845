"""LoRAs fused into the weights of a base model: a folder that diffusers loads without knowing of any LoRA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import cogtune
from cogtune.merge.base import add_base_files, expected_shapes, find_base, folder_size, other_components, stored_weights
from cogtune.merge.checkpoint import Progress, check_output, check_space, contents, norms, write_shards
from cogtune.merge.fit import truncated
from cogtune.merge.sources import LoadedSource
from cogtune.merge.write import Output, parse_size, split
from cogtune.modeling.devices import DTYPES
from cogtune.modeling.lora_files.editing import common_facts
from cogtune.modeling.lora_files.reading import Lora, Pair, check_shapes
from cogtune.models.variants import Precision
from cogtune.run.folder import MERGE_NAME
from cogtune.system.errors import CogtuneError, UsageError
from cogtune.system.files import os_errors_explained
from cogtune.system.folders import written_folder
from cogtune.system.json_files import write_sealed


@dataclass(frozen=True)
class Fused:
    """What was written.

    ``weights`` is the transformer's folder, alone where the base pipeline lacks ``missing`` on this disk; ``changed``
    of its ``tensors`` were changed.
    """

    output: Path
    weights: Path
    tensors: int
    changed: int
    missing: tuple[str, ...]


def fuse(
    loras: Sequence[tuple[Lora, float]],
    base: Path,
    output: Path,
    *,
    dtype: Precision | None = None,
    max_shard_size: str | int = "5GB",
    copy_base: bool = False,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
    warn: Callable[[str], object] | None = None,
) -> Fused:
    """Write the base model with LoRAs in its weights, each times its weight; one tensor is in memory at a time.

    Sums are made in fp32 and rounded once. Of a DoRA, too, the change that it makes to the base alone is added.

    Args:
        base: a pipeline's folder, or a transformer's.
        dtype: of the written weights; None for the base's own.
        copy_base: copy the pipeline's other parts in place of linking to them.
        force: replace an output folder that holds other things than an earlier merge.
        progress: called with (bytes done, bytes in all).
        warn: told what is left of an earlier merge that was replaced, if that cannot be deleted.

    Raises:
        CogtuneError: a LoRA does not fit the base, the base's weights are not here, or the output cannot be written.
        UsageError: the output is in the way, or a weight is 0.
    """
    limit = parse_size(max_shard_size)
    if idle := [str(lora.path) for lora, weight in loras if weight == 0]:
        raise UsageError(f"a weight of 0 has no effect: {', '.join(idle)}", "remove it")
    found = find_base(base, {}, needed=True)
    assert found is not None
    shapes = expected_shapes(found.transformer)
    by_layer = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if name.endswith(".weight")}
    fitting = [(check_shapes(lora, by_layer, str(base)), weight) for lora, weight in loras]
    stored = stored_weights(found.transformer)
    if lacking := [name for name in shapes if name not in stored]:
        raise CogtuneError(
            f"{found.transformer} lacks {len(lacking)} of {len(shapes)} weights, or has them in a form not read here",
            "download or copy the base model again, with its weights",
            details=truncated(lacking, 5),
        )
    others, missing = other_components(found.pipeline) if found.pipeline else ([], [])
    whole = found.pipeline is not None and not missing
    output = output.resolve() if output.is_symlink() else output
    check_output(output, [base, *others, *(lora.path for lora, _ in loras)], force)
    changes = {name: _changes(fitting, name) for name in dict.fromkeys(n for lora, _ in fitting for n in lora.pairs)}
    tensors = {
        name: Output(
            _changed(stored[name], changes[layer])
            if (layer := name.removesuffix(".weight")) in changes
            else stored[name],
            DTYPES[dtype] if dtype else stored[name].dtype,
        )
        for name in shapes
    }
    copied = sum(folder_size(folder) for folder in others) if copy_base and whole else 0
    check_space(output, sum(tensor.size for tensor in tensors.values()) + copied)
    bar = Progress(sum(tensor.source.numel * tensor.source.dtype.itemsize for tensor in tensors.values()), progress)
    with written_folder(output, warn) as folder:
        place = folder / "transformer" if whole else folder
        with os_errors_explained(output):
            place.mkdir(exist_ok=True)
        written, files = write_shards(place, split(tensors, limit), {}, bar, None)
        with os_errors_explained(output):
            add_base_files(found, folder, place, others if whole else None, copy=copy_base)
        record = {
            "format": 1,
            "cogtune": cogtune.__version__,
            "kind": "pipeline" if whole else "transformer",
            "loras": [
                {"file": lora.path.name, "weight": weight, "layers": len(lora.pairs)} for lora, weight in fitting
            ],
            "tensors": len(tensors),
            "files": files,
            **norms(written),
            "run": common_facts([lora for lora, _ in loras], ("size", "fps", "precision", "prompt")) or None,
            "contents": contents(folder),
        }
        write_sealed(folder / MERGE_NAME, record)
    weights = output / place.relative_to(folder)
    return Fused(output, weights, len(tensors), len(changes), tuple(missing))


_Change = tuple[Pair, float, float]
"""A layer's adapter, what its product is multiplied by, and the weight that its change gets."""


def _changes(loras: Sequence[tuple[Lora, float]], name: str) -> list[_Change]:
    return [(lora.pairs[name], lora.scale_of(name), weight) for lora, weight in loras if name in lora.pairs]


def _changed(source: LoadedSource, changes: Sequence[_Change]) -> LoadedSource:
    wide = torch.float64 if source.dtype == torch.float64 else torch.float32
    return LoadedSource(source.shape, wide, partial(_fused, source, changes, wide), [])


def _fused(source: LoadedSource, changes: Sequence[_Change], wide: torch.dtype) -> Tensor:
    base = source.load().to(wide)
    result = base.clone()
    for pair, scale, weight in changes:
        product = (pair.up.flatten(1).to(wide) @ pair.down.flatten(1).to(wide)).reshape(base.shape)
        if pair.magnitude is None:
            result += (scale * weight) * product
            continue
        # as PEFT merges a DoRA whose strength is multiplied by a weight
        moved = base + (scale * weight) * product
        ones = [1] * (base.dim() - 1)
        length = torch.linalg.vector_norm(moved.flatten(1), dim=1).reshape(-1, *ones)
        result += pair.magnitude.to(wide).reshape(-1, *ones) / length * moved - base
    return result
