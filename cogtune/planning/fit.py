"""Whether a run fits the GPUs that are here, and what would."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil

from cogtune.config.optimizers import is_compatible
from cogtune.config.presets import PRESETS, Preset
from cogtune.config.resolving import Resolved
from cogtune.config.run_config import RunConfig
from cogtune.config.strategies import STRATEGIES
from cogtune.models.checkpoint_configs import ModelSpec, published_spec
from cogtune.models.geometry import Size
from cogtune.models.variants import VARIANTS, published
from cogtune.planning.estimate import GIB, Estimate, check_arrangement, estimate
from cogtune.planning.host_memory import limited, with_formats
from cogtune.run.plan import check_config
from cogtune.system import console
from cogtune.system.errors import UsageError
from cogtune.system.gpus import Gpu, gpus

SURE = 0.92
"""An estimate may be off by 8 %: a run whose estimate times this does not fit is refused."""

MOST_FLOPS_ON_CPU = 2e13
"""Of one step; a CPU takes minutes for it."""

GB = 10**9


@dataclass(frozen=True)
class Hardware:
    """What there is to train on."""

    cards: tuple[Gpu, ...]
    host: int
    """Memory in bytes."""

    @property
    def card_bytes(self) -> int:
        """Memory of the smallest GPU."""
        return min(gpu.total for gpu in self.cards)

    def __str__(self) -> str:
        if not self.cards:
            return "no NVIDIA GPU"
        return f"{len(self.cards)} x {self.cards[0].name} of {self.card_bytes / GB:.1f} GB"


def local_hardware() -> Hardware:
    """Return the GPUs that are visible here, and the host's memory, or what a container may have of it."""
    return Hardware(gpus(), limited(int(psutil.virtual_memory().total)))


def problems(config: RunConfig, needs: Estimate, machine: Hardware, *, sure: float = SURE) -> list[str]:
    """Return why a run cannot be made on ``machine``; empty when it can.

    Args:
        sure: the share of an estimate that is surely needed.
    """
    found = why_not_tried(config, needs, machine)
    if not machine.cards:
        return found
    if needs.memory.card * sure > machine.card_bytes:
        found.append(f"needs {needs.memory.card / GB:.1f} GB on each GPU, but this machine has {machine}")
    if needs.host * sure > machine.host:
        there = f"{machine.host / GIB:.0f} GiB"
        found.append(f"needs about {needs.host / GIB:.0f} GiB of host memory, but this machine has {there}")
    return found


def _fits_whole(config: RunConfig, spec: ModelSpec, machine: Hardware) -> bool:
    """Return whether a run may be proposed: the whole of its estimate fits."""
    return _estimate_that_fits(config, spec, machine) is not None


def _estimate_that_fits(config: RunConfig, spec: ModelSpec, machine: Hardware) -> Estimate | None:
    """Return the estimate of a run if the whole of it fits ``machine``."""
    config = with_formats(_within_card(config, machine), spec, machine.host)
    needs = estimate(config, spec, gpu=machine.cards[0].name if machine.cards else "")
    return None if problems(config, needs, machine, sure=1.0) else needs


def _within_card(config: RunConfig, machine: Hardware) -> RunConfig:
    """Return a run that leaves its memory open with the whole GPU, and the whole host, as its limits."""
    if not machine.cards or not config.may_use_engine or config.vram is not None or config.is_arranged_by_hand:
        return config
    limits = {"vram": f"{int(10 * machine.card_bytes / GB) / 10:g}GB"}
    if config.type == "lora" and config.host_memory is None:
        limits["host_memory"] = f"{machine.host / GIB:g}GiB"
    return config.model_copy(update=limits)


def why_not_tried(config: RunConfig, needs: Estimate, machine: Hardware) -> list[str]:
    """Return why a run cannot even be tried on ``machine``: too few GPUs, or none and too much for a CPU."""
    here = config.local_processes
    if not machine.cards:
        found = []
        if needs.memory.card * here > machine.host:
            found.append(f"needs {needs.memory.card / GB:.1f} GB on {_cards(here)}, but this machine has no NVIDIA GPU")
        elif needs.flops > MOST_FLOPS_ON_CPU:
            found.append(
                f"needs {needs.flops / 1e12:,.0f} TFLOP a step, minutes on a CPU, but this machine has no NVIDIA GPU"
            )
        return found
    return [f"needs {_cards(here)}, but this machine has {machine}"] if here > len(machine.cards) else []


def _cards(count: int) -> str:
    return "a GPU" if count == 1 else f"{count} GPUs"


