"""Formats of the optimizer's state under strategy ``stream``."""

from __future__ import annotations

from typing import Literal

MasterWeights = Literal["fp32", "split", "stochastic"]
"""Master weights: an fp32 copy; the 16 bits that bf16 leaves out of one; or none, with stochastic rounding."""

Moments = Literal["fp32", "bf16", "8bit"]
"""Formats of Adam's two moments."""

_MASTER_BYTES: dict[MasterWeights, float] = {"fp32": 4, "split": 2, "stochastic": 0}
_MOMENT_BYTES: dict[Moments, float] = {"fp32": 8, "bf16": 4, "8bit": 2 + 2 * 4 / 256}
_AVERAGE_BYTES = 4


def state_bytes(master: MasterWeights, moments: Moments, *, weights: int, averages: bool) -> float:
    """Return the bytes of the optimizer's state per weight.

    Args:
        weights: bytes of a weight that the model computes with; one of 4 needs no copy.
        averages: whether a moving average of the weights is kept.
    """
    beside = 0.0 if weights == 4 else _MASTER_BYTES[master]
    return beside + _MOMENT_BYTES[moments] + (_AVERAGE_BYTES if averages else 0)
