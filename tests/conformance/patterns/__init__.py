"""Awkward patterns: what real code writes and is easy to get wrong; each a small module, a batch and a loss."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from tests.conformance.reference import LossFunction, Take, curved, take
from tests.devices import DEVICE

N = 6
"""Examples in a batch; other dimensions differ from it unless a pattern is about just that."""

T = 5
"""Positions in a sequence."""

MIXES = "mixes the examples|or mixes them"
WEIGHS = "weighs the examples"

TOPICS = ("batches", "embeddings", "forwards", "layouts", "losses", "normalization", "sequences", "sharing", "spatial")


@dataclass
class Setup:
    """One pattern, built."""

    module: nn.Module
    batch: Any
    loss: LossFunction
    examples: int = N
    pick: Take = take


@dataclass(frozen=True)
class Pattern:
    """A pattern and what is expected of it: ``refused`` is what the reason must match. None: measured right.

    ``or_right``: where a refusal is as good as what each example has alone.
    """

    name: str
    build: Callable[[], Setup]
    refused: str | None
    or_right: bool


PATTERNS: dict[str, Pattern] = {}


def faint() -> float:
    """Return a share of the gradient that shows beside rounding: in float32 less than a thousandth does not."""
    if torch.get_default_dtype() == torch.float64:
        return 1e-4
    return 5e-3 if DEVICE == "cpu" else 5e-2


def pattern(*, refused: str | None = None, or_right: bool = False) -> Callable[[Callable[[], Setup]], Any]:
    """Register a function that builds a pattern, under its name."""

    def register(build: Callable[[], Setup]) -> Callable[[], Setup]:
        name = build.__name__
        assert name not in PATTERNS, name
        PATTERNS[name] = Pattern(name, build, refused, or_right)
        return build

    return register


def load() -> dict[str, Pattern]:
    """Return all patterns by name."""
    for topic in TOPICS:
        import_module(f"{__name__}.{topic}")
    return PATTERNS


class Parts(nn.Module):
    """Layers and parameters under names; how they are used is up to the loss."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def of_rows(forward: Callable[..., Tensor]) -> LossFunction:
    """Make a loss of (module, batch): the mean over the rows that ``forward(module, x)`` puts out."""
    return lambda module, batch: curved(forward(module, batch)).mean()


def plain(module: nn.Module, batch: Any) -> Tensor:
    """Return the mean loss over what the module makes of the batch."""
    return curved(module(batch)).mean()


def rows(*shape: int) -> Tensor:
    """Return a batch of numbers, of the dtype that is the default just now."""
    return torch.randn(N, *shape)


def tokens(vocabulary: int, *shape: int) -> Tensor:
    """Return a batch of token numbers."""
    return torch.randint(vocabulary, (N, *shape))


def parameter(*shape: int) -> nn.Parameter:
    """Return a parameter of its own."""
    return nn.Parameter(torch.randn(shape))
