"""Training steps without their noise: dropout keeps everything and random tensors are constants.

Whether a batch can be split into examples shows only when the same step is compared on the whole batch and on its
parts, and noise of different shapes would hide it.
"""

import random
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from lightning_graddiv.per_example.guard import WriteGuard
from lightning_graddiv.per_example.modes import OperatorMode
from lightning_graddiv.random_states import memory_of_numpy, memory_of_python

# Seeds from which the first numbers of both random.random() and numpy.random.rand() are below 0.15, above 0.85.
_LOW_SEED, _HIGH_SEED = 3820, 38554


class Noise:
    """Whether anything random was asked for while noise was off."""

    def __init__(self, seed: int) -> None:
        self.drawn = False
        self._seed = seed
        self._states: tuple[Hashable, Hashable] | None = None

    def restart(self) -> None:
        """Set back the generators that do not obey torch."""
        self.look()
        random.seed(self._seed)
        np.random.seed(self._seed)
        self._states = _states_outside_torch()

    def look(self) -> None:
        """See whether they were used."""
        self.drawn |= self._states is not None and self._states != _states_outside_torch()


_active: list[Noise] = []


@contextmanager
def noise_off(*, high: bool = False, guard: WriteGuard | None = None) -> Iterator[Noise]:
    """Make random operations return the same constants whatever the batch.

    Noise from Python's and NumPy's generators is not constant, but starts from the same seed in each step.

    Args:
        high: whether uniform noise is near one rather than near zero, so that what is done with some probability is
            done, and left out, at least once.
        guard: looks at every operator first: two modes would take twice the time.
    """
    noise = Noise(_HIGH_SEED if high else _LOW_SEED)
    _active.append(noise)
    try:
        with _NoiseOff(noise, guard, high=high):
            yield noise
        noise.look()
    finally:
        _active.remove(noise)


def restart_noise() -> None:
    """Begin a step: where noise is off, it begins like every other."""
    for noise in _active[-1:]:
        noise.restart()


def _states_outside_torch() -> tuple[Hashable, Hashable]:
    """Return what can be compared: where the states lie, which takes less time than to ask for them."""
    python, numpy = memory_of_python(), memory_of_numpy()
    of_numpy: Any = np.random.get_state
    return python or random.getstate(), numpy or str(of_numpy(legacy=False))


class _NoiseOff(OperatorMode):
    """Below autograd and vmap, so that noise inside fused layers is found too."""

    def __init__(self, noise: Noise, guard: WriteGuard | None, *, high: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._noise = noise
        self._guard = guard
        self._high = high

    @override
    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._guard is not None:
            self._guard.check(func, args, kwargs)
        is_random, sorts = _kind_of(func)
        if is_random:
            return self._without_noise(func, args, kwargs)
        out = func(*args, **kwargs)
        if sorts and self._noise.drawn:
            return _ties_rolled(out, _arguments(func, args, kwargs))
        return out

    def _without_noise(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        operator = func._schema.name.removeprefix("aten::")
        given = _arguments(func, args, kwargs)
        names = [argument.name for argument in func._schema.arguments]
        dropout = next((name for name in ("dropout_p", "dropout", "p") if name in names), None)
        if dropout is not None and not operator.startswith("bernoulli"):  # dropout, alone or in attention: keep all
            self._noise.drawn |= bool(given.get(dropout, 0.0))
            return func(**given | {dropout: 0.0})
        self._noise.drawn = True
        out = func(*args, **kwargs)
        if not isinstance(out, Tensor):
            return out
        if operator == "randperm":  # moves every example, or mixing by permutation would not show
            return torch.arange(len(out), device=out.device, dtype=out.dtype).roll(1)
        if operator.startswith("bernoulli"):
            return out.fill_(1)
        if out.is_floating_point():
            return out.fill_(0.95 if self._high else 0.05)
        return out.fill_(given.get("high", 1) - 1 if self._high else given.get("low", 0))


@cache
def _kind_of(func: Any) -> tuple[bool, bool]:
    """Tell whether an operator draws random numbers, and whether it sorts."""
    return torch.Tag.nondeterministic_seeded in func.tags, func._schema.name in {"aten::sort", "aten::topk"}


def _ties_rolled(found: tuple[Tensor, Tensor], given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Sort constant noise to a permutation that moves every example: `rand(n).argsort()` is a way to shuffle."""
    (values, indices), noise = found, given["self"]
    if not noise.is_floating_point() or noise.numel() < 2 or not bool((noise == noise.flatten()[0]).all()):
        return values, indices
    dim = given.get("dim", -1)
    moved = torch.arange(1, values.shape[dim] + 1, device=indices.device).remainder(noise.shape[dim])
    return values, moved.expand(indices.movedim(dim, -1).shape).movedim(-1, dim)


def _arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
