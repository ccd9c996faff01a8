"""The training loader, as it is resized: a copy of the user's, whose own stays as it is."""

import copy
from collections.abc import Sequence
from typing import Any

from lightning.fabric.utilities.data import sized_len
from torch import Generator
from torch.utils.data import DataLoader, IterableDataset

from lightning_graddiv.batching.plan import BatchPlan
from lightning_graddiv.batching.position import PassPlace
from lightning_graddiv.batching.sampler import (
    AdaptiveBatchSampler,
    drawn_batch_size,
    draws_mergeably,
    draws_plainly,
    is_followed,
)
from lightning_graddiv.random_states import generators_of


class AdoptedLoader:
    """A training loader whose micro-batch can be changed, if its batches are drawn by a plain batch sampler.

    Or by another one, whose batches may be merged.

    In its place comes a shallow copy with an :class:`AdaptiveBatchSampler`; the user's own, which may serve for
    validation too, is not touched.

    Args:
        loader: as Lightning has finished it, before its length is read; None before there is one.
        keeps: why the loader keeps its micro-batch, whatever it is; None if it need not.
        merges: micro-batches may be merged of the batches that a batch sampler of the user's draws.
        limit: ``limit_train_batches``.

    Attributes:
        loader: to train on.
        batch_size: the user's batch size; None if the loader does not tell it.
        is_adaptable: whether the micro-batch can be changed.
        is_followed: whether it can be changed in the middle of an epoch.
        is_replayable: whether a pass over its data can be drawn again, to go on after a checkpoint.
        reason: why it cannot be changed; None if it can.
    """

    def __init__(self, loader: Any, *, keeps: str | None = None, merges: bool = False, limit: float = 1.0) -> None:
        self.loader = loader
        theirs: Any = getattr(loader, "batch_sampler", None)
        is_adopted = isinstance(theirs, AdaptiveBatchSampler)
        self.batch_size = theirs.own_batch_size if is_adopted else drawn_batch_size(loader)
        is_merged = merges and draws_mergeably(loader)
        is_drawn = is_adopted or is_merged or draws_plainly(loader)
        self.reason = keeps or _why_it_must_stay(loader, limit) or (None if is_drawn else _reason(loader))
        self.is_adaptable = self.reason is None
        self.is_followed = self.is_adaptable and is_followed(loader)
        self.is_replayable = self.is_followed and not isinstance(loader.dataset, IterableDataset)
        if self.is_adaptable and not is_adopted:
            # A copy keeps the loader's class, workers and generator; past DataLoader.__setattr__, which forbids it.
            self.loader = copy.copy(loader)
            self.loader.__dict__["batch_sampler"] = AdaptiveBatchSampler(
                theirs if is_merged else theirs.sampler,
                theirs.batch_size,
                getattr(theirs, "drop_last", False),
                counted=loader.dataset if isinstance(loader.dataset, IterableDataset) else None,
                merges=is_merged,
                generators=generators_of(loader, theirs, getattr(theirs, "sampler", None)),
            )
        if self.is_adaptable:  # adopted already, if a tuner has trained before
            self._sampler: AdaptiveBatchSampler = self.loader.batch_sampler
            self._sampler.records = self.is_followed
            workers = getattr(self.loader, "_iterator", None)
            if workers is not None:  # persistent ones, begun before: they draw from what they were begun with
                workers._index_sampler = self._sampler
                if loader is not self.loader:
                    loader._iterator = None  # who trains ends them; the user's loader begins others

    @property
    def item_size(self) -> int:
        """What every micro-batch is a multiple of."""
        return self._sampler.item_size if self.is_adaptable else 1

    def draws(self, plan: BatchPlan, *, splits_tail: bool) -> None:
        """Draw passes to come by this plan."""
        if not self.is_adaptable:
            return
        self._sampler.plan = plan
        self._sampler.splits_tail = splits_tail and self.is_followed
        if isinstance(self.loader.dataset, IterableDataset):  # whose loader's length is counted by this one
            self.loader.__dict__["batch_size"] = plan.micro_batch_size

    @property
    def generators(self) -> Sequence[Generator]:
        """The user's generators that it draws from."""
        return self._sampler.generators if self.is_adaptable else generators_of(self.loader)

    def goes_on_at(self, place: PassPlace | None, change: tuple[BatchPlan, int] | None) -> None:
        """Let the next pass to be begun go on at a place of an earlier one, and change its plan after some batches."""
        self._sampler.place, self._sampler.change = place, change

    def trains_on(self, plan: BatchPlan) -> None:
        """Batches of this plan arrive from now on."""
        if self.is_adaptable:
            self._sampler.batch_size = plan.micro_batch_size

    @property
    def trained_on(self) -> int | None:
        """The examples of the micro-batch that is trained on now, where that is told."""
        return self._sampler.trained_on if self.is_adaptable else None

    def takes(self, examples: int) -> None:
        """A micro-batch of so many examples is trained on now."""
        self._sampler.trained_on = examples

    def lets_go(self) -> None:
        """Nobody follows its batches any more: it draws what the user's draws."""
        if self.is_adaptable and self.batch_size is not None:
            self.draws(BatchPlan(self.batch_size), splits_tail=False)
            self._sampler.batch_size = self.batch_size
            self._sampler.records, self._sampler.trained_on = False, None
            self._sampler.place = self._sampler.change = None

    def batches(self, plan: BatchPlan, *, whole_batches: bool) -> float:
        """Return the number of micro-batches of one pass, of whole ones only if wanted; infinite for a stream.

        Only for an adaptable loader.
        """
        items = sized_len(self._sampler.counted)
        if items is None:
            return float("inf")
        batches, rest = divmod(items * self.item_size, plan.micro_batch_size)
        return batches + bool(rest and not whole_batches and not self._sampler.drop_last)


def _why_it_must_stay(loader: Any, limit: float) -> str | None:
    """Say why a loader that could draw larger batches must not.

    After a checkpoint it could not go on, or Lightning could not be told how many batches an epoch has: one that is
    shorter than it was told ends without validation.
    """
    if isinstance(loader, DataLoader) and hasattr(loader, "load_state_dict"):
        return f"the training loader, a `{type(loader).__name__}`, keeps its own place in the data by counting batches"
    if not isinstance(loader, DataLoader) or not isinstance(loader.dataset, IterableDataset):
        return None
    if loader.num_workers > 0:
        return "workers share a stream, each of which ends by itself, and nobody knows after how many larger batches"
    if isinstance(limit, int) and sized_len(loader.dataset) is None:
        return f"the stream, whose length is not known, may hold fewer than {limit} larger batches"
    return None


def _reason(loader: Any) -> str:
    """Say why the loader's micro-batch cannot be changed."""
    if not isinstance(loader, DataLoader):
        return f"the training data is no DataLoader but a `{type(loader).__name__}`"
    if loader.batch_sampler is None:
        return "the training loader has `batch_size=None`, so that its batches are made elsewhere"
    own = f"the training loader draws by a batch sampler of its own, `{type(loader.batch_sampler).__name__}`"
    if draws_mergeably(loader):
        return f"{own}, whose batches need not fit together (if they do, set `merge_batches=True`)"
    return f"{own}, which does not tell the size and the number of its batches"
