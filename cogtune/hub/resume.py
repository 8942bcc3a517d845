"""Fetching a run's newest checkpoint from the Hub, to resume from it as if the run had been on this machine."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogtune.config.resolving import read_mapping
from cogtune.data.sources import is_on_hub
from cogtune.hub.checkpoints import BRANCH, files_of, is_checkpoint_file, newest_step
from cogtune.hub.redaction import redacted
from cogtune.hub.remote import check_repo_id, http_error, hub_address, quiet_client
from cogtune.run.checkpoints import STATE_NAME, changed_files, read_state
from cogtune.run.folder import RUN_NAME, RunFolder
from cogtune.run.metrics import read_metrics
from cogtune.system import console, names
from cogtune.system.containment import refuse_links_out
from cogtune.system.errors import CogtuneError, UsageError
from cogtune.system.files import os_errors_explained, write_text
from cogtune.system.folders import publish_folder, require_replaceable
from cogtune.system.json_files import read_json

_STAGING = ".hub-"
"""Prefix of the folder that holds a download until it is complete."""


_COMMIT = re.compile("[0-9a-f]{40,64}")


@dataclass(frozen=True)
class RemoteCheckpoint:
    """The newest checkpoint in a repository."""

    repo_id: str
    commit: str
    step: int
    files: frozenset[str]
    """Every path in the repository."""

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{names.CHECKPOINT}{self.step}"


def is_repository(reference: str) -> bool:
    """Return whether ``--resume`` means a repository on the Hub, ``user/name`` or ``user/name@revision``."""
    repo_id = reference.partition("@")[0]
    is_checkpoint = names.CHECKPOINT_NAME.fullmatch(repo_id.rpartition("/")[2])  # out/checkpoint-500, misspelled
    return not is_checkpoint and not Path(reference).exists() and is_on_hub(repo_id)


def find_checkpoint(reference: str) -> RemoteCheckpoint:
    """Find the newest checkpoint of ``user/name`` or ``user/name@revision``.

    Without a revision, it is looked for on the branch that `cogtune push --every` writes, then on main.

    Raises:
        UsageError: the name is not valid.
        CogtuneError: there is no such repository or checkpoint, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    repo_id, _, revision = reference.partition("@")
    check_repo_id(repo_id)
    api = HfApi(endpoint=hub_address())
    with _downloading(repo_id, revision):
        try:
            info = api.model_info(repo_id, revision=revision or BRANCH)
        except RevisionNotFoundError:
            if revision:
                raise
            info = api.model_info(repo_id)
    files = [file.rfilename for file in info.siblings or ()]
    step = newest_step(files)
    if info.sha is not None and not _COMMIT.fullmatch(info.sha):  # which becomes part of a folder's name
        raise CogtuneError(f"the server's answer for {reference} is invalid: commit {info.sha!r}", "check HF_ENDPOINT")
    if step is None or info.sha is None:
        raise CogtuneError(
            f"{reference} contains no checkpoint to resume from",
            f"push one with `cogtune push RUN {repo_id} --every 10` while the run is training",
        )
    return RemoteCheckpoint(repo_id, info.sha, step, frozenset(files))


