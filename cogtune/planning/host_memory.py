"""The formats of the optimizer's state under strategy ``stream``, chosen by what the host has room for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from cogtune.config.resolving import Resolved
from cogtune.config.run_config import RunConfig
from cogtune.models.checkpoint_configs import ModelSpec
from cogtune.planning.estimate import estimate, too_little_host_memory

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def limited(memory: int) -> int:
    """Limit ``memory`` bytes of the host to what a container may use."""
    for path in _CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # "max" is no limit
            memory = min(memory, int(Path(path).read_text()))
    return memory


def free_host_memory() -> int:
    """Return the bytes of host memory that a run could take."""
    return limited(int(psutil.virtual_memory().available))


def _formats(config: RunConfig) -> Iterator[dict[str, Any]]:
    """List the formats to choose from, for those that are not set, from the most memory to the least."""
    for master, moments in (("fp32", "fp32"), ("split" if config.precision == "bf16" else "fp32", "8bit")):
        yield {"master_weights": config.master_weights or master, "moments": config.moments or moments}


def with_formats(config: RunConfig, spec: ModelSpec, room: int) -> RunConfig:
    """Set the most exact formats whose estimate fits ``room`` bytes, or else the smallest.

    Runs under other strategies are returned unchanged.
    """
    if not config.sharding.streams:
        return config
    tried = [config.model_copy(update=formats) for formats in _formats(config)]
    return next((one for one in tried if estimate(one, spec).host <= room), tried[-1])


def with_state(resolved: Resolved, spec: ModelSpec) -> Resolved:
    """Choose the formats of the optimizer's state for this host, or for ``host_memory``.

    Raises:
        UsageError: no choice fits a ``host_memory`` that was given.
    """
    config = resolved.config
    if not config.sharding.streams:
        return resolved
    budget = config.host_memory_bytes
    chosen = with_formats(config, spec, free_host_memory() if budget is None else budget)
    needed = estimate(chosen, spec).host
    if budget is not None and needed > budget:
        raise too_little_host_memory(config, needed)
    source = "--host-memory" if budget is not None else "the host's free memory"
    changed = [key for key in ("master_weights", "moments") if getattr(config, key) is None]
    return replace(resolved, config=chosen, provenance={**resolved.provenance, **dict.fromkeys(changed, source)})
