"""Lemma 1 by enumeration and by drawing; the gain; one dial for every published rule."""

import itertools
import math

import pytest
import torch

from lightning_graddiv import batch_size_bound
from lightning_graddiv.theory import (
    Dial,
    excess,
    expected_sq_distance,
    gain,
    sample_efficiency,
    without_replacement_excess,
    without_replacement_limit,
)


class Lemma1:
    """Gradients, a distance to w*, and a step, all at random."""

    def __init__(self, n: int, d: int = 5, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.gradients = torch.randn(n, d, generator=generator, dtype=torch.float64) + 0.3
        self.offset = torch.randn(d, generator=generator, dtype=torch.float64)
        self.step_size = 0.07
        self.bound = float(batch_size_bound(self.gradients))

    def after(self, batches: torch.Tensor) -> torch.Tensor:
        """Squared distances after one step on each batch; batches: (k, B) of examples."""
        sums = self.gradients[batches].sum(1)
        return (self.offset - self.step_size * sums).square().sum(1)

    def predicted(self, batch_size: int, delta: float) -> float:
        return expected_sq_distance(
            float(self.offset.square().sum()),
            float(self.gradients.mean(0) @ self.offset),
            float(self.gradients.square().sum(1).mean()),
            step_size=self.step_size,
            batch_size=batch_size,
            delta=delta,
        )


class TestLemma1:
    @pytest.mark.parametrize("batch_size", [1, 2, 4])
    def test_it_is_exact_over_all_batches_with_replacement(self, batch_size):
        case = Lemma1(n=7)
        batches = torch.tensor(list(itertools.product(range(7), repeat=batch_size)))
        predicted = case.predicted(batch_size, excess(batch_size, case.bound))
        assert float(case.after(batches).mean()) == pytest.approx(predicted, rel=1e-12)

    @pytest.mark.parametrize("batch_size", [1, 2, 4, 6, 7])
    def test_and_over_all_batches_without(self, batch_size):
        case = Lemma1(n=7)
        batches = torch.tensor(list(itertools.combinations(range(7), batch_size)))
        predicted = case.predicted(batch_size, without_replacement_excess(batch_size, case.bound, 7))
        assert float(case.after(batches).mean()) == pytest.approx(predicted, rel=1e-12)

    @pytest.mark.parametrize("replacement", [True, False])
    def test_and_on_drawn_batches_of_a_larger_set(self, replacement):
        case, n, batch_size, draws = Lemma1(n=60, d=20), 60, 25, 40_000
        generator = torch.Generator().manual_seed(1)
        if replacement:
            batches = torch.randint(n, (draws, batch_size), generator=generator)
            delta, other = excess(batch_size, case.bound), without_replacement_excess(batch_size, case.bound, n)
        else:
            batches = torch.rand(draws, n, generator=generator).argsort(1)[:, :batch_size]
            delta, other = without_replacement_excess(batch_size, case.bound, n), excess(batch_size, case.bound)
        found = case.after(batches)
        se = float(found.std()) / math.sqrt(draws)
        assert abs(float(found.mean()) - case.predicted(batch_size, delta)) < 4 * se
        assert abs(float(found.mean()) - case.predicted(batch_size, other)) > 8 * se

    def test_a_batch_of_everything_has_no_noise_left(self):
        case = Lemma1(n=9)
        whole = float((case.offset - case.step_size * case.gradients.sum(0)).square().sum())
        assert case.predicted(9, without_replacement_excess(9, case.bound, 9)) == pytest.approx(whole, rel=1e-12)


class TestExcess:
    def test_that_of_distinct_examples_is_never_the_larger(self):
        for n, bound, batch_size in itertools.product((2, 10, 1000), (1.0, 3.0, 1e3, math.inf), (1, 2)):
            assert without_replacement_excess(batch_size, bound, n) <= excess(batch_size, bound)

    def test_the_limit_for_distinct_examples_is_where_their_excess_is_delta(self):
        n, bound = 500, 40.0
        rho = (n / bound - 1) / (n - 1)  # 1/B_S = 1/n + (1 - 1/n) rho
        limit = without_replacement_limit(0.5, rho)
        assert without_replacement_excess(limit, bound, n) == pytest.approx(0.5, rel=1e-12)
        assert limit > 0.5 * bound + 1

    def test_without_a_signal_there_is_no_limit(self):
        assert without_replacement_limit(0.5, -0.1) == math.inf

    @pytest.mark.parametrize(
        ("arguments", "name"),
        [((0, 5, 10), "batch_size"), ((11, 5, 10), "batch_size"), ((2, 0.5, 10), "bound"), ((1, 5, 1), "dataset_size")],
    )
    def test_out_of_range_is_refused_by_name(self, arguments, name):
        with pytest.raises(ValueError, match=f"Expected argument `{name}`"):
            without_replacement_excess(*arguments)


class TestGain:
    def test_one_example_is_one_step(self):
        assert gain(1, 37.5) == 1

    def test_without_a_bound_it_is_the_batch(self):
        assert gain(512, math.inf) == 512

    def test_at_the_bound_it_is_half_of_it(self):
        assert gain(1000, 1000) == pytest.approx(500, rel=1e-3)

    def test_it_saturates_at_the_bound(self):
        assert gain(1e9, 50) == pytest.approx(50, rel=1e-6)

    def test_it_is_the_batch_over_one_plus_delta(self):
        for batch_size, bound in itertools.product((1, 2, 32, 4096), (1.0, 7.5, 1e4)):
            delta = (batch_size - 1) / bound
            assert gain(batch_size, bound) == pytest.approx(batch_size / (1 + delta), rel=1e-13)
            assert gain(batch_size, bound) == pytest.approx(batch_size * bound / (bound + batch_size - 1), rel=1e-13)
            assert sample_efficiency(batch_size, bound) == pytest.approx(gain(batch_size, bound) / batch_size)

    @pytest.mark.parametrize(
        ("batch_size", "bound", "name"), [(0, 5, "batch_size"), (5, 0.5, "bound"), (5, math.nan, "bound")]
    )
    def test_less_than_one_is_refused(self, batch_size, bound, name):
        with pytest.raises(ValueError, match=f"Expected argument `{name}` to be at least 1 but got"):
            gain(batch_size, bound)


class TestDial:
    def test_published_rules_are_where_they_are_said_to_be(self):
        assert Dial.from_norm_test(0.6).delta == pytest.approx(2.78, abs=0.01)
        assert Dial.from_cosine(0.75).delta == pytest.approx(6)
        assert Dial.from_noise_scale_multiple(1).sample_efficiency == 0.5
        assert Dial(1 / 9).sample_efficiency == pytest.approx(0.9)

    @pytest.mark.parametrize("delta", [0.01, 0.5, 1, 6, 200])
    def test_there_and_back(self, delta):
        dial = Dial(delta)
        for back in (
            Dial.from_norm_test(dial.norm_test),
            Dial.from_cosine(dial.cosine),
            Dial.from_noise_scale_multiple(dial.noise_scale_multiple),
            Dial.from_sample_efficiency(dial.sample_efficiency),
        ):
            assert back.delta == pytest.approx(delta, rel=1e-12)

    @pytest.mark.parametrize("delta", [0.25, 1.0, 6.0])
    def test_batches_of_that_delta_have_that_norm_test_and_cosine(self, delta):
        # Isotropic gradients N(G, I): tr(Sigma) = d, and |G|^2 chosen so that B / N = delta.
        d, batch_size, draws = 2000, 64, 400
        generator = torch.Generator().manual_seed(0)
        sq_norm = d * delta / batch_size
        mean = torch.zeros(d, dtype=torch.float64)
        mean[0] = math.sqrt(sq_norm)
        halves = torch.randn(2, draws, d, generator=generator, dtype=torch.float64) / math.sqrt(batch_size / 2) + mean
        cosines = torch.nn.functional.cosine_similarity(halves[0], halves[1], dim=1)
        assert float(cosines.mean()) == pytest.approx(Dial(delta).cosine, abs=0.005)
        errors = (halves.mean(0) - mean).square().sum(1).mean() / sq_norm
        assert math.sqrt(float(errors)) == pytest.approx(Dial(delta).norm_test, rel=0.01)

    @pytest.mark.parametrize("make", [Dial, Dial.from_norm_test, Dial.from_cosine, Dial.from_sample_efficiency])
    def test_nothing_below_zero(self, make):
        with pytest.raises(ValueError, match="Expected argument"):
            make(-0.1)
