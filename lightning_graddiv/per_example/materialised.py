"""Per-example gradients that are held whole, a few examples at a time, at any values of the parameters."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap

from lightning_graddiv.errors import FunctionalEngineError
from lightning_graddiv.per_example.batches import has_row_per_example, replace_leaves, select, tensor_leaves
from lightning_graddiv.per_example.functional import PerExampleGradients, run_transformed
from lightning_graddiv.per_example.losses import StepLoss
from lightning_graddiv.per_example.norms import real_view, sum_dtype, sum_of_squares

_CHUNK_BYTES = 32 * 2**20
"""Gradients held at a time; at least those of one example."""

_ACCELERATOR_CHUNK_BYTES = 512 * 2**20


def chunks(loss: StepLoss, batch: Any, total: int) -> Iterator[tuple[list[int], Any]]:
    """Yield (examples, batch of these examples) of a batch, as many at a time as memory should hold."""
    size = _chunk_size(loss.parameters)
    for start in range(0, total, size):
        examples = list(range(start, min(start + size, total)))
        yield examples, select(batch, examples, total)


def functional_rows(loss: StepLoss, values: Sequence[Tensor], batch: Any, total: int) -> list[Tensor]:
    """Return the gradients of ``total`` examples at ``values`` by ``vmap(grad)``, each of shape (total, *parameter).

    Raises:
        FunctionalEngineError: the step does not run under ``torch.func``.
    """
    leaves = tensor_leaves(batch)
    mapped = [has_row_per_example(leaf, total) for leaf in leaves]

    def loss_of_one(values: Sequence[Tensor], *rows: Tensor) -> Tensor:
        """Return the loss of a batch that holds one example."""
        alone = [row.unsqueeze(0) if one else row for row, one in zip(rows, mapped, strict=True)]
        return loss.at(values, replace_leaves(batch, alone))

    per_example = vmap(
        grad(loss_of_one), in_dims=(None, *(0 if one else None for one in mapped)), randomness="different"
    )
    return [gradient.detach() for gradient in run_transformed(per_example, values, leaves)]


def looped_rows(loss: StepLoss, values: Sequence[Tensor], batch: Any, total: int) -> list[Tensor]:
    """Return what :func:`functional_rows` does, by plain autograd, one example at a time."""
    rows = []
    for example in range(total):
        aliases = [value.detach().requires_grad_() for value in values]
        value = loss.at(aliases, select(batch, [example], total))
        found = torch.autograd.grad(value, aliases, allow_unused=True) if value.requires_grad else [None] * len(aliases)
        rows.append([torch.zeros_like(a) if g is None else g.to_dense() for a, g in zip(aliases, found, strict=True)])
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


class ExampleRows:
    """Materialises gradients by ``torch.func`` until that fails on this module, then by the loop, with one warning.

    Args:
        callback: whose name is said in the warning.
    """

    def __init__(self, callback: str) -> None:
        self._callback = callback
        self._rows = functional_rows

    def __call__(self, loss: StepLoss, values: Sequence[Tensor], batch: Any, total: int) -> list[Tensor]:
        """Return the gradients of ``total`` examples at ``values``, each of shape (total, *parameter)."""
        if self._rows is functional_rows:
            try:
                return functional_rows(loss, values, batch, total)
            except FunctionalEngineError as error:
                rows = looped_rows(loss, values, batch, total)  # if it fails too, the module is not to blame
                self.fall_back(loss, error)
                return rows
        return self._rows(loss, values, batch, total)

    def fall_back(self, loss: StepLoss, error: FunctionalEngineError) -> None:
        """Loop from now on."""
        self._rows = looped_rows
        warnings.warn(
            f"{self._callback}: `{type(loss.module).__name__}`: {error}. Falling back to one forward and backward pass "
            "per example.",
            stacklevel=2,
        )

    def engine(self, loss: StepLoss, batch: Any, total: int) -> PerExampleGradients:
        """Measure as an engine does, at the module's own parameters, for the checks that engines must pass."""
        norms, running = [], None
        for examples, part in chunks(loss, batch, total):
            rows = self(loss, [parameter.detach() for parameter in loss.parameters], part, len(examples))
            norms.append(sum_of_squares(rows, per_row=True))
            sums = [real_view(row.sum(0, dtype=sum_dtype(row))).flatten() for row in rows]
            running = sums if running is None else [a + b for a, b in zip(running, sums, strict=True)]
        return PerExampleGradients(torch.cat(norms).cpu(), torch.cat(running or []))


def _chunk_size(parameters: Sequence[Tensor]) -> int:
    budget = _CHUNK_BYTES if parameters[0].device.type == "cpu" else _ACCELERATOR_CHUNK_BYTES
    return max(1, budget // max(1, sum(p.numel() * p.element_size() for p in parameters)))
