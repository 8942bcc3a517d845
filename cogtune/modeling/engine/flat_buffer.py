"""Where parameters lie in one flat buffer, and which part of it is each process's shard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 256
"""Numbers at whose multiples parameters and shards begin.

That is a block of 8-bit moments, and a whole number of vectors, so that the arithmetic of a parameter that two
processes hold is that of one process, to the bit.
"""


def padded(numbers: int) -> int:
    """Round ``numbers`` up to where another parameter may begin."""
    return -(-numbers // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Piece:
    """The part of a parameter that is in a shard."""

    parameter: int
    """Its number in the part."""
    start: int
    """Where it begins in the shard."""
    size: int
    """Numbers, without padding."""

    @property
    def place(self) -> slice:
        """Its numbers in the shard."""
        return slice(self.start, self.start + self.size)

    @property
    def room(self) -> slice:
        """The same with the padding behind them."""
        return slice(self.start, self.start + padded(self.size))


class FlatBufferSpec:
    """The places of parameters in a flat buffer that is divided into equal shards."""

    def __init__(self, shapes: Sequence[torch.Size], shards: int) -> None:
        self._shapes = list(shapes)
        self._starts = []
        end = 0
        for shape in self._shapes:
            self._starts.append(end)
            end += padded(shape.numel())
        self.shard_size = padded(-(-end // shards))
        """Numbers of each shard, padding included."""
        self.size = self.shard_size * shards
        """Numbers of the whole buffer."""

    def views(self, flat: Tensor) -> list[Tensor]:
        """Return the parameters as views of a buffer of at least ``size`` numbers."""
        return [
            flat[start : start + shape.numel()].view(shape)
            for start, shape in zip(self._starts, self._shapes, strict=True)
        ]

    def own(self, flat: Tensor, rank: int) -> Tensor:
        """Return the shard of process ``rank`` in such a buffer."""
        return flat[rank * self.shard_size : (rank + 1) * self.shard_size]

    def pieces(self, rank: int) -> list[Piece]:
        """List what is in the shard of process ``rank``, in order."""
        first, last = rank * self.shard_size, (rank + 1) * self.shard_size
        found = []
        for number, (start, shape) in enumerate(zip(self._starts, self._shapes, strict=True)):
            low, high = max(start, first), min(start + shape.numel(), last)
            if low < high:
                found.append(Piece(number, low - first, high - low))
        return found

    def first(self, piece: Piece, rank: int) -> int:
        """Return the offset in its parameter at which a piece in the shard of process ``rank`` begins."""
        return rank * self.shard_size + piece.start - self._starts[piece.parameter]
