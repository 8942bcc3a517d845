"""Which of a checkpoint's tensors are the transformer's, under which names; held to the base model's shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from cogtune.errors import CogtuneError
from cogtune.merge.zero import Source, ZeroCheckpoint

_WRAPPERS = ("module.", "base_model.model.", "model.", "transformer.")
"""What programs put in front of the transformer's own names: DDP, peft, or a module that holds the model."""


def fit_transformer(
    zero: ZeroCheckpoint, expected: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Source], list[str]]:
    """The base model's every key, and the names of saved tensors that are none of its own."""
    trained = {own_name(name): source for name, source in zero.trained.items()}
    kept = {own_name(name): source for name, source in zero.kept.items()}
    found = trained | {name: source for name, source in kept.items() if name not in trained}
    problems = [f"it trained {name}, which is not in the base model" for name in trained if name not in expected]
    problems += [f"it lacks {name}" for name in expected if name not in found]
    problems += [
        f"{name} is {by(found[name].shape)}, in the base model {by(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    if problems:
        raise CogtuneError(
            "the checkpoint does not fit the base model",
            "is --model the one that was trained, and were frozen parameters saved with it?",
            details=few(problems),
        )
    return {name: found[name] for name in found if name in expected}, sorted(set(kept) - set(expected))


def own_name(name: str) -> str:
    """A parameter's name without what wrappers (compilation, DDP, peft) add to it."""
    name = name.replace("_orig_mod.", "")
    while wrapper := next((wrapper for wrapper in _WRAPPERS if name.startswith(wrapper)), None):
        name = name.removeprefix(wrapper)
    return name


def few(problems: list[str], most: int = 20) -> list[str]:
    """A whole model's worth of like problems, cut to what can be read."""
    rest = len(problems) - most
    return problems if rest <= 0 else [*problems[:most], f"and {rest} more"]


def by(shape: Iterable[int]) -> str:
    """A shape in words: 64x32."""
    return "x".join(map(str, shape))
