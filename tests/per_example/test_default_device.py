"""Tensors of ours are made where they belong, whatever device is the default (`torch.set_default_device`)."""

import copy

import pytest
import torch
from torch import nn

from lightning_graddiv import measure_moments, per_example_squared_norms
from lightning_graddiv.per_example.ghost_engine import GhostEngine
from lightning_graddiv.per_example.losses import StepLoss

NETS = {
    "linear": lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)),
    "spatial": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(8, 2)
    ),
    "many": lambda: nn.Sequential(*(layer for _ in range(12) for layer in (nn.Linear(6, 6), nn.Tanh()))),
}


def loss(net, batch):
    return net(batch).square().mean()


@pytest.mark.parametrize("engine", ["auto", "ghost", "functional", "loop", "microbatch"])
@pytest.mark.parametrize("name", NETS)
def test_engines(name, engine):
    torch.manual_seed(0)
    net, batch = NETS[name](), torch.randn(8, 6)
    expected = measure_moments(net, batch, loss_fn=loss, engine=engine)
    with torch.device("meta"):
        found = measure_moments(net, batch, loss_fn=loss, engine=engine)
        if engine != "microbatch":
            assert per_example_squared_norms(net, batch, loss_fn=loss, engine=engine).device.type == "cpu"
    assert found == expected


@pytest.mark.parametrize("holds_all", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_a_step(name, holds_all):
    torch.manual_seed(0)
    net, batch = NETS[name](), torch.randn(8, 6)
    sums = []
    for device in ("cpu", "meta"):
        module, engine = copy.deepcopy(net), GhostEngine()
        parameters = list(module.parameters())
        with torch.device(device):
            mask = engine.check(StepLoss(module, loss_fn=loss), batch, len(batch), seed=0)
            engine.adopt(mask, module, parameters)
            step = engine.step(parameters, compares_processes=True, holds_all=holds_all, seed=0, noise_seed=0)
            step.forward(module, None, batch, len(batch), 1)
            value = loss(module, batch)
            step.look_at(value)
            value.backward()
            step.backward(1.0)
            sums.append((step.sums, step.projections.tolist(), step.local_sq_norm, step.untouched_sq_norms()))
            step.close()
    assert sums[0] == sums[1]
