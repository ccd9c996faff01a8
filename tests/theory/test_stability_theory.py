"""Differential diversity against autograd, and the caps against steps that are really taken."""

import itertools
import math

import pytest
import torch
from torch import nn

from lightning_graddiv.theory import (
    differential_batch_size_bound,
    differential_diversity,
    stability_bound,
    stability_learning_rate_cap,
    stability_step_size,
)


def autograd_gradients(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    rows = []
    for a, b in zip(x, y, strict=True):
        loss = nn.functional.cross_entropy(net(a[None]), b[None])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))]))
    return torch.stack(rows)


def test_the_differential_bound_of_a_network_is_that_of_autograd():
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    second = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    x, y = torch.randn(11, 5, dtype=torch.float64), torch.arange(11) % 3
    a, b = autograd_gradients(first, x, y), autograd_gradients(second, x, y)
    sum_sq_norms = sum(float((u - v) @ (u - v)) for u, v in zip(a, b, strict=True))
    total = sum((u - v for u, v in zip(a, b, strict=True)), torch.zeros_like(a[0]))
    expected = sum_sq_norms / float(total @ total)
    assert float(differential_diversity(a, b)) == pytest.approx(expected, rel=1e-12)
    assert float(differential_batch_size_bound(a, b)) == pytest.approx(11 * expected, rel=1e-12)
    assert float(differential_batch_size_bound(a, torch.zeros_like(b))) != pytest.approx(11 * expected, rel=0.1)


def test_quadratics_of_one_curvature_have_a_differential_bound_of_one():
    # Gradients differ by the same vector for every example, whatever their own minima are.
    centres = torch.randn(6, 3, dtype=torch.float64)
    w, reference = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    assert float(differential_batch_size_bound(w - centres, reference - centres)) == pytest.approx(1)


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match="Expected argument `reference_gradients` to be of shape"):
        differential_diversity(torch.ones(3, 2), torch.ones(2, 2))


class TestLearningRateCap:
    """Two runs on quadratics of different curvature, one batch each, over all batches there are."""

    n, batch_size = 5, 2
    curvatures = torch.diag_embed(torch.rand(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    distance = torch.tensor([0.5, -1.0, 0.3], dtype=torch.float64)
    differences = (curvatures @ distance).squeeze(-1)  # Dg_i = A_i Dw

    def growth(self, learning_rate: float, *, replacement: bool) -> float:
        draw = itertools.product(range(self.n), repeat=2) if replacement else itertools.combinations(range(self.n), 2)
        after = [
            (self.distance - learning_rate * self.differences[list(batch)].mean(0)).square().sum() for batch in draw
        ]
        return float(torch.stack(after).mean() / self.distance.square().sum())

    def moments(self) -> tuple[float, float, float]:
        mean = self.differences.mean(0)
        return (
            float(mean @ self.distance),
            float(self.differences.square().sum(1).mean()),
            float(mean.square().sum()),
        )

    def test_at_the_cap_the_runs_keep_their_distance(self):
        inner, second, squared = self.moments()
        cap = stability_learning_rate_cap(2, inner_product=inner, second_moment=second, sq_norm=squared)
        assert self.growth(cap, replacement=True) == pytest.approx(1, rel=1e-12)
        assert self.growth(0.99 * cap, replacement=True) < 1 < self.growth(1.01 * cap, replacement=True)

    def test_for_distinct_examples_the_mean_over_pairs_is_exact(self):
        inner, second, squared = self.moments()
        pairs = (self.n * squared - second) / (self.n - 1)
        cap = stability_learning_rate_cap(2, inner_product=inner, second_moment=second, sq_norm=pairs)
        assert self.growth(cap, replacement=False) == pytest.approx(1, rel=1e-12)

    def test_it_is_a_barzilai_borwein_step_times_a_saturating_curve(self):
        inner, second, squared = self.moments()
        bound = float(differential_batch_size_bound(self.differences, torch.zeros_like(self.differences)))
        assert bound == pytest.approx(second / squared)
        for batch_size in (1, 7, 1000):
            cap = stability_learning_rate_cap(batch_size, inner_product=inner, second_moment=second, sq_norm=squared)
            assert cap == pytest.approx(2 * inner / squared * batch_size / (bound + batch_size - 1), rel=1e-12)

    def test_runs_that_would_part_anyway_are_not_capped(self):
        assert stability_learning_rate_cap(4, inner_product=-1, second_moment=1, sq_norm=0.5) == math.inf

    def test_a_signal_lost_in_noise_counts_as_none(self):
        caps = [stability_learning_rate_cap(8, inner_product=1, second_moment=4, sq_norm=s) for s in (-3, 0)]
        assert caps == [4, 4]


class TestStepSize:
    def test_it_is_the_formula(self):
        assert stability_step_size(smoothness=2, batch_size=11, bound=20, dataset_size=6) == pytest.approx(2 / 2 / 1.7)
        strongly = stability_step_size(smoothness=2, batch_size=11, bound=20, dataset_size=6, strong_convexity=2)
        assert strongly == pytest.approx(2 / 4 / 1.7)

    def test_mini_batches_within_it_do_not_part(self):
        # Convex and beta-smooth: one gradient step of each run on the same batch must not increase their distance.
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        smoothness = float(x.square().sum(1).max())
        distances = torch.randn(200, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        bound = 6 * float(x.square().sum(1).min()) / float(torch.linalg.matrix_norm(x, 2)) ** 2  # of every (w, w')
        gamma = stability_step_size(smoothness=smoothness, batch_size=2, bound=max(1.0, bound), dataset_size=6)
        batches = torch.tensor(list(itertools.product(range(6), repeat=2)))
        differences = torch.einsum("nd,kd->kn", x, distances)[..., None] * x  # squares: Dg_i = x_i x_i' Dw
        after = distances[:, None] - gamma * differences[:, batches].sum(2)
        assert (after.square().sum(2).mean(1) <= distances.square().sum(1)).all()

    def test_what_it_guarantees(self):
        assert stability_bound(lipschitz=3, dataset_size=100, step_size=0.1, evaluations=50) == pytest.approx(0.9)
        assert stability_bound(lipschitz=3, dataset_size=100, strong_convexity=0.5) == pytest.approx(0.72)
        with pytest.raises(ValueError, match="`step_size` and `evaluations`"):
            stability_bound(lipschitz=3, dataset_size=100)
