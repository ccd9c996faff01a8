"""Copies of whatever a training step may write to, so that what is written stays on the copy."""

import copy
import dataclasses
import functools
import io
import random
import sys
import weakref
from abc import ABC
from collections import OrderedDict, deque
from collections.abc import Collection, Iterator, Mapping
from types import CellType, FunctionType, MethodType, SimpleNamespace
from typing import Any, Generic, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lightning_graddiv.errors import MeasurementError

_ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_CONTAINERS = (dict, list, set, deque)
_PLAIN_CONTAINERS = (*_CONTAINERS, OrderedDict)
_NEUTRAL_BASES = (object, ABC, Generic, Protocol)


class Copier:
    """Copies a graph of objects, each once, so that shared references stay shared.

    Copied are modules, tensors, arrays, containers, dataclasses, random generators, functions that hold any of them,
    and plain objects of the user's own classes. Parameters and objects of all other types are shared.

    Args:
        packages: the user's own, such as ``{"my_project"}``: plain objects of their classes are copied too.
        values: tensors to stand in for parameters, by the parameter's ``id``.
        frozen: copy parameters that do not require a gradient.
    """

    def __init__(
        self, packages: Collection[str] = (), values: Mapping[int, Tensor] | None = None, *, frozen: bool = False
    ) -> None:
        self._values = dict(values or {})
        self._copies: dict[int, Any] = dict(self._values)
        self._originals: list[Any] = []  # kept alive, so that no id is used twice
        self._packages = packages
        self._frozen = frozen

    def __call__(self, value: Any) -> Any:
        """Return the copy of ``value``, or ``value`` itself where it is shared."""
        if id(value) in self._copies:
            return self._copies[id(value)]
        kind = type(value)  # looked up first: what a module holds is mostly numbers, names and dictionaries of no hooks
        if kind in _ATOMS:
            return value
        if kind in _PLAIN_CONTAINERS and not value:
            return self._remember(value, value.copy())
        return self._copy(value)

    def _remember(self, value: Any, stand_in: Any) -> Any:
        self._copies[id(value)] = stand_in
        self._originals.append(value)
        return stand_in

    def _copy(self, value: Any) -> Any:
        if isinstance(value, _ATOMS):
            return value
        if type(value) in weakref.ProxyTypes:
            return self(value.__repr__.__self__)
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, _CONTAINERS):
            return self._container(value)
        if isinstance(value, (tuple, frozenset)):
            return self._immutable(value)
        if isinstance(value, (FunctionType, MethodType, functools.partial)):
            return self._callable(value)
        if type(value) is weakref.ref and isinstance(value(), nn.Module):
            return weakref.ref(self(value()))
        if isinstance(value, np.ndarray):
            is_written = value.flags.writeable and not isinstance(value, np.memmap)
            return self._remember(value, value.copy() if is_written else value)
        if (generator := _independent_generator(value)) is not None:
            return self._remember(value, generator)
        if self._is_plain_object(value):
            return self._plain_object(value)
        if isinstance(value, Iterator) and not isinstance(value, io.IOBase):
            return _RefusedIterator()
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
        stand_in.__dict__.update({name: self(value) for name, value in self._class_containers(module)})
        stand_in.__dict__.update({name: self(value) for name, value in module.__dict__.items()})
        _undo_compile(stand_in)
        return stand_in

    def _class_containers(self, module: nn.Module) -> list[tuple[str, Any]]:
        """List what all instances of the user's classes share and may write to."""
        own = [cls for cls in reversed(type(module).__mro__) if self._is_own(cls)]
        found = [(name, value) for cls in own for name, value in vars(cls).items() if not name.startswith("__")]
        return [(name, value) for name, value in found if isinstance(value, (*_CONTAINERS, Tensor))]

    def _tensor(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, nn.Parameter) and not tensor.requires_grad and self._frozen:
            return self._remember(tensor, nn.Parameter(tensor.detach().clone(), requires_grad=False))  # type: ignore[no-any-return]
        if (tensor.requires_grad and tensor.is_leaf) or isinstance(tensor, nn.Parameter):
            return tensor
        stand_in = tensor.detach().clone()
        if tensor.requires_grad and not self._values:  # torch.func has no leaves, and comes second
            stand_in = OutsideTensor.mark(stand_in).clone()
        return self._remember(tensor, stand_in)  # type: ignore[no-any-return]

    def _container(self, values: Any) -> Any:
        is_plain = type(values) in _PLAIN_CONTAINERS  # whose own method is several times faster
        stand_in = self._remember(values, values.copy() if is_plain else copy.copy(values))
        if isinstance(values, dict):
            for key, value in values.items():
                if isinstance(key, nn.Module):
                    del stand_in[key]
                    stand_in[self(key)] = self(value)
                else:
                    dict.__setitem__(stand_in, key, self(value))
        elif isinstance(values, list):
            stand_in[:] = [self(value) for value in values]
        else:
            stand_in.clear()
            for value in values:
                (stand_in.add if isinstance(values, set) else stand_in.append)(self(value))
        return stand_in

    def _immutable(self, values: Any) -> Any:
        copies = [self(value) for value in values]
        if all(a is b for a, b in zip(copies, values, strict=True)):
            return values
        return type(values)(*copies) if hasattr(values, "_fields") else type(values)(copies)

    def _callable(self, function: Any) -> Any:
        if isinstance(function, MethodType):
            owner = self(function.__self__)
            return function if owner is function.__self__ else MethodType(function.__func__, owner)
        if isinstance(function, functools.partial):
            return functools.partial(self(function.func), *self(function.args), **self(function.keywords))
        if function.__closure__ or self._holds_copied(function):
            return self._function(function)
        return function

    def _holds_copied(self, function: FunctionType) -> bool:
        held = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        return any(self(value) is not value for value in held)

    def _function(self, function: FunctionType) -> FunctionType:
        cells = tuple(CellType() for _ in function.__closure__ or ())
        stand_in = FunctionType(function.__code__, function.__globals__, function.__name__, None, cells or None)
        self._remember(function, stand_in)
        stand_in.__defaults__ = self(function.__defaults__)
        stand_in.__kwdefaults__ = self(function.__kwdefaults__)
        stand_in.__dict__.update(self(function.__dict__))
        for cell, original in zip(cells, function.__closure__ or (), strict=True):
            try:
                contents = original.cell_contents
            except ValueError:  # a cell that was never filled stays empty
                continue
            cell.cell_contents = self(contents)
        return stand_in

    def _is_own(self, cls: type) -> bool:
        return package_of(cls) in self._packages

    def _is_plain_object(self, value: Any) -> bool:
        """Tell objects that are nothing but their attributes; others may own a file, a process or a whole training."""
        if isinstance(value, type):
            return False
        if isinstance(value, SimpleNamespace) or dataclasses.is_dataclass(value):
            return True
        classes = [cls for cls in type(value).__mro__ if cls not in _NEUTRAL_BASES]
        return hasattr(value, "__dict__") and not hasattr(value, "__del__") and all(map(self._is_own, classes))

    def _plain_object(self, value: Any) -> Any:
        stand_in = self._remember(value, object.__new__(type(value)))
        slots = [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
        attributes = {name: getattr(value, name) for name in slots if hasattr(value, name)}
        for name, attribute in (attributes | getattr(value, "__dict__", {})).items():
            object.__setattr__(stand_in, name, self(attribute))
        return stand_in


class OutsideTensor:
    """Marks the copy of a tensor whose graph begins before the step: no gradient flows on through a copy."""

    @staticmethod
    def mark(leaf: Tensor) -> Tensor:
        """Return ``leaf`` as one that :meth:`is_marked` recognises in a graph."""
        leaf.requires_grad_()
        leaf.__dict__["_computed_outside_of_step"] = True
        return leaf

    @staticmethod
    def is_marked(leaf: Tensor) -> bool:
        """Tell whether the tensor was marked."""
        return "_computed_outside_of_step" in leaf.__dict__


class _RefusedIterator:
    """Stands in for an iterator, which can neither be copied nor drawn from without training missing what was drawn."""

    def __iter__(self) -> "_RefusedIterator":
        return self

    def __next__(self) -> NoReturn:
        raise MeasurementError(
            "The training step draws from an iterator that the module holds, and training would miss what measuring "
            "takes. Draw in the data loader, for example with `CombinedLoader`.",
            lasting=True,
        )


def package_of(cls: type) -> str:
    """Return the top-level package that a class comes from."""
    return cls.__module__.partition(".")[0]


def _independent_generator(value: Any) -> Any:
    """Return a fresh generator of the same kind, or None for anything else.

    A copy in the same state would give every example the same noise. The seed comes from Python's random state.
    """
    if isinstance(value, torch.Generator):
        return torch.Generator(device=value.device).manual_seed(random.getrandbits(63))
    if isinstance(value, np.random.Generator):
        return np.random.Generator(type(value.bit_generator)(random.getrandbits(63)))
    if isinstance(value, np.random.RandomState):
        return np.random.RandomState(random.getrandbits(32))
    return random.Random(random.getrandbits(63)) if type(value) is random.Random else None


def _is_compiled(module: nn.Module) -> bool:
    """Tell a ``torch.compile`` wrapper, without importing the compiler where nothing was compiled."""
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def _undo_compile(module: nn.Module) -> None:
    """Make the copy run eagerly: compiled callables are bound to the module that was compiled."""
    attributes = module.__dict__
    attributes["_compiled_call_impl"] = None
    if attributes.pop("_compiler_ctx", None) is not None:  # torch.compile(LightningModule), as Lightning unwraps it
        for name in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
            attributes.pop(name, None)
