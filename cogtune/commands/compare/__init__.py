"""``cogtune compare``: did the training work, and which checkpoint and strength is the best?

:mod:`.request` is what is asked for, :mod:`.candidates` finds the weights, :mod:`.scenes` the prompts, :mod:`.losses`
measures losses with the model that samples the videos, :mod:`.grid` shows them side by side, and :mod:`.comparing` does
everything in order. Figures and signs are those of :mod:`cogtune.quality`.
"""

from cogtune.commands.compare.comparing import compare
from cogtune.commands.compare.request import CompareRequest

__all__ = ["CompareRequest", "compare"]
