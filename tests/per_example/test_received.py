"""Gradients of one backward pass: norms, projections, and whether they are still what they were."""

import pytest
import torch
from torch import nn

from lightning_graddiv.per_example.directions import Directions
from lightning_graddiv.per_example.received import Received


def after_a_backward_pass(*, keep, dtype=torch.float64):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    parameters = list(net.parameters())
    found = Received(parameters, Directions(parameters, 0), keeps_norms=True, keeps_local=False)
    for index, parameter in enumerate(parameters):
        parameter.register_hook(lambda gradient, index=index: found.add(index, gradient, keep=index in keep))
    net(torch.randn(4, 5, dtype=dtype)).square().sum().backward()
    return found, parameters, [parameter.grad for parameter in parameters]


@pytest.mark.parametrize("keep", [(1, 3), (0, 1, 2, 3)], ids=["biases", "all"])
def test_norms_and_projections_are_those_of_the_gradients(keep):
    found, parameters, gradients = after_a_backward_pass(keep=keep)
    for index, gradient in enumerate(gradients):
        assert found.sq_norms[index] == pytest.approx(float(gradient.square().sum()), rel=1e-12)
        torch.testing.assert_close(found.of_each([index])[0], Directions(parameters, 0).probe(index).of(gradient))
    expected = Directions(parameters, 0).of(dict(enumerate(gradients)))
    torch.testing.assert_close(found.projections(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("keep", [(), (1, 3), (0, 1, 2, 3)], ids=["none", "biases", "all"])
def test_gradients_that_nobody_touched_are_recognised(keep):
    found, _, gradients = after_a_backward_pass(keep=keep)
    assert found.is_still(gradients)


CHANGES = {
    "scaled": lambda gradients: gradients[0].mul_(1.5),
    "one entry": lambda gradients: gradients[2][0, 0].add_(1e-9),
    "a bias": lambda gradients: gradients[3][1].mul_(2),
    "another tensor with the same numbers": lambda gradients: gradients.__setitem__(0, gradients[0] * 2),
    "one less": lambda gradients: gradients.__setitem__(1, None),
    "sparse": lambda gradients: gradients.__setitem__(0, gradients[0].to_sparse()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("keep", [(), (1, 3), (0, 1, 2, 3)], ids=["none", "biases", "all"])
def test_gradients_that_somebody_changed_are_not(keep, change):
    found, _, gradients = after_a_backward_pass(keep=keep)
    CHANGES[change](gradients)
    assert not found.is_still(gradients)


def test_a_gradient_that_was_there_before_is_not_what_the_pass_gave():
    found, parameters, _ = after_a_backward_pass(keep=(1, 3))
    extra = nn.Parameter(torch.ones(2, dtype=torch.float64))
    extra.grad = torch.ones_like(extra)
    assert not found.is_still([*(parameter.grad for parameter in parameters), extra.grad])


@pytest.mark.parametrize("keeps", [(True, True), (False, False), (True, False), (False, True)], ids=str)
def test_a_gradient_in_two_parts_is_their_sum(keeps):
    parameters = [nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))]
    found = Received(parameters, Directions(parameters, 0), keeps_norms=True, keeps_local=False)
    parts = torch.randn(2, 3, 4, dtype=torch.float64)
    assert 0 not in found
    for part, keep in zip(parts, keeps, strict=True):
        found.add(0, part, keep=keep)
    assert found.came_in_parts
    torch.testing.assert_close(found.projections(), Directions(parameters, 0).probe(0).of(parts.sum(0)))
