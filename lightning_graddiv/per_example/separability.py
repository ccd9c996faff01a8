"""Proof, by behaviour, that the gradient of a batch is made of the gradients of its examples."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_graddiv.errors import FunctionalEngineError, MeasurementError
from lightning_graddiv.per_example.batches import select
from lightning_graddiv.per_example.functional import PerExampleGradients, differentiate, sum_of_squares
from lightning_graddiv.per_example.losses import StepLoss
from lightning_graddiv.per_example.noise import noise_off

_EXAMPLES = 4


@dataclass(frozen=True)
class Sample:
    """A few examples of a batch with what the plain loop measures on them, noise off."""

    batch: Any
    total: int
    sq_norms: Tensor


def check_separable(loss: StepLoss, batch: Any, total: int, *, seed: int = 0) -> Sample:
    """Check that a few examples' gradients, taken alone, add up to the gradient that they have together.

    Dropout and other noise is switched off for the comparison. The sum may carry any common factor (a mean, a sum).

    Args:
        loss: the step's loss.
        batch: a batch of ``total`` examples.
        total: the number of examples, at least 2.
        seed: which examples are tried; at random, since batches are often ordered.

    Returns:
        The examples that were tried, for :func:`check_engine`.

    Raises:
        MeasurementError: the loss mixes examples, weighs them, or fails on a part of the batch.
    """
    examples = random.Random(seed).sample(range(total), min(_EXAMPLES, total))
    together = select(batch, examples, total)
    with _splitting(loss):
        joint = _vector(loss, together)
        alone = torch.stack([_vector(loss, select(batch, [example], total)) for example in examples])
    _diagnose(joint, alone)
    return Sample(together, len(examples), sum_of_squares([alone], per_row=True))


def check_engine(engine: Callable[[StepLoss, Any, int], PerExampleGradients], loss: StepLoss, sample: Sample) -> None:
    """Check an engine against the plain loop on the sample, noise off.

    Raises:
        FunctionalEngineError: they disagree, or the engine does not run.
    """
    with noise_off():
        found = engine(loss, sample.batch, sample.total).sq_norms
    scale = float(sample.sq_norms.max())
    if float((found - sample.sq_norms).abs().max()) > 2 * _tolerance(loss.parameters[0].dtype) * scale:
        raise FunctionalEngineError("under torch.func.vmap it gives other gradients than the plain loop")


def check_sum(loss: StepLoss, batch: Any, measured: PerExampleGradients) -> None:
    """Check that per-example gradients, measured with noise off, add up to the gradient of the whole batch.

    Raises:
        MeasurementError: they do not, by any common factor.
    """
    joint = _vector(loss, batch)
    if not _is_multiple(joint.to(_wide(joint)), measured.gradient_sum, measured.sq_norms):
        raise MeasurementError(_MIXED_OR_WEIGHTED, lasting=True)


@contextmanager
def _splitting(loss: StepLoss) -> Iterator[None]:
    """Say that splitting is what failed, where the step runs on a whole batch but not on a part of it."""
    try:
        yield
    except (MeasurementError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise MeasurementError(
            f"`{type(loss.module).__name__}` cannot be differentiated on a part of its batch "
            f"({type(error).__name__}: {reason}), so the batch cannot be split into examples.",
            lasting=True,
        ) from error


def _vector(loss: StepLoss, batch: Any) -> Tensor:
    with noise_off():
        gradients = differentiate(loss, batch)
    return torch.cat([(torch.view_as_real(g) if g.is_complex() else g).reshape(-1) for g in gradients])


def _diagnose(joint: Tensor, alone: Tensor) -> None:
    """Raise, saying what is wrong, unless ``joint`` is a common positive multiple of the sum of the rows."""
    joint, alone = joint.to(_wide(joint)), alone.to(_wide(alone))
    sq_norms = sum_of_squares([alone], per_row=True)
    if not bool(sq_norms.any()):
        raise MeasurementError(
            "Every example taken alone has a gradient of exactly zero: the loss needs more than one example (as a "
            "contrastive loss does), or has reached an exact minimum. It cannot be split into examples.",
            lasting=bool(joint.any()),
        )
    if _is_multiple(joint, alone.sum(0), sq_norms):
        return
    wide = alone.double()
    weights = torch.linalg.pinv(wide @ wide.T, hermitian=True) @ (wide @ joint.double())
    error = torch.linalg.vector_norm(joint - weights.to(joint.dtype) @ alone)
    is_weighted = bool((weights > 0).all()) and float(error) <= _tolerance(joint.dtype) * float(
        (weights.square() @ sq_norms).sqrt()
    )
    raise MeasurementError(_weighted(weights) if is_weighted else _MIXED, lasting=True)


def _is_multiple(joint: Tensor, total: Tensor, sq_norms: Tensor) -> bool:
    """Tell whether ``joint`` is a mean, a sum, or another positive multiple of gradients that add up to ``total``.

    Measured against the root sum of squares of the gradients, where a relative spread of weights shows as itself.
    """
    factors = [1 / len(sq_norms), 1.0]
    if bool(total.any()):
        factors.append(float(joint @ total / (total @ total)))
    scale = _tolerance(joint.dtype) * float(sq_norms.sum().sqrt())
    return any(float(torch.linalg.vector_norm(joint - f * total)) <= f * scale for f in factors if f > 0)


_MIXED = (
    "The loss mixes the examples of a batch: their gradients taken alone do not add up to the batch's (dropout off). "
    "Batch normalisation in training, mixup, contrastive losses, and regularisers added to a summed loss do this. "
    "Per-example gradients do not exist here; use layers and losses that treat examples alike and alone (GroupNorm or "
    "LayerNorm instead of BatchNorm), or freeze the statistics."
)

_MIXED_OR_WEIGHTED = (
    "The gradients of the examples taken alone do not add up to the batch's (dropout off), although those of a few do: "
    "the loss weighs the examples by their content, as a mean over the tokens of padded sequences does, or mixes them. "
    "The engines `functional` and `loop` can measure neither. Average within each example first, then over examples."
)


def _weighted(weights: Tensor) -> str:
    shares = ", ".join(f"{share:.3f}" for share in (weights / weights.sum()).tolist())
    return (
        f"The loss weighs the examples of a batch by their content (shares {shares} of the batch's gradient), as a "
        "mean over the tokens of padded sequences or class weights do. The engines `functional` and `loop` measure "
        "each example alone and cannot weight them. Average within each example first, then over examples."
    )


def _tolerance(dtype: torch.dtype) -> float:
    """Rounding allows this share; mixing and weighting change the gradient by far more."""
    return 1e-3 if torch.finfo(dtype).bits >= 32 else 5e-2


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
