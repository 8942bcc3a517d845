"""Remarks on what is allowed in a request but may be a mistake."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from cogtune.commands.infer.sampling_config import SamplingConfig
from cogtune.data.video.images import image_warnings
from cogtune.modeling.lora_files import Lora
from cogtune.models.checkpoint_configs import fingerprint
from cogtune.models.tokens import cut_short, token_counter
from cogtune.system import console


class Remarks:
    """Remarks on requests, each made once."""

    def __init__(self) -> None:
        self._made: set[str] = set()

    def _make(self, how: Callable[[str], None], text: str) -> None:
        if text not in self._made:
            self._made.add(text)
            how(text)

    def with_alpha(self, lora: Lora, alpha: float | None) -> Lora:
        """Return the LoRA with the alpha that is asked for, and warn of what is assumed."""
        if lora.changes_nothing:
            self._make(
                console.warn, f"{lora.path} has no effect: all of its B matrices are zero, as in an untrained LoRA"
            )
        silent, rank = lora.without_alpha, lora.ranks[0]
        if alpha is None:
            if silent:
                whole = "" if len(silent) == len(lora.pairs) else f" of {len(silent)} of its {len(lora.pairs)} layers"
                self._make(
                    console.warn,
                    f"{lora.path} does not record the alpha{whole}; assuming the rank, {rank} (full strength). "
                    f"If it was trained with another alpha, such as {rank / 2:g}, pass it as --lora-alpha",
                )
            return lora
        if not silent and any(said != alpha for said in lora.alphas):
            told = ", ".join(f"{said:g}" for said in lora.alphas)
            self._make(console.note, f"using --lora-alpha {alpha:g} instead of {told}, which {lora.path} records")
        return lora.with_alpha(alpha)

    def advise(self, recipe: SamplingConfig, images: Sequence[Path]) -> None:
        """Warn of what is allowed but may be a mistake."""
        weights = recipe.transformer or recipe.base / "transformer"
        for lora, _ in recipe.loras:
            trained_on = (lora.facts.get("identity") or {}).get("model")
            if trained_on is not None and trained_on != fingerprint(weights.parent, weights.name):
                self._make(
                    console.warn,
                    f"the LoRA was trained on {lora.facts.get('base_model')}, whose weights differ from those in "
                    f"{weights.parent}; the video may be poor",
                )
        for advice in recipe.spec.size_advice(recipe.size):
            self._make(console.note, f"size {advice}")
        prompts = list(dict.fromkeys(row.prompt for row in recipe.rows))
        for told in cut_short(prompts, recipe.spec.max_text_seq_length, token_counter(str(recipe.base))):
            self._make(console.warn, f"--prompt: {told}")
        for image in images:
            for told in image_warnings(image):
                self._make(console.warn, told)
