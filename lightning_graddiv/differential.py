"""Differential diversity estimated from a few probes: the bound B_S(w, w') and the learning rate that is still stable.

A probe takes the same M examples at two weight vectors, with ``Dw = w - w'`` and ``Dg_i = grad f_i(w) - grad f_i(w')``.
Everything is divided by ``|Dw|`` once for each gradient, so that probes at different distances pool alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning_graddiv.diversity import DiversityEstimate, GradientMoments, estimate_diversity
from lightning_graddiv.jackknife import jackknife_standard_error, student_t_quantile, sums_without_each
from lightning_graddiv.theory import stability_learning_rate_cap

MIN_PROBES_FOR_CAP = 4
"""With fewer, the interval of the learning rate is everything: whether it would cover has not been measured."""


@dataclass(frozen=True)
class DifferentialMoments:
    """One probe of the same examples at two weight vectors, over all processes.

    Attributes:
        moments: of ``Dg_i / |Dw|``.
        alignment: ``sum_i <Dw, Dg_i> / |Dw|^2``: M times the mean curvature along ``Dw``.
        distance: ``|Dw|``.

    Raises:
        ValueError: If a number is not finite, or the distance not positive.

    """

    moments: GradientMoments
    alignment: float
    distance: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.distance) and self.distance > 0):
            raise ValueError(f"Expected argument `distance` to be positive and finite but got {self.distance}")
        if not math.isfinite(self.alignment):
            raise ValueError(f"Expected argument `alignment` to be finite but got {self.alignment}")

    def state_dict(self) -> dict[str, Any]:
        """The probe as dicts and floats."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> DifferentialMoments:
        """Return the probe that :meth:`state_dict` was taken from."""
        return cls(GradientMoments(**state["moments"]), state["alignment"], state["distance"])


@dataclass(frozen=True)
class LearningRateCap:
    """Largest learning rate that is stable at one batch size; ``inf`` where there is none.

    Attributes:
        cap: The estimate.
        lower: Lower end of its two-sided interval: what a decision should rest on; 0 from fewer than four probes.
        upper: Upper end.

    """

    cap: float
    lower: float
    upper: float


@dataclass(frozen=True)
class StabilityEstimate:
    """What a window of probes says about ``B_S(w, w')`` and the learning rate.

    Attributes:
        diversity: Estimate of ``B_S(w, w')`` with its interval; its moments are per squared distance, so that
            ``sqrt(second_moment)`` is a root mean square of the examples' smoothness along ``Dw``.
        curvature: ``<Dw, DG> / |Dw|^2``; at most 0 where the loss is not convex between the two.
        distance: ``|Dw|`` of the latest probe.
        probes: What was pooled.
        confidence: Of both intervals.

    """

    diversity: DiversityEstimate
    curvature: float
    distance: float
    probes: tuple[DifferentialMoments, ...]
    confidence: float

    def learning_rate_cap(self, batch_size: float) -> LearningRateCap:
        """Largest stable learning rate of a mean loss at a batch size, pooled over the probes (derived).

        :func:`~lightning_graddiv.theory.stability_learning_rate_cap` of ``<Dw, DG>``, ``M2`` and the mean product over
        pairs, each pooled with common weights and divided once; the interval by the delete-one jackknife. Without a
        positive ``<Dw, DG>`` there is no cap.
        """
        pairs, seconds, inners = _pair_sums(self.probes)
        cap = _cap(batch_size, math.fsum(inners), math.fsum(seconds), math.fsum(pairs))
        if math.isinf(cap):
            return LearningRateCap(cap, cap, cap)
        k = len(self.probes)
        if k < MIN_PROBES_FOR_CAP:
            return LearningRateCap(cap, 0.0, math.inf)
        others = zip(*(sums_without_each(values) for values in (inners, seconds, pairs)), strict=True)
        caps = [_cap(batch_size, *sums) for sums in others]
        if any(math.isinf(value) for value in caps):
            return LearningRateCap(cap, 0.0, math.inf)
        margin = student_t_quantile(k - 1, self.confidence) * jackknife_standard_error(caps)
        return LearningRateCap(cap, max(0.0, cap - margin), cap + margin)


def estimate_stability(
    probes: Sequence[DifferentialMoments], *, dataset_size: int | None = None, confidence: float = 0.9
) -> StabilityEstimate:
    """Estimate ``B_S(w, w')`` and what the learning-rate cap needs, from probes of a few examples each (derived).

    Arguments and errors are those of :func:`~lightning_graddiv.estimate_diversity`. One probe of all n examples gives
    ``B_S(w, w')`` exactly, and with it the cap for batches of distinct examples.
    """
    usable = tuple(probe for probe in probes if probe.moments.count > 1)
    diversity = estimate_diversity(
        [probe.moments for probe in probes], dataset_size=dataset_size, confidence=confidence
    )
    _, _, inners = _pair_sums(usable)
    num_pairs = math.fsum(probe.moments.count * (probe.moments.count - 1) for probe in usable)
    return StabilityEstimate(diversity, math.fsum(inners) / num_pairs, usable[-1].distance, usable, confidence)


def _pair_sums(probes: Sequence[DifferentialMoments]) -> tuple[list[float], list[float], list[float]]:
    """Products over pairs, second moments and alignments, all with the weight ``M (M - 1)``."""
    moments = [probe.moments for probe in probes]
    pairs = [m.sq_norm_of_sum - m.sum_sq_norms for m in moments]
    seconds = [(m.count - 1) * m.sum_sq_norms for m in moments]
    inners = [(probe.moments.count - 1) * probe.alignment for probe in probes]
    return pairs, seconds, inners


def _cap(batch_size: float, inner: float, second: float, pairs: float) -> float:
    return stability_learning_rate_cap(batch_size, inner_product=inner, second_moment=second, sq_norm=pairs)
