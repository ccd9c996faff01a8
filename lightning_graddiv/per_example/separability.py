"""Proof, by behaviour, that the gradient of a batch is made of the gradients of its examples."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_graddiv.errors import FunctionalEngineError, MeasurementError, MixingError
from lightning_graddiv.per_example.batches import select
from lightning_graddiv.per_example.functional import (
    PerExampleGradients,
    differentiate,
    require_finite,
    splitting,
)
from lightning_graddiv.per_example.guard import WriteGuard, parameters_guarded
from lightning_graddiv.per_example.layers import mixes_examples
from lightning_graddiv.per_example.losses import StepLoss, Watch
from lightning_graddiv.per_example.noise import Noise, noise_off
from lightning_graddiv.per_example.precision import full_precision
from lightning_graddiv.per_example.sketches import Sketch, Sketcher

_EXAMPLES = 4
"""Of a batch, alone and together."""

_TRIALS = 2
"""On a GPU, of which the second finds no mixing where the first found some by accident: see :func:`tolerance`."""


@dataclass(frozen=True)
class Sample:
    """A few examples of a batch with what the plain loop measures on them, noise off.

    Attributes:
        examples: their positions in the batch that they were taken from.
        batch: of these examples only.
        sketcher: that drew their gradients.
        alone: their gradients, one after another.
        weights: by which each gradient enters the batch's, shape (k,).
        is_weighted: whether the weights differ by content.
        is_noisy: whether the step asks for noise.
    """

    examples: list[int]
    batch: Any
    sketcher: Sketcher
    alone: Sketch
    weights: Tensor
    is_weighted: bool
    is_noisy: bool

    @property
    def total(self) -> int:
        """How many they are, k."""
        return len(self.examples)

    @property
    def sq_norms(self) -> Tensor:
        """Squared norms, shape (k,), float64."""
        return self.alone.sq_norms.sum(1)


def compare_with_parts(
    loss: StepLoss, batch: Any, total: int, *, seed: int = 0, high: bool = False, watch: Watch | None = None
) -> Sample:
    """Check that a few examples' gradients together are made of those that they have alone: the probe for mixing.

    Dropout and other noise is switched off for the comparison. Each gradient may enter with a positive weight.

    Args:
        loss: the step's loss.
        batch: a batch of ``total`` examples.
        total: the number of examples, at least 2.
        seed: which examples are tried; at random, since batches are often ordered.
        high: see :func:`.noise_off`.
        watch: looks on while they run together, which is last; see :class:`.StepLoss`.

    Returns:
        The examples that were tried.

    Raises:
        MeasurementError: the loss mixes examples, or fails on a part of the batch.
    """
    chance = random.Random(seed)
    for _ in range(_TRIALS - 1 if is_on_gpu(loss.module) else 0):
        # Those examples may have been next to a kink; a loss that mixes will do so again.
        with suppress(MixingError):
            return _compared(loss, batch, total, chance, seed, high, watch)
    return _compared(loss, batch, total, chance, seed, high, watch)


def _compared(
    loss: StepLoss, batch: Any, total: int, chance: random.Random, seed: int, high: bool, watch: Watch | None
) -> Sample:
    examples = chance.sample(range(total), min(_EXAMPLES, total))
    together = select(batch, examples, total)
    sketcher = Sketcher(loss.parameters, seed)
    with splitting(loss), held_still(loss.module, high=high) as noise:
        alone = Sketch.stack([sketcher.differentiated(loss, select(batch, [example], total)) for example in examples])
        joint = sketcher.differentiated(loss, together, watch)
    if loss.is_partial and not bool(alone.sq_norms.any()) and not bool(joint.sq_norms.any()):
        weights, is_weighted = joint.sq_norms.new_full((len(examples),), 1 / len(examples)), False
    else:
        weights, is_weighted = _weights(joint, alone, tolerance(loss.module))
    return Sample(examples, together, sketcher, alone, weights, is_weighted, noise.drawn)


def check_separable(loss: StepLoss, batch: Any, total: int, *, seed: int = 0) -> Sample:
    """Check that a few examples' gradients, taken alone, add up to the gradient that they have together.

    The sum may carry any common factor (a mean, a sum). Arguments are those of :func:`compare_with_parts`.

    Returns:
        The examples that were tried, for :func:`check_engine`.

    Raises:
        MeasurementError: the loss mixes examples, weighs them, or fails on a part of the batch.
    """
    sample = compare_with_parts(loss, batch, total, seed=seed)
    refuse_weighted(sample)
    return sample


def refuse_weighted(sample: Sample) -> None:
    """Refuse a loss that weighs its examples, for engines that look at one alone.

    Raises:
        MeasurementError: it does.
    """
    if sample.is_weighted:
        raise MeasurementError(_weighted(sample.weights), lasting=True)


def mixes_by_normalisation_only(loss: StepLoss, batch: Any, total: int) -> bool:
    """Tell whether batch normalisation mixes the examples and nothing else does: with its statistics held still."""

    def hold_still(module: nn.Module, stand_ins: Sequence[Tensor] | None = None) -> None:  # noqa: ARG001
        """Let batch normalisation take the statistics it keeps rather than those of the batch."""
        for layer in module.modules():
            if mixes_examples(layer):
                layer.eval()

    if not any(mixes_examples(layer) for layer in loss.module.modules()):
        return False
    try:
        compare_with_parts(loss.watched_by(hold_still), batch, total)
    except MeasurementError:
        return False
    return True


def check_engine(engine: Callable[[StepLoss, Any, int], PerExampleGradients], loss: StepLoss, sample: Sample) -> None:
    """Check an engine against the plain loop on the sample, noise off.

    Raises:
        FunctionalEngineError: they disagree, or the engine does not run.
    """
    with held_still(loss.module):
        found = engine(loss, sample.batch, sample.total).sq_norms
    scale = float(sample.sq_norms.max())
    if float((found - sample.sq_norms).abs().max()) > 2 * tolerance(loss.module) * scale:
        raise FunctionalEngineError("under torch.func.vmap it gives other gradients than the plain loop", lasting=True)


def check_sum(loss: StepLoss, batch: Any, measured: PerExampleGradients) -> None:
    """Check that per-example gradients, measured with noise off (``high``), add up to those of the whole batch.

    Raises:
        MeasurementError: they do not, by any common factor.
    """
    with held_still(loss.module, high=True):
        joint = _vector(loss, batch)
    allowed = tolerance(loss.module)
    if _common_factor(joint.to(_wide(joint)), measured.gradient_sum, measured.sq_norms, allowed) is None:
        raise MeasurementError(MIXED_OR_WEIGHTED, lasting=True)


@contextmanager
def held_still(module: nn.Module, *, high: bool = False) -> Iterator[Noise]:
    """Run steps that can be compared: noise off, parameters kept, products in full precision.

    Args:
        module: that runs.
        high: see :func:`.noise_off`.

    Raises:
        MeasurementError: see :func:`.writes_refused`.
    """
    with parameters_guarded(module), noise_off(high=high, guard=WriteGuard(module)) as noise, full_precision():
        yield noise


def _vector(loss: StepLoss, batch: Any) -> Tensor:
    gradients = differentiate(loss, batch)
    vector = torch.cat([(torch.view_as_real(g) if g.is_complex() else g).reshape(-1) for g in gradients])
    require_finite(vector)
    return vector


def _weights(joint: Sketch, alone: Sketch, tolerance: float) -> tuple[Tensor, bool]:
    """Return the weights with which the rows add up to ``joint``, and whether they differ; raise if they do not."""
    sq_norms, rows, total = alone.sq_norms.sum(1), alone.flat, joint.flat
    if not bool(sq_norms.any()):
        raise MeasurementError(
            "Every example taken alone has a gradient of exactly zero: the loss needs more than one example (as a "
            "contrastive loss does), or has reached an exact minimum. It cannot be split into examples.",
            lasting=bool(joint.sq_norms.any()),
        )
    factor = _common_factor(total, rows.sum(0), sq_norms, tolerance)
    if factor is not None:
        return torch.full_like(sq_norms, factor), False
    weights = torch.linalg.pinv(rows @ rows.T, hermitian=True) @ (rows @ total)
    error = torch.linalg.vector_norm(total - weights @ rows)
    scale = float((weights.square() @ sq_norms).sqrt())
    if not (bool((weights > 0).all()) and float(error) <= tolerance * scale):
        raise MixingError(MIXED, lasting=True)
    return weights, True


def _common_factor(joint: Tensor, total: Tensor, sq_norms: Tensor, tolerance: float) -> float | None:
    """Return by which ``joint`` is a mean, a sum, or another positive multiple of gradients that add up to ``total``.

    Measured against the root sum of squares of the gradients, where a relative spread of weights shows as itself.
    """
    factors = [1 / len(sq_norms), 1.0]
    if bool(total.any()):
        factors.append(float(joint @ total / (total @ total)))
    scale = tolerance * float(sq_norms.sum().sqrt())
    fitting = (f for f in factors if f > 0 and float(torch.linalg.vector_norm(joint - f * total)) <= f * scale)
    return next(fitting, None)


MIXED = (
    "The loss mixes the examples of a batch: their gradients taken alone do not add up to the batch's (dropout off). "
    "Batch normalisation in training, mixup, contrastive losses, and regularisers added to a summed loss do this, and "
    "random numbers drawn one by one from Python or NumPy look like it (draw them with torch). "
    "Per-example gradients do not exist here; use layers and losses that treat examples alike and alone (GroupNorm or "
    "LayerNorm instead of BatchNorm), or freeze the statistics."
)

MIXED_OR_WEIGHTED = (
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


def tolerance(module: nn.Module) -> float:
    """Rounding allows this share; mixing and weighting change the gradient by far more.

    A GPU's library computes a batch in another way for each of its sizes. What rounding differs by is as little as
    anywhere, but it turns a rectifier on or off that is next to zero: of ResNet-18's gradients, one in some twenty
    then changes by a thousandth and more of its norm.
    """
    bits = [torch.finfo(p.dtype).bits for p in module.parameters() if p.is_floating_point() or p.is_complex()]
    return {64: 1e-7, 32: 1e-2 if is_on_gpu(module) else 1e-3}.get(min(bits), 5e-2)


def is_on_gpu(module: nn.Module) -> bool:
    """Tell whether a module has parameters on a GPU."""
    return any(parameter.is_cuda for parameter in module.parameters())


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
