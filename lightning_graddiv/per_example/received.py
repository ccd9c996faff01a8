"""The gradients that one backward pass gave to parameters: their norms, their projections, and are they still there?"""

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lightning_graddiv.per_example.directions import Directions
from lightning_graddiv.per_example.norms import (
    block_norms,
    dense,
    flat,
    on_processor,
    sq_norm_of_each,
    sum_of_squares,
)

_NONE: Mapping[int, Any] = MappingProxyType({})


class _Copies:
    """The entries of gradients of one kind, one after another: to take each out would be a call for each.

    Args:
        gradients: dense, of one type and on one device, by the parameter's index.

    Attributes:
        lengths: of each.
    """

    def __init__(self, gradients: Mapping[int, Tensor]) -> None:
        self.lengths = {index: gradient.numel() for index, gradient in gradients.items()}
        self._entries = flat(gradients.values())

    def of_each(self) -> dict[int, Tensor]:
        """Return them one by one."""
        return dict(zip(self.lengths, self._entries.split(list(self.lengths.values())), strict=True))

    def are(self, found: Mapping[int, Tensor]) -> bool:
        """Tell whether gradients are what was copied."""
        now, kind = [found[index] for index in self.lengths], (self._entries.device, self._entries.dtype)
        are_alike = all((gradient.device, gradient.dtype) == kind for gradient in now)
        return are_alike and torch.equal(self._entries, flat(now))


