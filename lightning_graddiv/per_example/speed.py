"""How long a forward and a backward pass take, by the number of examples."""

import math
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_oom_error
from torch import Tensor

from lightning_graddiv.per_example.batches import own_copy, select
from lightning_graddiv.per_example.bounds import indices_checked
from lightning_graddiv.per_example.losses import StepLoss, measuring
from lightning_graddiv.per_example.select import with_frozen_copied

_OPTIMIZER_TENSORS = 2
"""For each parameter, as Adam keeps them."""


def seconds_of_a_step(
    loss: StepLoss,
    batch: Any,
    total: int,
    examples: int,
    *,
    repeats: int = 5,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> float:
    """Return the median seconds of a forward and backward pass; infinite where the memory does not hold it.

    The first pass is not counted. No optimizer steps.

    Args:
        loss: the step's loss.
        batch: a batch of ``total`` examples.
        total: the number of examples.
        examples: to run on: those of the batch, over again where there are more.
        repeats: passes that count.
        context: to run in, for mixed precision.
    """
    try:
        with measuring(loss.module, checks_indices=False), context():
            return with_frozen_copied(loss, lambda: _median_seconds(loss, batch, total, examples, repeats))
    except RuntimeError as error:
        if not is_oom_error(error):
            raise
    garbage_collection_cuda()
    return math.inf


def room_for_an_optimizer(loss: StepLoss) -> list[Tensor]:
    """Take the accelerator's memory that an optimizer is going to want, which is made at its first step only."""
    parameters = [parameter for parameter in loss.parameters if parameter.device.type == "cuda"]
    return [torch.empty_like(parameter) for parameter in parameters for _ in range(_OPTIMIZER_TENSORS)]


def _median_seconds(loss: StepLoss, batch: Any, total: int, examples: int, repeats: int) -> float:
    run = loss.rehearsal()
    if examples != total:
        batch = select(batch, [i % total for i in range(examples)], total)
    with indices_checked(loss.module):
        _seconds(run, batch, loss)
    return statistics.median(_seconds(run, batch, loss) for _ in range(repeats))


def _seconds(run: Callable[[Any], None], batch: Any, loss: StepLoss) -> float:
    batch = own_copy(batch)  # which the step may write to
    _finish(loss)
    start = time.perf_counter()
    run(batch)
    _finish(loss)
    return time.perf_counter() - start


def _finish(loss: StepLoss) -> None:
    for device in {parameter.device for parameter in loss.parameters}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
