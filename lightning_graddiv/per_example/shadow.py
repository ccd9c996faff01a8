"""A shadow of a module: the same parameters, its own copy of everything else that a forward pass can change.

Measuring calls ``training_step`` more often than training does. Whatever that call leaves behind (batch-norm
statistics, counters, growing lists, cached masks, metric states, tensors that belong to a dead ``torch.func``
transform) is left on a shadow, which is thrown away. The user's module is neither called nor written to, so there is
nothing to put back, also when the call raises.
"""

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_graddiv.errors import CouplingError, MeasurementError
from lightning_graddiv.per_example.copier import Copier, package_of

_LIBRARIES = {"builtins", "lightning", "pytorch_lightning", "torch", "torchmetrics"}


def shadow_copy(
    module: nn.Module,
    *others: Any,
    values: Mapping[int, Tensor] | None = None,
    unknown_metrics: bool = False,
    copy_frozen: bool = False,
) -> tuple[Any, ...]:
    """Return a stand-in for ``module`` that shares its parameters and nothing else that a forward pass writes to.

    Submodules, buffers, plain tensor attributes, containers, dataclasses, random generators, hooks and closures are
    copied, with every reference to a module of the tree pointing to its shadow; so are plain objects of the user's own
    classes (see :class:`.Copier`). Compiled submodules run eagerly. In a LightningModule ``log``, ``log_dict`` and
    ``print`` do nothing, and collectives and manual optimization are refused. Objects of other types are shared.

    Args:
        module: the module; it is not changed.
        others: what the shadow is used with, copied along so that it refers to the shadow too: a loss, a batch.
        values: tensors to stand in for parameters, wherever they are held, by the parameter's ``id``.
        unknown_metrics: let every torchmetrics ``Metric`` return NaN instead of updating. Under ``torch.func.vmap`` a
            metric cannot run, and NaN shows at once if a metric's value enters the loss.
        copy_frozen: copy parameters without gradient too, for training steps that write to them.

    Returns:
        The stand-in, followed by the copies of ``others``.

    Raises:
        MeasurementError: the tree holds a TorchScript module, an uninitialised parameter, or what cannot be copied.
    """
    classes = type(getattr(module, "_orig_mod", module)).__mro__  # those of the module that a compiled one wraps
    copier = Copier({package_of(cls) for cls in classes} - _LIBRARIES, values, frozen=copy_frozen)
    try:
        copies = tuple(copier(value) for value in (module, *others))
    except MeasurementError:
        raise
    except Exception as error:
        raise MeasurementError(
            f"`{type(module).__name__}` holds something that cannot be copied ({type(error).__name__}: {error}), and "
            "its training_step is only run on copies. Give the object's class a working `__copy__`.",
            lasting=True,
        ) from error
    for submodule in copies[0].modules():
        if isinstance(submodule, Metric):
            _isolate_metric(submodule, unknown=unknown_metrics)
        elif is_lightning_module(submodule):
            _silence(submodule)
    return copies


def is_lightning_module(module: nn.Module) -> bool:
    """Tell a LightningModule of either namespace (``lightning.pytorch``, ``pytorch_lightning``), compiled or not."""
    return all(hasattr(module, name) for name in ("training_step", "log_dict", "manual_backward"))


def _isolate_metric(metric: Metric, *, unknown: bool) -> None:
    metric.__dict__.update(sync_on_compute=False, _to_sync=False, dist_sync_on_step=False)
    if unknown:
        not_a_number = torch.tensor(float("nan"), device="cpu")
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
        """Stand in for what cannot be called for one example alone."""
        kind = CouplingError if name == "all_gather" else MeasurementError
        raise kind(
            f"training_step calls `self.{name}`, so it cannot be run on one example alone: "
            "the loss couples examples or ranks, or steps the optimizer itself.",
            lasting=True,
        )

    return refuse
