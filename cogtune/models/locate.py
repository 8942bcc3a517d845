"""From what the user calls a model to a folder on disk. Imports nothing heavy until it has to."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from cogtune.models.checkpoint_configs import ModelSpec, published_spec, read_spec
from cogtune.models.download import cached_file, snapshot
from cogtune.models.nano_models import nano_model
from cogtune.models.sat import refuse_sat
from cogtune.models.tiny_models import tiny_model
from cogtune.models.variants import VARIANTS, BuiltInKind, Variant, built_in, published
from cogtune.system.errors import CogtuneError, UsageError, did_you_mean, said_by
from cogtune.system.files import special_files
from cogtune.system.reading import refuse

_CONFIGS = ("model_index.json", "*/*.json")
_WEIGHTS = (*_CONFIGS, "*/*.safetensors", "*/*.model", "*/*.txt", "LICENSE*")

_BUILT_IN: dict[BuiltInKind, Callable[[str], Path]] = {"tiny": tiny_model, "nano": nano_model}
"""What returns the folder of a built-in model by the name of its variant."""


def locate(reference: str, *, weights: bool = True) -> Path:
    """Return the local folder of a model, downloaded or made first when it is not there.

    Args:
        reference: a variant's short name, a Hub id, a local folder, ``tiny:VARIANT`` or ``nano:VARIANT``.
        weights: False to fetch only the config files, which is quick.

    Raises:
        UsageError: the reference is none of these.
        CogtuneError: the download failed, a built-in model cannot be made, or it is a checkpoint of CogVideo's SAT.
    """
    folder = Path(reference).expanduser()
    if folder.exists() and not (folder / "model_index.json").is_file():
        refuse_sat(folder)
    if folder.is_dir():
        return folder.absolute()
    if folder.is_file():
        raise UsageError(f"--model {reference} is a file, not a folder", _in_place_of(folder))
    if (asked := built_in(reference)) is not None:
        return _BUILT_IN[asked.kind](asked.name)
    if (row := published(reference)) is not None:
        reference = hub_id_here(row)
    if reference.count("/") != 1 or reference.startswith((".", "/", "~")):
        raise UsageError(
            f"unknown model '{reference}'{did_you_mean(reference, VARIANTS)}",
            f"pass an existing folder, a Hub id such as THUDM/CogVideoX-5b, or one of {', '.join(VARIANTS)}",
        )
    return snapshot(
        reference,
        "model",
        patterns=_WEIGHTS if weights else _CONFIGS,
        otherwise="check your network connection, or pass a local folder as --model; tiny:2b needs no download",
    )


def hub_id_here(row: Variant) -> str:
    """Return the Hub id of a published model under which it is on this machine, its first one where it is under none.

    A copy with weights is preferred to one of the configs alone.
    """
    weights = "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors.index.json"
    for name in (*reversed(weights), "model_index.json"):
        for repo_id in row.hub_ids:
            if cached_file(repo_id, name) is not None:
                return repo_id
    return row.hub_id


def spec_of(model: str) -> ModelSpec:
    """Return what the configs of a model say; those of a published one need not be on this machine.

    Raises:
        CogtuneError: there is no such model.
    """
    row = published(model)
    if row is None or Path(model).is_dir() or built_in(model) is not None:
        return read_spec(locate(model, weights=False))
    return published_spec(row)


@contextlib.contextmanager
def loading(folder: Path) -> Iterator[None]:
    """Report errors of a library that loads from ``folder`` as damage to it.

    Raises:
        CogtuneError: in place of the library's own error.
    """
    refuse(special_files(folder), "fetch, copy or merge it again")
    torch = sys.modules.get("torch")
    dtype = torch.get_default_dtype() if torch is not None else None
    try:
        yield
    except (CogtuneError, MemoryError):
        raise
    except Exception as error:  # of a damaged file, a library says whatever it stumbles over
        if "out of memory" in str(error):
            raise
        raise CogtuneError(
            f"cannot load {folder}: {said_by(error)}",
            "a file in it is damaged or missing; download, copy or merge it again",
        ) from error
    finally:
        if torch is not None:
            torch.set_default_dtype(dtype)  # diffusers leaves it as it was needed when a config cannot be used


_AS_LORA = "pass a LoRA as --lora to `cogtune infer` or as --init-lora to `cogtune train`, and its base as --model"
_AS_TRANSFORMER = (
    "put a transformer's weights, by diffusers' names, into a copy of its base model's folder, as "
    "transformer/diffusion_pytorch_model.safetensors, and pass that folder"
)


def _in_place_of(file: Path) -> str:
    """Return the hint about a file that was given as a model: by the names of its tensors, if it is of safetensors."""
    with file.open("rb") as opened:
        start = opened.read(8)
        if start.startswith(b"GGUF"):
            return "GGUF files are not supported; use the model as diffusers' folder of safetensors files"
        length = int.from_bytes(start, "little")
        head = opened.read(min(length, _MOST_HEADER))
    if not head.startswith(b"{"):
        return _AS_LORA
    return _AS_LORA if b"lora" in head else _AS_TRANSFORMER


_MOST_HEADER = 100_000_000
"""Longest header of a safetensors file, as that library limits it."""
