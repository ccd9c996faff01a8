"""Squared norms, added up in float64 without float64 copies."""

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from lightning_graddiv.per_example.devices import is_accelerator

_BLOCK = 1024
"""Entries whose squares are added in float32."""

_FEWEST_IN_BLOCK = 64
"""Entries of a row that is a block of its own."""

_SMALL = 2**14
"""Entries up to which a float64 copy takes less time than a call of its own."""

_FEW = 2**15
"""Entries up to which it takes less time than looking whether squares stay in float32's range."""

_SMALLEST_SAFE_SQUARE = 1e-24
"""Above it, squares that float32 rounds to zero do not count."""

WIDE = frozenset({torch.float32, torch.float64})
"""Types in which squares are added up as they are."""

_NONE: Mapping[int, Tensor] = MappingProxyType({})


def sum_of_squares(gradients: Sequence[Tensor], *, per_row: bool = False) -> Tensor:
    """Add up squared entries over all parameters in float64; with ``per_row`` one sum for each leading index."""
    rows = gradients if per_row else [gradient.unsqueeze(0) for gradient in gradients]
    norms = [sq_norms_of_rows(of_one) for of_one in rows]
    total = norms[0] if len(norms) == 1 else torch.stack(norms).sum(0)
    return total if per_row else total[0]


def sq_norms_of_rows(values: Tensor) -> Tensor:
    """Return the squared norm of what each leading index holds, shape (n,), float64.

    On a processor in blocks: a float64 copy of a large gradient takes thirty times as long, and one float32 sum over a
    row of ten million entries is off by 7e-4. Where squares may leave float32's range, the copy after all.
    """
    values = values if values.dtype in WIDE else wide(real_view(values))
    if _takes_blocks(values):
        rows = values if values.ndim == 2 else values.reshape(values.shape[0], -1)
        is_one_block = rows.shape[1] <= _BLOCK
        of_blocks = (torch.linalg.vector_norm(rows, dim=1) if is_one_block else _in_blocks(rows)).double().square_()
        sq_norms = of_blocks if is_one_block else of_blocks.sum(1)
        smallest, largest = torch.aminmax(sq_norms)
        if float(smallest) > _SMALLEST_SAFE_SQUARE and float(largest) < math.inf:
            return sq_norms
    entries = values if values.ndim > 1 else values.unsqueeze(1)
    dims = tuple(range(1, entries.ndim))
    exact: Tensor = torch.linalg.vector_norm(entries, dim=dims, dtype=torch.float64).square_()
    return exact


