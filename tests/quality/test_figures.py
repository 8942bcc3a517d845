"""Each figure on drawn videos whose right value is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cogtune.data.frames import FrameSettings
from cogtune.data.layouts.base import Sample
from cogtune.data.nano import world
from cogtune.data.video.clips import Pixels, read_frames, write_video
from cogtune.models.geometry import Size
from cogtune.quality.figures import MeasuredVideo, figures_of, measure_video, unit_of
from cogtune.quality.likeness import distance, thumbnail, to_nearest, usual_distance
from cogtune.quality.looks import measure_look, ranges_of
from cogtune.quality.motion import measure_motion
from cogtune.quality.references import MeasuredClips, choose_clips, measure_clips, read_clips, write_clips
from cogtune.run.comparison import Scene, SceneKind
from tests.support.drawn import disc, grey, pan


@pytest.mark.parametrize("speed", [0.0, 1.0, 3.0, 5.0])
def test_motion_is_the_speed_of_a_shape_in_pixels_per_frame(speed: float) -> None:
    assert measure_motion(disc(speed)).speed == pytest.approx(speed, abs=0.05 + 0.03 * speed)


def test_motion_does_not_depend_on_how_much_plain_background_there_is() -> None:
    small = disc(3.0, size=(64, 96))
    large = np.pad(small, ((0, 0), (40, 40), (0, 0), (0, 0)), mode="edge")
    assert measure_motion(large).speed == pytest.approx(measure_motion(small).speed, rel=0.05)


def test_motion_of_large_frames_is_in_their_own_pixels() -> None:
    enlarged = disc(3.0).repeat(5, axis=1).repeat(5, axis=2)
    assert enlarged.shape[1:3] == (320, 480)
    assert measure_motion(enlarged).speed == pytest.approx(15, rel=0.05)


def test_a_still_neither_moves_nor_flickers_even_from_a_file(tmp_path: Path) -> None:
    still = np.repeat(pan(0)[:1], 9, axis=0)
    assert measure_motion(still).speed == pytest.approx(0, abs=1e-5)
    write_video(tmp_path / "still.mp4", still, 8)
    written = measure_motion(read_frames(tmp_path / "still.mp4", range(9)))
    assert written.speed < 0.05
    assert written.flicker < 0.6


def test_a_pan_moves_everywhere_and_does_not_flicker() -> None:
    moved = measure_motion(pan(2))
    assert moved.speed == pytest.approx(2, rel=0.1)
    assert moved.flicker < 2


def test_flicker_is_the_change_of_brightness_that_motion_does_not_explain() -> None:
    flickering = disc(0.0)
    flickering[1::2] += 10
    assert measure_motion(flickering).flicker == pytest.approx(10, abs=0.5)
    assert measure_motion(disc(3.0)).flicker < 0.3


@pytest.mark.parametrize("frames", [grey(9, 128), grey(1, 128), grey(2, 0)])
def test_plain_and_single_frames_have_figures(frames: Pixels) -> None:
    look = measure_look(frames)
    assert (look.motion, look.flicker, look.saturation, look.sharpness) == (0, 0, 0, 0)
    assert look.contrast == pytest.approx(0, abs=1e-6)


def test_saturation_is_the_spread_of_a_pixels_channels() -> None:
    red = np.zeros((3, 64, 96, 3), np.uint8)
    red[..., 0], red[..., 1:] = 200, 149
    assert measure_look(red).saturation == pytest.approx(0.2)
    red[:, :32] = 128
    assert measure_look(red).saturation == pytest.approx(0.1)


def test_contrast_is_the_deviation_of_brightness() -> None:
    halves = grey(3, 102)
    halves[:, 32:] = 153
    assert measure_look(halves).contrast == pytest.approx(0.1, abs=1e-5)


def test_a_blurred_video_is_less_sharp_and_a_clipped_one_is_counted() -> None:
    sharp = disc(3.0)
    blurred = np.mean([np.roll(sharp, shift, axis=2) for shift in range(-2, 3)], axis=0)
    assert measure_look(blurred.astype(np.uint8)).sharpness < 0.7 * measure_look(sharp).sharpness
    burnt = grey(3, 128)
    burnt[:, :16, :, 0] = 255
    burnt[:, 16:32, :, 1] = 0
    assert measure_look(burnt).clipped == pytest.approx(0.5)


def test_the_range_of_clips_leaves_an_odd_one_out() -> None:
    one = measure_look(grey(2, 128))
    looks = [one.model_copy(update={"motion": float(speed)}) for speed in [*range(1, 40), 900]]
    usual = ranges_of(looks)["motion"]
    assert 2 < usual.low < 4
    assert 37 < usual.high < 40
    assert ranges_of([]) == {}


# ---------------------------------------------------------------------------------------------------- likeness


def drawn(colour: str, shape: str, motion: str, background: str, seed: int = 0) -> Pixels:
    return world.draw(world.scene_of(world.Subject(colour, shape, motion, background), np.random.default_rng(seed)))


CLIPS = [
    drawn("pink", "heart", "beats", background, seed)
    for seed, background in enumerate(("black", "night", "black", "night"))
]


def clips(*videos: Pixels) -> MeasuredClips:
    """The same of drawn clips; no figure of a video is made of their looks."""
    return MeasuredClips(tuple(f"clip-{n}" for n in range(len(videos))), (), tuple(map(thumbnail, videos)))


def test_distances_are_differences_of_brightness() -> None:
    assert distance(thumbnail(grey(9, 51)), thumbnail(grey(17, 102))) == pytest.approx(0.2, abs=1e-6)
    assert distance(thumbnail(CLIPS[0]), thumbnail(CLIPS[0])) == 0


def test_a_copy_of_a_clip_is_found_and_another_clip_of_its_kind_is_not(tmp_path: Path) -> None:
    known = [thumbnail(clip) for clip in CLIPS]
    usual = usual_distance(known, [])
    assert usual is not None
    write_video(tmp_path / "copy.mp4", CLIPS[2], 8)
    copy = thumbnail(read_frames(tmp_path / "copy.mp4", range(17)))
    apart, number = to_nearest(copy, known)
    assert number == 2
    assert apart / usual < 0.15
    new = [to_nearest(thumbnail(drawn("pink", "heart", "beats", "black", seed)), known)[0] for seed in range(10, 16)]
    assert np.mean(new) / usual > 0.55
    assert usual_distance([], known) is None
    assert usual_distance(known[:1], [copy]) == pytest.approx(to_nearest(copy, known[:1])[0])


def scene(kind: SceneKind, prompt: str, *, trained: bool = False) -> Scene:
    return Scene(prompt=prompt, kind=kind, seed=42, trained=trained)


SCENES = [scene("prompt", "a"), scene("held-out", "b"), scene("unrelated", "c"), scene("unrelated", "d")]
BASE = [
    drawn("red", "star", "still", "black"),
    drawn("white", "disc", "still", "grey"),
    drawn("blue", "square", "right", "cream"),
    drawn("green", "ring", "falls", "pale blue"),
]


def measured(videos: list[Pixels]) -> list[MeasuredVideo]:
    return list(map(measure_video, videos))


@pytest.fixture(scope="module")
def base() -> list[MeasuredVideo]:
    return measured(BASE)


def test_the_base_itself_has_changed_nothing(base: list[MeasuredVideo]) -> None:
    found = figures_of(SCENES, base, base, clips(*CLIPS))
    assert (found.change, found.drift) == (0, 0)
    assert found.nearest is not None
    assert found.nearest > 0.8
    assert found.loss is None


def test_other_prompts_videos_are_as_far_as_two_prompts(base: list[MeasuredVideo]) -> None:
    swapped = [base[number] for number in (1, 0, 3, 2)]
    found = figures_of(SCENES, swapped, base, clips(*CLIPS))
    unit = unit_of(SCENES, base)
    assert found.change == pytest.approx(distance(base[0].small, base[1].small) / unit)
    assert found.drift == pytest.approx(distance(base[2].small, base[3].small) / unit)


def test_looks_are_those_of_related_prompts_and_copies_those_of_unseen_ones(base: list[MeasuredVideo]) -> None:
    learned = [*measured(CLIPS[:2]), *base[2:]]
    found = figures_of(SCENES, learned, base, clips(*CLIPS))
    expected = (learned[0].look.saturation + learned[1].look.saturation) / 2
    assert found.saturation == pytest.approx(expected)
    assert (found.drift, found.nearest) == (0, 0)
    trained = [scene("prompt", "a", trained=True), scene("held-out", "b", trained=True), *SCENES[2:]]
    of_unrelated = figures_of(trained, learned, base, clips(*CLIPS))
    assert of_unrelated.nearest == figures_of(SCENES[2:], base[2:], base[2:], clips(*CLIPS)).nearest
    assert figures_of(SCENES, learned, base, MeasuredClips()).nearest is None
    only = figures_of(SCENES, learned, base, clips(CLIPS[0]))
    assert only.nearest_clip == "clip-0"


def test_one_prompt_has_a_unit_too(base: list[MeasuredVideo]) -> None:
    assert unit_of(SCENES[:1], base[:1]) == pytest.approx(2**0.5 * float(base[0].small.std()) / 2)
    assert unit_of(SCENES[:1], measured([grey(9, 7)])) == 0.01


# ----------------------------------------------------------------------------------------------- training clips


def test_clips_are_read_as_training_reads_them(tmp_path: Path, film: Path) -> None:
    samples = [Sample(f"videos/{number}", film / "videos" / "0.mp4", "x") for number in range(5)]
    settings = FrameSettings(size=Size(9, 64, 96), fps=8.0)
    chosen = choose_clips(samples, settings, 2)
    assert [one.id for one in chosen] == ["videos/0", "videos/2"]
    assert chosen[0].seen.indices == tuple(range(0, 18, 2))
    write_clips(tmp_path / "clips.json", chosen)
    assert read_clips(tmp_path / "clips.json") == chosen
    found = measure_clips(chosen)
    assert found.ids == ("videos/0", "videos/2")
    assert found.thumbnails[0].shape == (8, 24, 36, 3)
    assert choose_clips([], settings, 2) == ()


def test_clips_that_are_gone_or_too_short_are_told(tmp_path: Path, film: Path) -> None:
    samples = [Sample("0", film / "videos" / "0.mp4", "x")]
    told: list[str] = []
    samples.append(Sample("1", tmp_path / "gone.mp4", "x"))
    assert choose_clips(samples, FrameSettings(size=Size(9, 64, 96), fps=0.5), 2, told.append) == ()
    assert told[0].startswith("not compared with 0: it needs ")
    assert told[1].startswith("not compared with 1: ")
    (chosen,) = choose_clips(samples[:1], FrameSettings(size=Size(9, 64, 96), fps=8.0), 1)
    gone = type(chosen)("gone", tmp_path / "gone.mp4", chosen.seen)
    found = measure_clips([gone, chosen], told.append)
    assert found.ids == ("0",)
    assert told[2].startswith("not compared with gone: ")
