"""Two processes on the CPU, each with its own half of every batch: both measure, and both grow alike.

    python examples/ddp.py [--seed 0] [--epochs 40] [--out outputs]

Sizes are effective, so a batch of 16 is 8 examples on each process. Lightning starts the second process by running
this file again, and gives each loader its share of the data.
"""

import argparse
from pathlib import Path

import torch
from digits import EPOCHS, SMALL, adaptive_batch_size, quiet, table, train_digits
from lightning_utilities.core.rank_zero import rank_zero_only

PROCESSES = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the metrics")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)

    run = train_digits(
        "adaptive",
        options.seed,
        epochs=options.epochs,
        out=options.out / "ddp",
        batch_size=SMALL // PROCESSES,
        callback=adaptive_batch_size(),
        devices=PROCESSES,
        strategy="ddp",
    )
    rank_zero_only(print)(f"\n{table([run])}")


if __name__ == "__main__":
    main()
