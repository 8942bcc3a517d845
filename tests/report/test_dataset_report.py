"""The report of a dataset shows what training sees, beside everything that was found."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogtune.data.findings import Finding, finding
from cogtune.data.frames import ClipView, FrameSettings, load_clip, load_image, view
from cogtune.data.sources import Dataset, Sample, read_dataset
from cogtune.data.validation.checks import check_dataset
from cogtune.data.video.clips import probe, write_video
from cogtune.models.geometry import FrameSampling, Reshape, Size
from cogtune.report.dataset import CheckedDataset, choose_samples, write_dataset_report
from cogtune.report.drawing import Task, drawn
from cogtune.report.findings import MOST_FINDINGS
from cogtune.report.pictures import Picture, Shown, bytes_each, first_middle_last, picture, to_jpeg
from cogtune.system.digests import digest_file
from cogtune.system.errors import CogtuneError
from tests.conftest import Cogtune
from tests.support.html_pages import Element, parse, pixels

SETTINGS = FrameSettings(size=Size(9, 64, 96), fps=8)
CAPTION = "<script>alert(1)</script> \"quoted\" & 'so' <img src=x onerror=alert(1)>"


def moving(path: Path, count: int = 12, height: int = 96, width: int = 128) -> Path:
    """A smooth gradient that moves and changes its colour."""
    y, x = np.mgrid[0:height, 0:width]
    frames = [np.stack([(x + 5 * n) % 256, y, np.full_like(x, 20 * n)], -1) for n in range(count)]
    write_video(path, np.stack(frames).astype(np.uint8), 8)
    return path


def lists(root: Path, rows: list[tuple[str, ...]]) -> Path:
    for name, column in zip(("prompts.txt", "videos.txt", "images.txt"), zip(*rows, strict=True), strict=False):
        (root / name).write_text("\n".join(column) + "\n")
    return root


def checked(root: Path, settings: FrameSettings = SETTINGS) -> CheckedDataset:
    dataset = read_dataset(root)
    return CheckedDataset(dataset, settings, check_dataset(dataset, settings))


def report(root: Path, settings: FrameSettings = SETTINGS) -> Element:
    write_dataset_report(root / "report.html", checked(root, settings), workers=0)
    return parse(root / "report.html")


def kept(frame: Element) -> np.ndarray:
    """What of a frame on the page is not dimmed."""
    whole = pixels(frame.all("img")[0].attributes["src"] or "")
    height, width, _ = whole.shape
    marks = frame.all("span", "kept")
    if not marks:
        return whole
    style = marks[0].attributes["style"] or ""
    share = {name: float(value) / 100 for name, value in re.findall(r"(\w+):([\d.]+)%", style)}
    left, top = round(share["left"] * width), round(share["top"] * height)
    return whole[top : top + round(share["height"] * height), left : left + round(share["width"] * width)]


@pytest.mark.parametrize(("height", "width"), [(96, 128), (200, 96), (64, 96), (48, 256)])
def test_the_bright_part_of_a_picture_is_what_training_sees(tmp_path: Path, height: int, width: int) -> None:
    moving(tmp_path / "a.mp4", 12, height, width)
    page = report(lists(tmp_path, [("A gradient.", "a.mp4")]))
    frames = page.all("div", "frame")
    seen = load_clip(tmp_path / "a.mp4", view(probe(tmp_path / "a.mp4"), SETTINGS))
    assert len(frames) == 3
    for frame, index in zip(frames, (0, 4, 8), strict=True):
        shown = kept(frame)
        assert shown.shape[1] / shown.shape[0] == pytest.approx(96 / 64, rel=0.03)
        trained = [Image.fromarray(one.permute(1, 2, 0).numpy()).resize(shown.shape[1::-1]) for one in seen]
        away = [np.abs(shown.astype(int) - np.asarray(one, int)).mean() for one in trained]
        assert away[index] == min(away) < 4
    assert [caption.text.split(" · ")[1] for caption in page.all("figcaption") if " · " in caption.text] == [
        "frame 0",
        "frame 4",
        "frame 8",
    ]


@pytest.mark.parametrize("reshape", ["center", "random", "letterbox", "stretch"])
@pytest.mark.parametrize("sampling", ["uniform", "random-start"])
def test_so_it_is_however_frames_are_chosen_and_fitted(
    tmp_path: Path, reshape: Reshape, sampling: FrameSampling
) -> None:
    clip = moving(tmp_path / "a.mp4", 30, 160, 96)
    settings = replace(SETTINGS, reshape=reshape, sampling=sampling, seed=7)
    seen = view(probe(clip), settings, digest_file(clip))
    page = report(lists(tmp_path, [("A gradient.", "a.mp4")]), settings)
    trained = load_clip(clip, seen)
    for frame, place in zip(page.all("div", "frame"), (0, 4, 8), strict=True):
        shown = kept(frame)
        expected = Image.fromarray(trained[place].permute(1, 2, 0).numpy()).resize(shown.shape[1::-1])
        assert np.abs(shown.astype(int) - np.asarray(expected, int)).mean() < 4
    told = [caption.text.split(" · ")[1] for caption in page.all("figcaption") if " · " in caption.text]
    assert told == [f"frame {seen.indices[place]}" for place in (0, 4, 8)]


def test_each_clip_is_shown_in_its_bucket_and_the_plan_counts_them(tmp_path: Path) -> None:
    moving(tmp_path / "wide.mp4", 12, 64, 96)
    moving(tmp_path / "tall.mp4", 12, 96, 64)
    moving(tmp_path / "tall2.mp4", 12, 192, 128)
    settings = replace(SETTINGS, buckets=(Size(9, 64, 96), Size(9, 96, 64)))
    page = report(lists(tmp_path, [(f"A {name}.", f"{name}.mp4") for name in ("wide", "tall", "tall2")]), settings)
    (plan,) = (part for part in page.all("section") if part.all("h2")[0].text == "Training sizes")
    rows = [[cell.text for cell in row.all("td")] for row in plan.all("tr")[1:]]
    assert rows == [["9x64x96", "1", "0%", "0%", "0"], ["9x96x64", "2", "0%", "0%", "0"]]
    shapes = {card.all("h3")[0].text: kept(card.all("div", "frame")[0]).shape for card in page.all("article")}
    assert shapes == {"wide": (64, 96, 3), "tall": (96, 64, 3), "tall2": (96, 64, 3)}
    assert "2 sizes" in page.all("dl")[0].text


def test_the_cut_away_part_is_shown_around_it(tmp_path: Path) -> None:
    moving(tmp_path / "a.mp4", 12, 128, 96)
    (frame, *_) = report(lists(tmp_path, [("A gradient.", "a.mp4")])).all("div", "frame")
    assert pixels(frame.all("img")[0].attributes["src"] or "").shape == (128, 96, 3)
    style = frame.all("span", "kept")[0].attributes["style"]
    assert style == "left:0.000%;top:25.000%;width:100.000%;height:50.000%"


def test_a_picture_the_size_of_a_card_keeps_its_proportions() -> None:
    drawn = picture(np.zeros((1080, 1920, 3), np.uint8), Size(49, 480, 720), 30_000)
    assert (drawn.width, drawn.height) == (400, 225)
    assert drawn.kept == (31, 0, 338, 225)


def test_an_image_has_its_place_beside_the_frames(tmp_path: Path) -> None:
    moving(tmp_path / "a.mp4")
    Image.fromarray(np.linspace(0, 255, 100 * 100 * 3).reshape(100, 100, 3).astype(np.uint8)).save(tmp_path / "a.png")
    page = report(lists(tmp_path, [("A gradient.", "a.mp4", "a.png")]))
    frames = page.all("div", "frame")
    assert len(frames) == 4
    expected = load_image(tmp_path / "a.png", SETTINGS.size).permute(1, 2, 0).numpy()
    assert np.abs(kept(frames[0]).astype(int) - expected).mean() < 3


def test_hostile_captions_and_names_stay_text(tmp_path: Path) -> None:
    name = "<b onclick=alert(1)>&'.mp4"
    moving(tmp_path / name)
    page = report(lists(tmp_path, [(CAPTION, name)]))
    assert page.all("p", "caption")[0].text == CAPTION
    assert page.all("h3")[0].text == name.removesuffix(".mp4")
    assert not [element for element in page.all("b") if element.attributes]
    assert len(page.all("img")) == 3
    policy = page.all("meta")[1].attributes["content"] or ""
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy


def test_a_damaged_clip_shows_its_finding_in_place_of_pictures(tmp_path: Path) -> None:
    moving(tmp_path / "good.mp4")
    (tmp_path / "empty.mp4").write_bytes(b"")
    whole = moving(tmp_path / "cut.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[:-100])
    middle = bytearray(moving(tmp_path / "middle.mp4").read_bytes())
    at = middle.index(b"mdat") + 1200
    middle[at : at + 800] = random.Random(0).randbytes(800)
    (tmp_path / "middle.mp4").write_bytes(middle)
    names = ["good", "empty", "cut", "middle", "gone"]
    page = report(lists(tmp_path, [(f"A caption of {name}.", f"{name}.mp4") for name in names]))
    cards = {card.all("h3")[0].text: card for card in page.all("article")}
    assert set(cards) == set(names)
    assert len(cards["good"].all("img")) == 3
    told = {name: cards[name].all("p", "unseen")[0].text for name in names[1:]}
    assert told["empty"] == "no pictures: empty.mp4 is empty"
    assert told["cut"].startswith("no pictures: cut.mp4 is incomplete: 100 of")
    assert "middle.mp4" in told["middle"]
    assert told["gone"] == "no pictures: gone.mp4 does not exist"
    assert "Cannot be trained on as is." in page.all("p", "verdict")[0].text


def _draw(task: Task) -> Shown:
    if task.video.stem == "kills":
        os.kill(os.getpid(), signal.SIGSEGV)
    if task.video.stem == "hangs":
        time.sleep(600)
    return Shown((0,), (Picture(task.video.stem.encode(), 1, 1, (0, 0, 1, 1)),), None)


@pytest.mark.usefixtures("torch_forked")
def test_a_clip_that_kills_or_hangs_its_decoder_costs_nothing_but_its_pictures() -> None:
    seen = ClipView((0,), Size(1, 64, 96), (64, 96))
    names = ["a", "kills", "b", "", "hangs", "c"]
    tasks = [Task(Path(f"{name}.mp4"), seen, None, 1) if name else None for name in names]
    first, killed, second, nothing, hung, third = drawn(tasks, 1, patience=3, draw=_draw)
    assert [one.pictures[0].jpeg for one in (first, second, third) if isinstance(one, Shown)] == [b"a", b"b", b"c"]
    assert killed == "kills.mp4: the decoder crashed"
    assert nothing is None
    assert hung == "hangs.mp4: the decoder hangs: no output for 3 seconds"


def test_every_finding_stands_in_the_table_and_beside_its_clip(tmp_path: Path) -> None:
    moving(tmp_path / "a.mp4", 4)
    moving(tmp_path / "b.mp4", 12)
    (tmp_path / "a.txt").write_text("word")
    (tmp_path / "b.txt").write_text("Some words.")
    (tmp_path / "stray.txt").write_text("Nothing.")
    looked = checked(tmp_path)
    write_dataset_report(tmp_path / "report.html", looked, workers=0)
    page = parse(tmp_path / "report.html")
    rows = [[cell.text for cell in row.all("td")] for row in page.all("section")[-1].all("tr")[1:]]
    assert rows == [[f.severity, f.where, f.code, f.message, f.hint] for f in looked.report.findings]
    (card,) = (card for card in page.all("article") if card.all("h3")[0].text == "a")
    assert [line.all("span")[0].text for line in card.all("li")] == ["error", "warning"]
    assert [link.attributes["href"] for link in page.all("a")] == ["#clip-0", "#clip-0"]
    (general,) = (part for part in page.all("section") if part.all("h2")[0].text.startswith("About the dataset"))
    assert "stray.txt has no clip next to it" in general.text


def samples(count: int) -> tuple[Sample, ...]:
    return tuple(Sample(f"clip{n}", Path(f"clip{n}.mp4"), f"Caption {n}.") for n in range(count))


def test_clips_with_findings_come_first_and_the_others_evenly() -> None:
    by_sample = {"clip7": [finding("slow", "clip7", "slow")], "clip90": [finding("too-short", "clip90", "short")]}
    chosen = [place for place, _ in choose_samples(samples(100), by_sample, 6)]
    assert chosen == [90, 7, 0, 25, 50, 74]
    assert [place for place, _ in choose_samples(samples(100), by_sample, 1)] == [90]
    assert len(choose_samples(samples(3), {}, 200)) == 3
    assert choose_samples(samples(3), {}, 0) == []


def test_a_page_of_thousands_of_clips_says_what_it_leaves_out_and_stays_small(tmp_path: Path) -> None:
    """Ten thousand samples of one clip of noise, the worst that JPEG can meet, with a finding for each."""
    noise = np.random.default_rng(0).integers(0, 256, (10, 96, 128, 3), np.uint8)
    write_video(tmp_path / "noise.mp4", noise, 8)
    many = tuple(Sample(f"clip{n}", tmp_path / "noise.mp4", f"Caption {n}. " * 10) for n in range(10_000))
    dataset = Dataset(tmp_path, "lists", many, ())
    found: tuple[Finding, ...] = tuple(finding("slow", one.id, "is slow " * 12, "hurry " * 12) for one in many)
    one = checked(lists(tmp_path, [("Noise.", "noise.mp4")])).report
    (info,) = one.infos.values()
    infos = {sample.id: info for sample in many}
    counts = {"samples": 10_000, "clips": 10_000, "error": 0, "warning": 10_000, "note": 0}
    looked = CheckedDataset(dataset, SETTINGS, type(one)(tmp_path, "lists", found, infos, counts))
    assert write_dataset_report(tmp_path / "report.html", looked, most_clips=20, workers=0) == 20
    page = parse(tmp_path / "report.html")
    assert "Showing 20 of 10,000: clips with findings first" in page.text
    assert f"The first {MOST_FINDINGS:,} of 10,000: use --json to print all." in page.text
    assert len(page.all("article")) == 20
    assert (tmp_path / "report.html").stat().st_size < 3_000_000


def test_pictures_of_a_full_page_fit_into_ten_megabytes() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    photo = np.asarray(Image.fromarray(noise).resize((40, 30)).resize((400, 300), Image.Resampling.BICUBIC))
    pictures = 200 * 3
    assert len(to_jpeg(photo, bytes_each(pictures))) * pictures * 4 / 3 < 10_000_000
    assert bytes_each(15) == 30_000
    assert bytes_each(100_000) == 6_000


def test_a_broken_list_still_gets_a_page(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    (tmp_path / "videos.txt").write_text("a.mp4\n")
    page = report(tmp_path)
    assert page.all("article") == []
    assert "nothing is paired" in page.all("section")[0].text


def test_what_first_middle_and_last_are() -> None:
    assert first_middle_last([3, 5, 8, 11, 14]) == [3, 8, 14]
    assert first_middle_last([3, 5]) == [3, 5]
    assert first_middle_last([3]) == [3]


def test_a_page_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    moving(tmp_path / "a.mp4")
    looked = checked(lists(tmp_path, [("A gradient.", "a.mp4")]))
    (tmp_path / "file").write_text("")
    with pytest.raises(CogtuneError, match="cannot write"):
        write_dataset_report(tmp_path / "file" / "report.html", looked, workers=0)


def test_the_command_writes_the_page_and_prints_where(command: Cogtune, clips: Path, tmp_path: Path) -> None:
    words = ("dataset", "validate", clips, "--preset", "cpu-lora-tiny", "--report", "r/page.html", "--report-clips", 2)
    assert command(*words).out.splitlines()[-1] == "written to r/page.html"
    page = parse(tmp_path / "r" / "page.html")
    assert len(page.all("article")) == 2
    assert "Showing 2 of 6" in page.text
    assert "8 frames per second" in page.text
