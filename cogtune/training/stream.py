"""A run under strategy ``stream``: its weights in host memory, and its checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import CogVideoXTransformer3DModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cogtune.modeling.devices import DTYPES
from cogtune.modeling.engine.engine import blocks_of
from cogtune.modeling.engine.flat_adam import FlatAdam
from cogtune.modeling.engine.host import HostArena
from cogtune.modeling.engine.shard_group import ShardGroup
from cogtune.modeling.engine.streamed_parameters import StreamedParameters
from cogtune.run.plan import Plan
from cogtune.system import console
from cogtune.system.errors import CogtuneError
from cogtune.system.files import os_errors_explained
from cogtune.system.json_files import write_json

WEIGHTS = "diffusion_pytorch_model"
"""What diffusers calls the files of a transformer's weights."""
SHARD_BYTES = 5 * 10**9
"""Weights of one file of a checkpoint, unless a single block has more."""


def stream_weights(
    plan: Plan, transformer: CogVideoXTransformer3DModel, accelerator: Accelerator, *, slots: int
) -> StreamedParameters:
    """Move a model's weights to host memory, with room for their gradients and the optimizer's state."""
    config, device = plan.config, accelerator.device
    blocks = list(blocks_of(transformer))
    optimizer = FlatAdam(
        betas=(config.beta1, config.beta2),
        epsilon=config.epsilon,
        weight_decay=config.weight_decay,
        decoupled=config.optimizer == "adamw",
        weight_dtype=DTYPES[config.precision],
        master=config.master_weights or "fp32",
        moments=config.moments or "fp32",
        decay=config.ema,
        seed=config.seed,
    )
    with console.progress("moving weights to the host", len(blocks) + 1) as shown:
        return StreamedParameters(
            transformer,
            blocks,
            optimizer,
            slots=slots,
            device=device,
            arena=HostArena(pin=device.type == "cuda" and config.pin_memory, tell=console.warn),
            accumulates=config.gradient_accumulation_steps > 1,
            group=ShardGroup(accelerator.process_index, accelerator.num_processes),
            progress=shown.advance,
        )


def state_name(rank: int) -> str:
    """Return the name of the file with process ``rank``'s shard of the optimizer's state."""
    return f"stream-state-{rank:02d}.safetensors"


def save_state(weights: StreamedParameters, folder: Path, rank: int) -> None:
    """Write this process's shard of the optimizer's state, without a copy in memory.

    Raises:
        CogtuneError: it cannot be written.
    """
    tensors = {
        f"{number}.{name}": host for number, part in enumerate(weights.parts) for name, host in part.state.items()
    }
    path = folder / state_name(rank)
    with os_errors_explained(path):
        save_file(tensors, path, {"steps": str(weights.steps)})


def save_transformer(
    weights: StreamedParameters, transformer: CogVideoXTransformer3DModel, folder: Path, *, writes: bool, averaged: bool
) -> None:
    """Write the weights in diffusers' format, one file at a time. Collective.

    Args:
        writes: whether this process does; the others have their shards gathered.
        averaged: the moving average in place of the weights.

    Raises:
        CogtuneError: they cannot be written.
    """
    files = _files_of(weights)
    buffers = dict(transformer.state_dict())
    for part in weights.parts:
        for name in part.names:
            del buffers[name]
    index: dict[str, str] = {}
    size = 0
    failure: BaseException | None = None
    for number, parts in enumerate(files):
        tensors: dict[str, Tensor] = {}
        for place in parts:
            tensors |= weights.whole(place, averaged=averaged)
        if number == 0:
            tensors |= {name: value.cpu() for name, value in buffers.items()}
        name = f"{WEIGHTS}{f'-{number + 1:05d}-of-{len(files):05d}' if len(files) > 1 else ''}.safetensors"
        index |= dict.fromkeys(tensors, name)
        size += sum(value.nbytes for value in tensors.values())
        if writes and failure is None:
            try:
                _write(transformer, folder, name, tensors)
            except CogtuneError as error:
                failure = error  # told when the other processes, which wait for this one's shards, are done too
    if failure is not None:
        raise failure
    if writes and len(files) > 1:
        write_json(
            folder / f"{WEIGHTS}.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": index}
        )


def _write(transformer: CogVideoXTransformer3DModel, folder: Path, name: str, tensors: dict[str, Tensor]) -> None:
    with os_errors_explained(folder):
        if not folder.exists():
            transformer.save_config(folder)
        save_file(tensors, folder / name, {"format": "pt"})


def _files_of(weights: StreamedParameters) -> list[list[int]]:
    """Assign the parts to files."""
    files: list[list[int]] = [[]]
    filled = 0
    for number in (len(weights.parts) - 1, *range(len(weights.parts) - 1)):
        part = weights.parts[number]
        size = part.spec.size * part.weights.element_size()
        if files[-1] and filled + size > SHARD_BYTES:
            files.append([])
            filled = 0
        files[-1].append(number)
        filled += size
    return files


def load(weights: StreamedParameters, checkpoint: Path, rank: int) -> None:
    """Restore the weights and the state of a checkpoint, part by part.

    Raises:
        ValueError: a tensor is not of this run's size or type, or not finite.
        OSError: a file is missing.
    """
    places = dict(_places(checkpoint / "transformer"))
    for number, part in enumerate(weights.parts):
        values = {}
        for name, parameter in zip(part.names, part.parameters, strict=True):
            if name not in places:
                raise ValueError(f"{name} is missing")
            with safe_open(places[name], "pt") as file:
                value = file.get_tensor(name)
            if value.shape != parameter.shape or value.dtype != weights.optimizer.weight_dtype:
                raise ValueError(f"{name} is {value.dtype} {tuple(value.shape)}")
            if not value.isfinite().all():
                raise ValueError(f"{name} is not finite")
            values[name] = value
        weights.take(number, values)
    with safe_open(checkpoint / state_name(rank), "pt") as file:
        for number, part in enumerate(weights.parts):
            for name, host in part.state.items():
                value = file.get_tensor(f"{number}.{name}")
                if value.shape != host.shape or value.dtype != host.dtype:
                    raise ValueError(f"{name} of part {number} is {value.dtype} {tuple(value.shape)}")
                host.copy_(value)
        steps = int(file.metadata()["steps"])
    weights.resume(steps)


def _places(folder: Path) -> Iterator[tuple[str, Path]]:
    """List each tensor in a folder of weights with its file."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                yield name, path


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the type that a folder of weights is stored in; fp32 if there are several."""
    stored = set[str]()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            stored |= {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118 (not a mapping)
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get("".join(stored), torch.float32)
