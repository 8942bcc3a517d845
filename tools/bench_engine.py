"""The memory engine at full size beside what it replaces: ``python -m tools.bench_engine FOLDER``.

LoRA rows stand against the guides' recipe (``cogtune bench --compare plain``), an image-to-video row against its twin,
full fine-tuning against ZeRO-2 with offload. Each row is a run of ``cogtune bench``, and what it is compared with is
measured once, however many rows stand against it. What a run gave is kept in FOLDER as JSON and not measured again, so
that a broken-off call goes on, and files of several GPUs can be put into one folder. Names of rows after FOLDER measure
those alone.
"""

from __future__ import annotations

import argparse
import math
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cogtune.planning.measurements import Measurement, read
from cogtune.system import console

PLAIN = "plain"
_EXACT = ("--master-weights", "fp32", "--moments", "fp32")
_COMPACT = ("--master-weights", "split", "--moments", "8bit")
_CUDNN, _FLASH = ("--attention", "cudnn"), ("--attention", "flash-attn-4")
_FLOAT8 = ("--base-precision", "fp8")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A run, and what it is to keep within."""

    preset: str
    flags: tuple[str, ...] = ()
    against: str = PLAIN
    """What its step is compared with: a preset, another row, or :data:`PLAIN`."""
    card_gb: float = math.inf
    host_gib: float = math.inf
    ratio: float
    """Of the steps' times."""


def _lora(preset: str, vram: str | None, *flags: str, card: float = math.inf, ratio: float) -> Row:
    limit = () if vram is None else ("--vram", vram)
    return Row(preset=preset, flags=(*limit, *flags), card_gb=card, ratio=ratio)


def _sft(preset: str, against: str, vram: str, *flags: str, host: float, ratio: float) -> Row:
    most = {"10.5GB": 10.5, "24GB": 23.5, "6GB": 6.0, "16GB": 16.0}[vram]
    return Row(preset=preset, flags=(*flags, "--vram", vram), against=against, card_gb=most, host_gib=host, ratio=ratio)


_ZERO_5B = "a100-sft-5b-zero2-offload"

ROWS: dict[str, Row] = {
    "lora-5b": _lora("8gb-lora-5b", "8GB", *_CUDNN, card=7.5, ratio=0.65),
    "lora-5b-fa4": _lora("8gb-lora-5b", "8GB", *_FLASH, card=7.5, ratio=0.57),
    "lora-5b-fp8-fa4": _lora("8gb-lora-5b", "8GB", *_FLASH, *_FLOAT8, card=8.0, ratio=0.51),
    "lora-5b-24gb-fa4": _lora("8gb-lora-5b", "24GB", *_FLASH, card=23.5, ratio=0.54),
    "lora-5b-24gb-fp8-fa4": _lora("8gb-lora-5b", "24GB", *_FLASH, *_FLOAT8, card=23.5, ratio=0.49),
    "lora-5b-all-fa4": _lora("8gb-lora-5b", "140GB", *_FLASH, ratio=0.49),
    "lora-5b-all-fp8-fa4": _lora("8gb-lora-5b", "140GB", *_FLASH, *_FLOAT8, ratio=0.45),
    "lora-5b-i2v-fa4": Row(
        preset="8gb-lora-5b-i2v", flags=("--vram", "8GB", *_FLASH), against="lora-5b-fa4", card_gb=8.5, ratio=1.05
    ),
    "lora-1.5": _lora("16gb-lora-1.5-5b", "16GB", *_CUDNN, card=12.5, ratio=0.72),
    "lora-1.5-fa4": _lora("16gb-lora-1.5-5b", "16GB", *_FLASH, card=12.5, ratio=0.60),
    "lora-2b-fa4": _lora("6gb-lora-2b", "6GB", *_FLASH, card=4.7, ratio=0.57),
    "sft-5b-exact": _sft("12gb-sft-5b", _ZERO_5B, "10.5GB", *_EXACT, host=92, ratio=0.7),
    "sft-5b-compact": _sft("12gb-sft-5b", _ZERO_5B, "10.5GB", *_COMPACT, host=56, ratio=0.6),
    "sft-5b-compact-24gb": _sft("12gb-sft-5b", _ZERO_5B, "24GB", *_COMPACT, host=56, ratio=0.55),
    "sft-2b-compact": _sft("12gb-sft-2b", "4090-sft-2b-zero2-offload", "6GB", *_COMPACT, host=20, ratio=0.6),
    "sft-1.5-compact": _sft("24gb-sft-1.5-5b", "a100-sft-1.5-5b-zero2-offload", "16GB", *_COMPACT, host=64, ratio=0.75),
}

