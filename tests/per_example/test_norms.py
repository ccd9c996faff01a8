"""Squared norms against float64 sums, for few and many entries, and at the ends of float32's range."""

import math

import pytest
import torch

from lightning_graddiv.per_example import devices
from lightning_graddiv.per_example.norms import (
    _FEW,
    block_norms,
    block_norms_of_rows,
    distances,
    sq_norm_of_each,
    sq_norms_of_rows,
    sq_norms_of_rows_by_width,
    sq_norms_of_rows_of_each,
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
    "none": [drawn(0), drawn(5), drawn(0, 3)],
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
    assert sq_norm_of_each(tensors) == pytest.approx(wanted(tensors).tolist(), rel=1e-6, abs=0)
    blocks = {i: block_norms(tensor) for i, tensor in enumerate(tensors)}
    assert sq_norm_of_each(tensors, blocks) == pytest.approx(wanted(tensors).tolist(), rel=1e-6, abs=0)


def test_norms_of_what_requires_a_gradient_are_taken_where_a_graph_is_built():
    """As those of gradients that were made with ``create_graph``, within an optimizer's closure."""
    tensors = [torch.full((3,), 2.0, requires_grad=True), drawn(_FEW + 7).requires_grad_() * 1.0]
    assert sq_norm_of_each(tensors) == pytest.approx(wanted(tensors).tolist(), rel=1e-6)


def test_no_tensors_have_no_norms():
    assert sq_norm_of_each([]) == []


@pytest.mark.parametrize("name", TENSORS)
def test_an_accelerator_takes_those_of_several_tensors_with_one_call(name, monkeypatch):
    monkeypatch.setattr(devices, "_PROCESSORS", frozenset())
    assert sq_norm_of_each(TENSORS[name]) == pytest.approx(wanted(TENSORS[name]).tolist(), rel=1e-6, abs=0)


@pytest.mark.parametrize("name", [name for name in ROWS if "too small" not in name])
def test_norms_of_blocks_of_rows_make_up_those_of_the_rows(name):
    values = ROWS[name]()
    blocks = block_norms_of_rows(values)
    assert blocks.dtype == torch.float32
    torch.testing.assert_close(blocks.double().square().sum(1), sq_norms_of_rows(values), rtol=1e-6, atol=0.0)


def test_norms_of_rows_of_several_matrices_keep_their_order():
    parts = [drawn(4, 3), drawn(4, 5), 2 * drawn(4, 3), drawn(4, 1), drawn(4, 5)]
    for found, part in zip(sq_norms_of_rows_by_width(parts), parts, strict=True):
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, part.double().square().sum(1))
    assert sq_norms_of_rows_by_width([]) == []


@pytest.mark.parametrize("processors", [frozenset({"cpu"}), frozenset()], ids=["processor", "accelerator"])
def test_norms_of_rows_of_large_and_small_matrices_keep_their_order(processors, monkeypatch):
    monkeypatch.setattr(devices, "_PROCESSORS", processors)
    calls, original = [], torch.aminmax
    monkeypatch.setattr(torch, "aminmax", lambda *args, **kwargs: (calls.append(args), original(*args, **kwargs))[1])
    large = [drawn(64, 784), drawn(64, 1024, scale=3.0), drawn(64, 520)]
    others = {
        "small": drawn(64, 10),
        "of several blocks": drawn(64, 1500),
        "too small for float32": drawn(64, 1000, scale=1e-30),
        "too large for float32": drawn(64, 900, scale=1e25),
        "a row of zeros": torch.cat([torch.zeros(1, 600), drawn(63, 600)]),
        "float64": drawn(64, 1024, dtype=torch.float64),
        "other precision": drawn(64, 1024, dtype=torch.bfloat16),
        "fewer rows": drawn(40, 1000),
    }
    matrices = [large[0], *others.values(), *large[1:]]
    for found, matrix in zip(sq_norms_of_rows_of_each(matrices), matrices, strict=True):
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, matrix.double().square().sum(1), rtol=1e-6, atol=0.0)
    calls.clear()
    sq_norms_of_rows_of_each(large)
    assert len(calls) == (1 if processors else 0)  # an accelerator looks at no range
    assert sq_norms_of_rows_of_each([]) == []


@pytest.mark.parametrize("processors", [frozenset({"cpu"}), frozenset()], ids=["processor", "accelerator"])
def test_distances_are_those_of_float64(processors, monkeypatch):
    monkeypatch.setattr(devices, "_PROCESSORS", processors)
    some = [drawn(3, 4), drawn(5), drawn(300, 200), drawn(2, 2).bfloat16()]
    others = [2 * drawn(12), drawn(5), drawn(200, 300).T + 1, drawn(4)]
    expected = [
        float(torch.linalg.vector_norm(a.double().reshape(b.shape) - b.double()))
        for a, b in zip(some, others, strict=True)
    ]
    assert distances(some, others) == pytest.approx(expected, rel=1e-6)
    assert distances([], []) == []
