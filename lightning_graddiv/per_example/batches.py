"""What an example is in a batch of any shape: count them, pick some, map over them."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_graddiv.errors import MeasurementError


def tensor_leaves(batch: Any) -> list[Tensor]:
    """Return the tensors of a nested batch, in a fixed order."""
    leaves: list[Tensor] = []

    def collect(leaf: Tensor) -> Tensor:
        """Take a leaf down, and leave it as it is."""
        leaves.append(leaf)
        return leaf

    _map_leaves(batch, collect)
    return leaves


def count_examples(batch: Any, at_most: int | None = None) -> int:
    """Return the number of examples: the rows that the batch's tensors share.

    Args:
        batch: tensors in any nesting of tuples, lists, mappings, dataclasses and named tuples.
        at_most: how many examples the loader draws for a full batch, where that is known. Tensors may then have other
            leading dimensions beside this one; fewer rows, the same in all tensors, are a last batch that is not full.

    Raises:
        MeasurementError: there is no tensor with rows, no row at all, or rows that cannot be the loader's examples.
    """
    sizes = [leaf.shape[0] for leaf in tensor_leaves(batch) if leaf.ndim > 0]
    if not sizes:
        raise MeasurementError(
            f"The batch ({type(batch).__name__}) holds no tensor whose rows could be examples, so it cannot be split. "
            "Batches may nest tensors in tuples, lists, dicts, dataclasses and named tuples.",
            lasting=True,
        )
    if max(sizes) == 0:
        raise MeasurementError("The batch is empty: there is no example to measure.")
    if at_most is None:
        return Counter(sizes).most_common(1)[0][0]
    if at_most in sizes:
        return at_most
    if len(set(sizes)) == 1 and sizes[0] < at_most:
        return sizes[0]
    raise MeasurementError(
        f"The loader draws {at_most} examples for a batch, but the batch's tensors have {sorted(set(sizes))} rows: "
        "rows are not examples here, so the batch cannot be split into examples.",
        lasting=True,
    )


def select(batch: Any, examples: Sequence[int], total: int) -> Any:
    """Return the batch of the given examples only; what has no row per example is passed on whole.

    The rows are copies, the rest is shared.

    Args:
        batch: a batch of ``total`` examples.
        examples: their positions.
        total: tensors and arrays with this leading dimension, and lists and tuples of so many strings or other plain
            values, have a row per example.
    """
    kinds = (Tensor, np.ndarray, list, tuple)

    def pick(part: Any) -> Any:
        """Return the examples' share of a part of the batch."""
        if isinstance(part, Tensor):
            rows = torch.as_tensor(examples, device=part.device)
            return part.index_select(0, rows) if has_row_per_example(part, total) else part
        if isinstance(part, np.ndarray):
            return part[list(examples)] if part.ndim > 0 and len(part) == total else part
        if hasattr(part, "_fields"):
            return type(part)(*(_map_leaves(item, pick, kinds) for item in part))
        if len(part) == total and not tensor_leaves(part):
            return type(part)(part[i] for i in examples)
        return type(part)(_map_leaves(item, pick, kinds) for item in part)

    return _map_leaves(batch, pick, kinds)


def repeated(batch: Any, examples: int, at_most: int | None = None) -> Any:
    """Return a batch of so many examples, which are those of ``batch`` over and over.

    Args:
        batch: the batch.
        examples: how many it is to have; fewer than it has are its first.
        at_most: see :func:`count_examples`.

    Raises:
        MeasurementError: as :func:`count_examples`; or a tensor has other rows than examples, and nobody knows how many
            it would have in a larger batch.
    """
    total = count_examples(batch, at_most)
    others = {leaf.shape[0] for leaf in tensor_leaves(batch) if leaf.ndim > 0} - {total}
    if others:
        raise MeasurementError(
            f"The batch of {total} examples holds tensors of {sorted(others)} rows, which cannot be repeated.",
            lasting=True,
        )
    return select(batch, [i % total for i in range(examples)], total)


def has_row_per_example(leaf: Tensor, total: int) -> bool:
    """Tell whether the tensor's leading dimension runs over the examples."""
    return leaf.ndim > 0 and leaf.shape[0] == total


def replace_leaves(batch: Any, leaves: Sequence[Tensor]) -> Any:
    """Return the batch with its tensors replaced, in the order of :func:`tensor_leaves`."""
    replacements = iter(leaves)
    return _map_leaves(batch, lambda _: next(replacements))


def own_copy(batch: Any) -> Any:
    """Return the batch with containers, tensors and arrays of its own, for a training step that writes to them."""
    return _map_leaves(
        batch, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf.copy(), (Tensor, np.ndarray)
    )


def _map_leaves(batch: Any, function: Callable[[Any], Any], kinds: Any = Tensor) -> Any:
    try:
        return apply_to_collection(batch, kinds, function)
    except (MeasurementError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        cure = "Drop `frozen=True`, or collate" if "frozen dataclass" in str(error) else "Collate"
        raise MeasurementError(
            f"The batch ({type(batch).__name__}) cannot be taken apart into examples ({error}). {cure} into a dict or "
            "a named tuple.",
            lasting=True,
        ) from error
