"""Proof, by behaviour, of what in-band measuring may measure: which parameters, and where the examples lie.

On a few examples, noise off, every parameter's contributions are formed and compared with the plain loop's gradient of
each example alone. That catches a rule that does not hold, a parameter that is used outside of its layer, and rows that
are not the examples in their order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice, product
from typing import Any, Literal

from torch import Tensor

from lightning_graddiv.errors import MeasurementError
from lightning_graddiv.per_example.factors import Contributions, added
from lightning_graddiv.per_example.functional import differentiate
from lightning_graddiv.per_example.ghost import GhostRecorder, Use
from lightning_graddiv.per_example.guard import writes_refused
from lightning_graddiv.per_example.layers import Layout
from lightning_graddiv.per_example.losses import StepLoss
from lightning_graddiv.per_example.noise import noise_off
from lightning_graddiv.per_example.separability import Sample, compare_with_parts, full_precision, tolerance

Reduction = Literal["mean", "sum", "weighted"]

_MOST_COMBINATIONS = 16


@dataclass(frozen=True)
class GhostPlan:
    """What was proven.

    Attributes:
        layouts: where the examples lie in each use of a parameter, by its index and the how-manieth use.
        shared: parameters that are used more than once.
        misses: why a parameter is not covered, by its index; all others are.
        reduction: how the loss adds up its examples.
        assumed: whether nothing was proven, and every layer's leading dimension is taken for the examples.
    """

    layouts: dict[tuple[int, int], Layout] = field(default_factory=dict)
    shared: frozenset[int] = frozenset()
    misses: dict[int, str] = field(default_factory=dict)
    reduction: Reduction = "mean"
    assumed: bool = False


def prove(loss: StepLoss, batch: Any, total: int, *, seed: int = 0) -> tuple[GhostPlan, Sample]:
    """Find out which parameters' contributions the layers' rules give, and check them.

    Args:
        loss: the step's loss.
        batch: a batch of ``total`` examples.
        total: the number of examples, at least 2.
        seed: which examples are tried.

    Returns:
        What was proven, and the examples that it was proven on.

    Raises:
        MixingError: the loss mixes examples.
        MeasurementError: the batch cannot be split.
    """
    sample = compare_with_parts(loss, batch, total, seed=seed)
    if sample.is_noisy:  # what is done with some probability must be done, and left out, at least once
        compare_with_parts(loss, batch, total, seed=seed, high=True)
    layouts: dict[tuple[int, int], Layout] = {}
    shared: set[int] = set()
    misses: dict[int, str] = {}
    with GhostRecorder(loss.parameters) as recorder:
        recorder.begin(sample.total)
        with noise_off(), writes_refused(loss.module), full_precision():
            differentiate(loss, sample.batch, watch=recorder.attach)
            weights = sample.weights.to(sample.alone.dtype)[:, None]
            scale = float((sample.alone.double() * sample.weights[:, None]).norm())
            for index, gradients in enumerate(sample.parts):
                gradients = weights * gradients
                uses = recorder.used(index)
                slack = tolerance(loss.module) * float(gradients.norm()) + 1e-6 * scale
                chosen = _fitting_layouts(uses, index, gradients, slack)
                if chosen is None:
                    misses[index] = _why(uses)
                    continue
                layouts |= {(index, _ordinal(use, index)): layout for use, layout in zip(uses, chosen, strict=True)}
                if len(uses) > 1:
                    shared.add(index)
    return GhostPlan(layouts, frozenset(shared), misses, _reduction(sample)), sample


def _fitting_layouts(uses: Sequence[Use], index: int, wanted: Tensor, slack: float) -> list[Layout] | None:
    """Return the layouts under which the uses add up to what is wanted; None if there are none."""
    examples = len(wanted)
    if not uses:
        return [] if float(wanted.norm()) <= slack else None
    shapes = sorted({use.leading for use in uses})
    candidates = [[layout for layout in Layout if layout.fits(shape, examples)] for shape in shapes]
    for combination in islice(product(*candidates), _MOST_COMBINATIONS):
        layouts = [combination[shapes.index(use.leading)] for use in uses]
        found = _explicit(uses, index, layouts, examples)
        if found is not None and float((found.flatten(1) - wanted).norm()) <= slack:
            return layouts
    return None


def _explicit(uses: Sequence[Use], index: int, layouts: Sequence[Layout], examples: int) -> Tensor | None:
    parts: list[Contributions] = []
    for use, layout in zip(uses, layouts, strict=True):
        name = next(name for name, held in use.parameters.items() if held == index)
        try:
            found = use.contributions(layout, examples)
        except (MeasurementError, ValueError, RuntimeError):  # a shape that the layer knows and the rule does not
            return None
        if name in found:
            parts.append(found[name])
    return added(parts).explicit() if parts else None


def _ordinal(use: Use, index: int) -> int:
    return next(use.ordinals[name] for name, held in use.parameters.items() if held == index)


def _why(uses: Sequence[Use]) -> str:
    if not uses:
        return "no layer with a rule uses it"
    names = ", ".join(sorted({type(use.layer).__name__ for use in uses}))
    return f"what `{names}` contributes for each example is not what the loop finds"


def _reduction(sample: Sample) -> Reduction:
    if sample.is_weighted:
        return "weighted"
    return "sum" if abs(float(sample.weights[0]) - 1) < abs(float(sample.weights[0]) - 1 / sample.total) else "mean"
