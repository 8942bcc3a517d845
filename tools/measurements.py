"""Measure presets one after another, and record what was measured.

``python -m tools.measurements --measure FILE`` benches every preset that the GPUs here can hold and FILE does not
have yet; broken off, it goes on where it stopped. ``python -m tools.measurements FILE...`` records such files, or
those of ``cogtune bench --json``, and shows how far off the estimate of each peak is. ``make docs`` puts them into
docs/vram.md.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cogtune.bench.run import BenchRequest, bench, command_of
from cogtune.config.presets import CARDS_GB, PRESETS, preset
from cogtune.config.resolving import Resolved, resolve
from cogtune.models.locate import spec_of
from cogtune.planning.estimate import estimate
from cogtune.planning.fit import Hardware, local_hardware, problems
from cogtune.planning.measurements import FILE, add, read
from cogtune.system import console
from cogtune.system.errors import CogtuneError, StoppedError
from cogtune.system.files import write_text
from tools.vram_page import errors

STEPS, WARMUP = 3, 2
_SLOW = 10.0
"""Seconds of a step from which on fewer of them have to do."""
_AROUND = 100.0
"""Seconds that a bench takes beside its steps: to start, to compile, to end."""


def presets_for(machine: Hardware, names: Sequence[str] = (), *, alone: bool = False) -> Iterator[tuple[str, Resolved]]:
    """The presets of the table that can be measured on a machine, each on as many GPUs as it has use for.

    Args:
        names: these alone, whether they seem to fit or not.
        alone: on as many as a preset names, for ``cogtune bench --alone``.

    Raises:
        UsageError: there is no such preset.
    """
    for row in map(preset, names) if names else PRESETS.values():
        if not names and row.card not in CARDS_GB:
            continue
        several = row.gpus > 1
        there = row.gpus if alone else min(row.gpus, len(machine.cards))
        flags = {"num_processes": there} if several and there else {}
        resolved = resolve(preset_name=row.name, flags=flags)
        config = resolved.config
        fits = not problems(config, estimate(config, spec_of(config.model)), machine)
        if names or (fits and (config.num_processes > 1) == several):
            yield row.name, resolved


def measure(
    file: Path,
    names: Sequence[str] = (),
    *,
    alone: bool = False,
    keep: Path | None = None,
    seconds: float = math.inf,
) -> list[str]:
    """Bench what ``file`` does not have yet, adding each to it; the presets that failed, or that there was no time for.

    Args:
        alone: measure one process of each, as ``cogtune bench --alone`` does; with ``names`` that it can measure.
        keep: folder for models and samples, for the presets that share them and for the next time.
        seconds: after which nothing is begun that would not end before.

    Raises:
        UsageError: there is no such preset.
        StoppedError: it was stopped.
        CogtuneError: ``file`` cannot be read or written.
    """
    ends, left, machine = time.monotonic() + seconds, [], local_hardware()
    if not file.exists():
        write_text(file, "")
    for name, resolved in presets_for(machine, names, alone=alone):
        config = resolved.config
        if any(row.preset == name and row.gpus == config.num_processes and row.alone == alone for row in read(file)):
            continue
        step = estimate(config, spec_of(config.model), gpu=str(machine)).seconds or 0.0
        steps, warmup = (2, 1) if step > _SLOW else (STEPS, WARMUP)
        if time.monotonic() + _AROUND + step * (steps + warmup) > ends:
            left.append(f"{name}: no time was left")
            continue
        flags: dict[str, Any] = {"num_processes": config.num_processes} if config.num_processes > 1 else {}
        words = ["--steps", str(steps), "--warmup", str(warmup), *(["--alone"] if alone else [])]
        request = BenchRequest(
            resolved=resolved,
            preset=name,
            changes=flags,
            steps=steps,
            warmup=warmup,
            alone=alone,
            keep=keep,
            command=command_of(name, flags, words),
        )
        console.note(f"{name} on {config.num_processes}")
        try:
            add(list(bench(request)), file)
        except StoppedError:
            raise
        except CogtuneError as error:
            left.append(f"{name}: {error.message} ({error.hint})")
    return left


def main(arguments: list[str] | None = None) -> int:
    """Measure or record; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.measurements", description=__doc__)
    parser.add_argument("files", type=Path, nargs="*", help="files to record; with --measure, names of presets")
    parser.add_argument("--measure", type=Path, metavar="FILE", help="bench presets, and add each to this file")
    parser.add_argument("--alone", action="store_true", help="one process of each, as `cogtune bench --alone` does")
    parser.add_argument("--keep", type=Path, help="keep random models and samples in this folder")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing that would end after these")
    given = parser.parse_args(arguments)
    left: list[str] = []
    try:
        if given.measure is not None:
            left = measure(
                given.measure, list(map(str, given.files)), alone=given.alone, keep=given.keep, seconds=given.seconds
            )
            for line in left:
                console.warn(line)
            rows = read(given.measure)
        else:
            for file in given.files:
                add(read(file))
            rows = read(FILE)
    except CogtuneError as error:
        console.error(error)
        return error.exit_code
    console.table("", ("command", "reserved GiB", "estimated", "off by"), errors(rows))
    return 1 if left else 0


if __name__ == "__main__":
    raise SystemExit(main())
