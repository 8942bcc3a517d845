"""What the strategy ``stream`` keeps in host memory for each trained weight, and in which format."""

from __future__ import annotations

from typing import Literal

MasterWeights = Literal["fp32", "split", "stochastic"]
"""What the optimizer adds its steps to beside weights in bf16.

An fp32 copy; the 16 bits that bf16 leaves out of one; or nothing, where each step is rounded up or down at random.
"""

Moments = Literal["fp32", "bf16", "8bit"]
"""In which the two moments of Adam are kept."""

_MASTER_BYTES: dict[MasterWeights, float] = {"fp32": 4, "split": 2, "stochastic": 0}
_MOMENT_BYTES: dict[Moments, float] = {"fp32": 8, "bf16": 4, "8bit": 2 + 2 * 4 / 256}
_AVERAGE_BYTES = 4


def state_bytes(master: MasterWeights, moments: Moments, *, weights: int, averages: bool) -> float:
    """Return bytes of the optimizer's state for each weight.

    Args:
        weights: bytes of a weight that the model computes with; one of 4 needs no copy.
        averages: whether a moving average of the weights is kept.
    """
    beside = 0.0 if weights == 4 else _MASTER_BYTES[master]
    return beside + _MOMENT_BYTES[moments] + (_AVERAGE_BYTES if averages else 0)
