"""Examples drawn beside the training, from a copy of the data set."""

import io
import pickle
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_graddiv.errors import MeasurementError

_SHARED = (Tensor, np.ndarray, FunctionType, ModuleType, type, str, bytes)
"""Not copied: the data itself, and what cannot change."""


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
    file = io.BytesIO()
    try:
        pickler = _Pickler(file)
        pickler.dump(parts)
        file.seek(0)
        return _Unpickler(file, pickler.shared).load()
    except Exception as error:
        raise MeasurementError(
            f"the data set cannot be copied to draw examples from it ({type(error).__name__}: {error})", lasting=True
        ) from error


class _Pickler(pickle.Pickler):
    def __init__(self, file: Any) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.shared: list[Any] = []

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, _SHARED):
            return None
        self.shared.append(obj)
        return len(self.shared) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, shared: list[Any]) -> None:
        super().__init__(file)
        self._shared = shared

    def persistent_load(self, pid: Any) -> Any:
        return self._shared[pid]
