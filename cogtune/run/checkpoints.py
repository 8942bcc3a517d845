"""Which checkpoints a run has, and whether one fits a run. Reads names and ``state.json``; needs no torch."""

from __future__ import annotations

import json
import shlex
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from cogtune.models.sat import refuse_sat
from cogtune.run.folder import RunFolder, step_of_checkpoint
from cogtune.system import names
from cogtune.system.digests import digest, fingerprint_file
from cogtune.system.errors import CogtuneError, UsageError
from cogtune.system.files import open_regular
from cogtune.system.json_files import CHECKSUM, is_sealed, read_json, sealed

FORMAT = 1
STATE_NAME = names.STATE
"""Written last: a folder that has it was complete when it got its name."""


def checkpoints(output: Path) -> list[Path]:
    """List a run's complete checkpoints, oldest first."""
    return [path for _, path in RunFolder(output).checkpoint_folders() if (path / STATE_NAME).is_file()]


def checkpoints_after(output: Path, step: int) -> list[Path]:
    """List a run's checkpoints after ``step``, which a run resumed there would diverge from."""
    found = RunFolder(output).checkpoint_folders()
    return [path for number, path in found if number > step and (path / STATE_NAME).is_file()]


def refuse_shards(path: Path) -> None:
    """Reject a checkpoint, or a run, whose weights are only in ZeRO shards, or that is of another program.

    Raises:
        CogtuneError: it is one.
    """
    refuse_sat(path)
    for folder in (path, *checkpoints(path)[-1:]):
        latest = folder / "latest"  # DeepSpeed's, with the name of the folder of shards
        if latest.is_file() and (folder / latest.read_text(errors="replace").strip()).is_dir():
            raise UsageError(
                f"the weights of {path} are in ZeRO shards",
                f"run `cogtune merge-zero {shlex.quote(str(folder))}` and pass the folder it writes as --model",
            )


