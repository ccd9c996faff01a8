"""Lower bounds on the batch-size bound that hold for every ``w`` and need nothing but the data.

They are of the arXiv version (theorems 1 and 2, corollaries 1 and 2; remarks 1 and 2 of AISTATS), and hold for the
differential bound ``B_S(w, w')`` too, because differences of gradients have the same form.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_graddiv.theory._checks import check

_LARGEST_GRAM = 4096
"""Rows of a Gram matrix whose largest eigenvalue is computed exactly, in a few seconds."""

_ROWS_AT_A_TIME = 1024

_ENTRIES_AT_A_TIME = 2**25


def glm_batch_size_bound(features: Tensor) -> float:
    """Lower bound on ``B_S(w)`` of a generalised linear model (arXiv Theorem 1): ``n min_i |x_i|^2 / sigma_max(X)^2``.

    Holds for every ``w`` where ``f_i(w) = l_i(x_i' w)``: linear and logistic regression, hinge loss. Append the column
    of ones where the model has an intercept. It also holds for several outputs, ``f_i(W) = l_i(W x_i)``, as in softmax
    regression (derived: ``|sum_i l_i' x_i'| <= sigma_max |L'|`` in the Frobenius norm). Weight decay in the loss is not
    covered. Tight where all rows have one length and the derivatives ``l_i'`` lie along the top left singular vector.

    The largest singular value is exact where ``min(n, d) <= 4096``, and by ARPACK's truncated decomposition, to
    machine precision, beyond that and for sparse features; both in float64.

    Args:
        features: ``X``, one example a row, shape ``(n, d)``; may be a sparse tensor.

    Returns:
        At least 1, since no ``B_S`` is less; ``1.0`` says nothing.

    Raises:
        ValueError: If ``features`` is not a finite matrix with ``n >= 1``, or has no entry but 0.
        ImportError: If SciPy is needed and not installed.

    Example:
        >>> glm_batch_size_bound(torch.eye(4))
        4.0

    """
    is_matrix = features.ndim == 2 and len(features) > 0 and features.shape[1] > 0
    check(is_matrix, "features", "of shape (n, d)", tuple(features.shape))
    features = features.detach().cpu()
    if features.layout != torch.strided:
        features = features.to_sparse_coo().coalesce()
        values = features.values().double()
        sq_norms = values.new_zeros(len(features)).index_add_(0, features.indices()[0], values.square())
    else:
        sq_norms = torch.cat([rows.double().square().sum(1) for rows in features.split(_ROWS_AT_A_TIME)])
    check(bool(sq_norms.isfinite().all()), "features", "finite", "infinities or NaN")
    check(bool(sq_norms.any()), "features", "other than all zeros", "zeros")
    bound = len(features) * float(sq_norms.min()) / _largest_sq_singular_value(features)
    return max(1.0, bound)


def rademacher_batch_size_bound(n: int, d: int) -> float:
    """What :func:`glm_batch_size_bound` comes to for random signs: ``n d / (sqrt(n) + sqrt(d))^2`` (arXiv Corollary 2).

    The paper states ``B_S >= c d`` for all ``w``, with high probability, where ``n >= d``. The constant is that of the
    leading order in large ``n`` and ``d`` (derived): ``|x_i|^2 = d`` exactly, and ``sigma_max -> sqrt(n) + sqrt(d)``
    (Bai and Yin). So ``c = 1 / (1 + sqrt(d/n))^2``, from 1/4 at ``n = d`` to 1 for ``n >> d``.

    Args:
        n: Examples.
        d: Features, independent and uniform in {-1, 1}.

    Raises:
        ValueError: If one is below 1.

    """
    check(n >= 1, "n", "at least 1", n)
    check(d >= 1, "d", "at least 1", d)
    return max(1.0, n * d / (math.sqrt(n) + math.sqrt(d)) ** 2)


def sub_gaussian_batch_size_bound(n: int, d: int) -> float:
    """What :func:`glm_batch_size_bound` comes to for independent sub-Gaussian features (arXiv Corollary 1).

    The paper states ``B_S >= c d`` for all ``w``, with high probability, where ``n >= d`` and the features have mean 0
    and one variance. The constant is that of normal features at leading order (derived): that of
    :func:`rademacher_batch_size_bound`, times ``1 - 2 sqrt(log(n) / d)`` for the shortest of ``n`` rows (Laurent and
    Massart: ``|x|^2 >= d - 2 sqrt(d u)`` with probability ``1 - e^-u``, here at ``u = log n``). It says nothing (1)
    where ``d < 4 log n``.

    Args:
        n: Examples.
        d: Features.

    Raises:
        ValueError: If one is below 1.

    """
    shortest = 1 - 2 * math.sqrt(math.log(n) / d) if n >= 1 and d >= 1 else 0.0
    return max(1.0, rademacher_batch_size_bound(n, d) * shortest)


def sparse_batch_size_bound(supports: Tensor | Sequence[Iterable[int]]) -> float:
    """Lower bound on ``B_S(w)`` from which parameters an example's gradient touches: ``n / (r + 1)`` (arXiv Theorem 2).

    Two examples conflict when their gradients share a parameter; ``r`` is the largest number of *other* examples that
    one conflicts with. Holds for every ``w`` at which the supports are these or smaller. Tight: groups of ``r + 1``
    identical examples (derived).

    Args:
        supports: Shape ``(n, d)``: entry (i, j) is non-zero where example i may have a gradient in parameter j. Or, for
            each example, the parameters that it touches, as integers.

    Raises:
        ValueError: If there is no example, or the tensor is not of shape ``(n, d)``.

    Example:
        >>> sparse_batch_size_bound([[0, 1], [1, 2], [3], [4]])
        2.0

    """
    incidence = _incidence(supports)
    check(incidence.shape[0] >= 1, "supports", "of at least one example", incidence.shape[0])
    n, d = incidence.shape
    degree = 0
    for examples in torch.arange(n, device="cpu").split(max(1, min(_ROWS_AT_A_TIME, _ENTRIES_AT_A_TIME // max(n, d)))):
        rows = incidence.index_select(0, examples).to_dense()
        conflicts = torch.sparse.mm(incidence, rows.T) > 0  # (n, rows): sums of ones, never rounded to 0
        with_itself = (rows.sum(1) > 0).long()
        degree = max(degree, int((conflicts.sum(0) - with_itself).max()))
    return n / (degree + 1)


def _incidence(supports: Tensor | Sequence[Iterable[int]]) -> Tensor:
    """Return a sparse float32 matrix of ones, examples by parameters."""
    if isinstance(supports, Tensor):
        check(supports.ndim == 2, "supports", "of shape (n, d)", tuple(supports.shape))
        coalesced = supports.detach().cpu().to_sparse_coo().coalesce()
        indices = coalesced.indices()[:, coalesced.values() != 0]
        shape = tuple(supports.shape)
    else:
        touched = [sorted(set(support)) for support in supports]
        numbers = {parameter: j for j, parameter in enumerate(sorted({p for support in touched for p in support}))}
        rows = [i for i, support in enumerate(touched) for _ in support]
        columns = [numbers[parameter] for support in touched for parameter in support]
        indices = torch.tensor([rows, columns], dtype=torch.long, device="cpu")
        shape = (len(touched), max(1, len(numbers)))
    ones = torch.ones(indices.shape[1], device="cpu")
    return torch.sparse_coo_tensor(indices, ones, shape, check_invariants=True).coalesce()


def _largest_sq_singular_value(features: Tensor) -> float:
    n, d = features.shape
    if features.layout == torch.strided and min(n, d) <= _LARGEST_GRAM:
        return float(torch.linalg.eigvalsh(_gram(features))[-1])
    try:
        from scipy.sparse import csr_array  # type: ignore[import-untyped]
        from scipy.sparse.linalg import svds  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("Features this large, or sparse, need SciPy: pip install scipy") from error
    if features.layout == torch.strided:
        matrix = features.double().numpy()
    else:
        matrix = csr_array((features.values().double().numpy(), features.indices().numpy()), shape=(n, d))
    if min(n, d) == 1:
        return float((matrix**2).sum())
    start = np.random.default_rng(0).standard_normal(min(n, d))  # ARPACK would draw from NumPy's global generator
    return float(svds(matrix, k=1, v0=start, return_singular_vectors=False)[0]) ** 2


def _gram(features: Tensor) -> Tensor:
    """Return ``X'X`` or ``XX'``, whichever is smaller, in float64 without a float64 copy of a large ``X``."""
    if features.shape[0] < features.shape[1]:
        features = features.T
    gram = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64, device="cpu")
    for rows in features.split(_ROWS_AT_A_TIME):
        wide = rows.double()
        gram.addmm_(wide.T, wide)
    return gram
