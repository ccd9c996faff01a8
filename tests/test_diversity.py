"""Definitions 4 and 5, their estimate from probes, and the estimators that it must not be."""

import itertools
import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_graddiv.diversity import (
    DiversityEstimate,
    GradientMoments,
    GradientSums,
    batch_size_bound,
    estimate_diversity,
    gradient_diversity,
)


def gaussian(n: int, d: int, seed: int = 0, mean: float = 0.3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) + mean


def probes_of(gradients: torch.Tensor, size: int) -> list[GradientMoments]:
    return [GradientMoments.from_gradients(part) for part in gradients.split(size)]


class TestDefinitions:
    def test_orthogonal_gradients_give_n(self):
        assert gradient_diversity(torch.eye(7)).item() == 1
        assert batch_size_bound(torch.eye(7)).item() == 7

    def test_identical_gradients_give_one(self):
        gradients = torch.tensor([[3.0, -4.0]]).repeat(6, 1)
        assert batch_size_bound(gradients).item() == pytest.approx(1, rel=1e-14)
        assert gradient_diversity(gradients).item() == pytest.approx(1 / 6, rel=1e-14)

    def test_a_hand_computed_case(self):
        gradients = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]])  # S1 = 6, sum = (2, 2)
        assert gradient_diversity(gradients).item() == pytest.approx(6 / 8, rel=1e-14)
        assert batch_size_bound(gradients).item() == pytest.approx(18 / 8, rel=1e-14)

    def test_it_is_one_plus_the_trace_of_the_covariance_over_the_squared_mean(self):
        gradients = gaussian(50, 9)
        trace = gradients.var(dim=0, correction=0).sum()
        expected = 1 + trace / gradients.mean(dim=0).square().sum()
        assert batch_size_bound(gradients).item() == pytest.approx(expected.item(), rel=1e-12)

    @pytest.mark.parametrize("times", [2, 5])
    def test_replicating_the_data_leaves_the_bound_at_that_of_the_distinct_examples(self, times):
        gradients = gaussian(12, 5)
        bound = batch_size_bound(gradients).item()
        assert batch_size_bound(gradients.repeat(times, 1)).item() == pytest.approx(bound, rel=1e-12)

    def test_the_scale_of_the_loss_does_not_matter(self):
        gradients = gaussian(12, 5)
        bound = batch_size_bound(gradients).item()
        assert batch_size_bound(1e-6 * gradients).item() == pytest.approx(bound, rel=1e-12)

    def test_the_basis_of_the_parameters_does_not_matter(self):
        gradients = gaussian(12, 5)
        basis = torch.linalg.qr(gaussian(5, 5, seed=1)).Q
        bound = batch_size_bound(gradients).item()
        assert batch_size_bound(gradients @ basis).item() == pytest.approx(bound, rel=1e-12)

    def test_gradients_that_cancel_have_no_bound(self):
        gradients = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
        assert batch_size_bound(gradients).item() == math.inf
        assert gradient_diversity(gradients).item() == math.inf

    def test_all_zero_gradients_are_undefined(self):
        assert math.isnan(gradient_diversity(torch.zeros(3, 2)))
        assert math.isnan(batch_size_bound(torch.zeros(3, 2)))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_sums_of_low_precision_gradients_are_taken_in_float64(self, dtype):
        gradients = gaussian(300, 40, mean=20.0).to(dtype)
        result = batch_size_bound(gradients)
        assert result.dtype == torch.float64
        assert result.item() == pytest.approx(batch_size_bound(gradients.double()).item(), rel=1e-12)

    @pytest.mark.parametrize("function", [gradient_diversity, batch_size_bound, GradientMoments.from_gradients])
    @pytest.mark.parametrize(
        "gradients",
        [torch.ones(3), torch.tensor(1.0), torch.ones(2, 3, 4), torch.ones(0, 3), torch.ones(2, 2).long()],
        ids=["1-dim", "0-dim", "3-dim", "empty", "integers"],
    )
    def test_anything_but_n_by_d_floats_is_refused(self, function, gradients):
        with pytest.raises(ValueError, match="Expected argument `gradients` to be a floating-point tensor of"):
            function(gradients)


