"""DeepSpeed's compiled kernels, built such that a run killed during the build does not block others."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.cpp_extension import get_default_build_root

from cogtune.system import console
from cogtune.system.locks import exclusive_folder

_FOLDER = "TORCH_EXTENSIONS_DIR"

ADAM, COLLECTIVES = "cpu_adam", "deepspeed_shm_comm"
"""DeepSpeed's names of the kernels that cogtune builds."""


@contextlib.contextmanager
def building(kernel: str) -> Iterator[None]:
    """Make PyTorch compile in a folder of cogtune, which this process locks during the block.

    PyTorch guards a build with a lock file, and waits forever for one that a killed process left. In an exclusively
    held folder such a file is stale.

    Args:
        kernel: name of the kernel to build; a missing one is announced, since compiling takes minutes.

    Raises:
        CogtuneError: the folder cannot be written.
    """
    before = os.environ.get(_FOLDER)
    version = f"cogtune-{sys.implementation.cache_tag}-torch-{torch.__version__}"
    folder = Path(before or get_default_build_root()) / version
    with exclusive_folder(folder, wait=True, waiting="waiting for another process to compile DeepSpeed's kernels"):
        if not list((folder / kernel).glob("*.so")):
            console.note(f"compiling DeepSpeed's {kernel} for this machine; this takes a few minutes, once")
        for left in folder.glob("*/lock"):
            left.unlink()
        os.environ[_FOLDER] = str(folder)
        try:
            yield
        finally:
            os.environ.pop(_FOLDER)
            if before is not None:
                os.environ[_FOLDER] = before


def load_collectives() -> None:
    """Build DeepSpeed's CPU collectives before the processes connect, so that none waits for another's build."""
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None and builder.is_compatible():
        with building(COLLECTIVES):
            builder.load()
