"""Changes the size of the batches that a trainer trains on, between epochs, and puts everything back."""

import copy
from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset

from lightning_graddiv.batching.loops import (
    TrainLoaderWatch,
    refresh_lengths,
    single_train_loader,
    train_loaders,
)
from lightning_graddiv.batching.plan import BatchPlan
from lightning_graddiv.batching.sampler import AdaptiveBatchSampler, drawn_batch_size, is_adaptable


class BatchResizer:
    """Holds a trainer's effective batch size, made of its loader's micro-batch, its accumulation and its processes.

    Loaders are adopted as Lightning has finished them and before it reads their length. In the place of a loader with a
    plain batch sampler comes a shallow copy with an :class:`AdaptiveBatchSampler`; the user's own, which may serve for
    validation too, is not touched. Any other loader keeps its micro-batch, and the batch grows by accumulation.

    Args:
        trainer: the trainer, before its loaders are set up.
        max_batch_size: the largest effective batch size, at least the one that training starts with.
        max_micro_batch_size: the most examples that one process takes at a time; None for the default.
        batch_size: asked, once loaders exist, for the effective batch size to go on with; None for the loader's own.
        on_epoch: called when an epoch is about to start; see :class:`.loops.TrainLoaderWatch`.

    Attributes:
        base: the plan that the user's loader and trainer make.
        plan: the plan now.
        is_running: whether training has started.
    """

    def __init__(
        self,
        trainer: Any,
        *,
        max_batch_size: int,
        max_micro_batch_size: int | None,
        batch_size: Callable[[], int | None],
        on_epoch: Callable[[], None],
    ) -> None:
        self.base = BatchPlan(1)
        self.plan = BatchPlan(1)
        self._trainer = trainer
        self._max_batch_size = max_batch_size
        self._max_micro_batch_size = max_micro_batch_size
        self._batch_size = batch_size
        self._accumulate = trainer.accumulate_grad_batches
        self.is_running = False
        self._adopted: list[DataLoader[Any]] = []
        self._is_adaptable = True
        self._on_epoch = on_epoch
        self._watch = TrainLoaderWatch(
            trainer,
            on_loader=self._adopt,
            is_resized=lambda: self._batch_size() is not None or self.plan != self.base,
            on_epoch=self._epoch_is_about_to_start,
        )

    def start(self) -> None:
        """Training starts: a loader that is made from now on gets the present size, whatever its own.

        Raises:
            MisconfigurationException: it starts with larger batches than allowed.
        """
        self.is_running = True
        if self._max_batch_size < self.base.batch_size:
            raise MisconfigurationException(
                f"Expected argument `max_batch_size` to be at least the effective batch size that training starts "
                f"with, {self.base.batch_size} ({self.base}), but got {self._max_batch_size}"
            )
        limit = self._max_micro_batch_size
        if self._is_adaptable and limit is not None and limit < self.base.micro_batch_size:
            raise MisconfigurationException(
                f"Expected argument `max_micro_batch_size` to be at least the loader's batch size of "
                f"{self.base.micro_batch_size} but got {limit}"
            )

    def fits_an_epoch(self, batch_size: int) -> bool:
        """Tell whether an epoch of this process holds at least one whole batch of that effective size."""
        plan = self._plan_of(batch_size)
        loader = single_train_loader(self._trainer)
        examples = sized_len(getattr(loader.batch_sampler, "sampler", None)) if self._is_adaptable else None
        batches = sized_len(loader) if examples is None else examples // plan.micro_batch_size
        if batches is None:
            return True
        limit = self._trainer.limit_train_batches
        return (min(batches, limit) if isinstance(limit, int) else int(batches * limit)) >= plan.accumulate

    def resize(self, batch_size: int) -> None:
        """Draw batches of another effective size from the next epoch's iterator on.

        Raises:
            MisconfigurationException: it cannot be made of equal micro-batches on each process.
        """
        self.plan = self._plan_of(batch_size)
        self._apply()
        refresh_lengths(self._trainer)

    def remove(self) -> None:
        """Leave the trainer with its own accumulation; may be called more than once."""
        self._watch.remove()
        self._adopted = []
        self._trainer.accumulate_grad_batches = self._accumulate

    def _plan_of(self, batch_size: int) -> BatchPlan:
        plan = self.base.resized(batch_size, self._micro_batch_limit())
        if plan is None or not (self._is_adaptable or plan.micro_batch_size == self.base.micro_batch_size):
            raise MisconfigurationException(
                f"An effective batch of {batch_size} examples cannot be shared equally by {self.base.world_size} "
                f"processes, in micro-batches of {self.base.micro_batch_size} where the loader's cannot be changed."
            )
        return plan

    def _adopt(self, loader: Any) -> Any:
        self._is_adaptable = is_adaptable(loader)
        size = drawn_batch_size(loader)
        if self._is_adaptable:
            # A copy keeps the loader's class, workers and generator; past DataLoader.__setattr__, which forbids it.
            loader, plain = copy.copy(loader), loader.batch_sampler
            loader.__dict__["batch_sampler"] = AdaptiveBatchSampler(plain.sampler, plain.batch_size, plain.drop_last)
            self._adopted.append(loader)
        if not self.is_running:
            self._begin_with(loader, size)
        self._apply()
        return loader

    def _begin_with(self, loader: Any, micro_batch_size: int | None) -> None:
        if micro_batch_size is None:
            raise MisconfigurationException(
                f"The training loader (`{type(loader).__name__}`) does not tell its batch size, so the batch cannot be "
                "resized. Use a DataLoader with `batch_size`, or a batch sampler that has a `batch_size`."
            )
        self.base = BatchPlan(micro_batch_size, self._accumulate, self._trainer.world_size)
        batch_size = self._batch_size()
        self.plan = self.base if batch_size is None else self._plan_of(batch_size)

    def _micro_batch_limit(self) -> int:
        own = self.base.micro_batch_size
        if self._is_adaptable and self._max_micro_batch_size is not None:
            return max(own, self._max_micro_batch_size)
        return own if self._accumulate > 1 or not self._is_adaptable else 2**62

    def _apply(self) -> None:
        for loader in self._adopted:
            loader.batch_sampler.batch_size = self.plan.micro_batch_size  # type: ignore[union-attr]
            if isinstance(loader.dataset, IterableDataset):  # whose loader's length is counted by this one
                loader.__dict__["batch_size"] = self.plan.micro_batch_size
        self._trainer.accumulate_grad_batches = self.plan.accumulate

    def _epoch_is_about_to_start(self) -> None:
        loaders = train_loaders(self._trainer)
        if len(loaders) > 1:
            raise MisconfigurationException(
                f"Expected one training loader but got {len(loaders)}: with several, the size of a batch has no single "
                "meaning that could be grown."
            )
        self._adopted = [loader for loader in self._adopted if any(loader is used for used in loaders)]
        if loaders:
            self._on_epoch()
