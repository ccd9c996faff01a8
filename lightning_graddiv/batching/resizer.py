"""Changes the size of the batches that a trainer trains on, between epochs, and puts everything back."""

from collections.abc import Callable
from typing import Any

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

    Loaders are adopted as Lightning has finished them and before it reads their length. A loader with a plain batch
    sampler gets an :class:`AdaptiveBatchSampler` in its place; any other keeps its micro-batch and grows by
    accumulation. Only training loaders are touched.

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
        self._adopted: list[tuple[DataLoader[Any], Any]] = []
        self._on_epoch = on_epoch
        self._watch = TrainLoaderWatch(trainer, self._adopt, self._epoch_is_about_to_start)

    def start(self) -> None:
        """Training starts: a loader that is made from now on gets the present size, whatever its own."""
        self.is_running = True

    def resize(self, batch_size: int) -> None:
        """Draw batches of another effective size from the next epoch's iterator on.

        Raises:
            MisconfigurationException: the processes cannot share the batch equally.
        """
        self.plan = self._plan_of(batch_size, self._micro_batch_limit(single_train_loader(self._trainer)))
        self._apply()
        refresh_lengths(self._trainer)

    def _plan_of(self, batch_size: int, limit: int) -> BatchPlan:
        plan = self.base.resized(batch_size, limit)
        if plan is None:
            raise MisconfigurationException(
                f"An effective batch of {batch_size} examples cannot be shared equally by {self.base.world_size} "
                f"processes."
            )
        return plan

    def remove(self) -> None:
        """Put back the user's batch samplers and the trainer's accumulation; may be called more than once."""
        self._watch.remove()
        for loader, batch_sampler in self._adopted:
            loader.__dict__["batch_sampler"] = batch_sampler
            if isinstance(loader.dataset, IterableDataset):
                loader.__dict__["batch_size"] = batch_sampler.batch_size
        self._adopted = []
        self._trainer.accumulate_grad_batches = self._accumulate

    def _adopt(self, loader: Any) -> None:
        if is_adaptable(loader) and not isinstance(loader.batch_sampler, AdaptiveBatchSampler):
            plain = loader.batch_sampler
            self._adopted.append((loader, plain))
            # In place, because the loader keeps its class, workers and generator; past DataLoader.__setattr__.
            loader.__dict__["batch_sampler"] = AdaptiveBatchSampler(plain.sampler, plain.batch_size, plain.drop_last)
        if not self.is_running:
            self._begin_with(loader)
        self._apply()

    def _begin_with(self, loader: Any) -> None:
        micro_batch_size = self._own_batch_size(loader)
        if micro_batch_size is None:
            raise MisconfigurationException(
                f"The training loader (`{type(loader).__name__}`) does not tell its batch size, so the batch cannot be "
                "resized. Use a DataLoader with `batch_size`, or a batch sampler that has a `batch_size`."
            )
        self.base = BatchPlan(micro_batch_size, self._accumulate, self._trainer.world_size)
        if self._max_batch_size < self.base.batch_size:
            raise MisconfigurationException(
                f"Expected argument `max_batch_size` to be at least the effective batch size that training starts "
                f"with, {self.base.batch_size} ({self.base}), but got {self._max_batch_size}"
            )
        limit = self._micro_batch_limit(loader)
        if limit < micro_batch_size:
            raise MisconfigurationException(
                f"Expected argument `max_micro_batch_size` to be at least the loader's batch size of "
                f"{micro_batch_size} but got {limit}"
            )
        batch_size = self._batch_size()
        self.plan = self.base if batch_size is None else self._plan_of(batch_size, limit)

    def _own_batch_size(self, loader: Any) -> int | None:
        plain = {id(adopted): batch_sampler.batch_size for adopted, batch_sampler in self._adopted}
        return plain.get(id(loader), drawn_batch_size(loader))

    def _micro_batch_limit(self, loader: Any) -> int:
        if not is_adaptable(loader):
            return self.base.micro_batch_size
        if self._max_micro_batch_size is not None:
            return self._max_micro_batch_size
        return self.base.micro_batch_size if self._accumulate > 1 else 2**62

    def _apply(self) -> None:
        for loader, _ in self._adopted:
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
        if loaders:
            self._on_epoch()
