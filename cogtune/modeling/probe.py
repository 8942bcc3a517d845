"""What torch and the decoders can do on this machine, as JSON on standard output: ``python -m cogtune.modeling.probe``.

It runs in a process of its own, since a broken library may end the one that imports it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import sys
import time
from typing import Any

_TOKENS, _HEADS, _WIDTH = 8192, 48, 64
"""Of the attention that kernels are measured at: 5b's heads, and fewer tokens than a video's for the sake of time."""

_LINK_BYTES = 256 << 20
_CODECS = ("h264", "hevc", "vp9", "av1", "mpeg4")


def _attention(device: Any) -> dict[str, float]:
    """Return TFLOP/s of a forward and a backward pass, by kernel."""
    import torch

    from cogtune.modeling.engine.attention import measure

    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    seconds = measure((1, _HEADS, _TOKENS, _WIDTH), dtype, device)
    work = 3.5 * 4.0 * _HEADS * _TOKENS**2 * _WIDTH / 1e12
    return {kernel: round(work / taken, 1) for kernel, taken in seconds.items()}


def _link(device: Any) -> dict[str, float]:
    """Return GB/s between host memory as the engine pins it and the GPU, each way."""
    import torch

    from cogtune.modeling.engine.host import HostArena

    host = HostArena(pin=True).take(_LINK_BYTES)
    card = torch.empty_like(host, device=device)
    found = {}
    for way, to, source in (("up", card, host), ("down", host, card)):
        times = []
        for _ in range(4):
            torch.cuda.synchronize(device)
            began = time.perf_counter()
            to.copy_(source, non_blocking=True)
            torch.cuda.synchronize(device)
            times.append(time.perf_counter() - began)
        found[way] = round(_LINK_BYTES / 1e9 / min(times), 1)
    return found


def _torch() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "sees": torch.cuda.device_count() if torch.cuda.is_available() else 0,
    }
    if not found["sees"]:
        return found
    device = torch.device("cuda", 0)
    found["capability"] = list(torch.cuda.get_device_capability(device))
    found["bf16"] = torch.cuda.is_bf16_supported(including_emulation=False)
    for name, probe in (("attention", _attention), ("link", _link)):
        try:
            found[name] = probe(device)
        except Exception as error:  # a GPU that is full, a kernel that was not built
            found[f"{name}_error"] = (str(error).splitlines() or [type(error).__name__])[0]
    return found


def _decoders() -> dict[str, Any]:
    found: dict[str, Any] = {}
    try:
        import av

        found["av"] = {
            "version": av.__version__,
            "codecs": [name for name in _CODECS if name in av.codecs_available],
        }
    except Exception as error:  # not there, or built for other libraries
        found["av_error"] = str(error)
    if importlib.util.find_spec("decord") is None:
        return found
    try:
        importlib.import_module("decord")
        found["decord"] = {"version": importlib.metadata.version("decord")}
    except Exception as error:
        found["decord_error"] = str(error)
    return found


def probe() -> dict[str, Any]:
    """Return all of it; what fails is there as ``..._error``."""
    found: dict[str, Any] = {"decoders": _decoders()}
    try:
        found["torch"] = _torch()
    except Exception as error:
        found["torch_error"] = (str(error).splitlines() or [type(error).__name__])[0]
    return found


if __name__ == "__main__":
    json.dump(probe(), sys.stdout)
