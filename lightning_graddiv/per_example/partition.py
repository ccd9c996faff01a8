"""Squared norms add over parameters: each is measured by the cheapest engine that is proven right for it."""

from typing import Any

import torch

from lightning_graddiv.errors import MeasurementError
from lightning_graddiv.per_example.functional import PerExampleGradients
from lightning_graddiv.per_example.losses import StepLoss
from lightning_graddiv.per_example.norms import real_view, sum_dtype
from lightning_graddiv.per_example.proof import ghost_pass, prove
from lightning_graddiv.per_example.separability import MIXED_OR_WEIGHTED, refuse_weighted

_PARTS = 8


def ghost_gradients(loss: StepLoss, batch: Any, total: int) -> tuple[PerExampleGradients, dict[int, str]]:
    """Measure a batch by one forward and backward pass of a shadow of the module, on the parameters that allow it.

    Args:
        loss: the step's loss.
        batch: a batch of ``total`` examples.
        total: the number of examples, at least 2.

    Returns:
        The unit gradients' squared norms over the parameters that are covered, with the whole sum; and why the others
        are not, by their index.

    Raises:
        MeasurementError: the loss mixes or weighs examples, or the batch cannot be split.
    """
    plan, sample = prove(loss, batch, total, parts=_PARTS)
    refuse_weighted(sample)
    if plan.reduction == "weighted":
        raise MeasurementError(MIXED_OR_WEIGHTED, lasting=True)
    recorded, gradients = ghost_pass(loss, batch, total, plan)
    misses = {**recorded.misses, **plan.misses}
    scale = float(total) if plan.reduction == "mean" else 1.0
    covered = [index for index in range(len(loss.parameters)) if index not in misses]
    whole = torch.cat([real_view(gradient).flatten().to(sum_dtype(gradient)) for gradient in gradients])
    return PerExampleGradients(scale**2 * recorded.total(covered).cpu(), scale * whole), misses
