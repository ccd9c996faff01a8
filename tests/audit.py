"""The audit device: after a backward pass, `w.grad[i]` is the weight with which example i entered the optimizer step.

Example i is the one-hot vector e_i and the loss is mean(x @ w), so every error of bookkeeping shows: an example that is
in no step, or in two, or with the wrong weight. The gradients are orthogonal, so B_S is the number of distinct
examples.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tests import devices


class Audited:
    """Records the weights of each optimizer step and the size of each micro-batch; for either LightningModule."""

    def __init__(self, examples: int, learning_rate: float = 0.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(examples))
        self.learning_rate = learning_rate
        self.steps: list[Tensor] = []
        self.step_epochs: list[int] = []
        self.micro_batches: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x,) = batch
        self.log("train_loss", (x @ self.w).mean())
        return (x @ self.w).mean()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.micro_batches.append(len(batch[0]))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.steps.append(self.w.grad.detach().cpu().clone())
        self.step_epochs.append(self.current_epoch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), self.learning_rate)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}

    def steps_of(self, epoch: int) -> list[Tensor]:
        return [step for step, of in zip(self.steps, self.step_epochs, strict=True) if of == epoch]


class AuditModule(Audited, LightningModule):
    """The audit device as `lightning.pytorch` trains it."""


class ValidatedAudit(AuditModule):
    """Records the epoch of each validation too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.validations: list[int] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", (batch[0] @ self.w).mean())

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.validations.append(self.current_epoch)


def one_hot(examples: int) -> Dataset[Any]:
    return TensorDataset(torch.eye(examples))


def loader(examples: int, batch_size: int, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(one_hot(examples), batch_size, **{"shuffle": True, **kwargs})


def quiet_trainer(kind: Any = Trainer, **kwargs: Any) -> Any:
    return kind(
        **{
            **devices.accelerator(kwargs),
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **kwargs,
        }
    )


class ScaledInFull(MixedPrecision):
    """A gradient scaler over steps in float32: a power of two, which costs no digit."""

    def __init__(self, scale: float = 2.0**12) -> None:
        super().__init__("16-mixed", devices.DEVICE, torch.amp.GradScaler(devices.DEVICE, init_scale=scale))

    def autocast_context_manager(self) -> torch.autocast:
        return torch.autocast(devices.DEVICE, enabled=False)


def assert_each_example_once(module: AuditModule, epoch: int) -> None:
    """Every example is in exactly one step of the epoch, and a step's weights add up to one."""
    steps = torch.stack(module.steps_of(epoch))
    torch.testing.assert_close(steps.sum(1), torch.ones(len(steps)))
    assert torch.equal((steps > 0).sum(0), torch.ones(steps.shape[1], dtype=torch.long))


@contextmanager
def warned(match: str) -> Iterator[list[str]]:
    """Expect a warning of ours, and collect all of ours: `pytest.warns` would raise again what Lightning warns of."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    said = (str(warning.message) for warning in caught)
    ours = "GradientDiversityMonitor|AdaptiveBatchSize|Collector|Engine|DropConnect|DifferentialDiversityMonitor"
    messages += [text for text in said if re.search(ours, text)]
    assert any(re.search(match, message) for message in messages), messages
