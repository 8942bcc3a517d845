"""A checkpoint on the Hub: everything needed to resume, without secrets or local paths."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cogtune.hub.card import gather_facts
from cogtune.hub.local import refuse_files_elsewhere
from cogtune.hub.public import public_file, public_run_yaml, public_state
from cogtune.models.variants import LORA_WEIGHTS_NAME
from cogtune.run.checkpoints import STATE_NAME, changed_files, fingerprints, read_state
from cogtune.run.folder import AVERAGE_NAME, RUN_NAME, RunFolder
from cogtune.run.metrics import read_metrics
from cogtune.system import names
from cogtune.system.errors import CogtuneError
from cogtune.system.files import os_errors_explained
from cogtune.system.json_files import CHECKSUM, write_sealed

BRANCH = "checkpoints"
"""The branch of the newest checkpoint; main is for weights that are published."""

_WEIGHTS = re.escape(LORA_WEIGHTS_NAME)
_TRANSFORMER = r"config\.json|diffusion_pytorch_model(-\d{5}-of-\d{5})?\.safetensors"
_INDEX = r"diffusion_pytorch_model\.safetensors\.index\.json"
_STATE = r"optimizer\.pt|stream-state-\d+\.safetensors"
_SHARDS = r"latest|pytorch_model/\w+\.pt"
_FILES = re.compile(
    rf"({AVERAGE_NAME}/)?({_WEIGHTS}|transformer/({_TRANSFORMER}|{_INDEX}))|{_STATE}|{_SHARDS}", re.ASCII
)
_SCRIPTS = re.compile(r"zero_to_\w+\.py", re.ASCII)
"""DeepSpeed's scripts in a checkpoint, which no resume needs; code is neither published nor downloaded."""

CHECKPOINT_STATE = re.compile(rf"({names.CHECKPOINT}([0-9]{{1,12}}))/{re.escape(STATE_NAME)}")
"""Pattern of the path of a checkpoint's ``state.json`` in a repository, with the folder's name and the step."""


def is_checkpoint_file(name: str) -> bool:
    """Return whether training writes files of this name, a path in a checkpoint's folder, and resumes from them."""
    return bool(_FILES.fullmatch(name))


def files_of(checkpoint: Path, state: Mapping[str, Any]) -> list[str]:
    """Return the files that a checkpoint was saved with, as its ``state.json`` lists them.

    Raises:
        CogtuneError: it lists none.
    """
    saved = state.get("files")
    if not isinstance(saved, dict) or not saved or CHECKSUM not in state:
        raise CogtuneError(
            f"{checkpoint} was written by an early version of cogtune, or by another program: "
            f"its {STATE_NAME} does not list its files",
            "resume the run with this version, and use its next checkpoint",
        )
    return sorted(saved)


def newest_step(paths: list[str]) -> int | None:
    """Return the step of the newest complete checkpoint among a repository's files."""
    return max((int(found[2]) for path in paths if (found := CHECKPOINT_STATE.fullmatch(path))), default=None)


def public_checkpoint(checkpoint: Path, repo_id: str, aside: Path) -> dict[str, Path | bytes]:
    """Copy what may be published of a checkpoint to ``aside``; return the files to upload, by path in the repository.

    Files that contain nothing private are hard links: the run may delete the checkpoint during the upload.

    Raises:
        CogtuneError: the checkpoint is damaged, or contains a file that resuming does not need.
    """
    state = read_state(checkpoint)
    saved = [name for name in files_of(checkpoint, state) if not _SCRIPTS.fullmatch(name)]
    if unknown := [name for name in saved if not is_checkpoint_file(name)]:
        raise CogtuneError(
            f"{checkpoint} contains files that no resume needs",
            "resume from it with this version of cogtune, and push the next checkpoint",
            details=unknown,
        )
    refuse_files_elsewhere([checkpoint / name for name in (STATE_NAME, *saved)], checkpoint)
    if problems := changed_files(checkpoint, state):
        raise CogtuneError(f"{checkpoint} is damaged and was not pushed", "push an earlier one", details=problems)
    config = state.get("config")
    config = config if isinstance(config, dict) else {}
    facts = gather_facts(repo_id, "lora", checkpoint, state, config)  # of any kind: only the base model is used
    folder = aside / checkpoint.name
    changed = []
    for name in saved:
        target = folder / name
        with os_errors_explained(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            if _place(public_file(checkpoint / name, facts.base_model, aside), checkpoint / name, target):
                changed.append(target)
    published = {name: state["files"][name] for name in saved}
    write_sealed(folder / STATE_NAME, public_state({**state, "files": published}, fingerprints(changed, folder)))
    contents: dict[str, Path | bytes] = {f"{checkpoint.name}/{name}": folder / name for name in (STATE_NAME, *saved)}
    if config:
        contents[RUN_NAME] = public_run_yaml(config, facts)
    lines = [line for line in read_metrics(RunFolder(checkpoint.parent).metrics) if line["step"] <= state["step"]]
    contents[names.METRICS] = "".join(json.dumps(line) + "\n" for line in lines).encode()
    return contents


def _place(public: Path | bytes, source: Path, target: Path) -> bool:
    """Put a file of a checkpoint, or its public version, at ``target``; return whether its content was changed."""
    if isinstance(public, bytes):
        target.write_bytes(public)
        return True
    if public != source:
        shutil.move(public, target)
        return True
    try:
        os.link(source, target)
    except OSError:  # this disk does not support hard links
        shutil.copyfile(source, target)
    return False
