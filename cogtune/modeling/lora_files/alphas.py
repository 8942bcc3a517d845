"""The alpha of each layer, wherever a LoRA file says it."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import torch
from torch import Tensor

from cogtune.modeling.lora_files.lora_file import LoraFile
from cogtune.modeling.lora_files.names import TensorName
from cogtune.system.reading import abridged

_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max

_MOST_PATTERNS = 5000
_SHOWN_KEY = 40


class Alphas:
    """Alpha as a file says it: by tensors, else in PEFT's settings, kohya's header, or what cogtune wrote."""

    def __init__(self, opened: LoraFile, problems: list[str]) -> None:
        self._opened, self._problems = opened, problems
        self._patterns = list[tuple[re.Pattern[str], Any]]()
        pattern = opened.config.get("alpha_pattern")
        for key, value in pattern.items() if isinstance(pattern, dict) else ():
            if _is_costly(key) or len(self._patterns) == _MOST_PATTERNS:
                problems.append(f"a key of the alpha_pattern in its settings is too complex: {key[:_SHOWN_KEY]!r}")
                break
            with contextlib.suppress(re.error):
                self._patterns.append((re.compile(rf"(.*\.)?({key})$"), value))  # as PEFT reads it

    def of(self, layer: str, tensor: tuple[str, TensorName, Tensor] | None) -> float | None:
        """Return alpha of a layer; None if the file does not say it."""
        if tensor is not None:
            key, _, value = tensor
            if value.numel() == 1 and not value.is_complex():
                return self._positive(float(value), key)
            self._wrong(f"{key} has shape {list(value.shape)} and type {value.dtype}")
            return None
        opened = self._opened
        if opened.says_no_alpha(layer):
            return None
        said = next((value for pattern, value in self._patterns if pattern.match(layer)), None)
        said = opened.config.get("lora_alpha") if said is None else said
        if said is not None:
            return self._positive(said, "the alpha in its settings")
        if (network := opened.network_alpha) is not None:
            return self._positive(network, "ss_network_alpha in its header")
        said = opened.facts.get("alpha")
        return None if said is None else self._positive(said, "the alpha in its header")

    def _positive(self, said: Any, source: str) -> float | None:
        """Return an alpha; None, and a problem, if it is none that fp32 holds."""
        if type(said) in (int, float) and _SMALLEST <= said <= _LARGEST:
            return float(said)
        self._wrong(f"{source} is {f'{said:g}' if isinstance(said, float) else abridged(said)}")
        return None

    def _wrong(self, told: str) -> None:
        if (problem := f"{told}, not a positive number") not in self._problems:
            self._problems.append(problem)


def _is_costly(pattern: str) -> bool:
    """Return whether matching a regular expression may take more than a moment: groups are repeated, or much is."""
    repeats = re.findall(r"[*+{]", pattern)
    return len(repeats) > 3 or bool(re.search(r"\)[*+{]|\\[1-9]|\(\?", pattern)) or len(pattern) > 500
