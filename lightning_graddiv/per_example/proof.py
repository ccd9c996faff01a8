"""Proof, by behaviour, of what in-band measuring may measure: which parameters, and where the examples lie.

On a few examples, noise off, every parameter's contributions are formed and compared with the plain loop's gradient of
each example alone. That catches a rule that does not hold, a parameter that is used outside of its layer, and rows that
are not the examples in their order. What a few examples do not show is looked for by taking the whole batch apart.
"""

import math
import random
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice, product
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_graddiv.errors import MeasurementError, MixingError
from lightning_graddiv.per_example.batches import select
from lightning_graddiv.per_example.factors import Contributions
from lightning_graddiv.per_example.functional import differentiate
from lightning_graddiv.per_example.ghost import GhostRecorder
from lightning_graddiv.per_example.layers import Layout
from lightning_graddiv.per_example.losses import StepLoss
from lightning_graddiv.per_example.precision import full_precision
from lightning_graddiv.per_example.records import Recorded, Use
from lightning_graddiv.per_example.separability import (
    MIXED,
    Sample,
    compare_with_parts,
    held_still,
    tolerance,
)
from lightning_graddiv.per_example.sketches import Sketcher, gradients_let_go
from lightning_graddiv.per_example.totals import added

Reduction = Literal["mean", "sum", "weighted"]

_MOST_COMBINATIONS = 16

_TINY = 1e-3
"""Examples whose gradients are so much smaller than the others' may be off by rounding errors of those."""


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


def prove(loss: StepLoss, batch: Any, total: int, *, seed: int = 0, parts: int = 2) -> tuple[GhostPlan, Sample]:
    """Find out which parameters' contributions the layers' rules give, and check them.

    Args:
        loss: the step's loss.
        batch: a batch of ``total`` examples.
        total: the number of examples.
        seed: which examples are tried.
        parts: into how many the batch is taken apart, to see whether an example minds its company.

    Returns:
        What was proven, and the examples that it was proven on.

    Raises:
        MixingError: the loss mixes examples.
        MeasurementError: the batch cannot be split.
    """
    sample, plan = _compare_with_loop(loss, batch, total, seed)
    if sample.is_noisy:  # what is done with some probability must be done, and left out, at least once
        compare_with_parts(loss, batch, total, seed=seed, high=True)
    if total > sample.total and len(plan.misses) < len(loss.parameters):
        plan = _compare_in_other_company(loss, batch, total, plan, seed=seed, parts=parts)
    return plan, sample


def ghost_pass(
    loss: StepLoss, batch: Any, total: int, plan: GhostPlan, *, keeps_gradients: bool = True
) -> tuple[Recorded, list[Tensor]]:
    """Run the step once on a shadow, watched; return what was recorded, and the gradients of all parameters.

    Unless ``keeps_gradients``, these are worthless: each was let go of when it had been looked at.
    """
    measured = frozenset(range(len(loss.parameters))) - plan.misses.keys()
    recorder = GhostRecorder(loss.parameters, plan.layouts, shared=plan.shared, measured=measured)
    with recorder, ExitStack() as after:

        def watch(module: nn.Module, stand_ins: Sequence[Tensor] | None = None) -> None:
            """Record the pass that begins, and let go of gradients that nobody asked for."""
            recorder.attach(module, stand_ins)
            recorder.begin(total)
            if not keeps_gradients:  # by hooks that come after the recorder's
                after.enter_context(gradients_let_go(loss.parameters if stand_ins is None else stand_ins, _ignore))

        gradients = differentiate(loss, batch, watch)
        return recorder.finish(), gradients


def _ignore(_: int, __: Tensor) -> None:
    """Look at no gradient."""


def _compare_with_loop(loss: StepLoss, batch: Any, total: int, seed: int) -> tuple[Sample, GhostPlan]:
    """Form the contributions of a few examples, and keep the parameters for which they are the loop's gradients."""
    layouts: dict[tuple[int, int], Layout] = {}
    shared: set[int] = set()
    misses: dict[int, str] = {}
    with GhostRecorder(loss.parameters) as recorder:

        def watch(module: nn.Module, stand_ins: Sequence[Tensor] | None = None) -> None:
            """Keep the uses of the pass that begins, of examples that lie nobody knows where."""
            recorder.attach(module, stand_ins)
            recorder.begin(0)

        sample = compare_with_parts(loss, batch, total, seed=seed, watch=watch)
        with full_precision(), torch.no_grad():
            relative, of_all = _rounding(loss.module)
            whole = sample.weights.abs() * sample.sq_norms.sqrt()
            for index in range(len(loss.parameters)):
                wanted, uses = _Wanted.of(sample, index), recorder.used(index)
                slack = relative * wanted.norms + of_all * whole + _TINY * of_all * whole.max()
                chosen = _fitting_layouts(uses, index, wanted, slack)
                if chosen is None:
                    misses[index] = _why(uses)
                    continue
                layouts |= {(index, _ordinal(use, index)): layout for use, layout in zip(uses, chosen, strict=True)}
                if len(uses) > 1:
                    shared.add(index)
    return sample, GhostPlan(layouts, frozenset(shared), misses, _reduction(sample))


