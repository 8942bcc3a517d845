"""AdamW with its state and an fp32 copy of the weights in host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class CPUOffloadAdamW(torch.optim.Optimizer):
    """torch's fused AdamW on the CPU, for weights on another device.

    Gradients are fetched in :meth:`step`, after they were accumulated, unscaled and clipped. (torchao's
    ``CPUOffloadOptimizer`` fetches them in the backward pass, so clipping and loss scaling do not reach its step.)
    """

    def __init__(self, groups: Iterable[dict[str, Any]], **settings: Any) -> None:
        super().__init__(groups, settings)
        self._here = [parameter for group in self.param_groups for parameter in group["params"]]
        self._host = [torch.nn.Parameter(torch.empty_like(parameter, device="cpu")) for parameter in self._here]
        self._fetch()
        self._inner = torch.optim.AdamW(self._host, fused=True, **settings)

    @torch.no_grad()
    def _fetch(self) -> None:
        for host, here in zip(self._host, self._here, strict=True):
            host.copy_(here)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Fetch the gradients, step, and put the weights back."""
        loss = None if closure is None else closure()
        self._inner.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        for host, here in zip(self._host, self._here, strict=True):
            host.grad = None if here.grad is None else here.grad.to(host.device)
        self._inner.step()
        for host, here in zip(self._host, self._here, strict=True):
            here.copy_(host)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return AdamW's own state."""
        return self._inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, and copy the current weights: a checkpoint's weights are loaded before its optimizer."""
        self._inner.load_state_dict(state_dict)
        self._fetch()
