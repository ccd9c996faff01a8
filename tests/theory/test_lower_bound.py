"""Theorem 6: what the construction settles at, simulated."""

import math

import pytest
import torch

from lightning_graddiv import batch_size_bound
from lightning_graddiv.theory import LowerBoundProblem, lower_bound_error


def simulated(problem, step_size, batch_size, steps, *, replacement, runs=4000, seed=0) -> torch.Tensor:
    """Squared norms after so many steps from 0, one a run, by per-example gradients and nothing else."""
    generator = torch.Generator().manual_seed(seed)
    n, d = problem.centres.shape
    w = torch.zeros(runs, d, dtype=torch.float64)
    for _ in range(steps):
        if replacement:
            batch = torch.randint(n, (runs, batch_size), generator=generator)
        else:
            batch = torch.rand(runs, n, generator=generator).argsort(1)[:, :batch_size]
        gradients = problem.strong_convexity * (w[:, None] - problem.centres[batch])
        w = w - step_size * gradients.sum(1)
    return w.square().sum(1)


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize(("batch_size", "share"), [(1, 0.2), (4, 0.5), (12, 0.5), (12, 0.95)])
def test_the_stationary_error_is_that_of_the_simulation(batch_size, share, replacement):
    problem = LowerBoundProblem.random(12, 6, strong_convexity=2.0)
    step_size = share / (2.0 * batch_size)
    found = simulated(problem, step_size, batch_size, steps=40, replacement=replacement)
    expected = problem.expected_error(step_size, batch_size, steps=40, initial_error=0.0, replacement=replacement)
    settled = problem.stationary_error(step_size, batch_size, replacement=replacement)
    assert expected == pytest.approx(settled, rel=1e-6)
    assert abs(float(found.mean()) - settled) < 4 * float(found.std()) / math.sqrt(len(found))


def test_on_the_way_there_too():
    problem = LowerBoundProblem.random(5, 3)
    found = simulated(problem, 0.02, 5, steps=6, replacement=True, runs=20_000)
    expected = problem.expected_error(0.02, 5, steps=6, initial_error=0.0)
    assert expected < 0.75 * problem.stationary_error(0.02, 5)
    assert abs(float(found.mean()) - expected) < 4 * float(found.std()) / math.sqrt(len(found))


def test_bound_moments_and_loss_are_those_of_its_gradients():
    problem = LowerBoundProblem.random(8, 5, strong_convexity=3.0, seed=1)
    w = torch.full((5,), 0.2, dtype=torch.float64, requires_grad=True)
    gradients, sq_norm = problem.gradients(w.detach()), 0.2
    assert float(batch_size_bound(gradients)) == pytest.approx(problem.bound(sq_norm), rel=1e-12)
    assert float(gradients.square().sum(1).mean()) == pytest.approx(problem.second_moment(sq_norm), rel=1e-12)
    loss = (1.5 * (w - problem.centres).square().sum(1)).mean()
    assert float(loss.detach()) == pytest.approx(problem.loss(w.detach()), rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss, w)[0], gradients.mean(0))
    assert problem.bound(0.0) == math.inf


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("batch_size", [1, 4, 24])
def test_at_stationarity_the_theorem_holds_with_one_half(batch_size, replacement):
    problem = LowerBoundProblem.random(12, 6, strong_convexity=2.0)
    step_size = problem.largest_step_size(batch_size)
    settled = problem.stationary_error(step_size, batch_size, replacement=replacement)
    delta = problem.stationary_delta(step_size, batch_size, replacement=replacement)
    if delta < 0:
        assert settled == pytest.approx(0, abs=1e-12)
        return
    predicted = lower_bound_error(
        delta, step_size=step_size, second_moment=problem.second_moment(settled), strong_convexity=2.0
    )
    assert settled == pytest.approx(predicted, rel=1e-12)


def test_near_its_minimum_delta_stays_below_a_third():
    problem = LowerBoundProblem.random(4, 3)
    deltas = [problem.stationary_delta(problem.largest_step_size(b), b) for b in (1, 10, 1000, 10**6)]
    assert deltas == sorted(deltas)
    assert deltas[-1] == pytest.approx(1 / 3, abs=1e-3)
    assert max(deltas) < 1 / 3


def test_a_step_too_large_to_settle_is_refused():
    with pytest.raises(ValueError, match="Expected argument `step_size` to be between 0 and"):
        LowerBoundProblem.random(4, 3).stationary_error(0.5, 4)


def test_other_centres_are_refused():
    with pytest.raises(ValueError, match="Expected argument `centres` to be unit vectors that add up to 0"):
        LowerBoundProblem(torch.eye(3))
