"""Orientation of stored frames, from their whole display matrix, mirroring included."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import av.video
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True)
class Orientation:
    """One of the eight orientations of a frame: mirrored left to right first, then rotated.

    Args:
        turns: quarter turns counterclockwise, 0 to 3.
        mirrored: whether it is mirrored left to right before the rotation.
    """

    turns: int = 0
    mirrored: bool = False

    @property
    def on_its_side(self) -> bool:
        """Whether height and width are swapped."""
        return self.turns % 2 == 1

    def apply(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Return the stored frame ``[H, W, 3]`` as it is shown."""
        import numpy as np

        return np.rot90(pixels[:, ::-1] if self.mirrored else pixels, self.turns)


_DISPLAY_MATRIX = "DISPLAYMATRIX"


def orientation_of(frame: av.VideoFrame) -> Orientation:
    """Return the orientation of a decoded frame's display matrix, rounded to the nearest quarter turn."""
    from av.sidedata import sidedata

    # not by frame.side_data: it and the frame would hold each other, and frames pile up until such pairs are collected
    container: Any = sidedata.SideDataContainer
    data = container(frame).get(_DISPLAY_MATRIX)
    return Orientation() if data is None else from_matrix(bytes(data))


def from_matrix(matrix: bytes) -> Orientation:
    """Return the orientation of a display matrix.

    Args:
        matrix: nine 32-bit integers ``a b u, c d v, x y w`` in native byte order, as in libavutil: a
            stored point (p, q) is shown at (a p + c q, b p + d q), with q counted downwards.
    """
    if len(matrix) != 36:
        return Orientation()
    a, b, _, c, d, *_ = struct.unpack("=9i", matrix)
    mirrored = a * d - b * c < 0
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Orientation(2 if d < 0 else 0, mirrored)
    # the stored frame's left-to-right axis becomes the vertical one: upwards after one turn, or one of a mirrored frame
    upwards = b < 0
    return Orientation(1 if upwards != mirrored else 3, mirrored)


def turned_by_rotation(frame: av.VideoFrame) -> Orientation:
    """Return the orientation that a decoder applies that reads only a display matrix's angle."""
    return Orientation(round(frame.rotation / 90) % 4)
