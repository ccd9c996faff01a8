"""Products of large matrices and vectors: the same on all threads as on one."""

import pytest
import torch

from lightning_graddiv.per_example import devices, products
from lightning_graddiv.per_example.products import _FEW, matrix_vector, vector_matrix

SHAPES = {
    "large": (2048, 1024),
    "a number of rows that threads cannot share": (2047, 1024),
    "small": (8, 6),
    "one row": (1, _FEW + 1),
    "no rows": (0, 3),
}


@pytest.fixture(params=[1, 2, 6])
def threads(request, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    return request.param


@pytest.mark.parametrize("transposed", [False, True], ids=["as it lies", "transposed"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_products_are_those_of_one_thread(shape, transposed, threads):
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    matrix = matrix.T.contiguous().T if transposed else matrix
    left, right = (torch.randn(size, dtype=torch.float64) for size in shape)
    torch.testing.assert_close(matrix_vector(matrix, right), (matrix * right).sum(1))
    torch.testing.assert_close(vector_matrix(left, matrix), (left[:, None] * matrix).sum(0))


def test_threads_share_rows_that_they_can_divide(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    large = torch.zeros(2048, 1024)
    assert products._pieces(large) == 2
    assert products._pieces(large[:2040]) == 6
    assert products._pieces(large[:1024]) == products._pieces(large.T) == products._pieces(large[:, :600]) == 1
    monkeypatch.setattr(devices, "_PROCESSORS", frozenset())
    assert products._pieces(large) == 1
