"""Adam on flat buffers, with its state and master weights in several number formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from cogtune.config.stream import MasterWeights, Moments
from cogtune.modeling.engine import blockwise_quantization as blockwise
from cogtune.modeling.engine.flat_buffer import Piece, padded

_MOMENTS = ("exp_avg", "exp_avg_sq")
AVERAGE = "average"
"""Of the state: the moving average of the weights."""

_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Step:
    """One step of the optimizer, as far as it is the same for all weights."""

    number: int
    """The first is 1."""
    learning_rate: float
    clip_coefficient: Tensor
    """What gradients are multiplied by."""


@dataclass(frozen=True, kw_only=True)
class FlatAdam:
    """Adam or AdamW, and the formats of its state, which is a dict of flat tensors.

    Source of the step: the functions behind ``torch.optim.Adam`` and ``AdamW``, with their fused kernel.
    """

    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    decoupled: bool
    """Whether weight decay is apart from the gradient, as AdamW's is."""
    weight_dtype: torch.dtype
    """In which the model computes."""
    master: MasterWeights = "fp32"
    moments: Moments = "fp32"
    decay: float | None = None
    """Of the weights' moving average; None for none."""
    seed: int = 0
    """Decides how weights are rounded under ``stochastic``."""

    @property
    def reads_weights(self) -> bool:
        """Whether a step begins with the weights themselves, not with a copy of them in the state."""
        return self.master != "fp32" or self.weight_dtype == torch.float32

    def state_of(self, numbers: int) -> dict[str, tuple[torch.dtype, int]]:
        """Return type and size of each tensor of the state of ``numbers`` weights, a multiple of 256."""
        found: dict[str, tuple[torch.dtype, int]] = {}
        if not self.reads_weights:
            found["master"] = (torch.float32, numbers)
        if self.master == "split":
            found["low"] = (torch.int16, numbers)
        for name in _MOMENTS:
            if self.moments == "8bit":
                found[name] = (torch.uint8, numbers)
                found[f"{name}_scale"] = (torch.float32, numbers // blockwise.BLOCK)
            else:
                found[name] = (torch.bfloat16 if self.moments == "bf16" else torch.float32, numbers)
        if self.decay is not None:
            found[AVERAGE] = (torch.float32, numbers)
        return found

    def begin(self, weights: Tensor, state: Mapping[str, Tensor], values: Tensor, place: slice) -> None:
        """Set a parameter's weights and state as they are before the first step.

        Args:
            values: the parameter's values in fp32, flat.
        """
        if "master" in state:
            state["master"][place] = values
        if self.master == "split":
            _split(values, weights[place], state["low"][place])
        else:
            weights[place] = values.to(self.weight_dtype)
        if AVERAGE in state:
            state[AVERAGE][place] = values if self.master != "stochastic" else weights[place].float()

    def step(
        self,
        weights: Tensor,
        state: Mapping[str, Tensor],
        gradient: Tensor,
        pieces: Sequence[Piece],
        step: Step,
        *,
        part: int,
    ) -> None:
        """Make one step on a shard of weights, in place.

        Args:
            weights: ``[n]``, as ``state`` and ``gradient``, all on one device.
            pieces: which parameters are in the shard; what is between them is padding.
            part: number of the weights among all, for the random numbers of rounding.
        """
        random = None
        if self.master == "stochastic":
            random = torch.Generator(weights.device).manual_seed(
                (self.seed * _GOLDEN + step.number * 0xBF58476D1CE4E5B9 + part) & (2**63 - 1)
            )
        for piece in pieces:
            self._step(weights, state, gradient[piece.place], piece, step, random)

    def _step(
        self,
        weights: Tensor,
        state: Mapping[str, Tensor],
        gradient: Tensor,
        piece: Piece,
        step: Step,
        random: torch.Generator | None,
    ) -> None:
        own = weights[piece.place]
        master = self._master(own, state, piece)
        moments = [self._moment(state, name, piece) for name in _MOMENTS]
        (adamw if self.decoupled else adam)(
            [master],
            [gradient.to(torch.float32, copy=True).mul_(step.clip_coefficient)],
            [moments[0]],
            [moments[1]],
            [],
            [torch.full((), float(step.number - 1), device=weights.device)],  # a copy would wait for the GPU
            fused=True,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=step.learning_rate,
            weight_decay=self.weight_decay,
            eps=self.epsilon,
            maximize=False,
        )
        for name, moment in zip(_MOMENTS, moments, strict=True):
            self._put_moment(state, name, piece, moment)
        if self.master == "split":
            _split(master, own, state["low"][piece.place])
        elif random is not None:
            _round(master, own, random)
            master = own.float()
        elif master is not own:
            own.copy_(master)
        if self.decay is not None:
            state[AVERAGE][piece.place].lerp_(master, 1 - self.decay)

    def _master(self, own: Tensor, state: Mapping[str, Tensor], piece: Piece) -> Tensor:
        """Return a piece of the master weights in fp32."""
        if not self.reads_weights:
            return state["master"][piece.place]
        if self.master == "split":
            return _joined(own, state["low"][piece.place])
        return own if own.dtype == torch.float32 else own.float()

    def _moment(self, state: Mapping[str, Tensor], name: str, piece: Piece) -> Tensor:
        """Return a piece of a moment in fp32: the state's own memory if it is kept in fp32."""
        if self.moments != "8bit":
            return state[name][piece.place].float()
        scales = state[f"{name}_scale"][_scales(piece)]
        return blockwise.dequantize(state[name][piece.room], scales, signed=name == "exp_avg")[: piece.size]

    def _put_moment(self, state: Mapping[str, Tensor], name: str, piece: Piece, moment: Tensor) -> None:
        if self.moments == "bf16":
            state[name][piece.place].copy_(moment)
        elif self.moments == "8bit":
            filled = pad(moment, (0, padded(piece.size) - piece.size))
            scales = state[f"{name}_scale"][_scales(piece)]
            blockwise.quantize(filled, state[name][piece.room], scales, signed=name == "exp_avg")


def _scales(piece: Piece) -> slice:
    """Return the place of a piece's scales among those of its shard."""
    return slice(piece.room.start // blockwise.BLOCK, piece.room.stop // blockwise.BLOCK)


def _joined(high: Tensor, low: Tensor) -> Tensor:
    """Join bf16 weights and their low bits into fp32 numbers."""
    return ((high.view(torch.int16).int() << 16) + low.int()).view(torch.float32)


def _split(numbers: Tensor, high: Tensor, low: Tensor) -> None:
    """Split fp32 numbers into the nearest bf16 numbers and 16 bits each of what remains, without loss.

    Ties are rounded away from zero: rounding them to even would need one more bit.
    """
    bits = numbers.view(torch.int32)
    nearest = (bits + 0x8000) >> 16
    low.copy_(bits - (nearest << 16))
    high.view(torch.int16).copy_(nearest)


def _round(numbers: Tensor, weights: Tensor, random: torch.Generator) -> None:
    """Round fp32 numbers to bf16, up or down at random, so that their mean is kept.

    Source: torchao's ``_fp32_to_bf16_sr``.
    """
    bits = numbers.view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=random)
    weights.view(torch.int16).copy_((bits + noise) >> 16)
