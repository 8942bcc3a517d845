"""Frames are chosen by the times at which they are shown, and a rate is measured before it is believed."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction

import pytest

from cogtune.data.video import timing
from cogtune.data.video.timing import at_rate, last_start, measure, spread, standstill
from cogtune.models.geometry import frame_indices, longest_at, spread_indices

MILLISECOND = Fraction(1, 1000)


def rounded(times: list[float], tick: Fraction = MILLISECOND) -> list[int]:
    return [round(time / tick) for time in times]


def steady(count: int, fps: float, start: float = 0.0) -> list[float]:
    return [start + k / fps for k in range(count)]


# --------------------------------------------------------------------------------------------------- measuring


@pytest.mark.parametrize("fps", [Fraction(8), Fraction(24000, 1001), Fraction(30), Fraction(60), Fraction(240)])
@pytest.mark.parametrize("tick", [Fraction(1, 1000), Fraction(1, 90000), Fraction(1, 15360)])
def test_a_claimed_rate_is_exact_where_rounded_timestamps_agree(fps: Fraction, tick: Fraction) -> None:
    ticks = rounded(steady(2000, float(fps), 0.3), tick)
    found = measure(ticks, tick, (Fraction(1000), None, fps))
    assert found == timing.Timing(float(fps))


@pytest.mark.parametrize("claimed", [Fraction(1000), Fraction(20), Fraction(30000, 1001), None])
def test_a_claimed_rate_is_not_believed_against_the_timestamps(claimed: Fraction | None) -> None:
    found = measure(rounded(steady(900, 30.0)), MILLISECOND, [claimed])
    assert found is not None
    assert found.fps == pytest.approx(30.0, abs=0.002)
    assert (found.times, found.uneven) == ((), 0.0)


@pytest.mark.parametrize(
    ("times", "fps", "uneven"),
    [
        ([*steady(60, 30), *steady(60, 30, 4.0)], 30, 2 / 6),  # a pause of two seconds
        ([*steady(50, 25), 60.0], 25, 58 / 60),  # a picture that stays for a minute
        ([k * 0.0415 + (k % 2) * 0.008 for k in range(200)], 24.1, None),  # a film shown as a television does it
        ([*steady(25, 25), *steady(50, 25, 1.04)], 25, 0.04 / 3),  # one frame is missing
    ],
)
def test_pauses_are_no_part_of_the_rate_and_unevenness_is_a_share_of_the_time(
    times: list[float], fps: float, uneven: float | None
) -> None:
    found = measure(rounded(times), MILLISECOND, [Fraction(1000)])
    assert found is not None
    assert found.fps == pytest.approx(fps, rel=0.03)
    assert found.times == pytest.approx(times, abs=0.001)
    assert uneven is None or found.uneven == pytest.approx(uneven, abs=0.02)


def test_one_missing_frame_is_seen_even_where_a_tick_is_a_frame() -> None:
    found = measure([0, 1, 2, 4, 5, 6], Fraction(1, 25), [Fraction(25)])
    assert found is not None
    assert found.times == (0.0, 0.04, 0.08, 0.16, 0.2, 0.24)


def test_a_clock_that_is_set_back_goes_on() -> None:
    found = measure([0, 40, 80, 20, 60, 100], MILLISECOND)
    assert found == timing.Timing(25.0)


@pytest.mark.parametrize("ticks", [[], [7], [7, 7, 7]])
def test_without_two_times_there_is_nothing_to_measure(ticks: list[int]) -> None:
    assert measure(ticks, MILLISECOND, [Fraction(30)]) is None


# ---------------------------------------------------------------------------------------------------- choosing


@pytest.mark.parametrize("rate", [5.0, 11.0, 23.976, 30.0, 59.94])
@pytest.mark.parametrize("fps", [7.9, 8.0, 16.0, 24.0])
def test_evenly_spaced_frames_are_those_that_counting_gives(rate: float, fps: float) -> None:
    for count in (1, 9, 40, 200):
        times = steady(count, rate)
        for start in (0, 3):
            longest = longest_at(count, rate, fps, start)
            expected = frame_indices(count, rate, longest, fps, start) if longest else []
            assert at_rate(times, fps, start) == expected
    assert spread(times, 2, 190, 17) == spread_indices(2, 190, 17)


def test_each_frame_taken_is_the_one_nearest_in_time() -> None:
    chance = random.Random(0)
    times = [k / 30 + chance.uniform(-0.012, 0.012) for k in range(300)]
    times = [time - times[0] for time in times]
    for number, index in enumerate(at_rate(times, 8.0)):
        assert abs(times[index] - number / 8) == min(abs(time - number / 8) for time in times)


def test_a_pause_is_passed_over_and_the_clock_goes_on_behind_it() -> None:
    times = [*steady(60, 30), *steady(60, 30, 4.0)]
    chosen = at_rate(times, 8.0)
    steps = [times[later] - times[earlier] for earlier, later in itertools.pairwise(chosen)]
    assert len(chosen) == 33  # two seconds, the eighth that a pause is worth, and two seconds
    assert sum(step > 0.2 for step in steps) == 1
    assert sorted(steps)[:-1] == pytest.approx([0.125] * 31, abs=1 / 30)
    assert standstill(times, 0.1875) == pytest.approx(4.0 - 59 / 30 - 0.1875)


def test_a_slow_part_is_taken_frame_by_frame() -> None:
    times = [*steady(10, 4), *steady(40, 40, 2.5)]
    chosen = at_rate(times, 8.0)
    assert chosen[:11] == list(range(11))
    assert chosen[11:14] == [15, 20, 25]


def test_no_frame_comes_twice_however_its_times_lie() -> None:
    for seed in range(300):
        chance = random.Random(seed)
        times, now = [], 0.0
        for _ in range(chance.randint(1, 60)):
            times.append(now)
            now += chance.choice((0.0, 0.001, 0.03, 0.03, 0.04, 0.125, 0.5, 9.0))
        fps, start = chance.choice((4.0, 8.0, 24.0)), chance.randint(0, 5)
        chosen = at_rate(times, fps, start)
        assert chosen == sorted(set(chosen))
        assert chosen[:1] == ([start] if start < len(times) else [])
        for count in (1, 2, 7, len(times)):
            if len(times) >= count:
                evenly = spread(times, 0, len(times), count)
                assert len(evenly) == count
                assert evenly == sorted(set(evenly))
                assert evenly[0] == 0
                assert count == 1 or evenly[-1] == len(times) - 1
        if chosen:
            last = last_start(times, fps, len(chosen), start, len(times))
            assert len(at_rate(times, fps, last)) >= len(chosen)


def test_spreading_over_too_few_says_how_many_it_needs() -> None:
    with pytest.raises(ValueError, match="needs at least 9 frames to choose 9 from, but has 4"):
        spread(steady(6, 30), 2, 6, 9)
