"""LoRAs made of others: cut to a lower rank by a singular value decomposition, or several blended into one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from cogtune.modeling.lora_files.reading import Lora, Pair
from cogtune.system.errors import CogtuneError, UsageError


@dataclass(frozen=True)
class Edited:
    """A LoRA made of others, and how far its changes of the weights are from what they should be."""

    lora: Lora
    errors: Mapping[str, tuple[float, float]]
    """For each layer, squares of Frobenius norms: of the difference, and of the wanted change."""

    @property
    def error(self) -> float:
        """Norm of the difference over all layers, as a share of the wanted change's."""
        return _share(*map(sum, zip(*self.errors.values(), strict=True)))

    @property
    def worst(self) -> tuple[str, float]:
        """The layer with the largest share, and that share."""
        shares = {name: _share(*squares) for name, squares in self.errors.items()}
        name = max(shares, key=shares.__getitem__)
        return name, shares[name]


def _share(difference: float, whole: float) -> float:
    return math.sqrt(difference / whole) if whole else 0.0


def matrices(pair: Pair) -> tuple[Tensor, Tensor]:
    """Return B ``[outputs, rank]`` and A ``[rank, inputs]`` in fp64, the dimensions of a convolution made one."""
    return pair.up.flatten(1).double(), pair.down.flatten(1).double()


