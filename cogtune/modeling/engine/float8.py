"""Matrix products with frozen weights in 8-bit floating point; what is trained stays in full precision.

Weights are e4m3 with one scale each, inputs e4m3 and gradients e5m2 with scales computed on the fly. Source of the
formats: Micikevicius et al. 2022, "FP8 Formats for Deep Learning".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cogtune.system.errors import UsageError

WEIGHTS, GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2

_MULTIPLE = 16
"""Sizes of a product that hardware takes."""
_SMALLEST = 1e-20
"""Below the magnitude of any value that matters: keeps the scale of zeros above zero."""
_PARTS = ("attn1.", "ff.")
"""Of a block: where products are over all tokens."""


def supported(device: torch.device) -> bool:
    """Return whether ``device`` has such products: compute capability 8.9 and later, and CPUs."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 9)


def quantize(numbers: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return ``numbers`` in 8 bits, and what they are to be multiplied by, in fp32."""
    scale = numbers.abs().amax().float().clamp(min=_SMALLEST) / torch.finfo(dtype).max
    return (numbers.float() / scale).to(dtype), scale


def _product(numbers: Tensor, weight: Tensor, scales: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """Return ``numbers [n, in]`` times ``weight [out, in]``, both in 8 bits, as ``[n, out]``."""
    if numbers.device.type == "cpu":  # PyTorch's own is many times slower there
        return ((numbers.float() @ weight.float().t()) * (scales[0] * scales[1])).to(dtype)
    return torch._scaled_mm(
        numbers, weight.t(), scale_a=scales[0], scale_b=scales[1], out_dtype=dtype, use_fast_accum=True
    )


class _Product(torch.autograd.Function):
    """``inputs [n, in]`` times a weight ``[out, in]``, of which both layouts are needed."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, transposed: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(transposed, scale)
        numbers, own = quantize(inputs, WEIGHTS)
        return _product(numbers, weight, (own, scale), inputs.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        transposed, scale = ctx.saved_tensors
        numbers, own = quantize(gradients[0].contiguous(), GRADIENTS)
        return _product(numbers, transposed, (own, scale), gradients[0].dtype), None, None, None


class Float8Linear(nn.Module):
    """A linear layer with a frozen weight in 8 bits."""

    def __init__(
        self, linear: nn.Linear, dtype: torch.dtype, device: torch.device, *, differentiable: bool = True
    ) -> None:
        """Quantize a layer's weight on ``device``; it stays where it was.

        Args:
            dtype: of the layer's inputs and outputs.
            differentiable: whether a backward pass is needed, which takes the weight's transpose, too.
        """
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = dtype
        weight, scale = quantize(linear.weight.data.to(device), WEIGHTS)
        home = linear.weight.device
        self.weight = _frozen(weight.to(home))
        self.transposed = _frozen(weight.t().contiguous().to(home)) if differentiable else None
        self.scale = _frozen(scale.to(home))
        bias: Tensor | None = linear.bias  # as the layer was made with or without one
        self.bias = None if bias is None else _frozen(bias.data.to(dtype))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the layer's outputs ``[..., out]`` for ``inputs [..., in]``."""
        if self.transposed is None:  # a scale for each sample, so that a batch changes none of them
            samples = inputs if inputs.dim() > 2 else inputs.unsqueeze(0)
            outputs = torch.cat([self._inferred(sample) for sample in samples])
        else:
            flat = inputs.to(self.dtype).reshape(-1, self.in_features)
            product: Any = _Product.apply
            outputs = product(flat, self.weight, self.transposed, self.scale)
        if self.bias is not None:
            outputs = outputs + self.bias
        return outputs.view(*inputs.shape[:-1], self.out_features)

    def _inferred(self, inputs: Tensor) -> Tensor:
        flat = inputs.to(self.dtype).reshape(-1, self.in_features)
        numbers, own = quantize(flat, WEIGHTS)
        return _product(numbers, self.weight, (own, self.scale), flat.dtype)


def _frozen(numbers: Tensor) -> nn.Parameter:
    return nn.Parameter(numbers, requires_grad=False)


def _replaceable(block: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """List the frozen layers of a block whose products are over all tokens, by name."""
    for name, module in block.named_modules():
        if type(module) is not nn.Linear or not name.startswith(_PARTS) or module.weight.requires_grad:
            continue
        if module.in_features % _MULTIPLE == 0 and module.out_features % _MULTIPLE == 0:
            yield name, module


def use_float8(
    blocks: nn.ModuleList, *, dtype: torch.dtype, device: torch.device, differentiable: bool = True
) -> list[str]:
    """Replace the frozen linear layers of attention and feed-forward by ones in 8 bits.

    Args:
        blocks: a transformer's, with their adapters in place.
        dtype: of activations.
        device: where weights are quantized.
        differentiable: whether there will be backward passes.

    Returns:
        The names of the new layers, counted from ``blocks``.

    Raises:
        UsageError: the GPU has no fp8.
    """
    if not supported(device):
        raise UsageError(
            f"--base-precision fp8: {torch.cuda.get_device_name(device)} has no fp8 arithmetic",
            "use a GPU of compute capability 8.9 or later (RTX 40, H100), or remove --base-precision",
        )
    replaced = []
    for number, block in enumerate(blocks):
        for name, linear in list(_replaceable(block)):
            parent, _, own = name.rpartition(".")
            setattr(
                block.get_submodule(parent), own, Float8Linear(linear, dtype, device, differentiable=differentiable)
            )
            replaced.append(f"{number}.{name}")
    return replaced