def sq_norms_of_rows_of_each(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Return the squared norms of the rows of several matrices, shape (n,) each, float64.

    On a processor with few calls for those that have as many rows, if one of them is large.
    """
    found = {}
    one_block = {i: matrix for i, matrix in enumerate(matrices) if matrix.shape[1] <= _BLOCK}
    large = next((matrix for matrix in one_block.values() if _takes_blocks(matrix)), None)
    if large is not None:
        kind = large.shape[0], large.dtype, large.device
        together = [i for i, matrix in one_block.items() if (matrix.shape[0], matrix.dtype, matrix.device) == kind]
        sq_norms = torch.stack([_norms(matrices[i]) for i in together]).double().square_()
        smallest, largest = torch.aminmax(sq_norms, dim=1)
        limits = zip(together, smallest.tolist(), largest.tolist(), strict=True)
        safe = {i for i, low, high in limits if low > _SMALLEST_SAFE_SQUARE and high < math.inf}
        found = {i: of_one for i, of_one in zip(together, sq_norms, strict=True) if i in safe}
    return [found[i] if i in found else sq_norms_of_rows(matrix) for i, matrix in enumerate(matrices)]


def block_norms_of_rows(values: Tensor) -> Tensor:
    """Return norms of blocks of what each leading index holds, shape (n, blocks): their squares add up to its own."""
    return _in_blocks(wide(real_view(values)).reshape(len(values), -1))


def sq_norms_of_rows_by_width(parts: Sequence[Tensor]) -> list[Tensor]:
    """Return the squared norms of the rows of several matrices with as many rows, shape (n,) each, float64.

    Those of one width together: with as many calls as there are widths.
    """
    of_width: dict[tuple[torch.device, int], list[int]] = defaultdict(list)
    for place, part in enumerate(parts):
        of_width[part.device, part.shape[1]].append(place)
    found: dict[int, Tensor] = {}
    for places in of_width.values():
        entries = torch.stack([parts[place] for place in places])
        found |= dict(zip(places, entries.double().square_().sum(-1), strict=True))
    return [found[place] for place in range(len(parts))]


def block_norms(tensor: Tensor) -> Tensor:
    """Return norms that make up that of a tensor, of blocks of its entries; see :func:`sq_norm_of_each`."""
    tensor = wide(tensor)
    if tensor.ndim == 2 and _FEWEST_IN_BLOCK <= tensor.shape[1] <= _BLOCK and _takes_blocks(tensor):
        return _norms(tensor)
    if not _takes_blocks(tensor):
        whole: Tensor = torch.linalg.vector_norm(real_view(tensor), dtype=torch.float64)
        return whole.view(1)
    return _in_blocks(tensor.reshape(1, tensor.numel()))[0]


def differences_of(some: Collection[Tensor], others: Collection[Tensor]) -> Sequence[Tensor]:
    """Return the differences between pairs of tensors with as many entries: with one call where that is possible."""
    pairs = zip(some, others, strict=True)
    ones = [one if one.shape == other.shape else one.reshape(other.shape) for one, other in pairs]
    return torch._foreach_sub(ones, list(others)) if ones else []


def distances(some: Collection[Tensor], others: Collection[Tensor]) -> list[float]:
    """Return the norms of the differences between pairs of tensors with as many entries."""
    return [math.sqrt(sq_norm) for sq_norm in sq_norm_of_each(differences_of(some, others))]


def sq_norm_of_each(tensors: Collection[Tensor], blocks: Mapping[int, Tensor] = _NONE) -> list[float]:
    """Return the squared norm of each tensor, added up in float64; small ones at once.

    Args:
        tensors: real or complex.
        blocks: what :func:`block_norms` gave for large ones that were read before, by their place.
    """
    listed = list(tensors)
    kinds = {(tensor.device, tensor.dtype) for tensor in listed}
    if any(dtype.is_complex for _, dtype in kinds):
        listed = [real_view(tensor) for tensor in listed]
    if len({device for device, _ in kinds}) > 1:
        return [norm for of_one in listed for norm in sq_norm_of_each([of_one])]
    if not listed:
        return []
    if is_accelerator(listed[0].device):
        return _with_one_call(listed) if len(kinds) == 1 else _by_type(listed)
    lengths = [tensor.numel() for tensor in listed]
    large = {i: blocks[i] if i in blocks else block_norms(listed[i]) for i, n in enumerate(lengths) if n > _SMALL}
    parts = listed.copy()
    for i, of_blocks in large.items():
        parts[i], lengths[i] = of_blocks, of_blocks.shape[0]
    found = _sums_of_segments(flat(parts).double().square_(), lengths)
    for i, of_blocks in large.items():
        # What is lost of a block whose squares vanish is at most 1e-35.
        is_safe = _SMALLEST_SAFE_SQUARE * lengths[i] < found[i] < math.inf
        if of_blocks.dtype == torch.float32 and not is_safe:
            found[i] = float(torch.linalg.vector_norm(dense(listed[i]), dtype=torch.float64)) ** 2
    return found


def _with_one_call(tensors: list[Tensor]) -> list[float]:
    of_each = torch._foreach_norm(tensors, 2, torch.float64)
    sq_norms: list[float] = torch.stack(of_each).square_().tolist()
    return sq_norms


def _by_type(tensors: Sequence[Tensor]) -> list[float]:
    """Take those of each type together: for a mixed list the library calls once for each tensor."""
    found: dict[int, float] = {}
    for dtype in {tensor.dtype for tensor in tensors}:
        places = [place for place, tensor in enumerate(tensors) if tensor.dtype == dtype]
        found |= dict(zip(places, _with_one_call([tensors[place] for place in places]), strict=True))
    return [found[place] for place in range(len(tensors))]


def flat(tensors: Collection[Tensor]) -> Tensor:
    """Return the tensors' entries one after another."""
    return torch.cat([tensor if tensor.ndim == 1 else tensor.flatten() for tensor in tensors])


def _sums_of_segments(values: Tensor, lengths: Sequence[int]) -> list[float]:
    """Return what consecutive segments of a vector on the processor, of these lengths, add up to.

    By NumPy, which does it in half the time; but what it gives for an empty segment is not zero.
    """
    if 0 in lengths:
        sums: list[float] = torch.segment_reduce(values, "sum", lengths=torch.tensor(lengths, device="cpu")).tolist()
        return sums
    starts = list(accumulate(lengths[:-1], initial=0))
    found: list[float] = np.add.reduceat(values.detach().numpy(), starts).tolist()
    return found


def on_processor(numbers: Sequence[Tensor]) -> Tensor:
    """Stack small tensors of float64 on the processor: one transfer where they lie on one device."""
    if not numbers:
        return torch.zeros(0, dtype=torch.float64, device="cpu")
    is_together = len({number.device for number in numbers}) == 1
    return torch.stack([number if is_together else number.cpu() for number in numbers]).cpu()


def _takes_blocks(entries: Tensor) -> bool:
    return entries.numel() > _FEW and entries.dtype == torch.float32 and not is_accelerator(entries.device)


def _in_blocks(rows: Tensor) -> Tensor:
    """Return the norms of blocks of each row, shape (rows, blocks): what remains of a last one is a block too."""
    if rows.shape[1] <= _BLOCK:
        return _norms(rows).unsqueeze(1)
    rest = rows.shape[1] % _BLOCK
    norms = _norms((rows[:, :-rest] if rest else rows).unflatten(1, (-1, _BLOCK)))
    return torch.cat([norms, _norms(rows[:, -rest:]).unsqueeze(1)], 1) if rest else norms


def _norms(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-1)
    return norms


def dense(gradient: Tensor) -> Tensor:
    """Return a sparse gradient, such as an embedding's, with all its zeros; others as they are."""
    return gradient.to_dense() if gradient.is_sparse else gradient


def stored(gradient: Tensor) -> Tensor:
    """Return what a sparse gradient holds beside zeros; others as they are."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def real_view(gradient: Tensor) -> Tensor:
    """Return a complex tensor's real and imaginary parts as entries of their own; a real tensor as it is."""
    return torch.view_as_real(gradient) if gradient.is_complex() else gradient


def wide(values: Tensor) -> Tensor:
    """Return values in at least float32, in which they are summed whatever the parameters are kept in."""
    return values if values.dtype in WIDE else values.to(sum_dtype(values))


def sum_dtype(values: Tensor) -> torch.dtype:
    """Return the type that :func:`wide` gives values."""
    return values.dtype if values.dtype in WIDE else torch.promote_types(values.dtype, torch.float32)
