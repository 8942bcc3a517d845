"""Redacting what is uploaded: configurations and headers without secrets and local paths."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cogtune.config.resolving import yaml_text
from cogtune.config.run_config import RunConfig, tagged
from cogtune.hub.card import CardFacts
from cogtune.hub.local import header_metadata, json_object
from cogtune.run.checkpoints import FACTS, lora_facts
from cogtune.system.files import open_regular, os_errors_explained
from cogtune.system.json_files import CHECKSUM
from cogtune.system.reading import read_object
from cogtune.system.secrets import SECRET_TEXT, is_secret_name

_PRIVATE_TEXT = re.compile(
    r"""(?:^|[\s=:,;"'(\[])(?:~?/[^\s/]|[A-Za-z]:[\\/]|\\\\|file://)"""  # a path of this machine
    rf"|{SECRET_TEXT}"
)


def public_run_yaml(config: Mapping[str, Any], facts: CardFacts) -> bytes:
    """Return ``run.yaml`` for the repository; a local model is named as in the card."""
    public = _without_private(config)
    if "model" in config and "model" not in public:
        public["model"] = facts.base_model or facts.variant.name
    header = "# The resolved configuration of this run, without paths of the machine it ran on.\n"
    return (header + yaml_text(public, sort_keys=False)).encode()


def public_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what may be taken of a published configuration: what :func:`public_run_yaml` publishes."""
    return dict(_without_private(settings))


def public_state(state: Mapping[str, Any], changed: Mapping[str, str]) -> dict[str, Any]:
    """Return a checkpoint's state for the repository, without its checksum.

    Args:
        changed: new fingerprints, by name, of the files of which the repository gets a redacted copy.
    """
    public = {**_without_private(state), "identity": state["identity"], "files": {**state["files"], **changed}}
    public.pop(CHECKSUM, None)
    return public


def public_file(source: Path, base_model: str | None, aside: Path) -> Path | bytes:
    """Return ``source``, or a redacted copy if its settings or header contain secrets or local paths."""
    if source.name == "model_index.json" or source.name.endswith("config.json"):
        config = read_object(source)
        public = _without_private(config, by_key=False)  # a tokenizer's pad_token is no secret
        return source if public == config else json.dumps(public, indent=2).encode() + b"\n"
    if source.suffix == ".safetensors":
        metadata = header_metadata(source)
        cleaned = _public_header(metadata, base_model)
        if cleaned != metadata:
            target = aside / f"{len(list(aside.iterdir()))}.safetensors"
            _copy_with_metadata(source, target, cleaned)
            return target
    return source


def _public_header(metadata: Mapping[str, str], base_model: str | None) -> dict[str, str]:
    cleaned = {}
    for key, text in metadata.items():
        value = json_object(text)
        if value is None:
            if not _is_private(key, text):
                cleaned[key] = text
            continue
        public = _without_private(value)
        if "base_model" in value and "base_model" not in public and base_model is not None:
            public["base_model"] = base_model
        cleaned[key] = text if public == value else json.dumps(public)
    if cleaned != dict(metadata) and CHECKSUM in (facts := json_object(cleaned.get(FACTS, "")) or {}):
        own = {key: value for key, value in facts.items() if key != CHECKSUM}
        cleaned[FACTS] = lora_facts(own, cleaned.get("lora_adapter_metadata", ""))
    return cleaned


def _copy_with_metadata(source: Path, target: Path, metadata: Mapping[str, str]) -> None:
    """Copy a safetensors file with other metadata in its header and the same tensors.

    The format: eight bytes of header length, the header as JSON, the data
    (https://github.com/huggingface/safetensors#format).
    """
    with os_errors_explained(source, "copy"), open_regular(source) as old, target.open("wb") as new:
        header = json.loads(old.read(int.from_bytes(old.read(8), "little")))
        order = header["__metadata__"]  # safetensors itself gives them in a new order each time
        header["__metadata__"] = {key: metadata[key] for key in order if key in metadata}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        new.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(old, new, 1 << 20)


def _without_private(value: Any, *, by_key: bool = True) -> Any:
    """Return ``value`` without entries that are secrets or local paths.

    Args:
        by_key: also recognise secrets by their key, not only by their value.
    """
    if isinstance(value, Mapping):
        kept = {key: item for key, item in value.items() if not _is_private(str(key) if by_key else "", item)}
        return {key: _without_private(item, by_key=by_key) for key, item in kept.items()}
    if isinstance(value, list):
        return [_without_private(item, by_key=by_key) for item in value if not _is_private("", item)]
    return value


def _is_private(key: str, value: Any) -> bool:
    if key in tagged("network") or (is_secret_name(key) and key not in RunConfig.model_fields):
        return True
    return isinstance(value, str) and bool(_PRIVATE_TEXT.search(value))
