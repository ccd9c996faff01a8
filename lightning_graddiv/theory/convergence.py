"""Theorems 2 to 5: step size, number of gradient evaluations and what they guarantee, for four classes of losses.

All speak of ``w <- w - gamma * (sum of the batch's gradients)``, so that PyTorch's learning rate on a mean loss is
``gamma * B``; of batches drawn with replacement; and of a batch size with ``B <= delta * B_S(w) + 1`` on every
reachable ``w``. Mini-batch SGD then reaches ``(1 + delta / 2) * eps`` after the same number T of gradient evaluations
(T / B steps) in which serial SGD reaches ``eps``. ``M2`` bounds the mean of ``|g_i|^2`` on every reachable ``w``.
"""

import math
from dataclasses import dataclass

from lightning_graddiv.theory._checks import check, check_positive


@dataclass(frozen=True)
class Guarantee:
    """What a theorem promises.

    Attributes:
        step_size: ``gamma``, on the sum of a batch's gradients; the same for every batch size.
        evaluations: ``T``, single gradients evaluated in total: ``T / B`` steps.
        accuracy: ``(1 + delta / 2) * eps``, reached by mini-batches; serial SGD reaches ``eps`` (``delta = 0``).
        max_batch_size: The theorem's extra condition on ``B``, beside ``delta * B_S + 1``; ``inf`` without one.

    """

    step_size: float
    evaluations: float
    accuracy: float
    max_batch_size: float = math.inf

    def learning_rate(self, batch_size: float) -> float:
        """PyTorch's learning rate on a *mean* loss: ``gamma * B``, linear scaling."""
        return self.step_size * batch_size


def smooth_guarantee(
    accuracy: float, *, smoothness: float, second_moment: float, initial_gap: float, delta: float = 0.0
) -> Guarantee:
    """Theorem 2, ``beta``-smooth, not convex: a mean over the steps of ``E|grad F(w_k)|^2`` of at most the accuracy.

    ``gamma = eps / (beta M2)`` and ``T = 2 M2 beta (F(w_0) - F*) / eps^2``.

    Args:
        accuracy: ``eps``, of ``|grad F|^2``.
        smoothness: ``beta``, the Lipschitz constant of ``grad F``.
        second_moment: ``M2``.
        initial_gap: ``F(w_0) - F*``.
        delta: Of ``B <= delta * B_S + 1``; 0 for serial SGD.

    Raises:
        ValueError: If a number is not positive, or delta negative.

    """
    check_positive(accuracy=accuracy, smoothness=smoothness, second_moment=second_moment, initial_gap=initial_gap)
    return Guarantee(
        step_size=accuracy / (smoothness * second_moment),
        evaluations=2 * second_moment * smoothness * initial_gap / accuracy**2,
        accuracy=_with_excess(accuracy, delta),
    )


def polyak_lojasiewicz_guarantee(
    accuracy: float,
    *,
    smoothness: float,
    polyak_lojasiewicz: float,
    second_moment: float,
    initial_gap: float,
    delta: float = 0.0,
) -> Guarantee:
    """Theorem 3, ``beta``-smooth with ``|grad F|^2 >= 2 mu (F - F*)``: ``E F(w) - F*`` of at most the accuracy.

    ``gamma = 2 eps mu / (M2 beta)`` and ``T = M2 beta / (4 mu^2 eps) * log(2 (F(w_0) - F*) / eps)``, provided that
    ``B <= 1 / (2 gamma mu)``.

    Args:
        accuracy: ``eps``, of ``F - F*``.
        smoothness: ``beta``.
        polyak_lojasiewicz: ``mu``.
        second_moment: ``M2``.
        initial_gap: ``F(w_0) - F*``.
        delta: Of ``B <= delta * B_S + 1``; 0 for serial SGD.

    Raises:
        ValueError: If a number is not positive, or delta negative.

    """
    mu = polyak_lojasiewicz
    check_positive(accuracy=accuracy, smoothness=smoothness, polyak_lojasiewicz=mu)
    check_positive(second_moment=second_moment, initial_gap=initial_gap)
    step_size = 2 * accuracy * mu / (second_moment * smoothness)
    return Guarantee(
        step_size=step_size,
        evaluations=_evaluations(2 * step_size * mu, initial_gap, accuracy),
        accuracy=_with_excess(accuracy, delta),
        max_batch_size=1 / (2 * step_size * mu),
    )


def convex_guarantee(accuracy: float, *, second_moment: float, sq_distance: float, delta: float = 0.0) -> Guarantee:
    """Theorem 4, convex: ``E F - F*`` of at most the accuracy at the mean of the iterates.

    ``gamma = eps / M2`` and ``T = M2 D0 / eps^2``.

    Args:
        accuracy: ``eps``, of ``F - F*``.
        second_moment: ``M2``.
        sq_distance: ``D0 = |w_0 - w*|^2``.
        delta: Of ``B <= delta * B_S + 1``; 0 for serial SGD.

    Raises:
        ValueError: If a number is not positive, or delta negative.

    """
    check_positive(accuracy=accuracy, second_moment=second_moment, sq_distance=sq_distance)
    return Guarantee(
        step_size=accuracy / second_moment,
        evaluations=second_moment * sq_distance / accuracy**2,
        accuracy=_with_excess(accuracy, delta),
    )


def strongly_convex_guarantee(
    accuracy: float, *, strong_convexity: float, second_moment: float, sq_distance: float, delta: float = 0.0
) -> Guarantee:
    """Theorem 5, ``lambda``-strongly convex: ``E|w - w*|^2`` of at most the accuracy.

    ``gamma = eps lambda / M2`` and ``T = M2 / (2 lambda^2 eps) * log(2 D0 / eps)``, provided that
    ``B <= 1 / (2 lambda gamma)``.

    Args:
        accuracy: ``eps``, of ``|w - w*|^2``.
        strong_convexity: ``lambda``.
        second_moment: ``M2``.
        sq_distance: ``D0 = |w_0 - w*|^2``.
        delta: Of ``B <= delta * B_S + 1``; 0 for serial SGD.

    Raises:
        ValueError: If a number is not positive, or delta negative.

    """
    check_positive(accuracy=accuracy, strong_convexity=strong_convexity)
    check_positive(second_moment=second_moment, sq_distance=sq_distance)
    step_size = accuracy * strong_convexity / second_moment
    return Guarantee(
        step_size=step_size,
        evaluations=_evaluations(2 * step_size * strong_convexity, sq_distance, accuracy),
        accuracy=_with_excess(accuracy, delta),
        max_batch_size=1 / (2 * step_size * strong_convexity),
    )


def _evaluations(rate: float, initial_error: float, accuracy: float) -> float:
    """Evaluations after which what is left of the initial error, ``e^(-rate T)`` of it, is ``eps / 2``."""
    return max(0.0, math.log(2 * initial_error / accuracy)) / rate


def _with_excess(accuracy: float, delta: float) -> float:
    check(delta >= 0, "delta", "at least 0", delta)
    return (1 + delta / 2) * accuracy
