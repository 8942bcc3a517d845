"""A LoRA of the difference between two models of one kind, layer by layer: no model is ever in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cogtune.merge.base import find_base, stored_weights
from cogtune.merge.fit import shape_text, truncated
from cogtune.merge.sources import LoadedSource
from cogtune.modeling.devices import best_device
from cogtune.modeling.lora_files.editing import Edited
from cogtune.modeling.lora_files.names import layer_name
from cogtune.modeling.lora_files.reading import Lora, Pair
from cogtune.models.variants import published
from cogtune.run.checkpoints import STATE_NAME, checkpoints, refuse_shards
from cogtune.system.errors import CogtuneError, UsageError

_EXACT_BELOW = 4
"""A matrix whose smaller side is at most this many times the rank is decomposed whole."""


_OVERSAMPLED = 32
"""Directions that are drawn beyond the rank, at least."""


@dataclass(frozen=True)
class Extracted:
    """A LoRA, and what it leaves out of the difference.

    ``outside`` is the square of the norm of what no adapter of the asked layers can change (biases, norms, other
    layers); ``tensors`` differ between the models.
    """

    edited: Edited
    outside: float
    tensors: int

    @property
    def error(self) -> float:
        """Norm of what is left out of the whole difference, as a share of its norm."""
        lost = self.outside + sum(lost for lost, _ in self.edited.errors.values())
        whole = self.outside + sum(whole for _, whole in self.edited.errors.values())
        return math.sqrt(lost / whole)

    @property
    def beside(self) -> float:
        """Norm of what lies outside the adapted layers, as a share of the whole difference's norm."""
        return math.sqrt(self.outside / (self.outside + sum(whole for _, whole in self.edited.errors.values())))


def find_transformer(path: Path) -> Path:
    """Return the transformer's folder that a run, a checkpoint, a merged folder, a pipeline or that folder itself
    means.

    Raises:
        CogtuneError: there is none.
    """
    for folder in (path, *reversed(checkpoints(path))):
        if (folder / STATE_NAME).is_file() and (folder / "transformer").is_dir():
            return folder / "transformer"
    refuse_shards(path)
    found = find_base(path, {}, needed=True)
    assert found is not None
    return found.transformer


def extract(
    full: Path,
    base: Path,
    *,
    rank: int,
    targets: Collection[str] = (),
    dtype: torch.dtype = torch.float32,
    model: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Extracted:
    """Return the LoRA of rank ``rank`` that is nearest to ``full`` minus ``base``, with its errors as written.

    Every layer that differs gets the first singular vectors of its difference. Large matrices are decomposed by random
    projections (Halko, Martinsson and Tropp 2011), on a GPU if there is one.

    Args:
        full: the fine-tuned model, as :func:`find_transformer` takes it.
        base: the model that it was trained from.
        targets: ends of the names of layers that get an adapter; all if empty.
        dtype: of the matrices.
        model: what the user calls the base; kept in the LoRA where it is a published model's name.
        progress: called with (tensors done, tensors in all).

    Raises:
        CogtuneError: one of them has no weights here, or they are not of one kind, or do not differ.
    """
    folders = find_transformer(full), find_transformer(base)
    new, old = stored_weights(folders[0]), stored_weights(folders[1])
    for folder, weights in zip(folders, (new, old), strict=True):
        if not weights:
            raise CogtuneError(f"no weights in {folder}", "download, copy or merge the model again")
    _check_same_shapes(full, new, base, old)
    names = sorted(new)
    unmatched = [t for t in targets if not any(_is_target(_layer(name), [t]) for name in names)]
    if unmatched:
        raise UsageError(
            f"no layer's name ends in {', '.join(unmatched)}", "see `cogtune train --help` for layer names"
        )
    device, pairs, errors, outside, differing = best_device(), {}, {}, 0.0, 0
    for number, name in enumerate(names, 1):
        difference = new[name].load().to(device, torch.float32) - old[name].load().to(device, torch.float32)
        whole = float(difference.double().square().sum())
        if not math.isfinite(whole):
            raise CogtuneError(f"{name} has values that are not finite", "use an earlier checkpoint")
        layer = _layer(name)
        if whole:
            differing += 1
            if layer is not None and (not targets or _is_target(layer, targets)):
                pairs[layer], lost = _pair(difference, rank, dtype)
                errors[layer] = (lost, whole)
            else:
                outside += whole
        if progress is not None:
            progress(number, len(names))
    if not pairs:
        raise CogtuneError(
            f"{full} and {base} do not differ in any layer that a LoRA can change",
            "check that FULL is the fine-tuned model and BASE another",
        )
    known = published(model) if model else None
    facts = {"base_model": model, "rank": rank, "alpha": float(rank)} if known else {}
    lora = Lora(path=full, source_format="diffusers", pairs=pairs, facts=facts)
    return Extracted(Edited(lora, errors), outside, differing)


def _check_same_shapes(
    full: Path, new: Mapping[str, LoadedSource], base: Path, old: Mapping[str, LoadedSource]
) -> None:
    wrong = [f"{name} is only in one of them" for name in sorted(new.keys() ^ old.keys())]
    wrong += [
        f"{name} is {shape_text(new[name].shape)} in {full}, {shape_text(old[name].shape)} in {base}"
        for name in sorted(new.keys() & old.keys())
        if new[name].shape != old[name].shape
    ]
    if wrong:
        raise CogtuneError(f"{full} and {base} have different architectures",
            "check that BASE is the model it was trained from",
                           details=truncated(wrong, 5))  # fmt: skip


def _layer(tensor: str) -> str | None:
    name = tensor.removesuffix(".weight")
    return name if name != tensor and layer_name(name) == name else None


def _is_target(layer: str | None, targets: Collection[str]) -> bool:
    return layer is not None and any(layer == end or layer.endswith(f".{end}") for end in targets)


def _pair(difference: Tensor, rank: int, dtype: torch.dtype) -> tuple[Pair, float]:
    """Return the adapter of one layer, its strength 1, and the square of the norm of what it leaves out."""
    matrix = difference.flatten(1)
    kept = min(rank, *matrix.shape)
    if min(matrix.shape) <= _EXACT_BELOW * rank:
        u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        v = vh.T
    else:
        with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=min(rank + max(rank, _OVERSAMPLED), *matrix.shape), niter=4)
    root = s[:kept].sqrt()
    up, down = (u[:, :kept] * root).to(dtype), (v[:, :kept] * root).T.to(dtype)
    lost = float((matrix.double() - up.double() @ down.double()).square().sum())
    ones = [1] * (difference.dim() - 2)
    return (
        Pair(
            down.reshape(kept, *difference.shape[1:]).contiguous().cpu(),
            up.reshape(-1, kept, *ones).contiguous().cpu(),
            float(kept),
        ),
        lost,
    )
