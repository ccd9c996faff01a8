"""The loss of an unmodified module as a pure function of its parameters and a batch."""

import copy
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_graddiv.errors import MeasurementError
from lightning_graddiv.per_example.batches import own_copy
from lightning_graddiv.per_example.bounds import indices_checked
from lightning_graddiv.per_example.ghost import recorders_paused
from lightning_graddiv.per_example.guard import parameters_guarded
from lightning_graddiv.per_example.manual import loss_of_manual_step
from lightning_graddiv.per_example.noise import restart_noise
from lightning_graddiv.per_example.shadow import is_lightning_module, shadow_copy
from lightning_graddiv.random_states import random_states_put_back

LossFunction = Callable[[nn.Module, Any], Tensor]

Watch = Callable[..., None]
"""(module, stand_ins=None): looks on while the module runs; ``stand_ins`` take the place of the loss's parameters."""


class StepLoss:
    """The loss that one training step computes, as a function of the batch and, if wanted, of the parameters.

    Each call runs on a fresh shadow of the module (see :mod:`.shadow`) with its own copy of the batch, so that no call
    sees or leaves a trace of another.

    Args:
        module: a LightningModule, or any module together with ``loss_fn``.
        loss_fn: ``loss_fn(module, batch) -> scalar``. None: the module's own ``training_step``.
        step_args: what ``training_step`` receives after the batch. None: a batch index of zero where it takes one.
        parameters: the parameters to differentiate for. None: all that require a gradient.

    Raises:
        MeasurementError: nothing to differentiate for, sharded or lazy parameters.
        TypeError: a module that is not a LightningModule, without ``loss_fn``.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        loss_fn: LossFunction | None = None,
        step_args: tuple[Any, ...] | None = None,
        parameters: Sequence[nn.Parameter] | None = None,
    ) -> None:
        self.module = module
        self.parameters = _trainable(module, parameters)
        self._watch: Watch | None = None
        self.is_partial = False  # the loss depends on more parameters than these
        self.copies_frozen = False  # set where the step writes to parameters without gradient
        self._loss_of = loss_fn if loss_fn is not None else _training_step_loss(module, step_args)

    def of(self, parameters: Sequence[nn.Parameter]) -> "StepLoss":
        """Return the same loss as a function of some of the parameters only."""
        restricted = copy.copy(self)
        restricted.parameters, restricted.is_partial = list(parameters), True
        return restricted

    def watched_by(self, watch: Watch) -> "StepLoss":
        """Return the same loss with every call looked on by ``watch``."""
        watched = copy.copy(self)
        watched._watch = watch
        return watched

    def __call__(self, batch: Any, watch: Watch | None = None) -> Tensor:
        """Return the scalar loss at the module's own parameters, with its autograd graph.

        Args:
            batch: the batch.
            watch: called with the module that is about to run, a shadow of ``module``.
        """
        return self._run(batch, None, watch=watch or self._watch)

    def at(self, values: Sequence[Tensor], batch: Any) -> Tensor:
        """Return the scalar loss with ``values`` in place of ``parameters``: a pure function, for ``torch.func``."""
        return self._run(batch, self._stand_ins(values), unknown_metrics=True)

    def gradients_at_aliases(self, batch: Any, watch: Watch | None = None) -> list[Tensor | None]:
        """Return the gradients by a whole backward pass to aliases of the parameters.

        Where ``torch.autograd.grad`` does not reach all parameters (re-entrant checkpoints), and the parameters' own
        gradients must stay what they are.
        """
        aliases = [parameter.detach().requires_grad_() for parameter in self.parameters]
        watch_aliases = None if watch is None else partial(watch, stand_ins=aliases)
        self._run(batch, self._stand_ins(aliases), watch=watch_aliases).backward()
        return [alias.grad for alias in aliases]

    def rehearsal(self) -> Callable[[Any], None]:
        """Return a function that runs forward and backward on a batch, to see how long it takes.

        All calls run on one shadow, and on aliases of the parameters, whose gradients are thrown away: nothing but
        what training does too is timed, and nothing is left behind.
        """
        aliases = [parameter.detach().requires_grad_() for parameter in self.parameters]
        stand_in, loss_of = shadow_copy(
            self.module, self._loss_of, values=self._stand_ins(aliases), copy_frozen=self.copies_frozen
        )

        def run(batch: Any) -> None:
            """Differentiate a batch's loss, for its gradients alone."""
            for alias in aliases:
                alias.grad = None
            _scalar(loss_of(stand_in, batch)).backward()

        return run

    def _stand_ins(self, values: Sequence[Tensor]) -> dict[int, Tensor]:
        # Aliases made within the transform, for what is not differentiated: writing `.data` of one is an error there,
        # where on the parameter itself it ends the process.
        others = [p for p in self.module.parameters() if p.requires_grad or not self.copies_frozen]
        stand_ins = {id(p): p.detach() for p in others}
        return stand_ins | {id(p): v for p, v in zip(self.parameters, values, strict=True)}

    def _run(
        self,
        batch: Any,
        values: dict[int, Tensor] | None,
        *,
        unknown_metrics: bool = False,
        watch: Watch | None = None,
    ) -> Tensor:
        restart_noise()
        stand_in, loss_of = shadow_copy(
            self.module,
            self._loss_of,
            values=values,
            unknown_metrics=unknown_metrics,
            copy_frozen=self.copies_frozen,
        )
        if watch is not None:
            watch(stand_in)
        return _scalar(loss_of(stand_in, own_copy(batch)))


