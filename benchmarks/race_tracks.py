"""What is raced on: data, a network, an optimizer, a target, and how much of a machine a run gets."""

import hashlib
import pydoc_data.topics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parent))
sys.path.append(str(Path(__file__).resolve().parent.parent / "experiments" / "paper"))

from images import FASHION_MNIST, debian_fashion_mnist, find_images, from_folder, held_out_set, idx_images, training_set
from networks import GPT, resnet18, sequences

DATA_DIR: Path | None = None
"""A folder of the usual files of the images, instead of fetching them."""


@dataclass(frozen=True)
class Data:
    """Examples to train on and held-out ones, on the device that trains: inputs and targets of each."""

    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    source: str


@dataclass(frozen=True)
class Phase:
    """How much of the machine a run gets.

    Attributes:
        jobs: runs at a time, each in a process; 0: one after the other, in this process.
        threads: of torch in each, pinned to as many cores; 0: all cores.
    """

    jobs: int
    threads: int


@dataclass(frozen=True)
class Track:
    """One training that all contestants run.

    Attributes:
        name: on the command line and in the results.
        title: in the tables.
        data: makes the data.
        net: makes the network.
        rate: of the small batch, in the middle of its grid.
        target: accuracy on the held-out examples.
        epochs: passes over the examples.
        small: batch that the small contestant keeps, and that the adaptive ones start with.
        large: batch that the large contestant keeps, and the largest that the adaptive ones may reach.
        between: fixed batches among which the best is looked for.
        evaluations: in each epoch, at fixed numbers of examples.
        optimizer: makes one of parameters and a rate.
        loss: of outputs and targets, a mean over examples.
        augment: random changes of the inputs of a batch, while training.
        engine: that measures.
        grid: rates that a contestant is tuned on at first.
        tuning: how the machine is shared while rates are tuned.
        racing: how, when it counts.
        needs_cuda: whether it is skipped without a GPU.
    """

    name: str
    title: str
    data: Callable[[], Data]
    net: Callable[[], nn.Module]
    rate: float
    target: float
    epochs: int
    small: int = 32
    large: int = 2048
    between: tuple[int, ...] = (64, 128, 256, 512)
    evaluations: int = 4
    optimizer: Callable[[Any, float], torch.optim.Optimizer] = field(
        default=lambda parameters, rate: torch.optim.SGD(parameters, rate, momentum=0.9)
    )
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    augment: Callable[[Tensor], Tensor] | None = None
    engine: str = "auto"
    grid: int = 3
    tuning: Phase = Phase(jobs=2, threads=1)
    racing: Phase = Phase(jobs=2, threads=1)
    needs_cuda: bool = False

    def settings(self) -> dict[str, Any]:
        """Return what of it is a number or a name, for the results."""
        return {name: value for name, value in asdict(self).items() if not callable(value)}


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Return the share of right answers; for a sequence, of right next tokens."""
    return float((outputs.argmax(-1) == targets).float().mean())


@cache
def fashion(train: int, held_out: int) -> Data:
    folder = DATA_DIR or debian_fashion_mnist()
    images = idx_images("Fashion-MNIST", folder, FASHION_MNIST)
    return Data(training_set(images, train), held_out_set(images, held_out), f"Fashion-MNIST, {train} + {held_out}")


@cache
def cifar10(train: int, held_out: int, device: str = "cpu") -> Data:
    images = from_folder(DATA_DIR) if DATA_DIR else find_images("CIFAR-10")
    if images.name != "CIFAR-10":
        raise SystemExit("This track is CIFAR-10's, and that could not be fetched: see --data-dir.")
    parts = [training_set(images, train), held_out_set(images, held_out)]
    moved = [(part[0].to(device), part[1].to(device)) for part in parts]
    return Data(moved[0], moved[1], f"CIFAR-10, {train} of 50,000 + {held_out} of 10,000")


@cache
def pydoc_text(length: int, most: int | None = None) -> Data:
    """Sequences of characters of Python's documentation, as the standard library ships it; the last tenth held out."""
    text = "".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)).encode(
        "ascii", "ignore"
    )
    codes = torch.from_numpy(np.frombuffer(text, np.uint8).copy()).long()
    count = (len(codes) - 1) // length
    inputs, targets = (part[: count * length].view(count, length) for part in (codes, codes[1:]))
    split = int(0.9 * count)
    train = slice(0, min(split, most or split))
    digest = hashlib.sha256(text).hexdigest()[:16]
    source = f"pydoc_data.topics, {len(text)} characters, sha256 {digest}: {train.stop} + {count - split} of {length}"
    return Data((inputs[train], targets[train]), (inputs[split:], targets[split:]), source)


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def strided_convnet(channels: int, side: int, width: int) -> nn.Module:
    """Two convolutions of stride 2: as small as two cores want it."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * (side // 4) ** 2, 10),
    )


def resnet18_with_batch_norm() -> nn.Module:
    return with_batch_norm(resnet18())


def with_batch_norm(net: nn.Module) -> nn.Module:
    """Put batch normalisation where group normalisation is."""
    for name, child in net.named_children():
        if isinstance(child, nn.GroupNorm):
            setattr(net, name, nn.BatchNorm2d(child.num_channels))
        else:
            with_batch_norm(child)
    return net


def crop_and_flip(inputs: Tensor) -> Tensor:
    """Shift each image by up to four pixels and mirror half of them."""
    n, side = len(inputs), inputs.shape[-1]
    padded = F.pad(inputs, (4, 4, 4, 4))
    rows, columns = (
        torch.randint(9, (n, 1), device=inputs.device) + torch.arange(side, device=inputs.device) for _ in "xy"
    )
    columns = torch.where(torch.rand(n, 1, device=inputs.device) < 0.5, columns.flip(1), columns)
    examples = torch.arange(n, device=inputs.device)[:, None, None]
    return padded.movedim(1, -1)[examples, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def sgd_with_decay(parameters: Any, rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, rate, momentum=0.9, weight_decay=5e-4, nesterov=True)


ON_A_GPU: dict[str, Any] = {
    "data": lambda: cifar10(50_000, 10_000, "cuda"),
    "rate": 0.1,
    "target": 0.94,
    "epochs": 30,
    "small": 128,
    "large": 8192,
    "between": (256, 512, 1024, 2048),
    "evaluations": 1,
    "optimizer": sgd_with_decay,
    "augment": crop_and_flip,
    "tuning": Phase(1, 0),
    "racing": Phase(1, 0),
    "needs_cuda": True,
}

TRACKS = {
    track.name: track
    for track in (
        Track(
            "fashion-mlp",
            "Fashion-MNIST, MLP 784-256-128-10",
            lambda: fashion(60_000, 10_000),
            mlp,
            rate=0.01,
            target=0.885,
            epochs=12,
            between=(64, 128, 256, 512, 1024),
            tuning=Phase(jobs=1, threads=0),  # which fixed batch is best depends on what a step costs
            racing=Phase(jobs=1, threads=0),
        ),
        Track(
            "fashion-convnet",
            "Fashion-MNIST, convnet",
            lambda: fashion(30_000, 5_000),
            lambda: strided_convnet(1, 28, 8),
            rate=0.01,
            target=0.875,
            epochs=6,
            large=1024,
            evaluations=2,
        ),
        Track(
            "cifar-convnet",
            "CIFAR-10 (20,000 examples), convnet",
            lambda: cifar10(20_000, 2_500),
            lambda: strided_convnet(3, 32, 16),
            rate=0.01,
            target=0.57,
            epochs=6,
            large=1024,
            evaluations=2,
        ),
        Track(
            "char-lm",
            "characters of pydoc_data.topics, transformer, AdamW",
            lambda: pydoc_text(32),
            lambda: GPT(width=48, layers=1, heads=4, length=32, vocabulary=128),
            rate=0.008,
            target=0.58,
            epochs=5,
            small=16,
            large=512,
            between=(32, 64, 128, 256),
            evaluations=2,
            optimizer=lambda parameters, rate: torch.optim.AdamW(parameters, rate),
            loss=sequences,
        ),
        Track(
            "fashion-logistic",
            "Fashion-MNIST, logistic regression",
            lambda: fashion(60_000, 10_000),
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 10)),
            rate=0.002,
            target=0.84,
            epochs=12,
            between=(64, 128, 256, 512, 1024),
        ),
        Track("cifar-resnet18", "CIFAR-10, ResNet-18 with GroupNorm", net=resnet18, **ON_A_GPU),
        Track(
            "cifar-resnet18-batchnorm",
            "CIFAR-10, ResNet-18 with BatchNorm",
            net=resnet18_with_batch_norm,
            engine="microbatch",
            **ON_A_GPU,
        ),
    )
}
