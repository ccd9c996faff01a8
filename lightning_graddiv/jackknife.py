"""The delete-one jackknife and Student's t, which turn the spread of a few probes into an interval."""

import math
from functools import lru_cache
from itertools import accumulate


def sums_without_each(values: list[float]) -> list[float]:
    """For each value, the sum of the others."""
    # What is before plus what is behind: total - value would cancel when one probe dwarfs the others.
    before = accumulate(values[:-1], initial=0.0)
    behind = list(accumulate(values[:0:-1], initial=0.0))
    return [left + right for left, right in zip(before, reversed(behind), strict=True)]


def jackknife_standard_error(leave_one_out: list[float]) -> float:
    """Standard error of a statistic from its values with each of k observations left out in turn."""
    k = len(leave_one_out)
    mean = math.fsum(leave_one_out) / k
    return math.sqrt((k - 1) / k * math.fsum((value - mean) ** 2 for value in leave_one_out))


@lru_cache(maxsize=256)
def student_t_quantile(dof: int, confidence: float) -> float:
    """Two-sided quantile, ``P(|T| <= t) = confidence``: bisection on ``theta = arctan(t / sqrt(dof))``."""
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        if _student_t_probability(dof, middle) < confidence:
            low = middle
        else:
            high = middle
    return math.sqrt(dof) * math.tan(high)


def _student_t_probability(dof: int, theta: float) -> float:
    """``P(|T| <= sqrt(dof) tan(theta))``, finite series for integer dof (Abramowitz and Stegun 26.7.3-4)."""
    sin, cos = math.sin(theta), math.cos(theta)
    odd = dof % 2
    term, series = (cos, 0.0) if odd else (1.0, 0.0)
    # Odd: cos + 2/3 cos^3 + 2*4/(3*5) cos^5 + ...; even: 1 + 1/2 cos^2 + 1*3/(2*4) cos^4 + ...
    # Both end at cos^(dof - 2).
    for power in range(odd, dof, 2):
        series += term
        term *= (power + 1) / (power + 2) * cos * cos
    return 2 / math.pi * (theta + sin * series) if odd else sin * series
