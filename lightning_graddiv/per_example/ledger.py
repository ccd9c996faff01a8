"""Both sides of a backward pass: what the examples contribute to each parameter, and the gradient that it receives."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_graddiv.errors import MeasurementError
from lightning_graddiv.per_example.directions import Directions, flat
from lightning_graddiv.per_example.factors import DIRECTIONS, Contributions, Explicit
from lightning_graddiv.per_example.norms import sq_norm_of_each, sum_of_squares
from lightning_graddiv.per_example.records import Recorded

_ROUNDING = {16: (5e-2, 1e-5), 32: (2e-4, 1e-6), 64: (1e-8, 1e-12)}
"""By the bits of the numbers: how far a gradient may be from what its examples add up to, as a share of their norm, and
of the norm of all parameters."""

_FEW_NUMBERS = 2**14
"""Contributions to a vector of no more numbers wait for the others; more would hold memory for nothing."""


class Ledger:
    """Enters contributions and gradients as a backward pass gives them, and balances them in the end.

    A parameter with more than one dimension is compared in random directions; biases and scales, which are many and
    small, entry by entry and all at once.

    Args:
        parameters: all parameters.
        directions: to compare in.
        measured: the parameters that must balance, by index.
        keeps_local: whether to keep the norm of the gradient so far, before processes exchange theirs.
        keeps_norms: whether to keep the norm of the gradient of each pass.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        directions: Directions,
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
        self.clear()

    def clear(self, examples: int = 0) -> None:
        """Begin a pass of so many examples."""
        self.misses: dict[int, str] = {}
        self._examples = examples
        self._sq_norms: dict[int, Tensor] = {}
        self._waiting: dict[int, Tensor] = {}
        self._found: dict[int, Tensor] = {}
        self._gradients: dict[int, tuple[Tensor, Tensor]] = {}
        self._vectors: dict[int, Tensor] = {}
        self._local: dict[int, Tensor] = {}
        self._local_vectors: dict[int, Tensor] = {}
        self._came_in_parts = False
        self._digits = 64

    def note_precision(self, digits: int) -> None:
        """Balance no closer than numbers of so many bits allow."""
        self._digits = min(self._digits, digits)

    def contribute(self, index: int, contributions: Contributions) -> None:
        """Enter what the examples contribute to a parameter."""
        if index in self._found or index in self._waiting:
            self.misses[index] = "it was used more often than before"
        elif index not in self._directions.vectors:
            self._sq_norms[index], self._found[index] = contributions.measure(self._directions.probe(index))
        elif isinstance(contributions, Explicit) and contributions.values.numel() <= _FEW_NUMBERS:
            self._waiting[index] = contributions.values
        else:
            values = contributions.explicit()
            self._sq_norms[index], self._found[index] = sum_of_squares([values], per_row=True), values.sum(0)

    def receive(self, index: int, gradient: Tensor) -> None:
        """Enter a parameter's gradient, which is about to be added to what it has."""
        if gradient.is_complex():
            self.misses[index] = "it is complex"
            self._gradients[index] = torch.zeros(DIRECTIONS, dtype=torch.float64), sum_of_squares([gradient])
            return
        dense, before = gradient.to_dense() if gradient.is_sparse else gradient, self._parameters[index].grad
        so_far = dense if before is None or not self._keeps_local else dense + before.detach()
        # A re-entrant checkpoint runs a backward pass of its own, and then there is a second part.
        self._came_in_parts |= index in self._gradients or index in self._vectors
        if index in self._directions.vectors:
            # The tensor itself, not an alias: autograd adds in place to gradients that nobody else holds.
            self._vectors[index] = dense if index not in self._vectors else self._vectors[index] + dense
            self._local_vectors[index] = so_far
            return
        projected = self._directions.probe(index).of(dense)
        sq_norm = sum_of_squares([dense]) if self._keeps_norms else projected.square().mean()  # which is about that
        if index in self._gradients:
            projected, sq_norm = projected + self._gradients[index][0], sq_norm + self._gradients[index][1]
        self._gradients[index] = projected, sq_norm
        if self._keeps_local:
            self._local[index] = sum_of_squares([so_far])

    def balance(self) -> Recorded:
        """Compare, parameter by parameter, what the examples add up to with the gradient; return what was entered.

        Raises:
            MeasurementError: something is not finite.
        """
        self._enter_waiting()
        vector_norms = sq_norm_of_each(self._vectors.values())
        sq_norms = dict(zip(self._vectors, vector_norms, strict=True)) | {i: s for i, (_, s) in self._gradients.items()}
        self._compare(sq_norms)
        projections = sum((projected.cpu() for projected, _ in self._gradients.values()), _ZEROS)
        gradient_sq_norm = None
        if self._keeps_norms and not self._came_in_parts:
            gradient_sq_norm = _total(sq_norms.values())
        local = None
        if self._keeps_local:
            norms = sq_norm_of_each(self._local_vectors.values()).tolist()
            local = {i: float(norm) for i, norm in self._local.items()} | dict(
                zip(self._local_vectors, norms, strict=True)
            )
        recorded = Recorded(
            self._examples,
            self._sq_norms,
            self.misses,
            projections + self._directions.of_vectors(self._vectors),
            gradient_sq_norm,
            local,
        )
        self.clear()
        return recorded

    def _enter_waiting(self) -> None:
        """Take the norms of all that waits, at once and in float64."""
        if not self._waiting:
            return
        values = torch.cat(list(self._waiting.values()), 1).double()
        sums = values.sum(0)
        for index, of_one, squares in zip(
            self._waiting,
            sums.split([v.shape[1] for v in self._waiting.values()]),
            values.square_().split([v.shape[1] for v in self._waiting.values()], 1),
            strict=True,
        ):
            self._sq_norms[index], self._found[index] = squares.sum(1), of_one

    def _compare(self, received: dict[int, Tensor]) -> None:
        indices = sorted((self._found.keys() | received.keys()) & self._measured)
        if not indices:
            return
        zero = torch.zeros((), dtype=torch.float64)
        own = torch.stack([self._sq_norms[i].sum().cpu() if i in self._sq_norms else zero for i in indices])
        scales = own + torch.stack([received.get(i, zero).cpu() for i in indices])
        if not bool(torch.isfinite(scales).all()):
            raise MeasurementError("The step's gradients are not finite.")
        errors = self._errors(indices)
        # Rounding errors of a gradient that cancels within each example are those of what cancels.
        relative, of_all = _ROUNDING[self._digits]
        allowed = relative * scales.sqrt() + of_all * scales.sum().sqrt()
        for index, is_close in zip(indices, (errors <= allowed).tolist(), strict=True):
            if not is_close:
                reason = "it is used outside of its layer" if index in self._found else "no layer with a rule uses it"
                self.misses.setdefault(index, reason)

    def _errors(self, indices: Sequence[int]) -> Tensor:
        """Return how far the sums of contributions are from the gradients, shape (len(indices),), float64."""
        vectors = [index for index in indices if index in self._directions.vectors]
        found, wanted = [self._sides(index)[0] for index in vectors], [self._sides(index)[1] for index in vectors]
        errors = {}
        if vectors:
            difference = flat(found).double() - flat(wanted).double()
            sizes = [len(side) for side in wanted]
            errors = dict(zip(vectors, sq_norm_of_each(difference.split(sizes)).sqrt(), strict=True))
        others = [index for index in indices if index not in errors]
        if others:
            found, wanted = ([side.cpu() for side in sides] for sides in zip(*map(self._sides, others), strict=True))
            worst = (torch.stack(found) - torch.stack(wanted)).abs().amax(1)
            errors |= dict(zip(others, worst, strict=True))
        return torch.stack([errors[index] for index in indices])

    def _sides(self, index: int) -> tuple[Tensor, Tensor]:
        """Return what was found and what is wanted, in the form in which a parameter is compared."""
        if index in self._directions.vectors:
            parameter = self._parameters[index]
            nothing = torch.zeros(parameter.numel(), dtype=torch.float64, device=parameter.device)
            return self._found.get(index, nothing), self._vectors.get(index, nothing)
        return self._found.get(index, _ZEROS), self._gradients.get(index, (_ZEROS, _ZEROS))[0]


_ZEROS = torch.zeros(DIRECTIONS, dtype=torch.float64)


def _total(numbers: Iterable[Tensor]) -> float:
    return float(sum(number.cpu() for number in numbers))
