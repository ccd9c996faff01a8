"""Per-example gradients at two weight vectors: the same examples, the same noise."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_graddiv.diversity import GradientSums
from lightning_graddiv.errors import FunctionalEngineError, MeasurementError
from lightning_graddiv.per_example.batches import count_examples, select
from lightning_graddiv.per_example.functional import require_finite
from lightning_graddiv.per_example.losses import StepLoss, measuring
from lightning_graddiv.per_example.materialised import ExampleRows, chunks
from lightning_graddiv.per_example.norms import real_view, sum_dtype, sum_of_squares
from lightning_graddiv.per_example.select import is_check_due, with_frozen_copied
from lightning_graddiv.per_example.separability import check_engine, check_separable
from lightning_graddiv.streams import seed_of

_SAME_POINT = 1e-7
"""Distance over norm below which a difference of gradients is rounding."""


class DifferentialEngine:
    """Measures differences of per-example gradients, checking now and then that the batch can be split at all.

    Args:
        callback: whose name is said in warnings.
        max_examples: measure at most so many examples of a batch, evenly spaced. None: all.
    """

    def __init__(self, callback: str, max_examples: int | None) -> None:
        self._rows = ExampleRows(callback)
        self._max_examples = max_examples
        self._measured = 0
        self._is_trusted = False

    def measure(
        self, loss: StepLoss, batch: Any, reference: Sequence[Tensor], *, at_most: int | None, seed: int
    ) -> tuple[GradientSums, float, float]:
        """Return the sums of ``Dg_i / |Dw|``, the sum of ``<Dw, Dg_i> / |Dw|^2``, and ``|Dw|``.

        Args:
            loss: the step's loss, at ``w``.
            batch: a batch of examples.
            reference: ``w'``, in the order of the loss's parameters.
            at_most: how many examples the loader draws for a full batch, where known.
            seed: of the noise in the step, the same at ``w`` and ``w'``.

        Raises:
            MeasurementError: the batch cannot be split into examples, a gradient is not finite, or ``w`` is ``w'``.
        """
        total = count_examples(batch, at_most)
        if self._max_examples is not None and total > self._max_examples:
            examples = [i * total // self._max_examples for i in range(self._max_examples)]
            batch, total = select(batch, examples, total), self._max_examples
        measured = with_frozen_copied(loss, lambda: self._measure(loss, batch, total, reference, seed))
        self._measured += 1
        return measured

    def _measure(
        self, loss: StepLoss, batch: Any, total: int, reference: Sequence[Tensor], seed: int
    ) -> tuple[GradientSums, float, float]:
        values = [parameter.detach() for parameter in loss.parameters]
        steps = [a - b for a, b in zip(values, reference, strict=True)]
        sq_distance = sum_of_squares(steps)
        require_finite(sq_distance, "weight vector")
        distance = float(sq_distance) ** 0.5
        if not distance > _SAME_POINT * float(sum_of_squares(values)) ** 0.5:
            raise MeasurementError("The weights and the reference are the same, so that no gradients differ.")
        norms, sums = [], None
        with measuring(loss.module, seed):
            self._check_if_due(loss, batch, total)
            for examples, part in chunks(loss, batch, total):
                rows = self._differences(loss, values, reference, part, len(examples), seed_of(seed, examples[0]))
                norms.append(sum_of_squares(rows, per_row=True))
                require_finite(norms[-1])
                added = [row.sum(0, dtype=sum_dtype(row)) for row in rows]
                sums = added if sums is None else [a.add_(b) for a, b in zip(sums, added, strict=True)]
        flat = torch.cat([real_view(part).flatten().double() for part in sums or []])
        direction = torch.cat([real_view(step).flatten().double() for step in steps])
        sum_sq_norms = float(torch.cat(norms).sum()) / distance**2
        alignment = float(flat @ direction) / distance**2
        return GradientSums(float(total), sum_sq_norms, flat / distance), alignment, distance

    def _differences(
        self,
        loss: StepLoss,
        values: Sequence[Tensor],
        reference: Sequence[Tensor],
        part: Any,
        total: int,
        seed: int,
    ) -> list[Tensor]:
        at = []
        for weights in (values, reference):
            torch.manual_seed(seed)  # the same masks at both
            at.append(self._rows(loss, weights, part, total))
        return [a.sub_(b) for a, b in zip(*at, strict=True)]

    def _check_if_due(self, loss: StepLoss, batch: Any, total: int) -> None:
        if total < 2 or (self._is_trusted and not is_check_due(self._measured)):
            return
        self._is_trusted = False
        sample = check_separable(loss, batch, total, seed=self._measured)
        try:
            check_engine(self._rows.engine, loss, sample)
        except FunctionalEngineError as error:
            self._rows.fall_back(loss, error)
        self._is_trusted = True
