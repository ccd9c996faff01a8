"""What the estimate is worth on gradients whose B_S is known: accuracy, coverage, and what it must not be.

Isotropic Gaussian gradients N(G, I_d) with |G|^2 = d / (B - 1) have B_S = B, and d_eff = d.
"""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_graddiv.diversity import DiversityEstimate, GradientMoments, estimate_diversity
from lightning_graddiv.window import ProbeWindow


def drawn_probes(bound: float, d: int, size: int, probes: int, rng: np.random.Generator) -> list[GradientMoments]:
    """Probes from the exact joint distribution of S1 and S2, without drawing the d components.

    |s|^2 / M is noncentral chi-square (d, M |G|^2), and S1 - |s|^2 / M an independent chi-square (d (M - 1)).
    """
    between = rng.noncentral_chisquare(d, size * d / (bound - 1), probes)
    within = rng.chisquare(d * (size - 1), probes)
    return [GradientMoments(size, float(b + w), float(size * b)) for b, w in zip(between, within, strict=True)]


def gaussian(bound: float, d: int, n: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Gradients that are really drawn, shape (n, d)."""
    gradients = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    gradients[:, 0] += math.sqrt(d / (bound - 1))
    return gradients


def covers(estimate: DiversityEstimate, bound: float) -> bool:
    return estimate.lower <= bound <= estimate.upper


def test_the_probes_are_those_of_gaussian_gradients():
    bound, d, size, k = 20.0, 30, 8, 20_000
    gradients = gaussian(bound, d, k * size, seed=0).view(k, size, d)
    real = np.stack([gradients.square().sum((1, 2)), gradients.sum(1).square().sum(1)])
    probes = drawn_probes(bound, d, size, k, np.random.default_rng(0))
    drawn = np.array([[p.sum_sq_norms for p in probes], [p.sq_norm_of_sum for p in probes]])
    se = np.sqrt(2 / k) * real.std(axis=1)
    assert (abs(real.mean(axis=1) - drawn.mean(axis=1)) < 4 * se).all()
    np.testing.assert_allclose(np.cov(real), np.cov(drawn), rtol=0.06)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_two_hundred_probes_of_32_give_a_bound_of_500_within_five_percent(seed):
    probes = drawn_probes(500, 20_000, 32, 200, np.random.default_rng(seed))
    estimate = estimate_diversity(probes)
    assert estimate.bound == pytest.approx(500, rel=0.05)
    assert 1 < estimate.lower < 500 < estimate.upper < 550


def test_each_probe_tells_as_little_as_the_precision_formula_says():
    # sd(rho) / rho = sqrt(2 (B - 1)^2 / (d_eff M^2) + 4 G' Sigma G / (M |G|^4)), here with Sigma = I.
    for bound, d, size in ((500, 20_000, 32), (100, 200, 100), (20, 50, 64)):
        probes = drawn_probes(bound, d, size, 4000, np.random.default_rng(0))
        rhos = np.array([estimate_diversity([probe]).rho for probe in probes])
        formula = math.sqrt(2 * (bound - 1) ** 2 / (d * size**2) + 4 * (bound - 1) / (size * d))
        assert rhos.std() * bound == pytest.approx(formula, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_so_do_gradients_that_are_really_drawn(seed):
    parts = (gaussian(500, 20_000, 32, 1000 * seed + i, torch.float32) for i in range(200))
    probes = [GradientMoments.from_gradients(part) for part in parts]
    assert estimate_diversity(probes).bound == pytest.approx(500, rel=0.05)


def coverage(bound: float, d: int, size: int, k: int, repeats: int, seed: int = 0) -> float:
    rng = np.random.default_rng(seed)
    drawn = drawn_probes(bound, d, size, k * repeats, rng)
    windows = (drawn[i : i + k] for i in range(0, k * repeats, k))
    return sum(covers(estimate_diversity(window), bound) for window in windows) / repeats


def test_nine_intervals_in_ten_cover():
    assert coverage(bound=500, d=25, size=32, k=8, repeats=2000) == pytest.approx(0.9, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("k", [8, 16, 32])
@pytest.mark.parametrize("d_eff", [25, 200])
@pytest.mark.parametrize(("bound", "size"), [(100, 32), (500, 32), (100, 100), (500, 256)])
def test_coverage_is_nominal(bound, size, d_eff, k):
    assert coverage(bound, d_eff, size, k, repeats=4000) == pytest.approx(0.9, abs=0.02)


@pytest.mark.slow
def test_coverage_is_nominal_on_gradients_that_are_really_drawn():
    bound, d, size, k, repeats = 100, 25, 32, 8, 2000
    parts = gaussian(bound, d, k * repeats * size, seed=0).split(size)
    probes = [GradientMoments.from_gradients(part) for part in parts]
    estimates = [estimate_diversity(probes[i : i + k]) for i in range(0, k * repeats, k)]
    assert sum(covers(e, bound) for e in estimates) / repeats == pytest.approx(0.9, abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("n", [150, 5000])
def test_coverage_is_nominal_without_replacement(n):
    """Probes of a finite data set, each of distinct examples: the truth is Definition 5 of that set."""
    d, size, k, repeats = 25, 32, 8, 2000
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(n, d, generator=generator, dtype=torch.float64)
    data += math.sqrt(1 / 99) - data.mean(dim=0)
    gram, norms = data @ data.T, data.square().sum(dim=1)
    truth = n * norms.sum().item() / gram.sum().item()
    hits = 0
    for _ in range(repeats):
        rows = torch.rand(k, n, generator=generator).argsort(dim=1)[:, :size]
        sums = data[rows].sum(dim=1).square().sum(dim=1)
        probes = [
            GradientMoments(size, s1, s2) for s1, s2 in zip(norms[rows].sum(dim=1).tolist(), sums.tolist(), strict=True)
        ]
        hits += covers(estimate_diversity(probes, dataset_size=n), truth)
    assert hits / repeats == pytest.approx(0.9, abs=0.03)


class TestWhatItIsNot:
    """Each way of getting it wrong, by its closed form, beside ours on the same probes."""

    bound, size, n = 2000.0, 32, 50_000
    probes = drawn_probes(bound, 100_000, size, 4000, np.random.default_rng(1))
    s1 = np.array([p.sum_sq_norms for p in probes])
    s2 = np.array([p.sq_norm_of_sum for p in probes])

    def test_ours_is_near_the_truth(self):
        assert estimate_diversity(self.probes).bound == pytest.approx(self.bound, rel=0.03)

    def test_nor_the_diversity_of_the_probe_times_the_probe(self):
        theirs = np.mean(self.size * self.s1 / self.s2)
        saturated = self.size * self.bound / (self.size + self.bound - 1)
        assert theirs == pytest.approx(saturated, rel=0.005)
        assert saturated < self.size
        assert estimate_diversity(self.probes).bound > 50 * theirs

    def test_nor_the_diversity_of_the_probe_times_the_data_set(self):
        theirs = np.mean(self.n * self.s1 / self.s2)
        assert theirs == pytest.approx(self.n * self.bound / (self.size + self.bound - 1), rel=0.005)
        # Of n = 50,000 examples of this population, B_S is 1 / (1/n + (1 - 1/n) / B).
        truth = 1 / (1 / self.n + (1 - 1 / self.n) / self.bound)
        assert estimate_diversity(self.probes, dataset_size=self.n).bound == pytest.approx(truth, rel=0.03)
        assert theirs > 20 * truth

    def test_nor_the_plug_in_signal(self):
        # |mean g|^2 holds the noise of the probe, trSigma / M, besides the signal.
        trace = (self.s1 - self.s2 / self.size) / (self.size - 1)
        theirs = np.mean(trace) / np.mean(self.s2 / self.size**2)
        assert theirs == pytest.approx((self.bound - 1) / (1 + (self.bound - 1) / self.size), rel=0.005)
        assert theirs < self.size < estimate_diversity(self.probes).bound / 50

    def test_nor_the_mean_of_ratios(self):
        # E[1 / rho_t] = B (1 + cv^2 + 3 cv^4 + ...): never below B, and worse as probes get noisier.
        bound, d, size = 200.0, 5000, 32
        probes = drawn_probes(bound, d, size, 40_000, np.random.default_rng(0))
        cv = math.sqrt(2 * (bound - 1) ** 2 / (d * size**2) + 4 * (bound - 1) / (d * size))
        single = [estimate_diversity([probe]).bound for probe in probes]
        theirs = sum(single) / len(single)
        assert theirs / bound == pytest.approx(1 + cv**2 + 3 * cv**4, abs=0.0025)
        assert theirs / bound > 1.015
        assert estimate_diversity(probes).bound / bound == pytest.approx(1, abs=0.0025)

    def test_nor_a_signal_clamped_before_it_is_averaged(self):
        bound, d, size = 2000.0, 250, 32
        probes = drawn_probes(bound, d, size, 60_000, np.random.default_rng(0))
        clamped = [max(p.sq_norm_of_sum - p.sum_sq_norms, 0.0) for p in probes]
        theirs = sum((p.count - 1) * p.sum_sq_norms for p in probes) / sum(clamped)
        # A normal signal of mean mu and deviation sigma, clamped: mu Phi(mu/sigma) + sigma phi(mu/sigma).
        mu = d / (bound - 1)
        sigma = math.sqrt(2 * d / (size * (size - 1)) + 4 * mu / size)
        expected = mu * stats.norm.cdf(mu / sigma) + sigma * stats.norm.pdf(mu / sigma)
        assert theirs == pytest.approx((d + mu) / expected, rel=0.03)
        assert theirs < 750
        assert estimate_diversity(probes).bound == pytest.approx(bound, rel=0.08)

    def test_nor_the_within_rank_pairs_alone(self):
        # Both are unbiased; the joint probe has about world-size times the pairs, so less variance.
        world, shard, d, bound, k = 8, 8, 50, 5000.0, 6000
        gradients = gaussian(bound, d, k * world * shard, seed=0).view(k, world, shard, d)
        s1 = gradients.square().sum((1, 2, 3))
        within = (gradients.sum(2).square().sum((1, 2)) - s1) / (world * shard * (shard - 1))
        count = world * shard
        joint = torch.tensor(
            [estimate_diversity([GradientMoments.from_gradients(g.flatten(0, 1))]).signal for g in gradients]
        )
        pairs = count * (count - 1) / (world * shard * (shard - 1))
        assert pairs == 9
        assert (within.var() / joint.var()).item() == pytest.approx(pairs, rel=0.12)
        assert joint.mean().item() == pytest.approx(d / (bound - 1), abs=4 * joint.std().item() / math.sqrt(k))


class TestAfterAChange:
    """B_S jumps tenfold. Nine intervals in ten must cover the new value once the window has turned over."""

    size, d, seeds = 16, 100, 300

    def window_after(self, old: float, new: float, probes: int, batch: int, rng) -> ProbeWindow:
        window = ProbeWindow(self.size)
        for moments in drawn_probes(old, self.d, 32, self.size, rng):
            window.append(moments, learning_rate=0.1, examples_seen=0)
        if batch != 32:
            window.clear()  # what the callback does when the batch grows
        for moments in drawn_probes(new, self.d, batch, probes, rng):
            window.append(moments, learning_rate=0.1, examples_seen=0)
        return window

    def coverage(self, old: float, new: float, probes: int, batch: int) -> float:
        rng = np.random.default_rng(0)
        windows = (self.window_after(old, new, probes, batch, rng) for _ in range(self.seeds))
        return sum(covers(window.estimate(), new) for window in windows) / self.seeds

    @pytest.mark.parametrize(("old", "new"), [(50, 500), (500, 50)], ids=["up", "down"])
    def test_one_window_is_enough_at_a_fixed_batch(self, old, new):
        assert self.coverage(old, new, probes=self.size, batch=32) >= 0.85

    @pytest.mark.parametrize(("old", "new"), [(50, 500), (500, 50)], ids=["up", "down"])
    def test_half_a_window_is_not(self, old, new):
        assert self.coverage(old, new, probes=self.size // 2, batch=32) < 0.5

    @pytest.mark.parametrize(("old", "new"), [(50, 500), (500, 50)], ids=["up", "down"])
    @pytest.mark.parametrize("probes", [2, 4, 8, 16])
    @pytest.mark.parametrize("batch", [64, 512])
    def test_a_window_restarted_at_growth_covers_from_two_probes_on(self, old, new, probes, batch):
        assert self.coverage(old, new, probes=probes, batch=batch) >= 0.85

    @pytest.mark.parametrize("old", [50, 5000], ids=["up", "down"])
    def test_a_drop_of_the_learning_rate_restarts_it_as_growth_does(self, old):
        rng, hits = np.random.default_rng(0), 0
        for _ in range(self.seeds):
            window = ProbeWindow(self.size)
            for moments in drawn_probes(old, self.d, 128, self.size, rng):
                window.append(moments, learning_rate=0.1, examples_seen=0)
            for moments in drawn_probes(500, self.d, 128, 6, rng):
                window.append(moments, learning_rate=0.01, examples_seen=0)
            hits += covers(window.estimate(), 500)
        assert hits / self.seeds >= 0.85

    def test_two_batch_sizes_in_one_window_cost_coverage_even_without_a_change(self):
        # Why growth restarts the window: a few large probes hold nearly all pairs, and the jackknife misses it.
        rng, hits, seeds = np.random.default_rng(0), 0, 2000
        for _ in range(seeds):
            mixed = drawn_probes(500, self.d, 32, 12, rng) + drawn_probes(500, self.d, 512, 4, rng)
            hits += covers(estimate_diversity(mixed), 500)
        assert hits / seeds < 0.87
