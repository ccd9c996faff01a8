"""Handwritten digits, three times: a small batch, a large batch, and a batch that grows as far as it may.

The three runs share the model, the data, the epochs and the optimizer. The large batch gets a learning rate scaled by
the square root of its size: of the three usual rules the one that serves it best here (benchmarks/digits.py tries all).

    python examples/digits.py [--seed 0] [--epochs 40] [--out outputs]
"""

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from data import digits
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_graddiv import AdaptiveBatchSize
from lightning_graddiv.plotting import plot_accuracy, plot_batch_size, read_metrics

SMALL, LARGE = 16, 512
LEARNING_RATE = 0.05  # suits the small batch
EPOCHS = 40


class Classifier(L.LightningModule):
    """A perceptron, trained by SGD with momentum and a cosine schedule. It knows nothing of growing batches."""

    def __init__(self, sizes: Sequence[int] = (64, 64, 10), learning_rate: float = LEARNING_RATE) -> None:
        super().__init__()
        layers = [layer for ends in pairwise(sizes) for layer in (nn.Linear(*ends), nn.ReLU())]
        self.net = nn.Sequential(*layers[:-1])
        self.learning_rate = learning_rate

    def training_step(self, batch):
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch):
        images, labels = batch
        correct = (self.net(images).argmax(1) == labels).float().mean()
        self.log("val_accuracy", correct, prog_bar=True, sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.trainer.max_epochs)]


def adaptive_batch_size() -> AdaptiveBatchSize:
    # An epoch of the small batch has 75 steps only, so measure more often than every 100 steps.
    return AdaptiveBatchSize(max_batch_size=LARGE, every_n_steps=4)


@dataclass
class Run:
    """What is left of a training."""

    name: str
    accuracy: float
    steps: int
    seconds: float
    batch_size: int
    overhead: float  # seconds measuring over seconds training
    metrics: dict


def train(
    name: str,
    model: L.LightningModule,
    data: tuple[TensorDataset, TensorDataset],
    batch_size: int,
    *,
    epochs: int,
    out: Path,
    callback: AdaptiveBatchSize | None = None,
    verbose: bool = True,
    **trainer_options,
) -> Run:
    """Train a model with Lightning as anybody would, then look at what the CSVLogger wrote."""
    train_data, test_data = data
    logger = CSVLogger(out, name=name.replace(" ", "-"), version="")
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=logger,
        log_every_n_steps=1,
        callbacks=[*([callback] if callback else []), *([EpochLines(name)] if verbose and not is_live() else [])],
        enable_progress_bar=verbose and is_live(),
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        **trainer_options,
    )
    start = time.perf_counter()
    trainer.fit(
        model,
        DataLoader(train_data, batch_size=batch_size, shuffle=True),
        DataLoader(test_data, batch_size=len(test_data)),
    )
    seconds = time.perf_counter() - start
    return Run(
        name=name,
        accuracy=float(trainer.callback_metrics["val_accuracy"]),
        steps=trainer.global_step,
        seconds=seconds,
        batch_size=callback.batch_size if callback else batch_size * trainer.world_size,
        overhead=float(trainer.callback_metrics.get("graddiv/overhead", 0)),
        metrics=read_metrics(logger.log_dir) if trainer.is_global_zero else {},
    )


class EpochLines(L.Callback):
    """Instead of a progress bar, where there is no terminal: a line for about every eighth part of the run."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_epoch_end(self, trainer, pl_module):  # noqa: ARG002 - Lightning's signature
        epoch = trainer.current_epoch + 1
        if not trainer.is_global_zero or epoch % max(1, trainer.max_epochs // 8):
            return
        seen = trainer.callback_metrics
        bound = f"   B_S(w) {seen['graddiv/batch_size_bound']:.0f}" if "graddiv/batch_size_bound" in seen else ""
        print(
            f"{self.name:8}   epoch {epoch:3}   {trainer.global_step:6,} steps   "
            f"accuracy {100 * seen['val_accuracy']:.1f} %{bound}",
            flush=True,
        )


def is_live() -> bool:
    return sys.stdout.isatty()


def table(runs: Sequence[Run]) -> str:
    lines = [f"{'batch':12}{'test accuracy':>15}{'optimizer steps':>18}{'seconds':>10}{'final batch size':>19}"]
    lines += [
        f"{run.name:12}{100 * run.accuracy:13.1f} %{run.steps:18,}{run.seconds:10.1f}{run.batch_size:19,}"
        for run in runs
    ]
    return "\n".join(lines)


def verdict(small: Run, adaptive: Run) -> str:
    return (
        f"Growing instead of small: {small.steps / adaptive.steps:.1f} times fewer optimizer steps, "
        f"{100 * (adaptive.accuracy - small.accuracy):+.1f} points of accuracy. "
        f"Measuring added {adaptive.overhead:.0%} to the training time."
    )


def picture(runs: Sequence[Run], path: Path, *, ylim: tuple[float, float]) -> None:
    """Draw the last run's batch size beside the accuracy of all runs."""
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    plot_batch_size(runs[-1].metrics, ax=left)
    plot_accuracy({run.name: run.metrics for run in reversed(runs)}, ax=right)
    right.set(ylim=ylim, ylabel="test accuracy")
    figure.get_layout_engine().set(wspace=0.06)
    figure.savefig(path, dpi=160)


def train_digits(
    name: str, seed: int, *, epochs: int, out: Path, batch_size: int = SMALL, learning_rate_factor: float = 1, **options
) -> Run:
    """Train on digits, the same way for the same seed."""
    L.seed_everything(seed, verbose=False)
    model = Classifier(learning_rate=LEARNING_RATE * learning_rate_factor)
    return train(name, model, digits(), batch_size, epochs=epochs, out=out, **options)


def three_runs(seed: int, epochs: int, out: Path) -> list[Run]:
    print(f"\nA small batch: {SMALL} throughout, learning rate {LEARNING_RATE}", flush=True)
    small = train_digits("small", seed, epochs=epochs, out=out)

    factor = (LARGE / SMALL) ** 0.5
    print(f"\nA large batch: {LARGE} throughout, learning rate {LEARNING_RATE * factor:.3f}", flush=True)
    large = train_digits("large", seed, epochs=epochs, out=out, batch_size=LARGE, learning_rate_factor=factor)

    print(f"\nA batch that starts at {SMALL} and may grow to {LARGE}, learning rate {LEARNING_RATE}", flush=True)
    adaptive = train_digits("adaptive", seed, epochs=epochs, out=out, callback=adaptive_batch_size())
    return [small, large, adaptive]


def quiet(*, decisions: bool = True) -> None:
    """Let only the callback's decisions through, and no advice for large trainings, which is wrong for small ones."""
    for message in (".*does not have many workers.*", ".*Experiment logs directory.*", ".*LeafSpec.*is deprecated.*"):
        warnings.filterwarnings("ignore", message)
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    log.addFilter(lambda record: decisions and record.getMessage().startswith("AdaptiveBatchSize"))


def main(arguments: Sequence[str] | None = None) -> list[Run]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the picture and the metrics")
    options = parser.parse_args(arguments)
    quiet()
    torch.set_num_threads(1)  # on matrices this small, threads wait for one another

    runs = three_runs(options.seed, options.epochs, options.out / "digits")
    small, _, adaptive = runs
    print(f"\n{table(runs)}\n\n{verdict(small, adaptive)}")
    picture(runs, options.out / "digits.png", ylim=(0.9, 1))
    print(f"Picture: {options.out / 'digits.png'}")
    return runs


if __name__ == "__main__":
    main()
