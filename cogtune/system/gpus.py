"""The NVIDIA GPUs of this machine, queried through the driver (NVML), without torch or memory on a GPU.

NVML's functions and structures: https://docs.nvidia.com/deploy/nvml-api/.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass

from cogtune.system.numbers import whole_number

_LIBRARY = "libnvidia-ml.so.1"
_NAME_BYTES = 96
_VISIBLE = "CUDA_VISIBLE_DEVICES"


class _Memory(ctypes.Structure):
    """``nvmlMemory_v2_t``, which does not count the driver's own memory as used."""

    _fields_ = (
        ("version", ctypes.c_uint),
        ("total", ctypes.c_ulonglong),
        ("reserved", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


@dataclass(frozen=True)
class Gpu:
    """One GPU: its name, and its memory in bytes, in total and in use by all programs."""

    name: str
    total: int
    used: int

    @property
    def free(self) -> int:
        """Unused memory in bytes."""
        return max(0, self.total - self.used)


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError:  # no driver: no GPU
        return None
    return None if library.nvmlInit_v2() else library


def _handle(library: ctypes.CDLL, word: str) -> ctypes.c_void_p | None:
    """Return the GPU that a word of ``CUDA_VISIBLE_DEVICES`` refers to by number or UUID."""
    handle = ctypes.c_void_p()
    if (number := whole_number(word)) is not None:
        failed = library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(number), ctypes.byref(handle))
    else:
        failed = library.nvmlDeviceGetHandleByUUID(word.encode(), ctypes.byref(handle))
    return None if failed else handle


def _words(library: ctypes.CDLL) -> Sequence[str]:
    visible = os.environ.get(_VISIBLE)
    if visible is not None:
        return [word.strip() for word in visible.split(",") if word.strip()]
    count = ctypes.c_uint()
    library.nvmlDeviceGetCount_v2(ctypes.byref(count))
    return [str(number) for number in range(count.value)]


def gpus() -> tuple[Gpu, ...]:
    """Return the GPUs that CUDA programs started from here may use; none without NVIDIA's driver."""
    library = _library()
    if library is None:
        return ()
    found = []
    for word in _words(library):
        handle = _handle(library, word)
        if handle is None:  # CUDA also ignores everything after the first invalid word
            break
        name = ctypes.create_string_buffer(_NAME_BYTES)
        memory = _Memory(version=ctypes.sizeof(_Memory) | 2 << 24)
        failed = library.nvmlDeviceGetName(handle, name, ctypes.c_uint(_NAME_BYTES))
        if failed or library.nvmlDeviceGetMemoryInfo_v2(handle, ctypes.byref(memory)):
            break
        found.append(Gpu(name.value.decode(errors="replace"), int(memory.total), int(memory.used)))
    return tuple(found)


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver: its version, and the newest CUDA version that it supports, such as ``12.8``."""

    version: str
    cuda: str


def driver() -> Driver | None:
    """Return the driver of this machine; None if there is none."""
    library = _library()
    if library is None:
        return None
    version, cuda = ctypes.create_string_buffer(_NAME_BYTES), ctypes.c_int()
    if library.nvmlSystemGetDriverVersion(version, ctypes.c_uint(_NAME_BYTES)):
        return None
    failed = library.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(cuda))
    newest = "" if failed else f"{cuda.value // 1000}.{cuda.value % 1000 // 10}"
    return Driver(version.value.decode(errors="replace"), newest)
