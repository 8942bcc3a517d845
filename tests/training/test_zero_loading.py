"""DeepSpeed's shards are loaded without running what is pickled in them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cogtune.system.errors import CogtuneError
from cogtune.training import checkpoint
from cogtune.training.zero_loading import only_weights
from tests.support.payload import Payload

pytestmark = pytest.mark.slow  # importing DeepSpeed takes longer than all of them


def saved(value: Any, folder: Path) -> Path:
    torch.save(value, folder / "shard.pt")
    return folder / "shard.pt"


def test_what_deepspeed_saves_of_its_own_is_loaded(tmp_path: Path) -> None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaleProfile, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    scaler = DynamicLossScaler(
        init_scale=65536, scale_window=1000, min_scale=1, delayed_shift=1, consecutive_hysteresis=False,
        dtype=torch.float16,
    )  # fmt: skip
    value = {
        "loss_scaler": LossScaler(scale=1.0),
        "dynamic": scaler,
        "profile": next(iter(LossScaleProfile)),
        "stage": ZeroStageEnum.gradients,
        "mappings": [{"a": fragment_address(numel=3, start=2)}],
        "weights": torch.ones(3),
    }
    with only_weights():
        found = torch.load(saved(value, tmp_path), weights_only=False)
    assert type(found["loss_scaler"]) is LossScaler
    assert vars(found["dynamic"]) == vars(scaler)
    assert (found["profile"], found["stage"]) == (next(iter(LossScaleProfile)), ZeroStageEnum.gradients)
    assert found["mappings"] == value["mappings"]
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_a_payload_is_refused_and_never_runs(tmp_path: Path) -> None:
    file = saved({"weights": torch.ones(3), "more": Payload(tmp_path / "ran")}, tmp_path)
    with pytest.raises(pickle.UnpicklingError), only_weights():
        torch.load(file, weights_only=False)
    assert not (tmp_path / "ran").exists()
    torch.load(file, weights_only=False)
    assert (tmp_path / "ran").exists()  # it does run where nothing keeps it from that


def test_the_error_names_the_checkpoint_and_gives_no_bad_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Engine:
        def load_checkpoint(self, *_words: Any, **_more: Any) -> Any:
            return torch.load(file, weights_only=False)

    file = saved(Payload(tmp_path / "ran"), tmp_path)
    monkeypatch.setattr(checkpoint, "_check_files", lambda *_: None)
    state: Any = SimpleNamespace(is_zero=True, model=Engine(), is_lora=False)
    with pytest.raises(CogtuneError, match=r"checkpoint-4 contains \w+\.mkdir, which no checkpoint does") as caught:
        checkpoint.load(state, tmp_path / "checkpoint-4")
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
