"""What to begin with, from what is allowed and what is fast."""

import math

import pytest

from lightning_graddiv.batching.plan import BatchPlan
from lightning_graddiv.batching.recommendation import fastest_plan, growth_steps, step_to_take, throughput_of_steps

PLAN = BatchPlan(16)
SECONDS = {16: 0.016, 32: 0.020, 64: 0.030, 128: 0.090}


@pytest.mark.parametrize(
    ("allowed", "at_most", "taken"),
    [
        (200, math.inf, 128),
        (128, math.inf, 128),
        (127.9, math.inf, 64),
        (5, 16, 16),
        (5, 15, 8),
        (1, math.inf, 16),
        (1, 1.5, 1),
        (1e9, math.inf, 256),
        (math.inf, math.inf, 32),
        (0, 0, 16),
    ],
)
def test_the_size_is_the_largest_step_allowed_and_smaller_only_on_evidence(allowed, at_most, taken):
    steps = growth_steps(PLAN, 2, 256, is_adaptable=True)
    assert steps == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert step_to_take(steps, 16, allowed, at_most) == taken


def test_at_the_largest_size_there_is_no_step_to_take():
    assert step_to_take([4, 8, 16], 16, math.inf, math.inf) == 16


def test_steps_are_those_of_growth():
    assert growth_steps(BatchPlan(6, 2, 2), 3, 700, is_adaptable=True) == [8, 24, 72, 216, 648]
    assert growth_steps(BatchPlan(6, 2, 2), 2, 100, is_adaptable=False) == [12, 24, 48, 96]


def test_the_micro_batch_is_the_fastest_that_divides_the_batch():
    assert fastest_plan(256, SECONDS, PLAN) == BatchPlan(64, 4)
    assert fastest_plan(32, SECONDS, PLAN) == BatchPlan(32)
    assert fastest_plan(48, SECONDS, PLAN) == BatchPlan(16, 3)
    assert fastest_plan(8, SECONDS, PLAN) == BatchPlan(8)
    assert fastest_plan(128, SECONDS, BatchPlan(16, 1, 2)) == BatchPlan(64, 1, 2)


def test_the_throughput_of_a_batch_is_that_of_its_fastest_micro_batch():
    found = throughput_of_steps([8, 16, 32, 256], SECONDS, PLAN)
    assert found == {16: pytest.approx(1000), 32: pytest.approx(1600), 256: pytest.approx(64 / 0.03)}
