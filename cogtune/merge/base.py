"""The model that was fine-tuned: its configuration, its keys and shapes, the pipeline around it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors import SafetensorError, safe_open

from cogtune.merge.sources import LoadedSource
from cogtune.models.configs import TransformerConfig
from cogtune.system.containment import leads_out, refuse_links
from cogtune.system.errors import CogtuneError
from cogtune.system.files import special_files
from cogtune.system.reading import problems_in, read_object, refuse


@dataclass(frozen=True)
class Base:
    """The model that was fine-tuned: its transformer's folder, and the pipeline around it if any."""

    transformer: Path
    pipeline: Path | None


def find_base(given: Path | None, state: Mapping[str, Any], *, needed: bool) -> Base | None:
    """Return the base model; None when a LoRA's cannot be found, which then is not compared with it."""
    hint = "pass the base model as --model: the folder with model_index.json, or its transformer/"
    named = state.get("model_path")
    path = given or (Path(named) if isinstance(named, str) and named else None)
    if path is None:
        if needed:
            raise CogtuneError("the checkpoint does not record its base model", hint)
        return None
    base = Base(path / "transformer", path) if (path / "model_index.json").is_file() else Base(path, None)
    config = base.transformer / "config.json"
    if not config.is_file():
        if given is None and not needed:
            return None
        raise CogtuneError(f"no base model in {path}", hint)
    if read_object(config).get("_class_name") != CogVideoXTransformer3DModel.__name__:
        raise CogtuneError(f"{config} is not a CogVideoX transformer's config", hint)
    return base


def expected_shapes(transformer: Path) -> dict[str, tuple[int, ...]]:
    """Return every key that the model of this configuration loads, and its shape. Makes no weights.

    Raises:
        CogtuneError: the configuration is damaged.
    """
    path = transformer / "config.json"
    config = read_object(path)
    problems = problems_in(config, TransformerConfig)
    if problems:
        raise CogtuneError(f"no transformer can be made from {path}", "restore the file", details=problems)
    try:
        with torch.device("meta"):
            model = CogVideoXTransformer3DModel.from_config(config)
    except (AttributeError, ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise CogtuneError(f"no transformer can be made from {path}: {error}", "restore the file") from error
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


_OF_HUB = "snapshots"
"""Folder of the Hub's cache whose files are links to others beside it."""

_WEIGHTS = "diffusion_pytorch_model.safetensors"


def stored_weights(transformer: Path) -> dict[str, LoadedSource]:
    """Return every tensor of a transformer by its key; none where its weights are not on this machine. Reads no values.

    Raises:
        CogtuneError: a file is damaged.
    """
    index = transformer / f"{_WEIGHTS}.index.json"
    names = {_WEIGHTS}
    if index.is_file():
        named = read_object(index).get("weight_map")
        names = {name for name in named.values() if isinstance(name, str)} if isinstance(named, dict) else set()
    found = {}
    for path in (transformer / name for name in sorted(names) if name == Path(name).name):
        if not path.is_file():
            continue
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (not a mapping)
                    part = file.get_slice(key)
                    shape, dtype = tuple(part.get_shape()), _DTYPES.get(part.get_dtype())
                    if dtype is not None:
                        found[key] = LoadedSource(shape, dtype, partial(_tensor_in, path, key), [])
        except (OSError, SafetensorError) as error:
            raise CogtuneError(f"{path} is damaged: {error}", "copy or download the base model again") from error
    return found


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _tensor_in(path: Path, key: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(key)
    return tensor


def other_components(pipeline: Path) -> tuple[list[Path], list[str]]:
    """Return the folders beside ``transformer`` that the pipeline is made of, and what is missing of them here."""
    index = read_object(pipeline / "model_index.json")
    # an entry of two nulls is a component that the pipeline can do without, and does
    present = [name for name, value in index.items() if isinstance(value, list) and value and value[0]]
    if outside := [name for name in present if name != Path(name).name]:
        raise CogtuneError(f"{pipeline / 'model_index.json'} names {outside[0]!r}, which is not a folder next to it")
    folders = [pipeline / name for name in present if name != "transformer"]
    missing = [f"{folder.name}/" for folder in folders if not folder.is_dir()]
    # models have a config.json, the scheduler and the tokenizer files of other names
    models = [folder for folder in folders if (folder / "config.json").is_file()]
    missing += [
        f"the weights in {folder.name}/"
        for folder in models
        if not any((*folder.glob("*.safetensors"), *folder.glob("*.bin")))
    ]
    return folders, missing


def add_base_files(found: Base, folder: Path, place: Path, components: Sequence[Path] | None, *, copy: bool) -> None:
    """Add what the base has around its transformer's weights to a merged model.

    Args:
        place: where the merged weights are, in ``folder``.
        components: the pipeline's other components; None for a transformer without a pipeline.
        copy: copy the components in place of linking to them.
    """
    shutil.copyfile(found.transformer / "config.json", place / "config.json")
    if found.pipeline is not None and components is not None:
        shutil.copyfile(found.pipeline / "model_index.json", folder / "model_index.json")
        for component in components:
            _add_component(component, folder / component.name, copy)


def _add_component(source: Path, target: Path, copy: bool) -> None:
    """Copy a component, or link it by its absolute path, so that the result may be moved.

    Raises:
        CogtuneError: it is to be copied, and a link in it leads to what is no part of the model: a copy would pass for
            a file of the model's own, and might be published.
    """
    if copy:
        refuse(special_files(source), "download or copy the base model again")
        places = [source.resolve(), *(parent.parent for parent in source.resolve().parents if parent.name == _OF_HUB)]
        links = [
            path
            for path in sorted(source.rglob("*"))
            if path.is_symlink() and all(leads_out(path, place) for place in places)
        ]
        refuse_links(links, source, "replace the link with a copy of what it leads to, if that belongs to the model")
        shutil.copytree(source, target)
    else:
        target.symlink_to(source.resolve(), target_is_directory=True)


def folder_size(folder: Path) -> int:
    """Return bytes of all files in ``folder``."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
