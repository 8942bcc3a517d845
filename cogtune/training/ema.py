"""A moving average of the trained weights, in host memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class EMAWeights:
    """The exponential moving average of parameters that are on the GPU; it begins with their values.

    Under strategy ``stream`` it is a part of the optimizer's state instead (``modeling.engine.flat_adam``).
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], decay: float) -> None:
        self._parameters = dict(parameters)
        self._decay = decay
        self.values = {name: _on_the_host(parameter) for name, parameter in self._parameters.items()}
        """In fp32, by name."""

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the current weights."""
        for name, parameter in self._parameters.items():
            self.values[name].lerp_(parameter.detach().to("cpu", torch.float32), 1 - self._decay)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Swap the average into the parameters inside the context."""
        before = {name: parameter.detach().to("cpu", copy=True) for name, parameter in self._parameters.items()}
        self._put(self.values)
        try:
            yield
        finally:
            self._put(before)

    def resume(self, values: Mapping[str, Tensor]) -> None:
        """Restore a saved average.

        Raises:
            ValueError: it is one of other parameters.
        """
        if values.keys() != self.values.keys() or any(values[n].shape != v.shape for n, v in self.values.items()):
            raise ValueError("the moving average is not one of these weights")
        for name, value in values.items():
            self.values[name].copy_(value)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])


def _on_the_host(parameter: Tensor) -> Tensor:
    return parameter.detach().to("cpu", torch.float32, copy=True)
