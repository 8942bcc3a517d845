"""Reading tensors and settings from a LoRA file of any program. Nothing in a file is executed."""

from __future__ import annotations

import contextlib
import math
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cogtune.run.checkpoints import FACTS
from cogtune.run.facts import checked_facts
from cogtune.run.lora_paths import ADAPTER_CONFIG, SUFFIXES
from cogtune.system.errors import CogtuneError
from cogtune.system.files import open_regular, os_errors_explained
from cogtune.system.json_files import parse_json, read_json
from cogtune.system.sniffing import HEAD, sniff

WITHOUT_ALPHA = "cogtune_without_alpha"
"""The header's key for the layers, as a JSON list, whose alpha was not known where a format must say one; all if empty.
"""

_MOST_PICKLE = 1 << 21
"""Bytes of the description of the tensors in a file of ``torch.save``; a LoRA for every layer of 5b has 200 KB."""

_SAVE = "save it again with the program that made it"

_WRAPPERS = ("state_dict", "module", "model", "lora", "network", "weights")
"""Keys under which a file of ``torch.save`` may hold its weights."""


@dataclass(frozen=True)
class LoraFile:
    """The contents of a LoRA file."""

    path: Path
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    """PEFT's ``LoraConfig`` as far as it is written down: in the header, or in the folder of an adapter."""
    header: Mapping[str, str]
    """What else the header says."""

    @property
    def facts(self) -> dict[str, Any]:
        """What cogtune wrote about the run; empty for a file made by another program."""
        return checked_facts(_settings(self.path, self.header, FACTS), self.path)

    def says_no_alpha(self, layer: str) -> bool:
        """Return whether the alpha that the settings say of a layer is a stand-in for one that was not known."""
        try:
            layers = parse_json(self.header.get(WITHOUT_ALPHA, "null"))
        except ValueError:
            return False
        return isinstance(layers, list) and (not layers or layer in layers)

    @property
    def network_alpha(self) -> float | None:
        """Alpha as kohya's programs write it into the header."""
        try:
            alpha = float(self.header.get("ss_network_alpha", ""))
        except ValueError:
            return None
        return alpha if math.isfinite(alpha) and alpha > 0 else None


def open_file(path: Path) -> LoraFile:
    """Read the tensors and settings in ``path``, whose format is detected from its content.

    Raises:
        CogtuneError: it cannot be read, or is something else.
    """
    with os_errors_explained(path, "read"), open_regular(path) as file:
        start, size = file.read(HEAD), path.stat().st_size
    _refuse_text(path, start, size)
    header: dict[str, str] = {}
    pickled = start[:2] == b"PK" or start[:1] == b"\x80"
    if pickled and start[8:9] != b"{":  # a safetensors file begins with eight bytes of its header's length
        tensors = _unpickled(path)
    else:
        tensors, header = _safetensors(path)
    return LoraFile(path, tensors, _config_of(path, header), header)


def _refuse_text(path: Path, start: bytes, size: int) -> None:
    """Reject what a failed download may have left instead of weights."""
    if size == 0:
        raise CogtuneError(f"{path} is empty", "copy or download it again")
    if start.startswith(b"GGUF"):
        raise CogtuneError(f"{path} is a GGUF file, which is not supported", "use the LoRA as .safetensors")
    if (instead := sniff(start)) is not None:
        raise CogtuneError(f"{path} is {instead.what}, not weights", instead.advice)


def _refuse_archive(path: Path) -> None:
    """Reject files packed together, which ``torch.save`` did not do, and what would take more room than it has.

    Raises:
        CogtuneError: it is such an archive.
    """
    records: list[zipfile.ZipInfo] = []
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:  # a damaged one may raise anything
        records = archive.infolist()
    if records and not any(record.filename.endswith("data.pkl") for record in records):
        raise CogtuneError(f"{path} is a zip archive with {records[0].filename} in it, not weights", "unpack it first")
    if any(record.file_size > _MOST_PICKLE for record in records if record.filename.endswith("data.pkl")):
        raise CogtuneError(f"{path} describes more than the tensors of a LoRA", _SAVE)
    if sum(record.file_size for record in records) > path.stat().st_size:
        raise CogtuneError(f"{path} is compressed, which torch.save never does", _SAVE)


