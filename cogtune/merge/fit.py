"""Which of a checkpoint's tensors are the transformer's, under which names; held to the base model's shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from cogtune.merge.sources import SavedWeights, Values
from cogtune.system.errors import CogtuneError

_WRAPPERS = ("module.", "base_model.model.", "model.", "transformer.", "app.")
"""What programs put in front of the transformer's own names: DDP, peft, or a module that holds the model."""
_WITHIN = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What they put in the middle of them: compilation, FSDP, checkpointing."""


@dataclass(frozen=True)
class Fitted:
    """The base model's every key, each with its values.

    ``left_out`` are the names of saved tensors that are none of its own; ``from_base`` are frozen parameters that were
    not saved, whose values are the base model's.
    """

    sources: dict[str, Values]
    left_out: list[str]
    from_base: list[str]


def fit_transformer(
    zero: SavedWeights, expected: Mapping[str, tuple[int, ...]], stored: Callable[[], Mapping[str, Values]]
) -> Fitted:
    """Return what makes up the base model's every key.

    Args:
        stored: gives the base model's own weights, so far as they are on this machine.

    Raises:
        CogtuneError: with everything that does not fit.
    """
    trained = {bare_name(name): source for name, source in zero.trained.items()}
    kept = {bare_name(name): source for name, source in zero.kept.items()}
    found = trained | {name: source for name, source in kept.items() if name not in trained}
    problems = [f"{name} was trained but does not exist in the base model" for name in trained if name not in expected]
    lacking = [name for name in expected if name not in found]
    base = stored() if lacking and zero.lacks_frozen and not problems else {}
    from_base = [name for name in lacking if name in base]
    found |= {name: base[name] for name in from_base}
    problems += [f"{name} is missing" for name in lacking if name not in base]
    problems += [
        f"{name} is {shape_text(found[name].shape)}, but {shape_text(shape)} in the base model"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    if problems:
        raise CogtuneError(
            "the checkpoint does not fit the base model",
            "check that --model is the model that was trained, and has its weights if frozen parameters were not saved",
            details=truncated(problems),
        )
    sources = {name: found[name] for name in found if name in expected}
    return Fitted(sources, sorted(set(kept) - set(expected)), from_base)


def bare_name(name: str) -> str:
    """Return a parameter's name without what wrappers (compilation, DDP, FSDP, peft) add to it."""
    for inner in _WITHIN:
        name = name.replace(inner, "")
    while wrapper := next((wrapper for wrapper in _WRAPPERS if name.startswith(wrapper)), None):
        name = name.removeprefix(wrapper)
    return name


def truncated(problems: list[str], most: int = 20) -> list[str]:
    """Return a whole model's worth of like problems, cut to what can be read."""
    rest = len(problems) - most
    return problems if rest <= 0 else [*problems[:most], f"and {rest} more"]


def shape_text(shape: Iterable[int]) -> str:
    """Format a shape: 64x32."""
    return "x".join(map(str, shape))
