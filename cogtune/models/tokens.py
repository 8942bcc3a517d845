"""Counting tokens with a model's own tokenizer, without the seconds that loading all of transformers takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from cogtune.models.download import cached_file
from cogtune.models.locate import locate
from cogtune.models.variants import built_in, published

MODEL = "spiece.model"

CountTokens = Callable[[Sequence[str]], list[int]]


def token_counter(reference: str, id_token: str = "") -> CountTokens | None:
    """Return what counts the tokens of captions as the model reads them, the one that ends each included.

    None when the model's tokenizer is not on this machine; nothing is downloaded.

    Args:
        reference: what the user calls the model, as for :func:`cogtune.models.locate.locate`.
        id_token: a word that is put in front of every caption.
    """
    file = _tokenizer_file(reference)
    if file is None:
        return None
    from sentencepiece import SentencePieceProcessor

    try:
        processor = SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError):  # damaged: loading the model says so better
        return None

    def count(captions: Sequence[str]) -> list[int]:
        whole = [f"{id_token} {caption}".strip() for caption in captions]
        return [len(pieces) + 1 for pieces in processor.encode(whole)]

    return count


def cut_short(prompts: Sequence[str], limit: int, count: CountTokens | None) -> list[str]:
    """Return what is to be said of each prompt that is longer than the ``limit`` of tokens that the model reads.

    Args:
        count: as :func:`token_counter` gives it; nothing is said without.
    """
    counts = count(prompts) if count is not None else []
    return [
        f"{prompt[:40].strip()!r}... has {tokens} tokens, but the model reads only {limit}; the rest is ignored"
        for prompt, tokens in zip(prompts, counts, strict=False)
        if tokens > limit
    ]


def _tokenizer_file(reference: str) -> Path | None:
    folder = Path(reference).expanduser()
    if built_in(reference) is not None and not folder.is_dir():
        folder = locate(reference)
    if folder.is_dir():
        file = folder / "tokenizer" / MODEL
        return file if file.is_file() else None
    row = published(reference)
    for repo_id in row.hub_ids if row is not None else (reference,):
        if (found := cached_file(repo_id, f"tokenizer/{MODEL}")) is not None:
            return found
    return None
