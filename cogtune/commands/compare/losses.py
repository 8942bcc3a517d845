"""Losses at fixed noise, measured with the model that samples the videos, and kept from one call to the next."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogtune.commands.infer.making import Batch
from cogtune.commands.infer.outputs import weights_of
from cogtune.data.cache.index import Index, SampleKeys
from cogtune.data.cache.store import Store
from cogtune.run.folder import RunFolder
from cogtune.run.plan import Plan
from cogtune.system import console
from cogtune.system.digests import digest
from cogtune.system.errors import CogtuneError
from cogtune.system.json_files import read_sealed, write_sealed

NAME = "losses.json"


@dataclass(frozen=True)
class MeasuredLosses:
    """The losses of weights at one strength; None for what was not measured."""

    held_out: float | None = None
    """Of the validation samples."""
    training: float | None = None
    """Of the first training samples."""


class Losses:
    """Measures losses of a run's samples; see :class:`cogtune.commands.infer.making.Measurement`.

    Each is written to a file as soon as it is known, by a digest of the weights, their strength and the samples.
    """

    def __init__(self, run: Path | None, folder: Path) -> None:
        self._path = folder / NAME
        self._plan: Plan | None = None
        self._samples: dict[str, tuple[SampleKeys, ...]] = {}
        self._known: dict[str, dict[str, float]] = {}
        if run is None:
            return
        from cogtune.training.evaluate import MOST_TRAINING_SAMPLES

        try:
            plan = Plan.read(RunFolder(run).plan)
            index = Index.read(plan.index)
            self._samples["training"] = index.rows[:MOST_TRAINING_SAMPLES]
            if plan.validation is not None:
                self._samples["held_out"] = Index.read(plan.validation).rows
            self._store, self._null_text, self._plan = Store(plan.config.cache_folder), index.null_text, plan
            self._require_entries()
        except CogtuneError as error:
            self._give_up(error)
        if self._path.is_file():
            self._known = read_sealed(self._path, "delete it, and run the command again")["losses"]

    def _require_entries(self) -> None:
        """Check that the cache has the entries of the samples, which are few.

        Raises:
            CogtuneError: one is missing.
        """
        self._store.read("text", self._null_text)
        for row in {row for rows in self._samples.values() for row in rows}:
            self._store.read("text", row.text)
            self._store.read("latents", row.latents)
            if row.image is not None:
                self._store.read("image", row.image)

    def _give_up(self, error: CogtuneError) -> None:
        console.warn(f"comparing without the loss at fixed noise: {error.message}")
        self._plan = None

    def due(self, batch: Batch) -> bool:
        """Return whether the losses of a batch's weights are not known."""
        return self._plan is not None and self._key(batch) not in self._known

    def measure(self, batch: Batch, transformer: Any) -> None:
        """Measure the losses of a batch's weights at its scale.

        Raises:
            CogtuneError: one is not finite.
        """
        from cogtune.modeling.devices import DTYPES, best_device
        from cogtune.training.evaluate import evaluate
        from cogtune.training.setup import objective_of

        if self._plan is None:
            return
        dtype = DTYPES[batch.recipe.precision]
        null_text = self._store.read("text", self._null_text)
        objective = objective_of(self._plan, best_device(), dtype, null_text)
        found = {}
        console.note("measuring the loss at fixed noise")
        for name, rows in self._samples.items():
            found[name] = evaluate(transformer, objective, self._store, rows).loss
            if not math.isfinite(found[name]):
                where = batch.request.loras[0] if batch.request.loras else batch.request.model
                raise CogtuneError(
                    f"the loss of {where} is {found[name]}: its training diverged", "leave it out of the comparison"
                )
        self._known[self._key(batch)] = found
        write_sealed(self._path, {"losses": self._known})

    def of(self, batch: Batch) -> MeasuredLosses:
        """Return what was measured."""
        if self._plan is None:
            return MeasuredLosses()
        return MeasuredLosses(**self._known.get(self._key(batch), {}))

    def _key(self, batch: Batch) -> str:
        facts = batch.videos[0].facts  # of any: the weights and their one strength are the same in all
        samples = {name: [[row.latents, row.text, row.image] for row in rows] for name, rows in self._samples.items()}
        return digest([weights_of(facts), samples, self._plan and self._plan.config.seed])
