"""B_S and throughput at fixed weights, from a few batches of a loader."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_graddiv.batching.dataset_size import distinct_examples
from lightning_graddiv.batching.loops import batch_to_device
from lightning_graddiv.batching.twins import first_batches
from lightning_graddiv.distributed import agreed_over_ranks, pool_over_ranks, smallest_over_ranks, world_size
from lightning_graddiv.diversity import DiversityEstimate, GradientMoments, GradientSums, estimate_diversity
from lightning_graddiv.errors import MeasurementError
from lightning_graddiv.per_example.batches import count_examples, select
from lightning_graddiv.per_example.losses import StepLoss, measuring
from lightning_graddiv.per_example.microbatch import group_moments
from lightning_graddiv.per_example.select import PerExampleEngine, measure_loss, with_frozen_copied
from lightning_graddiv.per_example.separability import mixes_by_normalisation_only
from lightning_graddiv.per_example.speed import room_for_an_optimizer, seconds_of_a_step

_FEWEST_IN_A_PROBE = 8
"""A batch is not split into smaller probes than this."""

_FEWEST_TO_REGROUP = 16
"""Two groups of eight; with fewer examples, batch normalisation has other statistics in a group."""


class LoaderProbe:
    """Measures a step's loss on the first batches of a loader. Every process must do what one does.

    Args:
        trainer: which has set its loader up.
        loss: the step's loss.
        loader: the training loader; batches are drawn from a twin.
        probes: batches to measure; where a pass has fewer, they are split.
        engine: a name of an engine.

    Attributes:
        batch: the first batch, on its device; None before :meth:`estimate`.
        total: the number of its examples.
        mean_loss: the loss on it.
    """

    def __init__(self, trainer: Any, loss: StepLoss, loader: Any, *, probes: int, engine: str) -> None:
        self._trainer = trainer
        self._device: torch.device = trainer.strategy.root_device
        self._loss = loss
        self._loader = loader
        self._engine = engine
        # One for all batches, so that it need not check each. The layers' rules are in-band's, and slower here.
        self._replaying = PerExampleEngine(engine) if engine in {"auto", "functional", "loop"} else None
        (batches,) = smallest_over_ranks([min(probes, trainer.num_training_batches)], self._device)
        self._batches = int(batches)
        self._parts = -(-probes // max(1, self._batches))
        self.batch: Any = None
        self.total = 0
        self.mean_loss = math.nan

    def estimate(self, confidence: float) -> DiversityEstimate:
        """Return the estimate of B_S that all probes make together.

        Raises:
            MisconfigurationException: the loader has no batch.
            MeasurementError: the batches cannot be measured.
        """
        probes = list(self._probes())
        if not probes:
            raise MisconfigurationException("The training loader has no batch to find a batch size with.")
        limit = self._trainer.num_training_batches
        examples = agreed_over_ranks(distinct_examples(self._loader, limit, world_size()), self._device)
        try:
            return estimate_diversity(probes, dataset_size=examples, confidence=confidence)
        except ValueError as error:
            raise MeasurementError(f"The batches tell nothing about the diversity of gradients: {error}.") from error

    def seconds(self, sizes: Iterator[int], repeats: int) -> dict[int, float]:
        """Return the seconds of a pass by micro-batch size, of the slowest process; infinite for one that does not fit.

        Args:
            sizes: micro-batch sizes, ascending; none is tried after one that does not fit.
            repeats: passes that are timed.
        """
        context = self._trainer.precision_plugin.train_step_context
        room = [] if self._trainer.optimizers[0].state else room_for_an_optimizer(self._loss)
        seconds: dict[int, float] = {}
        for size in sizes:
            mine = seconds_of_a_step(self._loss, self.batch, self.total, size, repeats=repeats, context=context)
            (fastest,) = smallest_over_ranks([-mine], self._device)
            seconds[size] = -fastest
            if math.isinf(fastest):
                break
        del room
        return seconds

    def _probes(self) -> Iterator[GradientMoments]:
        drawn = first_batches(self._loader, self._batches)
        while parts := self._next_parts(next(drawn, None)):
            for part in parts:
                yield self._moments(part)

    def _next_parts(self, drawn: Any) -> list[Any]:
        """Return a batch in parts, as many as on every other process; none where one of them has no batch left."""
        total, most = 0, 0
        if drawn is not None:
            batch = batch_to_device(self._trainer, drawn)
            total = count_examples(batch)
            most = max(1, min(self._parts, total // _FEWEST_IN_A_PROBE))
        parts = int(smallest_over_ranks([float(most)], self._device)[0])
        if parts == 0:
            return []
        if self.batch is None:
            self._keep(batch, total)
        ends = [part * total // parts for part in range(parts + 1)]
        if parts == 1:
            return [batch]
        return [select(batch, range(*ends[part : part + 2]), total) for part in range(parts)]

    def _keep(self, batch: Any, total: int) -> None:
        self.batch, self.total = batch, total
        with measuring(self._loss.module):
            self.mean_loss = float(self._loss(batch).detach())

    def _moments(self, batch: Any) -> GradientMoments:
        if self._engine == "microbatch":
            return self._between_groups(batch)
        sums: GradientSums | None = None
        refusal: Exception | None = None
        try:
            sums = self._sums(batch)
            sums.moments()  # refuses what is not finite before other processes count on it
        except Exception as error:  # other processes must not wait for this one
            sums, refusal = None, error
        moments, _ = pool_over_ranks(sums, self._device)
        if moments is not None:
            return moments
        if self._engine == "auto" and isinstance(refusal, MeasurementError) and self._would_regroup(batch):
            self._engine = "microbatch"
            return self._between_groups(batch)
        raise refusal or MeasurementError("Another process could not measure.")

    def _sums(self, batch: Any) -> GradientSums:
        if self._replaying is not None:
            try:
                return self._replaying.measure(self._loss, batch).sums()
            except MeasurementError:
                if self._engine != "auto":
                    raise
                self._replaying = None
        return measure_loss(self._loss, batch, self._engine).sums()

    def _would_regroup(self, batch: Any) -> bool:
        total = count_examples(batch)
        if world_size() > 1 or total < _FEWEST_TO_REGROUP:
            return False
        with measuring(self._loss.module):
            return with_frozen_copied(self._loss, lambda: mixes_by_normalisation_only(self._loss, batch, total))

    def _between_groups(self, batch: Any) -> GradientMoments:
        if world_size() > 1:
            raise MeasurementError("The engine `microbatch` measures on one process only here.", lasting=True)
        return with_frozen_copied(self._loss, lambda: group_moments(self._loss, batch, count_examples(batch)))