class Received:
    """The gradients of one backward pass, by the parameter's index.

    Small ones are kept whole; of a large one remains what its projections need, since keeping it would double its
    memory, or what it is known to be.

    Args:
        parameters: all parameters.
        directions: of projections.
        keeps_norms: whether norms are asked for; else they are estimated from the images.
        keeps_local: whether to keep the norm of the gradient so far, before processes exchange theirs.

    Attributes:
        came_in_parts: whether a parameter received more than one, as from a re-entrant checkpoint.
        blocks: norms of the blocks of those that were looked at.
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
        self._copies: _Copies | None = None
        self._images: dict[int, Tensor] = {}
        self._known: dict[int, Tensor] = {}
        self._complex: dict[int, Tensor] = {}
        self._norms: dict[int, Tensor] = {}
        self._sq_norms: dict[int, float] = {}
        self.blocks: dict[int, Tensor] = {}
        self._marks: dict[int, tuple[int, int]] = {}
        self._local: dict[int, Tensor] = {}
        self._local_kept: dict[int, Tensor] = {}

    def __contains__(self, index: int) -> bool:
        is_copied = self._copies is not None and index in self._copies.lengths
        return is_copied or any(index in kind for kind in (self._kept, self._images, self._known, self._complex))

    def add(self, index: int, gradient: Tensor, *, keep: bool) -> None:
        """Enter a parameter's gradient, which is about to be added to what it has.

        Args:
            index: of the parameter.
            gradient: which it receives.
            keep: whether all its entries will be asked for.
        """
        whole, before = dense(gradient), self._parameters[index].grad
        so_far = whole if before is None or not self._keeps_local else whole + before.detach()
        self.came_in_parts |= index in self
        if keep and index not in self._images:
            # The tensor itself, not an alias: autograd adds in place to gradients that nobody else holds.
            self._kept[index] = whole if index not in self._kept else self._kept[index] + whole
            self._local_kept[index] = so_far
            return
        whole = self._kept.pop(index) + whole if index in self._kept else whole
        image = self._directions.image_of(index, whole)
        self._images[index] = image + self._images[index] if index in self._images else image
        if self._keeps_norms:
            sq_norm = sum_of_squares([whole])
            self._norms[index] = sq_norm + self._norms[index] if index in self._norms else sq_norm
            self._mark(index, gradient)
        if self._keeps_local:
            self._local[index] = sum_of_squares([so_far])

    def add_all(
        self,
        gradients: Mapping[int, Tensor],
        sq_norms: Mapping[int, float],
        keep: Collection[int],
        known: Mapping[int, Tensor] = _NONE,
    ) -> None:
        """Enter gradients that a pass gave, by index, once it is over: with few calls.

        Args:
            gradients: dense or sparse, real or complex; none that :meth:`add` was given.
            sq_norms: of the real ones.
            keep: of which parameters all entries will be asked for; what is kept is a copy.
            known: what some are, up to rounding: these need not be read for their projections.
        """
        self._sq_norms |= sq_norms
        kept = {index: dense(gradient) for index, gradient in gradients.items() if index in keep}
        if kept:
            self._copies = _Copies(kept)
        self._known |= known
        for index, gradient in gradients.items():
            if index not in sq_norms:
                self.add_complex(index, gradient)
            elif index in known:
                self._mark(index, gradient)
            elif index not in keep:
                self.take_image(index, gradient)

    def look_at(self, index: int, gradient: Tensor) -> None:
        """Read a large gradient, of which :meth:`add_all` will be told, while the processor still has it at hand."""
        whole = dense(gradient)
        self.blocks[index] = block_norms(whole)
        self._images[index] = self._directions.image_of(index, whole)
        self._mark(index, gradient)

    def take_image(self, index: int, gradient: Tensor) -> Tensor:
        """Return the image of a gradient of which :meth:`add_all` will be told; it is kept instead of the gradient."""
        image = self._images.get(index)
        if image is None:
            image = self._images[index] = self._directions.image_of(index, dense(gradient))
            self._mark(index, gradient)
        return image

    def look_again(self, index: int) -> None:
        """Forget a part of a gradient, as a re-entrant checkpoint gives it: :meth:`add_all` will look at the whole."""
        for looked_at in (self.blocks, self._images, self._marks):
            looked_at.pop(index, None)

    def _mark(self, index: int, gradient: Tensor) -> None:
        """Remember where a gradient is; a sparse one is not recognised."""
        if not gradient.is_sparse:
            self._marks[index] = _mark_of(gradient)

    def add_complex(self, index: int, gradient: Tensor) -> None:
        """Enter a complex gradient, which has a norm and no projections."""
        self._complex[index] = sum_of_squares([gradient])

    @property
    def indices(self) -> set[int]:
        """Of the parameters that received one."""
        copied = () if self._copies is None else self._copies.lengths
        return set().union(self._kept, copied, self._images, self._known, self._complex)

    @cached_property
    def _entries(self) -> dict[int, Tensor]:
        """Of all gradients that are kept or were copied; to be asked for when all have been entered."""
        return self._kept if self._copies is None else self._kept | self._copies.of_each()

    @cached_property
    def sq_norms(self) -> dict[int, float]:
        """Each gradient's squared norm; to be asked for when all have been entered."""
        if not self._complex and self._sq_norms.keys() == self.indices:  # all were read at once
            return self._sq_norms
        kept = self._entries if self._keeps_norms else self._entries | self._images  # whose norm is about a gradient's
        read = {index: entries for index, entries in kept.items() if index not in self._sq_norms}
        known = self._norms | self._complex
        norms = sq_norm_of_each(read.values()) + on_processor(list(known.values())).tolist()
        return dict(zip([*read, *known], norms, strict=True)) | self._sq_norms

    def local_sq_norms(self) -> dict[int, float]:
        """Return the squared norm of each gradient so far, with what the parameter had before."""
        norms = sq_norm_of_each(self._local_kept.values()) + on_processor(list(self._local.values())).tolist()
        return dict(zip([*self._local_kept, *self._local], norms, strict=True))

    def entries(self, index: int) -> Tensor | None:
        """Return a gradient that was kept."""
        return self._entries.get(index)

    def image(self, index: int) -> Tensor | None:
        """Return what a gradient takes the shared right side of its directions to; None if there is none."""
        kept = self._entries.get(index)
        return self._images.get(index) if kept is None else self._directions.image_of(index, kept)

    def projections(self) -> Tensor:
        """Return the projections of all gradients together, shape (p,), float64, on the processor."""
        return self._directions.projections_of_images(self._images) + self._directions.projections_of(
            self._entries | self._known
        )

    def is_still(self, gradients: Sequence[Tensor | None]) -> bool:
        """Tell whether the parameters' gradients are these, and nothing was done to them since.

        Small ones are compared entry by entry; of a large one, whether it is the same memory, never written to as far
        as autograd was told. Who goes behind its back changes what is applied, as clipping does, and not what was
        measured.
        """
        found = {index: gradient for index, gradient in enumerate(gradients) if gradient is not None}
        is_known = found.keys() == self.indices and self._marks.keys() == self._images.keys() | self._known.keys()
        if not is_known or self._complex or {gradient.layout for gradient in found.values()} - {torch.strided}:
            return False
        if self._marks != {index: _mark_of(found[index]) for index in self._marks}:
            return False
        if self._copies is not None and not self._copies.are(found):
            return False
        pairs = [(kept, found[index]) for index, kept in self._kept.items()]
        return all(was.device == now.device for was, now in pairs) and _are_equal(pairs)


def _mark_of(gradient: Tensor) -> tuple[int, int]:
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
