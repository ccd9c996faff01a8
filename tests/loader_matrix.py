"""The loader matrix: every way in which Lightning may be given training data, generated, and one training on each.

The whole product has thousands of corners. :func:`covering` picks few of them that still hold every combination of any
two values, or of any three.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, get_worker_info

from tests.audit import ValidatedAudit, one_hot, quiet_trainer

EXAMPLES = 61
EPOCHS = 3


@dataclass(frozen=True)
class Corner:
    """One way to give training data."""

    data: str
    source: str
    workers: str
    drop_last: bool
    accumulate: int
    mode: str | None
    reload: int
    limit: str
    beside: str | None

    def __str__(self) -> str:
        return " ".join(
            f"{name}={value}" for name, value in vars(self).items() if value not in (None, False, "none", 0)
        )

    @property
    def is_possible(self) -> bool:
        """Whether Lightning can: it makes loaders anew only from hooks, and limits no stream by a fraction."""
        from_hooks = self.reload or self.beside == "BatchSizeFinder"
        is_stream = self.data == "stream"
        fraction_of_a_stream = is_stream and self.limit in ("half", "overfit")
        tuned_once = self.beside is None or self.limit in ("none", "half")
        finds = not (self.beside == "BatchSizeFinder" and (self.mode or self.data == "two"))
        return not (from_hooks and self.source == "loader") and not fraction_of_a_stream and tuned_once and finds

    @property
    def knows_its_end(self) -> bool:
        """Whether the last window of an epoch is known for what it is when it begins."""
        return self.data != "stream"


VALUES = {
    "data": ("map", "merged", "two", "stream", "sized stream"),
    "source": ("loader", "datamodule"),
    "workers": ("none", "2", "2 persistent", "2 prefetching one"),
    "drop_last": (False, True),
    "accumulate": (1, 2),
    "mode": (None, "min_size", "max_size", "max_size_cycle"),
    "reload": (0, 1),
    "limit": ("none", "half", "number", "overfit", "fast_dev_run"),
    "beside": (None, "BatchSizeFinder", "LearningRateFinder"),
}


@cache
def covering(values_at_once: int, workers: str | None = None) -> list[Corner]:
    """Return corners that hold every possible combination of so many values; with one kind of workers, if given."""
    columns = [values if name != "workers" or workers is None else (workers,) for name, values in VALUES.items()]
    corners = [corner for row in itertools.product(*columns) if (corner := Corner(*row)).is_possible]
    random.Random(0).shuffle(corners)
    left = [(corner, frozenset(itertools.combinations(vars(corner).items(), values_at_once))) for corner in corners]
    picked: list[Corner] = []
    seen: set[Any] = set()
    for least in (20, 10, 5, 1):  # those with much that is new first
        for corner, combinations in left:
            if len(combinations - seen) >= least:
                picked.append(corner)
                seen |= combinations
        left = [(corner, combinations) for corner, combinations in left if combinations - seen]
    return picked


class Backwards(BatchSampler):
    """Another batch sampler than torch's, whose batches may be merged."""

    def __iter__(self) -> Iterator[list[int]]:
        *batches, last = super().__iter__()
        return iter([*reversed(batches), last])


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        info, rows = get_worker_info(), torch.eye(EXAMPLES)
        return iter([(row,) for row in (rows if info is None else rows[info.id :: info.num_workers])])


class SizedStream(Stream):
    def __len__(self) -> int:
        return EXAMPLES


class Data(LightningDataModule):
    """Loaders of a corner; their batch size may be tuned."""

    def __init__(self, corner: Corner) -> None:
        super().__init__()
        self.corner, self.batch_size = corner, 4

    def train_dataloader(self) -> Any:
        corner = self.corner
        data: Any = {"stream": Stream(), "sized stream": SizedStream()}.get(corner.data, one_hot(EXAMPLES))
        kwargs: dict[str, Any] = {"batch_size": self.batch_size, "drop_last": corner.drop_last}
        if corner.data in ("map", "two"):
            kwargs["shuffle"] = corner.limit != "overfit"
        if corner.data == "merged":
            kwargs = {"batch_sampler": Backwards(RandomSampler(data), self.batch_size, corner.drop_last)}
        if corner.workers != "none":
            kwargs |= {"num_workers": 2, "persistent_workers": "persistent" in corner.workers}
            kwargs |= {"prefetch_factor": 1 if "prefetching" in corner.workers else 2}
        loader: Any = DataLoader(data, **kwargs)
        if corner.data == "two":
            loader = [loader, DataLoader(data, **kwargs)]
        return loader if corner.mode is None else CombinedLoader(loader, corner.mode)

    def val_dataloader(self) -> Any:
        return DataLoader(one_hot(EXAMPLES), 16)


class Ordered(ValidatedAudit):
    """Trains on the first of several loaders. Notes the length of each epoch, as expected and as taken."""

    def __init__(self) -> None:
        super().__init__(EXAMPLES, learning_rate=0.1)
        self.lengths: list[tuple[float, int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(_first(batch), batch_idx)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(_first(batch), batch_idx)

    def on_train_start(self) -> None:
        for seen in (self.steps, self.step_epochs, self.micro_batches, self.validations, self.lengths):
            seen.clear()  # of a tuner's own trainings

    def on_train_epoch_end(self) -> None:
        self.lengths.append(
            (self.trainer.num_training_batches, self.trainer.fit_loop.epoch_loop.batch_progress.current.ready)
        )


def _first(batch: Any) -> Any:
    return batch[0] if len(batch) == 2 else batch


def train(corner: Corner, folder: Any, *callbacks: Any, **options: Any) -> tuple[Ordered, Trainer]:
    """Train on a corner, from the same random numbers each time."""
    torch.manual_seed(1)
    limits = {
        "none": {},
        "half": {"limit_train_batches": 0.5},
        "number": {"limit_train_batches": 9},
        "overfit": {"overfit_batches": 8},
        "fast_dev_run": {"fast_dev_run": 6},
    }[corner.limit]
    beside = {
        None: [],
        "BatchSizeFinder": [BatchSizeFinder(steps_per_trial=1, init_val=1, max_trials=2)],
        "LearningRateFinder": [LearningRateFinder(min_lr=1e-3, max_lr=1e-2, num_training_steps=3)],
    }[corner.beside]
    trainer = quiet_trainer(
        max_epochs=EPOCHS,
        callbacks=[*callbacks, *beside],
        accumulate_grad_batches=corner.accumulate,
        reload_dataloaders_every_n_epochs=corner.reload,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        **limits,
        **options,
    )
    module, data = Ordered(), Data(corner)
    if corner.source == "datamodule":
        trainer.fit(module, datamodule=data)
    else:
        trainer.fit(module, data.train_dataloader(), data.val_dataloader())
    return module, trainer