def truncate(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the product ``up @ down`` at a lower rank, as near to it as that rank allows (Eckart and Young 1936).

    Returns:
        Factors of equal norms, ``[outputs, rank]`` and ``[rank, inputs]``.
    """
    left, core_up = torch.linalg.qr(up)
    right, core_down = torch.linalg.qr(down.T)
    u, s, v = torch.linalg.svd(core_up @ core_down.T)
    root = s[:rank].sqrt()
    return (left @ u[:, :rank]) * root, root[:, None] * (v[:rank] @ right.T)


def resize(lora: Lora, rank: int, *, dtype: torch.dtype | None = None) -> Edited:
    """Lower every layer's rank to ``rank`` at most; layers of a lower one stay as they are.

    Alpha / rank stays what it is, and so does what the file does not say of it.

    Args:
        dtype: of the new matrices; None for each layer's own.

    Raises:
        UsageError: no layer has a higher rank.
    """
    if rank >= max(lora.ranks):
        raise UsageError(
            f"--rank {rank} does not reduce {lora.path}, whose rank is {max(lora.ranks)}",
            f"use a --rank below {max(lora.ranks)}",
        )
    made, errors = {}, {}
    for name, pair in lora.pairs.items():
        up, down = matrices(pair)
        up *= lora.scale_of(name)
        if pair.rank <= rank:
            made[name], errors[name] = pair, (0.0, _product(up, down))
            continue
        new = _like(pair, *truncate(up / lora.scale_of(name), down, rank), dtype)
        ratio = math.sqrt(rank / pair.rank) if lora.rslora else rank / pair.rank
        made[name] = replace(new, alpha=None if pair.alpha is None else pair.alpha * ratio)
        errors[name] = (_distance(up, down, made[name], lora.scale_of(name)), _product(up, down))
    return Edited(replace(lora, pairs=made), errors)


def blend(
    loras: Sequence[tuple[Lora, float]], path: Path, *, rank: int | None = None, dtype: torch.dtype | None = None
) -> Edited:
    """Return the sum of several LoRAs, each times its weight, as one.

    Without ``rank`` the matrices are set side by side: the ranks add up, and nothing is lost but the rounding of a
    product with strength and weight, and not even that where all of these are alike.

    Args:
        path: what the new one is called in messages.
        dtype: of the new matrices; None for fp32, or their own where nothing is multiplied.

    Raises:
        CogtuneError: one of them is a DoRA, whose magnitudes do not add up.
        UsageError: a weight is 0.
    """
    problems = [f"{lora.path} is a DoRA" for lora, _ in loras if lora.dora]
    if problems:
        raise CogtuneError(
            "a DoRA cannot be blended with others: magnitudes do not add up",
            "fuse it into a base with `cogtune lora fuse`, and fuse the others into that",
            details=problems,
        )
    if idle := [str(lora.path) for lora, weight in loras if weight == 0]:
        raise UsageError(f"a weight of 0 has no effect: {', '.join(idle)}", "remove it")
    made, errors = {}, {}
    for name in dict.fromkeys(name for lora, _ in loras for name in lora.pairs):
        parts = [(lora.pairs[name], weight * lora.scale_of(name)) for lora, weight in loras if name in lora.pairs]
        _check_sizes(name, [pair for pair, _ in parts])
        wanted_up = torch.cat([matrices(pair)[0] * factor for pair, factor in parts], dim=1)
        wanted_down = torch.cat([matrices(pair)[1] for pair, _ in parts], dim=0)
        made[name] = _side_by_side(parts, dtype)
        if rank is not None and made[name].rank > rank:
            factors = truncate(wanted_up, wanted_down, rank)
            made[name] = replace(_like(made[name], *factors, dtype or torch.float32), alpha=float(rank))
        errors[name] = (
            _distance(wanted_up, wanted_down, made[name], (made[name].alpha or 1.0) / made[name].rank),
            _product(wanted_up, wanted_down),
        )
    return Edited(
        Lora(path=path, source_format="diffusers", pairs=made, facts=common_facts([lora for lora, _ in loras])), errors
    )


def _check_sizes(name: str, pairs: Sequence[Pair]) -> None:
    if len({(pair.down[0].numel(), pair.up.shape[0]) for pair in pairs}) > 1:
        raise CogtuneError(
            f"these LoRAs are for different models: {name} differs in size",
            "run `cogtune lora show` to see their models",
        )


def _side_by_side(parts: Sequence[tuple[Pair, float]], dtype: torch.dtype | None) -> Pair:
    first, factors = parts[0][0], [factor for _, factor in parts]
    rank = sum(pair.rank for pair, _ in parts)
    kept = _holds(*(tensor.dtype for pair, _ in parts for tensor in (pair.up, pair.down)))
    if len(set(factors)) == 1 and factors[0] > 0:
        ups, alpha = [pair.up.flatten(1).double() for pair, _ in parts], factors[0] * rank
    else:
        ups, alpha = [matrices(pair)[0] * factor for pair, factor in parts], float(rank)
        kept = _holds(kept, torch.float32)
    downs = [matrices(pair)[1] for pair, _ in parts]
    return replace(_like(first, torch.cat(ups, dim=1), torch.cat(downs), dtype or kept), alpha=alpha)


def _holds(*dtypes: torch.dtype) -> torch.dtype:
    """Return the type of all values, fp32 where they are of several; fp64 where one of those is."""
    kinds = set(dtypes)
    return kinds.pop() if len(kinds) == 1 else torch.float64 if torch.float64 in kinds else torch.float32


def _like(pair: Pair, up: Tensor, down: Tensor, dtype: torch.dtype | None) -> Pair:
    """Return the pair with other matrices, in its own shapes."""
    rank = down.shape[0]
    return replace(
        pair,
        up=up.reshape(-1, rank, *pair.up.shape[2:]).to(dtype or pair.up.dtype).contiguous(),
        down=down.reshape(rank, *pair.down.shape[1:]).to(dtype or pair.down.dtype).contiguous(),
    )


def _product(up: Tensor, down: Tensor) -> float:
    """Return the square of ``up @ down``'s Frobenius norm, without making it."""
    return max(0.0, float(((up.T @ up) * (down @ down.T).T).sum()))


def _distance(up: Tensor, down: Tensor, pair: Pair, scale: float) -> float:
    """Return the square of the Frobenius norm of ``up @ down`` minus the pair's product times ``scale``."""
    other_up, other_down = matrices(pair)
    return _product(torch.cat([up, -scale * other_up], dim=1), torch.cat([down, other_down]))


_OF_THE_RUN = ("base_model", "model_path", "size", "fps", "precision", "id_token")


def common_facts(loras: Sequence[Lora], keys: Sequence[str] = _OF_THE_RUN) -> dict[str, object]:
    """Return what the runs behind several LoRAs have in common that sampling goes by."""
    first = loras[0].facts
    return {key: first[key] for key in keys if key in first and all(x.facts.get(key) == first[key] for x in loras)}
