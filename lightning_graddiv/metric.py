"""Gradient diversity as torchmetrics metrics: exact over all examples since reset, over all processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_graddiv.diversity import GradientSums, bound_from_pairs, check_dataset_size


class GradientDiversity(Metric):
    """Gradient diversity of all examples seen since reset, over all processes (Definition 4).

    ``Delta_S(w) = sum_i |g_i|^2 / |sum_i g_i|^2``. All updates between two resets must be taken at the same
    weights: over a moving ``w`` the result belongs to no weights at all. A common factor on all gradients
    leaves it alone.

    As input to ``forward`` and ``update`` the metric accepts

    - ``gradients``: per-example gradients, one flattened gradient a row, shape ``(n, d)``; or the
      :class:`~lightning_graddiv.diversity.GradientSums` of some examples, for those who never hold the
      matrix.

    As output of ``forward`` and ``compute`` it returns

    - a 0-dim float64 tensor: ``inf`` when the gradients cancel, ``nan`` when there is none or all are zero.

    Across processes the d-vector is all-reduced, not gathered: no process ever holds ``world x d`` numbers.

    Args:
        kwargs: Additional keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: In ``update``, if the input has another shape, or another ``d`` than before; the state
            is unchanged.

    Example:
        >>> import torch
        >>> from lightning_graddiv.metric import GradientDiversity
        >>> metric = GradientDiversity()
        >>> metric.update(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
        >>> metric.update(torch.tensor([[0.0, 2.0]]))
        >>> metric.compute()
        tensor(0.7500, dtype=torch.float64)

    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    plot_lower_bound = 0.0

    count: Tensor
    sum_sq_norms: Tensor
    gradient_sum: Tensor

    def __init__(self, **kwargs: Any) -> None:
        if kwargs.get("dist_sync_fn") is None:
            kwargs["dist_sync_fn"] = all_reduce_sum
        super().__init__(**kwargs)
        # d is unknown before the first update: the empty vector sum is the scalar 0, which broadcasts.
        for name in ("count", "sum_sq_norms", "gradient_sum"):
            self.add_state(name, torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, gradients: Tensor | GradientSums) -> None:
        """Add the examples of ``gradients``, of shape ``(n, d)`` or summed already."""
        sums = self._checked_sums(gradients)
        self.count = self.count + sums.count
        self.sum_sq_norms = self.sum_sq_norms + sums.sum_sq_norms
        self.gradient_sum = self.gradient_sum + sums.gradient_sum.detach().to(self.gradient_sum)

    def forward(self, gradients: Tensor | GradientSums) -> Any:
        """Add the examples of ``gradients`` and return the value of these examples alone."""
        # torchmetrics puts the state aside while it updates: a refusal in there would lose it.
        return super().forward(self._checked_sums(gradients))

    def compute(self) -> Tensor:
        """Definition 4 over all examples seen."""
        return self.sum_sq_norms / self.gradient_sum.square().sum()

    def sync(self, dist_sync_fn: Callable[..., Any] | None = None, *args: Any, **kwargs: Any) -> None:
        """Synchronize the states; called by hand too, by all-reduce unless told otherwise."""
        super().sync(dist_sync_fn or self.dist_sync_fn, *args, **kwargs)

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Plot one value, or several as a time series; of ``compute()`` when none is given.

        Args:
            val: Results of ``forward`` or ``compute``.
            ax: A matplotlib axis to draw on.

        Returns:
            Figure and axis.

        """
        return self._plot(val, ax)

    def _checked_sums(self, gradients: Tensor | GradientSums) -> GradientSums:
        sums = gradients if isinstance(gradients, GradientSums) else GradientSums.from_gradients(gradients)
        if self.gradient_sum.ndim and self.gradient_sum.shape != sums.gradient_sum.shape:
            raise ValueError(
                f"Expected argument `gradients` to be of dimension d = {len(self.gradient_sum)}, as in the "
                f"updates before, but got {len(sums.gradient_sum)}"
            )
        return sums


class BatchSizeBound(GradientDiversity):
    """Batch-size bound ``B_S`` of a data set from all examples seen since reset (Definition 5).

    Exact when all ``n`` examples of the data set were seen; unbiased (in ``1 / B_S``) from a part drawn
    without replacement, derived as in :func:`~lightning_graddiv.diversity.estimate_diversity`::

        rho = (S2 - S1) / ((M - 1) S1),    1 / B_S = 1/n + (1 - 1/n) rho

    As input to ``forward`` and ``update`` the metric accepts what :class:`GradientDiversity` does; the
    gradients must be *unit* gradients, of each example's own loss, up to one common factor.

    As output of ``forward`` and ``compute`` it returns

    - a 0-dim float64 tensor, at least 1: ``inf`` when the bound is larger than these examples can see,
      ``nan`` when they hold no pair (fewer than two examples of a larger data set) or all gradients are
      zero.

    Args:
        dataset_size: Number of distinct examples ``n``; ``None`` for a stream, or for draws with
            replacement.
        kwargs: Additional keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``dataset_size < 1``, or more than ``dataset_size`` examples were seen.

    Example:
        >>> import torch
        >>> from lightning_graddiv.metric import BatchSizeBound
        >>> metric = BatchSizeBound(dataset_size=3)
        >>> metric.update(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]]))
        >>> metric.compute()
        tensor(2.2500, dtype=torch.float64)

    """

    plot_lower_bound = 1.0

    def __init__(self, dataset_size: int | None = None, **kwargs: Any) -> None:
        check_dataset_size(dataset_size)
        super().__init__(**kwargs)
        self.dataset_size = dataset_size

    def compute(self) -> Tensor:
        """``B_S`` from all examples seen."""
        moments = GradientSums(float(self.count), float(self.sum_sq_norms), self.gradient_sum.reshape(-1)).moments()
        try:
            self._check_seen(moments.count)
        except ValueError:
            if self._is_synced:  # torchmetrics undoes its synchronization only when compute returns
                self.unsync()
            raise
        signal = moments.sq_norm_of_sum - moments.sum_sq_norms
        second_moment = (moments.count - 1) * moments.sum_sq_norms
        bound = bound_from_pairs(signal, second_moment, self.dataset_size)
        defined = second_moment > 0 or (self.dataset_size == 1 and moments.sum_sq_norms > 0)
        return self.count.new_tensor(bound if defined else torch.nan)

    def _checked_sums(self, gradients: Tensor | GradientSums) -> GradientSums:
        sums = super()._checked_sums(gradients)
        self._check_seen(float(self.count) + sums.count)
        return sums

    def _check_seen(self, count: float) -> None:
        if self.dataset_size is not None and count > self.dataset_size:
            raise ValueError(
                f"Expected at most `dataset_size` = {self.dataset_size} examples but got {count:g}: some were"
                " counted twice. Reset the metric between passes, and mind that a DistributedSampler repeats"
                " examples to even out the ranks; for draws with replacement pass `dataset_size=None`"
            )


def all_reduce_sum(state: Tensor, group: Any = None) -> list[Tensor]:
    """Sum one state over the processes: a ``dist_sync_fn`` for torchmetrics, which expects a list.

    A process without examples still holds the scalar 0 where others hold a vector, so they agree on the
    dimension first.

    Args:
        state: This process's scalar, or vector of shape ``(d,)``.
        group: Process group; the world when ``None``.

    Raises:
        ValueError: On every process alike, if two of them hold vectors of different dimension.

    """
    dimension = len(state) if state.ndim else -1
    no_limit = torch.iinfo(torch.int64).max
    # One MAX gives the largest dimension and, by its sign, the smallest among those that have one.
    extremes = torch.tensor([dimension, -dimension if state.ndim else -no_limit], device=state.device)
    torch.distributed.all_reduce(extremes, torch.distributed.ReduceOp.MAX, group=group)
    largest, smallest = int(extremes[0]), -int(extremes[1])
    if largest >= 0 and largest != smallest:
        raise ValueError(f"Expected gradients of one dimension on all processes but got {smallest} and {largest}")
    total = state.clone() if state.ndim or largest < 0 else state.new_zeros(largest)
    torch.distributed.all_reduce(total, group=group)
    return [total]
