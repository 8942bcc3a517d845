"""A run's files to publish: weights, samples and metadata, and whether the weights are complete."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogtune.hub.card import Kind
from cogtune.models.configs import read_index
from cogtune.models.variants import LORA_WEIGHTS_NAME
from cogtune.run.checkpoints import STATE_NAME, checkpoints, read_lora_facts
from cogtune.run.folder import MERGE_NAME, RunFolder
from cogtune.run.sample_videos import step_folders
from cogtune.system.containment import leads_out, refuse_links
from cogtune.system.errors import CogtuneError
from cogtune.system.files import open_regular, os_errors_explained
from cogtune.system.reading import Schema, read_as, read_object

INDEX_SUFFIX = ".safetensors.index.json"
"""The file name suffix of a model's shard index."""

_SHARD = r"(?:-\d{5}-of-\d{5})?\.safetensors|\.safetensors\.index\.json"
_DIFFUSERS_MODEL = re.compile(rf"config\.json|diffusion_pytorch_model(?:{_SHARD})")
_FILES = {
    "transformer": _DIFFUSERS_MODEL,
    "vae": _DIFFUSERS_MODEL,
    "scheduler": re.compile(r"scheduler_config\.json"),
    "text_encoder": re.compile(rf"config\.json|generation_config\.json|model(?:{_SHARD})"),
    "tokenizer": re.compile(r"(?:tokenizer_config|special_tokens_map|added_tokens|tokenizer)\.json|spiece\.model"),
}
"""The files that diffusers and transformers save for each component. Nothing else is uploaded."""


@dataclass(frozen=True)
class Weights:
    """The weights to publish: their kind and path."""

    kind: Kind
    path: Path
    """The LoRA file, or the folder of the transformer or the pipeline."""


def find_weights(run: Path) -> tuple[Weights, list[str]]:
    """Find the weights of ``run``, or those of its newest checkpoint; return them and remarks on the choice.

    Raises:
        CogtuneError: there are none to push.
    """
    if run.is_file():
        if run.suffix != ".safetensors":
            raise CogtuneError(f"{run} is not a .safetensors file", "pass a LoRA file, a run folder or a checkpoint")
        return Weights("lora", run), []
    if not run.exists():
        raise CogtuneError(f"no such file or folder: {run}", "pass the --output folder of a training run, such as out/")
    found = _weights_in(run)
    if found:
        return found, []
    newest_first = checkpoints(run)[::-1]
    for checkpoint in newest_first:
        found = _weights_in(checkpoint)
        if found:
            note = f"{run} has no final weights; pushing its newest checkpoint, {checkpoint.name}"
            return found, [note]
    for sharded in (run, *newest_first):
        if (sharded / "latest").is_file():  # what DeepSpeed leaves in a folder of shards
            raise CogtuneError(
                f"{sharded} contains only ZeRO shards of the weights",
                f"run `cogtune merge-zero {sharded}` and push the folder it writes",
            )
    raise CogtuneError(
        f"{run} contains no weights to push",
        "pass a run that has reached its first checkpoint, a merged folder, or a LoRA file",
        details=[
            f"no {LORA_WEIGHTS_NAME} (a LoRA)",
            "no transformer/config.json with transformer/*.safetensors (a full fine-tune)",
            "no model_index.json (a merged pipeline)",
            "no checkpoint-N with any of these",
        ],
    )


def _weights_in(folder: Path) -> Weights | None:
    if (folder / "model_index.json").is_file():
        return Weights("pipeline", folder)
    if (folder / LORA_WEIGHTS_NAME).is_file():
        return Weights("lora", folder / LORA_WEIGHTS_NAME)
    for place in (folder / "transformer", folder):
        if (place / "config.json").is_file() and any(place.glob("*.safetensors")):
            return Weights("transformer", place)
    return None


class ShardIndex(Schema):
    """A model's shard index."""

    weight_map: dict[str, str]


def weight_files(weights: Weights) -> tuple[dict[str, Path], list[str]]:
    """Return the repository path and local path of every weight file, and the names of other files found.

    Raises:
        CogtuneError: with every missing component and shard.
    """
    if weights.kind == "lora":
        return {LORA_WEIGHTS_NAME: weights.path}, []
    problems: list[str] = []
    left_out: list[str] = []
    if weights.kind == "transformer":
        files = _component("transformer", weights.path, problems, left_out)
    else:
        files = {"model_index.json": weights.path / "model_index.json"}
        for name in read_index(files["model_index.json"])[1]:
            folder = weights.path / name
            found = _component(name, folder, problems, left_out) if folder.is_dir() else {}
            if not found:
                problems.append(f"{name}/ is listed in model_index.json but missing or empty")
            files |= found
    if problems:
        raise CogtuneError(f"the weights in {weights.path} are incomplete", "create the folder again", details=problems)
    return files, left_out


