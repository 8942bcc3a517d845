"""What comes from the Hugging Face Hub, and where cogtune keeps what it fetched or made for later."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from cogtune.system.errors import CogtuneError
from cogtune.system.files import PARTIAL_SUFFIX, os_errors_explained
from cogtune.system.scratch import scratch_folder


def home() -> Path:
    """Return cogtune's own folder for what can be fetched or made again: ``$COGTUNE_HOME``, else
    ``~/.cache/cogtune``."""
    return Path(os.environ.get("COGTUNE_HOME") or Path.home() / ".cache" / "cogtune")


def made_once(kind: str, name: str, write: Callable[[Path], object]) -> Path:
    """Return the folder ``KIND/NAME`` in :func:`home`, made by ``write`` at the first call.

    Several processes may ask at once: each makes its own, the first to finish gives it its name, and the others take
    that one.

    Args:
        name: one that changes with what is written.
        write: writes the folder that it is given, which does not exist yet.

    Raises:
        CogtuneError: the folder cannot be written.
    """
    target = home().absolute() / kind / name
    if target.is_dir():
        return target
    with os_errors_explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(f".{name}.", target.parent, PARTIAL_SUFFIX) as own:
            made = own / name
            write(made)
            try:
                made.rename(target)
            except OSError:
                if not target.is_dir():  # else another process was faster, and its files are the same
                    raise
    return target


def cached_file(repo_id: str, name: str) -> Path | None:
    """Return a file of a model in the Hub's cache on this machine; None where it is not there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repo_id, name)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def snapshot(
    repo_id: str,
    kind: Literal["model", "dataset"],
    *,
    otherwise: str,
    patterns: Sequence[str] | None = None,
    folder: Path | None = None,
) -> Path:
    """Return the local folder of a repository on the Hub, downloaded as far as it is not here.

    Args:
        otherwise: hint for a failed download.
        patterns: which files, all when None.
        folder: where to put plain files; the Hub's own cache, which is of links, when None.

    Raises:
        CogtuneError: the Hub has no such repository, will not show it, or cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                repo_id, repo_type=kind, allow_patterns=list(patterns) if patterns else None, local_dir=folder
            )
        )
    except GatedRepoError as error:
        place = repo_id if kind == "model" else f"datasets/{repo_id}"
        raise CogtuneError(
            f"the {kind} {repo_id} is gated on the Hub",
            f"accept its terms at https://huggingface.co/{place}, then run `hf auth login`",
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CogtuneError(
            f"{kind} {repo_id} does not exist on the Hub, or you do not have access to it",
            "check the spelling; if it is private, run `hf auth login`",
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise CogtuneError(f"cannot download the {kind} {repo_id}: {str(error).splitlines()[0]}", otherwise) from error