def _safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with os_errors_explained(path, "read"), safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        if "incomplete" in str(error):
            raise CogtuneError(f"{path} is incomplete", "copy or download it again") from error
        raise CogtuneError(
            f"{path} is not a LoRA file: {error}", "pass a run folder, or a LoRA as .safetensors, .bin or .pt"
        ) from error


def _unpickled(path: Path) -> dict[str, Tensor]:
    """Return the tensors in a file of ``torch.save``.

    Raises:
        CogtuneError: it is damaged, or holds what is more than tensors.
    """
    _refuse_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old and odd pickles, which are read or refused all the same
            with open_regular(path) as file:  # by its name torch takes .safetensors for what it says
                value = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CogtuneError(
            f"{path} contains more than weights, and loading it could execute code",
            "save it as a .safetensors file with the program that made it",
        ) from error
    except CogtuneError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        reason = (str(error).splitlines() or [""])[0]
        if not reason or "zip archive" in reason:  # which goes on with advice to users of PyTorch
            reason = "it is truncated or damaged"
        raise CogtuneError(f"cannot read {path}: {reason}", "copy or download it again") from error
    for _ in _WRAPPERS:  # a dict may hold itself
        if not isinstance(value, dict) or any(isinstance(item, Tensor) for item in value.values()):
            break
        value = next((value[name] for name in _WRAPPERS if isinstance(value.get(name), dict)), value)
    found = dict(_numbers(value)) if isinstance(value, dict) else {}
    if odd := [key for key, tensor in found.items() if not _is_plain(tensor)]:
        raise CogtuneError(
            f"{path} has {len(odd)} tensors that are not stored number by number: {odd[0]}",
            "save dense tensors, such as `tensor.contiguous()`, as a .safetensors file",
        )
    return found


def _is_plain(tensor: Tensor) -> bool:
    """Return whether all of a tensor's numbers are in memory. Of others it is not known how many there would be."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_nested or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes()


def _numbers(value: Mapping[Any, Any]) -> Iterator[tuple[str, Tensor]]:
    for key, item in value.items():
        if isinstance(item, Tensor):
            yield str(key), item
        elif isinstance(item, (int, float)) and str(key).endswith("alpha"):
            with contextlib.suppress(OverflowError):  # then it is infinite, which is rejected
                item = float(item)
            yield str(key), torch.tensor(item if isinstance(item, float) else math.inf)


def _config_of(path: Path, header: Mapping[str, str]) -> dict[str, Any]:
    """Return PEFT's settings: from the header, as diffusers or finetrainers write them, or from the adapter's
    folder."""
    written = _settings(path, header, LORA_ADAPTER_METADATA_KEY)
    if written:
        prefix = "transformer."
        return {key.removeprefix(prefix): value for key, value in written.items() if key.startswith(prefix)} or written
    if config := _settings(path, header, "lora_config"):
        return config
    beside = path.with_name(ADAPTER_CONFIG)
    if beside.is_file() and (path.name.startswith("adapter_model") or _is_alone(path)):
        value = read_json(beside)
        if not isinstance(value, dict):
            raise CogtuneError(f"{beside} contains no adapter settings", "copy the adapter's folder again")
        return value
    return {}


def _is_alone(path: Path) -> bool:
    """Return whether settings next to the file can belong to no other file of its folder."""
    return [other for other in path.parent.iterdir() if other.suffix in SUFFIXES] == [path]


def _settings(path: Path, header: Mapping[str, str], key: str) -> dict[str, Any]:
    """Return the JSON object that a header has under ``key``; empty if it has none.

    Raises:
        CogtuneError: it is no object, so that what it says would be ignored.
    """
    try:
        value = parse_json(header.get(key) or "{}")
    except ValueError as error:
        raise CogtuneError(f"{path} is damaged: {key} in its header is not valid JSON: {error}", _SAVE) from error
    if not isinstance(value, dict):
        raise CogtuneError(f"{path} is damaged: {key} in its header is not an object", _SAVE)
    return value
