"""What the recorder sees of a backward pass, and what it does not let pass."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_graddiv.errors import MeasurementError
from lightning_graddiv.per_example import layers
from lightning_graddiv.per_example.ghost import GhostRecorder
from lightning_graddiv.per_example.layers import Layout

N = 4


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def batch(width=5):
    return torch.randn(N, width, dtype=torch.float64)


def every_use(parameters, uses=3):
    return {(index, use): Layout.FIRST for index in range(len(parameters)) for use in range(uses)}


def recorded(net, loss, **kwargs):
    """Watch one backward pass; return what was recorded."""
    parameters = list(net.parameters())
    with GhostRecorder(parameters, every_use(parameters), **kwargs) as recorder:
        recorder.attach(net)
        recorder.begin(N)
        loss(net).backward()
        return recorder.finish()


def test_norms_and_nothing_missed():
    x, net = batch(), nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    found = recorded(net, lambda net: net(x).square().sum())
    for i in range(N):
        alone = torch.autograd.grad(net(x[i : i + 1]).square().sum(), list(net.parameters()))
        for index, gradient in enumerate(alone):
            assert found.sq_norms[index][i] == pytest.approx(float(gradient.square().sum()), rel=1e-12)
    assert found.misses == {}
    assert found.total([0, 1, 2, 3]) == pytest.approx(sum(found.sq_norms.values()))
    assert found.local_sq_norms is None
    assert found.gradient_sq_norm is None


@pytest.mark.parametrize("seed", range(20))
def test_a_use_outside_of_the_layer_is_missed_whatever_the_directions(seed):
    """Two classes: rows of the weight's gradient are each other's negatives."""
    x, y, net = batch(7), torch.tensor([0, 1, 1, 0]), nn.Linear(7, 2).double()

    def loss(net):
        return F.cross_entropy(net(x), y) + F.cross_entropy(F.linear(x.flip(0), net.weight, net.bias), y)

    assert recorded(net, loss, seed=seed).misses == dict.fromkeys((0, 1), "it is used outside of its layer")


def test_a_parameter_without_a_layer_is_missed():
    net = nn.Linear(5, 3).double()
    net.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))
    x = batch()
    misses = recorded(net, lambda net: (net(x) * net.scale).square().sum()).misses
    assert list(misses.values()) == ["no layer with a rule uses it"]


def test_a_complex_parameter_is_missed():
    net = nn.Linear(5, 3).double()
    net.phase = nn.Parameter(torch.ones(3, dtype=torch.complex128))
    x = batch()
    assert "it is complex" in recorded(net, lambda net: (net(x) * net.phase.imag).square().sum()).misses.values()


def test_two_backward_passes_are_told_from_one():
    net, x = nn.Linear(5, 3).double(), batch()

    def twice(net):
        loss = net(x).square().sum()
        loss.backward(retain_graph=True)
        return loss

    assert set(recorded(net, twice).misses.values()) == {"it takes part in more than one backward pass"}


def test_a_layer_that_is_used_again_after_it_was_measured_is_missed_unless_that_is_known():
    """With re-entrant checkpoints the second use shows only after the first one's gradient."""
    net, x = nn.Linear(5, 5).double(), batch().requires_grad_()

    def loss(net):
        once = checkpoint(net, x, use_reentrant=True)
        return checkpoint(net, once.tanh(), use_reentrant=True).square().sum()

    assert set(recorded(net, loss).misses.values()) == {"it was used more often than before"}
    assert recorded(net, loss, shared=frozenset({0, 1})).misses == {}


def test_an_input_that_was_changed_after_the_call_is_an_error():
    """Autograd itself does not mind where the weight is frozen."""
    net, x = nn.Linear(5, 3).double(), batch()
    net.weight.requires_grad_(False)

    def loss(net):
        out = net(x)
        x.add_(1)
        return out.square().sum()

    with pytest.raises(MeasurementError, match="`Linear` was changed in place"):
        recorded(net, loss)


def test_an_error_of_ours_does_not_end_the_backward_pass(monkeypatch):
    known = layers.LAYER_TYPES[nn.Linear]
    broken = layers.LayerType(lambda *_: 1 / 0, known.leading, known.accepts)
    monkeypatch.setitem(layers.LAYER_TYPES, nn.Linear, broken)
    net, x = nn.Linear(5, 3).double(), batch()
    with pytest.raises(MeasurementError, match="Recording the backward pass failed: division by zero"):
        recorded(net, lambda net: net(x).square().sum())
    assert net.weight.grad is not None


def test_gradients_that_are_not_finite_are_an_error():
    net, x = nn.Linear(5, 3).double(), batch()
    with pytest.raises(MeasurementError, match="not finite"):
        recorded(net, lambda net: net(x).sum() * float("inf"))


def test_rows_that_do_not_hold_the_examples_are_missed():
    net, x = nn.Linear(5, 3).double(), batch()
    misses = recorded(net, lambda net: net(x[:3]).square().sum()).misses
    assert all("do not hold the examples" in reason for reason in misses.values())


def test_the_gradient_so_far_is_known_before_processes_exchange_theirs():
    net, x = nn.Linear(5, 3).double(), batch()
    net(2 * x).sum().backward()
    found = recorded(net, lambda net: net(x).square().sum(), keeps_local=True)
    assert sum(found.local_sq_norms.values()) == pytest.approx(
        float(sum(p.grad.square().sum() for p in net.parameters()))
    )


def test_the_norm_of_a_pass_is_kept_where_it_is_asked_for():
    net, x = nn.Linear(5, 3).double(), batch()
    found = recorded(net, lambda net: net(x).square().sum(), keeps_norms=True)
    assert found.gradient_sq_norm == pytest.approx(float(sum(p.grad.square().sum() for p in net.parameters())))


def test_it_is_not_known_where_a_parameter_was_not_reached():
    net, x = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 3)]).double(), batch()
    (net[0](x) + net[1](x)).sum().backward()
    assert set(recorded(net, lambda net: net[0](x).sum(), keeps_local=True).local_sq_norms) == {0, 1}


def test_projections_are_those_of_the_gradient():
    net, x = nn.Linear(5, 3).double(), batch()
    parameters = list(net.parameters())
    with GhostRecorder(parameters, every_use(parameters)) as recorder:
        recorder.attach(net)
        recorder.begin(N)
        net(x).square().sum().backward()
        found = recorder.finish()
        applied = recorder.projected([p.grad for p in parameters])
    torch.testing.assert_close(found.received.projections(), applied)


def test_leaving_removes_every_hook():
    net = nn.Linear(5, 3).double()
    recorded(net, lambda net: net(batch()).sum())
    assert not net._forward_hooks
    assert not net.weight._backward_hooks


def test_a_frozen_layer_and_an_inference_pass_are_not_watched():
    net = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2)).double()
    net[0].requires_grad_(False)
    parameters = [p for p in net.parameters() if p.requires_grad]
    with GhostRecorder(parameters, every_use(parameters)) as recorder:
        recorder.attach(net)
        recorder.begin(N)
        with torch.no_grad():
            net(batch())
        assert recorder.uses == []
        assert not net[0]._forward_hooks
