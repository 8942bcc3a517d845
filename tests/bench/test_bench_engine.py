"""``tools.bench_engine``: its rows can be measured, and each figure stands with its limit."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from cogtune.config.presets import PRESETS
from cogtune.config.resolving import resolve
from cogtune.planning.measurements import Measurement
from tools import bench_engine
from tools.bench_engine import PLAIN, ROWS, Row, baseline, line, main, measure, mine


def measured(**figures: Any) -> Measurement:
    return Measurement(
        preset=None, changes={}, gpu="NVIDIA H200", gpus=1, reserved_gib=(), allocated_gib=(),
        versions={}, command="", **{"recipe": "preset", **figures},
    )  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_a_run_and_is_compared_with_its_like(name: str) -> None:
    row = ROWS[name]
    names = [flag.removeprefix("--").replace("-", "_") for flag in row.flags[::2]]
    config = resolve(preset_name=row.preset, flags=dict(zip(names, row.flags[1::2], strict=True))).config
    assert config.vram_bytes is not None
    own = PRESETS[row.preset]
    if row.against == PLAIN:
        assert own.type == "lora"
    elif row.against in ROWS:
        twin = ROWS[row.against]
        assert twin.flags == row.flags
        assert PRESETS[twin.preset].model + "-i2v" == own.model
    else:
        zero = PRESETS[row.against]
        assert (own.model, own.size, own.strategy) == (zero.model, zero.size, "stream")
        assert zero.strategy == "zero2-offload"
        assert config.master_weights == ("fp32" if name.endswith("exact") else "split")


def test_a_figure_stands_with_its_limit() -> None:
    mine = measured(card_gb=9.9, host_gib=100.0, step_s=4.65, start_s=38.2)
    cells = line("sft-5b-exact", ROWS["sft-5b-exact"], mine, measured(step_s=6.0))
    assert cells == [
        "sft-5b-exact", "9.90 (<= 10.5)", "100.0 (NOT <= 92)", "0.775 (NOT <= 0.7)", "4.650 s against 6.000", "38 s",
    ]  # fmt: skip
    alone = line("sft-5b-exact", ROWS["sft-5b-exact"], mine, None)
    assert alone[3:] == ["not measured", "4.650 s", "38 s"]


@pytest.mark.slow
def test_rows_share_a_plain_run_and_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {name: Row(preset="cpu-lora-tiny", flags=flags, ratio=100.0) for name, flags in
            (("first", ()), ("second", ("--rank", "8")))}  # fmt: skip
    monkeypatch.setattr(bench_engine, "ROWS", rows)
    monkeypatch.setattr(bench_engine, "_STEPS", ("--steps", "1", "--warmup", "0"))
    measure(tmp_path, ["first"], time.monotonic())
    assert mine(tmp_path, "first") is None
    assert "first: no time was left" in capsys.readouterr().err
    main([str(tmp_path)])
    assert [one["recipe"] for one in json.loads((tmp_path / "first.json").read_text())] == ["preset", "plain"]
    assert [one["recipe"] for one in json.loads((tmp_path / "second.json").read_text())] == ["preset"]
    plain = baseline(tmp_path, rows["second"])
    assert plain is not None
    assert plain.recipe == "plain"
    shown = capsys.readouterr().out
    assert shown.count(f"against {plain.step_s:.3f}") == 2
    main([str(tmp_path), "--seconds", "0"])
    assert capsys.readouterr().out == shown


def test_a_bench_that_outlasts_its_time_is_stopped(tmp_path: Path) -> None:
    words = ["bench", "--preset", "cpu-lora-tiny", "--steps", "100000", "--json", str(tmp_path / "never.json")]
    assert not bench_engine.ran(words, time.monotonic() + 1)
    assert not (tmp_path / "never.json").exists()
