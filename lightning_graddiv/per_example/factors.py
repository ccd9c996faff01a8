"""Per-example gradients of one parameter, kept in the form that a layer's backward pass gives them.

A contribution ``c_i`` is what example i adds to a parameter's gradient: ``sum_i c_i`` is the gradient. None of these
forms is larger than the layer's activations; the ``c_i`` themselves, one copy of the weight for each example, are only
made where that is the cheapest way to their norms, and then a few examples at a time.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import Self, override

from lightning_graddiv.per_example.devices import chunk_bytes, is_accelerator
from lightning_graddiv.per_example.norms import block_norms_of_rows, sq_norms_of_rows, sq_norms_of_rows_of_each
from lightning_graddiv.per_example.products import matrix_vector, vector_matrix

_MOST_CHUNKS = 2
"""On an accelerator, so many passes over a chunk of contributions cost less than the calls that would avoid them."""

DIRECTIONS = 4
"""Numbers by which gradients are compared."""


@dataclass(eq=False)
class Probe:
    """A few random directions of rank one in the space of a parameter of shape (o, ...).

    The projection of ``sum_i c_i`` must be that of the gradient, for the price of two thin products.

    Attributes:
        left: shape (p, o).
        right: shape (p, numel / o).
    """

    left: Tensor
    right: Tensor

    def of(self, gradient: Tensor) -> Tensor:
        """Return the projections of a gradient, shape (p,), float64."""
        matrix = gradient.reshape(self.left.shape[1], self.right.shape[1]).to(self.left.dtype)
        return (self.left @ (matrix @ self.right.T)).diagonal().double()

    def of_each(self, gradients: Tensor) -> Tensor:
        """Return the projections of n gradients, shape (n, p), float64."""
        matrices = gradients.reshape(len(gradients), self.left.shape[1], self.right.shape[1]).to(self.left.dtype)
        return ((matrices @ self.right.T) * self.left.T).sum(1, dtype=torch.float64)


def image_of(gradient: Tensor, right: Tensor) -> Tensor:
    """Return what a gradient takes a random vector to, by which it is compared.

    That of ``sum_i c_i`` must be the same: a check (Freivalds') that no use of the parameter was overlooked. One vector
    is enough to notice what differs in several independent ways; a difference of rank one of a tenth of the gradient
    stays below the tolerance once in some four hundred measurements (more often where the examples' gradients cancel),
    each of which has a vector of its own.

    Args:
        gradient: shape (o, ...), or flattened.
        right: shape (numel / o,), as :meth:`.Directions.right` gives it.

    Returns:
        Tensor of shape (o,).
    """
    columns = right.shape[0]
    is_matrix = gradient.ndim == 2 and gradient.shape[1] == columns
    rows = gradient.numel() // columns if columns > 0 else gradient.shape[0]
    matrix = gradient if is_matrix else gradient.reshape(rows, columns)
    return matrix_vector(matrix if matrix.dtype == right.dtype else matrix.to(right.dtype), right)


CANCELLATION = 1e-2
"""Where products between positions cancel to less than this share, their rounding shows in the sum."""


class Factor:
    """One side of the products that contributions are: what is asked of it more than once is computed once.

    Args:
        values: shape (n, T, width), as in :class:`Outer`, or (n, width), as in :class:`Rows`.

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

    factors: tuple[Factor, ...] = ()
    """Of whose rows the norms will be asked for, which can be taken together with those of others."""

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
class _OfLinearMap(Contributions):
    """The weight of a linear map: products of what went in, a, and the gradients of what came out, b."""

    inputs: Tensor
    output_gradients: Tensor
    shape: torch.Size
    shared: Factor | None = None

    @property
    @override
    def by_example(self) -> Tensor:
        return self.inputs

    @override
    def at(self, examples: slice) -> Self:
        return replace(
            self, inputs=self.inputs[examples], output_gradients=self.output_gradients[examples], shared=None
        )


@dataclass(eq=False)
class Rows(_OfLinearMap):
    """``c_i = b_i a_i'``: the weight of a linear map, each row of whose input is an example.

    Attributes:
        inputs: a, shape (n, in).
        output_gradients: b, shape (n, out).
        shape: of the weight, (out, in).
        shared: b, where another parameter is multiplied with it too.
    """

    def __post_init__(self) -> None:
        self.factors = Factor(self.inputs), Factor(self.output_gradients) if self.shared is None else self.shared

    @override
    def explicit(self) -> Tensor:
        return self.output_gradients[:, :, None] * self.inputs[:, None]

    @property
    @override
    def are_formed(self) -> bool:
        return False

    @override
    def measure(self, right: Tensor) -> tuple[Tensor, Tensor]:
        """|b a'|^2 = |b|^2 |a|^2."""
        image = vector_matrix(matrix_vector(self.inputs, right), self.output_gradients)
        a, b = self.factors
        return a.sq_norms * b.sq_norms, image

    @override
    def sketches(self, probe: Probe) -> Tensor:
        products = (self.inputs @ probe.right.T) * (self.output_gradients @ probe.left.T)
        return products.double()

    def at_one_position(self) -> "Outer":
        """Return the same as a sum over positions, of which there is one."""
        return Outer(self.inputs[:, None], self.output_gradients[:, None], self.shape)


def forming_is_cheaper(examples: int, positions: int, fan_in: int, fan_out: int, device: torch.device) -> bool:
    """Tell whether n (in, out) products over T positions are cheaper than products between positions.

    On an accelerator they are unless they are large: two passes over them, and no look at what cancels, for which the
    processor would have to wait.
    """
    if positions == 1:
        return False
    is_small = 4 * examples * fan_in * fan_out <= _MOST_CHUNKS * chunk_bytes(device)
    return positions * (fan_in + fan_out) > fan_in * fan_out or (is_accelerator(device) and is_small)


@dataclass(eq=False)
class Outer(_OfLinearMap):
    """``c_i = sum_t b_it a_it'``: the weight of a linear map that example i goes through at T positions.

    Attributes:
        inputs: a, shape (n, T, in).
        output_gradients: b, shape (n, T, out).
        shape: of the weight, (out, in).
        shared: b, where another parameter is multiplied with it too.
    """

    @override
    def explicit(self) -> Tensor:
        formed: Tensor = self.output_gradients.transpose(-1, -2) @ self.inputs
        return formed

    @property
    @override
    def are_formed(self) -> bool:
        n, positions, fan_in = self.inputs.shape
        return forming_is_cheaper(n, positions, fan_in, self.output_gradients.shape[-1], self.inputs.device)

    @override
    def measure(self, right: Tensor) -> tuple[Tensor, Tensor]:
        return super().measure(right) if self.are_formed else self.measure_by_products(right)

    def measure_by_products(self, right: Tensor) -> tuple[Tensor, Tensor]:
        """Measure without forming the contributions, by products between positions."""
        n, positions, _ = self.inputs.shape
        if positions == 1:
            return Rows(self.inputs[:, 0], self.output_gradients[:, 0], self.shape).measure(right)
        # Of the sum: sum_it b_it <a_it, right>
        image = vector_matrix(matrix_vector(self._rows, right), self._b.rows)
        size = max(1, chunk_bytes(self.device) // max(1, 8 * positions**2))
        parts = [self] if size >= n else [self.at(slice(start, start + size)) for start in range(0, n, size)]
        return torch.cat([part._by_gram() for part in parts]), image

    @property
    def _rows(self) -> Tensor:
        """The inputs at all positions of all examples one after another, shape (n T, in)."""
        return self.inputs.flatten(0, 1)

    @property
    def _b(self) -> Factor:
        """What nobody shares is let go of at once: products between positions are many."""
        return Factor(self.output_gradients) if self.shared is None else self.shared

    @override
    def sketches(self, probe: Probe) -> Tensor:
        """Add up the projections of b_t a_t', shape (n T, p), over positions."""
        products = (self._rows @ probe.right.T) * (self._b.rows @ probe.left.T)
        projected: Tensor = products.unflatten(0, self.inputs.shape[:2])
        return projected.sum(1, dtype=torch.float64)

    def _by_gram(self) -> Tensor:
        """|sum_t b_t a_t'|^2 = sum_{t,s} <a_t, a_s> <b_t, b_s>."""
        a, b = self.inputs, self.output_gradients
        products = (a @ a.transpose(-1, -2)).mul_(self._b.products)
        norms: Tensor = products.sum((1, 2), dtype=torch.float64)
        cancels = norms < CANCELLATION * products.abs().sum((1, 2), dtype=torch.float64)
        if bool(cancels.any()):
            chosen = replace(self, inputs=a[cancels], output_gradients=b[cancels], shared=None)
            norms[cancels] = torch.cat([sq_norms_of_rows(part.explicit()) for part in chosen.chunks()])
        return norms


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


@dataclass(eq=False)
class Total(Contributions):
    """The sum of several uses of one parameter, taken before the norm."""

    parts: tuple[Contributions, ...]

    @property
    @override
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.parts[0].shape

    @property
    @override
    def by_example(self) -> Tensor:
        return self.parts[0].by_example

    @override
    def at(self, examples: slice) -> "Total":
        return Total(tuple(part.at(examples) for part in self.parts))

    @override
    def explicit(self) -> Tensor:
        total = self.parts[0].explicit().clone()
        for part in self.parts[1:]:
            total += part.explicit()
        return total

    @property
    @override
    def formed_at_once(self) -> int:
        return sum(part.formed_at_once for part in self.parts)

    @property
    @override
    def are_formed(self) -> bool:
        return self._table_and_head is None

    @property
    def _table_and_head(self) -> tuple[Outer, Lookup] | None:
        outer = next((part for part in self.parts if isinstance(part, Outer)), None)
        lookup = next((part for part in self.parts if isinstance(part, Lookup)), None)
        return None if outer is None or lookup is None or len(self.parts) != 2 else (outer, lookup)

    @override
    def sketches(self, probe: Probe) -> Tensor:
        return torch.stack([part.sketches(probe) for part in self.parts]).sum(0)

    @override
    def measure(self, right: Tensor) -> tuple[Tensor, Tensor]:
        """|u + v|^2 = |u|^2 + |v|^2 + 2 <u, v> where table and head share a weight; else what adds up."""
        pair = self._table_and_head
        if pair is None:
            return super().measure(right)
        outer, lookup = pair
        (u, image_of_u), (v, image_of_v) = outer.measure(right), lookup.measure(right)
        return (u + v + 2 * _inner(outer, lookup)).clamp_(min=0), image_of_u + image_of_v


def added(uses: Sequence[Contributions]) -> Contributions:
    """Return the sum of several uses of a parameter by the same examples."""
    if len(uses) == 1:
        return uses[0]
    uses = [use.at_one_position() if isinstance(use, Rows) else use for use in uses]
    outers = [use for use in uses if isinstance(use, Outer)]
    lookups = [use for use in uses if isinstance(use, Lookup)]
    parts: list[Contributions] = [use for use in uses if not isinstance(use, Outer | Lookup)]
    if outers:
        inputs = torch.cat([use.inputs for use in outers], 1)
        parts.append(Outer(inputs, torch.cat([use.output_gradients for use in outers], 1), outers[0].shape))
    if lookups:
        index = torch.cat([use.index for use in lookups], 1)
        parts.append(Lookup(index, torch.cat([use.output_gradients for use in lookups], 1), lookups[0].shape))
    return parts[0] if len(parts) == 1 else Total(tuple(parts))


def _inner(outer: Outer, lookup: Lookup) -> Tensor:
    """Return <c_i, c'_i> of a linear map and a lookup in the same weight: a token's row of the map's gradient."""
    a, b = outer.inputs, outer.output_gradients
    index = lookup.index[:, None, :].expand(-1, b.shape[1], -1)
    products = b.gather(2, index) * (a @ lookup.output_gradients.transpose(1, 2))  # (n, T, S)
    return products.sum((1, 2), dtype=torch.float64)
