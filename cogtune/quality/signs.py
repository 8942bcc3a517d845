"""Signs that a fine-tune went wrong, by its figures, and what to change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cogtune.config.run_config import RunConfig
from cogtune.quality import limits
from cogtune.run.comparison import Figures, Range, Row, Sign


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of the run that made the weights, for the advice; None for what is not known."""

    learning_rate: float | None = None
    steps: int | None = None
    rank: int | None = None
    alpha: float | None = None
    clips: int | None = None

    @classmethod
    def of(cls, config: RunConfig, *, steps: int | None, clips: int | None) -> Settings:
        """Return those of a configuration."""
        lora = config.type == "lora"
        return cls(
            learning_rate=config.learning_rate,
            steps=steps,
            rank=config.rank if lora else None,
            alpha=config.lora_alpha if lora else None,
            clips=clips,
        )


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What a row's figures are compared with."""

    base: Figures
    clips: Mapping[str, Range]
    """The range of each look over the training clips; empty if they are not known."""
    strength: float = 1.0
    """What the LoRA's strength is multiplied by."""
    weaker_loss: float | None = None
    """The lowest loss of the same weights at a lower strength."""
    has_earlier: bool = True
    """Whether there may be a checkpoint that was trained less."""
    settings: Settings = Settings()

    def highest(self, look: str) -> float:
        """Return the highest usual value of a look: the base's, or the upper end of the training clips' range."""
        there = [float(getattr(self.base, look)), *(one.high for one in [self.clips.get(look)] if one)]
        return max(there)

    def lowest(self, look: str) -> float:
        """Return the lowest usual value of a look."""
        there = [float(getattr(self.base, look)), *(one.low for one in [self.clips.get(look)] if one)]
        return min(there)


def loss_of(figures: Figures) -> float | None:
    """Return the loss to go by: that of the validation samples, else that of the training samples."""
    return figures.training_loss if figures.loss is None else figures.loss


def find_signs(figures: Figures, reference: Reference) -> list[Sign]:
    """Return the signs in a row's figures. Weights without effect have no other."""
    if (found := _no_effect(figures, reference)) is not None:
        return [found]
    looks = (_too_strong, _frozen, _burnt, _memorised, _forgot)
    return [sign for look in looks if (sign := look(figures, reference)) is not None]


def with_signs(rows: Sequence[Row], base: Row, clips: Mapping[str, Range], settings: Settings) -> list[Row]:
    """Return rows with the signs that their figures show."""
    judged = []
    for row in rows:
        weaker = [loss_of(other.figures) for other in rows if _is_weaker(other, row)]
        reference = Reference(
            base=base.figures,
            clips=clips,
            strength=1.0 if row.strength is None else row.strength,
            weaker_loss=min((loss for loss in weaker if loss is not None), default=None),
            has_earlier=row.step is None or any(other.step is not None and other.step < row.step for other in rows),
            settings=settings,
        )
        judged.append(row.model_copy(update={"signs": find_signs(row.figures, reference)}))
    return judged


def _is_weaker(other: Row, row: Row) -> bool:
    """Return whether two rows are of the same weights, the first at a lower strength."""
    if other.strength is None or row.strength is None:
        return False
    return other.label == row.label and other.strength < row.strength


def _no_effect(figures: Figures, reference: Reference) -> Sign | None:
    if figures.change is None or figures.change >= limits.LEAST_CHANGE.value:
        return None
    loss, before = loss_of(figures), loss_of(reference.base)
    if loss is not None and before is not None and loss < before * (1 - limits.LEAST_GAIN.value):
        return None
    why = f"its videos differ from the base's by {figures.change:.2g}, where 1 is the difference of two prompts"
    if loss is not None and before is not None:
        why += f"; the loss is {loss:.4g}, the base's {before:.4g}"
    return Sign(name="no effect", why=why, advice="; ".join(_more(reference)))


def _too_strong(figures: Figures, reference: Reference) -> Sign | None:
    loss, before, weaker = loss_of(figures), loss_of(reference.base), reference.weaker_loss
    whys = []
    if loss is not None and before is not None and loss >= before * limits.MOST_LOSS.value:
        whys.append(f"the loss is {loss:.4g}, the base's {before:.4g}")
    elif loss is not None and weaker is not None and loss >= weaker * limits.MOST_LOSS_OF_WEAKER.value:
        whys.append(f"the loss is {loss:.4g}, and {weaker:.4g} at a lower strength")
    usual = reference.highest("flicker")
    if figures.flicker >= max(limits.LEAST_FLICKER.value, limits.MOST_FLICKER.value * usual):
        whys.append(f"the flicker is {figures.flicker:.3g} of 255{_usually('at most', usual)}")
    if not whys:
        return None
    return Sign(name="too strong", why="; ".join(whys), advice="; ".join(_less(reference)))


