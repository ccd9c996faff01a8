"""Squared norms against float64 sums, for few and many entries, and at the ends of float32's range."""

import pytest
import torch

from lightning_graddiv.per_example.norms import _FEW, sum_of_squares

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
