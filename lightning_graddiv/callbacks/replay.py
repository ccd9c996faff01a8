"""Measurements that run a training step again, on copies, with the arguments that it was about to receive."""

from dataclasses import dataclass
from typing import Any

import torch

from lightning_graddiv.callbacks.outcome import Outcome, replay_outcome
from lightning_graddiv.diversity import GradientSums
from lightning_graddiv.errors import MeasurementError
from lightning_graddiv.per_example.batches import count_examples
from lightning_graddiv.per_example.losses import StepLoss, measuring
from lightning_graddiv.per_example.microbatch import group_moments
from lightning_graddiv.per_example.select import PerExampleEngine, with_frozen_copied
from lightning_graddiv.per_example.separability import mixes_by_normalisation_only

_FEWEST_TO_REGROUP = 16
"""Two groups of eight; with fewer examples, batch normalisation has other statistics in a group."""


@dataclass(frozen=True)
class SeenStep:
    """A training step that is about to run.

    Attributes:
        module: whose step it is.
        optimizer: which holds the parameters to measure.
        args: what ``training_step`` is about to receive.
        at_most: how many examples the loader draws for a full batch, where known.
        seed: of the noise in what is run again.
    """

    module: Any
    optimizer: Any
    args: tuple[Any, ...]
    at_most: int | None
    seed: int

    def loss(self) -> StepLoss:
        """Return the step's loss as a function of its batch."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        return StepLoss(self.module, step_args=self.args[1:], parameters=parameters)

    def count(self) -> int:
        """Return the number of examples in its batch."""
        return count_examples(self.args[0], self.at_most)


def replayed(step: SeenStep, engine: PerExampleEngine, device: torch.device) -> Outcome:
    """Measure the examples of a step's batch one by one. Every process must call this, also after a failure."""
    sums: GradientSums | None = None
    refusal: Exception | None = None
    try:
        sums = engine.measure(step.loss(), step.args[0], at_most=step.at_most, seed=step.seed).sums()
        sums.moments()  # refuses what is not finite before other processes count on it
    except Exception as error:  # measuring must never end a training run
        sums, refusal = None, error
    return replay_outcome(sums, refusal, device)


def would_regroup(step: SeenStep) -> bool:
    """Tell whether groups of a step's batch, run by themselves, say what whole batches would."""
    try:
        loss, total = step.loss(), step.count()
        with measuring(step.module, step.seed):
            is_enough = total >= _FEWEST_TO_REGROUP
            return is_enough and with_frozen_copied(
                loss, lambda: mixes_by_normalisation_only(loss, step.args[0], total)
            )
    except Exception:  # measuring must never end a training run
        return False


def regrouped(step: SeenStep) -> Outcome:
    """Measure between groups of a step's batch, on the only process."""
    try:
        loss, total = step.loss(), step.count()
        if total < _FEWEST_TO_REGROUP:
            return Outcome(None, is_retried=True)  # a last batch: the next is due
        return Outcome(with_frozen_copied(loss, lambda: group_moments(loss, step.args[0], total, seed=step.seed)))
    except Exception as error:  # measuring must never end a training run
        return Outcome(None, refusal=error, is_lasting=isinstance(error, MeasurementError) and error.lasting)