def fetch_checkpoint(remote: RemoteCheckpoint, output: Path, *, overwrite: bool) -> tuple[Path, dict[str, Any]]:
    """Download a checkpoint into the run folder ``output``; return its folder and the run's public settings.

    It gets its final name once it is complete and every file matches its fingerprint. If the download is interrupted,
    what has arrived is kept.

    Args:
        overwrite: replace another checkpoint of that step.

    Raises:
        UsageError: ``output`` has another checkpoint of that step.
        CogtuneError: the checkpoint is damaged or not one that may be resumed from, or the download failed.
    """
    refuse_links_out(output)
    target = output / remote.name
    require_replaceable(target)
    staging = output / f"{_STAGING}{remote.commit[:16]}"
    for other in output.glob(f"{_STAGING}*"):
        if other != staging and not other.is_symlink():
            shutil.rmtree(other, ignore_errors=True)
    _download(remote, [f"{remote.name}/{STATE_NAME}"], staging)
    aside = staging / remote.name
    state = read_state(aside)
    wanted = _wanted(remote, files_of(aside, state))
    there = target.exists()
    if there and _is_same(target, state):
        console.note(f"{target} has already been downloaded")
    elif there and not overwrite:
        raise UsageError(
            f"{target} already exists, and is not the checkpoint in {remote.repo_id}",
            "use --overwrite to replace it, or choose another --output",
        )
    else:
        there = False
        _download(remote, [f"{remote.name}/{name}" for name in wanted], staging)
        if problems := changed_files(aside, state):
            shutil.rmtree(staging, ignore_errors=True)
            raise CogtuneError(
                f"{remote.name} in {remote.repo_id} is damaged",
                "run the same command again to download it again, or resume from another revision",
                details=problems,
            )
    _download(remote, [name for name in (RUN_NAME, names.METRICS) if name in remote.files], staging)
    settings = read_mapping(staging / RUN_NAME) if RUN_NAME in remote.files else {}
    if not there:
        left = publish_folder(aside, target)
        if left:
            console.warn(left)
        _write_metrics(staging / names.METRICS, RunFolder(output).metrics, remote.step, overwrite)
        console.note(f"downloaded {remote.name} of {remote.repo_id} to {target}")
    shutil.rmtree(staging, ignore_errors=True)
    return target, settings


def _wanted(remote: RemoteCheckpoint, saved: Sequence[str]) -> Sequence[str]:
    """Return the files to download of those that a checkpoint's ``state.json`` lists.

    Raises:
        CogtuneError: one of them is missing from the Hub, or is not a file that resuming may read.
    """
    problems = [f"{name!r} is not a file of a checkpoint" for name in saved if not is_checkpoint_file(name)]
    problems += [f"{name} is missing" for name in saved if f"{remote.name}/{name}" not in remote.files]
    if problems:
        raise CogtuneError(
            f"{remote.name} in {remote.repo_id} cannot be used", "resume from another revision", details=problems
        )
    return saved


def _is_same(checkpoint: Path, state: dict[str, Any]) -> bool:
    """Return whether a folder is the undamaged checkpoint with this state."""
    path = checkpoint / STATE_NAME
    return path.is_file() and read_json(path) == state and not changed_files(checkpoint, state)


def _write_metrics(source: Path, target: Path, step: int, overwrite: bool) -> None:
    """Copy the metrics of the run's steps so far, unless this folder has its own."""
    lines = [line for line in read_metrics(source) if line["step"] <= step]
    if lines and (overwrite or not target.exists()):
        write_text(target, "".join(json.dumps(line) + "\n" for line in lines))


def _download(remote: RemoteCheckpoint, paths: Sequence[str], staging: Path) -> None:
    """Download files to ``staging``; complete ones are not downloaded twice."""
    from huggingface_hub import hf_hub_download

    with os_errors_explained(staging):
        staging.mkdir(parents=True, exist_ok=True)
    for path in paths:
        with _downloading(remote.repo_id, remote.commit):
            hf_hub_download(remote.repo_id, path, revision=remote.commit, local_dir=staging, endpoint=hub_address())


@contextlib.contextmanager
def _downloading(repo_id: str, revision: str) -> Iterator[None]:
    """Explain errors of the Hub, the network and the disk during a download.

    Raises:
        CogtuneError: instead of them.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError

    try:
        with quiet_client():
            yield
    except RepositoryNotFoundError as error:
        raise CogtuneError(
            f"{repo_id} does not exist on the Hub, or you do not have access to it",
            "check the spelling; if it is private, run `hf auth login` or set HF_TOKEN",
        ) from error
    except RevisionNotFoundError as error:
        raise CogtuneError(f"{repo_id} has no revision '{revision}'", "pass one of its branches or commits") from error
    except (OSError, ValueError, RuntimeError, http_error()) as error:
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
            chain.append(cause)
        if any(isinstance(item, OfflineModeIsEnabled) for item in chain):
            raise CogtuneError(
                f"cannot download the checkpoint of {repo_id}: offline mode is on",
                "unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE, then run the command again",
            ) from error
        reason = next((line for item in reversed(chain) for line in str(item).splitlines() if line), "")
        raise CogtuneError(
            f"cannot download the checkpoint of {repo_id}: {redacted(reason, get_token() or '', (repo_id,))}",
            "check your network connection, then run the same command again to continue: what has arrived is kept",
        ) from error
