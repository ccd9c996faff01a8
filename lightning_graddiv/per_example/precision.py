"""How exactly torch multiplies float32 numbers.

Users set it by older names or by newer ones; the older ones cannot be read once the newer have been used.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.backends import cuda, cudnn, mkldnn

Choice = TypeVar("Choice")

_CUDNN: Any = cudnn
_ONE_DNN: Any = mkldnn
_ON_GPU: tuple[Any, ...] = (cuda.matmul, _CUDNN.conv, _CUDNN.rnn)
_ON_PROCESSOR: tuple[Any, ...] = (_ONE_DNN.matmul, _ONE_DNN.conv, _ONE_DNN.rnn)
_OPERATORS = (*_ON_GPU, *_ON_PROCESSOR)


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 products in float32, or the tensor cores' rounding would look like mixing."""
    before = [(of, of.fp32_precision) for of in _OPERATORS]
    matrices = _or_none(torch.get_float32_matmul_precision)
    others = _or_none(lambda: cudnn.allow_tf32)
    if matrices not in (None, "highest"):
        torch.set_float32_matmul_precision("highest")
    if others:
        cudnn.allow_tf32 = False
    for of in filter(_rounds, _OPERATORS):
        of.fp32_precision = "ieee"
    try:
        yield
    finally:
        if matrices not in (None, "highest"):
            torch.set_float32_matmul_precision(matrices)
        if others:
            cudnn.allow_tf32 = True
        for of, precision in before:
            if of.fp32_precision != precision:
                of.fp32_precision = precision


def rounds_products(device: torch.device) -> bool:
    """Tell whether factors of float32 products may be rounded to ten bits or fewer, as by a GPU's tensor cores."""
    if device.type == "cuda":
        return any(map(_rounds, _ON_GPU))
    return any(of.fp32_precision == "bf16" for of in _ON_PROCESSOR)  # no processor has tf32


def _rounds(of: Any) -> bool:
    return of.fp32_precision in {"tf32", "bf16"}


def _or_none(read: Callable[[], Choice]) -> Choice | None:
    """Return what is set by an older name; None once a newer one has been used."""
    try:
        return read()
    except RuntimeError:
        return None
