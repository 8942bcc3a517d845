"""``tools.bench_stream``: its rows are presets of one model at one size, and each figure stands with its limit."""

from __future__ import annotations

from typing import Any

import pytest

from cogtune.config.presets import PRESETS
from cogtune.config.resolving import resolve
from cogtune.planning.measurements import Measurement
from tools.bench_stream import ROWS, line


def measured(**figures: Any) -> Measurement:
    return Measurement(
        preset=None, changes={}, recipe="preset", gpu="NVIDIA H200", gpus=1, reserved_gib=(), allocated_gib=(),
        versions={}, command="", **figures,
    )  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_row_compares_presets_of_one_model(name: str) -> None:
    row = ROWS[name]
    mine, zero = PRESETS[row.preset], PRESETS[row.against]
    assert (mine.model, mine.size, mine.strategy) == (zero.model, zero.size, "stream")
    assert zero.strategy == "zero2-offload"
    names = [flag.removeprefix("--").replace("-", "_") for flag in row.flags[::2]]
    config = resolve(preset_name=row.preset, flags=dict(zip(names, row.flags[1::2], strict=True))).config
    assert config.vram_bytes is not None
    assert config.master_weights == ("fp32" if name.endswith("exact") else "split")


def test_a_figure_stands_with_its_limit() -> None:
    mine = measured(card_gb=9.9, host_gib=100.0, step_s=4.65, start_s=38.2)
    cells = line("5b-exact", ROWS["5b-exact"], mine, measured(step_s=6.0))
    assert cells == [
        "5b-exact", "9.9 (<= 10.5)", "100 (NOT <= 92)", "0.78 (NOT <= 0.7)", "4.65 s against 6.00", "38 s",
    ]  # fmt: skip
    alone = line("5b-exact", ROWS["5b-exact"], mine, None)
    assert alone[3:] == ["not measured", "4.65 s", "38 s"]
