"""Similarity of frames and prompt by a CLIP model that is on this machine. Nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cogtune.data.frames import reshape
from cogtune.data.video.clips import Pixels
from cogtune.models.geometry import Size
from cogtune.models.locate import loading
from cogtune.system.errors import CogtuneError, UsageError

_FRAMES = 8
"""Frames of a video that are looked at, spread evenly."""

_MEAN, _DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of red, green and blue. Source: ``OPENAI_CLIP_MEAN`` and ``OPENAI_CLIP_STD`` of transformers."""


class ClipModel:
    """A CLIP model of transformers, on the CPU."""

    def __init__(self, reference: str) -> None:
        """Load a model.

        Args:
            reference: a folder, or a Hub id that was downloaded before.

        Raises:
            UsageError: it is not on this machine.
            CogtuneError: it is not a CLIP model, or damaged.
        """
        from huggingface_hub import snapshot_download
        from transformers import AutoTokenizer, CLIPModel

        folder = Path(reference).expanduser()
        if not folder.is_dir():
            try:
                folder = Path(snapshot_download(reference, local_files_only=True))
            except (OSError, ValueError) as error:  # among them the library's own, for what is no id
                raise UsageError(
                    f"--clip: {reference} is not on this machine",
                    f"run `hf download {reference}` first, or pass a folder",
                ) from error
        with loading(folder):
            self._model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if self._model.config.model_type != "clip":
            raise CogtuneError(
                f"--clip: {reference} is not a CLIP model", "pass one such as openai/clip-vit-base-patch32"
            )

    @torch.no_grad()
    def similarity(self, frames: Pixels, prompt: str) -> float:
        """Return the mean cosine similarity of a video's frames ``uint8 [F, H, W, 3]`` and its prompt."""
        places = np.linspace(0, len(frames) - 1, min(_FRAMES, len(frames))).round().astype(int)
        side = int(self._model.config.vision_config.image_size)
        pixels = reshape(frames[places], Size(len(places), side, side)).float().div(255)
        mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in (_MEAN, _DEVIATION))
        most = int(self._model.config.text_config.max_position_embeddings)
        tokens = self._tokenizer([prompt], truncation=True, max_length=most, return_tensors="pt")
        answer = self._model(pixel_values=(pixels - mean) / deviation, **tokens)
        alike: Tensor = torch.nn.functional.cosine_similarity(answer.image_embeds, answer.text_embeds)
        return float(alike.mean())
