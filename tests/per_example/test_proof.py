"""What is proven before a rule is trusted."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_graddiv import per_example_squared_norms
from lightning_graddiv.errors import MeasurementError, MixingError
from lightning_graddiv.per_example.layers import Layout
from lightning_graddiv.per_example.losses import StepLoss, measuring
from lightning_graddiv.per_example.proof import prove

N = 12


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def proven(net, loss, *batch, seed=0, parts=2):
    net = net.double()
    with measuring(net):
        plan, _ = prove(StepLoss(net, loss_fn=loss), batch, len(batch[0]), seed=seed, parts=parts)
    return plan


def rows(*shape):
    return torch.randn(N, *shape, dtype=torch.float64)


def squares(net, batch):
    return net(batch[0]).square().flatten(1).sum(1).mean()


@pytest.mark.parametrize(
    ("arranged", "layout"),
    [
        (lambda net, x: net(x), Layout.FIRST),
        (lambda net, x: net(x.transpose(0, 1)).transpose(0, 1), Layout.SECOND),
        (lambda net, x: net(x.flatten(0, 1)).unflatten(0, (len(x), -1)), Layout.FOLDED),
        (lambda net, x: net(torch.cat([x[:, 0], x[:, 1]])).unflatten(0, (2, -1)).transpose(0, 1), Layout.STRIDED),
    ],
    ids=["first", "second", "folded", "strided"],
)
def test_it_finds_out_where_the_examples_lie(arranged, layout):
    plan = proven(nn.Linear(3, 2), lambda net, b: arranged(net, b[0]).square().sum((1, 2)).mean(), rows(5, 3))
    assert plan.misses == {}
    assert set(plan.layouts.values()) == {layout}


@pytest.mark.parametrize(
    ("loss", "reduction"),
    [
        (squares, "mean"),
        (lambda net, b: net(b[0]).square().sum(), "sum"),
        (lambda net, b: (net(b[0]).square().sum(1) * b[0].abs().sum(1)).sum() / b[0].abs().sum(), "weighted"),
    ],
    ids=["mean", "sum", "weighted"],
)
def test_it_finds_out_how_the_loss_adds_up_its_examples(loss, reduction):
    plan = proven(nn.Linear(3, 2), loss, rows(3))
    assert plan.reduction == reduction
    assert plan.misses == {}


def test_a_layer_that_is_used_twice_is_known_to_be_shared():
    plan = proven(nn.Linear(3, 3), lambda net, b: net(net(b[0]).tanh()).square().sum(1).mean(), rows(3))
    assert plan.shared == {0, 1}


def test_a_use_outside_of_the_layer_is_no_cover():
    net = nn.Linear(3, 3)
    plan = proven(net, lambda net, b: F.linear(net(b[0]).tanh(), net.weight).square().sum(1).mean(), rows(3))
    assert set(plan.misses) == {0}


def test_rows_in_another_order_are_no_cover():
    """Only two of the examples change places, and the few that are looked at first do not show it."""
    kind = torch.zeros(32, dtype=torch.long)
    kind[30] = 1
    x = torch.randn(32, 4, dtype=torch.float64)

    def grouped(net, batch):
        x, kind = batch
        order = kind.argsort(stable=True)
        return net[1](net[0](x).tanh()[order])[order.argsort()].square().sum(1).mean()

    plan = proven(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), grouped, x, kind)
    assert 2 in plan.misses
    assert "depends on the others" in plan.misses[2]


def test_examples_that_are_mixed_with_certain_others_only_are_found():
    pair = torch.arange(N)
    pair[2] = pair[4] = 99

    def pairs(net, batch):
        out = net(batch[0])
        together = (batch[1][:, None] == batch[1]).double().triu(1)
        return (out.square().sum() + (together * torch.cdist(out, out).square()).sum()) / len(out)

    outcomes = set()
    for seed in range(6):  # the two must come to lie apart, or both among the few that are tried alone
        try:
            proven(nn.Linear(4, 3), pairs, rows(4), pair, seed=seed, parts=6)
        except (MixingError, MeasurementError):
            outcomes.add("found")
    assert outcomes == {"found"}


def test_mixing_that_happens_by_chance_is_found():
    def sometimes(net, batch):
        x = batch[0]
        if torch.rand(()) > 0.5:
            x = x + x.roll(1, 0)
        return net(x).square().sum(1).mean()

    with pytest.raises(MixingError):
        proven(nn.Linear(3, 2), sometimes, rows(3))


def test_the_ghost_engine_alone_names_what_it_cannot_measure():
    net = nn.Linear(3, 2).double()
    net.scale = nn.Parameter(torch.ones(2, dtype=torch.float64))
    with pytest.raises(
        MeasurementError, match=r"cannot measure 1 of 3 parameters of `Linear`.*`scale`: no layer with a rule uses it"
    ):
        per_example_squared_norms(
            net, (rows(3),), loss_fn=lambda m, b: (m(b[0]) * m.scale).square().sum(1).mean(), engine="ghost"
        )


def test_the_microbatch_engine_has_no_examples_norms():
    with pytest.raises(ValueError, match="`measure_moments` takes it"):
        per_example_squared_norms(nn.Linear(3, 2), (rows(3),), loss_fn=squares, engine="microbatch")
