"""What DeepSpeed compiles on this machine: built and loaded so that a run that is killed meanwhile hinders no other."""

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
"""What DeepSpeed calls its kernels that cogtune has it build."""


@contextlib.contextmanager
def building(kernel: str) -> Iterator[None]:
    """While the block runs, what PyTorch compiles stands in a folder of cogtune's own, which this process alone holds.

    PyTorch guards a build by a file, and waits without end for one that a killed process left. In a folder where only
    holders build, such a file is nobody's.

    Args:
        kernel: what is built, if it is not there: that is announced, as it takes minutes.

    Raises:
        CogtuneError: the folder cannot be written.
    """
    before = os.environ.get(_FOLDER)
    version = f"cogtune-{sys.implementation.cache_tag}-torch-{torch.__version__}"
    folder = Path(before or get_default_build_root()) / version
    with exclusive_folder(folder, wait=True, waiting="waiting for DeepSpeed's kernels, which another process compiles"):
        if not list((folder / kernel).glob("*.so")):
            console.note(f"compiling DeepSpeed's {kernel} for this machine, once: this takes a few minutes")
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
    """Build what DeepSpeed's processes talk by where there is no GPU, before they meet and one waits for the other."""
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None and builder.is_compatible():
        with building(COLLECTIVES):
            builder.load()
