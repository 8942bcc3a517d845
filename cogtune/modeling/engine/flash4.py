"""FlashAttention 4 (package flash-attn-4) as a custom operator with a gradient.

Its functions take ``[B, N, H, D]``. They are compiled for the GPU when they are first called.
"""

from __future__ import annotations

from typing import Any

import torch
from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd
from torch import Tensor


@torch.library.custom_op("cogtune::flash_attention_4", mutates_args=())
def _forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    result = _flash_attn_fwd(query.contiguous(), key.contiguous(), value.contiguous(), return_lse=True)
    return result[0], result[1]


@_forward.register_fake
def _(query: Tensor, _key: Tensor, _value: Tensor) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((batch, heads, tokens), dtype=torch.float32)


@torch.library.custom_op("cogtune::flash_attention_4_backward", mutates_args=())
def _backward(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, gradient: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    result = _flash_attn_bwd(
        query.contiguous(), key.contiguous(), value.contiguous(), output, gradient.contiguous(), sums
    )
    return result[0], result[1], result[2]


@_backward.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, _output: Tensor, _gradient: Tensor, _sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _gradients(context: Any, gradient: Tensor, _of_sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, output, sums = context.saved_tensors
    result: tuple[Tensor, Tensor, Tensor] = _backward(query, key, value, output, gradient, sums)
    return result


_forward.register_autograd(_gradients, setup_context=_save)

operator = torch.ops.cogtune.flash_attention_4.default


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return attention of ``[B, H, N, D]`` queries, keys and values; the result is a view of ``[B, N, H, D]``
    memory."""
    # Norms leave queries and keys in fp32 under autocast; the values are still of the run's type.
    dtype = value.dtype if value.dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    rows = (x.to(dtype) for x in (query, key, value))
    # Made contiguous here, where the compiler can have it written so at once.
    output, _ = _forward(*(x.transpose(1, 2).contiguous() for x in rows))
    result: Tensor = output.transpose(1, 2)
    return result
