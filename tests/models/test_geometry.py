"""Integer rules, against figures from the model cards and worked out by hand."""

import pytest

from cogtune.models import geometry
from cogtune.models.geometry import Size


def test_a_size_reads_and_writes_as_frames_height_width() -> None:
    assert Size.parse(" 49X480x720 ") == Size(49, 480, 720)
    assert str(Size(81, 768, 1360)) == "81x768x1360"


@pytest.mark.parametrize("text", ["", "49x480", "49x480x720x3", "ax480x720", "-9x64x96", "0x64x96"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        Size.parse(text)


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (5, 2), (9, 3), (17, 5), (49, 13), (81, 21)])
def test_the_first_frame_has_a_latent_of_its_own(frames: int, latents: int) -> None:
    assert geometry.latent_frames(frames) == latents


@pytest.mark.parametrize(("latents", "patch", "padding"), [(13, None, 0), (21, 2, 1), (22, 2, 0), (5, 3, 1)])
def test_padding_fills_up_temporal_patches(latents: int, patch: int | None, padding: int) -> None:
    assert geometry.temporal_padding(latents, patch) == padding


def test_tokens_of_the_native_sizes_are_the_published_ones() -> None:
    assert geometry.video_tokens(Size(49, 480, 720)) == 17_550
    assert geometry.video_tokens(Size(81, 768, 1360), patch_size_t=2) == 44_880


def test_latent_shape_counts_the_padding() -> None:
    assert geometry.latent_shape(Size(81, 768, 1360), 16, patch_size_t=2) == (22, 16, 96, 170)


def test_frames_are_taken_at_the_asked_rate_over_the_whole_span() -> None:
    indices = geometry.frame_indices(195, 30.0, 49, 8.0)
    assert len(indices) == 49
    assert indices[:3] == [0, 4, 8]
    assert indices[-1] == 180  # 48 / 8 s at 30 fps


def test_no_frame_of_a_slow_clip_is_taken_twice() -> None:
    assert geometry.frame_indices(9, 4.0, 9, 8.0) == list(range(9))


def test_frames_from_a_start() -> None:
    assert geometry.frame_indices(40, 16.0, 5, 8.0, start=10) == [10, 12, 14, 16, 18]


def test_a_short_clip_is_told_with_figures() -> None:
    with pytest.raises(ValueError, match=r"needs 181 frames for 49 at 8 fps .* but has 180"):
        geometry.frame_indices(180, 30.0, 49, 8.0)


@pytest.mark.parametrize(("available", "rate", "start"), [(195, 30.0, 0), (180, 23.976, 7), (9, 8.0, 0), (5, 4.0, 4)])
def test_longest_is_what_can_be_taken_and_not_one_more(available: int, rate: float, start: int) -> None:
    longest = geometry.longest_at(available, rate, 8.0, start)
    assert len(geometry.frame_indices(available, rate, longest, 8.0, start)) == longest
    with pytest.raises(ValueError, match="needs"):
        geometry.frame_indices(available, rate, longest + 1, 8.0, start)


@pytest.mark.parametrize("source", [(360, 640), (640, 360), (480, 720), (479, 721), (100, 3000)])
def test_cover_covers_keeps_the_aspect_and_cuts_the_middle(source: tuple[int, int]) -> None:
    crop = geometry.cover(source, (480, 720))
    height, width = crop.resized
    assert height >= 480
    assert width >= 720
    assert height == 480 or width == 720
    assert height / width == pytest.approx(source[0] / source[1], rel=0.5 / 480)
    assert crop.top == (height - 480) // 2
    assert crop.left == (width - 720) // 2


def test_how_much_is_cropped_away() -> None:
    assert geometry.shape_loss((360, 640), (480, 720)) == pytest.approx(1 - 720 / (640 * 480 / 360))
    assert geometry.shape_loss((480, 720), (240, 360)) == 0.0


def test_nearest_below() -> None:
    assert geometry.nearest_below(48, geometry.legal_frame_counts(8, 6)) == 41
    assert geometry.nearest_below(8, geometry.legal_frame_counts(8, 6)) is None
