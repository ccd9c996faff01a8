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
from lightning.fabric.utilities.exceptions import MisconfigurationException
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

        Raises:
            MisconfigurationException: ``numpy.random`` was given another kind of generator.
        """
        cuda = torch.cuda.get_rng_state(device) if device is not None and device.type == "cuda" else None
        return cls(
            _state_of_python(),
            _state_of_numpy(),
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


@contextmanager
def random_states_put_back(seed: int | None) -> Iterator[None]:
    """Put back the global random states, also after an exception (which Lightning's ``isolate_rng`` does not).

    Of Python, NumPy, and torch on the processor and on NVIDIA's GPUs.

    Args:
        seed: of what they give meanwhile. None: they go on.
    """
    python, numpy = random.getstate(), np.random.get_state()
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
        np.random.set_state(numpy)


class _Remembered:
    """A state that takes long to ask for: not again while the memory that it lies in is the same."""

    def __init__(self, ask: Callable[[], Any], memory: Callable[[], Hashable]) -> None:
        self._ask = ask
        self._memory = memory
        self._known: tuple[Hashable, Any] = None, None

    def __call__(self) -> Any:
        """Return the state."""
        before, (known, state) = self._memory(), self._known
        if before is not None and before == known:
            return state
        state = self._ask()
        if self._memory() == before:  # else another thread has drawn meanwhile
            self._known = before, state
        return state


_HEADER = object.__basicsize__
"""Of an object of CPython; what its type adds lies behind it."""

_MT19937_BYTES = 625 * 4
"""NumPy's 624 words, and the position among them."""


def memory_of_python() -> Hashable:
    """Return all that the state of ``random`` lies in, to be compared; None where that is not known."""
    generator: Any = getattr(random.getstate, "__self__", None)
    if sys.implementation.name != "cpython" or type(generator) is not random.Random:
        return None
    words = string_at(id(generator) + _HEADER, _random.Random.__basicsize__ - _HEADER)
    return id(generator), words, getattr(generator, "gauss_next", None)


def memory_of_numpy() -> Hashable:
    """Return all that the state of ``numpy.random`` lies in, likewise: its words, and a normal number that it keeps."""
    owner: Any = getattr(np.random.get_state, "__self__", None)
    if sys.implementation.name != "cpython" or type(owner) is not np.random.RandomState:
        return None
    generator: Any = np.random.get_bit_generator()  # type: ignore[attr-defined]
    if type(generator) is not np.random.MT19937:
        return None
    kept = string_at(id(owner) + _HEADER, type(owner).__basicsize__ - _HEADER)
    return kept, string_at(generator.ctypes.state_address, _MT19937_BYTES)


def _ask_numpy() -> tuple[Any, ...]:
    state: Any = np.random.get_state()
    if not isinstance(state, tuple):
        raise MisconfigurationException(
            f"`numpy.random` draws by `{state['bit_generator']}`, given by `np.random.set_bit_generator`, and "
            "a checkpoint keeps the state of an `MT19937` only. Draw from a `np.random.Generator` of your own instead."
        )
    return state


_state_of_python = _Remembered(lambda: random.getstate(), memory_of_python)
_state_of_numpy = _Remembered(_ask_numpy, memory_of_numpy)


def generators_of(*holders: Any) -> list[Generator]:
    """Return the generators that a loader or its samplers draw from instead of the global one, each once."""
    found = [getattr(holder, "generator", None) for holder in holders]
    generators = [generator for generator in found if isinstance(generator, Generator)]
    return list({id(generator): generator for generator in generators}.values())
