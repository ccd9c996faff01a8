"""A batch sampler whose batch size may change between two passes over the data."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, Sampler


class AdaptiveBatchSampler(Sampler[list[int]]):
    """Draws what ``torch.utils.data.BatchSampler`` draws; ``batch_size`` may be set between two iterations.

    It runs in the main process also when workers load the data, so that a new size needs no message to them. It takes
    no random numbers of its own: with an unchanged size, training is bit-identical.

    Args:
        sampler: yields indices; its length may be unknown.
        batch_size: examples per batch, at least 1.
        drop_last: leave out a last batch that is not full.
    """

    def __init__(self, sampler: Iterable[int], batch_size: int, drop_last: bool) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.drop_last = drop_last

    def __iter__(self) -> Iterator[list[int]]:
        """Yield lists of ``batch_size`` indices; the size is fixed when the iteration starts."""
        size = self.batch_size
        indices = iter(self.sampler)
        while batch := list(islice(indices, size)):
            if len(batch) < size and self.drop_last:
                return
            yield batch

    def __len__(self) -> int:
        """Return the number of batches of one pass.

        Raises:
            TypeError: the sampler has no length.
        """
        batches, rest = divmod(len(self.sampler), self.batch_size)  # type: ignore[arg-type]
        return batches + bool(rest and not self.drop_last)


def is_adaptable(loader: Any) -> bool:
    """Tell whether the loader draws batches by a plain batch sampler."""
    return isinstance(loader, DataLoader) and type(loader.batch_sampler) in (
        BatchSampler,
        AdaptiveBatchSampler,
    )


def drawn_batch_size(loader: Any) -> int | None:
    """Return how many examples the loader draws for one full batch; None where it does not say."""
    size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return size if isinstance(size, int) else None


def drawn_examples(loader: Any, batch_idx: int) -> int | None:
    """Return how many examples batch ``batch_idx`` of a pass holds; None where the loader does not say its size."""
    size = drawn_batch_size(loader)
    if size is None:
        return None
    try:
        left = len(loader.batch_sampler.sampler) - batch_idx * size
    except (AttributeError, TypeError):  # not a plain batch sampler, or a stream
        return size
    return left if 0 < left < size else size
