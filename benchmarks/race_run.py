"""One run of the race: a contestant trains on a track in a real Trainer, and the clock counts all but evaluating."""

import logging
import math
import os
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import lightning as L
import race_tracks
import torch
from divebatch import DiveBatch
from race_contestants import CONTESTANTS, callback_arguments
from race_tracks import TRACKS, Data, Track, accuracy
from torch import Tensor
from torch.utils.data import DataLoader
from training import Examples

from lightning_graddiv import AdaptiveBatchSize, GradientDiversityMonitor

COLUMNS = ("seconds", "steps", "examples", "accuracy", "batch_size")
"""What each evaluation takes down."""


@dataclass(frozen=True)
class Plan:
    """One run, as numbers and names: what a finished run is found again by.

    Attributes:
        track: name of the track.
        contestant: name of the contestant.
        rate: learning rate that the schedule starts from.
        seed: of the initial weights and of the order of the examples.
        threads: of torch.
        jobs: runs at a time.
        epochs: passes over the examples.
        target: accuracy to reach.
        ends_at_target: whether the run ends there.
        overrides: arguments of AdaptiveBatchSize other than its defaults.
    """

    track: str
    contestant: str
    rate: float
    seed: int
    threads: int
    jobs: int
    epochs: int
    target: float
    ends_at_target: bool = False
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def key(self) -> dict[str, Any]:
        """Return all that a run depends on, the callback's defaults too."""
        track = TRACKS[self.track]
        return {**asdict(self), "callback": callback_arguments(CONTESTANTS[self.contestant], track, self.overrides)}


