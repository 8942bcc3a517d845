"""Frozen weights that the host holds in 8 or 4 bits, and that are computed with in their own precision.

Numbers are quantized in blocks that share a scale, by the codes of :mod:`.blockwise_quantization`. LoRA on such weights
is known as QLoRA (Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs").
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cogtune.modeling.engine.blockwise_quantization import (
    BLOCK,
    NF4_BLOCK,
    dequantize,
    dequantize_nf4,
    quantize,
    quantize_nf4,
)
from cogtune.models.variants import StoredPrecision

_CHUNK = 2**22
"""Numbers that are restored at a time, for which there is temporary memory on the GPU."""


def storable(block: nn.Module) -> set[int]:
    """Return the ids of the parameters of ``block`` that are stored in fewer bits: frozen weights of linear layers."""
    return {
        id(layer.weight)
        for layer in block.modules()
        if isinstance(layer, nn.Linear) and not layer.weight.requires_grad and layer.weight.numel() % BLOCK == 0
    }


def stored_bytes(count: int, kind: StoredPrecision) -> int:
    """Return the bytes of ``count`` numbers, a multiple of 256, with their scales."""
    codes, scales = _sizes(count, kind)
    return codes + scales


def store(numbers: Tensor, memory: Tensor, kind: StoredPrecision, device: torch.device) -> None:
    """Quantize ``numbers``, of any shape, on ``device``, and write them to ``memory [stored_bytes]``, uint8."""
    aside = torch.empty(memory.numel(), dtype=torch.uint8, device=device)
    flat = numbers.detach().to(device).flatten()
    codes, scales = _parts(aside, flat.numel(), kind)
    for start, end in _chunks(flat.numel()):
        part = flat[start:end].float()
        if kind == "nf4":
            quantize_nf4(part, codes[start // 2 : end // 2], scales[start // NF4_BLOCK : end // NF4_BLOCK])
        else:
            quantize(part, codes[start:end], scales[start // BLOCK : end // BLOCK], signed=True)
    memory.copy_(aside)


def restore(memory: Tensor, target: Tensor, kind: StoredPrecision) -> None:
    """Write the numbers of ``memory`` to ``target``, in its type and on the same device."""
    flat = target.view(-1)
    codes, scales = _parts(memory, flat.numel(), kind)
    for start, end in _chunks(flat.numel()):
        if kind == "nf4":
            part = dequantize_nf4(codes[start // 2 : end // 2], scales[start // NF4_BLOCK : end // NF4_BLOCK])
        else:
            part = dequantize(codes[start:end], scales[start // BLOCK : end // BLOCK], signed=True)
        flat[start:end].copy_(part)


def round_weights(block: nn.Module, kind: StoredPrecision, device: torch.device) -> None:
    """Give the weights of a block that stays on the GPU the values that stored ones have, computed on ``device``."""
    chosen = storable(block)
    for parameter in block.parameters():
        if id(parameter) in chosen:
            memory = torch.empty(stored_bytes(parameter.numel(), kind), dtype=torch.uint8, device=device)
            store(parameter, memory, kind, device)
            rounded = torch.empty_like(parameter.data, device=device)
            restore(memory, rounded, kind)
            parameter.data.copy_(rounded)


def _sizes(count: int, kind: StoredPrecision) -> tuple[int, int]:
    """Return bytes of codes and of scales, which are fp32."""
    return (count // 2, 4 * (count // NF4_BLOCK)) if kind == "nf4" else (count, 4 * (count // BLOCK))


def _parts(memory: Tensor, count: int, kind: StoredPrecision) -> tuple[Tensor, Tensor]:
    codes, scales = _sizes(count, kind)
    return memory[:codes], memory[codes : codes + scales].view(torch.float32)


def _chunks(count: int) -> list[tuple[int, int]]:
    return [(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
