"""Training steps without their noise: dropout keeps everything and random tensors are constants.

Whether a batch can be split into examples shows only when the same step is compared on the whole batch and on its
parts, and noise of different shapes would hide it.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_graddiv.errors import MeasurementError


class Noise:
    """Whether anything random was asked for while noise was off."""

    drawn = False


@contextmanager
def noise_off() -> Iterator[Noise]:
    """Make random operations return the same constants whatever the batch, and refuse collectives.

    Noise from Python's and NumPy's generators is not constant, but starts from the same seed each time.
    """
    noise = Noise()
    with _NoiseOff(noise):
        random.seed(0)
        np.random.seed(0)
        before = _state_outside_torch()
        yield noise
        noise.drawn |= before != _state_outside_torch()


def _state_outside_torch() -> tuple[Any, ...]:
    numpy_state: Any = np.random.get_state()
    return random.getstate(), *(part if np.isscalar(part) else part.tobytes() for part in numpy_state)


class _NoiseOff(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator below autograd and vmap, so that noise inside fused layers is found too."""

    def __init__(self, noise: Noise) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._noise = noise

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func.namespace in {"c10d", "_c10d_functional"}:
            raise MeasurementError(
                f"The training step calls a collective ({func}), so its loss couples the ranks: it cannot be split "
                "into examples.",
                lasting=True,
            )
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        return self._without_noise(func, args, kwargs)

    def _without_noise(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        operator = func._schema.name.removeprefix("aten::")
        dropout = next((name for name in ("dropout_p", "p") if name in _argument_names(func)), None)
        if dropout is not None and not operator.startswith("bernoulli"):  # dropout, alone or in attention: keep all
            given = dict(zip(_argument_names(func), args, strict=False)) | kwargs
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
        return out.fill_(0.5 if out.is_floating_point() else 0)


def _argument_names(func: Any) -> list[str]:
    return [argument.name for argument in func._schema.arguments]
