"""The tool that calibrates the signs: what it draws, and how it counts."""

from __future__ import annotations

from pathlib import Path

from cogtune.data.nano import detector
from cogtune.data.sources import read_dataset
from cogtune.data.video.clips import probe, read_frames
from cogtune.run.comparison import Row, Sign, SignName
from tests.quality.test_signs import row
from tools.nano.calibrate_compare import CASES, TAUGHT, draw_clips, table


def test_the_clips_show_what_no_nano_model_has_seen(tmp_path: Path) -> None:
    data = draw_clips(tmp_path / "data", seed=3, count=2)
    dataset = read_dataset(data)
    assert (len(dataset.samples), dataset.findings) == (2, ())
    for sample in dataset.samples:
        found = detector.detect(read_frames(sample.video, range(probe(sample.video).num_frames)))
        assert (found.colour, found.shape, found.motion) == TAUGHT
        assert "pink" in sample.caption
    before = (data / "prompts.txt").read_text()
    assert draw_clips(data, seed=4, count=2) == data
    assert (data / "prompts.txt").read_text() == before, "what is there is not drawn again"


def test_failures_that_are_named_and_good_runs_that_are_accused_are_counted() -> None:
    def with_signs(*names: SignName) -> Row:
        signs = [Sign(name=name, why="", advice="") for name in names]
        return row("x").model_copy(update={"signs": signs})

    rows = {case.name: [with_signs(), with_signs()] for case in CASES}
    rows["good run"] = [with_signs(), with_signs("forgot")]
    rows["one clip only"] = [with_signs("memorised", "forgot"), with_signs("forgot")]
    lines = table(rows).splitlines()
    assert "| good run | 2 | - | 1 | forgot 1 |" in lines
    assert "| one clip only | 2 | 1 | - | forgot 2, memorised 1 |" in lines
    assert "| a hundredth of the rate | 2 | 0 | - | none |" in lines
