"""Gradients of one backward pass: norms, projections, and whether they are still what they were."""

import pytest
import torch
from torch import nn

from lightning_graddiv.per_example.directions import Directions
from lightning_graddiv.per_example.received import Received


def after_a_backward_pass(*, keep, at_once, dtype=torch.float64):
    """Enter gradients as they come by, or at once when the pass is over, of which the first was looked at before."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    parameters = list(net.parameters())
    found = Received(parameters, Directions(parameters, 0), keeps_norms=True, keeps_local=False)
    if at_once:
        if 0 not in keep:
            parameters[0].register_hook(lambda gradient: found.look_at(0, gradient))
    else:
        for index, parameter in enumerate(parameters):
            parameter.register_hook(lambda gradient, index=index: found.add(index, gradient, keep=index in keep))
    net(torch.randn(4, 5, dtype=dtype)).square().sum().backward()
    gradients = [parameter.grad for parameter in parameters]
    if at_once:
        found.add_all(dict(enumerate(gradients)), sq_norms_of(gradients), keep)
    return found, parameters, gradients


def sq_norms_of(gradients):
    real = {index: gradient for index, gradient in enumerate(gradients) if not gradient.is_complex()}
    return {index: float(gradient.to_dense().square().sum()) for index, gradient in real.items()}


def projected(parameters, gradients):
    """Return ``sum_k left_k G_k right_k`` over the parameters."""
    directions, total = Directions(parameters, 0), torch.zeros(4, dtype=torch.float64)
    for index, gradient in enumerate(gradients):
        left, right = directions.probe(index).left.double(), directions.right(index).double()
        total += left @ gradient.double().reshape(left.shape[1], len(right)) @ right
    return total


at_once = pytest.mark.parametrize("at_once", [False, True], ids=["as they come by", "at once"])


@at_once
@pytest.mark.parametrize("keep", [(), (1, 3), (0, 1, 2, 3)], ids=["none", "biases", "all"])
def test_norms_and_projections_are_those_of_the_gradients(keep, at_once):
    found, parameters, gradients = after_a_backward_pass(keep=keep, at_once=at_once)
    assert sorted(found.indices) == sorted(found.sq_norms) == [0, 1, 2, 3]
    for index, gradient in enumerate(gradients):
        assert found.sq_norms[index] == pytest.approx(float(gradient.square().sum()), rel=1e-12)
        torch.testing.assert_close(found.image(index), Directions(parameters, 0).image_of(index, gradient))
    expected = projected(parameters, gradients)
    torch.testing.assert_close(found.projections(), expected, rtol=1e-10, atol=1e-10)


@at_once
@pytest.mark.parametrize("keep", [(), (1, 3), (0, 1, 2, 3)], ids=["none", "biases", "all"])
def test_gradients_that_nobody_touched_are_recognised(keep, at_once):
    found, _, gradients = after_a_backward_pass(keep=keep, at_once=at_once)
    assert found.is_still(gradients)


CHANGES = {
    "scaled": lambda gradients: gradients[0].mul_(1.5),
    "one entry": lambda gradients: gradients[2][0, 0].add_(1e-9),
    "a bias": lambda gradients: gradients[3][1].mul_(2),
    "another tensor with the same numbers": lambda gradients: gradients.__setitem__(0, gradients[0] * 2),
    "on another device": lambda gradients: gradients.__setitem__(1, gradients[1].to("meta")),
    "one less": lambda gradients: gradients.__setitem__(1, None),
    "sparse": lambda gradients: gradients.__setitem__(0, gradients[0].to_sparse()),
}


@at_once
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("keep", [(), (1, 3), (0, 1, 2, 3)], ids=["none", "biases", "all"])
def test_gradients_that_somebody_changed_are_not(keep, change, at_once):
    found, _, gradients = after_a_backward_pass(keep=keep, at_once=at_once)
    CHANGES[change](gradients)
    assert not found.is_still(gradients)


@at_once
def test_a_gradient_that_was_there_before_is_not_what_the_pass_gave(at_once):
    found, parameters, _ = after_a_backward_pass(keep=(1, 3), at_once=at_once)
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
    torch.testing.assert_close(found.projections(), projected(parameters, [parts.sum(0)]))


def test_of_a_gradient_that_is_looked_at_in_two_parts_the_whole_is_entered():
    parameters = [nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))]
    found = Received(parameters, Directions(parameters, 0), keeps_norms=True, keeps_local=False)
    parts = torch.randn(2, 3, 4, dtype=torch.float64)
    found.look_at(0, parts[0])
    found.look_again(0)
    assert 0 not in found
    found.add_all({0: parts.sum(0)}, sq_norms_of([parts.sum(0)]), keep=())
    assert found.sq_norms[0] == pytest.approx(float(parts.sum(0).square().sum()))
    torch.testing.assert_close(found.projections(), projected(parameters, [parts.sum(0)]))


def test_sparse_and_complex_gradients_are_entered_at_once_too():
    table, phase = nn.Embedding(6, 3, sparse=True), nn.Parameter(torch.ones(3, dtype=torch.complex64))
    parameters = [table.weight, phase]
    (table(torch.tensor([1, 1, 4])) * phase).abs().square().sum().backward()
    gradients = [parameter.grad for parameter in parameters]
    assert gradients[0].is_sparse
    found = Received(parameters, Directions(parameters, 0), keeps_norms=True, keeps_local=False)
    found.add_all(dict(enumerate(gradients)), sq_norms_of(gradients), keep=())
    dense = gradients[0].to_dense()
    assert found.sq_norms == pytest.approx(
        {0: float(dense.square().sum()), 1: float(gradients[1].abs().square().sum())}
    )
    torch.testing.assert_close(found.image(0), Directions(parameters, 0).image_of(0, dense))
    assert found.image(1) is None


def test_what_is_known_need_not_be_read():
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(3, 4, dtype=torch.float64)) for _ in range(2)]
    gradients = [torch.randn(3, 4, dtype=torch.float64) for _ in parameters]
    found = Received(parameters, Directions(parameters, 0), keeps_norms=True, keeps_local=False)
    known = {0: gradients[0].clone()}
    found.add_all(dict(enumerate(gradients)), {**sq_norms_of(gradients), 0: 7.0}, keep=(), known=known)
    assert 0 in found
    assert found.indices == {0, 1}
    assert found.sq_norms == {0: 7.0, 1: pytest.approx(float(gradients[1].square().sum()))}
    expected = projected(parameters, gradients)
    torch.testing.assert_close(found.projections(), expected)
    assert found.is_still(gradients)
    gradients[0].mul_(2)
    torch.testing.assert_close(found.projections(), expected)
    assert not found.is_still(gradients)
