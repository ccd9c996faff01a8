"""Twins of training data: to draw batches from, while what training draws from stays as it is."""

import copy
import io
import pickle
from collections.abc import Iterator, Sequence
from itertools import islice
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import numpy as np
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from lightning_graddiv.batching.sampler import AdaptiveBatchSampler

# Classes and functions too, so that local ones, which cannot be pickled, are no obstacle.
_SHARED = (Tensor, np.ndarray, type, FunctionType, BuiltinFunctionType, ModuleType)


def twin_of(value: Any, shared: Sequence[Any] = ()) -> Any:
    """Return a copy of an object with all that it holds: counters, lists, random generators.

    Tensors and arrays, where the data are, are shared; so are classes and functions.

    Args:
        value: the object.
        shared: other objects to share.

    Raises:
        Exception: whatever pickling raises, for an open file for instance.
    """
    file = io.BytesIO()
    pickler = _Pickler(file, shared)
    pickler.dump(value)
    file.seek(0)
    return _Unpickler(file, pickler.kept).load()


class _Pickler(pickle.Pickler):
    def __init__(self, file: Any, shared: Sequence[Any]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._shared = {id(value) for value in shared}
        self.kept: list[Any] = []

    def persistent_id(self, value: Any) -> int | None:
        """Return the place of what is shared and not copied; None of what is copied."""
        if not isinstance(value, _SHARED) and id(value) not in self._shared:
            return None
        self.kept.append(value)
        return len(self.kept) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, kept: Sequence[Any]) -> None:
        super().__init__(file)
        self._kept = kept

    def persistent_load(self, index: int) -> Any:
        """Return what is shared."""
        return self._kept[index]


def twin_loader(loader: Any) -> Any:
    """Return a loader that draws what this one would, from its own copies of data set, samplers and generators.

    Workers, collation and the rest are the loader's. A map-style data set that cannot be copied is shared: reading an
    example is all that happens to it.

    Raises:
        MisconfigurationException: it draws from something that cannot be copied, so that drawing would use it up.
    """
    if isinstance(loader, (list, tuple)):
        return loader
    if not isinstance(loader, DataLoader):
        return _copied(loader, (), loader)
    parts = (loader.dataset, loader.sampler, _batch_sampler(loader), loader.generator)
    try:
        copies = twin_of(parts)
    except Exception:  # whatever pickling raises
        if isinstance(loader.dataset, IterableDataset):
            raise _uncopyable(loader.dataset) from None
        copies = _copied(parts, [loader.dataset], loader.sampler)
    names = ("dataset", "sampler", "batch_sampler", "generator")
    twin = copy.copy(loader)
    # Past DataLoader.__setattr__, which forbids it.
    twin.__dict__.update(zip(names, copies, strict=True), _iterator=None, persistent_workers=False)
    return twin


def first_batches(loader: Any, count: int) -> Iterator[Any]:
    """Draw up to so many batches of a pass from a twin of the loader."""
    return islice(iter(twin_loader(loader)), count)


def _batch_sampler(loader: Any) -> Any:
    """Return what draws the loader's batches, as the user made it: ours follows a pass that is under way."""
    drawn_by = loader.batch_sampler
    if not isinstance(drawn_by, AdaptiveBatchSampler):
        return drawn_by
    if drawn_by.merges:
        return drawn_by.source
    return BatchSampler(drawn_by.sampler, drawn_by.batch_size, drawn_by.drop_last)


def _copied(value: Any, shared: Sequence[Any], culprit: Any) -> Any:
    try:
        return twin_of(value, shared)
    except Exception:  # whatever pickling raises
        raise _uncopyable(culprit) from None


def _uncopyable(culprit: Any) -> MisconfigurationException:
    return MisconfigurationException(
        f"Batches are drawn from a copy of the training data, so that none is used up, but `{type(culprit).__name__}` "
        "cannot be copied by pickling, as it could not be sent to a worker either. Keep open files and generators out "
        "of it until iteration begins."
    )
