"""The gradients that one backward pass gave to parameters: their norms, their projections, and are they still there?"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from lightning_graddiv.per_example.directions import Directions, flat
from lightning_graddiv.per_example.factors import DIRECTIONS
from lightning_graddiv.per_example.norms import on_processor, sq_norm_of_each, sum_of_squares


class Received:
    """The gradients of one backward pass, by the parameter's index.

    Small ones are kept whole; of a large one its projections remain, since keeping it would double its memory.

    Args:
        parameters: all parameters.
        directions: of projections.
        keeps_norms: whether norms are asked for; else they are estimated from the projections.
        keeps_local: whether to keep the norm of the gradient so far, before processes exchange theirs.

    Attributes:
        came_in_parts: whether a parameter received more than one, as from a re-entrant checkpoint.
    """

    def __init__(
        self, parameters: Sequence[Tensor], directions: Directions, *, keeps_norms: bool, keeps_local: bool
    ) -> None:
        self._parameters = parameters
        self._directions = directions
        self._keeps_norms = keeps_norms
        self._keeps_local = keeps_local
        self.came_in_parts = False
        self._kept: dict[int, Tensor] = {}
        self._projected: dict[int, Tensor] = {}
        self._norms: dict[int, Tensor] = {}
        self._marks: dict[int, tuple[int, int]] = {}
        self._local: dict[int, Tensor] = {}
        self._local_kept: dict[int, Tensor] = {}

    def __contains__(self, index: int) -> bool:
        return index in self._projected or index in self._kept

    def add(self, index: int, gradient: Tensor, *, keep: bool) -> None:
        """Enter a parameter's gradient, which is about to be added to what it has.

        Args:
            index: of the parameter.
            gradient: which it receives.
            keep: whether all its entries will be asked for.
        """
        dense, before = gradient.to_dense() if gradient.is_sparse else gradient, self._parameters[index].grad
        so_far = dense if before is None or not self._keeps_local else dense + before.detach()
        self.came_in_parts |= index in self
        if keep and index not in self._projected:
            # The tensor itself, not an alias: autograd adds in place to gradients that nobody else holds.
            self._kept[index] = dense if index not in self._kept else self._kept[index] + dense
            self._local_kept[index] = so_far
            return
        dense = self._kept.pop(index) + dense if index in self._kept else dense
        projected = self._directions.probe(index).of(dense)
        sq_norm = sum_of_squares([dense]) if self._keeps_norms else projected.square().mean()  # which is about that
        if index in self._projected:
            projected, sq_norm = projected + self._projected[index], sq_norm + self._norms[index]
        self._projected[index], self._norms[index] = projected, sq_norm
        if self._keeps_norms:
            self._marks[index] = _mark(gradient)
        if self._keeps_local:
            self._local[index] = sum_of_squares([so_far])

    def add_complex(self, index: int, gradient: Tensor) -> None:
        """Enter a complex gradient, which has a norm and no projections."""
        self._projected[index] = torch.zeros(DIRECTIONS, dtype=torch.float64, device=gradient.device)
        self._norms[index] = sum_of_squares([gradient])

    @property
    def indices(self) -> list[int]:
        """Of the parameters that received one."""
        return [*self._kept, *self._projected]

    @cached_property
    def sq_norms(self) -> dict[int, float]:
        """Each gradient's squared norm; to be asked for when all have been entered."""
        norms = sq_norm_of_each(self._kept.values()).tolist() + on_processor(list(self._norms.values())).tolist()
        return dict(zip(self.indices, norms, strict=True))

    def local_sq_norms(self) -> dict[int, float]:
        """Return the squared norm of each gradient so far, with what the parameter had before."""
        norms = sq_norm_of_each(self._local_kept.values()).tolist() + on_processor(list(self._local.values())).tolist()
        return dict(zip([*self._local_kept, *self._local], norms, strict=True))

    def entries(self, index: int) -> Tensor | None:
        """Return a gradient that was kept."""
        return self._kept.get(index)

    def of(self, index: int) -> Tensor | None:
        """Return the projections of one gradient, shape (p,), float64; None where there is none."""
        if index in self._kept:
            return self._directions.probe(index).of(self._kept[index])
        return self._projected.get(index)

    def projections(self) -> Tensor:
        """Return the projections of all gradients together, shape (p,), float64, on the processor."""
        of_large = list(self._projected.values())
        total = on_processor(of_large).sum(0) if of_large else torch.zeros(DIRECTIONS, dtype=torch.float64)
        return total + self._directions.of(self._kept)

    def is_still(self, gradients: Sequence[Tensor | None]) -> bool:
        """Tell whether the parameters' gradients are these, and nothing was done to them since.

        Small ones are compared entry by entry; of a large one, whether it is the same memory, never written to as far
        as autograd was told. Who goes behind its back changes what is applied, as clipping does, and not what was
        measured.
        """
        found = {index: gradient for index, gradient in enumerate(gradients) if gradient is not None}
        is_known = found.keys() == set(self.indices) and self._marks.keys() == self._projected.keys()
        if not is_known or any(gradient.is_sparse for gradient in found.values()):
            return False
        if any(_mark(found[index]) != mark for index, mark in self._marks.items()):
            return False
        pairs = [(kept, found[index]) for index, kept in self._kept.items()]
        return all(was.device == now.device for was, now in pairs) and _are_equal(pairs)


def _mark(gradient: Tensor) -> tuple[int, int]:
    """By what a gradient that was not kept is recognised: where it is, and how often it was written to."""
    return gradient.data_ptr(), gradient._version


def _are_equal(pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Compare all at once where they lie on one device."""
    if not pairs:
        return True
    before, after = zip(*pairs, strict=True)
    if len({(t.device, t.dtype) for t in before + after}) == 1:
        return torch.equal(flat(before), flat(after))
    return all(torch.equal(was, is_now) for was, is_now in pairs)