def _component(name: str, folder: Path, problems: list[str], left_out: list[str]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if not path.is_file():
            continue
        if _FILES[name].fullmatch(path.name):
            files[f"{name}/{path.name}"] = path
        elif not path.name.startswith("."):
            left_out.append(f"{name}/{path.name}")
    for index in [path for path in files.values() if path.name.endswith(INDEX_SUFFIX)]:
        shards = set(read_as(index, ShardIndex).weight_map.values())
        problems += [
            f"{name}/{shard} is listed in {index.name} but missing"
            for shard in sorted(shards)
            if f"{name}/{shard}" not in files
        ]
    return files


def check_tensors(files: Mapping[str, Path]) -> None:
    """Reject weights that cannot be loaded, judging by the files' headers.

    Raises:
        CogtuneError: a file is damaged, a tensor is empty, or a LoRA holds no adapter.
    """
    from safetensors import SafetensorError, safe_open

    problems = []
    for name, path in files.items():
        if path.suffix != ".safetensors":
            continue
        try:
            with os_errors_explained(path, "read"), open_regular(path), safe_open(path, framework="numpy") as handle:
                shapes = {key: handle.get_slice(key).get_shape() for key in handle.keys()}  # noqa: SIM118 (not a mapping)
        except SafetensorError as error:
            problems.append(f"{name} is damaged or truncated: {error}")
            continue
        if not shapes:
            problems.append(f"{name} contains no tensors")
        elif name == LORA_WEIGHTS_NAME and not any(".lora_A." in key for key in shapes):
            problems.append(f"{path} contains no LoRA in the diffusers format")
        problems += [f"{name}: {key} is empty, with shape {shape}" for key, shape in shapes.items() if 0 in shape]
    if problems:
        raise CogtuneError(
            "the weights are unusable and were not pushed",
            "push an earlier checkpoint, or save again (empty tensors were not gathered from all ranks)",
            details=problems,
        )


def newest_samples(run: Path, step: object) -> dict[str, Path]:
    """List the videos of the newest ``samples/step-N`` up to ``step``, by their path in the repository.

    Without such folders, list those in ``samples/``.
    """
    by_step = dict(step_folders(run))
    folder = RunFolder(run).samples
    if by_step:
        reached = [number for number in by_step if not isinstance(step, int) or number <= step]
        if not reached:
            return {}
        folder = by_step[max(reached)]
    videos = sorted(path for path in folder.rglob("*.mp4") if not path.name.startswith("."))
    return {path.relative_to(run).as_posix(): path for path in videos}


def find_stamp(weights: Weights) -> Path | None:
    """Return the file with cogtune's metadata about the weights' run; None if there is none."""
    if weights.kind == "lora":
        return None
    state, merged = weights.path.parent / STATE_NAME, weights.path / MERGE_NAME
    if weights.kind == "transformer" and state.is_file():
        return state
    return merged if merged.is_file() else None


def read_stamp(weights: Weights) -> dict[str, Any]:
    """Read cogtune's metadata about the weights' run; empty if another program made them."""
    if weights.kind == "lora":
        return read_lora_facts(weights.path)
    path = find_stamp(weights)
    if path is None:
        return {}
    record = read_object(path)
    return record if path.name == STATE_NAME else {"step": record.get("step"), "version": record.get("cogtune")}


def refuse_files_elsewhere(files: Iterable[Path], root: Path) -> None:
    """Reject files that links bring in from outside ``root``.

    Raises:
        CogtuneError: with every such file.
    """
    hint = "replace it with a copy (`merge-zero --copy-base` makes copies), or use --allow-outside to upload its target"
    refuse_links([path for path in files if path.exists() and leads_out(path, root)], root, hint)


def header_metadata(path: Path) -> dict[str, str]:
    """Return the metadata in the header of a safetensors file."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as handle:
        return dict(handle.metadata() or {})


def json_object(text: str) -> dict[str, Any] | None:
    """Parse ``text`` as a JSON object; None if it is not one."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
