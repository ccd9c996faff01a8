"""DiveBatch of Chen, Wang and Sundaram (arXiv 2509.16173), as a Lightning callback, for the race.

At the end of epoch k the batch becomes ``m_(k+1) = min(m_max, delta * n * Delta)``, where ``Delta`` is gradient
diversity accumulated over the epoch, while the weights move: the sum of all examples' squared gradient norms over the
squared norm of the sum of all gradients. The learning rate follows in proportion, or, with ``rescale=False``, stays. As
in code that appears to be the authors', the batch never shrinks, and nothing is measured once it is at ``m_max``. The
paper's full text was not at hand: that the rate follows in proportion is our reading.
"""

import math
import sys
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_graddiv import DiversityEstimate, GradientDiversityMonitor
from lightning_graddiv.diversity import MIN_PROBES_FOR_INTERVAL


class DiveBatch(GradientDiversityMonitor):
    """Needs ``reload_dataloaders_every_n_epochs=1`` and a module with ``examples``, loaded by its ``batch_size``.

    The squared norms come from the step that runs anyway (the in-band engine), which is the cheapest way there is here.
    """

    def __init__(self, max_batch_size: int, delta: float = 0.1, *, rescale: bool = True) -> None:
        super().__init__(every_n_steps=1, window=MIN_PROBES_FOR_INTERVAL)
        self.max_batch_size = max_batch_size
        self.delta = delta
        self.rescale = rescale
        self.diversities: list[float] = []
        self._sum_of_gradients: list[Tensor] = []
        self._sum_sq_norms = 0.0

    @property
    def measures(self) -> bool:
        return self.every_n_steps == 1

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        if pl_module.batch_size >= self.max_batch_size:
            self.every_n_steps = sys.maxsize
        self._sum_of_gradients = [torch.zeros_like(p) for p in pl_module.parameters()]
        self._sum_sq_norms = 0.0

    def on_estimate(self, trainer: L.Trainer, pl_module: Any, estimate: DiversityEstimate) -> None:  # noqa: ARG002
        probe = self._window.probes[-1]
        self._sum_sq_norms += probe.sum_sq_norms
        gradients = [p.grad for p in pl_module.parameters()]  # of the batch's mean loss
        torch._foreach_add_(self._sum_of_gradients, gradients, alpha=probe.count)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if not self.measures:
            return
        sq_norm_of_sum = float(sum(total.square().sum() for total in self._sum_of_gradients))
        self.diversities.append(self._sum_sq_norms / sq_norm_of_sum if sq_norm_of_sum > 0 else float("inf"))
        size = next_batch_size(
            pl_module.batch_size, self.diversities[-1], len(pl_module.examples), self.delta, self.max_batch_size
        )
        if self.rescale:
            scale_learning_rate(trainer, size / pl_module.batch_size)
        pl_module.batch_size = size


def next_batch_size(batch_size: int, diversity: float, dataset_size: int, delta: float, max_batch_size: int) -> int:
    """Return ``delta * n * Delta``, between the present size and the largest; the present one for what is no number."""
    if math.isnan(diversity):
        return batch_size
    return int(min(max(delta * dataset_size * diversity, batch_size), max_batch_size))


def scale_learning_rate(trainer: L.Trainer, factor: float) -> None:
    """Multiply the learning rate by a factor for good: now, and in what the schedule will set."""
    for config in trainer.lr_scheduler_configs:
        config.scheduler.base_lrs = [rate * factor for rate in config.scheduler.base_lrs]
    for group in trainer.optimizers[0].param_groups:
        group["lr"] *= factor