class TestMoments:
    def test_sums_hold_what_the_examples_add_up_to(self):
        gradients = gaussian(8, 3)
        sums = GradientSums.from_gradients(gradients.requires_grad_())
        assert sums.count == 8
        assert sums.sum_sq_norms == pytest.approx(gradients.square().sum().item(), rel=1e-14)
        assert not sums.gradient_sum.requires_grad
        torch.testing.assert_close(sums.gradient_sum, gradients.detach().sum(dim=0), rtol=1e-14, atol=0)

    def test_moments_of_the_sums_are_the_moments(self):
        gradients = gaussian(8, 3)
        moments = GradientMoments.from_gradients(gradients)
        assert moments == GradientSums.from_gradients(gradients).moments()
        assert moments.sq_norm_of_sum == pytest.approx(gradients.sum(dim=0).square().sum().item(), rel=1e-14)

    @pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
    @pytest.mark.parametrize("field", [field.name for field in fields(GradientMoments)])
    def test_a_number_that_no_gradients_can_have_is_refused(self, field, value):
        good = dict.fromkeys((field.name for field in fields(GradientMoments)), 1.0)
        with pytest.raises(ValueError, match=f"Expected argument `{field}` to be finite and non-negative but got"):
            GradientMoments(**{**good, field: value})

    def test_the_group_sums_come_together(self):
        with pytest.raises(ValueError, match="both or neither"):
            GradientMoments(2, 1, 1, group_sq_counts=2)

    def test_gradients_that_are_not_finite_are_refused(self):
        with pytest.raises(ValueError, match="finite"):
            GradientSums.from_gradients(torch.tensor([[1.0, math.nan]]))

    def test_a_sum_that_is_no_vector_is_refused(self):
        with pytest.raises(ValueError, match="`gradient_sum` to be of shape"):
            GradientSums(1, 1.0, torch.ones(2, 2))


