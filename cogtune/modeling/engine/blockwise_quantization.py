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
