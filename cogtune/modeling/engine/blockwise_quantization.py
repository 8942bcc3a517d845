"""Block-wise 8-bit quantization: blocks of 256 numbers share a scale, their largest magnitude; codes are dynamic.

The format is that of bitsandbytes' ``create_dynamic_map`` and ``quantize_blockwise`` (Dettmers et al. 2022, "8-bit
Optimizers via Block-wise Quantization"): map and scales are equal to those of bitsandbytes 0.50.2, and a code is always
the nearest (its CPU kernel picks the second nearest for up to 3 % of the numbers).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

BLOCK = 256
"""Numbers that share a scale."""

_EXPONENTS = 7


@functools.cache
def _codes(signed: bool) -> Tensor:
    """Return the 256 values of a code, rising from -1 or 0 to 1."""
    values = [0.0, 1.0]
    for exponent in range(_EXPONENTS):
        fractions = 2**exponent if signed else 2 ** (exponent + 1)
        bounds = torch.linspace(0.1, 1, fractions + 1, dtype=torch.float32)
        means = ((bounds[:-1] + bounds[1:]) / 2.0) * 10.0 ** (exponent - _EXPONENTS + 1)
        values += means.tolist()
        if signed:
            values += (-means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


@functools.cache
def _table(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the values of the codes, and the bounds halfway between neighbours."""
    codes = _codes(signed)
    return codes.to(device), ((codes[:-1] + codes[1:]) / 2.0).to(device)


def dequantize(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """Return fp32 numbers ``[n]`` for uint8 ``codes [n]`` and ``scales [n / 256]``."""
    values, _ = _table(signed, codes.device)
    return (values[codes.int()].view(-1, BLOCK) * scales.unsqueeze(1)).view(-1)


def quantize(numbers: Tensor, codes: Tensor, scales: Tensor, *, signed: bool) -> None:
    """Write fp32 ``numbers [n]`` into ``codes`` and ``scales``, each as its block's nearest code."""
    _, bounds = _table(signed, numbers.device)
    blocks = numbers.view(-1, BLOCK)
    torch.amax(blocks.abs(), dim=1, out=scales)
    scaled = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
    codes.copy_(torch.bucketize(scaled, bounds, out_int32=True).view(-1))


NF4_BLOCK = 64
"""Numbers that share a scale in nf4."""

_NF4_OFFSET = 0.9677083
"""The quantile of the largest value before all are divided by it."""


@functools.cache
def _nf4_table(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the 16 values of nf4, rising from -1 to 1, and the bounds halfway between neighbours.

    They are quantiles of the normal distribution. Source: Dettmers et al. 2023, "QLoRA", and bitsandbytes'
    ``create_normal_map``: codes and scales are equal to those of bitsandbytes 0.50.2, values to 1.2e-7.
    """
    above = torch.special.ndtri(torch.linspace(_NF4_OFFSET, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(_NF4_OFFSET, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([above, torch.zeros(1, dtype=torch.float64), below]).sort().values
    values = (values / values.max()).float()
    return values.to(device), ((values[:-1] + values[1:]) / 2.0).to(device)


def dequantize_nf4(codes: Tensor, scales: Tensor) -> Tensor:
    """Return fp32 numbers ``[n]`` for uint8 ``codes [n / 2]``, the first of two in the high bits, and
    ``scales [n / 64]``."""
    values, _ = _nf4_table(codes.device)
    pairs = torch.stack([codes >> 4, codes & 15], dim=1)
    return (values[pairs.int()].view(-1, NF4_BLOCK) * scales.unsqueeze(1)).view(-1)


def quantize_nf4(numbers: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Write fp32 ``numbers [n]`` into ``codes`` and ``scales`` of :func:`dequantize_nf4`, each as the nearest value."""
    _, bounds = _nf4_table(numbers.device)
    blocks = numbers.view(-1, NF4_BLOCK)
    torch.amax(blocks.abs(), dim=1, out=scales)
    scaled = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
    pairs = torch.bucketize(scaled, bounds, out_int32=True).view(-1, 2).to(torch.uint8)
    codes.copy_((pairs[:, 0] << 4) | pairs[:, 1])
