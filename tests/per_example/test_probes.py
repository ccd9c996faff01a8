"""Random directions: what is wrong with a gradient shows in them."""

import math

import pytest
import torch

from lightning_graddiv.per_example import ledger
from lightning_graddiv.per_example.directions import Directions
from lightning_graddiv.per_example.probes import Probe, image_of

SHAPES = [(), (4,), (3, 5), (4, 2, 3, 3)]


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def directions_of(shape, seed=1):
    return Directions([torch.zeros(shape, dtype=torch.float64)], seed)


def probe_of(shape, seed=1):
    return directions_of(shape, seed).probe(0)


def right_of(shape, seed=1):
    return directions_of(shape, seed).right(0)


def projected(probe, gradient):
    matrix = gradient.reshape(probe.left.shape[1], probe.right.shape[1])
    return torch.stack([left @ matrix @ right for left, right in zip(probe.left, probe.right, strict=True)])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_gradient_that_is_wrong_in_one_entry_is_noticed(shape):
    torch.manual_seed(0)
    probe, right, gradient = probe_of(shape), right_of(shape), normal(*shape)
    projections = probe.of(gradient)
    assert projections.shape == (4,)
    torch.testing.assert_close(projections, projected(probe, gradient), rtol=1e-12, atol=1e-12)
    for entry in range(gradient.numel()):
        wrong = gradient.clone()
        wrong.view(-1)[entry] += 0.5
        assert float((probe.of(wrong) - projections).abs().max()) > 1e-3
        assert float((image_of(wrong, right) - image_of(gradient, right)).norm()) > 1e-3


@pytest.mark.parametrize(("shape", "difference"), [((2,), [1, -1]), ((2, 3), [[1, 2, 3], [-1, -2, -3]])], ids=str)
def test_a_gradient_that_is_wrong_by_what_sums_to_zero_is_noticed_whatever_the_seed(shape, difference):
    """Logits of two classes have such gradients: one is the other's negative."""
    wrong = torch.tensor(difference, dtype=torch.float64)
    for seed in range(200):
        assert float(probe_of(shape, seed).of(wrong).abs().max()) > 1e-6
        assert float(image_of(wrong, right_of(shape, seed)).norm()) > 1e-6


def test_an_image_is_as_long_as_the_gradient_on_average_whatever_its_rank():
    torch.manual_seed(0)
    full = normal(40, 60)
    for gradient in (full, full[:, :1] @ full[:1], full.reshape(40, 3, 4, 5)):
        lengths = torch.stack(
            [image_of(gradient, right_of(gradient.shape, seed)).square().sum() for seed in range(2000)]
        )
        assert float(lengths.mean() / gradient.square().sum()) == pytest.approx(1, abs=0.15)


def test_a_difference_of_rank_one_is_overlooked_as_rarely_as_is_said():
    """Of a tenth of the gradient, whose norm is that of the examples' gradients together."""
    torch.manual_seed(0)
    difference = normal(3, 1) @ normal(1, 50)
    difference *= 0.1 / difference.norm()
    lengths = torch.stack([image_of(difference, right).norm() for right in normal(60_000, 50)])
    relative, _ = ledger._ROUNDING[32]
    overlooked = float((lengths <= relative * math.sqrt(1 + 1)).double().mean())
    assert 1 / overlooked == pytest.approx(443, rel=0.25)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_contributions_to_low_precision_parameters_are_projected_in_single_precision(dtype):
    parameter = torch.zeros(3, 1000, dtype=dtype)
    directions = Directions([parameter], 0)
    probe, right = directions.probe(0), directions.right(0)
    gradient = torch.rand(3, 1000).to(dtype)
    expected = projected(Probe(probe.left.double(), probe.right.double()), gradient.double())
    torch.testing.assert_close(probe.of(gradient), expected, rtol=0, atol=1e-3)
    seen = gradient.double() @ right.double()
    torch.testing.assert_close(image_of(gradient, right).double(), seen, rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)], ids=str)
def test_an_empty_parameter_has_projections_of_zero(shape):
    nothing = torch.zeros(shape, dtype=torch.float64)
    assert probe_of(shape).of(nothing).tolist() == [0.0] * 4
    assert image_of(nothing, right_of(shape)).tolist() == [0.0] * shape[0]
    assert directions_of(shape).image_of(0, nothing.flatten()).tolist() == [0.0] * shape[0]
