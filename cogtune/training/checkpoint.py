"""Checkpoints, written under a temporary name and renamed, so that a folder ``checkpoint-N`` is always complete."""

from __future__ import annotations

import contextlib
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from diffusers import CogVideoXTransformer3DModel
from safetensors import SafetensorError
from torch import Tensor

from cogtune.config.run_config import RunConfig
from cogtune.modeling.adapters import load_lora, save_lora
from cogtune.modeling.engine.streamed_parameters import StreamedParameters
from cogtune.models.variants import LORA_WEIGHTS_NAME
from cogtune.run.checkpoints import FORMAT, STATE_NAME, changed_files, checkpoints, fingerprints, read_state
from cogtune.run.folder import AVERAGE_NAME, RunFolder
from cogtune.system import console
from cogtune.system.errors import CogtuneError, said_by
from cogtune.system.files import open_regular, os_errors_explained, write_text
from cogtune.system.folders import partial_folder, partial_path, publish_folder, remove_folder
from cogtune.system.json_files import write_sealed
from cogtune.training import stream
from cogtune.training.ema import EMAWeights
from cogtune.training.zero_loading import only_weights

OPTIMIZER_NAME = "optimizer.pt"
ZERO_TAG = "pytorch_model"
"""Folder of the ZeRO shards in a checkpoint; the name accelerate's ``save_state`` gives it."""


