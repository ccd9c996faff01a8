"""Squared norms, added up in float64 without float64 copies."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

_BLOCK = 1024
"""Entries whose squares are added in float32."""

_SMALL = 4096
"""Entries up to which a float64 copy takes less time than a call of its own."""

_SMALLEST_SAFE_SQUARE = 1e-24
"""Above it, squares that float32 rounds to zero do not count."""


def sum_of_squares(gradients: Sequence[Tensor], *, per_row: bool = False) -> Tensor:
    """Add up squared entries over all parameters in float64; with ``per_row`` one sum for each leading index."""
    rows = [_rows(real_view(gradient), len(gradient) if per_row else 1) for gradient in gradients]
    total = torch.stack([_sq_norms(entries.to(sum_dtype(entries))) for entries in rows]).sum(0)
    return total if per_row else total[0]


def sq_norm_of_each(tensors: Collection[Tensor]) -> Tensor:
    """Return the squared norm of each tensor, shape (len(tensors),), float64, on the processor; small ones at once."""
    small = [i for i, tensor in enumerate(tensors) if tensor.numel() <= _SMALL]
    norms = {i: sum_of_squares([tensor]) for i, tensor in enumerate(tensors) if tensor.numel() > _SMALL}
    listed = list(tensors)
    for device in {listed[i].device for i in small}:
        chosen = [i for i in small if listed[i].device == device]
        entries = [real_view(listed[i]).flatten() for i in chosen]
        squares = torch.cat(entries).double().square_().split([len(own) for own in entries])
        norms |= dict(zip(chosen, torch.stack([own.sum() for own in squares]).cpu(), strict=True))
    if not norms:
        return torch.zeros(0, dtype=torch.float64)
    return torch.stack([norms[i].cpu() for i in range(len(norms))])


def _sq_norms(rows: Tensor) -> Tensor:
    """Return the squared norm of each row, float64.

    On a processor in blocks: a float64 copy of every gradient takes thirty times as long, and one float32 sum over a
    row of ten million entries is off by 7e-4. Where squares may leave float32's range, the copy after all.
    """
    if rows.device.type == "cpu" and rows.dtype == torch.float32:
        whole = rows.shape[1] // _BLOCK * _BLOCK
        blocks = rows[:, :whole].reshape(len(rows), whole // _BLOCK, _BLOCK)
        norms = torch.cat(
            [torch.linalg.vector_norm(part, dim=-1).double() for part in (blocks, rows[:, None, whole:])], 1
        )
        sq_norms = norms.square().sum(-1)
        if bool(((sq_norms > _SMALLEST_SAFE_SQUARE) & sq_norms.isfinite()).all()):
            return sq_norms
    exact: Tensor = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64).square()
    return exact


def _rows(values: Tensor, rows: int) -> Tensor:
    return values.reshape(rows, values.numel() // max(1, rows))  # -1 would not do for parameters without entries


def real_view(gradient: Tensor) -> Tensor:
    """Return a complex tensor's real and imaginary parts as entries of their own; a real tensor as it is."""
    return torch.view_as_real(gradient) if gradient.is_complex() else gradient


def sum_dtype(gradient: Tensor) -> torch.dtype:
    """Sum in at least float32, whatever the parameters are kept in."""
    return torch.promote_types(gradient.dtype, torch.float32)
