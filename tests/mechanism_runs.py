"""Real trainings on two processes (DDP over gloo) with mechanisms, and at two weight vectors.

Run as `python -m tests.mechanism_runs FOLDER`; test_mechanisms_ddp.py reads the folder.
"""

import hashlib
import os
import sys
from dataclasses import asdict

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.utils.data import DataLoader, TensorDataset

from lightning_graddiv import (
    DifferentialDiversityMonitor,
    DropConnect,
    GradientDiversityMonitor,
    GradientQuantization,
    LangevinNoise,
)
from tests.audit import ScaledInFull, quiet_trainer
from tests.processes import record

SIZES = (5, 3)
HIDDEN = 120
STEPS = 60


def two_processes(*callbacks, **kwargs):
    return quiet_trainer(
        **{
            "max_epochs": 1,
            "callbacks": list(callbacks),
            "strategy": "ddp",
            "devices": 2,
            "log_every_n_steps": 1,
            "use_distributed_sampler": False,
            **kwargs,
        }
    )


class Share(LightningModule):
    """Each process has a batch of its own, the same at every step unless weights move."""

    def __init__(self, learning_rate=0.0, sizes=SIZES, steps=STEPS, hidden=HIDDEN, dropout=0.0):
        super().__init__()
        torch.manual_seed(3)
        layers = nn.Linear(6, hidden), nn.Tanh(), nn.Dropout(dropout), nn.Linear(hidden, 1)
        self.net = nn.Sequential(*layers).double()
        self.learning_rate, self.sizes, self.steps = learning_rate, sizes, steps
        self.gradients = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        return (self.net(x)[:, 0] - y).square().mean()

    def train_dataloader(self):
        x, y = batch_of(self.trainer.global_rank, self.sizes)
        return DataLoader(TensorDataset(x.repeat(self.steps, 1), y.repeat(self.steps)), len(x))

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append(flat(p.grad for p in self.parameters()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.learning_rate, momentum=0.9)


def batch_of(rank, sizes=SIZES):
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(sizes[rank], 6, dtype=torch.float64, generator=generator)
    return x, x.sum(1).sin() + torch.randn(len(x), dtype=torch.float64, generator=generator)


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def bits(*tensors):
    return hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)).hexdigest()


def state(module):
    """What must be the same on both processes, to the bit."""
    return {"weights": bits(*module.parameters()), "gradients": bits(*module.gradients)}


def moments(found, rank):
    """Written once: the applied gradients of every step."""
    return {"applied": torch.stack(found).tolist()} if rank == 0 else {}


def quantised_moments(rank):
    module, mechanism = Share(), GradientQuantization()
    two_processes(mechanism, GradientDiversityMonitor(every_n_steps=10**9)).fit(module)
    return {**state(module), **moments(module.gradients, rank), "effect": asdict(mechanism.effect)}


def masked_moments(rank):
    module, mechanism = Share(), DropConnect(0.3)
    two_processes(mechanism, GradientDiversityMonitor(every_n_steps=10**9)).fit(module)
    return {**state(module), **moments(module.gradients, rank), "effect": asdict(mechanism.effect)}


def masked_examples(rank):
    module, mechanism = Share(steps=30), DropConnect(0.3, per="example")
    two_processes(mechanism, GradientDiversityMonitor(every_n_steps=10**9)).fit(module)
    return {**state(module), **moments(module.gradients, rank), "effect": asdict(mechanism.effect)}


def ends_of(mechanism, **kwargs):
    module = Single()
    two_processes(mechanism, **kwargs).fit(module)
    return bits(*module.parameters())


