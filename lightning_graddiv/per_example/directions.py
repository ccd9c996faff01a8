"""Random directions in the space of a module's parameters, by which gradients are compared without keeping them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from lightning_graddiv.per_example.norms import flat, sum_dtype
from lightning_graddiv.per_example.probes import DIRECTIONS, Probe, image_of

_SMALL = 2**16
"""Parameters of up to so many numbers are kept until a pass is over and handled together: one by one, the calls would
take longer than the work."""

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
        spaces: Spaces | None = None,
    ) -> None:
        self._parameters = parameters
        self._count = count
        spaces = Spaces.of(parameters) if spaces is None else spaces
        self.small, self.vectors, self._places = spaces.small, spaces.vectors, spaces.places
        self._size = max(1, self._places[-1][-1] if self._places else 0)
        self._place_in_pool = (seed * _GOLDEN % 2**64 * self._size) >> 64
        self._is_pool_on_device = 4 * 2 * self._size * count <= _KEPT_BYTES
        self._start = self._place_in_pool if self._is_pool_on_device else 0
        self._rights: dict[int, Tensor] = {}
        self._probes: dict[int, Probe] = {}

    def probe(self, index: int) -> Probe:
        """Return the directions for one parameter, on its device."""
        found = self._probes.get(index)
        if found is None:
            found = self._probes[index] = Probe(self._left(index), self._right(index, self._numbers))
        return found

    def right(self, index: int) -> Tensor:
        """Return the right side of a parameter's first direction, shape (numel / o,), on its device."""
        found = self._rights.get(index)
        if found is None:
            found = self._rights[index] = self._right(index, self._first_numbers)
        return found

    def _right(self, index: int, numbers: Tensor) -> Tensor:
        _, middle, end = self._places[index]
        right = self._here(index, numbers.narrow(-1, self._start + middle, end - middle))
        # A single number would be a factor of all that is compared, which may be next to nothing.
        return torch.ones_like(right) if end - middle == 1 else right

    def _left(self, index: int) -> Tensor:
        start, middle, _ = self._places[index]
        return self._here(index, self._numbers.narrow(1, self._start + start, middle - start))

    def _here(self, index: int, numbers: Tensor) -> Tensor:
        parameter = self._parameters[index]
        if (parameter.dtype, parameter.device) == (numbers.dtype, numbers.device):
            return numbers
        return numbers.to(parameter.device, sum_dtype(parameter))

    def image_of(self, index: int, gradient: Tensor) -> Tensor:
        """Return what a gradient, which may be flattened, takes :meth:`right` to, shape (o,)."""
        start, middle, _ = self._places[index]
        right = self.right(index)
        return image_of(gradient, right) if gradient.numel() > 0 else right.new_zeros(middle - start)

    def projections_of(self, gradients: Mapping[int, Tensor]) -> Tensor:
        """Return the projections of dense real gradients on directions that share :meth:`right`, taken together.

        Returns:
            Tensor of shape (p,), float64, on the processor.
        """
        vectors = self.vectors  # which are what they take a single one to
        images = {i: gradient if i in vectors else self.image_of(i, gradient) for i, gradient in gradients.items()}
        return self.projections_of_images(images)

    def projections_of_images(self, images: Mapping[int, Tensor]) -> Tensor:
        """Return the same of gradients that were taken by their images, in one product for each device."""
        total = torch.zeros(self._count, dtype=torch.float64, device="cpu")
        for device in {image.device for image in images.values()}:
            here = {index: image for index, image in images.items() if image.device == device}
            left, image = torch.cat([self._left(index) for index in here], 1), flat(here.values())
            total += (left @ image.to(left.dtype)).double().cpu()
        return total

    @cached_property
    def _numbers(self) -> Tensor:
        """A pool on the device, or as much of one as is needed: the parameters' own begin at ``_start``."""
        device, size = self._parameters[0].device, 2 * self._size
        if self._is_pool_on_device:
            return _pool_on(device, size, self._count)[0]
        return _pool(size, self._count).narrow(1, self._place_in_pool, self._size).to(device)

    @cached_property
    def _first_numbers(self) -> Tensor:
        """Those of the first direction."""
        if self._is_pool_on_device:
            return _pool_on(self._parameters[0].device, 2 * self._size, self._count)[1]
        return self._numbers[0]


@lru_cache(maxsize=_ALREADY_DRAWN)
def _pool(size: int, count: int) -> Tensor:
    """Draw numbers once, of which every measurement takes others for a parameter: drawing takes longer than comparing.

    Normal numbers, not signs: those overlook, half of the time, two rows that differ by opposite numbers. By NumPy,
    since a proof makes torch's random numbers constant.
    """
    return torch.from_numpy(np.random.default_rng(size).standard_normal((count, size), dtype=np.float32))


@lru_cache(maxsize=_KEPT_POOLS)
def _pool_on(device: torch.device, size: int, count: int) -> tuple[Tensor, Tensor]:
    """Keep numbers, and those of the first direction alone, where they are used: a transfer would be waited for."""
    pool = _pool(size, count).to(device)
    return pool, pool[0]


def _is_small(parameter: Tensor, first: Tensor) -> bool:
    is_alike = (parameter.dtype, parameter.device) == (first.dtype, first.device)
    return parameter.numel() <= _SMALL and is_alike and not parameter.is_complex()
