"""Talking to the Hub: the login, an upload in one commit, and explained errors."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cogtune.hub.card import Kind
from cogtune.hub.checkpoints import newest_step
from cogtune.hub.local import INDEX_SUFFIX
from cogtune.hub.redaction import redacted
from cogtune.models.configs import COMPONENTS
from cogtune.models.variants import LORA_WEIGHTS_NAME
from cogtune.system import names
from cogtune.system.errors import CogtuneError, UsageError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_AGAIN = (
    "run the same command again to continue: files that are already on the Hub are not sent twice, and the repository "
    "changes only once all of them are there"
)


@dataclass(frozen=True)
class Target:
    """The target of a push."""

    repo_id: str
    endpoint: str
    revision: str | None
    private: bool
    message: str
    kind: Kind | None
    """None for a checkpoint to resume from, which has its branch to itself."""
    step: int = 0
    """The checkpoint's."""


class InterruptedUpload(CogtuneError):
    """An upload that may succeed when it is tried again."""


def check_repo_id(repo_id: str) -> None:
    """Reject anything but the ``user/name`` of a model repository, before anything is read or sent.

    Raises:
        UsageError: ``repo_id`` is not one; the hint says how to write it.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    hint = "write it user/name: letters, digits, '-', '_' and '.', such as anna/paper-boats"
    from_url = re.fullmatch(r"https?://[^/]+/(?:models/)?([^/]+/[^/]+)/?", repo_id)
    if from_url:
        hint = f"write it {from_url[1]}"
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise UsageError(f"'{repo_id}' is not a valid repository name", hint) from None
    if "/" not in repo_id:
        raise UsageError(f"'{repo_id}' has no owner", f"write user/{repo_id}, with your Hub user name")


def hub_address() -> str:
    """Return the address of the Hub, without a slash at its end: HF_ENDPOINT, or else the client's own."""
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def access_token(given: str | None) -> tuple[str, str]:
    """Return the access token and a description of where it comes from.

    Raises:
        CogtuneError: there is none, or it is malformed.
    """
    from huggingface_hub import get_token

    origin = "--token" if given else "HF_TOKEN" if os.environ.get("HF_TOKEN") else "the saved login"
    try:
        token = (given or get_token() or "").strip()
    except Exception as error:  # each way to get a token fails differently, some with network errors
        raise CogtuneError("cannot read the saved login for the Hub", "run `hf auth login`, or pass --token") from error
    if not token:
        raise CogtuneError(
            "you are not logged in to the Hub",
            "run `hf auth login`, set HF_TOKEN, or pass --token; the token needs write access",
        )
    if not re.fullmatch(r"[!-~]+", token):
        raise CogtuneError(f"the token from {origin} contains spaces or invalid characters", "copy it again")
    return token, origin


def upload(
    contents: Mapping[str, Path | bytes], target: Target, token: str, origin: str
) -> tuple[str, tuple[str, ...], list[str]]:
    """Upload everything in one commit; return its hash, the files it deletes, and remarks.

    Raises:
        CogtuneError: the Hub cannot be reached or rejects the upload; the repository is unchanged.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    with _talking(target, token, origin) as (api, caught):
        _make_repository(api, target)
        info = api.model_info(target.repo_id, revision=target.revision)
        there = [file.rfilename for file in info.siblings or ()]
        if target.kind is None:
            _refuse_later_checkpoint(target, there)
        else:
            _check_kind(target, target.kind, there)
        stale = tuple(path for path in there if path not in contents and _replaced_by_a_push(path, target.kind))
        additions = [CommitOperationAdd(path, item) for path, item in contents.items()]
        commit = api.create_commit(
            target.repo_id,
            [*additions, *(CommitOperationDelete(path) for path in stale)],
            commit_message=target.message,
            revision=target.revision,
            parent_commit=info.sha,
        )
        squashed = target.kind is not None or _forget_history(api, target)
    said = [str(item.message) for item in caught if issubclass(item.category, UserWarning)]
    remarks = [redacted(remark, token, (target.repo_id,)) for remark in said]
    if commit.oid == info.sha:
        remarks.append(f"nothing has changed since the last push to {target.repo_id}")
    if not squashed:
        remarks.append(f"earlier checkpoints in {target.repo_id} take up space until the next push")
    return commit.oid, stale, remarks


def make_repository(target: Target, token: str, origin: str) -> None:
    """Create the repository and the branch if they do not exist.

    Raises:
        CogtuneError: as for :func:`upload`.
    """
    with _talking(target, token, origin) as (api, _):
        _make_repository(api, target)


@contextlib.contextmanager
def _talking(target: Target, token: str, origin: str) -> Iterator[tuple[HfApi, list[warnings.WarningMessage]]]:
    """Yield a client and the list of its warnings; explain errors of the Hub and the network."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=target.endpoint, token=token)
    try:
        with warnings.catch_warnings(record=True) as caught, quiet_client():
            warnings.simplefilter("always")
            yield api, caught
    except (OSError, ValueError, RuntimeError, http_error()) as error:
        raise _failure(error, api, target, token, origin) from error


@contextlib.contextmanager
def quiet_client() -> Iterator[None]:
    """Keep huggingface_hub's log lines to itself, since they show signed addresses, and its progress bars too
    where there is no terminal."""
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    chosen = are_progress_bars_disabled() or constants.HF_HUB_DISABLE_PROGRESS_BARS is not None
    hide_bars = not chosen and not sys.stderr.isatty()
    logger.setLevel(logging.ERROR)
    if hide_bars:
        disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if hide_bars:
            enable_progress_bars()


