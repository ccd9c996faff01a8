"""Contributions to the weight of a convolution, by the cheapest exact way for its size."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_graddiv.per_example.devices import chunk_bytes, is_accelerator
from lightning_graddiv.per_example.factors import CANCELLATION, Contributions, Outer, Probe, forming_is_cheaper
from lightning_graddiv.per_example.norms import sq_norms_of_rows

_CALLS_OF_A_CHUNK = 5
"""On an accelerator, for a copy of patches and their product; a step along the kernel takes one."""

_SHIFT = 32
"""What adding one entry to another costs in products of a matrix product: it waits for memory."""


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

    @property
    @override
    def by_example(self) -> Tensor:
        return self.inputs

    @override
    def at(self, examples: slice) -> "Convolved":
        return replace(self, inputs=self.inputs[examples], output_gradients=self.output_gradients[examples])

    @override
    def explicit(self) -> Tensor:
        """Differentiate each row with the library's own kernel: every row becomes a group of channels.

        An accelerator multiplies matrices instead.
        """
        if self.takes_patches:
            return self._by_steps() if self.takes_steps else self._patches().explicit()
        inputs, output_gradients = self.inputs.flatten(0, 1), self.output_gradients.flatten(0, 1)
        rows = len(inputs)
        inputs, output_gradients = inputs.flatten(0, 1)[None], output_gradients.flatten(0, 1)[None]
        by_row: Tensor = self._weight_gradient(inputs, output_gradients, rows).unflatten(0, (rows, -1))
        return by_row if rows == len(self) else by_row.reshape(*self.inputs.shape[:2], *self.shape).sum(1)

    @property
    def takes_patches(self) -> bool:
        """Whether a product of matrices is faster than the library's kernel, which a GPU calls for nearly each row."""
        return is_accelerator(self.device)

    @property
    def takes_steps(self) -> bool:
        """Whether a product for each entry of the kernel takes fewer calls than copies of patches, a few at a time."""
        is_one_map = self.inputs.shape[1] * self.groups == 1
        if not (self.takes_patches and is_one_map and set(self.stride) == {1}):
            return False
        kernel, positions = math.prod(self.shape[2:]), math.prod(self.output_gradients.shape[3:])
        at_a_time, patches = chunk_bytes(self.device), 4 * kernel * self.shape[1] * positions
        by_steps = math.ceil(4 * len(self) * self._held_by_steps / at_a_time) * (kernel + _CALLS_OF_A_CHUNK)
        by_patches = _CALLS_OF_A_CHUNK * (1 + math.ceil(len(self) * patches / (at_a_time / 2)))
        return by_steps < by_patches

    @property
    def _held_by_steps(self) -> int:
        channels = self.shape[0] + self.shape[1]  # of padded copies, which are gone when the products are copied
        return math.prod(self.shape) + channels * math.prod(self._padded_space)

    def _by_steps(self) -> Tensor:
        """``c_i`` at kernel entry d is ``sum_t b_t x_(t+d)'``; with pixels numbered, a step d is a slice of them."""
        steps, kernel = self._steps(), self.shape[2:]
        x = self._padded_inputs[:, 0].flatten(2)
        reach = zip(self.output_gradients.shape[4:], self._padded_space[1:], strict=True)
        widths = [width for size, whole in reversed(list(reach)) for width in (0, whole - size)]
        length = x.shape[-1] - steps[-1]
        b = (F.pad(self.output_gradients, widths) if any(widths) else self.output_gradients)[:, 0].flatten(2)
        b, x = b[..., :length], x.transpose(1, 2)
        formed = b.new_empty(len(steps), len(self), *self.shape[:2])
        for products, step in zip(formed, steps, strict=True):
            torch.bmm(b, x[:, step : step + length], out=products)
        by_example: Tensor = formed.permute(1, 2, 3, 0).unflatten(-1, kernel)
        return by_example

    def _patches(self) -> "Patches":
        inputs = self._padded_inputs
        rows, steps = inputs.stride()[:3], inputs.stride()[3:]
        kernel, space = self.shape[2:], self.output_gradients.shape[3:]
        between_entries = (d * s for d, s in zip(self.dilation, steps, strict=True))
        between_positions = (d * s for d, s in zip(self.stride, steps, strict=True))
        patches = inputs.as_strided((*inputs.shape[:3], *kernel, *space), (*rows, *between_entries, *between_positions))
        n, positions = len(self), math.prod(space)
        b = self.output_gradients.reshape(n, -1, self.shape[0] // self.groups, positions)
        return Patches(patches, b, self.shape)

    @property
    @override
    def are_formed(self) -> bool:
        if not self.takes_patches:
            return not self.takes_pixels
        maps, positions = self.inputs.shape[1] * self.groups, math.prod(self.output_gradients.shape[3:])
        fan_in, fan_out = math.prod(self.shape[1:]), self.shape[0]
        return maps > 1 or forming_is_cheaper(len(self), positions, fan_in, fan_out, self.device)

    @override
    def chunks(self) -> Iterator[Contributions]:
        takes_patches = self.takes_patches and not self.takes_steps
        return self._patches().chunks() if takes_patches else super().chunks()

    @property
    @override
    def formed_at_once(self) -> int:
        if self.takes_steps:
            return self._held_by_steps
        return math.prod(self.shape) * (self.inputs.shape[1] if self.takes_patches else 1)

    @override
    def measure(self, probe: Probe) -> tuple[Tensor, Tensor]:
        """Take the cheaper of the gradients themselves and products: between the input's pixels, or its patches."""
        if self.are_formed:
            return super().measure(probe)
        if self.takes_patches:
            return self._patches().measure_by_products(probe)
        pixels = self.inputs.shape[1] * math.prod(self._padded_space)
        size = max(1, chunk_bytes(self.device) // (12 * self.groups * pixels**2))
        parts = [self.at(slice(start, start + size)) for start in range(0, len(self), size)]
        return torch.cat([part._norms_by_pixels() for part in parts]), self._image(probe)

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

    def _image(self, probe: Probe) -> Tensor:
        """The shared right side of the directions is a kernel; what it sees weighs the output's gradients."""
        inputs, output_gradients = self.inputs.flatten(0, 1), self.output_gradients.flatten(0, 1)
        kernels = probe.right.unflatten(1, self.shape[1:]).repeat(self.groups, *[1] * (len(self.shape) - 1))
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


@dataclass(frozen=True)
class Patches(Contributions):
    """The contributions of a convolution as products of output gradients and the patches of the input they come from.

    Attributes:
        patches: shape (n, k, channels, kernel ..., space ...), overlapping views of the padded input.
        output_gradients: shape (n, k groups, channels of a group, positions).
        shape: of the weight.
    """

    patches: Tensor
    output_gradients: Tensor
    shape: torch.Size

    @property
    @override
    def by_example(self) -> Tensor:
        return self.patches

    @override
    def at(self, examples: slice) -> "Patches":
        return Patches(self.patches[examples], self.output_gradients[examples], self.shape)

    @override
    def explicit(self) -> Tensor:
        """Multiply a few examples' patches at a time, which are copied for it."""
        n, rows = self.patches.shape[:2]
        b, (fan_in, positions) = self.output_gradients, self._sizes
        formed = b.new_empty(*b.shape[:3], fan_in)
        for examples in self._pieces():
            patches = self.patches[examples].reshape(-1, fan_in, positions)
            torch.bmm(b[examples].flatten(0, 1), patches.transpose(-1, -2), out=formed[examples].flatten(0, 1))
        return formed.view(n, *self.shape) if rows == 1 else formed.view(n, rows, *self.shape).sum(1)

    @property
    def _sizes(self) -> tuple[int, int]:
        """Numbers that an output channel sees at a position, and positions."""
        return math.prod(self.shape[1:]), self.output_gradients.shape[-1]

    def _pieces(self) -> list[slice]:
        """Return the examples, so many at a time that copies of their patches fit into little memory."""
        size = max(1, chunk_bytes(self.device) // (8 * max(1, math.prod(self.patches.shape[1:]))))
        return [slice(start, start + size) for start in range(0, len(self), size)]

    @property
    @override
    def formed_at_once(self) -> int:
        return math.prod(self.shape) * self.patches.shape[1]

    def measure_by_products(self, probe: Probe) -> tuple[Tensor, Tensor]:
        """Measure by products between positions, a few examples at a time; of a convolution that is one linear map."""
        parts = [self._outer(examples).measure_by_products(probe) for examples in self._pieces()]
        if len(parts) == 1:
            return parts[0]
        norms, images = zip(*parts, strict=True)
        return torch.cat(norms), torch.stack(images).sum(0)

    def _outer(self, examples: slice) -> Outer:
        """Return those of some examples as a linear map's, which they go through at each position."""
        (fan_in, positions), dimensions = self._sizes, len(self.shape) - 2
        kernel, space = range(3, 3 + dimensions), range(3 + dimensions, 3 + 2 * dimensions)
        a = self.patches[examples].permute(0, 1, *space, 2, *kernel).reshape(-1, positions, fan_in)
        return Outer(a, self.output_gradients[examples, 0].transpose(1, 2), self.shape)


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
