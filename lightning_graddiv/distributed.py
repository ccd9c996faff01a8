"""The few numbers that cross processes."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from lightning_graddiv.diversity import GradientMoments, GradientSums

_HAS_PROCESSES = dist.is_available()
"""Whether torch was built for several."""


def world_size() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if _HAS_PROCESSES and dist.is_initialized() else 1


def pool_over_ranks(
    sums: GradientSums | None, device: torch.device, *, lasting: bool = False
) -> tuple[GradientMoments | None, bool]:
    """Make one probe of what every process measured. Every process must call this, also after a failure.

    Args:
        sums: what this process measured; None if it could not.
        device: where the process group wants its tensors.
        lasting: whether this process's failure would happen again on the next batch.

    Returns:
        The moments over all processes, the same on each, None if any process failed; and whether a failure is lasting
        on any of them.
    """
    if world_size() == 1:
        return (None if sums is None else sums.moments()), lasting
    failed, count, sum_sq_norms, sq_norm = 1.0, 0.0, 0.0, 0.0
    if sums is not None:
        failed, count, sum_sq_norms = 0.0, sums.count, sums.sum_sq_norms
        sq_norm = sums.moments().sq_norm_of_sum
    mine = [failed, float(lasting), count, sum_sq_norms, sq_norm, count**2]
    packed = torch.tensor(mine, dtype=torch.float64, device=device)
    dist.all_reduce(packed)
    failures, lasting_failures, total, total_sq_norms, group_sq_norms, group_sq_counts = packed.tolist()
    if sums is None or failures > 0:
        return None, lasting_failures > 0
    gradient_sum = sums.gradient_sum.clone()
    dist.all_reduce(gradient_sum)
    joint = GradientSums(total, total_sq_norms, gradient_sum).moments()
    return GradientMoments(total, total_sq_norms, joint.sq_norm_of_sum, group_sq_norms, group_sq_counts), False


def summed_over_ranks(numbers: Sequence[float], device: torch.device) -> list[float]:
    """Add up each of a few numbers over all processes."""
    if world_size() == 1:
        return list(numbers)
    packed = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(packed)
    summed: list[float] = packed.tolist()
    return summed


def agreed_over_ranks(value: int | None, device: torch.device) -> int | None:
    """Return the value if every process has the same, else None."""
    number = -1.0 if value is None else float(value)
    smallest, largest = smallest_over_ranks([number, -number], device)
    return value if smallest == -largest else None


def smallest_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """Return the smallest of each value over all processes, so that all of them decide alike."""
    if world_size() == 1:
        return list(values)
    agreed = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
    smallest: list[float] = agreed.tolist()
    return smallest
