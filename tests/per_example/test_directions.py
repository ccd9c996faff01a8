"""The random directions in which gradients are compared."""

from itertools import pairwise

import pytest
import torch

from lightning_graddiv.per_example import directions
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
        assert torch.equal(first.right(index), probe.right[0])
    numbers = torch.cat([torch.cat([p.left, p.right], 1) for p in map(first.probe, range(len(SHAPES)))], 1)
    assert len(numbers.unique()) > 0.999 * numbers.numel()  # none serves two parameters


def test_numbers_are_the_same_whether_their_pool_fits_on_the_device_or_not(monkeypatch):
    kept = Directions(parameters(), 5)
    monkeypatch.setattr(directions, "_KEPT_BYTES", 0)
    sent = Directions(parameters(), 5)
    for index in range(len(SHAPES)):
        assert torch.equal(sent.right(index), kept.right(index))
        assert torch.equal(sent.probe(index).left, kept.probe(index).left)
        assert torch.equal(sent.probe(index).right, kept.probe(index).right)


def test_only_short_vectors_are_handled_together():
    assert Directions(parameters(), 0).vectors == {1, 4, 5}
    assert Directions(parameters(), 0).small == {0, 1, 2, 3, 4, 5}
    assert Directions([torch.zeros(3), torch.zeros(3, dtype=torch.float64)], 0).vectors == {0}
    assert Directions([torch.zeros(3, dtype=torch.complex64)], 0).vectors == set()
    assert Directions([], 0).vectors == set()


def test_all_parameters_together_are_the_sum_of_each():
    directions, given = Directions(parameters(), 0), gradients()
    expected = torch.zeros(4, dtype=torch.float64)
    for index, gradient in given.items():
        left, right = directions.probe(index).left, directions.right(index)
        expected += left @ (gradient.reshape(left.shape[1], len(right)) @ right)
    torch.testing.assert_close(directions.projections_of(given), expected, rtol=1e-12, atol=1e-12)
    assert directions.projections_of({}).tolist() == [0.0] * 4


@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_a_parameter_that_is_left_out_counts_as_zero(index):
    directions, given = Directions(parameters(), 0), gradients()
    without = {i: gradient for i, gradient in given.items() if i != index}
    zero = without | {index: torch.zeros(SHAPES[index], dtype=torch.float64)}
    torch.testing.assert_close(directions.projections_of(without), directions.projections_of(zero))
    assert float((directions.projections_of(without) - directions.projections_of(given)).abs().max()) > 0.01


def test_they_are_random_where_a_proof_has_switched_noise_off():
    shapes = [torch.zeros(17, 23)]
    with noise_off():
        probe = Directions(shapes, 0).probe(0)
    assert len(probe.left.unique()) == probe.left.numel()


def test_images_are_projected_as_the_gradients_are():
    directions, given = Directions(parameters(), 0), gradients()
    images = {index: directions.image_of(index, gradient) for index, gradient in given.items()}
    torch.testing.assert_close(
        directions.projections_of_images(images), directions.projections_of(given), rtol=1e-12, atol=1e-12
    )
    for index, image in images.items():
        alone = directions.projections_of_images({index: image})
        torch.testing.assert_close(alone, directions.probe(index).left.double() @ image, rtol=1e-12, atol=1e-12)


def test_parameters_of_two_precisions_are_projected_together():
    given = {i: torch.ones(3, 2, dtype=(torch.float32, torch.float64)[i % 2]) for i in range(12)}
    directions = Directions(list(given.values()), 0)
    exact = Directions([gradient.double() for gradient in given.values()], 0)
    expected = exact.projections_of({index: gradient.double() for index, gradient in given.items()})
    torch.testing.assert_close(directions.projections_of(given), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(7,), (7, 1), (7, 1, 1), ()], ids=str)
def test_what_has_one_column_has_no_right_side_that_may_be_next_to_nothing(shape):
    directions = Directions([torch.zeros(shape)], 0)
    probe = directions.probe(0)
    assert probe.right.eq(1).all()
    assert directions.right(0).eq(1).all()
    assert len(probe.left.unique()) == probe.left.numel()


def test_other_seeds_take_other_numbers_of_the_pool_all_over_it():
    drawn = [Directions([torch.zeros(30, 20)], seed).probe(0).left[0] for seed in range(40)]
    assert len(torch.stack(drawn)[:, 0].unique()) > 35  # of 50 places; drawn at random they would be 28 or so
    for one, following in pairwise(drawn):
        assert not set(one[:10].tolist()) & set(following[:10].tolist())
