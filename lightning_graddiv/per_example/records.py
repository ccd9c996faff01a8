"""What is recorded of a training step: the calls of its layers, and what a backward pass showed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_graddiv.errors import MeasurementError
from lightning_graddiv.per_example.factors import Contributions
from lightning_graddiv.per_example.layers import Arrangement, LayerType, Layout
from lightning_graddiv.per_example.received import Received


@dataclass
class Use:
    """One call of a layer: what went in, and the gradient of what came out.

    Attributes:
        layer: the layer.
        kind: what is known of its type.
        parameters: which of its parameters are measured, name to index.
        ordinals: the how-manieth use of the parameter this is, name to count.
        inputs: of the call.
        output_gradient: None until the backward pass comes by.
        is_reached: whether it has come by.
    """

    layer: nn.Module
    kind: LayerType
    parameters: dict[str, int]
    ordinals: dict[str, int]
    inputs: Tensor
    version: int
    output_gradient: Tensor | None = None
    is_reached: bool = False

    def release(self) -> None:
        """Let go of the tensors, which the backward pass is about to free."""
        self.inputs, self.output_gradient = self.inputs.new_empty(0), None

    @property
    def leading(self) -> tuple[int, ...]:
        """The shape of the input's dimensions that the parameters do not see."""
        return tuple(self.inputs.shape[: self.kind.leading(self.layer, self.inputs)])

    def contributions(self, layout: Layout, examples: int) -> dict[str, Contributions]:
        """Return what each example contributes to each parameter, in at least float32.

        Raises:
            MeasurementError: the input was changed after the call.
        """
        if self.inputs._version != self.version:
            raise MeasurementError(f"the input of a `{type(self.layer).__name__}` was changed in place after its use")
        gradient = self.output_gradient
        if gradient is None:
            raise MeasurementError("the backward pass did not reach the layer")
        inputs = self.inputs
        if inputs.is_floating_point():  # as autocast has it
            inputs = _wide(inputs.to(gradient.dtype))
        return self.kind.contributions(self.layer, inputs, _wide(gradient), Arrangement(layout, examples))


@dataclass
class Recorded:
    """What one backward pass showed, by the parameter's index.

    Attributes:
        examples: n.
        sq_norms: squared norms of the contributions, shape (n,), float64.
        misses: why a parameter is not accounted for.
        received: the gradients of this pass.
        gradient_sq_norm: of this pass, over all parameters; None where one of them came in parts, or not asked for.
        local_sq_norms: ``|gradient so far|^2``, this pass included, of the parameters that it reached; None where not
            asked for.
    """

    examples: int
    sq_norms: dict[int, Tensor]
    misses: dict[int, str]
    received: Received
    gradient_sq_norm: float | None
    local_sq_norms: dict[int, float] | None

    def total(self, parameters: Sequence[int]) -> Tensor:
        """Return the squared norms over these parameters, shape (n,)."""
        found = [self.sq_norms[index] for index in parameters if index in self.sq_norms]
        return torch.stack(found).sum(0) if found else torch.zeros(self.examples, dtype=torch.float64)


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
