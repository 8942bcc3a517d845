"""CLIP similarity by a tiny model that is made here; nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from cogtune.quality.clip_similarity import ClipModel
from cogtune.system.errors import CogtuneError, UsageError
from tests.support.drawn import disc, grey


def tiny_clip(folder: Path) -> Path:
    """A CLIP model of random weights, with a vocabulary of letters."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    text = {"vocab_size": len(words), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 12, "bos_token_id": len(words) - 2,
            "eos_token_id": len(words) - 1}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 16}  # fmt: skip
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokens = {"tokenizer_class": "CLIPTokenizer", "bos_token": words[-2], "eos_token": words[-1]}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**tokens, "unk_token": words[-1], "pad_token": words[-1]})
    )
    return folder


def test_similarity_is_the_cosine_of_frames_and_prompt(tmp_path: Path) -> None:
    model = ClipModel(str(tiny_clip(tmp_path / "clip")))
    found = model.similarity(disc(3.0), "a disc")
    assert -1 <= found <= 1
    assert model.similarity(disc(3.0), "a disc") == found
    assert model.similarity(disc(3.0), "waves of the sea " * 20) != found
    assert model.similarity(grey(9, 200), "a disc") != found
    assert model.similarity(disc(3.0)[:1], "a disc") == pytest.approx(model.similarity(disc(0.0), "a disc"), abs=1e-5)


def test_a_model_that_is_not_here_is_not_downloaded(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="openai/none is not on this machine") as caught:
        ClipModel("openai/none")
    assert "hf download openai/none" in caught.value.hint
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CogtuneError):
        ClipModel(str(tmp_path))
