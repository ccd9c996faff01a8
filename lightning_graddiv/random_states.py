"""The random number generators that training draws from: kept by a checkpoint, put back after a measurement."""

import _random
import random
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
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
            state_of_python(),
            state_of_numpy(),
            torch.get_rng_state(),
            cuda,
            tuple(generator.get_state() for generator in generators),
        )

    def restore(self, generators: Sequence[Generator] = (), device: torch.device | None = None) -> None:
        """Put every generator into its state; see :meth:`now`."""
        random.setstate(self.python)
        _set_numpy(self.numpy)
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


@contextmanager
def random_states_put_back(seed: int | None) -> Iterator[None]:
    """Put back every global random state, also after an exception (which Lightning's ``isolate_rng`` does not).

    Args:
        seed: of what is drawn meanwhile. None: go on drawing.
    """
    python, numpy = state_of_python(), state_of_numpy()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    try:
        with torch.random.fork_rng(devices):
            if seed is not None:
                torch.default_generator.manual_seed(seed)
                if devices:  # `torch.manual_seed` would also seed what is not put back
                    torch.cuda.manual_seed_all(seed)
                random.seed(seed)
                np.random.seed(seed)
            yield
    finally:
        random.setstate(python)
        _set_numpy(numpy)


class _Watched:
    """The state of a global generator, which takes long to ask for: not again while what it lies in is the same."""

    def __init__(self, ask: Callable[[], Any]) -> None:
        self.latest: Any = None
        self._ask = ask
        self._seen: Hashable = None

    def state(self, seen: Hashable) -> Any:
        """Return the state; ``seen`` is all that it depends on, or None where that is not known."""
        if seen is None or seen != self._seen:
            self._seen, self.latest = seen, self._ask()
        return self.latest


_PYTHON, _NUMPY = _Watched(random.getstate), _Watched(np.random.get_state)

_MT19937_BYTES = 625 * 4
"""NumPy's 624 words, and the position among them."""

_HEADER = object.__basicsize__
"""Of an object of CPython; behind it lies what ``random.Random`` is made of."""


def state_of_python() -> tuple[int, tuple[int, ...], float | None]:
    """Return what ``random.getstate`` does; the same object while nothing is drawn."""
    generator: Any = random.getstate.__self__  # type: ignore[attr-defined]
    seen = None
    if sys.implementation.name == "cpython":
        words = string_at(id(generator) + _HEADER, _random.Random.__basicsize__ - _HEADER)
        seen = words, generator.gauss_next
    return _PYTHON.state(seen)  # type: ignore[no-any-return]


def state_of_numpy() -> tuple[Any, ...]:
    """Return what ``numpy.random.get_state`` does, likewise, but where a normal number is kept for the next call."""
    of_numpy: Any = np.random
    generator = of_numpy.get_bit_generator()
    seen = None
    keeps_normal = not isinstance(_NUMPY.latest, tuple) or _NUMPY.latest[3]  # one for the next call, kept elsewhere
    if type(generator) is np.random.MT19937 and not keeps_normal:
        seen = string_at(generator.ctypes.state_address, _MT19937_BYTES)
    return _NUMPY.state(seen)  # type: ignore[no-any-return]


def _set_numpy(state: tuple[Any, ...]) -> None:
    np.random.set_state(state)
    _NUMPY.latest = state  # else one that differs in a kept normal number alone would pass for the one before


def generators_of(*holders: Any) -> list[Generator]:
    """Return the generators that a loader or its samplers draw from instead of the global one, each once."""
    found = [getattr(holder, "generator", None) for holder in holders]
    generators = [generator for generator in found if isinstance(generator, Generator)]
    return list({id(generator): generator for generator in generators}.values())
