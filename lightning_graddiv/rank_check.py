"""Do the processes see independent data? Their gradient sums tell, and only scalars are needed."""

import math
from collections.abc import Sequence

from lightning_graddiv.diversity import GradientMoments
from lightning_graddiv.jackknife import jackknife_standard_error, sums_without_each

_MIN_PROBES = 4
"""With fewer, a number of standard errors says little: no quantile of Student's t makes up for how rough they are."""


def between_rank_excess(probes: Sequence[GradientMoments]) -> float:
    """Between-rank minus within-rank signal in standard errors: do the ranks see independent data?

    Derived: with ``s_r`` the gradient sum and ``m_r`` the examples of rank r, both of ::

        within  = (sum_r |s_r|^2 - S1) / (sum_r m_r^2 - M)        pairs of different examples on one rank
        between = (S2 - sum_r |s_r|^2) / (M^2 - sum_r m_r^2)      pairs on two ranks

    are unbiased for ``|G|^2`` when the shards are i.i.d. Numerators and denominators are pooled over the
    probes before dividing; the standard error of the difference is a delete-one jackknife.

    Args:
        probes: Moments; those without group sums, or without pairs of both kinds, are ignored.

    Returns:
        About standard normal for i.i.d. shards; far above (say 4) when ranks see the same data, far below
        when shards differ. 0 when fewer than four probes tell. ``+-inf`` for a difference without any
        spread.

    """
    groups = [group for group in map(_group_sums, probes) if group is not None]
    if len(groups) < _MIN_PROBES:
        return 0.0
    columns = [list(column) for column in zip(*groups, strict=True)]
    difference = _between_minus_within(*map(math.fsum, columns))
    # Rounding is no evidence: identical gradients leave a difference and a spread of a few ulp each.
    second_moment = math.fsum(p.sum_sq_norms for p in probes) / math.fsum(p.count for p in probes)
    if abs(difference) <= 1e-12 * second_moment:
        return 0.0
    se = jackknife_standard_error(list(map(_between_minus_within, *map(sums_without_each, columns))))
    return difference / se if se > 0 else math.copysign(math.inf, difference)


def _group_sums(probe: GradientMoments) -> tuple[float, float, float, float] | None:
    """Numerator and denominator between ranks, then within; ``None`` without pairs of both kinds."""
    if probe.group_sq_norms_of_sums is None or probe.group_sq_counts is None:
        return None
    between, within = probe.count**2 - probe.group_sq_counts, probe.group_sq_counts - probe.count
    if between <= 0 or within <= 0:
        return None
    grouped = probe.group_sq_norms_of_sums
    return probe.sq_norm_of_sum - grouped, between, grouped - probe.sum_sq_norms, within


def _between_minus_within(between: float, between_pairs: float, within: float, within_pairs: float) -> float:
    return between / between_pairs - within / within_pairs
