"""Theorem 6: beyond ``delta * B_S + 1`` mini-batches lose, and the problem on which they do."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_graddiv.theory._checks import check, check_positive
from lightning_graddiv.theory.efficiency import excess, without_replacement_excess


def lower_bound_error(
    delta: float, *, step_size: float, second_moment: float, strong_convexity: float, constant: float = 0.5
) -> float:
    """Theorem 6: ``E|w - w*|^2 >= c (1 + delta) gamma M2 / lambda`` on some ``lambda``-strongly convex problem.

    Conditions: batch sizes fixed in advance, ``B_k <= 1 / (2 lambda gamma)`` and ``B_k >= delta E[B_S(w_k)] + 1``
    throughout. ``c`` is a universal constant in the paper; at stationarity of the paper's construction,
    :class:`LowerBoundProblem`, it is 1/2 (derived there), with ``M2`` and ``B_S`` taken at stationarity.

    Args:
        delta: By how much the batches are too large; at least 0.
        step_size: ``gamma``, on the sum of a batch's gradients.
        second_moment: ``M2``.
        strong_convexity: ``lambda``.
        constant: ``c``.

    Raises:
        ValueError: If delta is negative or another number not positive.

    """
    check(delta >= 0, "delta", "at least 0", delta)
    check_positive(step_size=step_size, second_moment=second_moment)
    check_positive(strong_convexity=strong_convexity, constant=constant)
    return constant * (1 + delta) * step_size * second_moment / strong_convexity


@dataclass(frozen=True, eq=False)
class LowerBoundProblem:
    """Theorem 6's construction: ``f_i(w) = lambda/2 |w - x_i|^2`` with ``|x_i| = 1`` and ``sum x_i = 0``.

    The minimiser is 0, ``B_S(w) = (1 + |w|^2) / |w|^2`` and ``M2(w) = lambda^2 (1 + |w|^2)``. A mini-batch step is
    ``w+ = (1 - gamma lambda B) w + gamma lambda * (sum of the batch's x_i)``, so that ``|w|^2`` has an expectation in
    closed form (derived): independent of ``w``, the sum has the squared norm ``B`` with replacement, and
    ``B (n - B) / (n - 1)`` without. With ``B <= 1 / (gamma lambda)`` every iterate is a mean of ``w_0`` and the
    ``x_i``: it stays in the unit ball where ``w_0`` is in it.

    At stationarity Lemma 1 reads ``|w|^2 = (1 + delta) gamma M2 / (2 lambda)``: theorem 6 with ``c = 1/2``. With
    ``B <= 1 / (2 lambda gamma)``, delta is at most about 1/3 there, because ``B_S`` grows as ``w`` comes near 0
    (derived).

    Args:
        centres: The ``x_i``, shape ``(n, d)``: unit vectors that add up to 0.
        strong_convexity: ``lambda``.

    Raises:
        ValueError: If the centres are no such vectors, or lambda is not positive.

    """

    centres: Tensor
    strong_convexity: float = 1.0

    def __post_init__(self) -> None:
        check_positive(strong_convexity=self.strong_convexity)
        shape = tuple(self.centres.shape)
        check(len(shape) == 2 and shape[0] >= 2, "centres", "of shape (n, d) with n >= 2", shape)
        is_unit = bool(((self.centres.square().sum(1) - 1).abs() < 1e-6).all())
        is_centred = bool((self.centres.sum(0).abs() < 1e-6 * len(self.centres)).all())
        check(is_unit and is_centred, "centres", "unit vectors that add up to 0", "others")

    @classmethod
    def random(cls, pairs: int, dimensions: int, *, strong_convexity: float = 1.0, seed: int = 0) -> LowerBoundProblem:
        """Draw ``pairs`` random directions, each with its opposite: ``n = 2 * pairs`` centres in float64."""
        check(pairs >= 1, "pairs", "at least 1", pairs)
        check(dimensions >= 1, "dimensions", "at least 1", dimensions)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(pairs, dimensions, dtype=torch.float64, generator=generator)
        drawn /= drawn.norm(dim=1, keepdim=True)
        return cls(torch.cat([drawn, -drawn]), strong_convexity)

    @property
    def dataset_size(self) -> int:
        """``n``."""
        return len(self.centres)

    def loss(self, weights: Tensor) -> float:
        """``F(w) = lambda/2 (|w|^2 + 1)``."""
        return self.strong_convexity / 2 * (float(weights.square().sum()) + 1)

    def gradients(self, weights: Tensor) -> Tensor:
        """Per-example gradients ``lambda (w - x_i)``, shape ``(n, d)``."""
        return self.strong_convexity * (weights - self.centres)

    def bound(self, sq_norm: float) -> float:
        """``B_S(w) = (1 + |w|^2) / |w|^2``; ``inf`` at the minimiser."""
        return (1 + sq_norm) / sq_norm if sq_norm > 0 else math.inf

    def second_moment(self, sq_norm: float) -> float:
        """``M2(w) = lambda^2 (1 + |w|^2)``."""
        return self.strong_convexity**2 * (1 + sq_norm)

    def largest_step_size(self, batch_size: int) -> float:
        """Largest ``gamma`` of theorem 6's condition ``B <= 1 / (2 lambda gamma)``."""
        return 1 / (2 * self.strong_convexity * batch_size)

    def stationary_error(self, step_size: float, batch_size: int, *, replacement: bool = True) -> float:
        """``E|w|^2`` that mini-batch SGD settles at: ``gamma lambda / (2 - gamma lambda B)`` with replacement.

        Args:
            step_size: ``gamma``, on the sum of a batch's gradients; ``gamma lambda B < 2``.
            batch_size: ``B``.
            replacement: Whether the examples of a batch are drawn with replacement; else they are distinct, and each
                batch is drawn anew from all.

        Raises:
            ValueError: If the step is too large to settle, or the batch larger than the data set.

        """
        drift = step_size * self.strong_convexity * batch_size
        check(0 < drift < 2, "step_size", f"between 0 and 2 / (lambda B) = {2 * step_size / drift:.4g}", step_size)
        noise = step_size * self.strong_convexity * self._share_of_noise(batch_size, replacement)
        return noise / (2 - drift)

    def expected_error(
        self, step_size: float, batch_size: int, *, steps: int, initial_error: float, replacement: bool = True
    ) -> float:
        """``E|w_k|^2`` after ``steps`` steps from ``|w_0|^2 = initial_error``; see :meth:`stationary_error`."""
        settled = self.stationary_error(step_size, batch_size, replacement=replacement)
        left = (1 - step_size * self.strong_convexity * batch_size) ** (2 * steps)
        return settled + left * (initial_error - settled)

    def stationary_delta(self, step_size: float, batch_size: int, *, replacement: bool = True) -> float:
        """Lemma 1's delta at stationarity, with ``B_S`` at ``E|w|^2``."""
        settled = self.stationary_error(step_size, batch_size, replacement=replacement)
        if replacement:
            return excess(batch_size, self.bound(settled))
        return without_replacement_excess(batch_size, self.bound(settled), self.dataset_size)

    def _share_of_noise(self, batch_size: int, replacement: bool) -> float:
        n = self.dataset_size
        check(batch_size >= 1 and (replacement or batch_size <= n), "batch_size", f"between 1 and {n}", batch_size)
        return 1.0 if replacement else (n - batch_size) / (n - 1)
