"""Per-example gradients by ``torch.func``, and by the plain loop that is the reference for every other engine."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from lightning_graddiv.diversity import GradientSums
from lightning_graddiv.errors import FunctionalEngineError, MeasurementError
from lightning_graddiv.per_example.batches import has_row_per_example, replace_leaves, select, tensor_leaves
from lightning_graddiv.per_example.copier import OutsideTensor
from lightning_graddiv.per_example.fingerprint import graph_nodes
from lightning_graddiv.per_example.losses import StepLoss, Watch
from lightning_graddiv.per_example.norms import dense, on_processor, real_view, sum_dtype, sum_of_squares

_CHUNK_BYTES = 32 * 2**20
"""Per-example gradients that are held at a time: what a processor's cache can serve. At least one example."""

_ACCELERATOR_CHUNK_BYTES = 512 * 2**20


@dataclass(frozen=True)
class PerExampleGradients:
    """What is kept of n per-example gradients.

    Attributes:
        sq_norms: their squared norms, shape (n,), float64, on the processor.
        gradient_sum: their sum, shape (d,), where the parameters are.
    """

    sq_norms: Tensor
    gradient_sum: Tensor

    def sums(self) -> GradientSums:
        """Return what the examples add up to."""
        return GradientSums(float(len(self.sq_norms)), float(self.sq_norms.sum()), self.gradient_sum)


def loop_gradients(loss: StepLoss, batch: Any, total: int) -> PerExampleGradients:
    """Differentiate one example at a time with plain autograd: slow, and right wherever a batch of one makes sense.

    Args:
        loss: the step's loss.
        batch: a batch of ``total`` examples.
        total: the number of examples.

    Raises:
        MeasurementError: an example's loss or gradient is not finite, or the step fails on one example.
    """
    norms: list[Tensor] = []
    running: list[Tensor] | None = None
    with splitting(loss):
        for example in range(total):
            gradients = differentiate(loss, select(batch, [example], total))
            norms.append(sum_of_squares(gradients))
            require_finite(norms[-1])
            if running is None:  # two parameters may be given one and the same tensor: never added to in place
                running = [torch.zeros_like(gradient, dtype=sum_dtype(gradient)) for gradient in gradients]
            running = [a.add_(b) for a, b in zip(running, gradients, strict=True)]
    return PerExampleGradients(on_processor(norms), _flatten(running or []))


