"""The paper's results, checked."""

import itertools
import math

import pytest

from lightning_graddiv.theory import gain


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

    @pytest.mark.parametrize(
        ("batch_size", "bound", "name"), [(0, 5, "batch_size"), (5, 0.5, "bound"), (5, math.nan, "bound")]
    )
    def test_less_than_one_is_refused(self, batch_size, bound, name):
        with pytest.raises(ValueError, match=f"Expected argument `{name}` to be at least 1 but got"):
            gain(batch_size, bound)
