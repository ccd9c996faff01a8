"""Squared norms against float64 sums, for few and many entries, and at the ends of float32's range."""

import math

import pytest
import torch

from lightning_graddiv.per_example.norms import (
    _FEW,
    block_norms,
    sq_norm_of_each,
    sq_norms_of_blocks,
    sq_norms_of_rows,
    sum_of_squares,
)

FEW, MANY = (4, _FEW // 4), (4, _FEW // 4 + 1)


@pytest.mark.parametrize("shape", [FEW, MANY, (3, 5), (1, 4 * _FEW)], ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e25])
@pytest.mark.parametrize("per_row", [True, False])
def test_they_are_those_of_float64(shape, scale, per_row):
    values = scale * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    wanted = values.double().square().sum(1)
    found = sum_of_squares([values], per_row=per_row)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wanted if per_row else wanted.sum(), rtol=1e-6, atol=0.0)


ROWS = {
    "many dimensions": lambda: drawn(4, 3, 5, _FEW // 20),
    "transposed": lambda: drawn(3, 5, _FEW // 20, 4).permute(3, 1, 0, 2),
    "transposed, too small for float32": lambda: drawn(3, 5, _FEW // 20, 4, scale=1e-30).permute(3, 1, 0, 2),
    "numbers": lambda: drawn(4),
    "many numbers": lambda: drawn(_FEW + 1),
    "rows of nothing": lambda: drawn(4, 0, 3),
}


@pytest.mark.parametrize("name", ROWS)
def test_norms_of_rows_of_any_shape_are_those_of_float64(name):
    values = ROWS[name]()
    expected = values.double().reshape(len(values), math.prod(values.shape[1:])).square().sum(1)
    torch.testing.assert_close(sq_norms_of_rows(values), expected, rtol=1e-6, atol=0.0)


def drawn(*shape, scale=1.0, dtype=torch.float32):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).to(dtype)


def wanted(tensors):
    return torch.stack([tensor.to(torch.complex128).abs().square().sum() for tensor in tensors])


TENSORS = {
    "whole blocks": [drawn(64, 1024), drawn(1024, 48)],
    "a last block that is not full": [drawn(333, 1001), drawn(_FEW + 1)],
    "few entries": [drawn(5), drawn(3, 2), drawn()],
    "few and many": [drawn(5), drawn(_FEW + 7), drawn(5000)],
    "too small and too large for float32": [drawn(_FEW + 5, scale=1e-30), drawn(_FEW + 5, scale=1e25), drawn(_FEW + 1)],
    "zeros among others": [torch.cat([torch.zeros(40, 1024), drawn(40, 1024)]), torch.zeros(_FEW + 1)],
    "other precisions": [drawn(_FEW + 9, dtype=torch.bfloat16), drawn(_FEW + 9, dtype=torch.float64)],
    "transposed": [drawn(300, 500).T],
    "complex": [torch.complex(drawn(_FEW + 1), 2 * drawn(_FEW + 1)), drawn(7)],
}


@pytest.mark.parametrize("name", TENSORS)
def test_norms_of_several_tensors_are_those_of_float64(name):
    tensors = TENSORS[name]
    torch.testing.assert_close(sq_norm_of_each(tensors), wanted(tensors), rtol=1e-6, atol=0.0)
    by_blocks = sq_norms_of_blocks([block_norms(tensor) for tensor in tensors], tensors)
    assert by_blocks.dtype == torch.float64
    torch.testing.assert_close(by_blocks, wanted(tensors), rtol=1e-6, atol=0.0)


def test_no_tensors_have_no_norms():
    assert sq_norms_of_blocks([], []).shape == sq_norm_of_each([]).shape == (0,)
