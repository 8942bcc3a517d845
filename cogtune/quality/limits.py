"""Every limit by which a sign is named, each with its reason.

``tools/nano/calibrate_compare.py`` counts how often they are right.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limit:
    """A limit: what is compared, with which value, and why that one."""

    sign: str
    rule: str
    """With ``{}`` for the value."""
    value: float
    reason: str

    @property
    def told(self) -> str:
        """The rule with its value."""
        return self.rule.format(f"{self.value:g}")


LEAST_CHANGE = Limit(
    "no effect",
    "the videos of related prompts differ from the base's by less than {}",
    0.05,
    "1 is the difference between videos of different prompts; compressing drawn clips alone made 0.015",
)
LEAST_GAIN = Limit(
    "no effect",
    "and the loss is less than {} below the base's, as a fraction of it",
    0.01,
    "the same weights always have the same loss at fixed noise, so even a small gain is one",
)
MOST_LOSS = Limit(
    "too strong",
    "the loss is {} times the base's or more",
    1.05,
    "weights that predict the held-out clips worse than before training have gone too far",
)
MOST_LOSS_OF_WEAKER = Limit(
    "too strong",
    "or {} times that of the same weights at a lower strength or more",
    1.05,
    "if less of a LoRA predicts clearly better, the rest of it only distorts",
)
MOST_FLICKER = Limit(
    "too strong",
    "or the flicker is {} times the highest of the base's and the training clips'",
    3.0,
    "broken weights sample noise, which no motion explains; how much is an estimate",
)
LEAST_FLICKER = Limit(
    "too strong",
    "and at least {} of 255",
    4.0,
    "below this nobody sees it, and a ratio of two tiny values says nothing",
)
LEAST_MOTION = Limit(
    "frozen",
    "the motion is less than {} of the lowest of the base's and the training clips'",
    0.35,
    "an estimate: far below the slowest of what is usual",
)
JUDGED_MOTION = Limit(
    "frozen",
    "unless that is below {} pixels per frame",
    0.1,
    "where the training clips hardly move, nothing is wrong with videos that do not either",
)
MOST_COLOUR = Limit(
    "burnt",
    "saturation or contrast is more than {} times the highest of the base's and the training clips'",
    1.25,
    "an estimate: far above the highest of what is usual",
)
MOST_CLIPPED = Limit(
    "burnt",
    "or the fraction of clipped pixels is more than {} above the highest of both",
    0.1,
    "an estimate, and a difference, since most clips have next to none",
)
LEAST_DISTANCE = Limit(
    "memorised",
    "videos of prompts that were not trained on are nearer to a training clip than {} of what clips are apart",
    0.35,
    "new drawings of a subject were at 0.65 or more (means of four, for eight clips), compressed copies at 0.08",
)
NEARER_THAN_BASE = Limit(
    "memorised",
    "and than {} of what the base's videos are",
    0.7,
    "if the base's videos are as near, the prompt or the first frame makes them so",
)
MOST_DRIFT = Limit(
    "forgot",
    "the videos of unrelated prompts differ from the base's by {} or more",
    0.8,
    "1 is the difference between videos of different prompts: at 0.8, little of what was there is left",
)

LIMITS = (
    LEAST_CHANGE,
    LEAST_GAIN,
    MOST_LOSS,
    MOST_LOSS_OF_WEAKER,
    MOST_FLICKER,
    LEAST_FLICKER,
    LEAST_MOTION,
    JUDGED_MOTION,
    MOST_COLOUR,
    MOST_CLIPPED,
    LEAST_DISTANCE,
    NEARER_THAN_BASE,
    MOST_DRIFT,
)
"""In the order of the table in the documentation."""

SAME_LOSS = 0.01
"""Losses that differ by less than this fraction count as equal when one checkpoint is chosen."""
