"""Times training steps in one or two processes: the half of speedup.py that must be a program of its own.

Lightning starts the second process of a DDP run by running this file again. Each process computes on one thread. The
first step of each size is not timed.

    python experiments/paper/throughput.py DATA.pt OUT.json --processes 2 --batch-sizes 64 512 4096 --steps 4 --width 16
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from networks import convnet
from training import fit, new_network, quiet


class StepTimes(L.Callback):
    """Seconds from the end of one step to the end of the next."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.ends.append(time.perf_counter())
        if len(self.ends) > self.steps:
            trainer.should_stop = True

    @property
    def median(self) -> float:
        return float(torch.tensor(self.ends, dtype=torch.float64).diff().median())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 512, 4096])
    parser.add_argument("--steps", type=int, default=4, help="timed steps of the largest batch; more of smaller ones")
    parser.add_argument("--width", type=int, default=16)
    options = parser.parse_args()
    quiet()
    images, labels = torch.load(options.data)
    distributed = {"devices": options.processes, "strategy": "ddp"} if options.processes > 1 else {"devices": 1}
    examples_per_second = {}
    for batch_size in options.batch_sizes:
        steps = options.steps * min(8, max(options.batch_sizes) // batch_size)
        again = -(-batch_size * (steps + 2) // len(labels))  # as many copies as make enough batches for one pass
        data = images.repeat(again, 1, 1, 1), labels.repeat(again)
        times = StepTimes(steps)
        net = new_network(convnet, data, seed=0, width=options.width)
        share = batch_size // options.processes
        trainer = fit(
            net, data, batch_size=share, learning_rate=0.01, passes=1, seed=0, callbacks=[times], **distributed
        )
        examples_per_second[batch_size] = batch_size / times.median
    if trainer.is_global_zero:
        options.out.write_text(json.dumps(examples_per_second))


if __name__ == "__main__":
    main()