class Updates(Share):
    """Keeps what the optimizer did, from weights that hardly move."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-9)

    def on_train_batch_start(self, batch, batch_idx):
        self.before = flat(self.parameters())

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.gradients[-1] = (self.before - flat(self.parameters())) / 1e-9


def langevin_moments(rank):
    module, mechanism = Updates(), LangevinNoise(0.5)
    two_processes(mechanism).fit(module)
    return {**state(module), **moments(module.gradients, rank), "effect": asdict(mechanism.effect)}


class Single(Share):
    """In float32, under a gradient scaler that costs no digit, or without one."""

    def __init__(self):
        super().__init__(0.05, steps=12, hidden=20)
        self.net.float()

    def training_step(self, batch, batch_idx):
        return super().training_step([part.float() for part in batch], batch_idx)


def trainings(rank):
    """With momentum, accumulation and clipping: ranks in sync, a monitor without a trace, a resumption to the bit."""
    made = {
        "quantised": GradientQuantization,
        "masked": lambda: DropConnect(0.3),
        "langevin": lambda: LangevinNoise(0.1),
    }
    common = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    results = {}
    for name, make in made.items():
        plain = Share(0.05, steps=12, hidden=20)
        trainer = two_processes(make(), max_epochs=2, **common)
        trainer.fit(plain)

        watched = Share(0.05, steps=12, hidden=20)
        monitor = GradientDiversityMonitor(every_n_steps=2)
        two_processes(make(), monitor, max_epochs=2, **common).fit(watched)

        first = Share(0.05, steps=12, hidden=20)
        trainer = two_processes(make(), **common)
        trainer.fit(first)
        path = trainer.strategy.broadcast(os.path.join(sys.argv[1], f"{name}.ckpt"))
        trainer.save_checkpoint(path)
        resumed = Share(0.05, steps=12, hidden=20)
        two_processes(make(), max_epochs=2, **common).fit(resumed, ckpt_path=path)
        results[name] = {
            "plain": state(plain),
            "watched": state(watched),
            "resumed": bits(*resumed.parameters()),
            "scaled": [ends_of(make(), plugins=plugins, **common) for plugins in ([], [ScaledInFull()])],
            "measurements": monitor.measurements,
            "bound": monitor.latest.bound,
        }
    unmasked = GradientDiversityMonitor(every_n_steps=1)
    module = Share(steps=8, hidden=20)
    two_processes(unmasked).fit(module)
    beside = GradientDiversityMonitor(every_n_steps=1)
    two_processes(GradientQuantization(), beside).fit(Share(steps=8, hidden=20))
    results["probes"] = [[asdict(p) for p in m._window.probes] for m in (unmasked, beside)]
    return results


def taken_hook(rank):
    strategy = DDPStrategy(ddp_comm_hook=fp16_compress_hook)
    try:
        two_processes(GradientQuantization(), strategy=strategy).fit(Share(steps=1))
    except MisconfigurationException as error:
        return {"said": str(error)}
    return {"said": ""}


def not_finite_on_one(rank):
    class Broken(Share):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (float("inf") if rank == 1 else 1.0)

    module = Broken(steps=1)
    two_processes(GradientQuantization()).fit(module)
    return {"all": bool(module.gradients[0].isnan().all())}


def differential(rank):
    """Uneven shares, at the weights and at those of a second run."""
    second = Share(hidden=20)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(torch.linspace(-0.3, 0.3, parameter.numel(), dtype=torch.float64).view_as(parameter))
    reference = {name: value.clone() for name, value in second.state_dict().items()}
    monitor = DifferentialDiversityMonitor(every_n_steps=1, reference=reference)
    two_processes(monitor).fit(Share(steps=6, hidden=20))
    return {
        "probes": [asdict(probe) for probe in monitor._probes],
        "cap": asdict(monitor.learning_rate_cap(8)),
        "bound": monitor.latest.diversity.bound,
    }


def differential_refused_on_one(rank):
    class Sometimes(Share):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if rank == 1 and batch_idx == 3 else loss

    monitor = DifferentialDiversityMonitor(every_n_steps=1)
    module = Sometimes(0.01, steps=6, hidden=20)
    two_processes(monitor).fit(module)
    return {"measurements": monitor.measurements}


RUNS = (
    quantised_moments,
    masked_moments,
    masked_examples,
    langevin_moments,
    trainings,
    taken_hook,
    not_finite_on_one,
    differential,
    differential_refused_on_one,
)


if __name__ == "__main__":
    record(RUNS)
