"""Fashion-MNIST, twice: a batch of 32 throughout, and one that starts at 32 and grows as far as it may.

    python examples/fashion_mnist.py [--data-dir FOLDER] [--seed 0] [--epochs 8] [--out outputs]

The data are four IDX files in --data-dir, gzipped or not (torchvision's data/FashionMNIST/raw will do). Without it they
come from the Debian package dataset-fashion-mnist, fetched once into the user's cache (31 MB, apt-get).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from data import fashion_mnist
from digits import Classifier, Run, picture, quiet, table, train, verdict

from lightning_graddiv import AdaptiveBatchSize

SMALL, LARGE = 32, 2048
LEARNING_RATE = 0.02
SIZES = (784, 256, 128, 10)


def main(arguments: Sequence[str] | None = None) -> list[Run]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", type=Path, help="folder of Fashion-MNIST's IDX files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the picture and the metrics")
    options = parser.parse_args(arguments)
    quiet()
    torch.set_num_threads(1)  # at small batches a second thread costs more than it gives
    data = fashion_mnist(options.data_dir)

    adaptive = AdaptiveBatchSize(max_batch_size=LARGE)
    runs = []
    for name, callback in (("small", None), ("adaptive", adaptive)):
        print(f"\n{name}: starts with batches of {SMALL}, learning rate {LEARNING_RATE}", flush=True)
        L.seed_everything(options.seed, verbose=False)
        model = Classifier(SIZES, LEARNING_RATE)
        out = options.out / "fashion_mnist"
        runs.append(train(name, model, data, SMALL, epochs=options.epochs, out=out, callback=callback))
    print(f"\n{table(runs)}\n\n{verdict(*runs)}")
    picture(runs, options.out / "fashion_mnist.png", ylim=(0.8, 0.9))
    print(f"Picture: {options.out / 'fashion_mnist.png'}")
    return runs


if __name__ == "__main__":
    main()
