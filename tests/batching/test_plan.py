"""BatchPlan: effective batch = micro-batch x accumulation x processes."""

import pytest

from lightning_graddiv.batching.plan import BatchPlan


def test_the_effective_batch_is_the_product():
    assert BatchPlan(8, 3, 2).batch_size == 48


@pytest.mark.parametrize(
    ("batch_size", "limit", "world", "expected"),
    [
        (64, 64, 1, (64, 1)),  # the micro-batch grows first
        (128, 64, 1, (64, 2)),  # then accumulation makes up the rest
        (96, 64, 1, (48, 2)),  # in equal parts
        (210, 64, 1, (42, 5)),  # of which there must be a whole number
        (7, 2, 1, (1, 7)),
        (128, 64, 2, (64, 1)),  # and each process takes its share
    ],
)
def test_resized_is_the_largest_micro_batch_that_divides_the_batch(batch_size, limit, world, expected):
    plan = BatchPlan(1, 1, world).resized(batch_size, limit)
    assert (plan.micro_batch_size, plan.accumulate) == expected
    assert plan.batch_size == batch_size
    assert plan.world_size == world


def test_accumulated_keeps_the_micro_batch():
    assert BatchPlan(8, 3, 2).accumulated(96) == BatchPlan(8, 6, 2)
    assert BatchPlan(8, 3, 2).accumulated(40) is None
    assert BatchPlan(8, 3, 2).accumulated(0) is None


def test_processes_cannot_share_what_does_not_divide():
    assert BatchPlan(4, 1, 3).resized(16, 64) is None
    assert BatchPlan(4, 1, 3).resized(0, 64) is None


def test_micro_batches_may_have_to_be_multiples():
    assert BatchPlan(6, 1, 2).resized(96, 20, multiple_of=6) == BatchPlan(12, 4, 2)  # 8 of 6 for each: 2 at a time
    assert BatchPlan(6, 1, 2).resized(96, 2**62, multiple_of=6) == BatchPlan(48, 1, 2)
    assert BatchPlan(6, 1, 2).resized(100, 64, multiple_of=6) is None
