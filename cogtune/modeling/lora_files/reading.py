"""Any LoRA in one form: the layers it adapts, their matrices, and alpha."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogtune.modeling.lora_files.alphas import Alphas
from cogtune.modeling.lora_files.lora_file import LoraFile, open_file
from cogtune.modeling.lora_files.names import OTHER_METHODS, Part, TensorName, layer_name, parse_name, source_format_of
from cogtune.models import layers
from cogtune.models.checkpoint_configs import ModelSpec, published_spec
from cogtune.models.sat import refuse_sat_names
from cogtune.models.variants import VARIANTS
from cogtune.system.errors import CogtuneError

_SHOWN = 3
"""Examples shown for each kind of problem."""


@dataclass(frozen=True)
class Pair:
    """The adapter of one layer."""

    down: Tensor
    """A: ``[rank, inputs]``, of a convolution ``[rank, inputs, height, width]``."""
    up: Tensor
    """B: ``[outputs, rank]``, of a convolution ``[outputs, rank, 1, 1]``."""
    alpha: float | None = None
    """None where the file does not say."""
    magnitude: Tensor | None = None
    """DoRA's, ``[outputs]``."""

    @property
    def rank(self) -> int:
        """The rank."""
        return self.down.shape[0]


@dataclass(frozen=True, kw_only=True)
class Lora:
    """The LoRA in a file of any program."""

    path: Path
    source_format: str
    """The naming scheme of its tensors, as the programs that use it."""
    pairs: Mapping[str, Pair]
    """Adapters by the layer's diffusers name."""
    rslora: bool = False
    facts: Mapping[str, Any]
    """What cogtune wrote about the run; empty for a file made by another program."""
    header: Mapping[str, str] = field(default_factory=dict)
    """All that a safetensors file's header says."""

    @property
    def dora(self) -> bool:
        """Whether it has magnitudes."""
        return any(pair.magnitude is not None for pair in self.pairs.values())

    @property
    def changes_nothing(self) -> bool:
        """Whether every B is zero, as before the first step of a training."""
        return not any(bool(pair.up.any()) for pair in self.pairs.values())

    @property
    def ranks(self) -> list[int]:
        """All that occur, the most frequent first."""
        return [rank for rank, _ in Counter(pair.rank for pair in self.pairs.values()).most_common()]

    @property
    def alphas(self) -> list[float]:
        """All that occur, the most frequent first; where the file says none, a layer's alpha counts as its rank."""
        return [alpha for alpha, _ in Counter(map(self.alpha_of, self.pairs)).most_common()]

    @property
    def without_alpha(self) -> list[str]:
        """The layers whose alpha the file does not record."""
        return [name for name, pair in self.pairs.items() if pair.alpha is None]

    def alpha_of(self, layer: str) -> float:
        """Return a layer's alpha, or its rank if the file does not record one."""
        pair = self.pairs[layer]
        return float(pair.rank if pair.alpha is None else pair.alpha)

    def scale_of(self, layer: str) -> float:
        """Return the factor on the product B A."""
        rank = self.pairs[layer].rank
        return self.alpha_of(layer) / (math.sqrt(rank) if self.rslora else rank)

    def with_alpha(self, alpha: float) -> Lora:
        """Return the LoRA with the same alpha for all layers."""
        return replace(self, pairs={name: replace(pair, alpha=alpha) for name, pair in self.pairs.items()})


_NOT_FINITE = "values that are not finite"
_NOT_NUMBERS = "stored in a number format that is not supported"


def read_lora(path: Path) -> Lora:
    """Read the LoRA in ``path``, if all of its tensors belong to layers that a CogVideoX transformer may have.

    Raises:
        CogtuneError: it cannot be read, is not a LoRA, or has parts that would be ignored; with every kind of
            problem, the number of tensors that have it, and examples.
    """
    opened = open_file(path)
    refuse_sat_names(path, opened.tensors)
    method = str(opened.config.get("peft_type", "LORA")).upper()
    if method != "LORA":
        raise CogtuneError(f"{path} is a {method} adapter, which is not supported", "use a LoRA or DoRA")
    parts, problems = _sorted(opened)
    pairs, more = _paired(parts, opened)
    problems += more
    problems += _not_applied(opened.config)
    without = [name for name, pair in pairs.items() if pair.magnitude is None]
    if not problems and without and len(without) < len(pairs):
        problems.append(
            f"it is a DoRA, but {len(without)} of its {len(pairs)} layers have no magnitude{_example(without)}"
        )
    elif not problems and without and opened.config.get("use_dora"):
        problems.append("its settings say DoRA, but it has no magnitudes")
    if problems:
        if any(_NOT_NUMBERS in problem for problem in problems):
            raise CogtuneError(f"cannot use {path}", "save it again in fp32, fp16 or bf16", details=problems)
        if any(_NOT_FINITE in problem for problem in problems):
            raise CogtuneError(
                f"cannot use {path}", "its training diverged; use an earlier checkpoint", details=problems
            )
        raise CogtuneError(f"cannot use {path}: a part of it would be ignored", _what_now(opened), details=problems)
    return Lora(
        path=path,
        source_format=source_format_of(list(opened.tensors)),
        pairs=pairs,
        rslora=bool(opened.config.get("use_rslora")),
        facts=opened.facts,
        header=opened.header,
    )


