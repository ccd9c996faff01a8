"""Gradients by their projections: what can be told of them, and that none is held."""

import gc
import weakref

import pytest
import torch
from torch import nn

from lightning_graddiv.per_example.factors import Explicit
from lightning_graddiv.per_example.functional import differentiate
from lightning_graddiv.per_example.losses import StepLoss, measuring
from lightning_graddiv.per_example.sketches import Sketcher, gradients_let_go


def step(dtype=torch.float64, sparse=False):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(20, 6, sparse=sparse), nn.Linear(6, 30), nn.Tanh(), nn.Linear(30, 1)).to(dtype)
    batch = torch.randint(0, 20, (8, 3))
    return net, StepLoss(net, loss_fn=lambda net, batch: net(batch).square().sum()), batch


@pytest.mark.parametrize("sparse", [False, True])
def test_norms_are_exact_and_projections_keep_distances(sparse):
    net, loss, batch = step(sparse=sparse)
    sketcher = Sketcher(loss.parameters, 3)
    with measuring(net):
        sketches = [sketcher.differentiated(loss, batch[part]) for part in (slice(0, 4), slice(4, 8), slice(0, 8))]
        gradients = [differentiate(loss, batch[part]) for part in (slice(0, 4), slice(4, 8))]
    exact = torch.stack([gradient.square().sum() for gradient in gradients[0]])
    torch.testing.assert_close(sketches[0].sq_norms, exact, rtol=1e-10, atol=0)
    together = sketches[0].projections + sketches[1].projections  # drawing is linear
    torch.testing.assert_close(together, sketches[2].projections, rtol=1e-9, atol=1e-12)
    apart = float((sketches[0].flat - sketches[1].flat).norm())
    true = sum(float((a - b).square().sum()) for a, b in zip(*gradients, strict=True)) ** 0.5
    assert 0.4 * true < apart < 2.5 * true


def test_a_contribution_is_drawn_like_the_gradient_that_it_is():
    net, loss, batch = step()
    sketcher = Sketcher(loss.parameters, 3)
    with measuring(net):
        rows = [differentiate(loss, batch[i : i + 1])[1] for i in range(3)]
        sketches = [sketcher.differentiated(loss, batch[i : i + 1]).projections[1] for i in range(3)]
    found = sketcher.contributed(1, Explicit(torch.stack(rows)))
    torch.testing.assert_close(found, torch.stack(sketches), rtol=1e-9, atol=1e-12)


def test_gradients_are_let_go_of_one_at_a_time():
    """When one comes by, those before it are gone."""
    _, loss, batch = step()
    seen, alive = [], []

    def look(index, gradient):
        gc.collect()
        alive.append(sum(storage() is not None for storage in seen))
        seen.append(weakref.ref(gradient.untyped_storage()))

    with gradients_let_go(loss.parameters, look):
        differentiate(loss, batch)
    assert len(seen) == 5
    assert max(alive) <= 1


def test_nothing_is_left_on_the_parameters():
    net, loss, batch = step()
    with measuring(net):
        Sketcher(loss.parameters, 0).differentiated(loss, batch)
    net(batch).sum().backward()
    assert all(bool(parameter.grad.any()) for parameter in net[1:].parameters())
