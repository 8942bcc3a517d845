"""The tool that calibrates the signs: what it draws, and how it counts."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from cogtune.models.variants import LORA_WEIGHTS_NAME
from cogtune.run.comparison import Comparison, Row, Sign, SignName, write_comparison
from tests.cli.test_docs import problem_of
from tests.quality.test_signs import row
from tools.nano import calibrate_compare
from tools.nano.calibrate_compare import CASES, table


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


def test_the_program_takes_its_commands_and_what_is_done_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def fake(_log: Path, *words: object) -> None:
        asked.append(shlex.join(["cogtune", *map(str, words)]))
        output = Path(str(words[words.index("--output") + 1]))
        output.mkdir(parents=True)
        if words[0] == "train":
            (output / LORA_WEIGHTS_NAME).touch()
            return
        strengths = [float(one) for one in str(words[words.index("--lora-scale") + 1]).split(",")]
        rows = [row("x", strength) for strength in strengths]
        shared = {"version": "0", "model": "tiny:2b", "scenes": [], "clips": {}, "clip_count": 0, "grid": None}
        found = {**shared, "base": row("base"), "rows": rows, "chosen": 0, "verdict": "Take x: it is the best."}
        write_comparison(output, Comparison.model_validate(found))

    monkeypatch.setattr(calibrate_compare, "cogtune", fake)
    words = ["calibrate", "--model", "tiny:2b", "--work", str(tmp_path), "--seeds", "1", "--clips", "2"]
    monkeypatch.setattr("sys.argv", words)
    calibrate_compare.main()
    assert [problem for line in asked if (problem := problem_of(line, whole=True))] == []
    assert [line.split()[1] for line in asked].count("train") == 4
    assert [line.split()[line.split().index("--lora-scale") + 1] for line in asked if " compare " in line] == [
        "1,3",
        "1",
        "1",
        "1",
    ]
    assert "| three times its strength | 1 | 0 | - | none |" in (tmp_path / "calibration.md").read_text()
    calibrate_compare.main()
    assert len(asked) == 8
