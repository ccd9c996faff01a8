"""What an example is in a batch of any shape: count them, pick some, map over them."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_graddiv.errors import MeasurementError


def tensor_leaves(batch: Any) -> list[Tensor]:
    """Return the tensors of a nested batch, in a fixed order."""
    leaves: list[Tensor] = []

    def collect(leaf: Tensor) -> Tensor:
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

    Args:
        batch: a batch of ``total`` examples.
        examples: their positions.
        total: tensors with this leading dimension, and lists of so many non-tensors, have a row per example.
    """

    def rows_of(leaf: Tensor) -> Tensor:
        if not has_row_per_example(leaf, total):
            return leaf
        return leaf.index_select(0, torch.as_tensor(examples, device=leaf.device))

    def pick(part: Any) -> Any:
        if isinstance(part, Tensor):
            return rows_of(part)
        if len(part) == total and not any(isinstance(item, (Tensor, list, tuple, dict)) for item in part):
            return [part[i] for i in examples]
        return [_map_leaves(item, pick, kinds=(Tensor, list)) for item in part]

    return _map_leaves(batch, pick, kinds=(Tensor, list))


def has_row_per_example(leaf: Tensor, total: int) -> bool:
    """Tell whether the tensor's leading dimension runs over the examples."""
    return leaf.ndim > 0 and leaf.shape[0] == total


def replace_leaves(batch: Any, leaves: Sequence[Tensor]) -> Any:
    """Return the batch with its tensors replaced, in the order of :func:`tensor_leaves`."""
    replacements = iter(leaves)
    return _map_leaves(batch, lambda _: next(replacements))


def _map_leaves(batch: Any, function: Callable[[Any], Any], kinds: Any = Tensor) -> Any:
    try:
        return apply_to_collection(batch, kinds, function)
    except ValueError as error:
        if "frozen dataclass" not in str(error):
            raise
        raise MeasurementError(
            f"The batch holds a frozen dataclass, which cannot be split into examples ({type(batch).__name__}). "
            "Drop `frozen=True` or collate into a dict or a named tuple.",
            lasting=True,
        ) from error