def refuse_unfit(config: RunConfig, spec: ModelSpec, machine: Hardware, name: str | None = None) -> None:
    """Stop a run that this machine cannot make.

    Args:
        name: of the preset, for the message.

    Raises:
        UsageError: it does not fit; the hint names what does.
    """
    needs = estimate(with_formats(config, spec, machine.host), spec)
    found = problems(config, needs, machine)
    if found:
        raise UsageError(
            f"{name or 'this run'} does not fit this machine: {'; '.join(found)}",
            f"{_what_fits(config, spec, machine)}, or use --force to start it anyway",
        )
    if not machine.cards:
        return
    free = min(gpu.free for gpu in machine.cards)
    if needs.memory.card > free:
        console.warn(
            f"about {needs.memory.card / GB:.1f} GB are needed on each GPU, but only {free / GB:.1f} GB are free; "
            "the run may be out of memory"
        )


def _what_fits(config: RunConfig, spec: ModelSpec, machine: Hardware) -> str:
    if not machine.cards:
        return "use a machine with such GPUs, or --preset cpu-lora-tiny for a trial"
    by_fit = " (or --fit, which chooses it)"
    for start, more in ((config, by_fit), (config.model_copy(update={"optimizer": "adamw"}), "")):
        fitting = next(_fitting(start, spec, machine), None)
        if fitting is not None:
            return f"nearest that fits: {_flags(config, fitting)}{more}"
    row = nearest_preset(config, spec, machine)
    if row is not None:
        return f"nearest preset that fits: {_named(row, config, machine)}"
    return f"no preset fits; {_smaller(spec)}"


def _smaller(spec: ModelSpec) -> str:
    """Return what to say of size where nothing else is left to change."""
    if spec.learned_positions:
        return f"this model only works at {spec.native}; use a GPU with more memory, or another model"
    return "use a smaller --size, with fewer frames"


def _flags(before: RunConfig, after: RunConfig) -> str:
    words = []
    for key in ("type", "optimizer", "strategy", "num_processes"):
        if getattr(before, key) != getattr(after, key):
            words.append(f"--{key.replace('_', '-')} {getattr(after, key)}")
    return " ".join(words)


def _named(row: Preset, config: RunConfig, machine: Hardware) -> str:
    """Return the flags that make a preset out of a run of ``config``, which may have set an optimizer."""
    words = [f"--preset {row.name}"]
    if row.gpus > 1:
        words.append(f"--num-processes {len(machine.cards)}")
    if not is_compatible(config.optimizer, row.strategy):
        words.append("--optimizer adamw")
    return " ".join(words)


def _fitting(config: RunConfig, spec: ModelSpec, machine: Hardware) -> Iterator[RunConfig]:
    """Return the same training with other strategies and as many GPUs as there are, that fit; fastest first."""
    return (tried for tried in _tried(config, machine) if _fits_whole(tried, spec, machine))


def _tried(config: RunConfig, machine: Hardware) -> Iterator[RunConfig]:
    count = len(machine.cards)
    for strategy, facts in STRATEGIES.items():
        if count < facts.worthwhile_from:
            continue  # nothing to share with anyone
        if facts.uses_deepspeed and config.type == "lora":
            continue  # an adapter has little that could be shared out
        if not is_compatible(config.optimizer, strategy) or (facts.streams and not _may_stream(config)):
            continue
        yield config.model_copy(update={"strategy": strategy, "num_processes": count * config.num_machines})


def _may_stream(config: RunConfig) -> bool:
    return config.type == "sft" and config.precision != "fp16" and config.num_machines == 1


def fitted(resolved: Resolved, spec: ModelSpec, machine: Hardware) -> Resolved:
    """Return ``--fit``: all GPUs, and the fastest strategy that fits them.

    Raises:
        UsageError: there is no GPU, or none of the strategies fits.
    """
    config = resolved.config
    if not machine.cards:
        raise UsageError("--fit requires an NVIDIA GPU", _what_fits(config, spec, machine))
    chosen = next(_fitting(config, spec, machine), None)
    if chosen is None:
        reasons = [
            f"{tried.strategy}: {'; '.join(problems(tried, estimate(tried, spec), machine, sure=1.0))}"
            for tried in (
                with_formats(_within_card(tried, machine), spec, machine.host) for tried in _tried(config, machine)
            )
        ]
        if config.type == "sft" and not is_compatible(config.optimizer, "zero2"):
            reasons.append(f"the others do not support optimizer {config.optimizer}")
        raise UsageError(
            f"--fit: no strategy for {config.type} training of {spec.variant.name} fits this machine ({machine})",
            _what_fits(config, spec, machine),
            details=reasons,
        )
    changed = [key for key in ("strategy", "num_processes") if getattr(config, key) != getattr(chosen, key)]
    return replace(resolved, config=chosen, provenance={**resolved.provenance, **dict.fromkeys(changed, "--fit")})


def estimate_on(config: RunConfig, machine: Hardware) -> Estimate | None:
    """Return the estimate of a run of a published model if the whole of it fits ``machine``, else None.

    Raises:
        UsageError: the configuration cannot be run.
    """
    row = published(config.model)
    if row is None:
        return None
    spec = published_spec(row)
    check_config(config, spec)
    return _estimate_that_fits(config, spec, machine)


