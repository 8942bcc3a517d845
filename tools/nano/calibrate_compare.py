"""Make each failure on purpose with a nano model, and count how often `cogtune compare` names it.

    python -m tools.nano.calibrate_compare --model nano:2b --work build/calibrate --seeds 10

Every case is trained by `cogtune train`, compared by `cogtune compare`, and counted. A failure is *named* if its
weights have one of the signs that are expected of it, and a good run is *accused* if it has any sign. What is done is
not done again, so the command can be stopped and repeated. The table is written to WORK/calibration.md, and all
figures to WORK/calibration.json, from which the limits in ``cogtune/quality/limits.py`` can be set.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cogtune.data.nano import world
from cogtune.data.nano.lessons import draw_lesson
from cogtune.run.comparison import Comparison, Row, read_comparison
from cogtune.run.folder import RunFolder
from cogtune.system.files import write_text
from cogtune.system.json_files import write_json


@dataclass(frozen=True)
class Case:
    """A way to train and to sample, and the signs of which one has to be named."""

    name: str
    expected: tuple[str, ...]
    """Empty for a run that is good."""
    rate: float = 1.0
    """What the learning rate is multiplied by."""
    clips: int | None = None
    """Number of clips; None for all."""
    strength: float = 1.0
    trained_as: str | None = None
    """The case whose weights are used, if not its own."""


CASES = (
    Case("good run", ()),
    Case("rate ten times too high", ("too strong", "burnt", "forgot", "frozen"), rate=10.0),
    Case("a hundredth of the rate", ("no effect",), rate=0.01),
    Case("one clip only", ("memorised",), clips=1),
    Case("three times its strength", ("too strong", "burnt", "forgot", "frozen"), strength=3.0, trained_as="good run"),
)


def cogtune(log: Path, *words: object) -> None:
    """Run the program; its output goes to ``log``.

    Raises:
        SystemExit: it failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        command = [sys.executable, "-m", "cogtune", *map(str, words)]
        if subprocess.run(command, stdout=out, stderr=out, check=False).returncode:
            raise SystemExit(f"{' '.join(map(str, words))} failed: see {log}")


def trained(given: argparse.Namespace, case: Case, seed: int) -> Path:
    """Train a case with a seed, unless it is done; return the run's folder."""
    folder: Path = given.work / f"seed-{seed}"
    output = folder / case.name.replace(" ", "-")
    if RunFolder(output).lora.is_file():
        return output
    clips = case.clips or given.clips
    data = draw_lesson(folder / f"data-{clips}", clips=clips, seed=seed)
    held_out = draw_lesson(folder / "held-out", clips=4, seed=seed + 10_000)
    cogtune(
        folder / "log.txt", "train", "--preset", "cpu-lora-tiny", "--model", given.model, "--data", data,
        "--validation-data", held_out, "--output", output, "--overwrite", "--size", str(world.SIZE), "--fps", world.FPS,
        "--steps", given.steps, "--checkpoint-every", given.steps, "--batch-size", given.batch_size,
        "--rank", given.rank, "--learning-rate", given.learning_rate * case.rate, "--seed", seed,
    )  # fmt: skip
    return output


def compared(given: argparse.Namespace, run: Path, strengths: Sequence[float], seed: int) -> Comparison:
    """Compare a run with its base; what was compared before is read."""
    output = RunFolder(run).comparison
    found = read_comparison(output)
    wanted = {*strengths}
    if found is None or wanted != {row.strength for row in found.rows}:
        words: list[object] = ["compare", run, "--output", output, "--steps", given.sample_steps, "--seed", seed]
        words += ["--lora-scale", ",".join(f"{one:g}" for one in strengths), "--held-out", 4]
        for _, prompt in world.held_out_prompts()[:: max(1, 64 // given.unrelated)][: given.unrelated]:
            words += ["--unrelated", prompt]
        cogtune(run.parent / "log.txt", *words)
        found = read_comparison(output)
    assert found is not None
    return found


def row_of(given: argparse.Namespace, case: Case, seed: int) -> Row:
    """Return what was found of a case's weights at its strength."""
    own = next(one for one in CASES if one.name == (case.trained_as or case.name))
    strengths = sorted({one.strength for one in CASES if own.name in (one.name, one.trained_as)})
    found = compared(given, trained(given, own, seed), strengths, seed)
    return next(row for row in found.rows if row.strength == case.strength)


def table(rows: dict[str, list[Row]]) -> str:
    """Return the counts as a table in Markdown."""
    lines = ["| made on purpose | seeds | named | accused | signs |", "| --- | --- | --- | --- | --- |"]
    for case in CASES:
        signs = [[sign.name for sign in row.signs] for row in rows[case.name]]
        named = sum(any(name in case.expected for name in names) for names in signs) if case.expected else "-"
        accused = "-" if case.expected else sum(bool(names) for names in signs)
        counts = {name: sum(name in names for names in signs) for names in signs for name in names}
        told = ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"
        lines.append(f"| {case.name} | {len(signs)} | {named} | {accused} | {told} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="nano:2b", help="a text-to-video model that draws nano's world")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="that of the good run")
    parser.add_argument("--sample-steps", type=int, default=30)
    parser.add_argument("--unrelated", type=int, default=4, help="prompts of what the model can draw")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[Row]] = {case.name: [] for case in CASES}
    for seed in range(given.first_seed, given.first_seed + given.seeds):
        for case in CASES:
            rows[case.name].append(row_of(given, case, seed))
        write_json(
            given.work / "calibration.json",
            {name: [row.model_dump(mode="json") for row in found] for name, found in rows.items()},
        )
        write_text(given.work / "calibration.md", table(rows) + "\n")
        print(f"after seed {seed}:\n{table(rows)}", flush=True)


if __name__ == "__main__":
    main()
