"""Checks of captions, each by itself and compared with others."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from cogtune.data.findings import Finding, finding, listed
from cogtune.data.layouts.base import Sample, shortened

TOKENS_PER_WORD = 1.35
"""About the number of T5 tokens per English word, for use without the tokenizer."""

_UNPARTED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)
"""Characters of scripts without spaces between words: Thai, Lao, Burmese, Khmer, Japanese and Chinese."""

_BATCH = 1000
_LATIN = ("LATIN", "FULLWIDTH LATIN", "MODIFIER LETTER")

_NOT_TEXT = re.compile("[\0-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufffd]")
"""Control characters other than white space, and U+FFFD, which stands for one that could not be decoded."""

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


CountTokens = Callable[[Sequence[str]], list[int]]
"""Function that counts the tokens of captions."""

CAPTION_TOKENS = 226
"""The prompt limit in the configs of all five models, for use without a spec."""

MOST_OTHER_LETTERS = 0.3
"""Fraction of non-Latin letters above which a caption does not count as English."""

FEWEST_WORDS = 8
"""Fewest words of a caption in Latin script to judge it by stop words: tags and names have none."""

_ENGLISH = (
    "a an and are as at be by for from has he her his in is it its of on or she that the their they this to "
    "was were which while who with"
)
_OTHERS = {
    "German": "der das den dem ein eine einen einem einer und ist mit auf im vor nicht sich wird",
    "French": "le la les un une des du et est dans avec sur qui aux elle sa ses",
    "Spanish": "el los las una en con por su sus del que se",
    "Italian": "il lo gli uno nel nella di che della sono",
    "Portuguese": "os uma um da em com não ao na",
    "Dutch": "het een op met zijn naar wordt",
    "Polish": "jest na się nie oraz przez",
}
"""Stop words, several of which are in most sentences of a language, without those that are also English words."""

ENGLISH = frozenset(_ENGLISH.split())
OTHERS = frozenset(word for words in _OTHERS.values() for word in words.split())


def check_captions(samples: Sequence[Sample], limit: int, count_tokens: CountTokens | None) -> Iterator[Finding]:
    """Yield findings about each caption by itself; ``limit`` is the number of tokens that the model reads."""
    for start in range(0, len(samples), _BATCH):
        batch = samples[start : start + _BATCH]
        captions = [sample.caption for sample in batch]
        words = [count_words(caption) for caption in captions]
        tokens = count_tokens(captions) if count_tokens else [round(count * TOKENS_PER_WORD) for count in words]
        for sample, word_count, token_count in zip(batch, words, tokens, strict=True):
            yield from _check_words(sample, word_count)
            if token_count > limit:
                about = "" if count_tokens else "about "
                yield finding(
                    "long-caption",
                    sample.id,
                    f"has a caption of {word_count} words, {about}{token_count} tokens; the model reads {limit}",
                    "shorten it, since the rest is ignored",
                )


def count_words(text: str) -> int:
    """Return the words of a text; in scripts without spaces between words, such as Chinese, each character is one."""
    return sum(max(1, len(_UNPARTED.findall(part))) for part in text.split())


def _check_words(sample: Sample, words: int) -> Iterator[Finding]:
    if words == 0:
        yield finding("empty-caption", sample.id, "has an empty caption", "describe what the clip shows")
    elif words == 1:
        yield finding(
            "one-word-caption",
            sample.id,
            f"has a caption of one word: '{sample.caption[:60]}'",
            "describe what the clip shows in a sentence or more",
        )
    if odd := sorted(set(_NOT_TEXT.findall(sample.caption))):
        names = listed([f"U+{ord(character):04X}" for character in odd])
        yield finding(
            "not-text",
            sample.id,
            f"has a caption with characters that are not text ({names}): {sample.caption[:60]!a}",
            "remove them, or save the captions again as UTF-8",
        )
    if reason := not_english(sample.caption):
        yield finding(
            "not-english",
            sample.id,
            f"has a caption that does not seem to be in English ({reason}): '{shortened(sample.caption, 60)}'",
            "translate it: the models were trained on English captions",
        )


def not_english(caption: str) -> str:
    """Return why a caption does not seem to be in English; empty if it may be.

    Checks the script and, in long captions in Latin script, the stop words of seven other languages.
    """
    letters = [character for character in caption if character.isalpha()]
    if len(letters) < 2:
        return ""
    others = sum(not unicodedata.name(letter, "").startswith(_LATIN) for letter in letters if letter > "\u024f")
    if others > MOST_OTHER_LETTERS * len(letters):
        return f"{others / len(letters):.0%} of its letters are not Latin"
    words = re.findall(r"\w+", caption.lower())
    if len(words) < FEWEST_WORDS:
        return ""
    english, foreign = sum(word in ENGLISH for word in words), sum(word in OTHERS for word in words)
    return f"{foreign} of {len(words)} words are of other languages" if foreign > max(1, 2 * english) else ""


# --------------------------------------------------------------------------------------------------- repeats


def check_repeats(
    samples: Sequence[Sample], digest: Callable[[Path], str], tell: Callable[[], object] = lambda: None
) -> Iterator[Finding]:
    """Yield findings about duplicate clips and captions, under any name or spelling.

    Args:
        digest: returns a file's digest; called only for files of equal size.
        tell: called as each of those is compared.
    """
    by_video = _grouped((sample.video, sample.id) for sample in samples)
    for ids in by_video.values():
        for repeat in ids[1:]:
            yield finding(
                "listed-twice",
                repeat,
                f"is the same clip as {ids[0]}",
                "remove one of the two lines, unless the clip should count twice",
            )
    yield from _check_copies({video: ids[0] for video, ids in by_video.items()}, digest, tell)
    by_caption = _grouped((sample.caption, sample.id) for sample in samples if sample.caption)
    for ids in by_caption.values():
        if len(ids) > 1:
            yield finding("same-caption", ids[0], f"has the same caption as {listed(ids[1:])}")
    alike = _grouped((normal_form(caption), ids[0]) for caption, ids in by_caption.items())
    for form, ids in alike.items():
        if form and len(ids) > 1:
            yield finding(
                "similar-caption",
                ids[0],
                f"has the same caption as {listed(ids[1:])}, except for capitalization, punctuation or spaces",
                "describe the differences between the clips",
            )


def _check_copies(
    videos: dict[Path, str], digest: Callable[[Path], str], tell: Callable[[], object]
) -> Iterator[Finding]:
    """Yield findings about files with the same content; only those of equal size are read."""
    by_size = _grouped((size, video) for video in videos if (size := _size(video)))
    for same_size in by_size.values():
        if len(same_size) > 1:
            for copies in _grouped(_digests(same_size, digest, tell)).values():
                for copy in copies[1:]:
                    yield finding(
                        "copied-video",
                        videos[copy],
                        f"has the same content as {videos[copies[0]]}",
                        "remove one of them, unless it should count twice",
                    )


def _digests(
    videos: Sequence[Path], digest: Callable[[Path], str], tell: Callable[[], object]
) -> Iterator[tuple[str, Path]]:
    for video in videos:
        tell()
        yield digest(video), video


def _size(video: Path) -> int:
    try:
        return video.stat().st_size if os.access(video, os.R_OK) and video.is_file() else 0
    except OSError:
        return 0


def normal_form(caption: str) -> str:
    """Return a caption without differences in case, Unicode form, punctuation and spaces."""
    plain = unicodedata.normalize("NFKC", caption).casefold()
    return " ".join(re.findall(r"\w+", plain))


def _grouped(pairs: Iterable[tuple[K, T]]) -> dict[K, list[T]]:
    groups: defaultdict[K, list[T]] = defaultdict(list)
    for key, value in pairs:
        groups[key].append(value)
    return groups
