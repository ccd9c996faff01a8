"""Contributions to the weight of a convolution, by the cheapest exact way for its size."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_graddiv.per_example.factors import Contributions, Outer, Probe

_GROUPED_UP_TO = 40_000
"""Entries of a weight up to which one grouped convolution is faster than a convolution for each example."""


@dataclass(frozen=True)
class Convolved(Contributions):
    """Contributions to a convolution's weight.

    Attributes:
        inputs: shape (n, k, channels, ...): k rows for each example.
        output_gradients: shape (n, k, channels, ...).
        shape: of the weight.
        stride: for each dimension of space, as the other options.
        padding: with zeros.
        dilation: between entries of the kernel.
        groups: of channels that do not see each other.
    """

    inputs: Tensor
    output_gradients: Tensor
    shape: torch.Size
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @override
    def __len__(self) -> int:
        return len(self.inputs)

    @override
    def at(self, examples: slice) -> "Convolved":
        return replace(self, inputs=self.inputs[examples], output_gradients=self.output_gradients[examples])

    @override
    def explicit(self) -> Tensor:
        """Differentiate each row with the library's own kernel."""
        inputs, output_gradients = self.inputs.flatten(0, 1), self.output_gradients.flatten(0, 1)
        rows = len(inputs)
        if math.prod(self.shape) > _GROUPED_UP_TO:
            each = [self._weight_gradient(inputs[i : i + 1], output_gradients[i : i + 1], 1) for i in range(rows)]
            by_row = torch.stack(each)
        else:  # every row becomes a group of channels
            inputs, output_gradients = inputs.flatten(0, 1)[None], output_gradients.flatten(0, 1)[None]
            by_row = self._weight_gradient(inputs, output_gradients, rows).unflatten(0, (rows, -1))
        if rows == len(self):
            return by_row
        return by_row.reshape(*self.inputs.shape[:2], *self.shape).sum(1)

    @override
    def measure(self, probe: Probe) -> tuple[Tensor, Tensor]:
        """Choose between the gradients themselves and products between positions.

        With L positions and a weight that joins ``in`` numbers to ``out``, these cost ``L^2 (in + out)`` and those
        ``L in out``: late layers take the first way, early ones the second.
        """
        positions = self.inputs.shape[1] * math.prod(self.output_gradients.shape[3:])
        fan_in, fan_out = math.prod(self.shape[1:]), self.shape[0] // self.groups
        if positions * (fan_in + fan_out) < fan_in * fan_out:
            return self._outer().measure(probe)
        return super().measure(probe)

    def _outer(self) -> Outer:
        """Lay out the input under each position of the output."""
        patches, space = self.inputs, len(self.stride)
        if any(self.padding):
            patches = F.pad(patches, [width for p in reversed(self.padding) for width in (p, p)])
        for dim, size in enumerate(self.shape[2:]):
            reach = self.dilation[dim] * (size - 1) + 1
            patches = patches.unfold(3 + dim, reach, self.stride[dim])[..., :: self.dilation[dim]]
        # (n, k, channels, *positions, *kernel) -> (n, groups, k, *positions, channels of a group, *kernel)
        patches = patches.unflatten(2, (self.groups, -1)).movedim(2, 1).movedim(3, 3 + space)
        b = self.output_gradients.unflatten(2, (self.groups, -1)).movedim(2, 1).movedim(3, 3 + space)
        return Outer(patches.flatten(3 + space).flatten(2, 2 + space), b.flatten(2, 2 + space), self.shape)

    def _weight_gradient(self, inputs: Tensor, output_gradients: Tensor, rows: int) -> Tensor:
        shape = (rows * self.shape[0], *self.shape[1:])
        _, gradient, _ = torch.ops.aten.convolution_backward(
            output_gradients,
            inputs,
            inputs.new_empty(shape),  # only its shape is looked at, but an expanded one takes another, slower way
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0] * len(self.padding),
            rows * self.groups,
            [False, True, False],
        )
        found: Tensor = gradient
        return found


def convolution_weight(
    layer: Any, inputs: Tensor, output_gradients: Tensor, arrange: Callable[[Tensor, int], Tensor]
) -> Convolved:
    """Return the contributions of each example to the weight of a ``Conv1d``, ``Conv2d`` or ``Conv3d``."""
    inputs, padding = _padded(layer, inputs)
    return Convolved(
        arrange(inputs, 1),
        arrange(output_gradients, 1),
        layer.weight.shape,
        layer.stride,
        padding,
        layer.dilation,
        layer.groups,
    )


def _padded(layer: Any, inputs: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return the input with the padding that a weight gradient does not know, and the padding left to do."""
    if isinstance(layer.padding, str):
        reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        sides = [(r // 2, r - r // 2) if layer.padding == "same" else (0, 0) for r in reach]
    else:
        sides = [(p, p) for p in layer.padding]
    if layer.padding_mode == "zeros" and all(before == after for before, after in sides):
        return inputs, tuple(before for before, _ in sides)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    widths = [width for side in reversed(sides) for width in side]
    return F.pad(inputs, widths, mode=mode), (0,) * len(sides)