def choose_checkpoint(wanted: str, output: Path) -> Path:
    """Return the checkpoint that ``--resume`` names: ``latest`` of the run in ``output``, or a path.

    Raises:
        UsageError: it does not exist; the hint lists those that do.
    """
    there = checkpoints(output)
    if wanted == "latest":
        if not there:
            raise UsageError(f"{output} has no checkpoint to resume from", "remove --resume to start a new run")
        return there[-1]
    path = Path(wanted)
    if not wanted or not path.is_dir():
        names = ", ".join(str(found) for found in there) or "none"
        raise UsageError(f"no such checkpoint: '{wanted}'", f"checkpoints in {output}: {names}")
    return path.absolute()


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's ``state.json``.

    Raises:
        CogtuneError: the folder is not a checkpoint of cogtune, or of a newer one.
    """
    if not (checkpoint / STATE_NAME).is_file():
        raise CogtuneError(
            f"{checkpoint} is not a checkpoint: {STATE_NAME} is missing",
            "use `--resume latest` for the newest one",
        )
    path = checkpoint / STATE_NAME
    state = read_json(path)
    if not isinstance(state, dict) or (CHECKSUM in state and not is_sealed(state)):
        raise CogtuneError(f"{path} is damaged: checksum mismatch", "resume from another checkpoint")
    if type(state.get("step")) is not int or state["step"] < 0 or not isinstance(state.get("identity"), dict):
        raise CogtuneError(f"{path} is damaged: it has no step or identity", "resume from another checkpoint")
    if state.get("format") != FORMAT:
        raise CogtuneError(f"{checkpoint} was written by another version of cogtune", "use that version to resume")
    if step_of_checkpoint(checkpoint) not in (None, state["step"]):
        raise CogtuneError(
            f"{checkpoint} is at step {state['step']} according to its {STATE_NAME}",
            f"rename it to checkpoint-{state['step']}, or resume from another checkpoint",
        )
    return state


def stamp(checkpoint: Path) -> str:
    """Return a stamp that distinguishes a checkpoint from a later one of the same name."""
    stat = (checkpoint / STATE_NAME).stat()
    return f"{stat.st_ino}-{stat.st_mtime_ns}-{stat.st_size}"


def fingerprints(files: Iterable[Path], checkpoint: Path) -> dict[str, str]:
    """Return fingerprints of a checkpoint's files, by their paths in it.

    Of a file of ``torch.save`` it is made of the names, sizes and checksums of its parts, which stand at its end: no
    weights are read. Of any other file all bytes are.

    Raises:
        ValueError: a file of ``torch.save`` is not whole; names it.
        OSError: a file cannot be read.
    """
    return {path.relative_to(checkpoint).as_posix(): _fingerprint(path) for path in files}


def _fingerprint(path: Path) -> str:
    if path.suffix != ".pt":
        return fingerprint_file(path)
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            return digest([[part.filename, part.file_size, part.CRC] for part in archive.infolist()])
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path.name} is incomplete ({error})") from error


def changed_files(
    checkpoint: Path, state: Mapping[str, Any], only: Callable[[str], bool] = lambda _: True
) -> list[str]:
    """List the files of a checkpoint that differ from those saved with ``state``, as problems.

    Checkpoints of earlier versions do not say it of every file, and those of other programs of none.

    Args:
        only: whether to look at a file, by its path in the checkpoint.
    """
    saved = state.get("files")
    if not isinstance(saved, dict):
        return []
    problems = []
    for name in sorted(filter(only, saved)):
        path = checkpoint / name
        try:
            if not path.exists():
                problems.append(f"{name} is missing")
            elif saved[name] != _fingerprint(path):
                problems.append(f"{name} is not the file that was saved with this checkpoint")
        except (ValueError, OSError) as error:
            problems.append(f"{name}: {getattr(error, 'strerror', None) or error}")
    if CHECKSUM in state:
        folders = {name.partition("/")[0] for name in saved if "/" in name}
        there = (path for folder in sorted(folders) for path in (checkpoint / folder).rglob("*") if not path.is_dir())
        names = (path.relative_to(checkpoint).as_posix() for path in there)
        problems += [f"{name} was not saved with this checkpoint" for name in names if name not in saved and only(name)]
    return problems


_NOT_BY_DEFAULT = ("base_precision",)
"""Of a fingerprint: what is only there if it is set."""


def check_fits(
    checkpoint: Path,
    state: Mapping[str, Any],
    fingerprint: Mapping[str, Any],
    *,
    model: str | None = None,
    samples: int | None = None,
) -> None:
    """Reject a checkpoint that belongs to another run.

    Args:
        fingerprint: the run's, as :func:`cogtune.run.plan.resume_fingerprint` returns it.
        model: the run's base model, and ``samples`` the number of its samples, for messages instead of digests.

    Raises:
        CogtuneError: with every difference, or when another version wrote it.
    """
    before = state["identity"]
    if "ema" in fingerprint and "ema" not in before:
        raise CogtuneError(
            f"{checkpoint} has no moving average of the weights", "remove --ema, or start over in another --output"
        )
    unknown = [key for key in fingerprint if key not in before and key not in _NOT_BY_DEFAULT]
    if unknown and before.get("strategy") == fingerprint.get("strategy"):  # keys differ between strategies
        raise CogtuneError(
            f"{checkpoint} was written by another version of cogtune: it does not record {', '.join(unknown)}",
            "start over in another --output; `cogtune merge-zero` can still merge a ZeRO checkpoint",
        )
    dataset = state.get("dataset")
    then = {"model": state.get("base_model"), "data": dataset.get("samples") if isinstance(dataset, dict) else None}
    now = {"model": model, "data": samples}
    wrong = []
    for key, value in {**dict.fromkeys(_NOT_BY_DEFAULT), **fingerprint}.items():
        if (key not in before and key not in _NOT_BY_DEFAULT) or before.get(key) == value:
            continue
        if key not in _CHANGED:
            wrong.append(f"{key}: {before.get(key)!r} in the checkpoint, {value!r} now")
        elif None in (then.get(key), now.get(key)) or then[key] == now[key]:
            if key != "data" or before.get("model") == fingerprint.get("model"):  # each model encodes it for itself
                wrong.append(f"{key}: {_CHANGED[key]}")
        else:
            unit = " samples" if key == "data" else ""
            wrong.append(f"{key}: {then[key]}{unit} in the checkpoint, {now[key]}{unit} now")
    if wrong:
        raise CogtuneError(
            f"{checkpoint} does not fit this run",
            "change these back, or start over in another --output",
            details=wrong,
        )


_CHANGED = {
    "model": "its weights differ from those the checkpoint was trained from",
    "data": "the clips, captions or sizes differ from those the checkpoint was trained on",
    "shards": "the checkpoint's are grouped differently",
}
"""Explanations for keys that are compared by a digest."""


FACTS = "cogtune"
"""The key of a LoRA file's header under which a run's facts are, as JSON."""
_ADAPTER = "lora_adapter_metadata"
"""The one under which diffusers keeps the adapter's configuration."""


def lora_facts(facts: Mapping[str, Any], adapter: str) -> str:
    """Return a run's facts for a LoRA file's header, with a checksum that holds for the adapter's configuration too."""
    return json.dumps(sealed({**facts, "adapter": digest(adapter)}))


def facts_in(header: Mapping[str, str], path: Path) -> dict[str, Any]:
    """Return what :func:`lora_facts` put into the header of the file ``path``; empty if another program wrote it.

    Raises:
        CogtuneError: the header has changed. (Earlier versions gave it no checksum.)
    """
    try:
        facts = json.loads(header.get(FACTS, "{}"))
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict) or (CHECKSUM in facts and not is_sealed(facts)):
        raise CogtuneError(f"{path} is damaged: checksum mismatch in its header", "copy it again, or use another")
    adapter = facts.pop("adapter", None)
    if facts.pop(CHECKSUM, None) is not None and adapter != digest(header.get(_ADAPTER, "")):
        raise CogtuneError(
            f"{path} is damaged: its header has another LoRA's configuration", "copy it again, or use another"
        )
    return facts


def read_lora_facts(path: Path) -> dict[str, Any]:
    """Read what cogtune wrote about the run in a LoRA file's header; empty for another program's file.

    Raises:
        CogtuneError: the file is missing, not safetensors, or its header is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as handle:
            header = handle.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CogtuneError(
            f"{path} is not a LoRA file: {error}", "pass a run's folder or a .safetensors file"
        ) from error
    return facts_in(header, path)
