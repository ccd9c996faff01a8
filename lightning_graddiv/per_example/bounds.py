"""Indices out of range, found before a GPU finds them: there, one ends the process and the training with it.

On a processor torch raises an IndexError for them. A GPU's kernel traps, and nothing runs on that GPU any more. A step
that indexes with numbers made for its whole batch may do that when it runs on a few of the examples, as measuring does.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_graddiv.per_example.modes import OperatorMode

ON_GPU = frozenset({"cuda"})


@contextmanager
def indices_checked(module: nn.Module, devices: frozenset[str] = ON_GPU) -> Iterator[None]:
    """Raise an ``IndexError`` for an index that is out of range, where the device would not.

    Args:
        module: that runs in the block.
        devices: kinds of device on which indices are looked at; a module on none of them runs unwatched.
    """
    if not any(parameter.device.type in devices for parameter in module.parameters()):
        yield
        return
    with _IndexBounds(devices):
        yield


class _IndexBounds(OperatorMode):
    def __init__(self, devices: frozenset[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._devices = devices

    @override
    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        pairs_of = _pairs_of(func)
        if pairs_of is not None:
            names = [argument.name for argument in func._schema.arguments]
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            if given[names[0]].device.type in self._devices:  # of what is indexed; an index may come from the processor
                for index, size, lowest in pairs_of(given):
                    _check(func, index, size, lowest)
        return func(*args, **kwargs)


def _check(func: Any, index: Tensor, size: int, lowest: int) -> None:
    if index.numel() == 0:
        return
    smallest, largest = torch.stack(torch.aminmax(index)).tolist()
    if smallest < lowest or largest >= size:
        wrong = smallest if smallest < lowest else largest
        raise IndexError(f"index {wrong} is out of range for {size} entries ({func})")


Arguments = Mapping[str, Any]

Pairs = Iterator[tuple[Tensor, int, int]]
"""Indices, how many entries they choose from, and the smallest index that is allowed."""


def _of_index(given: Arguments) -> Pairs:
    """``x[i, j]``: masks, which take several dimensions, have their own check."""
    values, dimension = given["self"], 0
    for index in given["indices"]:
        if index is None or index.dtype not in {torch.bool, torch.uint8}:
            if index is not None:
                size = values.shape[dimension]
                yield index, size, -size
            dimension += 1
        else:
            dimension += index.ndim


def _of_dimension(given: Arguments) -> Pairs:
    values = given["self"]
    yield given["index"], values.shape[given["dim"]] if values.ndim > 0 else 1, 0


def _of_filled(given: Arguments) -> Pairs:
    for index, size, _ in _of_dimension(given):
        yield index, size, -size


def _of_table(given: Arguments) -> Pairs:
    yield given["indices"], given["weight"].shape[0], 0


def _of_bags(given: Arguments) -> Pairs:
    yield from _of_table(given)
    offsets = given["offsets"]
    yield offsets, given["indices"].shape[0] + 1, 0
    yield offsets[:1], 1, 0


def _of_take(given: Arguments) -> Pairs:
    size = given["self"].numel()
    yield given["index"], size, -size


def _of_classes(given: Arguments) -> Pairs:
    values, target = given["self"], given["target"]
    yield target[target != given["ignore_index"]], values.shape[min(1, values.ndim - 1)], 0


_KINDS: Mapping[str, Callable[[Arguments], Pairs]] = {
    **dict.fromkeys(("index", "index_put", "_index_put_impl", "_unsafe_index", "_unsafe_index_put"), _of_index),
    **dict.fromkeys(("gather", "scatter", "scatter_add", "scatter_reduce"), _of_dimension),
    **dict.fromkeys(("index_select", "index_add", "index_copy", "index_reduce"), _of_dimension),
    "index_fill": _of_filled,
    "embedding": _of_table,
    **dict.fromkeys(("_embedding_bag", "_embedding_bag_forward_only"), _of_bags),
    **dict.fromkeys(("take", "put"), _of_take),
    **dict.fromkeys(("nll_loss_forward", "nll_loss2d_forward"), _of_classes),
}
"""By the operator's name, without the underscore at the end of those that write to their first argument."""


@cache
def _pairs_of(func: Any) -> Callable[[Arguments], Pairs] | None:
    if func.namespace != "aten":
        return None
    return _KINDS.get(func._schema.name.removeprefix("aten::").rstrip("_"))
