"""Publishing a run on the Hugging Face Hub: weights, a model card and sample videos, in one commit."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogtune.card import CardFacts, Kind, SampleVideo, gather_facts, model_card
from cogtune.checkpoints import STATE_NAME, checkpoints
from cogtune.config import read_mapping
from cogtune.errors import CogtuneError, UsageError
from cogtune.files import explained, read_json
from cogtune.models import LORA_WEIGHTS_NAME

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MESSAGE = "Upload with cogtune"
"""The commit's title when none is given."""

_COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
_COMPONENT_SUFFIXES = (".json", ".safetensors", ".model", ".txt")
_INDEX_SUFFIX = ".safetensors.index.json"

_AGAIN = (
    "run the same command again: what is already on the Hub is not sent twice, and the repository changes "
    "only when everything is there"
)

_SECRET_KEY = re.compile(
    r"(^|_)(token|secret|password|passwd|credentials?|api_?key|access_?key|private_?key)s?(_|$)",
    re.IGNORECASE,
)
_NO_SECRETS = {"id_token"}
"""Keys that sound like a secret and are none: this one is a word of the captions."""

_PRIVATE_TEXT = re.compile(
    r"""(?:^|[\s=:,;"'(\[])(?:~?/[^\s/]|[A-Za-z]:[\\/]|\\\\|file://)"""  # a path of this machine
    r"|://[^/\s]*@"  # a URL with a password
    r"|\b(?:hf|api_org|gh[pousr])_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{16,}"  # access tokens, by their form
)


@dataclass(frozen=True)
class PushResult:
    """What was published, or would be."""

    url: str
    files: tuple[tuple[str, int], ...]
    """Path in the repository and size in bytes of each file."""
    commit: str | None
    """The commit's hash; None for a dry run."""
    removed: tuple[str, ...] = ()
    """Files of an earlier push that this one replaces by others."""
    notes: tuple[str, ...] = ()
    """What the user should be told: a checkpoint chosen, nothing changed, a remark of the Hub."""


@dataclass(frozen=True)
class _Weights:
    kind: Kind
    path: Path
    """The LoRA file, or the folder of the transformer or the pipeline."""


def push(
    run: Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    message: str = MESSAGE,
    dry_run: bool = False,
) -> PushResult:
    """Publish weights, model card, cleaned ``run.yaml`` and sample videos in one commit.

    Args:
        run: a run's folder, one of its checkpoints, a merged folder, or a LoRA file.
        repo_id: ``user/name``; made when it is not there.
        private: make a new repository private; a public one that exists is refused.
        token: access token; by default HF_TOKEN or the saved login.
        revision: branch to commit to, made when it is not there; by default main.
        message: title of the commit.
        dry_run: check and list everything, and touch no network.

    Raises:
        UsageError: ``repo_id`` is not one.
        CogtuneError: there are no whole weights in ``run``, or the Hub cannot be reached or refuses. The
            repository then holds what it held before.
    """
    from huggingface_hub import constants

    _check_repo_id(repo_id)
    weights, notes = _find_weights(run)
    sources = _weight_files(weights)
    _check_tensors(sources)
    stamp = _stamp(weights)
    folder = _run_folder(run)
    config = read_mapping(folder / "run.yaml") if folder else {}
    videos = _newest_samples(folder, stamp.get("step")) if folder else {}
    samples = tuple(SampleVideo(path, _prompt(video)) for path, video in videos.items())
    facts = gather_facts(repo_id, weights.kind, weights.path, stamp, config, samples)

    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    url = f"{endpoint}/{repo_id}" + (f"/tree/{revision}" if revision else "")
    with tempfile.TemporaryDirectory(prefix="cogtune-push-") as aside:
        contents: dict[str, Path | bytes] = {"README.md": model_card(facts).encode()}
        if config:
            contents["run.yaml"] = _public_run_yaml(config, facts)
        for path, source in sources.items():
            contents[path] = _public_file(source, facts.base_model, Path(aside))
        contents |= videos
        files = tuple(
            (path, len(item) if isinstance(item, bytes) else item.stat().st_size) for path, item in contents.items()
        )
        if dry_run:
            return PushResult(url, files, None, notes=tuple(notes))
        value, origin = _token(token)
        commit, removed, remarks = _upload(
            contents,
            _Target(repo_id, endpoint, revision, private, message.strip() or MESSAGE, weights.kind),
            value,
            origin,
        )
    return PushResult(url, files, commit, removed, (*notes, *remarks))


