"""Devices and number formats of tensors."""

from __future__ import annotations

import torch

DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Precisions by the names that configurations use."""


def best_device() -> torch.device:
    """Return the GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def free_bytes(device: torch.device) -> int:
    """Return the memory available to new tensors on ``device``, including what PyTorch has reserved but not used."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    import psutil

    return int(psutil.virtual_memory().available)


def gib_in_use(device: torch.device) -> float:
    """Return the peak memory in GiB: reserved by PyTorch on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_reserved(device)) / 2**30
    import psutil

    return float(psutil.Process().memory_info().rss) / 2**30
