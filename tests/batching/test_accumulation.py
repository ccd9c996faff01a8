"""A number of batches whose multiples are counted from any batch."""

import copy
import math
import pickle

import pytest

from lightning_graddiv.batching.accumulation import OffsetInt, every


def test_its_multiples_are_counted_from_the_origin():
    assert [batch for batch in range(12) if batch % OffsetInt(4, 3) == 0] == [3, 7, 11]
    assert (3 + 4) % OffsetInt(4, 3) == 0  # where the window that began at 3 ends, counted in batches


def test_everywhere_else_it_is_the_number():
    number = OffsetInt(4, 3)
    assert (number, number * 2, 8 / number, math.ceil(9 / number), 9 // number) == (4, 8, 2.0, 3, 2)
    assert number == 4


def test_a_plain_number_does_where_it_can():
    assert type(every(4, 8)) is int
    assert type(every(1, 7)) is int
    assert type(every(4, 6)) is OffsetInt


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda n: pickle.loads(pickle.dumps(n))])
def test_copies_keep_the_origin(copied):
    number = copied(OffsetInt(4, 3))
    assert (int(number), number.origin) == (4, 3)
