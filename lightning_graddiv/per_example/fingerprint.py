"""Does a training step still compute what it did when it was last checked?"""

from collections import Counter
from collections.abc import Hashable
from typing import Any

from torch import Tensor, nn

_MOST_GRAPHS = 8
"""Beyond so many, a step that takes another way each time is told by the kinds of its operations only."""

_UNKNOWN = "CppFunction"
"""The Python type of operations of extensions, which have names but no types of their own."""


def modes_of(module: nn.Module) -> Hashable:
    """Return which submodules are in training mode: batch normalisation, for one, mixes examples in that alone."""
    return tuple(submodule.training for submodule in module.modules())


class KnownGraphs:
    """The autograd graphs of steps that were checked, by their operations and how often each occurs."""

    def __init__(self) -> None:
        self._closely: set[Hashable] = set()
        self._roughly: set[Hashable] = set()

    def add(self, loss: Tensor) -> None:
        """Take a step's graph for checked."""
        counts = _operations(loss)
        self._closely.add(frozenset(counts.items()))
        self._roughly.add(frozenset(counts))

    def knows(self, loss: Tensor) -> bool:
        """Tell whether a graph like this one was checked."""
        counts = _operations(loss)
        if len(self._closely) > _MOST_GRAPHS:
            return frozenset(counts) in self._roughly
        return frozenset(counts.items()) in self._closely

    def clear(self) -> None:
        """Forget all."""
        self._closely.clear()
        self._roughly.clear()


def _operations(loss: Tensor) -> dict[str, int]:
    """Count the operations by the names of their types: to ask each for its own name takes four times as long."""
    nodes = graph_nodes(loss)
    kinds: Counter[Any] = Counter(map(type, nodes))
    counts: dict[str, int] = {}
    for kind, count in kinds.items():
        if kind.__name__ == _UNKNOWN:
            counts |= Counter(node.name() for node in nodes if type(node) is kind)
        else:
            counts[kind.__name__] = counts.get(kind.__name__, 0) + count
    return counts


def graph_nodes(loss: Tensor) -> list[Any]:
    """Return every node of a loss's autograd graph, once."""
    found: list[Any] = [] if loss.grad_fn is None else [loss.grad_fn]
    seen = {None, *found}
    for node in found:  # which grows
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                found.append(following)
    return found
