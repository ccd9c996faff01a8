"""Table 1: seconds to 90, 95 and 99 % of the training set, on two workers, with DropConnect and without.

MNIST, a convnet, two processes under DDP on one thread each, each masking its own gradient (``per="worker"``). What is
kept is divided by 1 - p, so that one learning rate serves all p; it grows with the root of the batch. Accuracies are
measured five times a pass; seconds are the steps until then times the median step of that run, which a busy minute of
the machine does not move. Lightning starts the second process by running this file again.

    python experiments/paper/dropconnect.py [--quick] [--examples 60000] [--seeds 5] [--data-dir FOLDER]
"""

import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from images import find_images, training_set
from networks import convnet
from results import COLOURS, mean_of, panels, read_options, size_axis, write_csv, write_summary
from training import Data, fit, new_network, quiet, score

from lightning_graddiv import DropConnect

COMMON = {"probabilities": (0.0, 0.4, 0.5), "learning_rate_at_128": 0.14}
QUICK = {"examples": 1024, "passes": 40, "seeds": 1, "side": 14, "width": 8, "batch_sizes": (32, 64, 128), **COMMON}
FULL = {"examples": 60_000, "passes": 30, "seeds": 5, "side": 28, "width": 16, "batch_sizes": (128, 256, 512), **COMMON}

TARGETS = (0.90, 0.95, 0.99)
LOOKS_A_PASS = 5
PAPER = {0.0: (46.97, 57.39, 361.52), 0.4: (24.88, 39.12, 313.60), 0.5: (29.68, 43.24, 317.79)}
PROCESSES = 2


class Clock(L.Callback):
    """Steps and passes to each target, and the median seconds of a step; looks at the whole training set.

    Both processes look at the same weights, and so they agree on when to stop.
    """

    def __init__(self, data: Data) -> None:
        self.data = data
        self.step_seconds: list[float] = []
        self.reached: dict[float, int] = {}

    def on_train_batch_start(self, *_: Any) -> None:
        self.since = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.step_seconds.append(time.perf_counter() - self.since)
        if trainer.global_step % max(1, trainer.num_training_batches // LOOKS_A_PASS):
            return
        accuracy = score(pl_module.net, self.data).accuracy
        for target in TARGETS:
            if accuracy >= target and target not in self.reached:
                self.reached[target] = trainer.global_step
        trainer.should_stop = len(self.reached) == len(TARGETS)


def train(data: Data, probability: float, batch_size: int, seed: int, options: Any) -> dict[str, Any]:
    clock = Clock(data)
    callbacks = [clock, *([DropConnect(probability, rescale=True, seed=seed)] if probability else [])]
    fit(
        new_network(convnet, data, seed, width=options.width),
        data,
        batch_size=batch_size // PROCESSES,
        learning_rate=options.learning_rate_at_128 * math.sqrt(batch_size / 128),
        passes=options.passes,
        seed=seed,
        callbacks=callbacks,
        devices=PROCESSES,
        strategy="ddp",
    )
    median = statistics.median(clock.step_seconds)
    run: dict[str, Any] = {"p": probability, "batch_size": batch_size, "seed": seed, "step_seconds": median}
    for target in TARGETS:
        steps = clock.reached.get(target, math.inf)
        run |= {
            f"seconds_{100 * target:.0f}": steps * median,
            f"passes_{100 * target:.0f}": steps * batch_size / len(data[1]),
        }
    return run


def table(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each p and batch size the means over the seeds; ``best`` marks the fewest seconds to the last target."""
    rows = []
    for p in dict.fromkeys(run["p"] for run in runs):
        of_p = []
        for size in dict.fromkeys(run["batch_size"] for run in runs):
            these = [run for run in runs if (run["p"], run["batch_size"]) == (p, size)]
            of_p.append({"p": p, "batch_size": size} | {name: mean_of(r[name] for r in these) for name in these[0]})
            of_p[-1] |= {"p": p, "batch_size": size, "best": False}
            del of_p[-1]["seed"]
        min(of_p, key=lambda row: row["seconds_99"].value)["best"] = True
        rows += of_p
    return rows


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    figure, axes = panels(1, 2, width=4.6)
    for ax, column, label in zip(axes[0], ("seconds_99", "passes_99"), ("seconds", "passes"), strict=True):
        for i, p in enumerate(dict.fromkeys(row["p"] for row in rows)):
            these = [row for row in rows if row["p"] == p and math.isfinite(row[column].value)]
            spread = [row[column].half_width if math.isfinite(row[column].half_width) else 0 for row in these]
            sizes, means = [row["batch_size"] for row in these], [row[column].value for row in these]
            ax.errorbar(sizes, means, spread, fmt="o-", color=COLOURS[i], capsize=3, label=f"p = {p}")
        size_axis(ax, [row["batch_size"] for row in rows if row["p"] == rows[0]["p"]], "batch size")
        ax.set_ylim(0)
        ax.set_ylabel(f"{label} to 99 % of the training set")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(__doc__, QUICK, FULL, arguments, images="MNIST")
    images = find_images("MNIST", options.data_dir)
    data = training_set(images, options.examples, side=options.side)
    train(data, 0.0, max(options.batch_sizes), 0, vars_with(options, passes=1))  # the first run pays for start-up
    runs = []
    is_first = torch.distributed.get_rank() == 0
    plans = [
        (p, size, seed) for seed in range(options.seeds) for p in options.probabilities for size in options.batch_sizes
    ]
    for p, size, seed in plans:
        runs.append(train(data, p, size, seed, options))
        if is_first:
            print(f"p = {p}  B = {size:4}  seed {seed}  {runs[-1]['passes_99']:5.1f} passes", flush=True)
    if not is_first:
        return
    rows = table(runs)
    for row in rows:
        times = "  ".join(f"{row[f'seconds_{100 * t:.0f}'].value:7.2f} s" for t in TARGETS)
        passes = f"{row['passes_99'].value:5.1f} passes"
        print(f"p = {row['p']}  B = {row['batch_size']:4}  {times}  {passes}{'  best' if row['best'] else ''}")
    write_csv(options.out / "dropconnect.csv", runs)
    picture(rows, options.out / "dropconnect.png")
    summary = {"table": rows, "paper_seconds": PAPER}
    write_summary(options.out / "dropconnect.json", options, summary, data=images.name)


def vars_with(options: Any, **changes: Any) -> Any:
    return type(options)(**{**vars(options), **changes})


if __name__ == "__main__":
    quiet()
    main()
