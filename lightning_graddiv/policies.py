"""How far the batch may grow: a policy turns an estimate into the largest effective batch that it allows."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from lightning_graddiv.diversity import DiversityEstimate, GradientMoments


@dataclass(frozen=True)
class RunState:
    """What a policy may look at besides the estimate.

    Attributes:
        batch_size: effective batch size now, in examples per optimizer step.
        learning_rate: the learning rate that the optimizer uses now, scaled.
        loss: training loss of the last measured micro-batch on this process; NaN before the first.
        throughput: examples per second over all processes, for each effective batch size used so far.
        moments: the latest probe, over all processes.
        step: optimizer steps taken.
        examples_seen: examples trained on, over all processes.
        epoch: the epoch that runs.
    """

    batch_size: int
    learning_rate: float = float("nan")
    loss: float = float("nan")
    throughput: Mapping[int, float] = field(default_factory=dict)
    moments: GradientMoments | None = None
    step: int = 0
    examples_seen: float = 0.0
    epoch: int = 0


class Policy(Protocol):
    """``policy(estimate, run)`` returns the largest effective batch size that it allows; it may be infinite."""

    def __call__(self, estimate: DiversityEstimate, run: RunState) -> float:
        """Return the largest effective batch size allowed."""
        ...


@dataclass(frozen=True)
class DiversityBound:
    """Yin et al.'s rule: ``B <= delta * B_S + 1``, with B_S at the lower end of its interval.

    With this batch, mini-batch SGD reaches a loss accuracy of ``(1 + delta / 2) * eps`` in as many gradient evaluations
    as serial SGD needs for ``eps`` (theorems 2-5). Sample efficiency is at least ``1 / (1 + delta)``.

    Args:
        delta: accepted loss of efficiency, positive.

    Raises:
        ValueError: delta is not positive.
    """

    delta: float = 0.5

    def __post_init__(self) -> None:
        if not self.delta > 0:
            raise ValueError(f"Expected argument `delta` to be positive but got {self.delta}")

    def __call__(self, estimate: DiversityEstimate, run: RunState) -> float:  # noqa: ARG002 - the protocol's
        """Return ``delta * lower + 1``."""
        return self.delta * estimate.lower + 1