def _make_repository(api: HfApi, target: Target) -> None:
    """Create the repository and the branch if they do not exist.

    Raises:
        CogtuneError: it exists and is public, but a private one was requested.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    there = None
    with contextlib.suppress(RepositoryNotFoundError):
        there = api.model_info(target.repo_id)
    if there is None:
        api.create_repo(target.repo_id, private=True if target.private else None)
    elif target.private and not there.private:
        raise CogtuneError(
            f"{target.repo_id} already exists and is public; --private does not change that",
            f"make it private at {target.endpoint}/{target.repo_id}/settings, or push to another repository",
        )
    if target.revision not in (None, "main"):
        api.create_branch(target.repo_id, branch=str(target.revision), exist_ok=True)


def _check_kind(target: Target, pushed: Kind, there: list[str]) -> None:
    """Reject mixing weights of two kinds in one repository."""
    marks: list[tuple[Kind, str, str]] = [
        ("pipeline", "model_index.json", "a whole pipeline"),
        ("transformer", "transformer/config.json", "a transformer"),
        ("lora", LORA_WEIGHTS_NAME, "a LoRA"),
    ]
    words = {kind: name for kind, _, name in marks}
    for kind, mark, name in marks:
        if mark in there:
            if kind != pushed:
                raise CogtuneError(
                    f"{target.repo_id} contains {name}, but this is {words[pushed]}",
                    "push it to another repository",
                )
            return


def _refuse_later_checkpoint(target: Target, there: list[str]) -> None:
    """Reject replacing a checkpoint by an earlier one: it may be all that a lost machine left."""
    newest = newest_step(there)
    if newest is not None and newest > target.step:
        raise CogtuneError(
            f"{target.repo_id} contains a checkpoint of step {newest}, later than this one of step {target.step}",
            f"continue it with `cogtune train --resume {target.repo_id}`, or push to another repository",
        )


def _forget_history(api: HfApi, target: Target) -> bool:
    """Drop the commits with earlier checkpoints, which would fill the repository; return whether that succeeded."""
    try:
        api.super_squash_history(target.repo_id, branch=target.revision, commit_message=target.message)
    except (OSError, ValueError, RuntimeError, http_error()):
        return False
    return True


def _replaced_by_a_push(path: str, kind: Kind | None) -> bool:
    """Return whether a file's name may change from push to push: sample videos and shards.

    A checkpoint replaces everything on its branch.
    """
    if kind is None:
        return path != ".gitattributes"
    folder, _, name = path.partition("/")
    if folder == names.SAMPLES:
        return name.endswith(".mp4")
    return folder in COMPONENTS and name.endswith((".safetensors", INDEX_SUFFIX))


def http_error() -> type[Exception]:
    """Return the base class of the HTTP library's errors: httpx for huggingface_hub 1, httpx2 for 2."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(base for base in HfHubHTTPError.__bases__ if base.__name__ == "HTTPError")


def _failure(error: BaseException, api: HfApi, target: Target, token: str, origin: str) -> CogtuneError:
    """Explain an error of the Hub or the network, without the token."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    if any(isinstance(item, OfflineModeIsEnabled) for item in chain):
        return CogtuneError(
            "cannot push: offline mode is on",
            "unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE, then run the command again",
        )
    known = (target.repo_id, target.endpoint)
    refusal = next((item for item in chain if isinstance(item, HfHubHTTPError)), None)
    if refusal is not None:
        told = redacted(refusal.server_message or "", token, known).strip()
        return _refusal(refusal.response.status_code, told, api, target, origin)
    if type(error).__name__ == "ConnectError":
        return InterruptedUpload(f"cannot reach {target.endpoint}", f"check your network connection, then {_AGAIN}")
    reason = next((line for item in reversed(chain) for line in str(item).splitlines() if line), "")
    details = [redacted(reason, token, known)] if reason else []
    return InterruptedUpload(f"the upload to {target.repo_id} was interrupted", _AGAIN, details=details)


def _refusal(status: int, told: str, api: HfApi, target: Target, origin: str) -> CogtuneError:
    details = told.splitlines()
    if status == 401:
        return CogtuneError(
            f"the Hub rejected the token from {origin}",
            "create one with write access at https://huggingface.co/settings/tokens, then run `hf auth login`",
            details=details,
        )
    if status == 403:
        return CogtuneError(
            f"the token from {origin} does not have write access to {target.repo_id}",
            "use a token with write access, and a repository of your own account or organisation",
            details=[*details, *_whose_token(api)],
        )
    if status in (404, 409):
        other = _other_type(api, target.repo_id)
        if other:
            return CogtuneError(f"{target.repo_id} already exists as a {other}", "push to another repository")
    if status == 412:
        return InterruptedUpload(f"someone else changed {target.repo_id} during the upload", _AGAIN, details=details)
    if status == 400:
        return CogtuneError(
            f"the Hub rejected the upload to {target.repo_id}", "nothing was changed there", details=details
        )
    kind = InterruptedUpload if status in (408, 429) or status >= 500 else CogtuneError
    return kind(f"the upload to {target.repo_id} failed with status {status}", _AGAIN, details=details)


def _whose_token(api: HfApi) -> list[str]:
    try:
        me = api.whoami()
    except (OSError, http_error()):
        return []
    organisations = ", ".join(str(item.get("name")) for item in me.get("orgs", ())) or "none"
    said = f"the token belongs to {me.get('name')} (organisations: {organisations})"
    return [redacted(said, api.token if isinstance(api.token, str) else "")]


def _other_type(api: HfApi, repo_id: str) -> str | None:
    for kind in ("dataset", "space"):
        with contextlib.suppress(OSError, http_error()):
            api.repo_info(repo_id, repo_type=kind)
            return kind
    return None