@dataclass(frozen=True)
class TrainState:
    """The model and the optimizer that a checkpoint saves, as Accelerate prepared them."""

    accelerator: Accelerator
    model: Any
    """The prepared model: the transformer, or DDP or a DeepSpeed engine around it."""
    transformer: CogVideoXTransformer3DModel
    optimizer: Any
    """None under strategy ``stream``."""
    is_lora: bool
    streamed: StreamedParameters | None = None
    """Under strategy ``stream``, what holds the weights."""
    ema: EMAWeights | None = None
    """Of the weights, where there is one that ``streamed`` does not hold."""

    def set_learning_rate(self, rate: float) -> None:
        """Set the learning rate of the optimizer's next step."""
        if self.streamed is not None:
            self.streamed.learning_rate = rate
            return
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    @property
    def averages(self) -> bool:
        """Whether a moving average of the weights is kept."""
        return self.ema is not None or (self.streamed is not None and self.streamed.optimizer.decay is not None)

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Let the model compute with the moving average of its weights inside the context. Collective."""
        if self.streamed is not None:
            return self.streamed.averaged()
        assert self.ema is not None  # the caller has checked that there is one
        return self.ema.swapped()

    @property
    def is_zero(self) -> bool:
        """Whether DeepSpeed holds the weights and the optimizer in shards."""
        return bool(self.accelerator.distributed_type == DistributedType.DEEPSPEED)


def whole_trainables(train_state: TrainState) -> dict[str, Tensor]:
    """Return the trainable weights by name, on the CPU, gathered from all ranks. Collective: every rank calls it."""
    if not train_state.is_zero:
        return {name: p.detach().cpu() for name, p in train_state.transformer.named_parameters() if p.requires_grad}
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {}
    for name, parameter in train_state.transformer.named_parameters():
        if parameter.requires_grad:
            full = safe_get_full_fp32_param(parameter)
            if train_state.accelerator.is_main_process:
                weights[name] = full.cpu()
    return weights


def save(train_state: TrainState, config: RunConfig, step: int, facts: Mapping[str, Any]) -> None:
    """Write ``checkpoint-<step>`` and delete all but the newest of them. Collective: every rank calls it.

    It holds the weights (LoRA in the diffusers format), the optimizer and ``state.json`` with ``facts`` and the
    resolved configuration.

    Raises:
        CogtuneError: it cannot be written; earlier checkpoints are untouched.
    """
    accelerator, output = train_state.accelerator, config.output
    target = RunFolder(output).checkpoint(step)
    aside = partial_path(target)
    with _all_or_none(accelerator, aside):
        if accelerator.is_main_process:
            partial_folder(target)
            if train_state.is_zero:
                with os_errors_explained(target):
                    (aside / ZERO_TAG).mkdir()  # DeepSpeed ignores a failure to create it
    files: dict[str, str] = {}
    if train_state.is_zero:
        failures = _save_shards(train_state, aside)
        with _all_or_none(accelerator, aside), os_errors_explained(target):
            for failure in failures:
                raise failure
            files = _own_fingerprints(train_state, aside)
        files = {name: value for own in gather_object([files]) for name, value in own.items()}
    if train_state.streamed is not None:
        _save_streamed(train_state, train_state.streamed, aside)
    weights = whole_trainables(train_state) if train_state.is_lora else {}
    with _all_or_none(accelerator, aside):
        if accelerator.is_main_process:
            if train_state.is_lora:
                save_lora(aside / LORA_WEIGHTS_NAME, train_state.transformer, facts, weights)
            elif not train_state.is_zero and train_state.streamed is None:
                with os_errors_explained(target):
                    train_state.transformer.save_pretrained(aside / "transformer")
            if train_state.ema is not None:
                _save_ema(train_state, train_state.ema, aside / AVERAGE_NAME, facts)
            if train_state.is_zero:
                write_text(aside / "latest", ZERO_TAG)  # as DeepSpeed does, for its own tools
            elif train_state.streamed is None:
                _save_optimizer(train_state, aside / OPTIMIZER_NAME)
            with os_errors_explained(target):
                others = [path for path in _files(aside) if path.relative_to(aside).as_posix() not in files]
                files |= fingerprints(others, aside)
            state = {"format": FORMAT, "step": step, **facts, "files": files, "config": config.to_dict()}
            write_sealed(aside / STATE_NAME, state)
            _warn_of(publish_folder(aside, target))
    if accelerator.is_main_process:
        _delete_old(output, config.keep_checkpoints)
    accelerator.wait_for_everyone()


def _warn_of(left: str) -> None:
    if left:
        console.warn(left)


def _delete_old(output: Path, keep: int) -> None:
    """Delete all but the newest checkpoints. Failing to delete one does not end the run."""
    for old in checkpoints(output)[:-keep]:
        try:
            _warn_of(remove_folder(old))
        except CogtuneError as error:
            console.warn(f"{error.message}; the checkpoint is kept")


@contextlib.contextmanager
def _all_or_none(accelerator: Accelerator, aside: Path) -> Iterator[None]:
    """Make the block fail in every process if it fails in one, and delete ``aside`` then. Collective.

    No process deletes what another still writes, and each reports the cause rather than a lost peer.

    Raises:
        CogtuneError: the error of the first process that failed.
    """
    failure = None
    try:
        yield
    except CogtuneError as error:
        failure = error
    except BaseException:
        if accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    failures = [one for one in gather_object([failure]) if one is not None]
    if failures:
        if accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
        raise failure or failures[0]


def _save_shards(train_state: TrainState, aside: Path) -> list[Exception]:
    """Save with DeepSpeed; return the error of this process, if any. Collective.

    DeepSpeed waits for all processes at the end. One that failed must get there as well, or the others wait forever.
    """
    engine, failures = train_state.model, []

    def keeping(write: Callable[..., Any]) -> Callable[..., None]:
        def attempt(*words: Any, **more: Any) -> None:
            try:
                write(*words, **more)
            except Exception as error:
                failures.append(error)

        return attempt

    with contextlib.ExitStack() as stack:
        for owner, name in ((engine.checkpoint_engine, "save"), (engine, "_copy_recovery_script")):
            setattr(owner, name, keeping(getattr(owner, name)))
            stack.callback(delattr, owner, name)
        engine.save_checkpoint(
            str(aside), tag=ZERO_TAG, save_latest=False, exclude_frozen_parameters=train_state.is_lora
        )
    return failures


def _save_streamed(train_state: TrainState, weights: StreamedParameters, aside: Path) -> None:
    """Write the transformer, and each process's share of the state. Collective."""
    accelerator = train_state.accelerator
    weights.settle()
    folders = {False: aside / "transformer"}
    if train_state.averages:
        folders[True] = aside / AVERAGE_NAME / "transformer"
    for averaged, folder in folders.items():
        with _all_or_none(accelerator, aside):
            stream.save_transformer(
                weights, train_state.transformer, folder, writes=accelerator.is_main_process, averaged=averaged
            )
    with _all_or_none(accelerator, aside):
        stream.save_state(weights, aside, accelerator.process_index)


def _save_ema(train_state: TrainState, ema: EMAWeights, folder: Path, facts: Mapping[str, Any]) -> None:
    with os_errors_explained(folder):
        folder.mkdir()
        if not train_state.is_lora:
            with ema.swapped():
                train_state.transformer.save_pretrained(folder / "transformer")
            return
    save_lora(folder / LORA_WEIGHTS_NAME, train_state.transformer, facts, ema.values)


