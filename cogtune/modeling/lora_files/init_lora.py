"""Starting a training run from a LoRA file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from cogtune.config.resolving import Resolved
from cogtune.config.run_config import RunConfig
from cogtune.modeling.lora_files.reading import Lora, check_fits, read_lora
from cogtune.models import layers
from cogtune.models.checkpoint_configs import ModelSpec
from cogtune.run.lora_paths import find_lora
from cogtune.system.digests import digest_file
from cogtune.system.errors import UsageError

_WEAK = ("default", "preset ")
"""Sources of values that the file's values override."""


def with_init_lora(resolved: Resolved, spec: ModelSpec, tell: Callable[[str], None]) -> Resolved:
    """Return the configuration with the adapter settings of its ``init_lora``; unchanged without one.

    Args:
        tell: called with what is assumed about a file that does not record its alpha.

    Raises:
        UsageError: the run's settings differ from the file's adapter, or no run can have such an adapter.
        CogtuneError: the file cannot be read, or does not fit the model.
    """
    config = resolved.config
    if config.init_lora is None:
        return resolved
    if config.type != "lora":
        raise UsageError(
            f"--init-lora cannot be used with --type {config.type}",
            "remove --init-lora, or use --type lora",
        )
    file = find_lora(config.init_lora)
    lora = check_fits(read_lora(file), spec, config.model)
    found = _adapter_of(lora, spec)
    limits = _limits(lora)
    problems = [*limits]
    values: dict[str, Any] = {"init_lora": file}
    provenance = dict(resolved.provenance)
    for key, (value, told, same) in found.items():
        if provenance[key].startswith(_WEAK):
            values[key], provenance[key] = value, str(file)
        elif not same(config):
            problems.append(f"{key}: {_shown(getattr(config, key))} ({provenance[key]}), but the file has {told}")
    if problems:
        hint = "remove these options to use the file's values"
        if limits and len(lora.ranks) > 1:
            hint = f"give it one rank first: cogtune lora resize {file} --rank {min(lora.ranks)} --output NEW"
        elif limits:
            hint = "use a LoRA with the same alpha for all layers"
        raise UsageError(f"cannot start from {file}", hint, details=problems)
    if lora.without_alpha and "alpha" in found and values.get("alpha") is not None:
        tell(f"{file} does not record the alpha; assuming the rank, {lora.ranks[0]}. Use --alpha to change it")
    return replace(resolved, config=config.model_copy(update=values), provenance=provenance)


def initial_lora(config: RunConfig, spec: ModelSpec) -> Lora | None:
    """Read the LoRA that a run starts from, at the run's strength.

    Raises:
        CogtuneError: it is missing or has changed.
    """
    if config.init_lora is None:
        return None
    lora = check_fits(read_lora(config.init_lora), spec, config.model)
    return lora.with_alpha(config.lora_alpha) if lora.without_alpha else lora


def describe_init(config: RunConfig) -> dict[str, Any] | None:
    """Return what is recorded of the file that a run begins with."""
    if config.init_lora is None:
        return None
    return {"file": config.init_lora.name, "digest": digest_file(config.init_lora)}


def _limits(lora: Lora) -> list[str]:
    """Return why no run can have the file's adapter, if so."""
    problems = []
    if len(lora.ranks) > 1:
        problems.append(
            f"its layers have different ranks, {min(lora.ranks)} to {max(lora.ranks)}, but a run has one rank"
        )
    elif len(lora.alphas) > 1:
        problems.append(
            f"its layers have different alphas, {min(lora.alphas):g} to {max(lora.alphas):g}, but a run has one alpha"
        )
    return problems


def _adapter_of(lora: Lora, spec: ModelSpec) -> Mapping[str, tuple[Any, str, Any]]:
    """Return for each key of the adapter the file's value, its text, and whether a configuration has it."""
    rank, alpha = lora.ranks[0], lora.alphas[0]
    names, targets = set(lora.pairs), _targets(lora, spec)
    kinds = {"dora": lora.dora, "rslora": lora.rslora}
    return {
        "rank": (rank, str(rank), lambda config: config.rank == rank),
        "alpha": (
            alpha,
            f"{alpha:g}",
            lambda config: bool(lora.without_alpha) or (config.alpha if config.alpha is not None else alpha) == alpha,
        ),
        "target_modules": (
            targets,
            ", ".join(targets) if len(targets) < 9 else f"{len(targets)} layers",
            lambda config: set(layers.targeted(spec, config.target_modules)) == names,
        ),
        **{
            key: (
                value,
                "it" if value else "it not",
                lambda config, key=key, value=value: getattr(config, key) == value,
            )
            for key, value in kinds.items()
        },
    }


def _targets(lora: Lora, spec: ModelSpec) -> tuple[str, ...]:
    """Return the layers of a LoRA as ``target_modules``: by the ends of their names where these say no more, else by
    name."""
    ends = [end for end in layers.names(spec) if set(layers.targeted(spec, [end])) <= set(lora.pairs)]
    short = [end for end in ends if not any(end != other and end.endswith(f".{other}") for other in ends)]
    return tuple(short) if set(layers.targeted(spec, short)) == set(lora.pairs) else tuple(sorted(lora.pairs))


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return ", ".join(value) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else str(value)
