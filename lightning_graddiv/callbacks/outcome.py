"""From what each process saw of a step to the moments of all: the few numbers that cross processes."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_graddiv.contributions import ContributionSums
from lightning_graddiv.distributed import pool_over_ranks, smallest_over_ranks, summed_over_ranks, world_size
from lightning_graddiv.diversity import GradientMoments, GradientSums
from lightning_graddiv.errors import MeasurementError
from lightning_graddiv.per_example.ghost import is_sharded
from lightning_graddiv.per_example.in_band import GhostStep, GroupStep, UncoveredError
from lightning_graddiv.per_example.microbatch import GroupSums
from lightning_graddiv.per_example.norms import dense, flat, real_view, sq_norm_of_each, sum_of_squares
from lightning_graddiv.per_example.probes import DIRECTIONS

MIN_COVERAGE = 0.9
"""Of |gradient|^2; below it, what is measured says too little about the whole."""

_SAME_GRADIENT = 1e-2
"""How far the applied gradient may be from what the backward passes gave; communication in 16 bits rounds by less."""


@dataclass(frozen=True)
class Outcome:
    """How the measurement of a step ended, the same on every process except for the reason.

    Attributes:
        moments: over all processes; None where the measurement was dropped.
        coverage: share of |gradient|^2 in the parameters that were measured.
        refusal: why it was dropped; None where another process has the reason.
        is_lasting: whether it would be dropped again.
        is_retried: whether the next step is due at once: another engine takes over, or the batch was too small.
        is_uncovered: whether parameters were used in a way that was not proven.
        leaves_out_rest: whether the parameters that are not covered could not be measured, for a lasting reason.
        basis: changes whenever what is measured does: probes of another basis are not to be pooled with this one.
    """

    moments: GradientMoments | None
    coverage: float = 1.0
    refusal: Exception | None = None
    is_lasting: bool = False
    is_retried: bool = False
    is_uncovered: bool = False
    leaves_out_rest: bool = False
    basis: int = 0


def replay_outcome(sums: GradientSums | None, refusal: Exception | None, device: torch.device) -> Outcome:
    """Return the outcome of running a micro-batch's step again. Every process must call this, as all in here."""
    is_lasting = isinstance(refusal, MeasurementError) and refusal.lasting
    try:
        moments, is_lasting = pool_over_ranks(sums, device, lasting=is_lasting)
    except ValueError as error:  # the pooled sums are not finite, on every process alike
        return Outcome(None, refusal=error)
    return Outcome(moments, refusal=refusal, is_lasting=is_lasting)


def ghost_outcome(
    step: GhostStep, parameters: Sequence[nn.Parameter], error: Exception | None, device: torch.device
) -> Outcome:
    """Return the outcome of a step measured in-band."""
    world = world_size()
    numbers, applied, error = _seen(step, parameters, error)
    failed, lasting, uncovered, rest_failed, rest_lasting, no_groups, *summed = summed_over_ranks(numbers, device)
    if failed > 0:
        return Outcome(None, refusal=error, is_lasting=lasting > 0, is_uncovered=uncovered > 0)
    if rest_failed > rest_lasting:  # it may work the next time
        return Outcome(None, refusal=step.rest_error)
    s1, rest_s1, weights, sq_weights, group_weights, local, covered_norm, whole_norm, *projections = summed
    measures_rest = step.measures_rest and rest_failed == 0
    coverage = 1.0 if measures_rest or whole_norm == 0 else covered_norm / whole_norm
    s1, s2 = (s1 + rest_s1, whole_norm) if measures_rest else (s1, covered_norm)
    if not _is_what_was_seen(applied, projections, s1 / world**2 + whole_norm, device):
        return Outcome(None, refusal=_changed(s1, s2))
    if coverage < MIN_COVERAGE:
        return Outcome(None, coverage, _uncovered(step, coverage), is_lasting=True)
    contributions = ContributionSums(
        s1 / world**2,
        s2,
        weights / world,
        sq_weights / world**2,
        # Of all parameters where the rest was to be measured: not of those that are left without it.
        local / world**2 if world > 1 and no_groups == 0 and rest_failed == 0 else None,
        group_weights / world**2,
    )
    return _moments_of(contributions, coverage, leaves_out_rest=rest_failed > 0)


