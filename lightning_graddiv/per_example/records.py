"""What is recorded of a training step: the calls of its layers, and what a backward pass showed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from lightning_graddiv.errors import MeasurementError
from lightning_graddiv.per_example.factors import Contributions
from lightning_graddiv.per_example.layers import Arrangement, LayerType, Layout
from lightning_graddiv.per_example.norms import WIDE, sq_norms_of_rows_by_width, wide
from lightning_graddiv.per_example.received import Received


@dataclass(eq=False)
class Use:
    """One call of a layer: what went in, and the gradient of what came out.

    Attributes:
        layer: the layer.
        kind: what is known of its type.
        parameters: which of its parameters are measured, name to index.
        ordinals: the how-manieth use of the parameter this is, name to count.
        inputs: of the call: those that the rule needs.
        output: the first of what came out, if the rule needs it.
        writes: how often the inputs had been written to, together, and how often the output.
        output_gradients: of all that came out; none until the backward pass comes by.
        gradient_writes: how often these had been written to, together.
        is_reached: whether it has come by.
    """

    layer: nn.Module
    kind: LayerType
    parameters: dict[str, int]
    ordinals: dict[str, int]
    inputs: tuple[Tensor | None, ...]
    output: Tensor | None
    writes: tuple[int, int] = field(init=False)
    output_gradients: tuple[Tensor | None, ...] = ()
    gradient_writes: int = 0
    is_reached: bool = False
    _found: tuple[Layout, dict[str, Contributions]] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        # Without the graph, which may be dropped with the output; else as autograd holds them.
        self.inputs = tuple([v.detach() if v is not None and v.requires_grad else v for v in self.inputs])
        self.output = None if self.output is None else self.output.detach()
        self.writes = _writes(self.inputs), _writes((self.output,))

    def receive(self, gradients: Sequence[Tensor | None]) -> None:
        """Take the gradients of what came out, as the backward pass comes by."""
        self.is_reached = True
        # As they are, where they need no gradient: autograd adds in place to what nobody else holds.
        self.output_gradients = tuple([g.detach() if g is not None and g.requires_grad else g for g in gradients])
        self.gradient_writes = _writes(self.output_gradients)

    def release(self) -> None:
        """Let go of the tensors, which nobody else may hold any more."""
        self.inputs, self.output, self.output_gradients, self._found = (), None, (), None

    def held_bytes(self) -> float:
        """Return how much memory cannot be freed: of a view, all that it is a view of."""
        held = 0.0
        for value in (*self.inputs, self.output, *self.output_gradients):
            if value is not None:
                held += value.untyped_storage().nbytes() if value.layout is torch.strided else math.inf
        return held

    @property
    def leading(self) -> tuple[int, ...]:
        """The shape of the input's dimensions that the parameters do not see."""
        values = self.inputs[0]
        return () if values is None else tuple(values.shape[: self.kind.leading(self.layer, values)])

    @property
    def gradient_dtype(self) -> torch.dtype | None:
        """Of the gradients; None where there are none."""
        for gradient in self.output_gradients:
            if gradient is not None:
                return gradient.dtype
        return None

    @property
    def is_measurable(self) -> bool:
        """Whether the backward pass has come by, and what it showed is still there."""
        return self.gradient_dtype is not None

    def contributions(self, layout: Layout, examples: int) -> dict[str, Contributions]:
        """Return what each example contributes to each parameter, in at least float32; formed once for all of them.

        Raises:
            MeasurementError: the input was changed after the call.
        """
        if self._found is None or self._found[0] is not layout:
            self._found = layout, self._form(Arrangement(layout, examples))
        return self._found[1]

    def _form(self, arrangement: Arrangement) -> dict[str, Contributions]:
        if _writes(self.inputs) != self.writes[0]:
            raise MeasurementError(f"the input of a `{type(self.layer).__name__}` was changed in place after its use")
        if _writes(self.output_gradients) != self.gradient_writes:
            raise MeasurementError(
                f"the gradient of the output of a `{type(self.layer).__name__}` was changed in place after its use"
            )
        dtype = self.gradient_dtype
        if dtype is None:
            raise MeasurementError("the backward pass did not reach the layer")
        inputs = [_as_autocast_has_it(value, dtype) for value in self.inputs]
        gradients = [None if gradient is None else wide(gradient) for gradient in self.output_gradients]
        if self.kind.inputs is None:
            return self.kind.contributions(self.layer, inputs[0], gradients[0], arrangement)
        if self.kind.keeps_output:
            is_unchanged = _writes((self.output,)) == self.writes[1]
            inputs.append(_as_autocast_has_it(self.output, dtype) if is_unchanged else None)
        return self.kind.contributions(self.layer, tuple(inputs), tuple(gradients), arrangement)


@dataclass
class Recorded:
    """What one backward pass showed, by the parameter's index.

    Attributes:
        examples: n.
        totals: squared norms of the contributions, added up over the examples.
        known: those of single examples, shape (n,), float64, as far as they are taken.
        parts: contributions, or norms of their blocks, whose squares add up to the others, shape (n, parts).
        misses: why a parameter is not accounted for.
        received: the gradients of this pass.
        gradient_sq_norm: of this pass, over all parameters; None where one of them came in parts, or not asked for.
        local_sq_norms: ``|gradient so far|^2``, this pass included, of the parameters that it reached; None where not
            asked for.
    """

    examples: int
    totals: dict[int, float]
    known: dict[int, Tensor]
    parts: dict[int, Tensor]
    misses: dict[int, str]
    received: Received
    gradient_sq_norm: float | None
    local_sq_norms: dict[int, float] | None

    @cached_property
    def sq_norms(self) -> dict[int, Tensor]:
        """Squared norms of the contributions, shape (n,), float64."""
        found = self.known | dict(zip(self.parts, sq_norms_of_rows_by_width(list(self.parts.values())), strict=True))
        self.parts = {}  # they may be views of what is much larger
        return found

    def total(self, parameters: Sequence[int]) -> Tensor:
        """Return the squared norms over these parameters, shape (n,)."""
        found = [self.sq_norms[index] for index in parameters if index in self.sq_norms]
        return torch.stack(found).sum(0) if found else torch.zeros(self.examples, dtype=torch.float64, device="cpu")


def _writes(values: Sequence[Tensor | None]) -> int:
    count = 0
    for value in values:
        if value is not None:
            count += value._version
    return count


def _as_autocast_has_it(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if value is None or (value.dtype == dtype and dtype in WIDE) or not value.is_floating_point():
        return value
    return wide(value if value.dtype == dtype else value.to(dtype))
