"""The models that costs are measured on, each with a batch and its loss."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Task:
    """A network, a batch and how the loss is computed: ``loss(net(x), y)``, a mean over examples."""

    name: str
    net: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy


def mlp(width: int = 1024) -> nn.Module:
    return nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def convnet() -> nn.Module:
    """Two convolutions of 5 x 5 with 64 channels and three linear layers, for CIFAR-10."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(64, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        nn.Flatten(),
        nn.Linear(64 * 8 * 8, 384),
        nn.ReLU(),
        nn.Linear(384, 192),
        nn.ReLU(),
        nn.Linear(192, 10),
    )


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.GroupNorm(4, outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.GroupNorm(4, outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.GroupNorm(4, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def resnet20() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.GroupNorm(4, 16), nn.ReLU(inplace=True)]
    inputs = 16
    for stage, outputs in enumerate((16, 32, 64)):
        for block in range(3):
            layers.append(Block(inputs, outputs, 2 if stage and not block else 1))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.first, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.second = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        return x + self.mlp(self.second(x))


class GPT(nn.Module):
    """Positions are looked up for every sequence, as in Hugging Face's models when they are given position ids."""

    def __init__(
        self, width: int = 256, layers: int = 4, heads: int = 4, length: int = 64, vocabulary: int = 256
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)), nn.LayerNorm(width))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, index: Tensor) -> Tensor:
        positions = torch.arange(index.shape[1], device=index.device).expand_as(index)
        return self.head(self.layers(self.tokens(index) + self.positions(positions)))


class LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.lstm, self.head = nn.Embedding(256, 64), nn.LSTM(64, 128, batch_first=True), nn.Linear(128, 10)

    def forward(self, index: Tensor) -> Tensor:
        return self.head(self.lstm(self.table(index))[0][:, -1])


def sequences(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def images(examples: int) -> tuple[Tensor, Tensor]:
    return torch.randn(examples, 3, 32, 32), torch.randint(0, 10, (examples,))


def tokens(examples: int, length: int) -> Tensor:
    return torch.randint(0, 256, (examples, length))


TASKS = {
    task.name: task
    for task in (
        Task("MLP", mlp, lambda: (torch.randn(128, 784), torch.randint(0, 10, (128,)))),
        Task("convnet", convnet, lambda: images(64)),
        Task("ResNet-20", resnet20, lambda: images(64)),
        Task("GPT", GPT, lambda: (tokens(32, 64), tokens(32, 64)), sequences),
        Task("LSTM", LSTM, lambda: (tokens(64, 32), torch.randint(0, 10, (64,)))),
    )
}


def mlp_of_batch(examples: int) -> Task:
    return Task("MLP", mlp, lambda: (torch.randn(examples, 784), torch.randint(0, 10, (examples,))))


def mlp_of_width(width: int) -> Task:
    return Task("MLP", lambda: mlp(width), TASKS["MLP"].batch)


def gpt_of_length(length: int) -> Task:
    return Task("GPT", lambda: GPT(length=length), lambda: (tokens(8, length), tokens(8, length)), sequences)


def resnet18() -> nn.Module:
    """For CIFAR-10, with GroupNorm."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.GroupNorm(4, 64), nn.ReLU(inplace=True)]
    inputs = 64
    for stage, outputs in enumerate((64, 128, 256, 512)):
        for block in range(2):
            layers.append(Block(inputs, outputs, 2 if stage and not block else 1))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


ON_ACCELERATORS = {
    task.name: task
    for task in (
        Task("ResNet-18", resnet18, lambda: images(128)),
        Task(
            "GPT-2 small",
            lambda: GPT(width=768, layers=12, heads=12, length=512, vocabulary=50257),
            lambda: (tokens(8, 512), tokens(8, 512)),
            sequences,
        ),
    )
}
