"""Contributions to the weight of a linear map: products of what went in and the gradients of what came out."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import Self, override

from lightning_graddiv.per_example.devices import chunk_bytes, is_accelerator
from lightning_graddiv.per_example.factors import CANCELLATION, Contributions, Factor
from lightning_graddiv.per_example.norms import sq_norms_of_rows
from lightning_graddiv.per_example.probes import Probe
from lightning_graddiv.per_example.products import matrix_vector, vector_matrix

_MOST_CHUNKS = 2
"""On an accelerator, so many passes over a chunk of contributions cost less than the calls that would avoid them."""


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
