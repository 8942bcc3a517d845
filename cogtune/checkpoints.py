"""Which checkpoints a run has, and whether one fits a run. Reads names and ``state.json``; needs no torch."""

from __future__ import annotations

import re
import shlex
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cogtune.errors import CogtuneError, UsageError
from cogtune.files import digest, read_json

FORMAT = 1
STATE_NAME = "state.json"
"""Written last: a folder that has it was complete when it got its name."""

_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(output: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [(int(match[1]), path) for path in output.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if (path / STATE_NAME).is_file()]


def after(output: Path, step: int) -> list[Path]:
    """The checkpoints of a run that lie behind ``step``: another branch, for a run that goes on from there."""
    return [path for path in checkpoints(output) if int(path.name.removeprefix("checkpoint-")) > step]


def refuse_shards(path: Path) -> None:
    """Say what to do with a checkpoint, or a run of them, whose weights are in ZeRO shards alone.

    Raises:
        UsageError: it is one.
    """
    for folder in (path, *checkpoints(path)[-1:]):
        latest = folder / "latest"  # DeepSpeed's, with the name of the folder of shards
        if latest.is_file() and (folder / latest.read_text(errors="replace").strip()).is_dir():
            raise UsageError(
                f"{path} needs `cogtune merge-zero {shlex.quote(str(folder))}` first: its weights are in ZeRO shards",
                "then give --model the folder that it writes",
            )


def choose(wanted: str, output: Path) -> Path:
    """The checkpoint that ``--resume`` names: ``latest`` of the run in ``output``, or a path.

    Raises:
        UsageError: there is none; the message lists those there are.
    """
    there = checkpoints(output)
    if wanted == "latest":
        if not there:
            raise UsageError(f"{output} has no checkpoint to resume from", "leave --resume out to start a new run")
        return there[-1]
    path = Path(wanted)
    if not wanted or not path.is_dir():
        names = ", ".join(str(found) for found in there) or "none"
        raise UsageError(f"there is no checkpoint '{wanted}'", f"checkpoints in {output}: {names}")
    return path.absolute()


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What ``state.json`` of a checkpoint says.

    Raises:
        CogtuneError: the folder is not a checkpoint of cogtune, or of a newer one.
    """
    if not (checkpoint / STATE_NAME).is_file():
        raise CogtuneError(
            f"{checkpoint} is not a checkpoint: it has no {STATE_NAME}",
            "`--resume latest` takes the newest one",
        )
    state = read_json(checkpoint / STATE_NAME)
    if (
        not isinstance(state, dict)
        or type(state.get("step")) is not int
        or state["step"] < 0
        or not isinstance(state.get("identity"), dict)
    ):
        raise CogtuneError(f"{checkpoint / STATE_NAME} is damaged", "resume from another checkpoint")
    if state.get("format") != FORMAT:
        raise CogtuneError(f"{checkpoint} was written by another version of cogtune", "use that version to go on")
    return state


def fingerprints(files: Iterable[Path], checkpoint: Path) -> dict[str, str]:
    """What tells the files of ``torch.save`` in a checkpoint from any others, by their paths in it.

    Made of the names, sizes and checksums of their parts, which stand at each file's end: no weights are read.

    Raises:
        ValueError: a file is not whole; names it.
    """
    found = {}
    for path in files:
        try:
            with zipfile.ZipFile(path) as archive:
                parts = [[part.filename, part.file_size, part.CRC] for part in archive.infolist()]
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path.name} is not whole ({error})") from error
        found[path.relative_to(checkpoint).as_posix()] = digest(parts)
    return found


def exchanged(files: Iterable[Path], checkpoint: Path, state: Mapping[str, Any]) -> list[str]:
    """Those of ``files`` that are not what was saved with ``state``, as problems.

    Checkpoints of earlier versions, and of other programs, do not say what was.
    """
    saved = state.get("files")
    problems = []
    for path in files:
        wanted = saved.get(path.relative_to(checkpoint).as_posix()) if isinstance(saved, dict) else None
        if wanted is None:
            continue
        try:
            if wanted not in fingerprints([path], checkpoint).values():
                problems.append(f"{path.name} is not the file that was saved with this checkpoint")
        except ValueError as error:
            problems.append(str(error))
    return problems


def check_fits(checkpoint: Path, state: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that belongs to another run.

    Args:
        identity: what must be the same for the resumed run to be the same run, by name.

    Raises:
        CogtuneError: with every difference, or when another version wrote it.
    """
    before = state["identity"]
    unknown = [key for key in identity if key not in before]
    if unknown and before.get("strategy") == identity.get("strategy"):  # each strategy has keys of its own
        raise CogtuneError(
            f"{checkpoint} was written by another version of cogtune: it does not say {', '.join(unknown)}",
            "start anew in another --output; `cogtune merge-zero` still makes weights of a ZeRO checkpoint",
        )
    wrong = [
        f"{key}: {before[key]!r} in the checkpoint, {value!r} now"
        for key, value in identity.items()
        if key in before and before[key] != value
    ]
    if wrong:
        raise CogtuneError(
            f"{checkpoint} does not fit this run",
            "set these back, or start anew in another --output",
            details=wrong,
        )
