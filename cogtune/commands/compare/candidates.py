"""The weights to compare: a run's checkpoints, LoRA files, full weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cogtune.commands.compare.request import BASE
from cogtune.models.variants import LORA_WEIGHTS_NAME
from cogtune.run.checkpoints import STATE_NAME, checkpoints, refuse_shards
from cogtune.run.folder import AVERAGE_NAME, RunFolder, run_folder, step_of_checkpoint
from cogtune.system.errors import UsageError


@dataclass(frozen=True)
class Candidate:
    """Weights to compare with the base."""

    label: str
    """Its name, unique among all, which is that of its folder of videos."""
    reference: str
    """What ``cogtune infer`` calls it: a file, a folder or a Hub id."""
    is_lora: bool
    """Whether it is a LoRA rather than full weights."""
    step: int | None = None
    run: Path | None = None
    """The folder of the run that it comes from."""


def find_candidates(targets: Sequence[str]) -> list[Candidate]:
    """Return the weights that are named: of a run, those of all its checkpoints.

    Raises:
        UsageError: a run has no weights yet, or only shards.
    """
    found = [one for target in dict.fromkeys(targets) if target != BASE for one in _of_target(target)]
    found = list({candidate.reference: candidate for candidate in found}.values())
    runs = {candidate.run for candidate in found if candidate.run is not None}
    labels: dict[str, int] = {}
    unique = []
    for candidate in found:
        label = candidate.label
        if candidate.run is not None and len(runs) > 1:
            label = f"{candidate.run.name}-{label}"
        labels[label] = labels.get(label, 0) + 1
        unique.append(replace(candidate, label=label if labels[label] == 1 else f"{label}-{labels[label]}"))
    return unique


def _of_target(target: str) -> Iterator[Candidate]:
    path = Path(target).expanduser()
    if not path.exists():  # a Hub id, or a mistake that reading the LoRA reports
        yield Candidate(_name(target), target, is_lora=True)
        return
    run = run_folder(path)
    if path.is_dir() and run == path.absolute() and not (path / STATE_NAME).is_file():
        weights = [one for folder in checkpoints(path) if (one := _weights(folder, run)) is not None]
        if not weights:
            refuse_shards(path)
            last = _weights(path, run)
            if last is None:
                raise UsageError(
                    f"{target} has no weights yet", "wait for its first checkpoint, or pass a LoRA file or `base`"
                )
            weights = [last]
        yield from weights
        return
    if path.is_file():
        label = path.parent.name if path.name == LORA_WEIGHTS_NAME and path.parent.name else path.stem
        yield Candidate(_name(label), str(path), is_lora=True, step=_step(path), run=run)
        return
    yield _weights(path, run) or Candidate(_name(path.absolute().name), str(path), is_lora=True, run=run)


def _weights(folder: Path, run: Path | None) -> Candidate | None:
    """Return the weights directly in a folder, if there are any by the usual names."""
    name = folder.absolute().name
    label = _name(f"{folder.absolute().parent.name}-{name}" if name == AVERAGE_NAME else name)
    if (folder / LORA_WEIGHTS_NAME).is_file():
        return Candidate(label, str(folder / LORA_WEIGHTS_NAME), is_lora=True, step=_step(folder), run=run)
    if (folder / "model_index.json").is_file() or (folder / "transformer" / "config.json").is_file():
        return Candidate(label, str(folder), is_lora=False, step=_step(folder), run=run)
    return None


def _step(path: Path) -> int | None:
    """Return the step in the name of the checkpoint that weights lie in."""
    above = (path, *path.absolute().parents[:2])
    return next((step for folder in above if (step := step_of_checkpoint(folder)) is not None), None)


def _name(text: str) -> str:
    """Return a text as the name of a folder."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")[:80] or "weights"


def run_of(candidates: Sequence[Candidate]) -> Path | None:
    """Return the first run among the candidates, whose prompts and clips are used."""
    return next((one.run for one in candidates if one.run is not None and RunFolder(one.run).run_yaml.is_file()), None)
