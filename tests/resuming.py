"""A training whose every optimizer step is written down, so that a resumed one can be held against it."""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_graddiv import AdaptiveBatchSize
from tests.audit import quiet_trainer

EXAMPLES = 61
EPOCHS = 4


@dataclass
class Step:
    """What one optimizer step was made of."""

    epoch: int
    batches: list[int]
    examples: list[list[int]]
    rate: float
    weights: Tensor = field(repr=False)


class Traced(LightningModule):
    """A net with dropout, momentum, and a schedule that counts steps."""

    def __init__(self, rate: float = 0.05) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1))
        self.rate = rate
        self.steps: list[Step] = []
        self.validations: list[tuple[int, int]] = []
        self._open: list[tuple[int, list[int]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        numbers, x, y = batch
        self._open.append((batch_idx, numbers.tolist()))
        loss = (self.net(x)[:, 0] - y).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", (self.net(batch[1])[:, 0] - batch[2]).square().mean())

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.validations.append((self.current_epoch, self.global_step))

    def on_train_start(self) -> None:
        self.first_step = self.global_step

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.global_step > len(self.steps) + self.first_step:
            self.steps.append(self.latest_step())
            self._open = []

    def latest_step(self) -> Step:
        """Return the optimizer step that has just been taken."""
        batches, examples = zip(*self._open, strict=True)
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        return Step(self.current_epoch, list(batches), list(examples), rate, self.weights())

    def weights(self) -> Tensor:
        """Return this process's weights, in one vector."""
        return torch.cat([getattr(p, "to_local", p.detach)().detach().flatten() for p in self.parameters()])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), self.rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.99**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Augmented(Dataset[Any]):
    """Rows with noise from the generator that a user's data set would use."""

    def __init__(self, rows: TensorDataset, noise: str) -> None:
        self.rows, self.noise = rows, noise

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        number, x, y = self.rows[index]
        noise = {"python": random.random, "numpy": np.random.rand, "torch": lambda: torch.rand(()).item()}[self.noise]
        return number, x + 0.1 * noise(), y


def numbered_rows(examples: int = EXAMPLES) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(examples, 4, generator=generator)
    return TensorDataset(torch.arange(examples), x, x.sum(1).sin() + 0.5 * torch.randn(examples, generator=generator))


def train_loader(**kwargs: Any) -> DataLoader[Any]:
    return DataLoader(kwargs.pop("dataset", None) or numbered_rows(), **{"batch_size": 4, "shuffle": True, **kwargs})


def val_loader() -> DataLoader[Any]:
    return DataLoader(numbered_rows(8), 4)


def growing(**kwargs: Any) -> AdaptiveBatchSize:
    return AdaptiveBatchSize(
        **{"every_n_steps": 1, "max_batch_size": 32, "cooldown": 9, "policy": always, "scale_lr": "gain", **kwargs}
    )


def always(estimate: Any, run: Any) -> float:
    return 1000.0


class Saves(Callback):
    """Writes a checkpoint in every hook of a training, as a signal handler or another callback could."""

    HOOKS = (
        "on_train_batch_start",
        "on_before_zero_grad",
        "on_before_backward",
        "on_after_backward",
        "on_before_optimizer_step",
        "on_train_batch_end",
        "on_validation_start",
        "on_validation_end",
        "on_train_epoch_start",
        "on_train_epoch_end",
    )

    def __init__(self, folder: Path, hooks: tuple[str, ...] = HOOKS) -> None:
        self.folder = folder
        self.files: list[Path] = []
        for hook in hooks:
            setattr(self, hook, lambda trainer, *_, hook=hook, **__: self.save(trainer, hook))

    def save(self, trainer: Any, hook: str) -> None:
        if trainer.sanity_checking:
            return
        batch = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        self.files.append(self.folder / f"{len(self.files):04d}-{hook}-epoch{trainer.current_epoch}-batch{batch}.ckpt")
        trainer.save_checkpoint(self.files[-1])


def run(
    callback: Any, loader: Any, *others: Any, ckpt_path: Any = None, seed: int = 5, module: Any = None, **kwargs: Any
) -> Any:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    module = Traced() if module is None else module
    trainer = quiet_trainer(**{"max_epochs": EPOCHS, "callbacks": [callback, *others], **kwargs})
    trainer.fit(module, loader, val_loader(), ckpt_path=ckpt_path)
    return module, trainer


def differences(whole: Any, resumed: Any) -> list[str]:
    """Say in what a resumed run differs from the rest of the one that was not interrupted.

    Args:
        whole: the module and the callback of the uninterrupted run.
        resumed: those of the other.
    """
    (module, callback), (again, other) = whole, resumed
    rest = module.steps[getattr(again, "first_step", again.global_step) :]  # none after a checkpoint of the very end
    found = [] if len(again.steps) == len(rest) else [f"{len(again.steps)} steps for {len(rest)}"]
    for number, (a, b) in enumerate(zip(again.steps, rest, strict=False)):
        same = {
            "epoch": a.epoch == b.epoch,
            "batches": a.batches == b.batches,
            "examples": a.examples == b.examples,
            "rate": a.rate == b.rate,
            "weights": torch.equal(a.weights, b.weights),
        }
        if not all(same.values()):
            found.append(f"step {number} of epoch {b.epoch}: {[name for name in same if not same[name]]}")
            break
    if again.validations != module.validations[len(module.validations) - len(again.validations) :]:
        found.append(f"validations {again.validations} for {module.validations}")
    if again.steps and again.trainer.fit_loop.epoch_loop._batches_that_stepped != again.global_step:
        found.append("steps that loggers count")
    names = ("latest",) * bool(again.steps) + (
        "history",
        "examples_seen",
        "optimizer_steps",
        "measurements",
        "batch_size",
    )
    return found + [name for name in names if getattr(callback, name) != getattr(other, name)]
