"""Bounds under DropConnect, Langevin noise and quantisation, against surrogates that are really drawn."""

import math

import pytest
import torch

from lightning_graddiv import batch_size_bound
from lightning_graddiv.theory import (
    MechanismEffect,
    drop_connect_batch_size_bound,
    langevin_batch_size_bound,
    mechanism_batch_size_bound,
    quantization_factor,
    quantized_batch_size_bound,
)

N, D, DRAWS = 10, 6, 40_000
GENERATOR = torch.Generator().manual_seed(0)
GRADIENTS = torch.randn(N, D, generator=GENERATOR, dtype=torch.float64) + 0.5
BOUND = float(batch_size_bound(GRADIENTS))


def uniform(seed: int) -> torch.Tensor:
    return torch.rand(DRAWS, N, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drop_connect(p: float) -> torch.Tensor:
    return GRADIENTS * (uniform(1) >= p)


def langevin(sigma: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return GRADIENTS + sigma * torch.randn(DRAWS, N, D, generator=generator, dtype=torch.float64)


def quantized() -> torch.Tensor:
    norms = GRADIENTS.norm(dim=1, keepdim=True)
    return norms * GRADIENTS.sign() * (uniform(3) < GRADIENTS.abs() / norms)


def drawn_bound(surrogates: torch.Tensor) -> tuple[float, float]:
    """``n sum E|g_i'|^2 / E|sum g_i'|^2`` over draws of shape (DRAWS, N, D), and its standard error."""
    own, whole = surrogates.square().sum((1, 2)), surrogates.sum(1).square().sum(1)
    ratio = float(own.mean() / whole.mean())
    residuals = own - ratio * whole
    return N * ratio, N * float(residuals.std() / whole.mean()) / math.sqrt(DRAWS)


CASES = {
    "p=.4": (drop_connect(0.4), drop_connect_batch_size_bound(BOUND, 0.4, N)),
    "p=.9": (drop_connect(0.9), drop_connect_batch_size_bound(BOUND, 0.9, N)),
    "sigma=.3": (
        langevin(0.3),
        langevin_batch_size_bound(
            float(GRADIENTS.square().sum(1).mean()),
            float(GRADIENTS.mean(0).square().sum()),
            sigma=0.3,
            parameters=D,
            dataset_size=N,
        ),
    ),
    "quantised": (quantized(), quantized_batch_size_bound(GRADIENTS)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_bound_is_that_of_drawn_surrogates(case):
    surrogates, expected = CASES[case]
    found, se = drawn_bound(surrogates)
    assert abs(found - expected) < 4 * se
    assert se < 0.01 * expected


@pytest.mark.parametrize("case", CASES)
def test_theorem_7_none_is_below_what_it_was(case):
    assert BOUND < N
    assert CASES[case][1] > BOUND


def test_each_is_a_factor_on_the_second_moment():
    second, squared = float(GRADIENTS.square().sum(1).mean()), float(GRADIENTS.mean(0).square().sum())
    kappas = {"p=.4": 1 / 0.6, "sigma=.3": 1 + D * 0.09 / second, "quantised": quantization_factor(GRADIENTS)}
    for case, kappa in kappas.items():
        assert CASES[case][1] == pytest.approx(mechanism_batch_size_bound(BOUND, kappa, N), rel=1e-12)
    assert second / squared == pytest.approx(BOUND)


def test_on_a_stream_the_bound_is_that_many_times_larger():
    assert drop_connect_batch_size_bound(50, 0.5) == pytest.approx(100)
    assert langevin_batch_size_bound(4.0, 0.1, sigma=0.5, parameters=16) == pytest.approx(80)
    assert mechanism_batch_size_bound(50, 3) == 150
    for n, tolerance in ((10**4, 0.05), (10**7, 1e-4)):
        assert drop_connect_batch_size_bound(50, 0.5, n) == pytest.approx(100, rel=tolerance)


def test_the_factor_of_quantisation_is_that_of_its_draws():
    kappa = float(quantized().square().sum(2).mean() / GRADIENTS.square().sum(1).mean())
    assert quantization_factor(GRADIENTS) == pytest.approx(kappa, rel=0.01)
    torch.testing.assert_close(quantized().mean(0), GRADIENTS, rtol=0, atol=0.06)
    assert quantization_factor(torch.eye(4)) == 1
    assert quantization_factor(torch.ones(1, 16)) == pytest.approx(4)


class TestEffect:
    """What one mechanism did to a step's gradient, and two in a row."""

    def test_noise_on_a_mean_is_noise_on_each_example(self):
        effect = MechanismEffect(scale=1.0, variance=D * 0.09 / 64, sum_sq_weights=1 / 64)
        assert effect.second_moment(4.0) == pytest.approx(4.0 + D * 0.09)
        assert effect.sq_norm(0.5) == 0.5

    def test_masks_per_example_give_the_bound_of_drop_connect(self):
        p, second, squared = 0.4, 4.0, 0.1
        effect = MechanismEffect(1 - p, variance=p * (1 - p) * second / 64, sum_sq_weights=1 / 64)
        found = effect.second_moment(second) / effect.sq_norm(squared)
        assert found == pytest.approx(drop_connect_batch_size_bound(second / squared, p))

    def test_two_in_a_row(self):
        first, second = MechanismEffect(0.5, 0.2, 0.1), MechanismEffect(2.0, 0.3, 0.1)
        both = first.then(second)
        assert (both.scale, both.variance) == pytest.approx((1.0, 4 * 0.2 + 0.3))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: drop_connect_batch_size_bound(5, 1.0), "probability"),
        (lambda: mechanism_batch_size_bound(0.5, 2), "bound"),
        (lambda: mechanism_batch_size_bound(5, 0.9), "factor"),
        (lambda: langevin_batch_size_bound(1, 2, sigma=1, parameters=3), "sq_norm"),
        (lambda: langevin_batch_size_bound(2, 1, sigma=-1, parameters=3), "sigma"),
        (lambda: quantization_factor(torch.zeros(2, 2)), "gradients"),
    ],
)
def test_out_of_range_is_refused_by_name(call, name):
    with pytest.raises(ValueError, match=f"Expected argument `{name}` to be"):
        call()
