"""Per-example gradients of one parameter, kept in the form that a layer's backward pass gives them.

A contribution ``c_i`` is what example i adds to a parameter's gradient: ``sum_i c_i`` is the gradient. None of these
forms is larger than the layer's activations; the ``c_i`` themselves, one copy of the weight for each example, are only
made where that is the cheapest way to their norms, and then a few examples at a time.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import override

from lightning_graddiv.per_example.devices import chunk_bytes
from lightning_graddiv.per_example.norms import block_norms_of_rows, sq_norms_of_rows, sq_norms_of_rows_of_each
from lightning_graddiv.per_example.probes import Probe, image_of

CANCELLATION = 1e-2
"""Where products between positions cancel to less than this share, their rounding shows in the sum."""


class Factor:
    """One side of the products that contributions are: what is asked of it more than once is computed once.

    Args:
        values: shape (n, T, width), as in :class:`.Outer`, or (n, width), as in :class:`.Rows`.

    Attributes:
        rows: all positions of all examples one after another, shape (n T, width).
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._sq_norms: Tensor | None = None
        self.rows = values if values.ndim == 2 else values.flatten(0, 1)

    @property
    def sq_norms(self) -> Tensor:
        """Of each row, shape (n T,), float64."""
        if self._sq_norms is None:
            self._sq_norms = sq_norms_of_rows(self.rows)
        return self._sq_norms

    @cached_property
    def products(self) -> Tensor:
        """Of each pair of an example's positions, shape (n, T, T)."""
        products: Tensor = self._values @ self._values.transpose(-1, -2)
        return products

    @staticmethod
    def take_sq_norms(factors: "Sequence[Factor]") -> None:
        """Compute those of several factors at once."""
        found = sq_norms_of_rows_of_each([factor.rows for factor in factors])
        for factor, sq_norms in zip(factors, found, strict=True):
            factor._sq_norms = sq_norms


class Contributions(ABC):
    """What n examples add to the gradient of one parameter.

    Never changed, but not frozen either: several are made for each layer in the midst of a backward pass, and to make a
    frozen one takes three times as long.
    """

    shape: torch.Size
    """Of the parameter."""

    factors: tuple[Factor, ...] = ()
    """Of whose rows the norms will be asked for, which can be taken together with those of others."""

    @property
    @abstractmethod
    def by_example(self) -> Tensor:
        """A tensor of theirs, whose first dimension is that of the examples."""

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.by_example.device

    def __len__(self) -> int:
        """Return the number of examples."""
        return self.by_example.shape[0]

    @abstractmethod
    def at(self, examples: slice) -> "Contributions":
        """Return those of some examples."""

    @abstractmethod
    def explicit(self) -> Tensor:
        """Return the contributions themselves, shape (n, ...), in at least float32."""

    @property
    def are_formed(self) -> bool:
        """Whether the way to their norms forms the contributions themselves, so that their sum costs nothing."""
        return True

    def measure(self, right: Tensor) -> tuple[Tensor, Tensor]:
        """Return the squared norms, shape (n,), float64, and what the sum takes a vector to (:func:`image_of`)."""
        norms, total = self.norms_and_sum()
        return norms, image_of(total, right)

    def norms_and_sum(self) -> tuple[Tensor, Tensor]:
        """Return the squared norms, shape (n,), float64, and the sum of the contributions, which are formed for it."""
        return self._formed(sq_norms_of_rows)

    def block_norms_and_sum(self) -> tuple[Tensor, Tensor]:
        """Return the norms of blocks of each contribution, shape (n, blocks), and the sum: with few calls.

        In the type of the contributions, so that their squares may have left its range.
        """
        return self._formed(block_norms_of_rows)

    def _formed(self, norms_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        norms, total = [], None
        for part in self.chunks():
            explicit = part.explicit()
            norms.append(norms_of(explicit))
            total = explicit.sum(0) if total is None else total + explicit.sum(0)
        if total is None:
            raise ValueError("there are no examples")
        return norms[0] if len(norms) == 1 else torch.cat(norms), total

    def sketches(self, probe: Probe) -> Tensor:
        """Return the projections of each contribution, shape (n, p), float64."""
        return torch.cat([probe.of_each(part.explicit()) for part in self.chunks()])

    def chunks(self) -> Iterator["Contributions"]:
        """Yield all examples, so many at a time that their explicit contributions fit into little memory."""
        size = max(1, chunk_bytes(self.device) // (4 * max(1, self.formed_at_once)))
        if size >= len(self) > 0:
            yield self
            return
        for start in range(0, len(self), size):
            yield self.at(slice(start, start + size))

    @property
    def formed_at_once(self) -> int:
        """How many numbers have to be held to form the contribution of an example."""
        return math.prod(self.shape)


@dataclass(eq=False)
class Explicit(Contributions):
    """Contributions as they are: those of biases and of the scales of normalisation layers, which are small.

    Attributes:
        values: shape (n, ...).
        output_gradients: what ``values`` is, where a weight is multiplied with the same.
    """

    values: Tensor
    output_gradients: Factor | None = None

    @property
    @override
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.values.shape[1:]

    @property
    @override
    def by_example(self) -> Tensor:
        return self.values

    @override
    def at(self, examples: slice) -> "Explicit":
        return Explicit(self.values[examples])

    @override
    def explicit(self) -> Tensor:
        return self.values

    @override
    def norms_and_sum(self) -> tuple[Tensor, Tensor]:
        known = self.output_gradients
        norms = sq_norms_of_rows(self.values) if known is None else known.sq_norms
        return norms, self.values.sum(0)


@dataclass(eq=False)
class Lookup(Contributions):
    """``c_i = sum_t e(index_it) b_it'``: a table from which example i takes T rows, some of them more than once.

    Attributes:
        index: shape (n, T).
        output_gradients: b, shape (n, T, d).
        shape: of the table, (rows, d).
    """

    index: Tensor
    output_gradients: Tensor
    shape: torch.Size

    @property
    @override
    def by_example(self) -> Tensor:
        return self.index

    @override
    def at(self, examples: slice) -> "Lookup":
        return Lookup(self.index[examples], self.output_gradients[examples], self.shape)

    @override
    def explicit(self) -> Tensor:
        table = self.output_gradients.new_zeros(len(self), *self.shape)
        return table.scatter_add_(1, self.index[..., None].expand_as(self.output_gradients), self.output_gradients)

    @property
    @override
    def are_formed(self) -> bool:
        return False

    @override
    def sketches(self, probe: Probe) -> Tensor:
        chosen = probe.left.T[self.index]  # (n, T, p)
        return (chosen * (self.output_gradients @ probe.right.T)).sum(1, dtype=torch.float64)

    @override
    def measure(self, right: Tensor) -> tuple[Tensor, Tensor]:
        """Add up the rows of equal tokens within an example before taking norms."""
        seen = self.output_gradients.flatten(0, 1) @ right
        image = seen.new_zeros(self.shape[0]).index_add_(0, self.index.flatten(), seen)
        examples = torch.arange(len(self), device=self.index.device)[:, None]
        keys, inverse = torch.unique(examples * self.shape[0] + self.index, return_inverse=True)
        b = self.output_gradients
        rows = b.new_zeros(len(keys), b.shape[-1]).index_add_(0, inverse.flatten(), b.flatten(0, 1))
        norms = b.new_zeros(len(self), dtype=torch.float64)
        if len(keys) > 0:
            norms.index_add_(0, keys // self.shape[0], sq_norms_of_rows(rows))
        return norms, image