_STEPS = ("--steps", "4", "--warmup", "2")
_SAVES = 5.0
"""Seconds that a bench gets to end after it was asked to stop."""


def ran(words: Sequence[str], deadline: float) -> bool:
    """Run cogtune up to the deadline of :func:`time.monotonic`; return whether it ended well."""
    process = subprocess.Popen([sys.executable, "-m", "cogtune", *words])
    try:
        left = deadline - time.monotonic()
        return process.wait(None if math.isinf(left) else max(0.0, left)) == 0
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_SAVES)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return False


def measure(folder: Path, names: Sequence[str], deadline: float = math.inf) -> None:
    """Bench the rows, and what they stand against, that ``folder`` has no file of; what fails is named."""
    for name in names:
        row = ROWS[name]
        plain = row.against == PLAIN and baseline(folder, row) is None
        wanted = [(name, row.preset, (*row.flags, *(("--compare", PLAIN) if plain else ())))]
        if row.against != PLAIN and row.against not in ROWS:
            wanted.append((row.against, row.against, ()))
        for stem, preset, flags in wanted:
            file = folder / f"{stem}.json"
            if file.is_file():
                continue
            if time.monotonic() >= deadline:
                console.warn(f"{stem}: no time was left")
                continue
            words = ["bench", "--preset", preset, *flags, *_STEPS, "--keep", str(folder / "models")]
            if not ran([*words, "--json", str(file)], deadline):
                console.warn(f"{stem} was not measured")


def mine(folder: Path, name: str) -> Measurement | None:
    """Return what a row's own bench gave, if it is there."""
    return next(iter(_of(folder, name)), None)


def baseline(folder: Path, row: Row) -> Measurement | None:
    """Return what a row is compared with, if it was measured: plain stands in any row's file of the same preset."""
    if row.against != PLAIN:
        return mine(folder, row.against)
    found = [one for name, other in ROWS.items() if other.preset == row.preset for one in _of(folder, name)]
    return next((one for one in found if one.recipe == PLAIN), None)


def _of(folder: Path, name: str) -> Sequence[Measurement]:
    file = folder / f"{name}.json"
    return read(file) if file.is_file() else ()


def line(name: str, row: Row, mine: Measurement, other: Measurement | None) -> list[str]:
    """Return a row of the table: each figure with what it is to keep within."""
    figures: list[tuple[float | None, float, str]] = [
        (mine.card_gb, row.card_gb, ".2f"),
        (mine.host_gib, row.host_gib, ".1f"),
        (mine.step_s / other.step_s if other is not None else None, row.ratio, ".3f"),
    ]
    cells = [
        "not measured"
        if value is None
        else f"{value:{form}}" + ("" if math.isinf(most) else f" ({'<=' if value <= most else 'NOT <='} {most:g})")
        for value, most, form in figures
    ]
    seconds = f"{mine.step_s:.3f} s" + (f" against {other.step_s:.3f}" if other is not None else "")
    start = "" if mine.start_s is None else f"{mine.start_s:.0f} s"
    return [name, *cells, seconds, start]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and show the table."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench_engine", description=__doc__)
    parser.add_argument("folder", type=Path, help="where measurements, random models and samples are kept")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; by default all")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after these; 0 shows what is there")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.rows if name not in ROWS]:
        parser.error(f"there is no row {', '.join(unknown)}")
    folder = given.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    names = given.rows or list(ROWS)
    measure(folder, names, time.monotonic() + given.seconds)
    lines = [
        line(name, ROWS[name], done, baseline(folder, ROWS[name]))
        for name in names
        if (done := mine(folder, name)) is not None
    ]
    console.table("", ("row", "GPU GB", "host GiB", "of its step", "a step", "start-up"), lines)


if __name__ == "__main__":
    main()
