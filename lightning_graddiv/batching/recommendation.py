"""The batch to begin with, from what is allowed and what is fast."""

import math
from collections.abc import Mapping

from lightning_graddiv.batching.plan import BatchPlan


def growth_steps(present: BatchPlan, factor: int, largest: float, *, is_adaptable: bool) -> list[int]:
    """Return the effective batch sizes that growth passes through, from the smallest to the largest.

    Args:
        present: how the batch is made now.
        factor: from one size to the next.
        largest: the largest size.
        is_adaptable: whether micro-batches may have another size than now.
    """
    item = present.world_size * (1 if is_adaptable else present.micro_batch_size)
    size = present.batch_size
    while size % factor == 0 and (size // factor) % item == 0:
        size //= factor
    steps = [size]
    while steps[-1] * factor <= max(largest, present.batch_size):
        steps.append(steps[-1] * factor)
    return steps


def fastest_plan(batch_size: int, seconds: Mapping[int, float], present: BatchPlan) -> BatchPlan:
    """Return the plan of an effective batch with the micro-batch of the best throughput among those that divide it.

    Where it is smaller than every micro-batch that was timed, it is one micro-batch.

    Args:
        batch_size: a multiple of the number of processes.
        seconds: of a pass, by micro-batch size.
        present: how the batch is made now.
    """
    share = batch_size // present.world_size
    dividing = [size for size in seconds if share % size == 0]
    micro_batch = max(dividing, key=lambda size: size / seconds[size], default=share)
    return BatchPlan(micro_batch, share // micro_batch, present.world_size)


def throughput_of_steps(steps: list[int], seconds: Mapping[int, float], present: BatchPlan) -> dict[int, float]:
    """Return examples per second of each effective batch by its fastest plan, where one was timed."""
    plans = {step: fastest_plan(step, seconds, present) for step in steps}
    return {
        step: plan.micro_batch_size * plan.world_size / seconds[plan.micro_batch_size]
        for step, plan in plans.items()
        if plan.micro_batch_size in seconds
    }


def step_to_take(steps: list[int], present: int, allowed: float, at_most: float) -> int:
    """Return the size to begin with: the largest that is allowed, and a smaller one than now only on evidence.

    Args:
        steps: sizes to choose from, ascending.
        present: the size now, one of them.
        allowed: the largest size allowed, by the lower end of the interval. Infinite: farther than the probes can see,
            which is reason for one step and not for all.
        at_most: the largest size allowed by its upper end: a present size above it is too large for certain.
    """
    if math.isinf(allowed):
        allowed = next((step for step in steps if step > present), present)
    if not at_most >= 1:  # that is how a policy says that it cannot tell
        at_most = present
    wanted = max(allowed, min(float(present), at_most))
    return max((step for step in steps if step <= wanted), default=steps[0])
