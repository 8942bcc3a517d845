"""Full fine-tuning under ``stream`` beside ZeRO-2 with offload, at full size: ``python -m tools.bench_stream FOLDER``.

Each row of the table is a run of ``cogtune bench``; a ZeRO preset is measured once, however many rows stand against
it. What a run gave is kept in FOLDER as JSON and not measured again, so that a broken-off call goes on. Names of rows
after FOLDER measure those alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from cogtune.planning.measurements import Measurement, read
from cogtune.system import console

_EXACT = ("--master-weights", "fp32", "--moments", "fp32")
_COMPACT = ("--master-weights", "split", "--moments", "8bit")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A run, and what it is to keep within."""

    preset: str
    flags: tuple[str, ...]
    against: str
    """The ZeRO preset whose step is compared."""
    card_gb: float
    host_gib: float
    ratio: float
    """Of the steps' times."""


ROWS: dict[str, Row] = {
    "5b-exact": Row(
        preset="12gb-sft-5b",
        flags=(*_EXACT, "--vram", "10.5GB"),
        against="a100-sft-5b-zero2-offload",
        card_gb=10.5,
        host_gib=92,
        ratio=0.7,
    ),
    "5b-compact": Row(
        preset="12gb-sft-5b",
        flags=(*_COMPACT, "--vram", "10.5GB"),
        against="a100-sft-5b-zero2-offload",
        card_gb=10.5,
        host_gib=56,
        ratio=0.6,
    ),
    "5b-compact-24gb": Row(
        preset="12gb-sft-5b",
        flags=(*_COMPACT, "--vram", "24GB"),
        against="a100-sft-5b-zero2-offload",
        card_gb=23.5,
        host_gib=56,
        ratio=0.55,
    ),
    "2b-compact": Row(
        preset="12gb-sft-2b",
        flags=(*_COMPACT, "--vram", "6GB"),
        against="4090-sft-2b-zero2-offload",
        card_gb=6,
        host_gib=20,
        ratio=0.6,
    ),
    "1.5-compact": Row(
        preset="24gb-sft-1.5-5b",
        flags=(*_COMPACT, "--vram", "16GB"),
        against="a100-sft-1.5-5b-zero2-offload",
        card_gb=16,
        host_gib=64,
        ratio=0.75,
    ),
}

_STEPS = ("--steps", "4", "--warmup", "2")


def measured(folder: Path, name: str, preset: str, flags: tuple[str, ...]) -> Measurement | None:
    """What a bench gave, now or before; None when it failed."""
    file = folder / f"{name}.json"
    if not file.is_file():
        words = ["bench", "--preset", preset, *flags, *_STEPS, "--keep", str(folder / "models"), "--json", str(file)]
        if subprocess.run([sys.executable, "-m", "cogtune", *words], check=False).returncode != 0:
            console.warn(f"{name} was not measured")
            return None
    return read(file)[0]


def line(name: str, row: Row, mine: Measurement, zero: Measurement | None) -> list[str]:
    """A row of the table: each figure with what it is to keep within."""
    figures: list[tuple[float | None, float, str]] = [
        (mine.card_gb, row.card_gb, ".1f"),
        (mine.host_gib, row.host_gib, ".0f"),
        (mine.step_s / zero.step_s if zero is not None else None, row.ratio, ".2f"),
    ]
    cells = [
        "not measured" if value is None else f"{value:{form}} ({'<=' if value <= most else 'NOT <='} {most:g})"
        for value, most, form in figures
    ]
    seconds = f"{mine.step_s:.2f} s" + (f" against {zero.step_s:.2f}" if zero is not None else "")
    start = "" if mine.start_s is None else f"{mine.start_s:.0f} s"
    return [name, *cells, seconds, start]


def main() -> None:
    """Measure, and show the table."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench_stream", description=__doc__)
    parser.add_argument("folder", type=Path, help="where measurements, random models and samples are kept")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; by default all")
    given = parser.parse_args()
    if unknown := [name for name in given.rows if name not in ROWS]:
        parser.error(f"there is no row {', '.join(unknown)}")
    folder = given.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name in given.rows or ROWS:
        row = ROWS[name]
        mine = measured(folder, name, row.preset, row.flags)
        zero = measured(folder, row.against, row.against, ())
        if mine is not None:
            lines.append(line(name, row, mine, zero))
    columns = ("row", "GPU GB", "host GiB", "of ZeRO's step", "a step", "start-up")
    console.table("", columns, lines)


if __name__ == "__main__":
    main()
