"""Moments between groups of examples, for batches that cannot be split into single ones.

A group (a micro-batch of an accumulation window, a process's share, the batch of a step) has a gradient even where its
examples have none: graphs, packed sequences, contrastive losses, batch normalisation. With groups j of m_j examples,
mean gradients G_j and weights v_j that add up to one (derived; an analysis of variance)::

    P       = |sum_j v_j G_j|^2                                     what the optimizer is about to apply
    trSigma = (sum_j v_j |G_j|^2 - P) / sum_j v_j (1 - v_j) / m_j   unbiased, never negative
    M       = 1 / sum_j v_j^2 / m_j                                 examples, in effect
    S2 = M^2 P,   S1 = M P + (M - 1) trSigma                        so that (S2 - S1) / (M (M - 1)) = P - trSigma / M
"""

from dataclasses import dataclass
from typing import Any

import torch

from lightning_graddiv.diversity import GradientMoments
from lightning_graddiv.errors import MeasurementError
from lightning_graddiv.per_example.batches import select
from lightning_graddiv.per_example.functional import differentiate, require_finite
from lightning_graddiv.per_example.losses import StepLoss, measuring
from lightning_graddiv.per_example.norms import real_view, sum_dtype, sum_of_squares

_MOST_GROUPS = 4

_SMALLEST_GROUP = 8
"""Where batch normalisation is: its statistics of fewer examples are others (benchmarks/results/batch_norm.json)."""


@dataclass(frozen=True)
class GroupSums:
    """What groups add up to; those of several processes or micro-batches simply add.

    Attributes:
        weighted_sq_norms: ``sum_j v_j |G_j|^2``.
        spread: ``sum_j v_j (1 - v_j) / m_j``.
        inverse_count: ``sum_j v_j^2 / m_j``.
    """

    weighted_sq_norms: float = 0.0
    spread: float = 0.0
    inverse_count: float = 0.0

    @classmethod
    def of_group(cls, sq_norm: float, examples: float, weight: float) -> "GroupSums":
        """Return the sums of one group: ``|G_j|^2``, ``m_j`` and ``v_j``."""
        return cls(weight * sq_norm, weight * (1 - weight) / examples, weight**2 / examples)

    def __add__(self, other: "GroupSums") -> "GroupSums":
        return GroupSums(
            self.weighted_sq_norms + other.weighted_sq_norms,
            self.spread + other.spread,
            self.inverse_count + other.inverse_count,
        )

    def moments(self, sq_norm_of_mean: float) -> GradientMoments:
        """Return the moments, given ``P``, the squared norm of the weighted mean gradient.

        Raises:
            MeasurementError: there is one group only.
        """
        if self.spread <= 0:
            raise MeasurementError("One group of examples has nothing to be compared with.")
        trace = max(0.0, self.weighted_sq_norms - sq_norm_of_mean) / self.spread  # a sum of squares, up to rounding
        count = 1 / self.inverse_count
        return GradientMoments(count, count * sq_norm_of_mean + (count - 1) * trace, count**2 * sq_norm_of_mean)


def group_moments(
    loss: StepLoss, batch: Any, total: int, groups: int | None = None, *, seed: int | None = None
) -> GradientMoments:
    """Return moments between groups of a batch, each of which the step runs on by itself, at the same weights.

    Args:
        loss: the step's loss, a mean over the batch.
        batch: a batch of ``total`` examples.
        total: the number of examples.
        groups: how many groups at most; none is smaller than two examples. None: up to four, of at least eight
            examples where the batch has sixteen.
        seed: of the noise in the step. None: the present random state.

    Raises:
        MeasurementError: there are fewer than four examples, or a loss or gradient is not finite.
    """
    wanted = max(2, min(_MOST_GROUPS, total // _SMALLEST_GROUP)) if groups is None else groups
    groups = min(wanted, total // 2)
    if groups < 2:
        raise MeasurementError(f"A batch of {total} examples does not make two groups of two.", lasting=True)
    sums, mean = GroupSums(), torch.zeros((), device="cpu")
    with measuring(loss.module, seed):
        for group in range(groups):
            examples = range(group * total // groups, (group + 1) * total // groups)
            gradients = differentiate(loss, select(batch, examples, total))
            sq_norm = sum_of_squares(gradients)
            require_finite(sq_norm)
            weight = len(examples) / total
            sums += GroupSums.of_group(float(sq_norm), len(examples), weight)
            flat = torch.cat([real_view(g).flatten().to(sum_dtype(g)) for g in gradients])
            mean = weight * flat + mean
    return sums.moments(float(sum_of_squares([mean])))
