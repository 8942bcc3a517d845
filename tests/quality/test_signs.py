"""Each sign is named by its figures, with what to change; good rows are not accused; the best one is chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cogtune.quality import limits
from cogtune.quality.signs import Reference, Settings, find_signs, with_signs
from cogtune.quality.verdict import choose
from cogtune.run.comparison import Figures, Range, Row

BASE = Figures(
    motion=2.0, flicker=1.0, saturation=0.3, contrast=0.2, sharpness=0.05, clipped=0.02, change=0, drift=0, nearest=1.1,
    loss=0.5, training_loss=0.5,
)  # fmt: skip
GOOD = BASE.model_copy(update={"change": 0.9, "drift": 0.3, "nearest": 0.9, "loss": 0.4, "motion": 3.0})
CLIPS = {
    "motion": Range(low=1.5, high=4.0),
    "flicker": Range(low=0.2, high=0.8),
    "saturation": Range(low=0.2, high=0.4),
    "contrast": Range(low=0.1, high=0.3),
    "sharpness": Range(low=0.03, high=0.06),
    "clipped": Range(low=0.0, high=0.05),
}
SETTINGS = Settings(learning_rate=1e-4, steps=1000, rank=64, alpha=128, clips=1)


def signs(strength: float = 1.0, weaker_loss: float | None = None, **figures: Any) -> dict[str, str]:
    """The signs of figures that are good but for these: the advice by name."""
    reference = Reference(base=BASE, clips=CLIPS, strength=strength, weaker_loss=weaker_loss, settings=SETTINGS)
    return {sign.name: sign.advice for sign in find_signs(GOOD.model_copy(update=figures), reference)}


def test_a_good_row_is_not_accused_and_neither_is_one_of_which_little_is_known() -> None:
    assert signs() == {}
    assert signs(loss=None, training_loss=None, drift=None, nearest=None, change=None) == {}
    unknown = BASE.model_copy(update={"loss": None, "training_loss": None, "nearest": None})
    assert find_signs(GOOD, Reference(base=unknown, clips={})) == []


@pytest.mark.parametrize(
    ("name", "figures", "just_not"),
    [
        ("no effect", {"change": 0.04, "loss": 0.498}, {"change": 0.06, "loss": 0.498}),
        ("no effect", {"change": 0.04, "loss": None, "training_loss": 0.5}, {"change": 0.04, "loss": 0.48}),
        ("too strong", {"loss": 0.53}, {"loss": 0.52}),
        ("too strong", {"flicker": 4.5}, {"flicker": 3.5}),
        ("frozen", {"motion": 0.5}, {"motion": 0.6}),
        ("burnt", {"saturation": 0.51}, {"saturation": 0.49}),
        ("burnt", {"contrast": 0.38}, {"contrast": 0.37}),
        ("burnt", {"clipped": 0.16}, {"clipped": 0.14}),
        ("memorised", {"nearest": 0.3}, {"nearest": 0.4}),
        ("forgot", {"drift": 0.85}, {"drift": 0.75}),
    ],
)
def test_each_sign_is_named_beyond_its_limit_and_not_before(
    name: str, figures: dict[str, Any], just_not: dict[str, Any]
) -> None:
    assert list(signs(**figures)) == [name]
    assert signs(**just_not) == {}


def test_what_the_clips_and_the_base_do_as_well_is_no_sign() -> None:
    still = BASE.model_copy(update={"motion": 0.02})
    assert find_signs(GOOD.model_copy(update={"motion": 0.0}), Reference(base=still, clips=CLIPS)) == []
    near = BASE.model_copy(update={"nearest": 0.3})
    assert find_signs(GOOD.model_copy(update={"nearest": 0.25}), Reference(base=near, clips=CLIPS)) == []
    vivid = BASE.model_copy(update={"saturation": 0.6})
    assert find_signs(GOOD.model_copy(update={"saturation": 0.7}), Reference(base=vivid, clips=CLIPS)) == []


def test_the_advice_names_the_runs_own_settings() -> None:
    weak = signs(change=0.01, loss=0.5)["no effect"]
    assert "--learning-rate, such as 0.0003 instead of 0.0001" in weak
    assert "--steps than 1,000" in weak
    strong = signs(loss=0.6)["too strong"]
    assert "--learning-rate, such as 3e-05 instead of 0.0001" in strong
    assert "--alpha of at most the rank, 64, instead of 128" in strong
    tripled = signs(strength=3, weaker_loss=0.4, loss=0.45)["too strong"]
    assert "lower --lora-scale than 3" in tripled
    assert "--learning-rate" not in tripled, "the weights are not at fault, only their strength"
    learned = signs(nearest=0.1)["memorised"]
    assert learned.startswith("train on several varied clips, not one")
    assert "--rank, such as 32 instead of 64" in learned
    assert "--fps" in signs(motion=0.1)["frozen"]


def row(label: str, strength: float = 1.0, step: int | None = None, **figures: Any) -> Row:
    return Row(
        label=label, weights=label, digest=label, step=step, strength=strength, videos=[], signs=[],
        figures=GOOD.model_copy(update=figures),
    )  # fmt: skip


OF_BASE = row("base").model_copy(update={"figures": BASE, "strength": None})


def verdict(*rows: Row) -> tuple[str | None, str]:
    judged = with_signs(rows, OF_BASE, CLIPS, SETTINGS)
    number, words = choose(judged, OF_BASE, CLIPS)
    return (None if number is None else judged[number].title), words


def test_the_lowest_loss_without_signs_is_chosen() -> None:
    chosen, words = verdict(row("a", loss=0.42), row("b", loss=0.38), row("c", loss=0.3, nearest=0.1))
    assert chosen == "b"
    assert words.startswith("Take b: the lowest held-out loss of those without signs of a problem: 0.38, -24% from")
    assert words.endswith(" 1 of the others has signs of a problem.")


def test_of_equal_losses_the_one_that_changes_least_is_chosen() -> None:
    chosen, words = verdict(row("a", loss=0.380, drift=0.5), row("b", loss=0.382, drift=0.2))
    assert chosen == "b"
    assert words.startswith(
        "Take b: a held-out loss within 1% of the lowest of those without signs of a problem: 0.382"
    )
    assert verdict(row("a", loss=0.38, step=200), row("b", loss=0.38, step=100))[0] == "b"


def test_a_lora_at_too_high_a_strength_is_named_by_its_lower_one() -> None:
    rows = with_signs([row("a", 1.0, loss=0.38), row("a", 3.0, loss=0.45)], OF_BASE, CLIPS, SETTINGS)
    assert [[sign.name for sign in one.signs] for one in rows] == [[], ["too strong"]]
    other = with_signs([row("a", 1.0, loss=0.38), row("b", 3.0, loss=0.45)], OF_BASE, CLIPS, SETTINGS)
    assert other[1].signs == []
    assert verdict(row("a", 0.5, loss=0.4), row("a", 1.0, loss=0.38))[0] == "a"
    assert verdict(row("a", 0.5, loss=0.4), row("a", 1.0, loss=0.5))[0] == "a at strength 0.5"


def test_without_losses_the_one_that_looks_like_the_clips_is_chosen() -> None:
    lost: dict[str, Any] = {"loss": None, "training_loss": None}
    chosen, words = verdict(row("a", sharpness=0.09, **lost), row("b", sharpness=0.05, **lost))
    assert chosen == "b"
    assert "it looks most like the training clips" in words


def test_where_none_is_good_none_is_taken() -> None:
    chosen, words = verdict(row("a", motion=0.1, drift=0.9), row("b", motion=0.1))
    assert chosen is None
    assert words == "All of them have signs of a problem: frozen, forgot. b has the fewest: frozen."
    alike = [row("a", drift=0.9, loss=0.5), row("b", drift=0.9, loss=0.4), row("c", drift=0.9, motion=0.1)]
    words = verdict(*alike)[1]
    assert words == (
        "All of them have signs of a problem: forgot, frozen. b has the lowest loss of the 2 with the fewest."
    )
    assert verdict(*alike[:2])[1] == "All of them have signs of a problem: forgot. b has the lowest loss."
    assert verdict(alike[0])[1] == "It has signs of a problem: forgot."
    assert verdict(row("a", change=0.0, loss=0.5))[1].startswith("None of them has an effect")
    assert verdict()[1] == "There is nothing to choose from: only the base was sampled."


def test_only_a_checkpoint_that_has_an_earlier_one_is_told_of_it() -> None:
    rows = with_signs([row("a", step=100, drift=0.9), row("b", step=200, drift=0.9)], OF_BASE, CLIPS, SETTINGS)
    first, second = ([part for sign in one.signs for part in sign.advice.split("; ")] for one in rows)
    assert "use an earlier checkpoint" not in first
    assert second.count("use an earlier checkpoint") == 1
    assert "use a lower --lora-scale than 1" in first
    alone = with_signs([row("a", step=None, drift=0.9)], OF_BASE, CLIPS, SETTINGS)
    assert "use an earlier checkpoint" in alone[0].signs[0].advice


def test_the_limits_are_in_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "compare.md").read_text()
    table = [line for line in page.splitlines() if line.startswith("|")]
    for limit in limits.LIMITS:
        assert f"| {limit.sign} | {limit.told} | {limit.reason} |" in table
