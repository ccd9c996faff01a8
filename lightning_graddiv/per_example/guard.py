"""What a training step must not do while it is measured, and what is put back if it does."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_graddiv.errors import CouplingError, MeasurementError
from lightning_graddiv.per_example.modes import OperatorMode


class FrozenParameterWritten(MeasurementError):  # noqa: N818 - like StopIteration, it tells what happened
    """The step writes to a parameter without gradient, as a momentum teacher does: run it on copies of those."""


@contextmanager
def parameters_guarded(module: nn.Module) -> Iterator[None]:
    """Put back parameters whose ``.data`` or ``.grad`` was replaced, and say so.

    Raises:
        MeasurementError: the step replaced or wrote to a parameter, or ran a backward pass of its own.
    """
    before = [(name, p, p.detach(), p._version, p.grad) for name, p in module.named_parameters()]
    try:
        yield
    finally:
        written = []
        for name, parameter, data, version, grad in before:
            if _storage(parameter) != _storage(data):
                parameter.data = data
                written.append((name, parameter))
            elif parameter._version != version:
                written.append((name, parameter))
            if parameter.grad is not grad:
                parameter.grad = grad
                written.append((f"{name}.grad", parameter))
        if written:  # rather than what else went wrong: a loss whose parameters move looks like one that mixes examples
            raise _written(*written[0])


@contextmanager
def writes_refused(module: nn.Module) -> Iterator[None]:
    """Refuse, before it happens, that the step writes to a parameter or calls a collective.

    Raises:
        MeasurementError: it would, or it replaced a parameter's data or gradient, which is put back.
    """
    with parameters_guarded(module), _Refusing(WriteGuard(module)):
        yield


class WriteGuard:
    """Refuses operators that write to a module's parameters, by way of ``parameter.data`` too, and collectives.

    Args:
        module: whose parameters.
    """

    def __init__(self, module: nn.Module) -> None:
        self._kept: dict[int | None, tuple[str, nn.Parameter]] = {}
        for name, parameter in module.named_parameters():
            self._kept[_storage(parameter)] = (name, parameter)
            if parameter.grad is not None:
                self._kept[_storage(parameter.grad)] = (f"{name}.grad", parameter)
        self._kept.pop(None, None)

    def check(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at an operator that is about to run.

        Raises:
            MeasurementError: it must not.
        """
        is_collective, writes = _kind_of(func)
        if is_collective:
            raise CouplingError(
                f"The training step calls a collective ({func}), so its loss couples the ranks: it cannot be split "
                "into examples.",
                lasting=True,
            )
        if writes:
            for tensor in _written_tensors(func, args, kwargs):
                if _storage(tensor) in self._kept:
                    raise _written(*self._kept[_storage(tensor)])


class _Refusing(OperatorMode):
    def __init__(self, guard: WriteGuard) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._guard = guard

    @override
    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._guard.check(func, args, kwargs)
        return func(*args, **kwargs)


@cache
def _kind_of(func: Any) -> tuple[bool, bool]:
    """Tell whether an operator is a collective, and whether it writes to its arguments."""
    return func.namespace in {"c10d", "_c10d_functional"}, func._schema.is_mutable


def _written_tensors(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    for argument in func._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = given.get(argument.name)
            yield from (t for t in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(t, Tensor))


def _storage(tensor: Tensor) -> int | None:
    """Tell tensors that share memory; those without a plain storage, such as sparse ones, are None."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else None


def _written(name: str, parameter: nn.Parameter) -> MeasurementError:
    kind = MeasurementError if parameter.requires_grad else FrozenParameterWritten
    return kind(
        f"The training step writes to `{name}` itself, and measuring would repeat that for every example. Change "
        "parameters outside of training_step, for example in `on_train_batch_end`, and leave backward() to Lightning.",
        lasting=True,
    )
