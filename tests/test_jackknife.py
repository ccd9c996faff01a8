"""The pieces of an interval."""

import pytest
from scipy import stats

from lightning_graddiv.jackknife import jackknife_standard_error, student_t_quantile, sums_without_each


def test_the_quantile_is_students():
    for dof in (*range(1, 41), 99, 100, 499, 1000):
        for confidence in (0.01, 0.3, 0.5, 0.8, 0.9, 0.95, 0.99, 0.9999):
            expected = stats.t.ppf((1 + confidence) / 2, dof)
            assert student_t_quantile(dof, confidence) == pytest.approx(expected, rel=1e-10), (dof, confidence)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = [1.0, 4.0, 2.0, 8.0, 5.0]
    without = [total / 4 for total in sums_without_each(values)]
    assert jackknife_standard_error(without) == pytest.approx(stats.sem(values), rel=1e-12)


def test_sums_without_each_do_not_cancel():
    assert sums_without_each([1e20, 1.0, 2.0]) == [3.0, 1e20 + 2, 1e20 + 1]