def _seen(
    step: GhostStep, parameters: Sequence[nn.Parameter], error: Exception | None
) -> tuple[list[float], Tensor | None, Exception | None]:
    """Return this process's numbers, the projections of the applied gradient where it is whole, and what went wrong."""
    norms, applied, projections = [0.0], None, [0.0] * DIRECTIONS
    try:
        untouched = step.untouched_sq_norms()
        norms = applied_sq_norms(parameters) if untouched is None else untouched
        if untouched is None and any(is_sharded(parameter) for parameter in parameters):
            error = error or step.unreached([norm > 0 for norm in norms])
            projections = step.projections.tolist()
        elif untouched is None:
            applied, projections = step.applied_projections(), step.projections.tolist()
    except Exception as unexpected:  # measuring must never end a training run
        error = error or unexpected
    sums, measured = step.sums, set(step.covered)
    numbers = [
        float(error is not None),
        float(isinstance(error, MeasurementError) and error.lasting),
        float(isinstance(error, UncoveredError)),
        float(step.rest_error is not None),
        float(step.rest_error is not None and step.rest_error.lasting),
        float(step.local_sq_norm is None),
        sums.sum_sq_norms,
        sums.rest_sq_norms,
        sums.sum_weights,
        sums.sum_sq_weights,
        sums.sum_weights**2,
        step.local_sq_norm or 0.0,
        sum(norm for index, norm in enumerate(norms) if index in measured),
        sum(norms),
        *projections,
    ]
    return numbers, applied, error


def _is_what_was_seen(applied: Tensor | None, local: Sequence[float], scale: float, device: torch.device) -> bool:
    """Compare the applied gradient with the mean of what the processes' backward passes gave; all processes agree.

    Args:
        applied: its projections; None where there is nothing to compare: no process holds it whole, or it is known to
            be what the only backward pass gave.
        local: the projections of the processes' own gradients, summed over them.
        scale: a squared norm that rounding errors are small against.
        device: of collectives.
    """
    is_same = True
    if applied is not None:
        expected = torch.tensor(local, dtype=torch.float64, device="cpu") / world_size()
        is_same = float((applied - expected).abs().max()) <= _SAME_GRADIENT * scale**0.5
    return smallest_over_ranks([float(is_same)], device)[0] > 0


@dataclass(frozen=True)
class AppliedGroups:
    """The groups of one optimizer step, on this process.

    Attributes:
        groups: (|G_j|^2, examples) of each group.
        mean_gradient: the mean of the G_j of all processes, flattened.
    """

    groups: list[tuple[float, float]]
    mean_gradient: Tensor


def groups_applied(
    step: GroupStep, parameters: Sequence[nn.Parameter], error: Exception | None, device: torch.device, *, whole: bool
) -> AppliedGroups | Outcome:
    """Return a step's groups once the gradient that is about to be applied is complete, or why there are none.

    Args:
        step: what was seen.
        parameters: all that are measured.
        error: what went wrong before.
        device: of collectives.
        whole: whether the step's whole batch is one group, because its processes are coupled.
    """
    mean, sq_norm, applied = torch.zeros(1, device="cpu"), 0.0, None
    try:
        scale = step.divisor / max(1, len(step.groups))  # a last window may hold fewer micro-batches than the divisor
        gradients = [torch.zeros_like(p) if p.grad is None else dense(p.grad).detach() for p in parameters]
        mean = flat([real_view(gradient) for gradient in gradients]).float().mul_(scale)
        sq_norm, applied = float(sum_of_squares([mean])), step.applied_projections()
        if not step.groups:
            error = error or MeasurementError("The step had no backward pass.")
    except Exception as unexpected:  # measuring must never end a training run
        error = error or unexpected
    is_lasting = isinstance(error, MeasurementError) and error.lasting
    own = sum(sq_norm for sq_norm, _ in step.groups)
    numbers = [float(error is not None), float(is_lasting), own, sq_norm, *step.projections.tolist()]
    failed, lasting, norms, squared, *projections = summed_over_ranks(numbers, device)
    if failed > 0:
        return Outcome(None, refusal=error, is_lasting=lasting > 0)
    if not _is_what_was_seen(applied, projections, norms + squared, device):
        return Outcome(None, refusal=_changed(norms, squared))
    groups = list(step.groups)
    if whole:
        groups = [(sq_norm, world_size() * sum(examples for _, examples in groups))]
    return AppliedGroups(groups, mean)


