"""Differential diversity, and how large a step may be before training is unstable (section 5 of the paper)."""

import math

from torch import Tensor

from lightning_graddiv.diversity import batch_size_bound, gradient_diversity
from lightning_graddiv.theory._checks import check, check_positive


def differential_diversity(gradients: Tensor, reference_gradients: Tensor) -> Tensor:
    """Differential gradient diversity ``Delta_S(w, w')``: Definition 4 of ``grad f_i(w) - grad f_i(w')``.

    Args:
        gradients: Per-example gradients at ``w``, shape ``(n, d)``.
        reference_gradients: Those of the same examples at ``w'``, shape ``(n, d)``.

    Returns:
        A 0-dim float64 tensor; see :func:`~lightning_graddiv.gradient_diversity`.

    Raises:
        ValueError: If the shapes differ, or are not ``(n, d)`` of floating-point numbers.

    """
    return gradient_diversity(_differences(gradients, reference_gradients))


def differential_batch_size_bound(gradients: Tensor, reference_gradients: Tensor) -> Tensor:
    """Differential batch-size bound ``B_S(w, w') = n Delta_S(w, w')``: Definition 5 of the differences.

    Arguments and errors are those of :func:`differential_diversity`. Exact for the rows given and for nothing else:
    from a part of the data use :class:`~lightning_graddiv.DifferentialDiversityMonitor`.
    """
    return batch_size_bound(_differences(gradients, reference_gradients))


def stability_step_size(
    *, smoothness: float, batch_size: float, bound: float, dataset_size: int, strong_convexity: float = 0.0
) -> float:
    """Largest ``gamma`` for which mini-batches are as stable as serial SGD (the paper's stability theorems).

    ``gamma <= 2 / ((beta + lambda) (1 + 1/(n-1) + (B-1) / B_S(w, w')))`` for all ``w != w'``, with every ``f_i``
    convex, ``L``-Lipschitz and ``beta``-smooth; ``lambda = 0`` without strong convexity. Then :func:`stability_bound`
    holds.

    Args:
        smoothness: ``beta``.
        batch_size: ``B``.
        bound: The smallest ``B_S(w, w')`` over all ``w != w'``.
        dataset_size: ``n``, at least 2.
        strong_convexity: ``lambda``.

    Returns:
        ``gamma``, on the *sum* of a batch's gradients: PyTorch's learning rate on a mean loss is ``gamma * B``.

    Raises:
        ValueError: If a number is out of range.

    """
    check_positive(smoothness=smoothness)
    check(strong_convexity >= 0, "strong_convexity", "at least 0", strong_convexity)
    check(batch_size >= 1, "batch_size", "at least 1", batch_size)
    check(bound >= 1, "bound", "at least 1", bound)
    check(dataset_size >= 2, "dataset_size", "at least 2", dataset_size)
    excess = 1 / (dataset_size - 1) + (batch_size - 1) / bound
    return 2 / ((smoothness + strong_convexity) * (1 + excess))


def stability_bound(
    *,
    lipschitz: float,
    dataset_size: int,
    step_size: float | None = None,
    evaluations: float | None = None,
    strong_convexity: float = 0.0,
) -> float:
    """Uniform stability at a step size within :func:`stability_step_size`, an upper bound on the generalisation gap.

    Convex: ``eps_stab <= 2 gamma L^2 T / n``. ``lambda``-strongly convex: ``4 L^2 / (lambda n)``, however long the
    training.

    Args:
        lipschitz: ``L``, of every ``f_i``.
        dataset_size: ``n``.
        step_size: ``gamma``; needed where ``strong_convexity`` is 0.
        evaluations: ``T``, gradients evaluated in total; needed where ``strong_convexity`` is 0.
        strong_convexity: ``lambda``.

    Raises:
        ValueError: If a number is missing or out of range.

    """
    check_positive(lipschitz=lipschitz, dataset_size=dataset_size)
    check(strong_convexity >= 0, "strong_convexity", "at least 0", strong_convexity)
    if strong_convexity > 0:
        return 4 * lipschitz**2 / (strong_convexity * dataset_size)
    if step_size is None or evaluations is None:
        raise ValueError("Expected arguments `step_size` and `evaluations`, because `strong_convexity` is 0")
    check_positive(step_size=step_size)
    check(evaluations >= 0, "evaluations", "at least 0", evaluations)
    return 2 * step_size * lipschitz**2 * evaluations / dataset_size


def stability_learning_rate_cap(
    batch_size: float, *, inner_product: float, second_moment: float, sq_norm: float
) -> float:
    """Largest learning rate at which one step does not drive two runs apart (derived).

    With ``Dw = w - w'``, ``Dg_i = grad f_i(w) - grad f_i(w')`` and ``DG`` their mean, both runs taking the same batch
    of ``B`` examples, ``E|Dw+|^2 <= |Dw|^2`` exactly where the learning rate on the mean loss is at most::

        2 <Dw, DG> B / (M2 + (B - 1) |DG|^2)  =  2 <Dw, DG> / |DG|^2 * B / (B_S(w, w') + B - 1)

    A Barzilai-Borwein step times a curve that saturates at ``B_S(w, w') = M2 / |DG|^2``. The left form needs no
    division by ``|DG|^2``, which an unbiased estimate may put at zero.

    Args:
        batch_size: Effective batch size ``B``.
        inner_product: ``<Dw, DG>``; at 0 or below, no learning rate keeps the two from moving apart, and no cap is set.
        second_moment: ``M2 = mean |Dg_i|^2``.
        sq_norm: ``|DG|^2``. From a part of the data, the unbiased mean of ``<Dg_i, Dg_j>`` over pairs, or the cap comes
            out low; for batches of distinct examples the mean over all pairs of the data set is exact. Below 0 it
            counts as 0.

    Returns:
        A learning rate for a mean loss; ``inf`` without a cap.

    Raises:
        ValueError: If the batch size is below 1 or ``second_moment`` negative or NaN.

    Example:
        >>> stability_learning_rate_cap(1, inner_product=2.0, second_moment=4.0, sq_norm=4.0)  # f = w^2, Dw = 1
        1.0

    """
    check(batch_size >= 1, "batch_size", "at least 1", batch_size)
    check(second_moment >= 0, "second_moment", "at least 0", second_moment)
    if not inner_product > 0:
        return math.inf
    spread = second_moment + (batch_size - 1) * max(0.0, sq_norm)
    return 2 * inner_product * batch_size / spread if spread > 0 else math.inf


def _differences(gradients: Tensor, reference_gradients: Tensor) -> Tensor:
    shapes = tuple(gradients.shape), tuple(reference_gradients.shape)
    check(shapes[0] == shapes[1], "reference_gradients", f"of shape {shapes[0]}", shapes[1])
    return gradients.double() - reference_gradients.double()
