"""The random states go into a checkpoint and come back, and what they give is what they would have given."""

import random

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_graddiv.random_states import RandomStates, generators_of, random_states_put_back

DRAWS = {
    "python": random.random,
    "python normal": lambda: random.gauss(0, 1),
    "numpy": np.random.rand,
    "numpy normal": np.random.randn,
    "torch": lambda: torch.rand(()).item(),
}


@pytest.fixture(autouse=True)
def put_back():
    with RandomStates.now().restored():
        yield


@pytest.mark.parametrize("before", range(4))
@pytest.mark.parametrize("name", DRAWS)
def test_what_is_drawn_after_a_checkpoint_is_what_would_have_been(name, before, tmp_path):
    """Normal numbers are drawn in pairs, of which one waits."""
    for _ in range(before):
        RandomStates.now()
        DRAWS[name]()
    torch.save(RandomStates.now().state_dict(), tmp_path / "states")
    expected = [DRAWS[name]() for _ in range(5)]
    np.random.seed(1)
    RandomStates.from_state_dict(torch.load(tmp_path / "states", weights_only=True)).restore()
    assert [DRAWS[name]() for _ in range(5)] == expected


@pytest.mark.parametrize("name", DRAWS)
def test_it_tells_whether_anything_was_drawn(name):
    states = RandomStates.now()
    assert states.is_equal_to(RandomStates.now())
    DRAWS[name]()
    assert not states.is_equal_to(RandomStates.now())


def test_a_normal_number_that_numpy_keeps():
    """Two states that differ in nothing else."""
    np.random.seed(0)
    np.random.randn()
    keeps = RandomStates.now()
    second = np.random.randn()
    for _ in range(2):  # the second time it is remembered
        RandomStates.now()
    keeps.restore()
    again = RandomStates.now()
    assert np.random.randn() == second
    again.restore()
    assert np.random.randn() == second


def test_a_normal_number_that_python_keeps():
    random.seed(0)
    random.gauss()
    keeps = RandomStates.now()
    second = random.gauss()
    assert not keeps.is_equal_to(RandomStates.now())
    keeps.restore()
    assert keeps.is_equal_to(RandomStates.now())
    assert random.gauss() == second


def test_another_kind_of_numpys_generator():
    mine = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.MT19937(3))
    try:
        states = RandomStates.now()
        expected = np.random.rand()
        states.restore()
        assert np.random.rand() == expected
    finally:
        np.random.set_bit_generator(mine)


def test_a_kind_that_no_checkpoint_keeps_is_refused():
    mine = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(3))
    try:
        with (
            pytest.warns(RuntimeWarning, match="legacy"),
            pytest.raises(MisconfigurationException, match="`PCG64`, given by"),
        ):
            RandomStates.now()
    finally:
        np.random.set_bit_generator(mine)


def test_the_same_seed_again_after_other_states_came_back():
    np.random.seed(2)  # another test may have left those of the seed below
    random.seed(2)
    other = RandomStates.now()
    for _ in range(2):
        np.random.seed(1)
        random.seed(1)
        first = RandomStates.now()
        other.restore()
    np.random.seed(1)
    random.seed(1)
    assert first.is_equal_to(RandomStates.now())
    assert not other.is_equal_to(RandomStates.now())


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("seed", [None, 5])
def test_they_are_put_back(name, seed):
    DRAWS[name]()  # a normal number is kept for the next
    before = RandomStates.now()
    with random_states_put_back(seed):
        DRAWS[name]()
    assert before.is_equal_to(RandomStates.now())


def test_generators_of_the_users():
    shared, other = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)

    class Holder:
        def __init__(self, generator):
            self.generator = generator

    generators = generators_of(Holder(shared), Holder(None), object(), Holder(other), Holder(shared))
    assert generators == [shared, other]
    states = RandomStates.now(generators)
    expected = [torch.rand((), generator=generator) for generator in generators]
    with states.restored(generators):
        assert [torch.rand((), generator=generator) for generator in generators] == expected
    assert torch.rand((), generator=shared) != expected[0]