def group_outcome(steps: Sequence[AppliedGroups], device: torch.device, *, whole: bool) -> Outcome:
    """Return the outcome of comparing groups: of one step on all processes, or of two consecutive steps."""
    groups = [group for step in steps for group in step.groups]
    processes = 1 if whole else world_size()
    sums = GroupSums()
    for sq_norm, examples in groups:
        sums += GroupSums.of_group(sq_norm, examples, 1 / (processes * len(groups)))
    pooled = GroupSums(*summed_over_ranks(astuple(sums), device))
    mean = torch.stack([step.mean_gradient for step in steps]).mean(0)
    try:
        return Outcome((sums if whole else pooled).moments(float(sum_of_squares([mean]))))
    except (MeasurementError, ValueError) as refusal:
        return Outcome(None, refusal=refusal)


def applied_sq_norms(parameters: Sequence[nn.Parameter]) -> list[float]:
    """Return this process's part of |gradient|^2 of each parameter: they add up over the processes."""
    parts = [_part(parameter.grad) for parameter in parameters]
    norms = sq_norm_of_each([gradient for gradient, _ in parts])
    return [norm / copies for norm, (_, copies) in zip(norms, parts, strict=True)]


def _part(gradient: Any) -> tuple[Tensor, int]:
    """Return what a process holds of a gradient, and how many processes hold the same."""
    if gradient is None:
        return torch.zeros(1, device="cpu"), 1
    if is_sharded(gradient):
        replicas = 1
        for dimension, placement in enumerate(gradient.placements):
            replicas *= gradient.device_mesh.size(dimension) if placement.is_replicate() else 1
        return gradient.to_local(), replicas
    return gradient.coalesce().values() if gradient.is_sparse else gradient, world_size()


def _moments_of(contributions: ContributionSums, coverage: float, *, leaves_out_rest: bool) -> Outcome:
    if contributions.count == 0:
        refusal = MeasurementError("The step had no backward pass.")
        return Outcome(None, refusal=refusal, leaves_out_rest=leaves_out_rest)
    try:
        return Outcome(contributions.moments(), coverage, leaves_out_rest=leaves_out_rest)
    except ValueError as error:
        refusal = MeasurementError(f"The step's gradients are not finite ({error}).")
        return Outcome(None, refusal=refusal, leaves_out_rest=leaves_out_rest)


def _changed(sum_sq_norms: float, sq_norm_of_sum: float) -> MeasurementError:
    if not torch.isfinite(torch.tensor([sum_sq_norms, sq_norm_of_sum], device="cpu")).all():
        return MeasurementError("The step's gradients are not finite.")
    return MeasurementError(
        "The gradient that the optimizer is about to apply is not the mean of what the processes' backward passes "
        "gave: a hook, a callback or training_step itself changes it. Change gradients in "
        "`configure_gradient_clipping` or in the optimizer, which come after the measurement."
    )


def _uncovered(step: GhostStep, coverage: float) -> MeasurementError:
    return MeasurementError(
        f"the layers with a rule hold only {coverage:.0%} of |gradient|^2"
        + (f", and the others cannot be measured ({step.rest_error})" if step.rest_error else ""),
        lasting=True,
    )