def _check_repo_id(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    hint = "write it user/name: letters, digits, '-', '_' and '.', such as anna/paper-boats"
    from_url = re.fullmatch(r"https?://[^/]+/(?:models/)?([^/]+/[^/]+)/?", repo_id)
    if from_url:
        hint = f"write it {from_url[1]}"
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise UsageError(f"'{repo_id}' is not the name of a model repository", hint) from None
    if "/" not in repo_id:
        raise UsageError(f"'{repo_id}' names no owner", f"write user/{repo_id}, with your own name on the Hub for user")


def _find_weights(run: Path) -> tuple[_Weights, list[str]]:
    if run.is_file():
        if run.suffix != ".safetensors":
            raise CogtuneError(f"{run} is not a .safetensors file", "give a LoRA file, a run's folder or a checkpoint")
        return _Weights("lora", run), []
    if not run.exists():
        raise CogtuneError(f"there is no {run}", "give the --output folder of a training run, such as out/")
    found = _weights_in(run)
    if found:
        return found, []
    newest_first = checkpoints(run)[::-1]
    for checkpoint in newest_first:
        found = _weights_in(checkpoint)
        if found:
            note = f"{run} has no final weights: pushing its newest checkpoint, {checkpoint.name}"
            return found, [note]
    for sharded in (run, *newest_first):
        if (sharded / "latest").is_file():  # what DeepSpeed leaves in a folder of shards
            raise CogtuneError(
                f"{sharded} holds only the ranks' shards of the weights",
                f"`cogtune merge-zero {sharded}`, then push the folder it makes",
            )
    raise CogtuneError(
        f"there is nothing to push in {run}",
        "give a run that has reached its first checkpoint, a merged folder, or a LoRA file",
        details=[
            f"no {LORA_WEIGHTS_NAME} (a LoRA)",
            "no transformer/config.json with transformer/*.safetensors (a full fine-tune)",
            "no model_index.json (a merged pipeline)",
            "no checkpoint-N with any of these",
        ],
    )


def _weights_in(folder: Path) -> _Weights | None:
    if (folder / "model_index.json").is_file():
        return _Weights("pipeline", folder)
    if (folder / LORA_WEIGHTS_NAME).is_file():
        return _Weights("lora", folder / LORA_WEIGHTS_NAME)
    for place in (folder / "transformer", folder):
        if (place / "config.json").is_file() and any(place.glob("*.safetensors")):
            return _Weights("transformer", place)
    return None


def _weight_files(weights: _Weights) -> dict[str, Path]:
    """Path in the repository and on disk of every file that belongs to the weights.

    Raises:
        CogtuneError: a component or a shard is missing; all that are missing are named.
    """
    if weights.kind == "lora":
        return {LORA_WEIGHTS_NAME: weights.path}
    problems: list[str] = []
    if weights.kind == "transformer":
        files = _component("transformer", weights.path, problems, (".safetensors", _INDEX_SUFFIX))
        files["transformer/config.json"] = weights.path / "config.json"
    else:
        files = {"model_index.json": weights.path / "model_index.json"}
        for name, value in read_json(files["model_index.json"]).items():
            if not isinstance(value, list) or value[0] is None:
                continue
            folder = weights.path / name
            found = _component(name, folder, problems, _COMPONENT_SUFFIXES) if folder.is_dir() else {}
            if not found:
                problems.append(f"{name}/ is missing or empty, and model_index.json names it")
            files |= found
    if problems:
        raise CogtuneError(f"the weights in {weights.path} are not complete", "make the folder again", details=problems)
    return files


def _component(name: str, folder: Path, problems: list[str], suffixes: tuple[str, ...]) -> dict[str, Path]:
    files = {
        f"{name}/{path.name}": path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name.endswith(suffixes) and not path.name.startswith(".")
    }
    for index in [path for path in files.values() if path.name.endswith(_INDEX_SUFFIX)]:
        shards = set(read_json(index).get("weight_map", {}).values())
        problems += [
            f"{name}/{shard} is missing, and {index.name} names it"
            for shard in sorted(shards)
            if f"{name}/{shard}" not in files
        ]
    return files


def _check_tensors(files: Mapping[str, Path]) -> None:
    """Refuse weights that no one could load, by their files' headers alone.

    Raises:
        CogtuneError: a file is damaged, a tensor is empty, or a LoRA holds no adapter.
    """
    from safetensors import SafetensorError, safe_open

    problems = []
    for name, path in files.items():
        if path.suffix != ".safetensors":
            continue
        try:
            with explained(path, "read"), safe_open(path, framework="numpy") as handle:
                shapes = {key: handle.get_slice(key).get_shape() for key in handle.keys()}  # noqa: SIM118 (not a mapping)
        except SafetensorError as error:
            problems.append(f"{name} is damaged or cut short: {error}")
            continue
        if not shapes:
            problems.append(f"{name} holds no tensors")
        elif name == LORA_WEIGHTS_NAME and not any(".lora_A." in key for key in shapes):
            problems.append(f"{path} holds no LoRA adapter")
        problems += [f"{name}: {key} is empty, of shape {shape}" for key, shape in shapes.items() if 0 in shape]
    if problems:
        raise CogtuneError(
            "these weights cannot be used, and are not pushed",
            "push an earlier checkpoint, or save again; an empty tensor was not gathered from its ranks",
            details=problems,
        )


def _run_folder(run: Path) -> Path | None:
    """The folder of the run that the weights come from: the given one, or the one it lies in."""
    place = run.absolute() if run.is_dir() else run.absolute().parent
    if (place / "run.yaml").is_file():
        return place
    if (place.parent / "run.yaml").is_file() and (place.parent / "launch").is_dir():
        return place.parent
    return None


def _newest_samples(run: Path, step: int | None) -> dict[str, Path]:
    """The videos of the newest ``samples/step-N`` up to ``step``, by their path in the repository.

    Where there are no such folders, those in ``samples/``.
    """
    folder = run / "samples"
    by_step = {int(path.name[5:]): path for path in folder.glob("step-*") if path.name[5:].isdigit()}
    if by_step:
        reached = [number for number in by_step if step is None or number <= step]
        if not reached:
            return {}
        folder = by_step[max(reached)]
    videos = sorted(path for path in folder.rglob("*.mp4") if not path.name.startswith("."))
    return {path.relative_to(run).as_posix(): path for path in videos}


def _prompt(video: Path) -> str | None:
    """The prompt beside a video: ``boat.txt`` for ``boat.mp4``, as in a dataset."""
    beside = video.with_suffix(".txt")
    return beside.read_text(encoding="utf-8", errors="replace").strip() or None if beside.is_file() else None


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as handle:
        return dict(handle.metadata() or {})


def _stamp(weights: _Weights) -> dict[str, Any]:
    """What cogtune wrote about the run beside or inside the weights; empty when another program made them."""
    if weights.kind == "lora":
        return _as_mapping(_metadata(weights.path).get("cogtune", "")) or {}
    state, merged = weights.path.parent / STATE_NAME, weights.path / "merge.json"
    if weights.kind == "transformer" and state.is_file():
        return dict(read_json(state))
    if merged.is_file():
        record = read_json(merged)
        return {"step": record.get("step"), "version": record.get("cogtune")}
    return {}


def _as_mapping(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _is_private(key: str, value: Any) -> bool:
    if _SECRET_KEY.search(key) and key not in _NO_SECRETS:
        return True
    return isinstance(value, str) and bool(_PRIVATE_TEXT.search(value))


def _public(value: Any) -> Any:
    """``value`` without the entries that are secrets or paths of this machine."""
    if isinstance(value, Mapping):
        return {key: _public(item) for key, item in value.items() if not _is_private(str(key), item)}
    if isinstance(value, list):
        return [_public(item) for item in value if not _is_private("", item)]
    return value


def _public_run_yaml(config: Mapping[str, Any], facts: CardFacts) -> bytes:
    import yaml

    public = _public(config)
    if "model" in config and "model" not in public:
        public["model"] = facts.base_model or facts.variant.name
    header = "# The resolved configuration of this run, without paths of the machine it ran on.\n"
    return (header + yaml.safe_dump(public, sort_keys=False, allow_unicode=True)).encode()


def _public_file(source: Path, base_model: str | None, aside: Path) -> Path | bytes:
    """``source``, or a version without the secrets and local paths in its settings or its header."""
    if source.name == "model_index.json" or source.name.endswith("config.json"):
        config = read_json(source)
        public = {key: value for key, value in config.items() if not _is_private("", value)}
        return source if public == config else json.dumps(public, indent=2).encode() + b"\n"
    if source.suffix == ".safetensors":
        metadata = _metadata(source)
        cleaned = _public_metadata(metadata, base_model)
        if cleaned != metadata:
            target = aside / f"{len(list(aside.iterdir()))}.safetensors"
            _copy_with_metadata(source, target, cleaned)
            return target
    return source


def _public_metadata(metadata: Mapping[str, str], base_model: str | None) -> dict[str, str]:
    cleaned = {}
    for key, text in metadata.items():
        value = _as_mapping(text)
        if value is None:
            if not _is_private(key, text):
                cleaned[key] = text
            continue
        public = _public(value)
        if "base_model" in value and "base_model" not in public and base_model is not None:
            public["base_model"] = base_model
        cleaned[key] = text if public == value else json.dumps(public)
    return cleaned


def _copy_with_metadata(source: Path, target: Path, metadata: Mapping[str, str]) -> None:
    """Copy a safetensors file with other metadata in its header; the tensors' bytes stay as they are.

    The format: eight bytes of header length, the header as JSON, the data
    (https://github.com/huggingface/safetensors#format).
    """
    with explained(source, "copy"), source.open("rb") as old, target.open("wb") as new:
        header = json.loads(old.read(int.from_bytes(old.read(8), "little")))
        order = header["__metadata__"]  # safetensors itself gives them in a new order each time
        header["__metadata__"] = {key: metadata[key] for key in order if key in metadata}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        new.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(old, new, 1 << 20)


def _token(given: str | None) -> tuple[str, str]:
    """The access token, and in words where it comes from.

    Raises:
        CogtuneError: there is none, or it cannot be one.
    """
    from huggingface_hub import get_token

    origin = "--token" if given else "HF_TOKEN" if os.environ.get("HF_TOKEN") else "the saved login"
    try:
        token = (given or get_token() or "").strip()
    except Exception as error:  # every way to get a token fails in its own way, some with the network
        raise CogtuneError("the login for the Hub could not be read", "`hf auth login`, or give --token") from error
    if not token:
        raise CogtuneError(
            "you are not logged in to the Hub",
            "`hf auth login`, or set HF_TOKEN, or give --token; it needs write access",
        )
    if not re.fullmatch(r"[!-~]+", token):
        raise CogtuneError(f"the token from {origin} has blanks or odd characters in it", "copy it again")
    return token, origin


@dataclass(frozen=True)
class _Target:
    repo_id: str
    endpoint: str
    revision: str | None
    private: bool
    message: str
    kind: Kind


def _upload(
    contents: Mapping[str, Path | bytes], target: _Target, token: str, origin: str
) -> tuple[str, tuple[str, ...], list[str]]:
    """Send everything and commit once; the commit's hash, the files it removes, and remarks.

    Raises:
        CogtuneError: the Hub cannot be reached or refuses; the repository is as it was.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(endpoint=target.endpoint, token=token)
    try:
        with warnings.catch_warnings(record=True) as caught, _quiet_client():
            warnings.simplefilter("always")
            _make_repository(api, target)
            info = api.model_info(target.repo_id, revision=target.revision)
            there = [file.rfilename for file in info.siblings or ()]
            _check_kind(target, there)
            stale = tuple(path for path in there if path not in contents and _replaced_by_a_push(path))
            additions = [CommitOperationAdd(path, item) for path, item in contents.items()]
            commit = api.create_commit(
                target.repo_id,
                [*additions, *(CommitOperationDelete(path) for path in stale)],
                commit_message=target.message,
                revision=target.revision,
                parent_commit=info.sha,
            )
    except (OSError, ValueError, RuntimeError, _http_error()) as error:
        raise _failure(error, api, target, token, origin) from error
    remarks = [str(item.message) for item in caught if issubclass(item.category, UserWarning)]
    if commit.oid == info.sha:
        remarks.append(f"nothing has changed since the last push to {target.repo_id}")
    return commit.oid, stale, remarks


@contextlib.contextmanager
def _quiet_client() -> Iterator[None]:
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


def _make_repository(api: HfApi, target: _Target) -> None:
    """Create the repository and the branch where they are not there yet.

    Raises:
        CogtuneError: it is there and public, and a private one was asked for.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    there = None
    with contextlib.suppress(RepositoryNotFoundError):
        there = api.model_info(target.repo_id)
    if there is None:
        api.create_repo(target.repo_id, private=True if target.private else None)
    elif target.private and not there.private:
        raise CogtuneError(
            f"{target.repo_id} is there already and is public: --private does not change it",
            f"make it private at {target.endpoint}/{target.repo_id}/settings, or push to another name",
        )
    if target.revision not in (None, "main"):
        api.create_branch(target.repo_id, branch=str(target.revision), exist_ok=True)


def _check_kind(target: _Target, there: list[str]) -> None:
    """Refuse to mix weights of two kinds in one repository."""
    marks: list[tuple[Kind, str, str]] = [
        ("pipeline", "model_index.json", "a whole pipeline"),
        ("transformer", "transformer/config.json", "a transformer"),
        ("lora", LORA_WEIGHTS_NAME, "a LoRA"),
    ]
    words = {kind: name for kind, _, name in marks}
    for kind, mark, name in marks:
        if mark in there:
            if kind != target.kind:
                raise CogtuneError(
                    f"{target.repo_id} holds {name}, and this is {words[target.kind]}",
                    "push it to a name of its own",
                )
            return


def _replaced_by_a_push(path: str) -> bool:
    """Whether a file is of the kinds whose names change from push to push: sample videos and shards."""
    folder, _, name = path.partition("/")
    if folder == "samples":
        return name.endswith(".mp4")
    return folder in _COMPONENTS and name.endswith((".safetensors", _INDEX_SUFFIX))


def _http_error() -> type[Exception]:
    """The base of what the HTTP library raises: httpx under huggingface_hub 1, httpx2 under 2."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(base for base in HfHubHTTPError.__bases__ if base.__name__ == "HTTPError")


def _failure(error: BaseException, api: HfApi, target: _Target, token: str, origin: str) -> CogtuneError:
    """What went wrong between here and the Hub, in words and without the token."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    if any(isinstance(item, OfflineModeIsEnabled) for item in chain):
        return CogtuneError(
            "cannot push: offline mode is on",
            "unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE, then run it again",
        )
    refusal = next((item for item in chain if isinstance(item, HfHubHTTPError)), None)
    if refusal is not None:
        told = (refusal.server_message or "").replace(token, "***").strip()
        return _refusal(refusal.response.status_code, told, api, target, origin)
    if type(error).__name__ == "ConnectError":
        return CogtuneError(f"cannot reach {target.endpoint}", f"check the network, then {_AGAIN}")
    reason = next((line for item in reversed(chain) for line in str(item).splitlines() if line), "")
    details = [reason.replace(token, "***")] if reason else []
    return CogtuneError(f"the upload to {target.repo_id} broke off", _AGAIN, details=details)


def _refusal(status: int, told: str, api: HfApi, target: _Target, origin: str) -> CogtuneError:
    details = told.splitlines()
    if status == 401:
        return CogtuneError(
            f"the Hub does not accept the token from {origin}",
            "make one with write access at https://huggingface.co/settings/tokens, then `hf auth login`",
            details=details,
        )
    if status == 403:
        return CogtuneError(
            f"the token from {origin} may not write to {target.repo_id}",
            "use a token with write access, and a name under your own account or organisation",
            details=[*details, *_whose_token(api)],
        )
    if status in (404, 409):
        other = _other_type(api, target.repo_id)
        if other:
            return CogtuneError(f"{target.repo_id} is there already, as a {other}", "push to another name")
    if status == 412:
        return CogtuneError(f"someone else changed {target.repo_id} during the upload", _AGAIN, details=details)
    if status == 400:
        return CogtuneError(
            f"the Hub refuses the upload to {target.repo_id}", "nothing was changed there", details=details
        )
    return CogtuneError(f"the Hub answered {status} to the upload to {target.repo_id}", _AGAIN, details=details)


def _whose_token(api: HfApi) -> list[str]:
    try:
        me = api.whoami()
    except (OSError, _http_error()):
        return []
    organisations = ", ".join(item["name"] for item in me.get("orgs", ())) or "none"
    return [f"the token is that of {me['name']} (organisations: {organisations})"]


def _other_type(api: HfApi, repo_id: str) -> str | None:
    for kind in ("dataset", "space"):
        with contextlib.suppress(OSError, _http_error()):
            api.repo_info(repo_id, repo_type=kind)
            return kind
    return None