def _frozen(figures: Figures, reference: Reference) -> Sign | None:
    usual = reference.lowest("motion")
    if usual < limits.JUDGED_MOTION.value or figures.motion >= limits.LEAST_MOTION.value * usual:
        return None
    why = f"the motion is {figures.motion:.2g} pixels per frame{_usually('at least', usual)}"
    advice = [
        "check that the clips move within the frames that training reads (--fps, --frames)",
        *_less(reference),
    ]
    return Sign(name="frozen", why=why, advice="; ".join(advice))


def _burnt(figures: Figures, reference: Reference) -> Sign | None:
    whys = []
    for look in ("saturation", "contrast"):
        value, usual = getattr(figures, look), reference.highest(look)
        if value > limits.MOST_COLOUR.value * usual:
            whys.append(f"the {look} is {value:.2g}{_usually('at most', usual)}")
    usual = reference.highest("clipped")
    if figures.clipped > usual + limits.MOST_CLIPPED.value:
        whys.append(f"{figures.clipped:.0%} of the pixels are clipped{_usually('at most', usual)}")
    return Sign(name="burnt", why="; ".join(whys), advice="; ".join(_less(reference))) if whys else None


def _memorised(figures: Figures, reference: Reference) -> Sign | None:
    if figures.nearest is None or figures.nearest >= limits.LEAST_DISTANCE.value:
        return None
    of_base = reference.base.nearest
    if of_base is not None and figures.nearest >= limits.NEARER_THAN_BASE.value * of_base:
        return None
    nearest = f"training clip {figures.nearest_clip}" if figures.nearest_clip else "a training clip"
    why = f"prompts that were not trained on give videos near {nearest}: {figures.nearest:.2g} of what clips are apart"
    clips = reference.settings.clips
    advice = [f"train on more and more varied clips{f' than these {clips}' if clips and clips > 1 else ''}"]
    if clips == 1:
        advice = ["train on several varied clips, not one"]
    return Sign(name="memorised", why=why, advice="; ".join([*advice, *_shorter(reference)]))


def _forgot(figures: Figures, reference: Reference) -> Sign | None:
    if figures.drift is None or figures.drift < limits.MOST_DRIFT.value:
        return None
    why = (
        f"videos of unrelated prompts differ from the base's by {figures.drift:.2g}, where 1 is the difference of two "
        "prompts"
    )
    advice = dict.fromkeys([*_shorter(reference), *_less(reference)[:1]])
    return Sign(name="forgot", why=why, advice="; ".join(advice))


def _more(reference: Reference) -> Iterator[str]:
    """Yield what makes weights stronger."""
    settings = reference.settings
    if settings.learning_rate is not None:
        yield f"use a higher --learning-rate, such as {3 * settings.learning_rate:.1g} instead of {_rate(settings)}"
    else:
        yield "use a higher --learning-rate"
    yield f"train for more --steps than {settings.steps:,}" if settings.steps else "train for more --steps"
    if settings.alpha is not None and settings.rank and settings.alpha < settings.rank:
        yield f"use an --alpha of the rank, {settings.rank}, instead of {settings.alpha:g}"
    yield f"or try it at a higher --lora-scale than {reference.strength:g}"


def _less(reference: Reference) -> list[str]:
    """Return what makes weights weaker."""
    settings, found = reference.settings, []
    if reference.strength > 0.5:
        found.append(f"use a lower --lora-scale than {reference.strength:g}")
        found += _earlier(reference)
    if reference.strength <= 1:
        rate = "a lower --learning-rate"
        if settings.learning_rate is not None:
            rate += f", such as {settings.learning_rate / 3:.1g} instead of {_rate(settings)}"
        found.append(f"train again with {rate}")
        if settings.alpha is not None and settings.rank and settings.alpha > settings.rank:
            found.append(f"use an --alpha of at most the rank, {settings.rank}, instead of {settings.alpha:g}")
    return found


def _earlier(reference: Reference) -> list[str]:
    return ["use an earlier checkpoint"] if reference.has_earlier else []


def _shorter(reference: Reference) -> list[str]:
    """Return what makes weights learn less by heart."""
    settings = reference.settings
    found = _earlier(reference)
    if settings.steps:
        found.append(f"train for fewer --steps than {settings.steps:,}")
    if settings.rank and settings.rank > 16:
        found.append(f"use a lower --rank, such as {settings.rank // 2} instead of {settings.rank}")
    return found


def _usually(bound: str, value: float) -> str:
    return f", {bound} {value:.2g} in the base's videos and the training clips"


def _rate(settings: Settings) -> str:
    return f"{settings.learning_rate:g}"
