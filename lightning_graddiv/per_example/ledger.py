"""Both sides of a backward pass: what the examples contribute to each parameter, and the gradient that it receives."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_graddiv.errors import MeasurementError
from lightning_graddiv.per_example.devices import is_accelerator
from lightning_graddiv.per_example.directions import Directions
from lightning_graddiv.per_example.factors import Contributions, Explicit
from lightning_graddiv.per_example.norms import dense, differences_of, distances, on_processor, sq_norm_of_each, stored
from lightning_graddiv.per_example.received import Received
from lightning_graddiv.per_example.records import Recorded

_ROUNDING = {16: (5e-2, 1e-5), 32: (2e-4, 1e-6), 64: (1e-8, 1e-12)}
"""By the bits of the numbers: how far a gradient may be from what its examples add up to, as a share of their norm, and
of the norm of all parameters."""

_SMALLEST_SAFE_NORM = 1e-22
"""What float32 rounds to zero of the squares in a billion blocks is less than a millionth of it."""

_SAME = 2e-3
"""How far a sum may be from the gradient that it stands in for, as a share of it: by what 16 bits round."""

_FEW_NUMBERS = 2**14
"""Contributions to a vector of no more numbers wait for the others; more would hold memory for nothing."""

_ACCELERATOR_FEW_NUMBERS = 2**20


class Ledger:
    """Enters contributions and gradients as a backward pass gives them, and balances them in the end.

    Small parameters, which are many, are compared entry by entry, where the sum of the contributions costs nothing; so
    are large ones on an accelerator, where all come at the end. Of the others is compared what they take a random
    vector r to: ``|D r|^2`` is ``|D|^2`` on average, for the difference D of two matrices (Freivalds' check).

    Args:
        parameters: all parameters.
        directions: to compare in.
        examples: of the pass.
        measured: the parameters that must balance, by index.
        keeps_local: whether to keep the norm of the gradient so far, before processes exchange theirs.
        keeps_norms: whether to keep the norm of the gradient of each pass.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        directions: Directions,
        examples: int,
        *,
        measured: frozenset[int],
        keeps_local: bool,
        keeps_norms: bool,
    ) -> None:
        self._parameters = parameters
        self._directions = directions
        self._measured = measured
        self._keeps_local = keeps_local
        self._keeps_norms = keeps_norms
        self.misses: dict[int, str] = {}
        self._examples = examples
        self._sq_norms: dict[int, Tensor] = {}
        self._waiting: dict[int, Tensor] = {}
        self._block_norms: dict[int, Tensor] = {}
        self._gives_all_at_end = False
        self._looked_at: set[int] = set()
        self._distances: dict[int, float] = {}
        self._totals: dict[int, float] = {}
        self._sums: dict[int, Tensor] = {}
        self._images: dict[int, Tensor] = {}
        self._received = Received(parameters, directions, keeps_norms=keeps_norms, keeps_local=keeps_local)
        self._digits = 64

    def expect_all_at_end(self) -> None:
        """Expect the gradients of this pass by :meth:`receive_all`, except for those of parameters that have hooks."""
        self._gives_all_at_end = True

    def note_precision(self, digits: int) -> None:
        """Balance no closer than numbers of so many bits allow."""
        self._digits = min(self._digits, digits)

    def contribute(self, index: int, contributions: Contributions) -> None:
        """Enter what the examples contribute to a parameter."""
        if index in self._sq_norms or index in self._waiting or index in self._block_norms:
            self.misses[index] = "it was used more often than before"
            return
        on_accelerator, are_formed = is_accelerator(self._parameters[index].device), contributions.are_formed
        is_vector = index in self._directions.vectors
        # Whether the sum is there for nothing, and so will the gradient be, is known before it comes by.
        if index in self._directions.small:
            by_entries = is_vector or are_formed
        else:
            by_entries = on_accelerator and are_formed and self._may_keep_sum(index, contributions)
        if is_vector and by_entries and _is_few(contributions, on_accelerator=on_accelerator):
            self._waiting[index] = contributions.explicit()
        elif not by_entries and not are_formed:
            self._sq_norms[index], self._images[index] = contributions.measure(self._directions.right(index))
        else:
            if on_accelerator:
                self._block_norms[index], total = contributions.block_norms_and_sum()
            else:
                self._sq_norms[index], total = contributions.norms_and_sum()
            if by_entries:
                self._sums[index] = total
            else:
                self._images[index] = self._directions.image_of(index, total)

    def _may_keep_sum(self, index: int, contributions: Contributions) -> bool:
        """Tell whether the sum of large contributions may be kept until the gradients are read, for few calls.

        It has no more numbers than the layer's input, which is usually freed next.
        """
        is_small = math.prod(contributions.shape) <= contributions.by_example.numel()
        return is_small and self._gives_all_at_end and index not in self._received

    def receive(self, index: int, gradient: Tensor) -> None:
        """Enter a parameter's gradient, which is about to be added to what it has."""
        if gradient.is_complex():
            self.misses[index] = "it is complex"
            self._received.add_complex(index, gradient)
        else:
            keep = index in self._directions.vectors or index in self._sums
            self._received.add(index, gradient, keep=keep)

    def look_at(self, index: int, gradient: Tensor) -> None:
        """Read a large gradient on its way to its parameter; it is entered when all are."""
        if index in self._looked_at:  # and the first was a part
            self._received.look_again(index)
        elif not gradient.is_complex():
            self._looked_at.add(index)
            self._received.look_at(index, gradient)

    def receive_all(self, gradients: Mapping[int, Tensor]) -> None:
        """Enter all gradients that a pass gave, once it is over; those that :meth:`receive` was given are known."""
        entered = self._received.indices - self._looked_at
        others = {index: gradient for index, gradient in gradients.items() if index not in entered}
        for index in self._looked_at - gradients.keys():  # it was on its way to somebody else
            self._received.look_again(index)
        self._enter_sums()
        sq_norms = self._read_at_once(others)
        self.misses |= dict.fromkeys(others.keys() - sq_norms.keys(), "it is complex")
        large = self._sums.keys() - self._directions.small
        known = {i: self._sums[i] for i in large if self._is_gradient(i, sq_norms.get(i))}
        keep = self._directions.vectors | (self._sums.keys() - large)
        self._received.add_all(others, sq_norms, keep, known)

    def _is_gradient(self, index: int, sq_norm: float | None) -> bool:
        """Tell whether a sum of contributions can stand in for the gradient, in a comparison with what is applied."""
        return sq_norm is not None and self._distances[index] <= _SAME * math.sqrt(sq_norm)

    def _read_at_once(self, gradients: Mapping[int, Tensor]) -> dict[int, float]:
        """Return the gradients' squared norms; with the same call enter all other norms that can be taken by now."""
        real = {index: stored(gradient) for index, gradient in gradients.items() if not gradient.is_complex()}
        images = {i: self._received.take_image(i, gradients[i]) for i in self._images if i in real}
        compared = {i: own for i, own in (self._sums | self._images).items() if i in real}
        observed = [images[i] if i in images else dense(gradients[i]) for i in compared]
        differences, parts = differences_of(compared.values(), observed), self._parts
        blocks = self._received.blocks
        known = {len(compared) + place: blocks[index] for place, index in enumerate(real) if index in blocks}
        norms = sq_norm_of_each([*differences, *real.values(), *parts.values()], known)
        self._distances = dict(zip(compared, map(math.sqrt, norms[: len(compared)]), strict=True))
        self._totals = dict(zip(parts, norms[len(norms) - len(parts) :], strict=True))
        return dict(zip(real, norms[len(compared) : len(norms) - len(parts)], strict=True))

    @property
    def _parts(self) -> dict[int, Tensor]:
        """Contributions, or norms of their blocks, whose squares are still to be added up: shape (n, parts)."""
        return self._waiting | self._block_norms

    def balance(self) -> Recorded:
        """Compare, parameter by parameter, what the examples add up to with the gradient; return what was entered.

        Raises:
            MeasurementError: something is not finite.
        """
        self._enter_sums()
        parts = {index: values for index, values in self._parts.items() if index not in self._totals}
        if parts:
            self._totals |= dict(zip(parts, sq_norm_of_each(parts.values()), strict=True))
        if self._sq_norms:
            norms = on_processor(list(self._sq_norms.values())).sum(1)
            self._totals |= dict(zip(self._sq_norms, norms.tolist(), strict=True))
        sq_norms = self._received.sq_norms
        self._compare(sq_norms)
        return Recorded(
            self._examples,
            self._totals,
            self._sq_norms,
            self._parts,
            self.misses,
            self._received,
            sum(sq_norms.values()) if self._keeps_norms and not self._received.came_in_parts else None,
            self._received.local_sq_norms() if self._keeps_local else None,
        )

    def _enter_sums(self) -> None:
        """Add up what waits, all at once."""
        waiting = {index: values for index, values in self._waiting.items() if index not in self._sums}
        if waiting:
            sums = torch.cat(list(waiting.values()), 1).sum(0)
            lengths = [values.shape[1] for values in waiting.values()]
            self._sums |= dict(zip(waiting, sums.split(lengths), strict=True))

    def _compare(self, received: dict[int, float]) -> None:
        own = self._totals
        indices = sorted((own.keys() | received.keys()) & self._measured)
        if not indices:
            return
        # Rounding errors of a gradient that cancels within each example are those of what cancels.
        scales = {index: own.get(index, 0.0) + received.get(index, 0.0) for index in indices}
        total = sum(scales.values())
        left_range = not math.isfinite(total) and math.isfinite(sum(received.values()))
        is_float32 = any(norms.dtype == torch.float32 for norms in self._block_norms.values())
        if is_float32 and (left_range or 0 < total < _SMALLEST_SAFE_NORM):
            raise MeasurementError(
                f"On an accelerator squares of gradients are added up in float32, whose range these leave: they are "
                f"{total:.1e} in all. Scale the loss."
            )
        if not math.isfinite(total):
            raise MeasurementError("The step's gradients are not finite.")
        relative, of_all = _ROUNDING[self._digits]
        least = of_all * math.sqrt(total)
        errors = self._errors([index for index in indices if index in own])
        for index in indices:
            error = errors[index] if index in own else math.sqrt(received[index])
            if not error <= relative * math.sqrt(scales[index]) + least:
                reason = "it is used outside of its layer" if index in own else "no layer with a rule uses it"
                self.misses.setdefault(index, reason)

    def _errors(self, indices: Sequence[int]) -> dict[int, float]:
        """Return how far the sums of contributions are from the gradients."""
        pairs = {index: self._pair(index) for index in indices if index not in self._distances}
        if not pairs:
            return self._distances
        own, received = zip(*pairs.values(), strict=True)
        return self._distances | dict(zip(pairs, distances(own, received), strict=True))

    def _pair(self, index: int) -> tuple[Tensor, Tensor]:
        """Return what the examples contribute and what was received; or what both take the random vector to."""
        own, received = self._sums.get(index), self._received.entries(index)
        if own is None:
            own, received = self._images[index], self._received.image(index)
        elif received is None:
            own, received = self._directions.image_of(index, own), self._received.image(index)
        return own, torch.zeros_like(own) if received is None else received


def _is_few(contributions: Contributions, *, on_accelerator: bool) -> bool:
    """Tell whether contributions are so few that a call of their own would take longer than the work."""
    if not isinstance(contributions, Explicit):
        return False
    if on_accelerator:
        return contributions.values.numel() <= _ACCELERATOR_FEW_NUMBERS
    return contributions.output_gradients is None and contributions.values.numel() <= _FEW_NUMBERS
