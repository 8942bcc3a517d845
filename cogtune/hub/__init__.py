"""Publishing a run on the Hugging Face Hub: weights, a model card and sample videos in one commit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cogtune.config.resolving import read_mapping
from cogtune.hub.card import SampleVideo, gather_facts, model_card
from cogtune.hub.compared import compared, comparison_section
from cogtune.hub.local import (
    Weights,
    check_tensors,
    find_stamp,
    find_weights,
    newest_samples,
    read_stamp,
    refuse_files_elsewhere,
    weight_files,
)
from cogtune.hub.public import public_file, public_run_yaml
from cogtune.hub.remote import Target, access_token, check_repo_id, hub_address, upload
from cogtune.hub.watch import push_checkpoints
from cogtune.run.folder import RUN_NAME, RunFolder, run_folder
from cogtune.run.sample_videos import prompt_of, said_of
from cogtune.system.containment import links_out
from cogtune.system.scratch import scratch_folder

__all__ = ["PushResult", "push", "push_checkpoints"]

MESSAGE = "Upload with cogtune"
"""The default commit message."""


@dataclass(frozen=True)
class PushResult:
    """What was uploaded, or would be."""

    url: str
    files: tuple[tuple[str, int], ...]
    """Path in the repository and size in bytes of each file."""
    commit: str | None
    """The commit's hash; None for a dry run."""
    removed: tuple[str, ...] = ()
    """Files of an earlier push that this one deletes."""
    notes: tuple[str, ...] = ()
    """Remarks for the user: a checkpoint chosen, nothing changed, a message from the Hub."""


def push(
    run: Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    message: str = MESSAGE,
    dry_run: bool = False,
    allow_outside: bool = False,
    tell: Callable[[Sequence[tuple[str, int]]], None] = lambda _files: None,
) -> PushResult:
    """Upload weights, model card, a redacted ``run.yaml`` and sample videos in one commit.

    Args:
        run: a run folder, one of its checkpoints, a merged folder, or a LoRA file.
        repo_id: ``user/name``; created if it does not exist.
        private: create the repository as private; an existing public one is rejected.
        token: access token; by default HF_TOKEN or the saved login.
        revision: branch to commit to, created if it does not exist; by default main.
        message: commit message.
        dry_run: check and list everything without network access.
        allow_outside: also upload files outside the run's folder that links in it point to.
        tell: called before the upload with the path and size of each file.

    Raises:
        UsageError: ``repo_id`` is not one.
        CogtuneError: ``run`` has no complete weights, or the Hub cannot be reached or rejects the upload. The
            repository is then unchanged.
    """
    check_repo_id(repo_id)
    weights, notes = find_weights(run)
    folder = run_folder(run)
    if not allow_outside:
        _refuse_files_elsewhere(run, folder, weights)
    sources, left_out = weight_files(weights)
    if run.is_dir() and not allow_outside:
        refuse_files_elsewhere(sources.values(), run)
    if left_out:
        notes.append(f"not uploaded, since no pipeline reads them: {', '.join(left_out)}")
    check_tensors(sources)
    stamp = read_stamp(weights)
    config = read_mapping(RunFolder(folder).run_yaml) if folder else {}
    videos = newest_samples(folder, stamp.get("step")) if folder else {}
    if folder and not allow_outside:
        refuse_files_elsewhere(
            [*videos.values(), *(file for video in videos.values() for file in said_of(video))], folder
        )
    samples = tuple(SampleVideo(path, prompt_of(video)) for path, video in videos.items())
    facts = gather_facts(repo_id, weights.kind, weights.path, stamp, config, samples)
    found, remarks = compared(weights, folder)
    notes += remarks
    if found is not None:
        facts = replace(facts, comparison=comparison_section(found))

    endpoint = hub_address()
    url = f"{endpoint}/{repo_id}" + (f"/tree/{revision}" if revision else "")
    with scratch_folder("cogtune-push-") as aside:
        contents: dict[str, Path | bytes] = {"README.md": model_card(facts).encode()}
        if config:
            contents[RUN_NAME] = public_run_yaml(config, facts)
        for path, source in sources.items():
            contents[path] = public_file(source, facts.base_model, aside)
        contents |= videos
        files = tuple(
            (path, len(item) if isinstance(item, bytes) else item.stat().st_size) for path, item in contents.items()
        )
        tell(files)
        if dry_run:
            return PushResult(url, files, None, notes=tuple(notes))
        value, origin = access_token(token)
        commit, removed, said = upload(
            contents,
            Target(repo_id, endpoint, revision, private, message.strip() or MESSAGE, weights.kind),
            value,
            origin,
        )
    return PushResult(url, files, commit, removed, (*notes, *said))


def _refuse_files_elsewhere(run: Path, folder: Path | None, weights: Weights) -> None:
    """Reject a run with links to files elsewhere; a LoRA file that is passed directly may be one."""
    if run.is_dir():
        within = sorted(weights.path.rglob("*")) if weights.path.is_dir() else []
        refuse_files_elsewhere([weights.path, *(path for path in within if path.is_symlink())], run)
    stamp = find_stamp(weights)
    if stamp is not None:
        refuse_files_elsewhere([stamp], stamp.parent)
    if folder is not None:
        refuse_files_elsewhere(links_out(folder), folder)
