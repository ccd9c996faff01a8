"""What a training step must not do while it is measured, and what is put back if it does."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_graddiv.errors import CouplingError, MeasurementError


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
    with parameters_guarded(module), _Guard(module):
        yield


class _Guard(TorchDispatchMode):
    """Sees every operator below autograd and vmap, also those that act on ``parameter.data``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept: dict[int | None, tuple[str, nn.Parameter]] = {}
        for name, parameter in module.named_parameters():
            self._kept[_storage(parameter)] = (name, parameter)
            if parameter.grad is not None:
                self._kept[_storage(parameter.grad)] = (f"{name}.grad", parameter)
        self._kept.pop(None, None)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func.namespace in {"c10d", "_c10d_functional"}:
            raise CouplingError(
                f"The training step calls a collective ({func}), so its loss couples the ranks: it cannot be split "
                "into examples.",
                lasting=True,
            )
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for tensor in _written_tensors(func, args, kwargs):
                if _storage(tensor) in self._kept:
                    raise _written(*self._kept[_storage(tensor)])
        return func(*args, **kwargs)


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