@contextmanager
def splitting(loss: StepLoss) -> Iterator[None]:
    """Say that splitting is what failed, where the step runs on a whole batch but not on a part of it."""
    try:
        yield
    except (MeasurementError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise MeasurementError(
            f"`{type(loss.module).__name__}` cannot be differentiated on a part of its batch "
            f"({type(error).__name__}: {reason}), so the batch cannot be split into examples.",
            lasting=True,
        ) from error


def differentiate(loss: StepLoss, batch: Any, watch: Watch | None = None) -> list[Tensor]:
    """Return the gradients of the batch's loss for every parameter; zero where the loss does not depend on one.

    Args:
        loss: the step's loss.
        batch: the batch.
        watch: see :class:`.StepLoss`.

    Raises:
        MeasurementError: the loss is not finite, or depends on a graph from outside of the step.
    """
    value = loss(batch, watch)
    require_finite(value, "loss")
    if not value.requires_grad:  # an example may add nothing, such as an image without objects
        return [torch.zeros_like(parameter) for parameter in loss.parameters]
    found: Sequence[Tensor | None]
    if _hides_parameters(value):
        found = loss.gradients_at_aliases(batch, watch)
    else:
        found = torch.autograd.grad(value, loss.parameters, allow_unused=True)
    return [
        torch.zeros_like(parameter) if gradient is None else dense(gradient)
        for parameter, gradient in zip(loss.parameters, found, strict=True)
    ]


def require_finite(numbers: Tensor, what: str = "gradient") -> None:
    """Raise ``MeasurementError`` for infinities and NaN."""
    if not bool(torch.isfinite(numbers).all()):
        raise MeasurementError(f"The {what} of an example or batch is not finite, so this measurement was dropped.")


def _hides_parameters(loss: Tensor) -> bool:
    """Tell whether a re-entrant checkpoint hides parameters from autograd; refuse graphs from elsewhere."""
    hides = False
    for node in graph_nodes(loss):
        hides |= "CheckpointFunction" in node.name()
        leaf = getattr(node, "variable", None)
        if leaf is not None and OutsideTensor.is_marked(leaf):
            raise MeasurementError(
                "The loss depends on a tensor with a gradient that was computed before training_step began and kept in "
                "the module: it cannot be computed again for one example. Compute it in training_step, or detach it.",
                lasting=True,
            )
    return hides


def functional_gradients(loss: StepLoss, batch: Any, total: int) -> PerExampleGradients:
    """Differentiate all examples at once with ``vmap(grad)``, in chunks, so that memory does not grow with the batch.

    Random masks are drawn afresh for each example.

    Args:
        loss: the step's loss.
        batch: a batch of ``total`` examples.
        total: the number of examples.

    Raises:
        FunctionalEngineError: the step does not run under ``torch.func``, or a loss or gradient is not finite there.
    """
    values = [parameter.detach() for parameter in loss.parameters]
    rows = _ExampleRows(batch, total)
    per_example = vmap(
        grad_and_value(lambda values, *leaves: loss.at(values, rows.batch_of_one(leaves))),
        in_dims=(None, *rows.in_dims),
        randomness="different",
    )
    norms: list[Tensor] = []
    running: list[Tensor] | None = None
    for leaves in rows.chunks(_chunk_size(values)):
        gradients, losses = run_transformed(per_example, values, leaves)
        gradients = [gradient.detach() for gradient in gradients]
        norms.append(sum_of_squares(gradients, per_row=True))
        if not bool(torch.isfinite(losses).all() and torch.isfinite(norms[-1]).all()):
            # The loop tells whether the loss or its gradient is to blame, or a metric's value in the loss.
            raise FunctionalEngineError("the loss or its gradient is not finite under torch.func.vmap")
        sums = [gradient.sum(0, dtype=sum_dtype(gradient)) for gradient in gradients]
        running = sums if running is None else [a.add_(b) for a, b in zip(running, sums, strict=True)]
    return PerExampleGradients(torch.cat(norms).cpu(), _flatten(running or []))


class _ExampleRows:
    """The tensors of a batch with a row per example: those that ``vmap`` maps over."""

    def __init__(self, batch: Any, total: int) -> None:
        self._batch, self._total = batch, total
        self._leaves = tensor_leaves(batch)
        self._mapped = [has_row_per_example(leaf, total) for leaf in self._leaves]
        self.in_dims = [0 if mapped else None for mapped in self._mapped]

    def batch_of_one(self, leaves: Sequence[Tensor]) -> Any:
        """Return a batch of one example from its leaves, which have no dimension of examples."""
        rows = [leaf.unsqueeze(0) if mapped else leaf for leaf, mapped in zip(leaves, self._mapped, strict=True)]
        return replace_leaves(self._batch, rows)

    def chunks(self, size: int) -> Iterator[list[Tensor]]:
        """Yield the leaves of at most so many examples at a time."""
        for start in range(0, self._total, size):
            yield [
                leaf[start : start + size] if mapped else leaf
                for leaf, mapped in zip(self._leaves, self._mapped, strict=True)
            ]


def run_transformed(per_example: Any, values: Sequence[Tensor], leaves: Sequence[Tensor]) -> Any:
    """Call what ``vmap`` has made of a function of the parameters' values and of a batch's tensors.

    Raises:
        FunctionalEngineError: it does not run so.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")
            return per_example(list(values), *leaves)
    except (MeasurementError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise FunctionalEngineError(
            f"it does not run under torch.func.vmap ({type(error).__name__}: {reason})", lasting=True
        ) from error


def _chunk_size(values: Sequence[Tensor]) -> int:
    budget = _CHUNK_BYTES if values[0].device.type == "cpu" else _ACCELERATOR_CHUNK_BYTES
    return max(1, budget // max(1, sum(value.numel() * value.element_size() for value in values)))


def _flatten(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([real_view(gradient).flatten() for gradient in gradients])
