"""The random number generators that training draws from, as a checkpoint keeps them."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from ctypes import string_at
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor


@dataclass(frozen=True, eq=False)
class RandomStates:
    """The states of the global generators of Python, NumPy and torch, and of some generators of the user's.

    Attributes:
        python: of ``random``.
        numpy: of ``numpy.random``.
        processor: of torch on the processor.
        cuda: of torch on the GPU that trains; None without one.
        own: of the user's generators, in their order.
    """

    python: tuple[int, tuple[int, ...], float | None]
    numpy: tuple[Any, ...]
    processor: Tensor
    cuda: Tensor | None
    own: tuple[Tensor, ...]

    @classmethod
    def now(cls, generators: Sequence[Generator] = (), device: torch.device | None = None) -> "RandomStates":
        """Return the present states.

        Args:
            generators: of the user's.
            device: that trains.
        """
        cuda = torch.cuda.get_rng_state(device) if device is not None and device.type == "cuda" else None
        return cls(
            random.getstate(),
            _NUMPY.state(),
            torch.get_rng_state(),
            cuda,
            tuple(generator.get_state() for generator in generators),
        )

    def restore(self, generators: Sequence[Generator] = (), device: torch.device | None = None) -> None:
        """Put every generator into its state; see :meth:`now`."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.processor)
        if self.cuda is not None and device is not None and device.type == "cuda":
            torch.cuda.set_rng_state(self.cuda, device)
        for generator, state in zip(generators, self.own, strict=False):
            generator.set_state(state)

    @contextmanager
    def restored(self, generators: Sequence[Generator] = ()) -> Iterator[None]:
        """Go back to these states for a while."""
        before = RandomStates.now(generators)
        self.restore(generators)
        try:
            yield
        finally:
            before.restore(generators)

    def is_equal_to(self, other: "RandomStates") -> bool:
        """Tell whether nothing was drawn on the processor between the two."""
        same_numpy = all(np.array_equal(mine, theirs) for mine, theirs in zip(self.numpy, other.numpy, strict=True))
        same_torch = all(map(torch.equal, (self.processor, *self.own), (other.processor, *other.own)))
        return same_numpy and same_torch and self.python == other.python

    def state_dict(self) -> dict[str, Any]:
        """Return the states as tensors and primitives."""
        version, words, gauss = self.python
        algorithm, keys, *rest = self.numpy
        return {
            "python": {"version": version, "words": torch.tensor(words, device="cpu"), "gauss": gauss},
            "numpy": {"algorithm": algorithm, "keys": torch.from_numpy(keys.astype(np.int64)), "rest": rest},
            "processor": self.processor,
            "cuda": self.cuda,
            "own": list(self.own),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "RandomStates":
        """Return the states that :meth:`state_dict` was taken from."""
        python, numpy = state["python"], state["numpy"]
        return cls(
            (python["version"], tuple(python["words"].tolist()), python["gauss"]),
            (numpy["algorithm"], numpy["keys"].cpu().numpy().astype(np.uint32), *numpy["rest"]),
            state["processor"].cpu(),
            None if state["cuda"] is None else state["cuda"].cpu(),
            tuple(own.cpu() for own in state["own"]),
        )


class _NumpyState:
    """The state of ``numpy.random``, which takes long to ask for: not again while it is the same.

    It can be seen in memory. Only a normal number that is kept for the next call cannot.
    """

    def __init__(self) -> None:
        self._seen = b""
        self._state: tuple[Any, ...] = ()

    def state(self) -> tuple[Any, ...]:
        """Return what ``numpy.random.get_state`` does."""
        of_numpy: Any = np.random
        generator = of_numpy.get_bit_generator()
        is_known = type(generator) is np.random.MT19937
        seen = string_at(generator.ctypes.state_address, _MT19937_BYTES) if is_known else b""
        keeps_normal = not self._state or self._state[3]
        if seen != self._seen or not is_known or keeps_normal:
            state: Any = np.random.get_state()
            self._seen, self._state = seen, state
        return self._state


_MT19937_BYTES = 625 * 4
"""624 words, and the position among them."""

_NUMPY = _NumpyState()


def generators_of(*holders: Any) -> list[Generator]:
    """Return the generators that a loader or its samplers draw from instead of the global one, each once."""
    found = [getattr(holder, "generator", None) for holder in holders]
    generators = [generator for generator in found if isinstance(generator, Generator)]
    return list({id(generator): generator for generator in generators}.values())
