"""Refusals at the start, in one wording."""

from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_graddiv.distributed import agreed_over_ranks
from lightning_graddiv.errors import MeasurementError
from lightning_graddiv.per_example.batches import count_examples

_UNSUPPORTED = {
    "DeepSpeed": "DeepSpeed fixes the accumulation of gradients when it starts, and takes them and the step to itself",
    "XLA": "on XLA a step is a graph that runs later, so that its gradients cannot be looked at, and a new batch size "
    "compiles it again",
}


def require(condition: bool, argument: str, expected: str, got: object) -> None:
    """Raise ValueError, naming the argument, unless the condition holds."""
    if not condition:
        raise ValueError(f"Expected argument `{argument}` to be {expected} but got {got!r}")


def require_known_strategy(strategy: Any, callback: str) -> None:
    """Refuse strategies that step by themselves, or whose gradients mean something else.

    By name, since Lightning lives in two namespaces (``lightning.pytorch``, ``pytorch_lightning``).

    Raises:
        MisconfigurationException: the strategy is neither a single device, nor DDP, nor FSDP2 without tensor
            parallelism.
    """
    names = {base.__name__ for base in type(strategy).__mro__}
    is_supported = bool(names & {"SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy"})
    reasons = [reason for named, reason in _UNSUPPORTED.items() if any(named in name for name in names)]
    if reasons or not is_supported:
        reason = reasons[0] if reasons else "its gradients are not those of a batch, or are held in parts"
        raise MisconfigurationException(
            f"{callback} supports a single device, DDP, and FSDP2 (`ModelParallelStrategy`), but the strategy is "
            f"`{type(strategy).__name__}`: {reason}."
        )


def require_data_parallelism(trainer: Any, callback: str) -> None:
    """Refuse a model whose layers are split over processes.

    Raises:
        MisconfigurationException: fewer batches than processes are drawn for a step.
    """
    shared_out = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
    if shared_out.get("num_replicas", trainer.world_size) != trainer.world_size:
        raise MisconfigurationException(
            f"{callback} cannot measure layers that are split over processes (tensor_parallel_size > 1)."
        )


def require_automatic_optimization(module: Any, callback: str) -> None:
    """Refuse modules that step their optimizers themselves.

    Raises:
        MisconfigurationException: manual optimization.
    """
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"{callback} needs automatic optimization, but `{type(module).__name__}.automatic_optimization` is False: "
            "its training_step takes optimizer steps itself."
        )


def require_one_optimizer(trainer: Any, module: Any, callback: str) -> None:
    """Refuse modules that have several optimizers, or none.

    Raises:
        MisconfigurationException: not exactly one optimizer.
    """
    name = type(module).__name__
    if len(trainer.optimizers) != 1:
        raise MisconfigurationException(
            f"{callback} needs one optimizer, but `{name}.configure_optimizers` made {len(trainer.optimizers)}."
        )


def refuse_other_resizers(trainer: Any, callback: Any) -> None:
    """Refuse callbacks that would change the size of the batch too.

    Raises:
        MisconfigurationException: there is one.
    """
    for other in trainer.callbacks:
        names = {base.__name__ for base in type(other).__mro__}
        if "GradientAccumulationScheduler" in names:
            raise MisconfigurationException(
                "AdaptiveBatchSize sets `accumulate_grad_batches` itself: remove the GradientAccumulationScheduler."
            )
        if "AdaptiveBatchSize" in names and other is not callback:
            raise MisconfigurationException("Only one AdaptiveBatchSize can resize the batch: remove the others.")


def require_own_prefix(trainer: Any, callback: Any) -> None:
    """Refuse two callbacks that would log under the same names.

    Raises:
        MisconfigurationException: there are two.
    """
    for other in trainer.callbacks:
        if other is not callback and getattr(other, "log_prefix", None) == callback.log_prefix:
            raise MisconfigurationException(
                f"Two callbacks log under `{callback.log_prefix}/`: give one of them another `log_prefix`."
            )


def require_among_callbacks(trainer: Any, other: Any, argument: str) -> None:
    """Refuse a callback that another relies on and that the trainer does not run.

    Raises:
        MisconfigurationException: the trainer does not have it.
    """
    if not any(callback is other for callback in trainer.callbacks):
        raise MisconfigurationException(
            f"Expected argument `{argument}` to be among the trainer's callbacks, or it never measures: add it to "
            "`Trainer(callbacks=[...])`."
        )


def require_one_size(micro_batch_size: int, device: torch.device) -> None:
    """Refuse processes whose micro-batches have different sizes. Every process must call this.

    Raises:
        MisconfigurationException: they have.
    """
    if agreed_over_ranks(micro_batch_size, device) is None:
        raise MisconfigurationException(
            "AdaptiveBatchSize needs the same batch size on every process, so that they grow together, but one of "
            f"them has a training loader with {micro_batch_size} and another has not."
        )


def count_first_batch(batch: Any) -> int:
    """Return the number of examples in a batch, where the loader does not tell it.

    Raises:
        MisconfigurationException: it cannot be told from the batch either.
    """
    try:
        return count_examples(batch)
    except MeasurementError as error:
        raise MisconfigurationException(
            f"AdaptiveBatchSize: neither the training loader nor its first batch tells the batch size ({error}). Use a "
            "DataLoader with `batch_size`, or a batch sampler that has a `batch_size`."
        ) from error