class TestEstimate:
    def test_one_probe_of_the_whole_data_set_is_definition_5(self):
        for seed, n in enumerate((2, 3, 32, 257)):
            gradients = gaussian(n, 11, seed)
            estimate = estimate_diversity([GradientMoments.from_gradients(gradients)], dataset_size=n)
            assert estimate.bound == pytest.approx(batch_size_bound(gradients).item(), rel=1e-12)
            assert estimate.diversity == pytest.approx(gradient_diversity(gradients).item(), rel=1e-12)

    def test_a_whole_data_set_that_cancels_gives_inf_and_not_one_over_rounding(self):
        for n in range(2, 60):
            assert estimate_diversity([GradientMoments(n, 0.1 * n, 0.0)], dataset_size=n).bound == math.inf

    def test_averaged_over_all_subsets_it_is_exact(self):
        # Without replacement: the mean over every possible probe has no sampling error left, only bias.
        gradients = gaussian(7, 4)
        probes = [GradientMoments.from_gradients(gradients[list(rows)]) for rows in itertools.combinations(range(7), 3)]
        bound = estimate_diversity(probes, dataset_size=7).bound
        assert bound == pytest.approx(batch_size_bound(gradients).item(), rel=1e-12)

    def test_averaged_over_all_draws_with_replacement_it_is_exact_as_a_stream(self):
        gradients = gaussian(5, 4)
        probes = [
            GradientMoments.from_gradients(gradients[list(rows)]) for rows in itertools.product(range(5), repeat=3)
        ]
        bound = estimate_diversity(probes).bound
        assert bound == pytest.approx(batch_size_bound(gradients).item(), rel=1e-12)

    def test_probes_may_differ_in_size_and_scale(self):
        # Every probe holds exact pairs of B = 200; norms fall while M grows.
        def exact(count, sq_norm, bound=200):
            return GradientMoments(count, count * sq_norm, count * sq_norm * (1 + (count - 1) / bound))

        probes = [exact(32, 1.0)] * 12 + [exact(512, 1 / 16)] * 4
        assert estimate_diversity(probes).bound == pytest.approx(200, rel=1e-12)
        # Weighting the signal by M (M - 1) and the second moment by M pools different probes in the two.
        pairs = sum(p.count * (p.count - 1) for p in probes)
        signal = sum(p.sq_norm_of_sum - p.sum_sq_norms for p in probes) / pairs
        second_moment = sum(p.sum_sq_norms for p in probes) / sum(p.count for p in probes)
        assert second_moment / signal == pytest.approx(576.5, abs=0.1)

    def test_the_fields_fit_together(self):
        estimate = estimate_diversity(probes_of(gaussian(200, 6), 20), dataset_size=1000)
        assert estimate.rho == pytest.approx(estimate.signal / estimate.second_moment, rel=1e-12)
        assert estimate.noise_scale == pytest.approx(1 / estimate.rho - 1, rel=1e-12)
        assert estimate.bound == pytest.approx(1 / (1e-3 + (1 - 1e-3) * estimate.rho), rel=1e-12)
        assert estimate.diversity == pytest.approx(estimate.bound / 1000, rel=1e-12)
        assert (estimate.num_probes, estimate.num_examples, estimate.dataset_size) == (10, 200, 1000)
        assert estimate_diversity(probes_of(gaussian(200, 6), 20)).diversity is None

    def test_signal_and_second_moment_are_those_of_the_gradients(self):
        gradients = gaussian(6, 4)
        probes = [GradientMoments.from_gradients(gradients[list(p)]) for p in itertools.combinations(range(6), 2)]
        estimate = estimate_diversity(probes, dataset_size=6)
        gram = gradients @ gradients.T
        off_diagonal = (gram.sum() - gram.trace()) / 30
        assert estimate.second_moment == pytest.approx(gram.trace().item() / 6, rel=1e-12)
        assert estimate.signal == pytest.approx(off_diagonal.item(), rel=1e-12)

    def test_probes_without_pairs_are_ignored(self):
        probes = probes_of(gaussian(60, 6), 10)
        single, fraction = GradientMoments(1, 9.0, 9.0), GradientMoments(0.9, 9.0, 4.0)
        assert estimate_diversity([single, *probes, fraction]) == estimate_diversity(probes)

    def test_a_signal_below_zero_is_larger_than_the_probes_can_see(self):
        estimate = estimate_diversity([GradientMoments(4, 4.0, 1.0)] * 5)
        assert (estimate.bound, estimate.upper, estimate.noise_scale) == (math.inf, math.inf, math.inf)
        assert estimate.rho < 0
        # A finite data set is never larger than what rho = 0 makes of it by much: 1/n stays.
        assert estimate_diversity([GradientMoments(4, 4.0, 4.0)] * 5, dataset_size=100).bound == 100

    def test_the_bound_is_never_below_one(self):
        # Unequal weights can push S2 a little beyond M * S1.
        estimate = estimate_diversity([GradientMoments(4, 4.0, 17.0)] * 5)
        assert (estimate.bound, estimate.lower, estimate.noise_scale) == (1, 1, 0)

    def test_a_data_set_of_one_example_allows_a_batch_of_one(self):
        estimate = estimate_diversity(probes_of(gaussian(60, 6), 10), dataset_size=1)
        assert (estimate.lower, estimate.bound, estimate.upper) == (1, 1, 1)

    def test_every_number_is_a_float_and_none_is_nan(self):
        cases = [
            [GradientMoments(2, 1.0, 0.0)],
            [GradientMoments(2, 1.0, 2.0)] * 4,
            [GradientMoments(2, 0.0, 0.0)] * 7 + [GradientMoments(2, 1.0, 1.5)],
            [GradientMoments(32, 1e-30, 1e-30), GradientMoments(32, 1e30, 1e30)] * 3,
            probes_of(gaussian(60, 6), 10),
        ]
        for probes, n in itertools.product(cases, (None, 1, 2, 1000)):
            estimate = estimate_diversity(probes, dataset_size=n)
            for field in fields(DiversityEstimate)[:7]:
                value = getattr(estimate, field.name)
                assert isinstance(value, float), field.name
                assert not math.isnan(value), field.name

    @pytest.mark.parametrize("dataset_size", [0, -3])
    def test_an_impossible_data_set_is_refused(self, dataset_size):
        with pytest.raises(ValueError, match="Expected argument `dataset_size` to be at least 1 or None but got"):
            estimate_diversity(probes_of(gaussian(20, 3), 5), dataset_size=dataset_size)

    @pytest.mark.parametrize("confidence", [0, 1, 1.5, -0.1, math.nan])
    def test_an_impossible_confidence_is_refused(self, confidence):
        with pytest.raises(ValueError, match=r"Expected argument `confidence` to be in \(0, 1\) but got"):
            estimate_diversity(probes_of(gaussian(20, 3), 5), confidence=confidence)

    @pytest.mark.parametrize("probes", [[], [GradientMoments(1, 1.0, 1.0)]])
    def test_no_pairs_at_all_are_refused(self, probes):
        with pytest.raises(ValueError, match="Expected argument `probes` to hold a probe of more than one example"):
            estimate_diversity(probes)

    def test_all_zero_gradients_are_refused(self):
        with pytest.raises(ValueError, match="Expected argument `probes` to hold a non-zero gradient"):
            estimate_diversity([GradientMoments(4, 0.0, 0.0)] * 5)


