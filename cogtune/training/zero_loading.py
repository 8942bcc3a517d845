"""Loading DeepSpeed's shards without running code that may be pickled in them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

_ONLY_WEIGHTS = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextlib.contextmanager
def only_weights() -> Iterator[None]:
    """Make ``torch.load`` reject everything but tensors, plain values and DeepSpeed's own classes inside the context.

    DeepSpeed calls it with ``weights_only=False``, and PyTorch's environment variable overrides that. Inside the block
    a file with anything else raises ``pickle.UnpicklingError``.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaleProfile, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = os.environ.get(_ONLY_WEIGHTS)
    os.environ[_ONLY_WEIGHTS] = "1"
    try:
        with torch.serialization.safe_globals(
            [DynamicLossScaler, LossScaler, LossScaleProfile, ZeroStageEnum, fragment_address]
        ):
            yield
    finally:
        if before is None:
            del os.environ[_ONLY_WEIGHTS]
        else:
            os.environ[_ONLY_WEIGHTS] = before