def _save_optimizer(train_state: TrainState, path: Path) -> None:
    scaler = train_state.accelerator.scaler
    state = {"optimizer": train_state.optimizer.state_dict(), "scaler": scaler.state_dict() if scaler else None}
    if train_state.ema is not None:
        state["average"] = train_state.ema.values
    with os_errors_explained(path):
        torch.save(state, path)


def _files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


_SHARD = re.compile(r".*zero_pp_rank_(\d+)_.*\.pt")


def _is_own(train_state: TrainState, name: str) -> bool:
    """Return whether this process checks a file of a checkpoint: its own shard, or on rank 0 any other file."""
    shard = _SHARD.fullmatch(name)
    return bool((int(shard[1]) if shard else 0) == train_state.accelerator.process_index)


def _own_fingerprints(train_state: TrainState, checkpoint: Path) -> dict[str, str]:
    """Return the fingerprints of the shards that this process wrote."""
    shards = (checkpoint / ZERO_TAG).glob("*.pt")
    return fingerprints([path for path in shards if _is_own(train_state, path.name)], checkpoint)


def _check_files(train_state: TrainState, checkpoint: Path) -> None:
    """Check that all files are those that were saved, and match the checksums inside them. Collective.

    Torch and DeepSpeed check neither. Each process checks a part of the files.

    Raises:
        CogtuneError: with every file that is damaged, missing or from another checkpoint, in every process alike.
    """
    problems = changed_files(checkpoint, read_state(checkpoint), lambda name: _is_own(train_state, name))
    for path in _files(checkpoint) if not problems else ():
        if path.suffix != ".pt" or not _is_own(train_state, path.name):
            continue
        try:
            with open_regular(path) as file, zipfile.ZipFile(file) as parts:
                if (part := parts.testzip()) is not None:
                    problems.append(f"checksum mismatch in {path.name} ({part})")
        except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
            problems.append(f"{path.name} is incomplete ({error})")
    problems = [problem for own in gather_object([problems]) for problem in own]
    if problems:
        alone = f": {problems[0]}" if len(problems) == 1 else ""
        raise CogtuneError(
            f"{checkpoint} is damaged{alone}",
            "resume from an earlier checkpoint",
            details=() if alone else problems,
        )


def _check_finite(train_state: TrainState) -> None:
    for name, parameter in train_state.transformer.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            raise ValueError(f"{name} has values that are not finite")


def load(train_state: TrainState, checkpoint: Path) -> None:
    """Restore a checkpoint's weights and optimizer. Collective: every rank calls it.

    Raises:
        CogtuneError: a file is missing or damaged.
    """
    try:
        _check_files(train_state, checkpoint)
        if train_state.is_zero:
            with only_weights():
                loaded, _ = train_state.model.load_checkpoint(
                    str(checkpoint), tag=ZERO_TAG, load_module_strict=not train_state.is_lora
                )
            if loaded is None:
                raise CogtuneError(f"{checkpoint} contains no ZeRO shards", "resume from another checkpoint")
            return
        if train_state.streamed is not None:
            stream.load(train_state.streamed, checkpoint, train_state.accelerator.process_index)
            return
        if train_state.is_lora:
            load_lora(checkpoint / LORA_WEIGHTS_NAME, train_state.transformer)
        else:
            saved = CogVideoXTransformer3DModel.from_pretrained(checkpoint / "transformer")
            train_state.transformer.load_state_dict(saved.state_dict())
        _check_finite(train_state)
        state = torch.load(checkpoint / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        train_state.optimizer.load_state_dict(state["optimizer"])
        if train_state.accelerator.scaler is not None and state["scaler"]:
            train_state.accelerator.scaler.load_state_dict(state["scaler"])
        if train_state.ema is not None:
            train_state.ema.resume(state["average"])
    except torch.OutOfMemoryError:
        raise
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL:? ([\w.]+)", str(error))
        what = f"contains {named[1]}, which no checkpoint does" if named else f"is damaged: {said_by(error)}"
        raise CogtuneError(f"{checkpoint} {what}", "resume from a checkpoint that cogtune wrote") from error
    except (
        ArithmeticError,
        AssertionError,  # DeepSpeed's, where a file is not there
        AttributeError,
        LookupError,
        OSError,
        EOFError,
        RuntimeError,
        TypeError,
        ValueError,
        zipfile.BadZipFile,
        SafetensorError,
    ) as error:
        raise CogtuneError(f"{checkpoint} is damaged: {said_by(error)}", "resume from an earlier checkpoint") from error