class TestInterval:
    def test_it_is_the_delete_one_jackknife_with_students_t(self):
        probes, k, n = probes_of(gaussian(90, 6), 10), 9, 500
        signals = np.array([p.sq_norm_of_sum - p.sum_sq_norms for p in probes])
        seconds = np.array([(p.count - 1) * p.sum_sq_norms for p in probes])
        deleted = (signals.sum() - signals) / (seconds.sum() - seconds)
        se = math.sqrt((k - 1) / k * ((deleted - deleted.mean()) ** 2).sum())
        for confidence in (0.5, 0.9, 0.99):
            margin = stats.t.ppf((1 + confidence) / 2, k - 1) * se
            estimate = estimate_diversity(probes, dataset_size=n, confidence=confidence)
            for end, rho in (
                (estimate.lower, estimate.rho + margin),
                (estimate.upper, estimate.rho - margin),
            ):
                inverse = 1 / n + (1 - 1 / n) * rho
                assert end == pytest.approx(1 / inverse if inverse > 0 else math.inf, rel=1e-9)

    def test_a_single_probe_says_nothing_about_spread(self):
        estimate = estimate_diversity(probes_of(gaussian(10, 6), 10))
        assert (estimate.lower, estimate.upper) == (1, math.inf)

    def test_probes_without_pairs_do_not_count_towards_the_two(self):
        estimate = estimate_diversity([*probes_of(gaussian(10, 6), 10), GradientMoments(1, 1.0, 1.0)])
        assert (estimate.lower, estimate.upper) == (1, math.inf)
        assert estimate_diversity(probes_of(gaussian(20, 6), 10), confidence=0.5).lower > 1

    @pytest.mark.parametrize("confidence", [0.6, 0.9])
    @pytest.mark.parametrize("has_heavy_tails", [False, True])
    def test_that_of_two_probes_covers_as_often_as_that_of_many(self, has_heavy_tails, confidence):
        """Probes of 8 gradients, a mean of length 1 and noise in 20 dimensions; lengths vary by a factor of e."""
        rng, reps, size, dim = np.random.default_rng(5), 3000, 8, 20
        rho = 1 / (dim + 1) * (math.exp(-1) if has_heavy_tails else 1.0)

        def covered(k):
            """By the interval, and by all that is above its lower end."""
            g = rng.standard_normal((reps, k, size, dim)) + np.eye(dim)[0]
            if has_heavy_tails:
                g *= np.exp(rng.standard_normal((reps, k, size, 1)))
            first, second = np.square(g).sum((2, 3)), np.square(g.sum(2)).sum(2)
            found = []
            for row in zip(first, second, strict=True):
                probes = [GradientMoments(size, *sums) for sums in zip(*row, strict=True)]
                estimate = estimate_diversity(probes, confidence=confidence)
                found.append((estimate.lower <= 1 / rho <= estimate.upper, estimate.lower <= 1 / rho))
            return np.mean(found, 0)

        few, many, wanted = covered(2), covered(16), np.array([confidence, (1 + confidence) / 2])
        error = 4 * math.sqrt(0.25 / reps)
        assert (few > many - error).all()
        assert (few > wanted - 0.05).all()

    @pytest.mark.parametrize("k", [2, 3])
    def test_a_few_probes_that_are_alike_by_chance_say_nothing_about_spread(self, k):
        one_hot = GradientMoments.from_gradients(torch.eye(8)[:2])
        assert estimate_diversity([one_hot] * k).lower == 1
        in_proportion = [GradientMoments(4, scale, 2 * scale) for scale in (1.0, 3.0, 0.7)]
        assert estimate_diversity(in_proportion[:k]).lower == 1
        assert estimate_diversity([one_hot] * 4).lower == math.inf

    def test_one_probe_that_holds_all_gradients_says_nothing_about_spread(self):
        estimate = estimate_diversity([GradientMoments(8, 0.0, 0.0)] * 7 + [GradientMoments(8, 8.0, 16.0)])
        assert (estimate.lower, estimate.upper) == (1, math.inf)

    def test_one_probe_that_dwarfs_the_others_does_not_wash_them_out(self):
        probes = [*probes_of(gaussian(80, 6), 10), GradientMoments(10, 1e17, 5e17)]
        k = len(probes)
        deleted = np.array([estimate_diversity(probes[:j] + probes[j + 1 :]).rho for j in range(k)])
        se = math.sqrt((k - 1) / k * ((deleted - deleted.mean()) ** 2).sum())
        estimate = estimate_diversity(probes, confidence=0.3)
        expected = 1 / (estimate.rho + stats.t.ppf(0.65, k - 1) * se)
        assert estimate.lower == pytest.approx(expected, rel=1e-9)

    def test_the_bound_lies_within(self):
        rng = np.random.default_rng(3)
        for _ in range(300):
            k, n = int(rng.integers(1, 9)), rng.choice([None, 1, 2, 50, 10**6])
            counts, norms, unity = rng.uniform(1.01, 50, k), rng.lognormal(0, 3, k), rng.uniform(0, 1, k)
            probes = [GradientMoments(m, s1, s1 * m * u) for m, s1, u in zip(counts, norms, unity, strict=True)]
            for window in (probes, probes[:1] * 6):  # equal probes: the interval is as narrow as rounding
                estimate = estimate_diversity(window, dataset_size=n)
                assert 1 <= estimate.lower <= estimate.bound <= estimate.upper

    def test_equal_probes_give_an_interval_without_width(self):
        estimate = estimate_diversity([GradientMoments(8, 8.0, 16.0)] * 6)
        assert estimate.lower == pytest.approx(7, rel=1e-9)
        assert estimate.upper == pytest.approx(7, rel=1e-9)