@contextmanager
def measuring(module: nn.Module, seed: int | None = None, *, checks_indices: bool = True) -> Iterator[None]:
    """Keep a measurement from touching training: random states are put back, autocast is off, loggers are silent.

    Args:
        module: the module that is measured.
        seed: of the measurement's own noise. None: as if it were training's.
        checks_indices: whether to look out for what a GPU does not survive, see :func:`.indices_checked`.

    Raises:
        MeasurementError: the step wrote to a parameter.
    """
    trainer = getattr(module, "_trainer", None)
    devices = {"cpu", *(parameter.device.type for parameter in module.parameters())}
    with ExitStack() as stack:
        stack.enter_context(random_states_put_back(seed))
        stack.enter_context(parameters_guarded(module))
        stack.enter_context(recorders_paused())
        stack.enter_context(torch.enable_grad())
        if "cuda" in devices:
            stack.enter_context(_quiet_on_copies())
        if checks_indices:
            stack.enter_context(indices_checked(module))
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if trainer is not None:
            loggers = trainer.loggers
            trainer.loggers = [DummyLogger() for _ in loggers]
            stack.callback(setattr, trainer, "loggers", loggers)
        yield


@contextmanager
def _quiet_on_copies() -> Iterator[None]:
    """Leave out what torch warns of because a step runs on a GPU with copies of its parameters, or beside DDP."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")
        warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match")
        yield


def _trainable(module: nn.Module, wanted: Sequence[nn.Parameter] | None) -> list[nn.Parameter]:
    if any(is_lazy(parameter) for parameter in module.parameters()):
        raise MeasurementError(
            f"`{type(module).__name__}` holds a lazy parameter without a shape: run one forward pass before measuring."
        )
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if wanted is not None:
        chosen = {id(parameter) for parameter in wanted if parameter.requires_grad}
        if strangers := chosen - {id(parameter) for parameter in parameters}:
            raise MeasurementError(
                f"{len(strangers)} of the optimizer's parameters are not parameters of `{type(module).__name__}`, so "
                "their gradients cannot be measured. Register them in the module.",
                lasting=True,
            )
        parameters = [parameter for parameter in parameters if id(parameter) in chosen]
    if not parameters:
        raise MeasurementError(
            f"`{type(module).__name__}` has no trainable parameters that the optimizer holds: there is no gradient.",
            lasting=True,
        )
    if any(hasattr(parameter, "device_mesh") for parameter in parameters):
        raise MeasurementError(
            f"`{type(module).__name__}` holds sharded parameters (DTensor): a loop or vmap over them gives wrong "
            "gradients without an error. Use a strategy that replicates the parameters (single device or DDP).",
            lasting=True,
        )
    return parameters


def _training_step_loss(module: nn.Module, step_args: tuple[Any, ...] | None) -> LossFunction:
    if not is_lightning_module(module):
        raise TypeError(
            "Expected argument `loss_fn` to be a function of (module, batch), because "
            f"`{type(module).__name__}` is not a LightningModule, but got None"
        )
    arguments = default_step_args(module) if step_args is None else step_args
    if not module.automatic_optimization:
        return lambda shadow, batch: loss_of_manual_step(shadow, (batch, *arguments))
    return lambda shadow, batch: shadow.training_step(batch, *arguments)  # type: ignore[operator]


def default_step_args(module: nn.Module, batch_idx: int = 0) -> tuple[Any, ...]:
    """Return what ``training_step`` receives after the batch: its index, if it takes one."""
    parameters = inspect.signature(module.training_step).parameters.values()  # type: ignore[arg-type]
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return (batch_idx,)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return (batch_idx,) if len(positional) > 1 else ()


def _scalar(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{type(loss).__name__}"
        raise MeasurementError(f"The training step returned {found} where a scalar loss was expected.")
    return loss.reshape(())
