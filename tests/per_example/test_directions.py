"""The random directions in which gradients are compared."""

from itertools import pairwise

import pytest
import torch

from lightning_graddiv.per_example.directions import Directions
from lightning_graddiv.per_example.noise import noise_off

SHAPES = [(), (4,), (3, 5), (4, 2, 3, 3), (5000,), (6,)]


def parameters(dtype=torch.float64):
    return [torch.zeros(shape, dtype=dtype) for shape in SHAPES]


def gradients():
    generator = torch.Generator().manual_seed(3)
    return {i: torch.randn(shape, generator=generator, dtype=torch.float64) for i, shape in enumerate(SHAPES)}


def test_they_are_the_same_on_every_process_and_others_in_every_measurement():
    first, second, other = (Directions(parameters(), seed) for seed in (1, 1, 2))
    for index in range(len(SHAPES)):
        probe, same, different = first.probe(index), second.probe(index), other.probe(index)
        assert torch.equal(probe.left, same.left)
        assert torch.equal(probe.right, same.right)
        assert not torch.equal(probe.left, different.left)
        assert probe.right.shape[0] == 1
    apart = Directions(parameters(), 1, share_right=False)
    numbers = torch.cat([torch.cat([p.left, p.right], 1) for p in map(apart.probe, range(len(SHAPES)))], 1)
    assert len(numbers.unique()) > 0.999 * numbers.numel()  # none serves two parameters


def test_only_short_vectors_are_handled_together():
    assert Directions(parameters(), 0).vectors == {1, 4, 5}
    assert Directions(parameters(), 0).small == {0, 1, 2, 3, 4, 5}
    assert Directions([torch.zeros(3), torch.zeros(3, dtype=torch.float64)], 0).vectors == {0}
    assert Directions([torch.zeros(3, dtype=torch.complex64)], 0).vectors == set()
    assert Directions([], 0).vectors == set()


def test_all_parameters_together_are_the_sum_of_each():
    directions, given = Directions(parameters(), 0), gradients()
    expected = sum(directions.probe(index).of(gradient) for index, gradient in given.items())
    torch.testing.assert_close(directions.of(given), expected, rtol=1e-12, atol=1e-12)
    assert directions.of({}).tolist() == [0.0] * 4


@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_a_parameter_that_is_left_out_counts_as_zero(index):
    directions, given = Directions(parameters(), 0), gradients()
    without = {i: gradient for i, gradient in given.items() if i != index}
    zero = without | {index: torch.zeros(SHAPES[index], dtype=torch.float64)}
    torch.testing.assert_close(directions.of(without), directions.of(zero))
    assert float((directions.of(without) - directions.of(given)).abs().max()) > 0.01


def test_they_are_random_where_a_proof_has_switched_noise_off():
    shapes = [torch.zeros(17, 23)]
    with noise_off():
        probe = Directions(shapes, 0).probe(0)
    assert len(probe.left.unique()) == probe.left.numel()


@pytest.mark.parametrize("count", [2, 12], ids=["few", "many"])
def test_images_are_projected_as_the_gradients_are_one_by_one(count):
    torch.manual_seed(0)
    shapes = [(4, 3), (5,), (2, 3, 3), ()] * (count // 2)
    gradients = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    directions = Directions(gradients, 3)
    given = {index: gradients[index] for index in range(count)}
    images = {index: directions.probe(index).image_of(gradient) for index, gradient in given.items()}
    with torch.device("meta"):  # what is asked for beside them has no image, and still a place on the processor
        found = directions.of_images(images, range(len(gradients)))
    expected = torch.stack([directions.probe(index).of(gradient) for index, gradient in given.items()])
    torch.testing.assert_close(found[:count], expected, rtol=1e-12, atol=1e-12)
    assert not found[count:].any()


@pytest.mark.parametrize("count", [2, 12], ids=["few", "many"])
def test_parameters_of_two_precisions_are_projected_together(count):
    gradients = [torch.ones(3, 2, dtype=(torch.float32, torch.float64)[i % 2]) for i in range(count)]
    directions = Directions(gradients, 0)
    images = {index: directions.probe(index).image_of(gradient) for index, gradient in enumerate(gradients)}
    expected = torch.stack([directions.probe(index).of(gradient) for index, gradient in enumerate(gradients)])
    torch.testing.assert_close(directions.of_images(images, range(count)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("share_right", [True, False])
@pytest.mark.parametrize("shape", [(7,), (7, 1), (7, 1, 1), ()], ids=str)
def test_what_has_one_column_has_no_right_side_that_may_be_next_to_nothing(shape, share_right):
    probe = Directions([torch.zeros(shape)], 0, share_right=share_right).probe(0)
    assert probe.right.eq(1).all()
    assert len(probe.left.unique()) == probe.left.numel()


def test_other_seeds_take_other_numbers_of_the_pool_all_over_it():
    drawn = [Directions([torch.zeros(30, 20)], seed).probe(0).left[0] for seed in range(40)]
    assert len(torch.stack(drawn)[:, 0].unique()) > 35  # of 50 places; drawn at random they would be 28 or so
    for one, following in pairwise(drawn):
        assert not set(one[:10].tolist()) & set(following[:10].tolist())
