"""Contributions to the weight of a convolution on an accelerator, where calls cost more than the work of most of them.

The library's own kernel is called for nearly each row there; products of matrices take their place.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_graddiv.per_example.convolved import Convolved
from lightning_graddiv.per_example.devices import chunk_bytes
from lightning_graddiv.per_example.factors import Contributions
from lightning_graddiv.per_example.linear_maps import Outer, forming_is_cheaper

_CALLS_OF_A_CHUNK = 5
"""On an accelerator, for a copy of patches and their product; a step along the kernel takes one."""


class ConvolvedByProducts(Convolved):
    """The same contributions by products of matrices, in the way that takes the fewest calls.

    Output gradients are multiplied with the patches of the input that they come from, of which a few examples' are
    copied at a time; or with all pixels, once for each entry of the kernel; or, where positions are few, positions with
    one another.
    """

    @override
    def explicit(self) -> Tensor:
        return self._by_steps() if self.takes_steps else self._patches().explicit()

    @property
    def takes_steps(self) -> bool:
        """Whether a product for each entry of the kernel takes fewer calls than copies of patches, a few at a time."""
        is_one_map = self.inputs.shape[1] * self.groups == 1
        if not (is_one_map and set(self.stride) == {1}):
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
        """As one linear map's, unless an example goes through several: with its rows, or in groups of channels."""
        maps, positions = self.inputs.shape[1] * self.groups, math.prod(self.output_gradients.shape[3:])
        fan_in, fan_out = math.prod(self.shape[1:]), self.shape[0]
        return maps > 1 or forming_is_cheaper(len(self), positions, fan_in, fan_out, self.device)

    @override
    def chunks(self) -> Iterator[Contributions]:
        return super().chunks() if self.takes_steps else self._patches().chunks()

    @property
    @override
    def formed_at_once(self) -> int:
        return self._held_by_steps if self.takes_steps else math.prod(self.shape) * self.inputs.shape[1]

    @override
    def measure(self, right: Tensor) -> tuple[Tensor, Tensor]:
        return super().measure(right) if self.are_formed else self._patches().measure_by_products(right)


@dataclass(eq=False)
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

    def measure_by_products(self, right: Tensor) -> tuple[Tensor, Tensor]:
        """Measure by products between positions, a few examples at a time; of a convolution that is one linear map."""
        parts = [self._outer(examples).measure_by_products(right) for examples in self._pieces()]
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