def _compare_in_other_company(
    loss: StepLoss, batch: Any, total: int, plan: GhostPlan, *, seed: int, parts: int
) -> GhostPlan:
    """Take the batch apart at random, and see whether each example contributes what it does among all of them.

    It finds what a few examples cannot show: rows that are not in the examples' order, and examples that are mixed with
    certain others only. A factor common to all examples of a part is the loss's affair.
    """
    order = list(range(total))
    random.Random(seed).shuffle(order)
    parts = min(parts, total // 2)
    allowed, (_, of_all) = tolerance(loss.module), _rounding(loss.module)
    misses, is_weighted = dict(plan.misses), plan.reduction == "weighted"
    taken_apart = [order[i::parts] for i in range(parts)]
    with held_still(loss.module):
        together, _ = ghost_pass(loss, batch, total, plan, keeps_gradients=False)
        alone = [
            ghost_pass(loss, select(batch, examples, total), len(examples), plan, keeps_gradients=False)[0]
            for examples in taken_apart
        ]
    misses |= together.misses
    for apart, examples in zip(alone, taken_apart, strict=True):
        misses |= apart.misses
        seen = [i for i in together.sq_norms if i in apart.sq_norms and i not in misses]
        if seen:
            among_all = torch.stack([together.sq_norms[index] for index in seen])[:, examples]
            found = torch.stack([apart.sq_norms[index] for index in seen])
            factor = _common_factor(found, among_all)
            wanted = factor * among_all
            differs = (found - wanted).abs() > 4 * allowed * wanted + of_all * wanted.sum(0).max()
            misses |= {i: _MINDS_COMPANY for i, is_other in zip(seen, differs.any(1).tolist(), strict=True) if is_other}
            is_weighted |= not _is_expected(factor, plan.reduction, total / len(examples), allowed)
    if len(plan.misses) < len(misses) == len(loss.parameters):
        raise MixingError(MIXED, lasting=True)
    return replace(plan, misses=misses, reduction="weighted" if is_weighted else plan.reduction)


_MINDS_COMPANY = "what an example contributes depends on the others in its batch"


def _common_factor(found: Tensor, among_all: Tensor) -> float:
    """Return the middle one of the factors between what the examples contribute apart and among all."""
    has_any = among_all > 0
    return float((found[has_any] / among_all[has_any]).median()) if bool(has_any.any()) else 1.0


def _is_expected(factor: float, reduction: Reduction, share: float, allowed: float) -> bool:
    expected = 1.0 if reduction == "sum" else share
    return abs(math.sqrt(factor) - expected) <= 4 * allowed * share


def _rounding(module: nn.Module) -> tuple[float, float]:
    """Return how far two ways to the same gradient may differ: as a share of it, and of that of all parameters."""
    return {1e-7: (1e-7, 1e-12), 1e-3: (1e-4, 1e-6), 1e-2: (1e-2, 1e-6)}.get(tolerance(module), (5e-2, 1e-5))


@dataclass(frozen=True)
class _Wanted:
    """What the loop finds of a sample's contributions to one parameter.

    Attributes:
        sketcher: of all parameters.
        projections: shape (k, p).
        norms: shape (k,).
    """

    sketcher: Sketcher
    projections: Tensor
    norms: Tensor

    @classmethod
    def of(cls, sample: Sample, index: int) -> "_Wanted":
        """Weigh what a parameter received from each example alone as in the batch."""
        projections = sample.weights[:, None] * sample.alone.projections[:, index]
        return cls(sample.sketcher, projections, sample.weights.abs() * sample.alone.sq_norms[:, index].sqrt())


def _fitting_layouts(uses: Sequence[Use], index: int, wanted: _Wanted, slack: Tensor) -> list[Layout] | None:
    """Return the layouts under which the uses add up to what is wanted; None if there are none."""
    examples = len(wanted.norms)
    if not uses:
        return [] if bool((wanted.norms <= slack).all()) else None
    shapes = sorted({use.leading for use in uses})
    candidates = [[layout for layout in Layout if layout.fits(shape, examples)] for shape in shapes]
    for combination in islice(product(*candidates), _MOST_COMBINATIONS):
        layouts = [combination[shapes.index(use.leading)] for use in uses]
        found = _contributions(uses, index, layouts, examples)
        if found is None:
            continue
        sketched = wanted.sketcher.contributed(index, found)
        if bool(((sketched - wanted.projections).norm(dim=1) <= slack).all()):
            return layouts
    return None


def _contributions(uses: Sequence[Use], index: int, layouts: Sequence[Layout], examples: int) -> Contributions | None:
    parts: list[Contributions] = []
    for use, layout in zip(uses, layouts, strict=True):
        name = next(name for name, held in use.parameters.items() if held == index)
        try:
            found = use.contributions(layout, examples)
        except (MeasurementError, ValueError, RuntimeError):  # a shape that the layer knows and the rule does not
            return None
        if name in found:
            parts.append(found[name])
    return added(parts) if parts else None


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
