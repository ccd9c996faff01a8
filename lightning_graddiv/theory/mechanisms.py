"""Diversity-inducing mechanisms: what noise in the gradients does to the batch-size bound (theorem 7).

A mechanism replaces each ``g_i`` by a random surrogate, independent across examples. With ``A = sum |g_i|^2``,
``X = sum_{i != j} <g_i, g_j>`` and ``C = A + X``, the bound becomes ``B = n sum E|g_i'|^2 / E|sum g_i'|^2``. Theorem 7:
none of these is below ``B_S`` where ``B_S <= n``.

None of it is progress. A mechanism multiplies ``M2`` by kappa and leaves the signal alone (up to the scale of an
update), so that the bound grows by the noise: ``delta B_S + 1`` examples then hold kappa times the noise, and as many
communication rounds are needed (derived). Report ``M2`` and ``|G|^2`` beside the bound.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_graddiv.diversity import GradientSums
from lightning_graddiv.theory._checks import check, check_positive


def mechanism_batch_size_bound(bound: float, factor: float, dataset_size: int | None = None) -> float:
    """Bound under any unbiased mechanism that multiplies ``M2`` by kappa: ``1/B' = 1/n + (1/B_S - 1/n)/kappa``.

    Derived: ``1/B_S = (A + X) / (n A)``, and ``X`` stays while ``A`` becomes ``kappa A``. A constant factor on all
    surrogates changes nothing.

    Args:
        bound: ``B_S`` without it.
        factor: ``kappa``, at least 1: ``E|g'|^2 / |E g'|^2`` in the mean over the examples.
        dataset_size: ``n``; None: a stream, ``B' = kappa B_S``.

    Raises:
        ValueError: If a number is out of range.

    """
    check(bound >= 1, "bound", "at least 1", bound)
    check(factor >= 1, "factor", "at least 1", factor)
    if dataset_size is None:
        return factor * bound
    check(dataset_size >= 1, "dataset_size", "at least 1 or None", dataset_size)
    inverse = 1 / dataset_size + (1 / bound - 1 / dataset_size) / factor
    return 1 / inverse if inverse > 0 else float("inf")


def drop_connect_batch_size_bound(bound: float, probability: float, dataset_size: int | None = None) -> float:
    """Bound under DropConnect: ``n A / (A + (1-p) X)``; ``B_S / (1-p)`` for ``n -> inf``.

    Each entry of each example's gradient is dropped with probability p; whether the others are scaled by ``1/(1-p)``
    makes no difference to the bound.

    Args:
        bound: ``B_S`` without it.
        probability: ``p``, in [0, 1).
        dataset_size: ``n``; None for a stream.

    Raises:
        ValueError: If a number is out of range.

    """
    check(0 <= probability < 1, "probability", "at least 0 and below 1", probability)
    return mechanism_batch_size_bound(bound, 1 / (1 - probability), dataset_size)


def langevin_batch_size_bound(
    second_moment: float, sq_norm: float, *, sigma: float, parameters: int, dataset_size: int | None = None
) -> float:
    """Bound under SGLD: ``(n A + n^2 d sigma^2) / (C + n d sigma^2)`` with ``N(0, sigma^2 I)`` on each gradient.

    That is ``(M2 + d sigma^2) / (|G|^2 + d sigma^2 / n)``.

    Args:
        second_moment: ``M2``, the mean of ``|g_i|^2``.
        sq_norm: ``|G|^2`` of the whole data set.
        sigma: Standard deviation of the noise in each entry of each example's gradient.
        parameters: ``d``.
        dataset_size: ``n``; None for a stream.

    Raises:
        ValueError: If a number is out of range.

    """
    check_positive(second_moment=second_moment, parameters=parameters)
    check(0 <= sq_norm <= second_moment * (1 + 1e-9), "sq_norm", "between 0 and `second_moment`", sq_norm)
    check(sigma >= 0, "sigma", "at least 0", sigma)
    noise = parameters * sigma**2
    signal = sq_norm + (0.0 if dataset_size is None else noise / dataset_size)
    return (second_moment + noise) / signal if signal > 0 else float("inf")


def quantization_factor(gradients: Tensor) -> float:
    """Kappa of the paper's quantisation: ``sum |g_i|_2 |g_i|_1 / sum |g_i|_2^2``, from 1 to ``sqrt(d)``.

    ``[Q(v)]_l = |v|_2 sign(v_l) eta_l`` with independent ``P(eta_l = 1) = |v_l| / |v|_2`` has ``E Q(v) = v`` and
    ``E|Q(v)|^2 = |v|_2 |v|_1``.

    Args:
        gradients: Per-example gradients, shape ``(n, d)``.

    Raises:
        ValueError: If all gradients are zero.

    """
    wide = gradients.double()
    norms = torch.linalg.vector_norm(wide, dim=1)
    total = float(norms.square().sum())
    check(total > 0, "gradients", "not all zero", "zeros")
    return float((norms * wide.abs().sum(1)).sum()) / total


def quantized_batch_size_bound(gradients: Tensor) -> float:
    """Bound under the paper's quantisation of each example's gradient: ``n Q / (Q + X)``, ``Q = sum |g_i|_2 |g_i|_1``.

    Args:
        gradients: Per-example gradients of the whole data set, shape ``(n, d)``.

    Raises:
        ValueError: If all gradients are zero.

    """
    moments = GradientSums.from_gradients(gradients).moments()
    quantized = quantization_factor(gradients) * moments.sum_sq_norms
    whole = quantized + moments.sq_norm_of_sum - moments.sum_sq_norms
    return moments.count * quantized / whole if whole > 0 else float("inf")


@dataclass(frozen=True)
class MechanismEffect:
    """What a mechanism did to one step's gradient, in expectation over its own random numbers.

    Attributes:
        scale: The factor on the mean: 1 for an unbiased mechanism, ``1 - p`` for DropConnect without rescaling.
        variance: ``E|g' - scale g|^2`` of the step's mean gradient ``g``, summed over the parameters.
        sum_sq_weights: ``sum a_i^2`` of the weights with which the step's examples enter ``g``: ``1/B`` for a mean over
            B examples.

    """

    scale: float
    variance: float
    sum_sq_weights: float

    def second_moment(self, second_moment: float) -> float:
        """``M2`` with the mechanism: ``scale^2 M2 + variance / sum a_i^2`` (derived).

        The noise counted to each example alike, as if it had been added to the gradients one by one: so it is for
        masks per example and for Langevin noise. A mask or a quantisation of a whole worker's gradient adds more.
        """
        return self.scale**2 * second_moment + self.variance / self.sum_sq_weights

    def sq_norm(self, sq_norm: float) -> float:
        """``|G|^2`` with the mechanism: ``scale^2 |G|^2``."""
        return self.scale**2 * sq_norm

    def then(self, other: "MechanismEffect") -> "MechanismEffect":
        """Return the effect of this mechanism and another one after it."""
        variance = other.scale**2 * self.variance + other.variance
        return MechanismEffect(self.scale * other.scale, variance, self.sum_sq_weights)
