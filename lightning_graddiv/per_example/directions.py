"""Random directions in the space of a module's parameters, in which gradients are compared without keeping them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from lightning_graddiv.per_example.factors import DIRECTIONS, Probe
from lightning_graddiv.per_example.norms import flat, sum_dtype, sums_of_segments

_SMALL = 2**16
"""Parameters of up to so many numbers are kept until a pass is over and handled together: one by one, the calls would
take longer than the work."""

_FEW = 8
"""Products that take no longer one by one."""

_GOLDEN = 0x9E3779B97F4A7C15
"""2^64 by the golden ratio: its multiples, modulo 2^64, spread consecutive seeds evenly over a pool of any size."""

_ALREADY_DRAWN = 8
"""Pools of random numbers that are kept, of different sizes."""

_KEPT_BYTES = 16 * 2**20
"""A pool of up to so many is kept on the device where it is used, too."""

_KEPT_POOLS = 2


@dataclass(frozen=True)
class Spaces:
    """What is known of parameters' directions before these are drawn.

    Attributes:
        small: the parameters that can be handled together, by index.
        vectors: those of them that have one dimension.
        places: where each parameter's numbers begin, where those for its columns do, and where they end.
    """

    small: frozenset[int]
    vectors: frozenset[int]
    places: list[tuple[int, int, int]]

    @classmethod
    def of(cls, parameters: Sequence[Tensor]) -> "Spaces":
        """Look at the parameters."""
        places, end = [], 0
        for parameter in parameters:
            start, rows = end, parameter.shape[0] if parameter.ndim > 0 else 1
            end = start + rows + parameter.numel() // max(1, rows)
            places.append((start, start + rows, end))
        small = frozenset(i for i, parameter in enumerate(parameters) if _is_small(parameter, parameters[0]))
        return cls(small, frozenset(i for i in small if parameters[i].ndim == 1), places)


class Directions:
    """A few directions for each parameter, drawn at once. The same seed gives the same ones on every process.

    Args:
        parameters: all that are compared.
        seed: of the directions; another in every measurement.
        count: p, of directions.
        share_right: whether those of a parameter share their right side; see :class:`.Probe`.
        spaces: of the parameters, where these have been looked at before.

    Attributes:
        small: the parameters that can be handled together, by index.
        vectors: those of them that have one dimension.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        seed: int,
        count: int = DIRECTIONS,
        *,
        share_right: bool = True,
        spaces: Spaces | None = None,
    ) -> None:
        self._parameters = parameters
        self._seed = seed
        self._count = count
        self._rights = 1 if share_right else count
        spaces = Spaces.of(parameters) if spaces is None else spaces
        self.small, self.vectors, self._places = spaces.small, spaces.vectors, spaces.places
        self._probes: dict[int, Probe] = {}

    def probe(self, index: int) -> Probe:
        """Return the directions for one parameter, on its device."""
        found = self._probes.get(index)
        if found is None:
            parameter, (start, middle, end) = self._parameters[index], self._places[index]
            left, right = self._numbers[:, start:middle], self._numbers[: self._rights, middle:end]
            # One number on the right would be a factor of all directions, which may be next to nothing.
            right = torch.ones_like(right) if end - middle == 1 else right
            if (parameter.dtype, parameter.device) != (left.dtype, left.device):
                where, dtype = parameter.device, sum_dtype(parameter)
                left, right = left.to(where, dtype), right.to(where, dtype)
            found = self._probes[index] = Probe(left, right)
        return found

    def of(self, gradients: Mapping[int, Tensor]) -> Tensor:
        """Return the projections of dense real gradients, by index, taken together: shape (p,), float64."""
        total = self.of_vectors({i: gradient for i, gradient in gradients.items() if i in self.vectors})
        for index in gradients.keys() - self.vectors:
            total += self.probe(index).of(gradients[index]).cpu()
        return total

    def of_vectors(self, gradients: Mapping[int, Tensor]) -> Tensor:
        """Return the same for some of :attr:`vectors`, in one product."""
        if not gradients:
            return torch.zeros(DIRECTIONS, dtype=torch.float64, device="cpu")
        directions = torch.cat([self.probe(index).left for index in gradients], 1)
        return (directions @ flat(gradients.values()).to(directions.dtype)).double().cpu()

    def of_images(self, images: Mapping[int, Tensor], indices: Sequence[int]) -> Tensor:
        """Return the projections of gradients by what they take the shared right sides to (:meth:`.Probe.image_of`).

        Args:
            images: of each gradient, shape (o,), by index.
            indices: of the gradients asked for. Those without an image are zero.

        Returns:
            Tensor of shape (len(indices), p), float64, on the processor.
        """
        asked = {index: images[index] for index in indices if index in images}
        devices = {image.device for image in asked.values()}
        if len(devices) == 1 and len(asked) == len(indices):
            return self._of_images_on_one_device(asked).cpu()
        found = torch.zeros(len(indices), self._count, dtype=torch.float64, device="cpu")
        for device in devices:
            here = {index: image for index, image in asked.items() if image.device == device}
            places = [place for place, index in enumerate(indices) if index in here]
            found[places] = self._of_images_on_one_device(here).cpu()
        return found

    def _of_images_on_one_device(self, images: Mapping[int, Tensor]) -> Tensor:
        left = [self.probe(index).left for index in images]
        if len(images) <= _FEW:
            return torch.stack([of_one @ image for of_one, image in zip(left, images.values(), strict=True)]).double()
        products = torch.cat(left, 1).T.double() * flat(images.values()).double()[:, None]
        return sums_of_segments(products, [len(image) for image in images.values()])

    @cached_property
    def _numbers(self) -> Tensor:
        size, device = max(1, self._places[-1][-1]), self._parameters[0].device
        start = (self._seed * _GOLDEN % 2**64 * size) >> 64
        is_kept_there = 4 * 2 * size * self._count <= _KEPT_BYTES
        pool = _pool_on(device, 2 * size, self._count) if is_kept_there else _pool(2 * size, self._count)
        return pool[:, start : start + size].to(device)


@lru_cache(maxsize=_ALREADY_DRAWN)
def _pool(size: int, count: int) -> Tensor:
    """Draw numbers once, of which every measurement takes others for a parameter: drawing takes longer than comparing.

    Normal numbers, not signs: those overlook, half of the time, two rows that differ by opposite numbers. By NumPy,
    since a proof makes torch's random numbers constant.
    """
    return torch.from_numpy(np.random.default_rng(size).standard_normal((count, size), dtype=np.float32))


@lru_cache(maxsize=_KEPT_POOLS)
def _pool_on(device: torch.device, size: int, count: int) -> Tensor:
    """Keep numbers where they are used: measurements would wait for their transfer."""
    return _pool(size, count).to(device)


def _is_small(parameter: Tensor, first: Tensor) -> bool:
    is_alike = (parameter.dtype, parameter.device) == (first.dtype, first.device)
    return parameter.numel() <= _SMALL and is_alike and not parameter.is_complex()
