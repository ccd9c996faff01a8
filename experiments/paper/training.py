"""Training with Lightning as the paper trains: plain SGD and a constant step size, looked at after each pass."""

import copy
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple, TypeVar

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_graddiv import DiversityEstimate, GradientDiversityMonitor, measure_moments

Data = tuple[Tensor, Tensor]
Result = TypeVar("Result")


class Examples(Dataset):
    """Tensors from which a loader takes a whole batch at a time."""

    def __init__(self, data: Data) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data[0])

    def __getitem__(self, index: int) -> Data:
        return self.data[0][index], self.data[1][index]

    def __getitems__(self, indices: list[int]) -> Data:
        return self.data[0][indices], self.data[1][indices]


class Classifier(L.LightningModule):
    """Plain SGD on the mean loss. The paper sums the gradients of a batch: its step size is learning_rate / batch."""

    def __init__(self, net: nn.Module, learning_rate: float) -> None:
        super().__init__()
        self.net = net
        self.learning_rate = learning_rate

    def training_step(self, batch: Data) -> Tensor:
        return loss_of(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


def loss_of(outputs: Tensor, labels: Tensor) -> Tensor:
    if outputs.ndim == 1:  # one logit for two classes
        return F.binary_cross_entropy_with_logits(outputs, labels.to(outputs.dtype))
    return F.cross_entropy(outputs, labels)


class Score(NamedTuple):
    """Mean loss and share of correct answers over a whole data set."""

    loss: float
    accuracy: float


@torch.no_grad()
def score(net: nn.Module, data: Data) -> Score:
    outputs = torch.cat([net(part) for part in data[0].split(512)])
    answers = outputs > 0 if outputs.ndim == 1 else outputs.argmax(1)
    loss = float(loss_of(outputs, data[1]))
    return Score(loss if math.isfinite(loss) else math.inf, float((answers == data[1]).float().mean()))


class Readings(GradientDiversityMonitor):
    """The monitor, keeping what it read: passes made, the bound and its interval."""

    def __init__(self, every_n_steps: int) -> None:
        super().__init__(every_n_steps=every_n_steps)
        self.readings: list[tuple[float, float, float, float]] = []

    def on_estimate(self, trainer: L.Trainer, pl_module: Classifier, estimate: DiversityEstimate) -> None:  # noqa: ARG002
        done = self.optimizer_steps / trainer.num_training_batches
        self.readings.append((done, estimate.bound, estimate.lower, estimate.upper))


class AfterEachPass(L.Callback):
    """Calls a function of the pass and the network after each pass; ends training when that returns True."""

    def __init__(self, look: Callable[[int, nn.Module], bool | None]) -> None:
        self.look = look

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Classifier) -> None:
        if self.look(trainer.current_epoch + 1, pl_module.net):
            trainer.should_stop = True


def fit(
    net: nn.Module,
    data: Data,
    *,
    batch_size: int,
    learning_rate: float,
    passes: int,
    seed: int,
    callbacks: Sequence[L.Callback] = (),
    **trainer_options: Any,
) -> L.Trainer:
    """Train a network in place; the seed decides the order of the examples and nothing else."""
    loader = DataLoader(
        Examples(data),
        batch_size=batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
        collate_fn=lambda batch: batch,
    )
    trainer = L.Trainer(
        max_epochs=passes,
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **trainer_options,
    )
    trainer.fit(Classifier(net, learning_rate), loader)
    return trainer


def new_network(make: Callable[..., nn.Module], data: Data, seed: int, **options: Any) -> nn.Module:
    """Make a network for images, the same for the same seed."""
    torch.manual_seed(seed)
    return make(data[0].shape[1], data[0].shape[-1], **options)


def exact_bound(net: nn.Module, data: Data) -> float:
    """B_S(w) of a whole data set (Definition 5), in float64 on a copy of the network."""
    double = copy.deepcopy(net).double()
    batch = (data[0].double(), data[1])
    moments = measure_moments(double, batch, loss_fn=lambda module, batch: loss_of(module(batch[0]), batch[1]))
    return moments.count * moments.sum_sq_norms / moments.sq_norm_of_sum if moments.sq_norm_of_sum else math.inf


def quiet() -> None:
    """One thread, and none of the advice that is meant for large trainings."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated.*")
    warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda"):
        logging.getLogger(name).setLevel(logging.ERROR)


def over_processes(function: Callable[..., Result], jobs: Iterable[tuple[Any, ...]], workers: int) -> list[Result]:
    """Run independent jobs, each on one thread of its own process, and return their results in order."""
    jobs = list(jobs)
    if workers <= 1:
        quiet()
        return [function(*job) for job in jobs]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=quiet) as pool:
        return [future.result() for future in [pool.submit(function, *job) for job in jobs]]
