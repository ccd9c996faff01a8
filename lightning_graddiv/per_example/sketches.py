"""Gradients by their projections on a few random directions: enough to compare them, without holding any of them."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_graddiv.per_example.directions import Directions
from lightning_graddiv.per_example.factors import Contributions
from lightning_graddiv.per_example.functional import differentiate, require_finite
from lightning_graddiv.per_example.losses import StepLoss, Watch
from lightning_graddiv.per_example.modes import own_work
from lightning_graddiv.per_example.norms import dense, on_processor, real_view, sum_of_squares

_FEWEST_PER_PARAMETER = 16
"""A sketch of so many numbers gives the norm of a difference to about half of it."""

_FEWEST_IN_ALL = 64
"""The weights of a few examples are solved for with these."""


@dataclass(frozen=True)
class Sketch:
    """A gradient, or several that were stacked.

    Attributes:
        projections: of each parameter's gradient, scaled so that the squares add up to its squared norm on the average:
            shape (..., parameters, p), float64.
        sq_norms: of each parameter's gradient, exactly: shape (..., parameters), float64.
    """

    projections: Tensor
    sq_norms: Tensor

    @property
    def flat(self) -> Tensor:
        """All parameters' projections one after another, shape (..., parameters p)."""
        return self.projections.flatten(-2)

    @classmethod
    def stack(cls, sketches: Sequence["Sketch"]) -> "Sketch":
        """Return several as one."""
        return cls(torch.stack([s.projections for s in sketches]), torch.stack([s.sq_norms for s in sketches]))


class Sketcher:
    """Draws gradients of some parameters; two sketches by the same one can be compared.

    Args:
        parameters: whose gradients.
        seed: of the directions.
    """

    def __init__(self, parameters: Sequence[Tensor], seed: int) -> None:
        self._count = max(_FEWEST_PER_PARAMETER, math.ceil(_FEWEST_IN_ALL / max(1, len(parameters))))
        self._parameters = parameters
        views = [real_view(parameter.detach()) for parameter in parameters]
        self._directions = Directions(views, seed, self._count)

    def differentiated(self, loss: StepLoss, batch: Any, watch: Watch | None = None) -> Sketch:
        """Return the sketch of a batch's gradient, in which each parameter's is let go of as soon as it is drawn.

        Args:
            loss: the step's loss.
            batch: the batch.
            watch: see :class:`.StepLoss`.

        Raises:
            MeasurementError: it is not finite, or see :func:`.differentiate`.
        """
        found: dict[int, tuple[Tensor, Tensor]] = {}

        def draw(index: int, gradient: Tensor) -> None:
            """Keep a gradient's numbers, not the gradient."""
            found[index] = self._drawn(index, gradient)

        with gradients_let_go(self._parameters, draw):
            gradients = differentiate(loss, batch, watch)
        for index, gradient in enumerate(gradients):  # those that no hook saw: zeros, or gradients at aliases
            if index not in found:
                draw(index, gradient)
        drawn = [found[index] for index in range(len(gradients))]
        sketch = Sketch(*(on_processor(numbers) for numbers in zip(*drawn, strict=True)))
        require_finite(sketch.sq_norms)
        return sketch

    def contributed(self, index: int, contributions: Contributions) -> Tensor:
        """Return the projections of each example's contribution to a parameter, shape (n, p), float64."""
        return contributions.sketches(self._directions.probe(index)).cpu() / math.sqrt(self._count)

    def _drawn(self, index: int, gradient: Tensor) -> tuple[Tensor, Tensor]:
        entries = real_view(dense(gradient))
        return self._directions.probe(index).of(entries) / math.sqrt(self._count), sum_of_squares([entries])


@contextmanager
def gradients_let_go(parameters: Sequence[Tensor], look: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Look at gradients that nobody else asks for, one at a time: together they take as much memory as the weights."""

    def taken(index: int) -> Callable[[Tensor], Tensor | None]:
        """Return a hook for one parameter."""

        def take(gradient: Tensor) -> Tensor | None:
            """Look at a gradient, and give zeros that take no memory in its place."""
            with own_work():
                look(index, gradient.detach())
                return None if gradient.is_sparse else gradient.new_zeros(()).expand_as(gradient)

        return take

    handles = [parameter.register_hook(taken(index)) for index, parameter in enumerate(parameters)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