def nearest_preset(config: RunConfig, spec: ModelSpec, machine: Hardware) -> Preset | None:
    """Return the preset most like ``config`` that fits: of the same model, else of the same kind of model, else any."""

    def distance(row: Preset) -> tuple[bool, ...]:
        variant = VARIANTS[row.model]
        return (
            variant.image_to_video != spec.image_to_video,
            row.model != spec.variant.name,
            row.type != config.type,
            variant.num_layers != spec.num_layers,
        )

    # None whose figures are estimates alone.
    known = (row for row in PRESETS.values() if row.model in VARIANTS and not STRATEGIES[row.strategy].streams)
    rows: Sequence[Preset] = sorted(known, key=distance)
    for row in rows:
        count = min(row.gpus, len(machine.cards))
        if count == 1 and row.gpus > 1:
            continue
        if _fits_whole(_on(row, count), published_spec(VARIANTS[row.model]), machine):
            return row
    return None


def suggest_fit(config: RunConfig, spec: ModelSpec, machine: Hardware, *, free: int | None = None) -> str:
    """Suggest what to change after a run was out of GPU memory: one option if that suffices, else a preset.

    The options cost more time or change the training more from one to the next; the first that fits by the estimate,
    and takes less than the run did, is named.

    Args:
        free: bytes that the run can have of a GPU, where other programs use the rest.
    """
    now = estimate(config, spec).memory.card
    limit = now
    if machine.cards:
        limit = min(now, (machine.card_bytes if free is None else free) + 1)
    options = [(words, estimate(leaner, spec)) for words, leaner in _leaner(config, spec, limit) if _fits(leaner, spec)]
    for words, needs in options:
        if needs.memory.card < limit and needs.host <= machine.host:
            return f"{words} takes {needs.memory.card / GB:.1f} GB in place of {now / GB:.1f}, by the estimate"
    leaner = replace(machine, cards=tuple(replace(card, total=limit - 1) for card in machine.cards))
    row = nearest_preset(config, spec, leaner) if machine.cards else None
    if row is not None:
        needs = estimate(_on(row, len(machine.cards)), published_spec(VARIANTS[row.model]))
        words = _named(row, config, machine)
        return f"no one option is enough; {words} takes {needs.memory.card / GB:.1f} GB, by the estimate"
    return _smaller(spec)


def _fits(config: RunConfig, spec: ModelSpec) -> bool:
    """Return whether the run fits the limits on memory that it sets itself."""
    try:
        check_arrangement(config, spec)
    except UsageError:
        return False
    return True


def _on(row: Preset, cards: int) -> RunConfig:
    """Return what a preset sets, for no more GPUs than there are."""
    return RunConfig.model_validate({**row.values(), "num_processes": min(row.gpus, cards)})


def _leaner(config: RunConfig, spec: ModelSpec, limit: int) -> Iterator[tuple[str, RunConfig]]:
    """Yield variants of the run with one memory-saving option changed, each with its flags as text.

    Args:
        limit: bytes of a GPU that it may take.
    """

    budget = config.vram_bytes if config.uses_engine else None
    less = f"{limit // GB}GB"

    def changed(words: str, **values: object) -> tuple[str, RunConfig]:
        if budget is not None and budget >= limit > GB and "vram" not in values:  # which would else be filled again
            words, values = f"{words} --vram {less}", {**values, "vram": less}
        return words, config.model_copy(update=values)

    if not config.gradient_checkpointing:
        yield changed("--gradient-checkpointing", gradient_checkpointing=True)
    if config.compile is False and not config.sharding.shards_weights:
        yield changed("--compile", compile=True)
    if config.batch_size > 1:
        passes = config.batch_size * config.gradient_accumulation_steps
        words = f"--batch-size 1 --gradient-accumulation-steps {passes}"
        yield changed(words, batch_size=1, gradient_accumulation_steps=passes)
    if config.precision == "fp32":
        yield changed("--precision bf16", precision="bf16")
    if config.size is not None and _volume(Size.parse(config.size)) > _volume(spec.native):
        yield changed(f"--size {spec.native}, the model's own,", size=None)
    if config.type == "lora" and config.strategy == "ddp" and (budget or limit) >= limit > GB:
        yield changed(f"--vram {less}", vram=less)
    if config.type == "sft":
        leaner = [name for name, facts in STRATEGIES.items() if config.num_processes >= facts.worthwhile_from]
        changes: list[dict[str, Any]] = [
            {"strategy": other} if is_compatible(config.optimizer, other) else {"strategy": other, "optimizer": "adamw"}
            for other in leaner
            if other != config.strategy and (not STRATEGIES[other].streams or _may_stream(config))
        ]
        for values in (*changes, {"type": "lora", "strategy": "ddp"}):
            after = config.model_copy(update=values)
            yield _flags(config, after), after


def _volume(size: Size) -> int:
    return size.num_frames * size.height * size.width
