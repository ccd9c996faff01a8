"""A shadow of a module: the same parameters, its own copy of everything else that a forward pass can change.

Measuring calls ``training_step`` more often than training does. Whatever that call leaves behind (batch-norm
statistics, counters, growing lists, cached masks, metric states, tensors that belong to a dead ``torch.func``
transform) is left on a shadow, which is thrown away. The user's module is neither called nor written to, so there is
nothing to put back, also when the call raises.
"""

import copy
import dataclasses
import functools
import random
import sys
from collections import deque
from types import CellType, FunctionType, MethodType, SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torchmetrics import Metric

from lightning_graddiv.errors import MeasurementError

_RANDOM_STATES = (random.Random, np.random.Generator, np.random.RandomState)


def shadow_copy(module: nn.Module, *, unknown_metrics: bool = False) -> nn.Module:
    """Return a stand-in for ``module`` that shares its parameters and nothing else that a forward pass writes to.

    Submodules, buffers, plain tensor attributes, containers, dataclasses, random generators, hooks and closures are
    copied, with every reference to a module of the tree pointing to its shadow. Compiled submodules run eagerly. In a
    LightningModule ``log``, ``log_dict`` and ``print`` do nothing, and collectives and manual optimization are refused.
    Objects of other types are shared.

    Args:
        module: the module; it is not changed.
        unknown_metrics: let every torchmetrics ``Metric`` return NaN instead of updating. Under ``torch.func.vmap`` a
            metric cannot run, and NaN shows at once if a metric's value enters the loss.

    Raises:
        MeasurementError: the tree holds a TorchScript module or an uninitialised parameter.
    """
    stand_in: nn.Module = _Copier()(module)
    for submodule in stand_in.modules():
        if isinstance(submodule, Metric):
            _isolate_metric(submodule, unknown=unknown_metrics)
        elif is_lightning_module(submodule):
            _silence(submodule)
    return stand_in


def is_lightning_module(module: nn.Module) -> bool:
    """Tell a LightningModule of either namespace (``lightning.pytorch``, ``pytorch_lightning``)."""
    return all(hasattr(type(module), name) for name in ("training_step", "log_dict", "manual_backward"))


