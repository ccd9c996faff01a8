"""What in-band measuring is held against: every optimizer step again, example by example, on copies."""

import copy
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_graddiv import GradientDiversityMonitor
from tests.audit import quiet_trainer


@dataclass
class Step:
    """What one optimizer step was made of, on one process."""

    weights: dict[str, Tensor]
    batches: list[Any] = field(default_factory=list)
    divisor: int = 1


class Witness(LightningModule):
    """Trains ``net`` and remembers the weights and micro-batches of every optimizer step."""

    def __init__(self, net: nn.Module, loss: Any = None, learning_rate: float = 0.05) -> None:
        super().__init__()
        self.net = net
        self.loss = loss or mean_squares
        self.learning_rate = learning_rate
        self.steps: list[Step] = []
        self.opens = True

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.opens:
            weights = {name: value.detach().clone() for name, value in self.net.state_dict().items()}
            self.steps.append(Step(weights, divisor=self.trainer.accumulate_grad_batches))
            self.opens = False
        self.steps[-1].batches.append(copy.deepcopy(batch))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.net, batch)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.opens = True

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], self.learning_rate)


class Collector(GradientDiversityMonitor):
    """Keeps the moments of every measurement."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"every_n_steps": 1, **kwargs})
        self.probes: list[Any] = []
        self.coverages: list[float] = []

    def on_estimate(self, trainer: Any, pl_module: Any, estimate: Any) -> None:
        self.probes.append(self._window.probes[-1])
        self.coverages.append(self._coverage)


class Convolutional(nn.Module):
    """Rules of four kinds, and an activation in place."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(3, 8, 3, padding=1, padding_mode="circular"),
            nn.GroupNorm(2, 8),
            nn.ReLU(inplace=True),
            nn.Conv1d(8, 6, 3, stride=2),
            nn.LayerNorm(5),
            nn.Flatten(),
            nn.Linear(30, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Wide(nn.Module):
    """For 16 bits: what the applied gradient is rounded by averages out over many entries."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(3, 64, 3, padding=1),
            nn.GroupNorm(4, 64),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(768, 128),
            nn.ReLU(inplace=True),
            nn.Linear(128, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def mean_squares(net: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.mse_loss(net(x), y)


def signals(examples: int = 48, dtype: torch.dtype = torch.float32, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 3, 12, generator=generator, dtype=dtype)
    return TensorDataset(x, x.mean(2).repeat(1, 2)[:, :4] + torch.randn(examples, 4, generator=generator, dtype=dtype))


def trained(module: Any, data: Any = None, *, batch_size: int = 8, monitor: Any = None, **kwargs: Any) -> Any:
    """Train for an epoch, measuring every step; return the monitor."""
    monitor = monitor or Collector()
    loader = data if isinstance(data, DataLoader) else DataLoader(data or signals(), batch_size)
    trainer = quiet_trainer(**{"max_epochs": 1, "callbacks": [monitor], "log_every_n_steps": 1, **kwargs})
    trainer.fit(module, loader)
    return monitor


def contributions(
    net: nn.Module, loss: Any, step: Step, *, autocast: Any = None, world: int = 1
) -> tuple[Tensor, Tensor]:
    """Return each example's contribution to the step's gradient, float64, and its weight, one by one."""
    net = copy.deepcopy(net).to(step.batches[0][0].device)
    net.load_state_dict(step.weights)
    parameters = [p for p in net.parameters() if p.requires_grad]
    found, weights = [], []
    for batch in step.batches:
        examples = len(batch[0])
        for i in range(examples):
            with autocast() if autocast else nullcontext():
                value = loss(net, [part[i : i + 1] for part in batch])
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
            flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
            weights.append(1 / (world * step.divisor * examples))
            found.append(weights[-1] * torch.cat([g.to_dense().flatten() for g in flat]).double())
    return torch.stack(found).cpu(), torch.tensor(weights, dtype=torch.float64)


def rho_of(found: Tensor, weights: Tensor) -> tuple[float, float]:
    """Return rho and M_eff of contributions with these weights."""
    count = float(weights.sum() ** 2 / weights.square().sum())
    own, together = float(found.square().sum()), float(found.sum(0).square().sum())
    return (together - own) / ((count - 1) * own), count


def rho(probe: Any) -> float:
    return (probe.sq_norm_of_sum - probe.sum_sq_norms) / ((probe.count - 1) * probe.sum_sq_norms)


def worst_error(probes: Any, module: Witness, **kwargs: Any) -> float:
    """Return the largest (M - 1) |rho - rho of the loop| over the steps."""
    assert len(probes) == len(module.steps) > 0
    errors = []
    for probe, step in zip(probes, module.steps, strict=True):
        expected, count = rho_of(*contributions(module.net, module.loss, step, **kwargs))
        assert abs(probe.count - count) < 1e-9 * count
        errors.append((count - 1) * abs(rho(probe) - expected))
    return max(errors)
