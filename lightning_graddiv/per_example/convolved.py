"""Contributions to the weight of a convolution, by the cheapest exact way for its size."""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_graddiv.per_example.devices import chunk_bytes
from lightning_graddiv.per_example.factors import CANCELLATION, Contributions
from lightning_graddiv.per_example.norms import sq_norms_of_rows

_SHIFT = 32
"""What adding one entry to another costs in products of a matrix product: it waits for memory."""


@dataclass(eq=False)
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

    @property
    @override
    def by_example(self) -> Tensor:
        return self.inputs

    @override
    def at(self, examples: slice) -> "Convolved":
        return replace(self, inputs=self.inputs[examples], output_gradients=self.output_gradients[examples])

    @override
    def explicit(self) -> Tensor:
        """Differentiate each row with the library's own kernel: every row becomes a group of channels."""
        inputs, output_gradients = self.inputs.flatten(0, 1), self.output_gradients.flatten(0, 1)
        rows = len(inputs)
        inputs, output_gradients = inputs.flatten(0, 1)[None], output_gradients.flatten(0, 1)[None]
        by_row: Tensor = self._weight_gradient(inputs, output_gradients, rows).unflatten(0, (rows, -1))
        return by_row if rows == len(self) else by_row.reshape(*self.inputs.shape[:2], *self.shape).sum(1)

    @property
    @override
    def are_formed(self) -> bool:
        return not self.takes_pixels

    @override
    def measure(self, right: Tensor) -> tuple[Tensor, Tensor]:
        """Take the cheaper of the gradients themselves and products between the input's pixels."""
        if self.are_formed:
            return super().measure(right)
        pixels = self.inputs.shape[1] * math.prod(self._padded_space)
        size = max(1, chunk_bytes(self.device) // (12 * self.groups * pixels**2))
        parts = [self.at(slice(start, start + size)) for start in range(0, len(self), size)]
        return torch.cat([part._norms_by_pixels() for part in parts]), self._image(right)

    @property
    def takes_pixels(self) -> bool:
        """Whether products between pixels are cheaper than gradients.

        With A pixels, L positions of the output, and K entries of a kernel that joins ``in`` channels to ``out``, these
        cost ``L K in out`` and those about ``A^2 (in + out)``, and K sums of ``A^2`` numbers: late layers, with many
        channels and few pixels, take pixels, at a fraction of the weight gradient's own cost.
        """
        rows, kernel = self.inputs.shape[1], math.prod(self.shape[2:])
        fan_in, fan_out = self.shape[1], self.shape[0] // self.groups
        positions, pixels = math.prod(self.output_gradients.shape[3:]), math.prod(self._padded_space)
        length = rows * pixels - self._steps()[-1]
        by_pixels = (rows * pixels) ** 2 * fan_in + length**2 * (fan_out + _SHIFT * kernel)
        return by_pixels < rows * positions * kernel * fan_in * fan_out

    @property
    def _padded_space(self) -> list[int]:
        return [size + 2 * width for size, width in zip(self.inputs.shape[3:], self.padding, strict=True)]

    @property
    def _padded_inputs(self) -> Tensor:
        widths = [width for p in reversed(self.padding) for width in (p, p)]
        return F.pad(self.inputs, widths) if any(widths) else self.inputs

    @property
    def _units(self) -> list[int]:
        """How far neighbouring entries of the kernel are along each dimension, in pixels of the padded input."""
        space = self._padded_space
        return [step * math.prod(space[dim + 1 :]) for dim, step in enumerate(self.dilation)]

    def _steps(self) -> list[int]:
        """How far each entry of the kernel is from its first, in pixels of the padded input one after another."""
        steps = [0]
        for unit, size in zip(self._units, self.shape[2:], strict=True):
            steps = [before + unit * entry for before in steps for entry in range(size)]
        return steps

    def _norms_by_pixels(self) -> Tensor:
        """|c_i|^2 from the inner products of pixels and those of output gradients (derived).

        ``c_i`` at kernel entry d is ``sum_t b_t x_(t+d)'`` over the positions t of the output, so ``|c_i|^2`` is
        ``sum_(t,s) <b_t, b_s> sum_d <x_(t+d), x_(s+d)>``. With pixels numbered along the padded input, and zeros where
        no output lies, a step d is a step along that number.
        """
        pixels = self._padded_inputs
        spread = pixels.new_zeros(*self.output_gradients.shape[:3], *pixels.shape[3:])
        reach = [
            slice(0, (n - 1) * s + 1, s) for n, s in zip(self.output_gradients.shape[3:], self.stride, strict=True)
        ]
        spread[(slice(None), slice(None), slice(None), *reach)] = self.output_gradients
        x, b = (values.unflatten(2, (self.groups, -1)).movedim(1, 3).flatten(3) for values in (pixels, spread))
        b = b[..., : x.shape[-1] - self._steps()[-1]]
        products = self._summed_over_kernel(x.transpose(-1, -2) @ x, b.shape[-1])  # (n, g, length, length)
        products *= b.transpose(-1, -2) @ b
        norms: Tensor = products.sum((1, 2, 3), dtype=torch.float64)
        sizes = torch.linalg.vector_norm(products.flatten(1), 1, dim=1, dtype=torch.float64)
        cancels = norms < CANCELLATION * sizes
        if bool(cancels.any()):
            chosen = replace(self, inputs=self.inputs[cancels], output_gradients=self.output_gradients[cancels])
            norms[cancels] = torch.cat([sq_norms_of_rows(part.explicit()) for part in chosen.chunks()])
        return norms

    def _summed_over_kernel(self, of_inputs: Tensor, length: int) -> Tensor:
        """Return ``sum_d <x_(t+d), x_(s+d)>``."""
        steps = self._steps()
        products = of_inputs[..., :length, :length].clone()
        for step in steps[1:]:
            products += of_inputs[..., step : step + length, step : step + length]
        return products

    def _image(self, right: Tensor) -> Tensor:
        """What the sum takes a vector to: as a kernel, what it sees weighs the output's gradients."""
        inputs, output_gradients = self.inputs.flatten(0, 1), self.output_gradients.flatten(0, 1)
        kernels = right.view(1, *self.shape[1:]).repeat(self.groups, *[1] * (len(self.shape) - 1))
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(self.stride) - 1]
        seen = convolve(inputs, kernels, None, self.stride, self.padding, self.dilation, self.groups)
        b = output_gradients.unflatten(1, (self.groups, -1)).flatten(3)
        image: Tensor = (b @ seen.flatten(2).unsqueeze(-1)).sum(0)  # (g, out, 1)
        return image.flatten()

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
