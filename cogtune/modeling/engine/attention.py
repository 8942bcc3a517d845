"""Attention kernels: which there are, how fast each is at a run's own shape, and the choice among them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from cogtune.config.arrangement import AttentionKernel
from cogtune.system.errors import CogtuneError
from cogtune.system.json_files import read_json, write_json

FLASH_4 = "flash-attn-4"

_BACKENDS: dict[AttentionKernel, SDPBackend] = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}

ATTENTION_OPS = [
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable.default,
]
"""The operators whose outputs are those of attention; that of flash-attn-4 is added when it is loaded."""

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of ``[B, H, N, D]`` queries, keys and values without a mask."""


def using(kernel: AttentionKernel | None) -> contextlib.AbstractContextManager[None]:
    """Make PyTorch's attention use ``kernel`` while the block runs; None and flash-attn-4 leave it unchanged."""
    backend = _BACKENDS.get(kernel) if kernel is not None else None
    if backend is None:
        return contextlib.nullcontext()
    manager: contextlib.AbstractContextManager[None] = sdpa_kernel(backend)
    return manager


def has_flash_4() -> bool:
    """Return whether the package flash-attn-4 is installed and has a backward pass for the GPU that is here."""
    if importlib.util.find_spec("flash_attn") is None or importlib.util.find_spec("flash_attn.cute") is None:
        return False
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9


def versions() -> str:
    """Return the versions that decide a kernel's speed, besides the GPU."""
    words = [torch.__version__, str(torch.backends.cudnn.version())]
    if has_flash_4():
        words.append(importlib.metadata.version("flash-attn-4"))
    return " ".join(words)


class FlashAttention4Processor:
    """diffusers' ``CogVideoXAttnProcessor2_0`` with another attention function."""

    def __init__(self, attention: Attention) -> None:
        self._attention = attention

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return joint attention over text and video tokens ``[B, N, D]``; both parts of the result."""
        from diffusers.models.embeddings import apply_rotary_emb

        if attention_mask is not None:
            raise ValueError("flash-attn-4 takes no attention mask")
        text = encoder_hidden_states.shape[1]
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        query, key, value = (
            layer(joint).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        if image_rotary_emb is not None:
            query, key = (
                torch.cat([x[:, :, :text], apply_rotary_emb(x[:, :, text:], image_rotary_emb)], dim=2)
                for x in (query, key)
            )
        joint = self._attention(query, key, value).transpose(1, 2).flatten(2)
        joint = attn.to_out[1](attn.to_out[0](joint))
        return joint[:, text:], joint[:, :text]


def flash_attention_4() -> Attention:
    """Return the kernel of flash-attn-4 as an operator that ``torch.compile`` and selective recomputation know.

    It computes in the values' type where that is bf16 or fp16, else in bf16.
    """
    from cogtune.modeling.engine.flash4 import attention, operator

    if operator not in ATTENTION_OPS:
        ATTENTION_OPS.append(operator)
    return attention


def measure(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, *, repeats: int = 3
) -> dict[AttentionKernel, float]:
    """Return seconds of a forward and a backward pass by kernel, for those that can do it; fastest first.

    Args:
        shape: ``[B, H, N, D]`` of queries, keys and values.
    """
    found: dict[AttentionKernel, float] = {}
    kernels: list[AttentionKernel] = ["cudnn", "flash", *([FLASH_4] if has_flash_4() else [])]  # type: ignore[list-item]
    for tried in (kernels, ["efficient"]):
        if found:
            break
        for kernel in tried:
            with contextlib.suppress(RuntimeError):  # this kernel does not do this type, shape or GPU
                found[kernel] = _seconds(kernel, shape, dtype, device, repeats)  # type: ignore[index, arg-type]
    return dict(sorted(found.items(), key=lambda pair: pair[1]))


def _seconds(
    kernel: AttentionKernel, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, repeats: int
) -> float:
    attention: Attention = flash_attention_4() if kernel == FLASH_4 else scaled_dot_product_attention
    random = torch.Generator(device).manual_seed(0)
    inputs = [torch.randn(shape, dtype=dtype, device=device, generator=random).requires_grad_() for _ in range(3)]
    times = []
    with using(kernel):
        for _ in range(repeats + 1):
            torch.cuda.synchronize(device)
            began = time.perf_counter()
            result = attention(*inputs)
            torch.autograd.grad(result, inputs, result)
            torch.cuda.synchronize(device)
            times.append(time.perf_counter() - began)
    return min(times[1:])


def fastest(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, memory: Path
) -> AttentionKernel | None:
    """Return the fastest kernel for such attention on this GPU, measured once and read from the file ``memory``
    after that.

    None without a GPU, or where no fused kernel can do it.
    """
    if device.type != "cuda":
        return None
    key = f"{torch.cuda.get_device_name(device)} | {versions()} | {dtype} | {'x'.join(map(str, shape))}"
    found: dict[str, dict[AttentionKernel, float]] = {}
    with contextlib.suppress(CogtuneError):  # damaged, or another program's
        found = read_json(memory) if memory.is_file() else {}
    if key not in found:
        found[key] = {kernel: round(taken, 6) for kernel, taken in measure(shape, dtype, device).items()}
        torch.cuda.empty_cache()
        with contextlib.suppress(CogtuneError):  # measured again the next time
            write_json(memory, found)
    return next(iter(found[key]), None)