_OTHER_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""How PEFT calls the ways to initialize a LoRA that take something out of the base's weights first."""

_NOT_APPLIED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
)
"""Settings of PEFT by which the same tensors have another effect."""


def _not_applied(settings: Mapping[str, Any]) -> list[str]:
    """Return what an adapter's settings say that would make a LoRA's effect another than its matrices' product."""
    begun = str(settings.get("init_lora_weights", "")).lower()
    problems = [f"its settings say {name}, which is not applied" for name in _NOT_APPLIED if settings.get(name)]
    if begun.startswith(_OTHER_BASES):
        problems.append(
            f"its settings say init_lora_weights {begun!r}: it belongs to a base whose own weights were changed first "
            "(PEFT's save_pretrained makes a plain LoRA of it, with path_initial_model_for_weight_conversion)"
        )
    return problems


def _sorted(opened: LoraFile) -> tuple[dict[str, dict[str, tuple[str, TensorName, Tensor]]], list[str]]:
    """Return the tensors by layer and part, and what is wrong with their names and values."""
    parts: dict[str, dict[str, tuple[str, TensorName, Tensor]]] = {}
    lost, doubled, empty, foreign, broken, adapters = [], [], [], [], [], set()
    for key, tensor in opened.tensors.items():
        named = parse_name(key)
        if named is None:
            lost.append(key)
            continue
        if named.part != "alpha":
            adapters.add(named.adapter)
        if tensor.numel() == 0:
            empty.append(key)
        elif not _has_numbers(tensor, named.part):
            foreign.append(f"{key} ({tensor.dtype})")
        elif not bool(tensor.float().isfinite().all()):
            broken.append(key)
        if named.part in (of_layer := parts.setdefault(named.layer, {})):
            doubled.append(f"{of_layer[named.part][0]} and {key}")
        of_layer[named.part] = (key, named, tensor)
    if len(lost) == len(opened.tensors):
        raise CogtuneError(f"{opened.path} contains no LoRA for CogVideoX{_example(lost)}", _what_now(opened))
    count = len(opened.tensors)
    kinds = (
        (lost, f"{len(lost)} of its {count} tensors belong to no CogVideoX layer that a LoRA can change"),
        (doubled, "two tensors are for the same part of one layer"),
        (empty, f"{len(empty)} tensors are empty; they were not gathered from all GPUs before saving"),
        (foreign, f"{len(foreign)} tensors are {_NOT_NUMBERS}"),
        (broken, f"{len(broken)} tensors have {_NOT_FINITE}"),
    )
    problems = [f"{told}{_example(found)}" for found, told in kinds if found]
    if len(adapters) > 1:
        names = ", ".join(sorted(name or "one without a name" for name in adapters))
        problems.append(f"it contains several adapters: {names}")
    return parts, problems


def _has_numbers(tensor: Tensor, part: Part) -> bool:
    """Return whether a tensor's values are numbers of a kind that can be computed with."""
    if part == "alpha" and not tensor.is_complex():
        return tensor.dtype != torch.bool
    return tensor.is_floating_point() and not str(tensor.dtype).endswith("_x2")  # which packs two numbers into a byte


def _paired(
    parts: Mapping[str, Mapping[str, tuple[str, TensorName, Tensor]]], opened: LoraFile
) -> tuple[dict[str, Pair], list[str]]:
    """Return the adapter of each layer, and which are not whole."""
    pairs, halves, ranks, problems = {}, [], [], list[str]()
    said = Alphas(opened, problems)
    for layer, found in parts.items():
        if "down" not in found or "up" not in found:
            halves.append(next(iter(found.values()))[0])
            continue
        down, up = found["down"][2], found["up"][2]
        if down.dim() < 2 or up.dim() < 2 or down.shape[0] != up.shape[1]:
            ranks.append(f"{layer} ({_by(down.shape)} and {_by(up.shape)})")
            continue
        magnitude = None
        if "magnitude" in found:
            key, named, tensor = found["magnitude"]
            magnitude = tensor.flatten()
            by_inputs = named.written == "dora_scale" and tensor.dim() > 1 and tensor.shape[0] == 1
            if by_inputs or magnitude.numel() != up.shape[0]:
                problems.append(
                    f"{key} has shape {_by(tensor.shape)}; DoRA needs one magnitude for each of the "
                    f"{up.shape[0]} outputs"
                )
        alpha = said.of(layer, found.get("alpha"))
        pairs[layer] = Pair(down, up, alpha, magnitude)
    kinds = (
        (halves, f"{len(halves)} layers have an incomplete adapter"),
        (ranks, f"the two matrices of {len(ranks)} layers have different ranks"),
    )
    return pairs, [*(f"{told}{_example(which)}" for which, told in kinds if which), *problems]