class _Copier:
    """Copies a graph of objects, each once, so that shared references stay shared."""

    def __init__(self) -> None:
        self._copies: dict[int, Any] = {}
        self._originals: list[Any] = []  # kept alive, so that no id is used twice

    def __call__(self, value: Any) -> Any:
        if id(value) in self._copies:
            return self._copies[id(value)]
        return self._copy(value)

    def _remember(self, value: Any, stand_in: Any) -> Any:
        self._copies[id(value)] = stand_in
        self._originals.append(value)
        return stand_in

    def _copy(self, value: Any) -> Any:
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, (dict, list, set, deque)):
            return self._container(value)
        if isinstance(value, tuple):
            return self._tuple(value)
        if isinstance(value, MethodType):
            owner = self(value.__self__)
            return value if owner is value.__self__ else MethodType(value.__func__, owner)
        if isinstance(value, FunctionType) and value.__closure__:
            return self._closure(value)
        if isinstance(value, functools.partial):
            return functools.partial(self(value.func), *self(value.args), **self(value.keywords))
        if isinstance(value, torch.Generator):
            return self._remember(value, value.clone_state())
        if isinstance(value, (*_RANDOM_STATES, np.ndarray)):
            return self._remember(value, copy.deepcopy(value))
        if isinstance(value, SimpleNamespace) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
            return self._plain_object(value)
        return value

    def _module(self, module: nn.Module) -> nn.Module:
        if _is_compiled(module):
            return self._remember(module, self(module._orig_mod))  # type: ignore[no-any-return]
        if isinstance(module, torch.jit.ScriptModule):
            raise MeasurementError(
                f"TorchScript module `{type(module).__name__}` cannot be measured: its state is out of Python's reach. "
                "Use the plain nn.Module during training.",
                lasting=True,
            )
        stand_in: nn.Module = object.__new__(type(module))
        self._remember(module, stand_in)
        stand_in.__dict__.update({name: self(value) for name, value in module.__dict__.items()})
        _undo_compile(stand_in)
        return stand_in

    def _tensor(self, tensor: Tensor) -> Tensor:
        if is_lazy(tensor):
            raise MeasurementError("A lazy parameter has no shape yet: run one forward pass before measuring.")
        if (tensor.requires_grad and tensor.is_leaf) or isinstance(tensor, nn.Parameter):
            return tensor
        return self._remember(tensor, tensor.detach().clone())  # type: ignore[no-any-return]

    def _container(self, values: Any) -> Any:
        stand_in = self._remember(values, copy.copy(values))
        if isinstance(values, dict):
            for key, value in values.items():
                dict.__setitem__(stand_in, key, self(value))
        elif isinstance(values, list):
            stand_in[:] = [self(value) for value in values]
        elif isinstance(values, deque):
            stand_in.clear()
            stand_in.extend(self(value) for value in values)
        return stand_in

    def _tuple(self, values: Any) -> Any:
        copies = [self(value) for value in values]
        if all(a is b for a, b in zip(copies, values, strict=True)):
            return values
        return type(values)(*copies) if hasattr(values, "_fields") else type(values)(copies)

    def _closure(self, function: FunctionType) -> FunctionType:
        cells = tuple(CellType() for _ in function.__closure__ or ())
        stand_in = FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, cells
        )
        stand_in.__kwdefaults__ = function.__kwdefaults__
        stand_in.__dict__.update(function.__dict__)
        self._remember(function, stand_in)
        for cell, original in zip(cells, function.__closure__ or (), strict=True):
            try:
                cell.cell_contents = self(original.cell_contents)
            except ValueError:  # a cell that was never filled stays empty
                continue
        return stand_in

    def _plain_object(self, value: Any) -> Any:
        stand_in = self._remember(value, copy.copy(value))
        names = vars(value) if hasattr(value, "__dict__") else [field.name for field in dataclasses.fields(value)]
        for name in names:
            object.__setattr__(stand_in, name, self(getattr(value, name)))
        return stand_in


def _is_compiled(module: nn.Module) -> bool:
    """Tell a ``torch.compile`` wrapper, without importing the compiler where nothing was compiled."""
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def _undo_compile(module: nn.Module) -> None:
    """Make the shadow run eagerly: compiled callables are bound to the module that was compiled."""
    attributes = module.__dict__
    attributes["_compiled_call_impl"] = None
    if attributes.pop("_compiler_ctx", None) is not None:  # torch.compile(LightningModule), as Lightning unwraps it
        for name in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
            attributes.pop(name, None)


def _isolate_metric(metric: Metric, *, unknown: bool) -> None:
    metric.__dict__.update(sync_on_compute=False, _to_sync=False, dist_sync_on_step=False)
    if unknown:
        not_a_number = torch.tensor(float("nan"))
        metric.__dict__.update(
            update=_do_nothing,
            reset=_do_nothing,
            forward=lambda *_, **__: not_a_number,
            compute=lambda: not_a_number,
        )


def _silence(module: nn.Module) -> None:
    refused = {name: _refusal(name) for name in ("all_gather", "manual_backward", "toggle_optimizer", "clip_gradients")}
    module.__dict__.update(log=_do_nothing, log_dict=_do_nothing, print=_do_nothing, **refused)


def _do_nothing(*_: Any, **__: Any) -> None:
    """Stand in for a side effect."""


def _refusal(name: str) -> Any:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise MeasurementError(
            f"training_step calls `self.{name}`, so it cannot be run on one example alone: "
            "the loss couples examples or ranks, or steps the optimizer itself.",
            lasting=True,
        )

    return refuse
