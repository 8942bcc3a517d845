"""Timing of a clip's frames: its rate measured from timestamps, and the choice of frames by them.

Times are seconds from the clip's first frame. For a clip with evenly spaced frames none are kept: its rate suffices,
and :mod:`cogtune.models.geometry` chooses its frames.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise

SAME_TIME = 0.1
"""Largest deviation, in usual gaps, of a frame that counts as evenly spaced."""

PAUSE = 2.5
"""A gap of more than this many usual ones is a pause, which does not count for the rate."""


@dataclass(frozen=True)
class Timing:
    """The timing of a clip's frames.

    Args:
        fps: frames per second, without the pauses of an uneven clip.
        times: of each frame, ascending; empty if they are evenly spaced at ``fps``.
        uneven: the fraction of the clip's time by which its gaps are longer or shorter than usual.
    """

    fps: float
    times: tuple[float, ...] = ()
    uneven: float = 0.0


def measure(ticks: Sequence[int], tick: Fraction, claimed: Iterable[Fraction | None] = ()) -> Timing | None:
    """Return the timing by timestamps; None if they are fewer than two or all equal.

    Args:
        ticks: the timestamp of each frame, in display order.
        tick: the length of a tick in seconds.
        claimed: rates that the container or the codec declares. The first that agrees with the timestamps, which
            are rounded to ticks, counts as exact.
    """
    gaps = [later - earlier for earlier, later in pairwise(ticks)]
    rising = [gap for gap in gaps if gap > 0]
    if not rising:
        return None
    usual = sorted(rising)[(len(rising) - 1) // 2]
    times = [*accumulate((usual if gap < 0 else gap for gap in gaps), initial=0)]  # a clock that was set back continues
    measured = Fraction(len(gaps), times[-1]) / tick
    even_steps = len(set(gaps)) == 1  # then the last frame is the farthest off
    places = [len(gaps)] if even_steps else range(len(times))
    for rate in (*claimed, measured):
        if rate and _is_even(times, places, float(1 / rate / tick)):
            return Timing(float(rate))
    moving = [gap for gap in rising if gap <= PAUSE * usual]
    fps = len(moving) / (sum(moving) * tick)
    off = sum(abs(gap - usual) for gap in gaps if abs(gap - usual) > _rounding(usual))
    return Timing(float(fps), tuple(round(time * float(tick), 6) for time in times), min(1.0, off / times[-1]))


def _is_even(times: Sequence[int], places: Iterable[int], gap: float) -> bool:
    """Return whether the frames at ``places`` are at multiples of ``gap``, up to rounding."""
    allowed = _rounding(gap)
    return all(abs(times[place] - place * gap) <= allowed for place in places)


def _rounding(gap: float) -> float:
    """Return by how many ticks a frame may be off: as much as rounding explains, but less than a missing frame."""
    return max(min(1.0, gap / 4), SAME_TIME * gap)


# ------------------------------------------------------------------------------------------- choosing frames


def at_rate(times: Sequence[float], fps: float, start: int = 0) -> list[int]:
    """Return the frames at ``fps`` from frame ``start`` on: those nearest to ``k / fps`` seconds after it.

    A gap longer than ``1 / fps`` counts as that long, so that no frame is repeated: freezes are skipped, and a part
    slower than ``fps`` is read frame by frame.
    """
    if start >= len(times):
        return []
    gaps = [later - earlier for earlier, later in pairwise(times[start:])]
    clock = _clock(gaps, 1 / fps)
    reach = clock[-1] + min([1 / fps, *gaps[-1:]]) / 2
    chosen, count = [start], 1
    while (target := count / fps) < reach - _SAME:
        index = start + _nearest(clock, target)
        if index <= chosen[-1]:  # the clip's end
            break
        chosen.append(index)
        count += 1
    return chosen


def spread(times: Sequence[float], first: int, end: int, num_frames: int) -> list[int]:
    """Return ``num_frames`` frames spread evenly in time from frame ``first`` to frame ``end - 1``, without repeats.

    A gap longer than the distance between chosen frames counts as that long.

    Raises:
        ValueError: there are too few frames; the message says how many are needed.
    """
    if end - first < num_frames:
        raise ValueError(
            f"needs at least {num_frames} frames to choose {num_frames} from, but has {max(0, end - first)}"
        )
    if num_frames == 1:
        return [first]
    gaps = [later - earlier for earlier, later in pairwise(times[first:end])]
    rest, parts = sum(gaps), num_frames - 1
    for gap in sorted(gaps, reverse=True):
        if parts <= 1 or gap * parts <= rest:
            break
        rest, parts = rest - gap, parts - 1  # longer than what is left for each: it is one step by itself
    step = rest / parts
    clock = _clock(gaps, step)
    chosen = [first]
    for number in range(1, num_frames - 1):
        index = first + _nearest(clock, number * step)
        chosen.append(min(max(index, chosen[-1] + 1), end - num_frames + number))
    return [*chosen, end - 1]


def last_start(times: Sequence[float], fps: float, num_frames: int, first: int, end: int) -> int:
    """Return the last frame from ``first`` on from which ``num_frames`` frames at ``fps`` end before ``end``.

    Returns ``first`` if there is none.
    """
    low, high = first, max(first, end - num_frames)
    while low < high:
        middle = (low + high + 1) // 2
        if len(at_rate(times[:end], fps, middle)) >= num_frames:
            low = middle
        else:
            high = middle - 1
    return low


def standstill(times: Sequence[float], longest: float) -> float:
    """Return the total time in seconds by which gaps between frames are longer than ``longest``."""
    return sum(max(0.0, later - earlier - longest) for earlier, later in pairwise(times))


_SAME = 1e-6
"""Decimals of times: microseconds."""


def _clock(gaps: Sequence[float], longest: float) -> list[float]:
    """Return the times of frames with every gap limited to ``longest``."""
    return [*accumulate((min(gap, longest) for gap in gaps), initial=0.0)]


def _nearest(clock: Sequence[float], target: float) -> int:
    """Return the frame nearest to ``target``, the later of two equally near ones."""
    later = bisect_left(clock, target - _SAME)
    if later == len(clock):
        return later - 1
    if later and target - clock[later - 1] < clock[later] - target - _SAME:
        return later - 1
    return later
