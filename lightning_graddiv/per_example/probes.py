"""Random directions in which gradients are compared, so that none has to be kept or formed for each example."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_graddiv.per_example.products import matrix_vector

DIRECTIONS = 4
"""Numbers by which the gradient that is applied is compared with what backward passes gave."""


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