def check_fits(lora: Lora, spec: ModelSpec, base: str) -> Lora:
    """Do as :func:`check_shapes`, for the weights that a model's configs speak of."""
    return check_shapes(lora, layers.weight_shapes(spec), base)


def check_shapes(lora: Lora, shapes: Mapping[str, Sequence[int]], base: str) -> Lora:
    """Return the LoRA with its matrices in the shapes of the base's weights.

    Args:
        shapes: of the base's weights, by layer.
        base: the base's name for messages.

    Raises:
        CogtuneError: the base does not have all of its layers, or has them in another size.
    """
    missing = [name for name in lora.pairs if name not in shapes]
    fitted, wrong = {}, []
    for name, pair in lora.pairs.items():
        if name in missing:
            continue
        if (found := _fitted(pair, shapes[name])) is None:
            wrong.append(f"{name}: {_by(_adapts(pair))} in the LoRA, {_by(shapes[name])} in the base")
        else:
            fitted[name] = found
    problems = []
    if missing:
        problems.append(f"{len(missing)} of its {len(lora.pairs)} layers do not exist in the base{_example(missing)}")
    if wrong:
        problems.append(f"{len(wrong)} of its {len(lora.pairs)} layers have another size in the base{_example(wrong)}")
    if problems:
        others = fitting_models(lora)
        raise CogtuneError(
            f"{lora.path} does not fit {base}",
            f"it fits {', '.join(others)}; check --model" if others else "it was made for another model",
            details=problems,
        )
    return replace(lora, pairs=fitted)


def fitting_models(lora: Lora) -> list[str]:
    """List the published models that have all layers of a LoRA in the same sizes."""
    found = []
    for name, row in VARIANTS.items():
        shapes = layers.weight_shapes(published_spec(row))
        if all(layer in shapes and _fitted(pair, shapes[layer]) for layer, pair in lora.pairs.items()):
            found.append(name)
    return found


def _adapts(pair: Pair) -> tuple[int, ...]:
    """Return the shape of the weight that a pair changes."""
    return (pair.up.shape[0], *pair.down.shape[1:])


def _fitted(pair: Pair, weight: Sequence[int]) -> Pair | None:
    """Return the pair for a weight of that shape, whatever dimensions of 1 a program adds to it; None if it is of
    another."""
    outputs, *inputs = weight
    if [size for size in pair.down.shape[1:] if size != 1] != [size for size in inputs if size != 1]:
        return None
    if pair.up.shape[0] != outputs or pair.up.numel() != outputs * pair.rank:
        return None
    ones = [1] * (len(inputs) - 1)
    return replace(
        pair,
        down=pair.down.reshape(pair.rank, *inputs).contiguous(),
        up=pair.up.reshape(outputs, pair.rank, *ones).contiguous(),
    )


def _what_now(opened: LoraFile) -> str:
    """Return the hint for a file that cannot be used."""
    keys = list(opened.tensors)
    for sign, method in OTHER_METHODS.items():
        if any(re.search(sign, key) for key in keys):
            return f"it contains {method} tensors, which are not supported; use a LoRA or DoRA"
    if any(key.startswith(("lora_te", "text_encoder")) for key in keys):
        return "it also adapts a text encoder, so it was probably made for another model"
    if any("lora" in key for key in keys) and any(".base_layer." in key for key in keys):
        return "it also has the base's weights: save only the adapter, with PEFT's get_peft_model_state_dict"
    if opened.config.get("bias", "none") != "none":
        return f"it was trained with PEFT's bias: {opened.config['bias']!r}, which is not supported"
    if any("lora" in key for key in keys) and any(".modules_to_save." in key or _is_whole(key) for key in keys):
        return "it also has whole layers (PEFT's modules_to_save): merge it into its base, and pass that as --model"
    if any("lora" in key for key in keys):
        return "it was made for another model, or by an unsupported program"
    if not keys:
        return "copy or download it again, or save it again with the program that made it"
    return "pass complete weights as --model: a run, a checkpoint or a merged folder"


def _is_whole(key: str) -> bool:
    """Return whether a name is that of a layer's own weight."""
    layer, _, leaf = key.rpartition(".")
    return leaf in ("weight", "bias") and "lora" not in key and layer_name(layer) is not None


def _by(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "a number"


def _example(found: Sequence[str]) -> str:
    if not found:
        return ""
    rest = len(found) - _SHOWN
    return f": {', '.join(found[:_SHOWN])}" + (f" and {rest} more" if rest > 0 else "")
