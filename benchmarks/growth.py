"""What a growth costs: the pause between two batches when the batch grows, over the same pause when it does not.

    python benchmarks/growth.py [--quick] [--out benchmarks/results]

A perceptron trains in a real Trainer and its batch grows from 16 to 1,024 examples, by a policy that always allows it.
Timed is what lies between the end of one batch's training and the start of the next one's: the decision, the change of
lengths, the new accumulation, and the wait for the data. What a growth adds is compared with a whole training step of
the new size, and with what ordinary pauses of that size take longer than usual, one of twenty of them: with workers, a
machine of few cores lets the trainer wait now and then. Writes growth.json.
"""

import argparse
import json
import logging
import platform
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_graddiv import AdaptiveBatchSize

EXAMPLES, WIDTH, CLASSES = 60_000, 784, 10
SMALLEST, LARGEST = 16, 1024


class Perceptron(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(WIDTH, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, CLASSES)
        )

    def training_step(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-3)


def always(estimate: Any, run: Any) -> float:  # noqa: ARG001 - the protocol's
    return float("inf")


class Ends(L.Callback):
    """First of the callbacks: when a batch has been trained on."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.times.append(time.perf_counter())


class Starts(L.Callback):
    """Last of the callbacks: when the next one is about to be, and whether the batch has just grown or is measured."""

    def __init__(self, adaptive: AdaptiveBatchSize) -> None:
        self.adaptive = adaptive
        self.times: list[float] = []
        self.sizes: list[int] = []
        self.decided: list[bool] = []
        self.grew: list[bool] = []
        self.measured = self.growths = 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.times.append(time.perf_counter())
        self.sizes.append(self.adaptive.batch_size)
        measured, growths = self.adaptive.measurements, len(self.adaptive.history)
        self.decided.append(measured > self.measured)
        self.grew.append(growths > self.growths)
        self.measured, self.growths = measured, growths


def train(workers: int, max_micro_batch_size: int | None) -> tuple[Ends, Starts]:
    torch.manual_seed(0)
    x, y = torch.randn(EXAMPLES, WIDTH), torch.randint(CLASSES, (EXAMPLES,))
    adaptive = AdaptiveBatchSize(
        every_n_steps=10,
        max_batch_size=LARGEST,
        max_micro_batch_size=max_micro_batch_size,
        cooldown=8,
        policy=always,
    )
    ends, starts = Ends(), Starts(adaptive)
    trainer = L.Trainer(
        max_epochs=4,
        max_steps=640,
        callbacks=[ends, adaptive, starts],
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Perceptron(), DataLoader(TensorDataset(x, y), SMALLEST, shuffle=True, num_workers=workers))
    return ends, starts


def costs(ends: Ends, starts: Starts) -> list[dict[str, float]]:
    """Return, for each growth, the seconds that it added to pauses, and a step of the new size."""
    pauses = [start - end for end, start in zip(ends.times, starts.times[1:], strict=False)]
    steps = [after - before for before, after in zip(starts.times, starts.times[1:], strict=False)]
    kinds = list(zip(starts.sizes[1:], starts.decided[1:], starts.grew[1:], strict=True))
    usual = {
        (size, decided): statistics.median(
            pause for pause, kind in zip(pauses, kinds, strict=False) if kind == (size, decided, False)
        )
        for size, decided, grew in kinds
        if not grew and (size, decided, False) in kinds
    }
    found = []
    for index, (size, decided, grew) in enumerate(kinds[: len(pauses)]):
        if not grew or (size, decided) not in usual:
            continue
        before = next(i for i in range(index, -1, -1) if kinds[i][1])  # the pause in which the decision fell
        added = pauses[index] - usual[size, decided]
        if before != index:
            added += pauses[before] - usual[kinds[before][0], True]
        plain = [step for step, kind in zip(steps[1:], kinds[1:], strict=False) if kind == (size, False, False)]
        step = statistics.median(plain)
        ordinary = [
            pause - usual[size, False]
            for pause, kind in zip(pauses, kinds, strict=False)
            if kind == (size, False, False)
        ]
        found.append({"to": size, "added": added, "step": step, "ordinary": statistics.quantiles(ordinary, n=20)[-1]})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one run of each")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    results = []
    for workers in (0, 2):
        for name, limit in (("micro-batch", None), ("accumulation", SMALLEST)):
            runs = [cost for _ in range(1 if arguments.quick else 3) for cost in costs(*train(workers, limit))]
            added = [run["added"] / run["step"] for run in runs]
            row = {
                "workers": workers,
                "grows": name,
                "growths": len(runs),
                "added_milliseconds_median": 1e3 * statistics.median(run["added"] for run in runs),
                "added_over_step_median": statistics.median(added),
                "added_over_step_largest": max(added),
                "ordinary_pauses_over_step": statistics.median(run["ordinary"] / run["step"] for run in runs),
            }
            results.append(row)
            print(
                f"{workers} workers, {name:12s}: {len(runs)} growths, a growth adds "
                f"{row['added_milliseconds_median']:.2f} ms (median), {row['added_over_step_median']:.2f} of a step "
                f"(largest {row['added_over_step_largest']:.2f}; one ordinary pause in twenty: "
                f"{row['ordinary_pauses_over_step']:.2f})"
            )
    machine = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "lightning": L.__version__,
    }
    (arguments.out / "growth.json").write_text(json.dumps({**machine, "threads": 1, "rows": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
