"""Gradient diversity and the batch-size bound: exact on tensors, estimated from a few probes.

Source: Yin et al., "Gradient Diversity: a Key Ingredient for Scalable Distributed Learning" (AISTATS
2018, arXiv 1706.05699). Notation: ``g_i`` is the gradient of example i's own loss (a *unit* gradient: no
1/batch, no 1/world, no AMP scale), ``M`` the examples of one probe, ``S1 = sum_i |g_i|^2``,
``S2 = |sum_i g_i|^2``, ``n`` the size of the data set.

Everything here estimates ``rho = 1 / B`` and inverts it last. ``B`` itself is a ratio whose denominator
passes through zero; ``rho`` has a denominator that never does, so it pools linearly and its errors are
symmetric.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_graddiv.jackknife import jackknife_standard_error, student_t_quantile, sums_without_each

# One probe says nothing about spread: the interval is everything, [1, inf]. Student's t makes up for how
# little two say: their interval is wide, and covers as often as that of sixteen.
MIN_PROBES_FOR_INTERVAL = 2

# Fewer that agree to the last digit do so by chance, as one-hot gradients may: no sign that there is no spread.
_MIN_PROBES_WITHOUT_SPREAD = 4
_SAME = 1e-9


def gradient_diversity(gradients: Tensor) -> Tensor:
    """Gradient diversity of a set of examples at one weight vector (Definition 4).

    ``Delta_S(w) = sum_i |g_i|^2 / |sum_i g_i|^2``: ``1/n`` for identical gradients, 1 for orthogonal ones.
    A common factor on all gradients leaves it alone.

    Args:
        gradients: Per-example gradients, one flattened gradient a row, shape ``(n, d)``.

    Returns:
        A 0-dim float64 tensor: ``inf`` when the gradients cancel, ``nan`` when all of them are zero (0/0:
        undefined).

    Raises:
        ValueError: If ``gradients`` is not a floating-point tensor of shape ``(n, d)`` with ``n >= 1``.

    Example:
        >>> gradient_diversity(torch.eye(4))
        tensor(1., dtype=torch.float64)

    """
    _check_gradients(gradients)
    return _sum_sq_norms(gradients) / gradients.sum(dim=0, dtype=torch.float64).square().sum()


def batch_size_bound(gradients: Tensor) -> Tensor:
    """Batch-size bound of a whole data set at one weight vector (Definition 5).

    ``B_S(w) = n * Delta_S(w) = M2(w) / |G(w)|^2``: 1 for identical gradients, ``n`` for orthogonal ones.
    Exact for the rows given and for nothing else: for a part of a larger data set use
    :func:`estimate_diversity`, because ``n`` times the diversity of a part is not an estimate of anything.

    Args:
        gradients: Per-example gradients of every example, one flattened gradient a row, shape ``(n, d)``.

    Returns:
        A 0-dim float64 tensor: ``inf`` when the gradients cancel, ``nan`` when all of them are zero (0/0:
        undefined).

    Raises:
        ValueError: If ``gradients`` is not a floating-point tensor of shape ``(n, d)`` with ``n >= 1``.

    Example:
        >>> batch_size_bound(torch.eye(4))
        tensor(4., dtype=torch.float64)

    """
    diversity = gradient_diversity(gradients)  # checks the shape
    return len(gradients) * diversity


@dataclass(frozen=True, eq=False)
class GradientSums:
    """What the examples of one process add up to; sums of several processes or batches simply add.

    Attributes:
        count: Number of examples.
        sum_sq_norms: ``sum_i |g_i|^2`` over unit gradients.
        gradient_sum: ``sum_i g_i``, shape ``(d,)``.

    """

    count: float
    sum_sq_norms: float
    gradient_sum: Tensor

    def __post_init__(self) -> None:
        _check_non_negative(count=self.count, sum_sq_norms=self.sum_sq_norms)
        if self.gradient_sum.ndim != 1:
            shape = tuple(self.gradient_sum.shape)
            raise ValueError(f"Expected argument `gradient_sum` to be of shape (d,) but got {shape}")

    @classmethod
    def from_gradients(cls, gradients: Tensor) -> GradientSums:
        """Add up per-example gradients of shape ``(n, d)``, in float64."""
        _check_gradients(gradients)
        gradients = gradients.detach()
        total = gradients.sum(dim=0, dtype=torch.float64)
        return cls(float(len(gradients)), float(_sum_sq_norms(gradients)), total)

    def moments(self) -> GradientMoments:
        """Drop the vector and keep its squared norm: all that an estimate needs."""
        sq_norm_of_sum = float(self.gradient_sum.double().square().sum())
        return GradientMoments(self.count, self.sum_sq_norms, sq_norm_of_sum)


@dataclass(frozen=True)
class GradientMoments:
    """One probe: the examples measured at one weight vector, over all ranks, as unit gradients.

    Attributes:
        count: Number of examples ``M``; fractional when micro-batches of unequal size were mixed.
        sum_sq_norms: ``S1 = sum_i |g_i|^2``.
        sq_norm_of_sum: ``S2 = |sum_i g_i|^2``, the sum taken over all ranks before the norm.
        group_sq_norms_of_sums: ``sum_r |s_r|^2`` with ``s_r`` the gradient sum of rank r, for the rank
            check.
        group_sq_counts: ``sum_r m_r^2`` with ``m_r`` the examples of rank r, for the rank check.

    Raises:
        ValueError: If a number is negative or not finite, or only one of the two group sums is given.

    """

    count: float
    sum_sq_norms: float
    sq_norm_of_sum: float
    group_sq_norms_of_sums: float | None = None
    group_sq_counts: float | None = None

    def __post_init__(self) -> None:
        _check_non_negative(count=self.count, sum_sq_norms=self.sum_sq_norms, sq_norm_of_sum=self.sq_norm_of_sum)
        if (self.group_sq_norms_of_sums is None) != (self.group_sq_counts is None):
            raise ValueError(
                "Expected arguments `group_sq_norms_of_sums` and `group_sq_counts` both or neither but got "
                f"{self.group_sq_norms_of_sums} and {self.group_sq_counts}"
            )
        if self.group_sq_norms_of_sums is not None and self.group_sq_counts is not None:
            _check_non_negative(
                group_sq_norms_of_sums=self.group_sq_norms_of_sums, group_sq_counts=self.group_sq_counts
            )

    @classmethod
    def from_gradients(cls, gradients: Tensor) -> GradientMoments:
        """Moments of per-example gradients of shape ``(n, d)``, in float64."""
        return GradientSums.from_gradients(gradients).moments()


@dataclass(frozen=True)
class DiversityEstimate:
    """What a window of probes says about ``B_S``; all numbers are floats, ``inf`` at times but never NaN.

    Attributes:
        bound: Estimate of ``B_S`` (Definition 5), at least 1.
        lower: Lower end of the two-sided interval of ``B_S``: what a decision should rest on.
        upper: Upper end; ``inf`` when the probes cannot see that far.
        rho: ``1 / B`` of the population, unbiased up to the ratio; at most 0 when ``B`` is larger than the
            probes see.
        noise_scale: McCandlish's simple noise scale ``tr(Sigma) / |G|^2 = 1 / rho - 1``.
        second_moment: ``M2``, the mean of ``|g_i|^2``.
        signal: ``|G|^2`` of the population, free of the probe's noise: ``rho * second_moment``; may be
            negative.
        num_probes: Probes that carried pairs and were used.
        num_examples: Examples in those probes.
        dataset_size: ``n``, or ``None`` for a stream.

    """

    bound: float
    lower: float
    upper: float
    rho: float
    noise_scale: float
    second_moment: float
    signal: float
    num_probes: int
    num_examples: float
    dataset_size: int | None

    @property
    def diversity(self) -> float | None:
        """``Delta_S = B_S / n`` (Definition 4); ``None`` for a stream, which has no ``n``."""
        return None if self.dataset_size is None else self.bound / self.dataset_size


def estimate_diversity(
    probes: Sequence[GradientMoments], *, dataset_size: int | None = None, confidence: float = 0.9
) -> DiversityEstimate:
    """Estimate the batch-size bound ``B_S`` of the whole data set from probes of a few examples each.

    Derived from Definition 5. ``S1 / M`` is unbiased for ``M2``, and ``(S2 - S1) / (M (M - 1))`` for the
    mean inner product of two *different* examples; their ratio is ``rho = 1 / B`` of the population. Pooled
    with common weights, so that probes of different size and gradient scale may be mixed, and divided
    once::

        rho     = sum_t (S2_t - S1_t) / sum_t (M_t - 1) S1_t
        1 / B_S = 1/n + (1 - 1/n) rho             n = inf for a stream

    The interval is ``rho +- t * se`` mapped through the same line, with the delete-one jackknife over the
    probes and Student's t. A single probe gives ``[1, inf]``, and so do two or three that are alike: that
    may be chance. One probe with ``M = n`` is exactly Definition 5.

    Args:
        probes: Moments of unit gradients, one per measurement. Those with ``count <= 1`` hold no pairs:
            ignored.
        dataset_size: Number of distinct examples when drawn without replacement; ``None`` for a stream, or
            with replacement.
        confidence: Two-sided confidence of ``[lower, upper]``, in (0, 1).

    Raises:
        ValueError: If no probe has more than one example, all gradients are zero, ``confidence`` is outside
            (0, 1) or ``dataset_size < 1``.

    Example:
        >>> probe = GradientMoments.from_gradients(torch.eye(4))
        >>> estimate_diversity([probe], dataset_size=4).bound
        4.0

    """
    check_dataset_size(dataset_size)
    if not 0 < confidence < 1:
        raise ValueError(f"Expected argument `confidence` to be in (0, 1) but got {confidence}")
    usable = [probe for probe in probes if probe.count > 1]
    if not usable:
        raise ValueError(
            "Expected argument `probes` to hold a probe of more than one example but got counts "
            f"{[probe.count for probe in probes]}"
        )
    # Both sum over the pairs of different examples: one weight, M (M - 1), for numerator and denominator.
    signals = [probe.sq_norm_of_sum - probe.sum_sq_norms for probe in usable]
    second_moments = [(probe.count - 1) * probe.sum_sq_norms for probe in usable]
    signal, second_moment = math.fsum(signals), math.fsum(second_moments)
    if not second_moment > 0:
        raise ValueError(f"Expected argument `probes` to hold a non-zero gradient but got {len(usable)} without")
    rho = signal / second_moment
    margin = _margin(signals, second_moments, confidence)
    bound = bound_from_pairs(signal, second_moment, dataset_size)
    num_pairs = math.fsum(probe.count * (probe.count - 1) for probe in usable)
    return DiversityEstimate(
        bound=bound,
        # The ends come from rho and the bound from its parts: min and max take up the rounding between them.
        lower=min(bound, bound_from_pairs(rho + margin, 1.0, dataset_size)),
        upper=max(bound, bound_from_pairs(rho - margin, 1.0, dataset_size)),
        rho=rho,
        noise_scale=max(0.0, 1 / rho - 1) if rho > 0 else math.inf,
        second_moment=second_moment / num_pairs,
        signal=signal / num_pairs,
        num_probes=len(usable),
        num_examples=math.fsum(probe.count for probe in usable),
        dataset_size=dataset_size,
    )


def bound_from_pairs(signal: float, second_moment: float, dataset_size: int | None) -> float:
    """``B_S >= 1`` of ``n`` examples from the population's ``rho = signal / second_moment`` (derived).

    ``1 / B_S = 1/n + (1 - 1/n) rho``, because ``n^2 |G|^2 = n M2 + n (n - 1) signal`` on the whole data
    set. Taken apart rather than as a ratio, so that gradients that cancel give ``inf`` and not 1 / rounding
    error.
    """
    if dataset_size == 1:
        return 1.0
    sq_norm_of_mean = signal
    if dataset_size is not None:
        sq_norm_of_mean = (second_moment + (dataset_size - 1) * signal) / dataset_size
    return max(1.0, second_moment / sq_norm_of_mean) if sq_norm_of_mean > 0 else math.inf


def check_dataset_size(dataset_size: int | None) -> None:
    """Raise ``ValueError`` unless it is ``None`` or at least 1."""
    if dataset_size is not None and not dataset_size >= 1:
        raise ValueError(f"Expected argument `dataset_size` to be at least 1 or None but got {dataset_size}")


def _check_gradients(gradients: Tensor) -> None:
    if gradients.ndim != 2 or len(gradients) == 0 or not gradients.is_floating_point():
        raise ValueError(
            "Expected argument `gradients` to be a floating-point tensor of shape (n, d) with n >= 1 but got "
            f"{gradients.dtype} of shape {tuple(gradients.shape)}"
        )


def _check_non_negative(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"Expected argument `{name}` to be finite and non-negative but got {value}")


def _sum_sq_norms(gradients: Tensor) -> Tensor:
    flat = gradients.double().flatten()
    return flat.dot(flat)  # not norm().square(): the root would round even sums of integers


def _margin(signals: list[float], second_moments: list[float], confidence: float) -> float:
    """Half the width of the interval of rho; ``inf`` when the probes cannot tell."""
    k = len(signals)
    if k < MIN_PROBES_FOR_INTERVAL:
        return math.inf
    numerators, denominators = sums_without_each(signals), sums_without_each(second_moments)
    if min(denominators) <= 0:
        return math.inf  # one probe alone has gradients
    rhos = [numerator / denominator for numerator, denominator in zip(numerators, denominators, strict=True)]
    if k < _MIN_PROBES_WITHOUT_SPREAD and max(rhos) - min(rhos) <= _SAME * max(map(abs, rhos)):
        return math.inf
    return student_t_quantile(k - 1, confidence) * jackknife_standard_error(rhos)
