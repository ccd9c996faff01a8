"""Examples drawn beside the training, from a copy of the data set."""

from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from lightning_graddiv.batching.twins import twin_of
from lightning_graddiv.errors import MeasurementError


def draw(loader: Any, examples: int) -> Any:
    """Return a batch of so many examples as the loader would make it, with neither its sampler nor its workers.

    The data set and what collates are copied as for a worker, but for tensors and arrays: generators, counters and
    open files of their own stay where they are.

    Raises:
        MeasurementError: the loader's data set is a stream, is empty, or cannot be copied.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise MeasurementError("examples cannot be drawn from a stream twice", lasting=True)
    dataset, collate = _copied(loader.dataset, loader.collate_fn)
    if len(dataset) == 0:
        raise MeasurementError("the data set is empty", lasting=True)
    indices = [i % len(dataset) for i in range(examples)]
    fetch = getattr(dataset, "__getitems__", None)
    return collate(fetch(indices) if fetch else [dataset[i] for i in indices])


def _copied(*parts: Any) -> Any:
    try:
        return twin_of(parts)
    except Exception as error:
        raise MeasurementError(
            f"the data set cannot be copied to draw examples from it ({type(error).__name__}: {error})", lasting=True
        ) from error
