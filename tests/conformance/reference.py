"""Per-example gradient norms the plain way, written without the package, and a verdict on what the package finds."""

import copy
import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_graddiv import MeasurementError, per_example_squared_norms
from tests.devices import DEVICE

LossFunction = Callable[[nn.Module, Any], Tensor]

Take = Callable[[Any, int, int], Any]
"""(batch, example, examples) -> the batch of this example alone."""

RELATIVE = {torch.float32: 1e-4 if DEVICE == "cpu" else 1e-3, torch.float64: 1e-9}
"""What rounding may do to the squared norm of one example, as a share of that very norm: there is no absolute floor."""


class Verdict(NamedTuple):
    """What became of a measurement: ``detail`` is the worst relative error, or the message of a refusal."""

    kind: Literal["right", "refused", "wrong"]
    detail: str


def take(batch: Any, example: int, examples: int) -> Any:
    """Return one example of a batch: a row of each tensor, and of each list of plain values, that has one for each."""
    if isinstance(batch, Tensor):
        return batch[example : example + 1] if batch.ndim and len(batch) == examples else batch
    if isinstance(batch, Mapping):
        return type(batch)({key: take(value, example, examples) for key, value in batch.items()})
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        parts = {f.name: take(getattr(batch, f.name), example, examples) for f in dataclasses.fields(batch)}
        return dataclasses.replace(batch, **parts)
    if isinstance(batch, tuple | list):
        return _take_from_sequence(batch, example, examples)
    return batch


def _take_from_sequence(batch: Any, example: int, examples: int) -> Any:
    if len(batch) == examples and all(isinstance(value, str | int | float) for value in batch):
        return batch[example : example + 1]
    parts = [take(value, example, examples) for value in batch]
    return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)


def reference_norms(module: nn.Module, batch: Any, loss: LossFunction, examples: int, pick: Take = take) -> Tensor:
    """Differentiate each example on a copy of the module, one after the other."""
    norms = []
    for example in range(examples):
        alone = copy.deepcopy(module)
        alone.zero_grad(set_to_none=True)
        value = loss(alone, pick(batch, example, examples))
        if value.requires_grad:  # an example may add nothing
            value.backward()
        norms.append(
            sum((_sq_norm(p.grad) for p in alone.parameters() if p.grad is not None), torch.zeros(()).double())
        )
    return torch.stack(norms).cpu()


def _sq_norm(gradient: Tensor) -> Tensor:
    dense = gradient.to_dense() if gradient.is_sparse else gradient
    real = torch.view_as_real(dense) if dense.is_complex() else dense
    return real.double().square().sum()


def judge(
    module: nn.Module,
    batch: Any,
    loss: LossFunction,
    examples: int,
    dtype: torch.dtype,
    *,
    pick: Take = take,
    engine: str = "auto",
) -> Verdict:
    """Measure with the package and compare each example with the plain loop."""
    wanted = reference_norms(module, batch, loss, examples, pick)
    assert bool(wanted.isfinite().all()), "a pattern whose own reference is not finite shows nothing"
    try:
        with warnings.catch_warnings():  # which engine it takes is its own affair
            warnings.filterwarnings("ignore", "Engine `functional` cannot measure")
            found = per_example_squared_norms(module, batch, loss_fn=loss, engine=engine)
    except MeasurementError as error:
        return Verdict("refused", str(error))
    if found.shape != wanted.shape:
        return Verdict("wrong", f"{tuple(found.shape)} norms for {tuple(wanted.shape)} examples")
    error = _worst_relative_error(found, wanted)
    return Verdict("right" if error <= RELATIVE[dtype] else "wrong", f"{error:.1e}")


def _worst_relative_error(found: Tensor, wanted: Tensor) -> float:
    error = (found - wanted).abs()
    relative = torch.where(wanted > 0, error / wanted.clamp(min=torch.finfo(torch.float64).tiny), error)
    relative = torch.where((wanted == 0) & (error > 0), torch.inf, relative)  # an exact zero is exactly zero
    return float(relative.max())


def agrees(verdict: Verdict, refusal: str | None) -> bool:
    """Tell whether a verdict is the expected one: right, or refused for a reason that matches."""
    if refusal is None:
        return verdict.kind == "right"
    return verdict.kind == "refused" and re.search(refusal, verdict.detail) is not None


def curved(output: Tensor) -> Tensor:
    """Return a loss for each row: neither linear nor symmetric, so that no two errors cancel by accident."""
    rows = output.flatten(1)
    rows = torch.view_as_real(rows).flatten(1) if rows.is_complex() else rows
    weights = torch.linspace(0.5, 1.5, rows.shape[1], dtype=rows.dtype, device=rows.device)
    return (weights * rows.square() + rows.sin()).sum(1)
