"""The loss of a training step that steps its optimizer itself."""

from typing import Any

from torch import Tensor

from lightning_graddiv.errors import MeasurementError


class _Captured(Exception):  # noqa: N818 - it ends a step, and is no error
    """The step has come to its backward pass."""


class _Idle:
    """An optimizer, or a scheduler, whose methods do nothing."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._real, name)
        return _do_nothing if callable(value) else value


def loss_of_manual_step(shadow: Any, args: tuple[Any, ...]) -> Tensor:
    """Run a shadow's ``training_step`` up to its first ``manual_backward``, and return the loss that this was given.

    Optimizers and schedulers do nothing. A step with several backward passes has no single loss: whoever watches the
    real step must see to it that there is one.

    Raises:
        MeasurementError: the step never calls ``manual_backward``.
    """
    losses: list[Tensor] = []

    def capture(loss: Tensor, *_: Any, **__: Any) -> None:
        """Stand in for ``manual_backward``: the step ends where it has a loss."""
        losses.append(loss)
        raise _Captured

    real = {name: getattr(shadow, name) for name in ("optimizers", "lr_schedulers")}
    stubs = {name: lambda *a, _get=get, **k: _idle(_get(*a, **k)) for name, get in real.items()}
    silent = dict.fromkeys(("toggle_optimizer", "untoggle_optimizer", "clip_gradients"), _do_nothing)
    shadow.__dict__.update(manual_backward=capture, **stubs, **silent)
    try:
        shadow.training_step(*args)
    except _Captured:
        return losses[0]
    raise MeasurementError(
        f"`{type(shadow).__name__}` uses manual optimization, but its training_step calls no `self.manual_backward`.",
        lasting=True,
    )


def _idle(found: Any) -> Any:
    return [_Idle(one) for one in found] if isinstance(found, list) else None if found is None else _Idle(found)


def _do_nothing(*_: Any, **__: Any) -> None:
    """Stand in for a side effect."""
