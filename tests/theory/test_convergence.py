"""Theorems 2 to 5, run: mini-batch SGD at B = delta B_S + 1 on losses of which everything is known."""

import math

import pytest
import torch

from lightning_graddiv import batch_size_bound
from lightning_graddiv.theory import (
    convex_guarantee,
    excess,
    polyak_lojasiewicz_guarantee,
    smooth_guarantee,
    strongly_convex_guarantee,
)


def quadratics(curvature: torch.Tensor, n: int = 24, spread: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """f_i(w) = 1/2 w'Aw - <e_i, w> with sum e_i = 0: gradients A w - e_i, minimum at 0."""
    generator = torch.Generator().manual_seed(0)
    errors = spread * torch.randn(n, len(curvature), generator=generator, dtype=torch.float64)
    return curvature, errors - errors.mean(0)


def path(problem, start, step_size, batch_size, steps, *, runs=512, seed=0):
    """Yield the iterates of many runs at once, shape (runs, d), before each step and after the last."""
    curvature, errors = problem
    generator = torch.Generator().manual_seed(seed)
    w = start.expand(runs, -1).clone()
    yield w
    for _ in range(steps):
        drawn = errors[torch.randint(len(errors), (runs, batch_size), generator=generator)].sum(1)
        w = w - step_size * (batch_size * curvature * w - drawn)
        yield w


def largest_second_moment(problem, start) -> float:
    """Of |g_i|^2 in the mean over the examples, where |w| is at most |start|."""
    curvature, errors = problem
    return float(curvature.max() ** 2 * start.square().sum() + errors.square().sum(1).mean())


def smallest_bound(problem, start) -> float:
    """B_S(w) = 1 + spread / |A w|^2 is smallest where |A w| is largest."""
    curvature, errors = problem
    direction = torch.zeros_like(start)
    direction[curvature.argmax()] = start.norm()
    return float(batch_size_bound(curvature * direction - errors))


def gap(problem, w: torch.Tensor) -> torch.Tensor:
    return 0.5 * (problem[0] * w.square()).sum(-1)


START = torch.full((4,), 0.25, dtype=torch.float64)
STRONG = torch.tensor([1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
FLAT = torch.tensor([1.0, 0.5, 0.1, 0.0], dtype=torch.float64)


def rounds(guarantee, batch_size: int) -> int:
    return math.ceil(guarantee.evaluations / batch_size)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_strongly_convex(batch_size):
    problem = quadratics(STRONG)
    delta = excess(batch_size, smallest_bound(problem, START))
    promised = strongly_convex_guarantee(
        0.05,
        strong_convexity=1.0,
        second_moment=largest_second_moment(problem, START),
        sq_distance=float(START.square().sum()),
        delta=delta,
    )
    assert batch_size <= promised.max_batch_size
    *_, last = path(problem, START, promised.step_size, batch_size, rounds(promised, batch_size))
    found = last.square().sum(1)
    assert float(found.mean()) + 3 * float(found.std()) / math.sqrt(len(found)) < promised.accuracy


@pytest.mark.parametrize("batch_size", [1, 3])
def test_polyak_lojasiewicz(batch_size):
    # Singular curvature: not strongly convex, but |Aw|^2 >= mu w'Aw with mu the smallest curvature above 0.
    curvature = torch.tensor([1.0, 0.5, 0.5, 0.0], dtype=torch.float64)
    problem = quadratics(curvature)
    problem[1][:, 3] = 0.0
    promised = polyak_lojasiewicz_guarantee(
        0.05,
        smoothness=1.0,
        polyak_lojasiewicz=0.5,
        second_moment=largest_second_moment(problem, START),
        initial_gap=float(gap(problem, START)),
        delta=excess(batch_size, smallest_bound(problem, START)),
    )
    assert batch_size <= promised.max_batch_size
    *_, last = path(problem, START, promised.step_size, batch_size, rounds(promised, batch_size))
    assert float(gap(problem, last).mean()) < promised.accuracy


@pytest.mark.parametrize("batch_size", [1, 3])
def test_convex(batch_size):
    problem = quadratics(FLAT)
    promised = convex_guarantee(
        0.05,
        second_moment=largest_second_moment(problem, START),
        sq_distance=float(START.square().sum()),
        delta=excess(batch_size, smallest_bound(problem, START)),
    )
    iterates = torch.stack(
        list(path(problem, START, promised.step_size, batch_size, rounds(promised, batch_size)))[:-1]
    )
    assert float(gap(problem, iterates.mean(0)).mean()) < promised.accuracy


@pytest.mark.parametrize("batch_size", [1, 3])
def test_smooth(batch_size):
    problem = quadratics(FLAT)
    promised = smooth_guarantee(
        0.05,
        smoothness=1.0,
        second_moment=largest_second_moment(problem, START),
        initial_gap=float(gap(problem, START)),
        delta=excess(batch_size, smallest_bound(problem, START)),
    )
    iterates = list(path(problem, START, promised.step_size, batch_size, rounds(promised, batch_size)))[:-1]
    sq_norms = torch.stack([(problem[0] * w).square().sum(1).mean() for w in iterates])
    assert float(sq_norms.mean()) < promised.accuracy


class TestNumbers:
    """By hand, and against the proofs: half of eps is what is left of the start, half what the noise keeps up."""

    def test_strongly_convex(self):
        promised = strongly_convex_guarantee(0.1, strong_convexity=2.0, second_moment=5.0, sq_distance=3.0, delta=0.5)
        assert promised.step_size == pytest.approx(0.04)
        assert promised.evaluations == pytest.approx(5 / 0.8 * math.log(60))
        assert promised.accuracy == pytest.approx(0.125)
        assert promised.max_batch_size == pytest.approx(6.25)
        assert promised.learning_rate(5) == pytest.approx(0.2)
        assert 3 * math.exp(-2 * 0.04 * 2 * promised.evaluations) == pytest.approx(0.05)  # eps / 2 of the start
        kept_up = promised.step_size * 5 / (2 * 2)
        assert kept_up == pytest.approx(0.05)  # eps / 2 of the noise: gamma M2 / (2 lambda)

    def test_polyak_lojasiewicz(self):
        promised = polyak_lojasiewicz_guarantee(
            0.1, smoothness=4.0, polyak_lojasiewicz=2.0, second_moment=5.0, initial_gap=3.0, delta=1.0
        )
        assert promised.step_size == pytest.approx(0.02)
        assert promised.evaluations == pytest.approx(20 / (4 * 4 * 0.1) * math.log(60))
        assert promised.accuracy == pytest.approx(0.15)
        assert promised.max_batch_size == pytest.approx(1 / (2 * 0.02 * 2))

    def test_convex(self):
        promised = convex_guarantee(0.1, second_moment=5.0, sq_distance=3.0)
        assert (promised.step_size, promised.evaluations) == pytest.approx((0.02, 1500))
        assert promised.accuracy == 0.1
        assert promised.max_batch_size == math.inf

    def test_smooth(self):
        promised = smooth_guarantee(0.1, smoothness=4.0, second_moment=5.0, initial_gap=3.0)
        assert (promised.step_size, promised.evaluations) == pytest.approx((0.005, 12_000))

    def test_a_start_that_is_good_enough_needs_no_step(self):
        assert strongly_convex_guarantee(1, strong_convexity=1, second_moment=1, sq_distance=0.1).evaluations == 0

    def test_what_is_not_positive_is_refused_by_name(self):
        with pytest.raises(ValueError, match="Expected argument `second_moment` to be positive but got 0"):
            convex_guarantee(0.1, second_moment=0, sq_distance=1)
        with pytest.raises(ValueError, match="Expected argument `delta` to be at least 0"):
            convex_guarantee(0.1, second_moment=1, sq_distance=1, delta=-1)
