"""Squared norms add over parameters: each is measured by the cheapest engine that is proven right for it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_graddiv.errors import MeasurementError
from lightning_graddiv.per_example.functional import PerExampleGradients, differentiate
from lightning_graddiv.per_example.ghost import GhostRecorder, Recorded
from lightning_graddiv.per_example.guard import writes_refused
from lightning_graddiv.per_example.losses import StepLoss
from lightning_graddiv.per_example.noise import noise_off
from lightning_graddiv.per_example.norms import real_view, sum_dtype
from lightning_graddiv.per_example.proof import GhostPlan, prove
from lightning_graddiv.per_example.separability import (
    MIXED_OR_WEIGHTED,
    Sample,
    full_precision,
    refuse_weighted,
    tolerance,
)


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
    plan, sample = prove(loss, batch, total)
    refuse_weighted(sample)
    with noise_off(), writes_refused(loss.module), full_precision():
        recorded, gradients = _pass(loss, batch, total, plan)
    _refuse_other_weights(recorded, sample, plan, tolerance(loss.module))
    if sample.is_noisy:
        recorded, gradients = _pass(loss, batch, total, plan)
    misses = {**recorded.misses, **plan.misses}
    scale = float(total) if plan.reduction == "mean" else 1.0
    covered = [index for index in range(len(loss.parameters)) if index not in misses]
    whole = torch.cat([real_view(gradient).flatten().to(sum_dtype(gradient)) for gradient in gradients])
    return PerExampleGradients(scale**2 * recorded.total(covered), scale * whole), misses


def _pass(loss: StepLoss, batch: Any, total: int, plan: GhostPlan) -> tuple[Recorded, list[Tensor]]:
    with GhostRecorder(loss.parameters, plan.layouts, shared=plan.shared) as recorder:

        def watch(module: nn.Module, stand_ins: Sequence[Tensor] | None = None) -> None:
            recorder.attach(module, stand_ins)
            recorder.begin(total)

        gradients = differentiate(loss, batch, watch)
        return recorder.finish(), gradients


def _refuse_other_weights(recorded: Recorded, sample: Sample, plan: GhostPlan, allowed: float) -> None:
    """Refuse a batch in which the sampled examples weigh more or less than among themselves: padded sequences."""
    covered = [index for index in range(len(sample.parts)) if index not in recorded.misses and index not in plan.misses]
    alone = torch.stack([sample.parts[index].double().square().sum(1) for index in covered] or [sample.sq_norms * 0])
    scale = float(recorded.examples) if plan.reduction == "mean" else 1.0
    together = scale**2 * recorded.total(covered)[sample.examples]
    wanted = alone.sum(0)
    if bool(((together - wanted).abs() > 4 * allowed * wanted.max()).any()):
        raise MeasurementError(MIXED_OR_WEIGHTED, lasting=True)