class Training(L.LightningModule):
    """A track's network, with a cosine from the rate to zero over all examples.

    Attributes:
        examples: to train on.
        batch_size: of the next loader.
        progress: share of all examples seen, of the scheduler's steps.
    """

    def __init__(self, track: Track, data: Data, *, batch_size: int, rate: float, seed: int, warm_up: float) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = track.net()
        self.track = track
        self.examples = Examples(data.train)
        self.batch_size = batch_size
        self.rate = rate
        self.warm_up = warm_up
        self.seed = seed
        self.progress: Callable[[int], float]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(
            self.examples,
            self.batch_size,
            shuffle=True,
            generator=torch.Generator().manual_seed(self.seed + self.current_epoch),
            collate_fn=take_batch,
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:  # noqa: ARG002
        return batch if self.track.augment is None else (self.track.augment(batch[0]), batch[1])

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.track.loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = self.track.optimizer(self.parameters(), self.rate)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.schedule(self.progress(step)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def schedule(self, done: float) -> float:
        """Return the factor on the rate when this share of all examples is done."""
        ramp = min(1.0, (done + 1e-3) / self.warm_up) if self.warm_up > 0 else 1.0
        return ramp * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def take_batch(batch: Any) -> Any:
    """Return what the data set has put together already."""
    return batch


class Clock:
    """Adds up the seconds between start or resume, and pause."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._resumed: float | None = None

    @property
    def seconds(self) -> float:
        return self._seconds + (0.0 if self._resumed is None else time.perf_counter() - self._resumed)

    def resume(self) -> None:
        self._resumed = time.perf_counter()

    def pause(self) -> None:
        self._seconds, self._resumed = self.seconds, None


class Start(L.Callback):
    """First of the callbacks: starts the clock before the first batch is fetched, and takes down when batches start."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.batch_started = 0.0

    def on_train_start(self, *_: Any) -> None:
        self.clock.resume()

    def on_train_batch_start(self, *_: Any) -> None:
        self.batch_started = time.perf_counter()


class Evaluations(L.Callback):
    """Last of the callbacks: evaluates at fixed numbers of examples, with the clock stopped.

    Attributes:
        curve: the columns of :data:`COLUMNS`.
        step_seconds: by batch size and whether it was measured, the seconds of each batch with all callbacks' hooks.
    """

    def __init__(
        self, start: Start, plan: Plan, data: Data, every: float, measuring: GradientDiversityMonitor | None
    ) -> None:
        self.start, self.plan, self.data = start, plan, data
        self.clock = start.clock
        self.every = every
        self.measuring = measuring
        self.examples = 0
        self.curve: dict[str, list[float]] = {column: [] for column in COLUMNS}
        self.step_seconds: dict[tuple[int, bool], list[float]] = {}
        self._measurements = 0
        self._batch_size = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Training) -> None:
        self._batch_size = pl_module.batch_size
        self.evaluate(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Training,
        outputs: Any,  # noqa: ARG002
        batch: Any,
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        size = len(batch[0])
        if self.measuring is not None:
            is_measured = self.measuring.measurements > self._measurements
            self._measurements = self.measuring.measurements
            seconds = time.perf_counter() - self.start.batch_started
            self.step_seconds.setdefault((size, is_measured), []).append(seconds)
        before, self.examples = self.examples, self.examples + size
        if isinstance(self.measuring, AdaptiveBatchSize):
            self._batch_size = self.measuring.batch_size
        else:
            self._batch_size = pl_module.batch_size
        if self.examples // self.every > before // self.every:
            self.evaluate(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: Training) -> None:
        if self.curve["examples"][-1] < self.examples:
            self.evaluate(trainer, pl_module)
        finish(pl_module.device)
        self.clock.pause()

    def evaluate(self, trainer: L.Trainer, module: Training) -> None:
        finish(module.device)
        self.clock.pause()
        found = held_out_accuracy(module.net, self.data.held_out)
        row = (self.clock.seconds, trainer.global_step, self.examples, found, self._batch_size)
        for column, value in zip(COLUMNS, row, strict=True):
            self.curve[column].append(value)
        if self.plan.ends_at_target and found >= self.plan.target:
            trainer.should_stop = True
        self.clock.resume()


def finish(device: torch.device) -> None:
    """Wait for what the device has still to do: that is training, too."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def held_out_accuracy(net: torch.nn.Module, held_out: tuple[Tensor, Tensor]) -> float:
    """Evaluate and leave the network as it was: in the same mode, and without a random number."""
    was_training = net.training
    net.eval()
    outputs = torch.cat([net(part) for part in held_out[0].split(1000)])
    net.train(was_training)
    return accuracy(outputs, held_out[1])


def first_reached(curve: Mapping[str, Sequence[float]], target: float, column: str) -> float | None:
    """Return the seconds or steps at which accuracy first reaches the target; None if it never does.

    Between the first evaluation that reaches it and the one before, it is put on a straight line.
    """
    accuracies, values = curve["accuracy"], curve[column]
    for i, found in enumerate(accuracies):
        if found >= target:
            if i == 0:
                return values[0]
            share = (target - accuracies[i - 1]) / (found - accuracies[i - 1])
            return values[i - 1] + share * (values[i] - values[i - 1])
    return None


def overhead_seen(step_seconds: Mapping[tuple[int, bool], Sequence[float]]) -> float | None:
    """Return how many seconds measured batches took longer than the middle plain one of their size.

    Sizes of which all were measured are left out; None: all were.
    """
    extra = [
        sum(seconds) - len(seconds) * statistics.median(step_seconds[size, False])
        for (size, is_measured), seconds in step_seconds.items()
        if is_measured and (size, False) in step_seconds
    ]
    return sum(extra) if extra else None


def overhead_logged(callback: GradientDiversityMonitor, clock: Clock) -> float:
    """Return the seconds of measuring by the callback's own account, which counts our evaluations as training."""
    overhead, total = callback._stopwatch.overhead, callback._stopwatch._total()
    return min(clock.seconds, overhead / (1 + overhead) * total)


def train(plan: Plan) -> dict[str, Any]:
    """Run one plan and return what came out, as numbers and lists."""
    track = TRACKS[plan.track]
    contestant = CONTESTANTS[plan.contestant]
    data = track.data()
    callback = contestant.callback(track, plan.overrides)
    module = Training(
        track,
        data,
        batch_size=contestant.batch_size(track),
        rate=plan.rate,
        seed=plan.seed,
        warm_up=contestant.warm_up,
    )
    examples = len(module.examples)
    steps = plan.epochs * math.ceil(examples / module.batch_size)
    module.progress = lambda step: step / steps
    if isinstance(callback, DiveBatch):  # its loaders change, and nothing makes a schedule follow
        module.progress = lambda _: callback.examples_seen / (plan.epochs * examples)
    start = Start(Clock())
    evaluations = Evaluations(start, plan, data, examples / track.evaluations, callback)
    trainer = L.Trainer(
        max_epochs=plan.epochs,
        callbacks=[start, *([] if callback is None else [callback]), evaluations],
        accelerator="gpu" if track.needs_cuda else "cpu",
        devices=1,
        reload_dataloaders_every_n_epochs=int(isinstance(callback, DiveBatch)),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cpu_seconds = time.process_time()
        trainer.fit(module)
        cpu_seconds = time.process_time() - cpu_seconds
    # Other work on the machine shows in these two: seconds of a run that it slowed down say little.
    machine = {"cpu_seconds": cpu_seconds, "load": os.getloadavg()[0]}
    return {**outcome(plan, evaluations, callback), **machine, "warnings": own_warnings(caught)}


def outcome(plan: Plan, evaluations: Evaluations, callback: L.Callback | None) -> dict[str, Any]:
    curve, clock = evaluations.curve, evaluations.clock
    found: dict[str, Any] = {
        "seconds": clock.seconds,
        "steps": curve["steps"][-1],
        "accuracy": curve["accuracy"][-1],
        "batch_size": curve["batch_size"][-1],
        "seconds_to_target": first_reached(curve, plan.target, "seconds"),
        "steps_to_target": first_reached(curve, plan.target, "steps"),
        "curve": curve,
    }
    if isinstance(callback, GradientDiversityMonitor):
        found["measurements"] = callback.measurements
        found["dropped"] = callback.dropped
        found["overhead_logged"] = overhead_logged(callback, clock)
        found["overhead_seen"] = overhead_seen(evaluations.step_seconds)
    if isinstance(callback, AdaptiveBatchSize):
        found["growths"] = [
            [g.step, g.examples_seen, g.to_batch_size, g.learning_rate_factor] for g in callback.history
        ]
    return found


def own_warnings(caught: Sequence[warnings.WarningMessage]) -> list[str]:
    texts = dict.fromkeys(str(warning.message) for warning in caught)
    return [text for text in texts if "AdaptiveBatchSize" in text or "DiveBatch" in text]


def quiet() -> None:
    """None of the advice that is meant for large trainings, and no line for each growth."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("lightning_utilities.core.rank_zero").setLevel(logging.ERROR)


def run(plan: Plan) -> dict[str, Any]:
    """Run one plan in a worker; a failure comes back as its traceback."""
    try:
        return train(plan)
    except Exception:
        return {"failed": traceback.format_exc()}


def begin(cores: Queue, track: str, data_dir: Path | None) -> None:
    """Make this process one that runs: on these cores, with as many threads, its data read and its code warm."""
    mine = cores.get()
    os.sched_setaffinity(0, mine)
    torch.set_num_threads(len(mine))
    race_tracks.DATA_DIR = data_dir
    quiet()
    warm_up(track)


def warm_up(name: str) -> None:
    """Train a few steps, measured ones too: the first fit of a process pays for what all share."""
    track = TRACKS[name]
    data = track.data()
    few = Data((data.train[0][:4096], data.train[1][:4096]), (data.held_out[0][:64], data.held_out[1][:64]), "")
    module = Training(track, few, batch_size=32, rate=0.0, seed=0, warm_up=0.0)
    module.progress = lambda _: 0.0
    adaptive = AdaptiveBatchSize(max_batch_size=64, every_n_steps=4, engine=track.engine)
    trainer = L.Trainer(
        max_epochs=1,
        callbacks=[adaptive],
        accelerator="gpu" if track.needs_cuda else "cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module)
