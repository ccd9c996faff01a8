"""How far the batch may grow: a policy turns an estimate into the largest effective batch that it allows.

Published rules behind one protocol, each in its own words and on one dial (derived): ``delta = (B - 1) / B_S``, the
excess of Lemma 1, at the batch that the rule stops at. Up to terms of order ``1 / B_S``, ``B_S`` is the noise scale
``N = tr(Sigma) / |G|^2``. Where a rule needs one of the two it takes the lower end of its interval, because the batch
never shrinks again.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

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

    delta: float = 2.0

    def __post_init__(self) -> None:
        _require(self.delta > 0, "delta", "positive", self.delta)

    def __call__(self, estimate: DiversityEstimate, run: RunState) -> float:  # noqa: ARG002 - the protocol's
        """Return ``delta * lower + 1``."""
        return self.delta * estimate.lower + 1


@dataclass(frozen=True)
class NoiseScale:
    """McCandlish et al.'s rule (arXiv 1812.06162): a batch of the simple noise scale, ``B = N = tr(Sigma) / |G|^2``.

    There a step's noise ``tr(Sigma) / B`` is as large as its signal ``|G|^2``: by their model, training takes twice the
    fewest steps and twice the fewest examples. N is taken at the lower end of its interval.

    On the dial: delta = ``multiple``.

    Args:
        multiple: of the noise scale, positive.

    Raises:
        ValueError: multiple is not positive.
    """

    multiple: float = 1.0

    def __post_init__(self) -> None:
        _require(self.multiple > 0, "multiple", "positive", self.multiple)

    def __call__(self, estimate: DiversityEstimate, run: RunState) -> float:  # noqa: ARG002 - the protocol's
        """Return ``multiple * N``."""
        return self.multiple * lower_noise_scale(estimate)


@dataclass(frozen=True)
class NormTest:
    """The norm test of Byrd et al. (Math. Program. 134, 2012), as a batch size; Bollapragada et al. build on it.

    The batch is too small while the variance of its mean gradient is not small beside the gradient, ``tr(Sigma) / B >
    eta^2 |G|^2``; it passes from ``B = N / eta^2`` on, and grows no further. N is taken at the lower end of its
    interval, so that growth stops as soon as the test may be passed.

    On the dial: delta = ``1 / eta^2``. The test asks for at least that batch, where Yin et al. allow at most theirs.

    Args:
        eta: noise over signal that is accepted, positive.

    Raises:
        ValueError: eta is not positive.
    """

    eta: float

    def __post_init__(self) -> None:
        _require(self.eta > 0, "eta", "positive", self.eta)

    def __call__(self, estimate: DiversityEstimate, run: RunState) -> float:  # noqa: ARG002 - the protocol's
        """Return ``N / eta^2``."""
        return lower_noise_scale(estimate) / self.eta**2


@dataclass(frozen=True)
class CABS:
    """Coupled adaptive batch size of Balles et al. (UAI 2017, arXiv 1612.05086): ``B = lr * tr(Sigma) / loss``.

    A step of SGD lowers a beta-smooth loss by at least ``lr |G|^2 - beta lr^2 / 2 * (|G|^2 + tr(Sigma) / B)``. For
    ``lr = 1 / beta`` that is most, for each example, at ``B = 2 tr(Sigma) / |G|^2``; and ``|G|^2`` is put as ``2 loss /
    lr``, that of a quadratic bowl of curvature beta whose bottom is zero. So the loss must be near zero at its best.

    ``tr(Sigma) = M2 - |G|^2`` is the estimate's own: it has no interval, and needs none, since nothing is divided by a
    number near zero. The learning rate is the one in use. Scaling it with the batch feeds back: the rule was made for
    ``scale_lr=None``.

    On the dial: delta is about ``lr |G|^2 / loss``, the share of the loss that the next step promises to remove.
    """

    def __call__(self, estimate: DiversityEstimate, run: RunState) -> float:
        """Return ``lr * tr(Sigma) / loss``; 0, which keeps the batch, while the loss is unknown or not positive."""
        if not (run.loss > 0 and run.learning_rate >= 0):
            return 0.0
        return run.learning_rate * max(0.0, estimate.second_moment - estimate.signal) / run.loss


@dataclass(frozen=True)
class Doubling:
    """AdaBatch's schedule (Devarakonda et al., arXiv 1712.02029): double every so many epochs, whatever is measured.

    Growth still waits for a measurement, for ``cooldown`` and for ``growth_factor``: a batch that is behind the
    schedule catches up one growth at a time.

    On the dial: delta is whatever ``(B - 1) / B_S`` comes to; nothing holds it.

    Args:
        base_batch_size: effective batch size of the first epoch, at least 1.
        every_epochs: epochs between two growths, at least 1.
        factor: of each growth, at least 1.

    Raises:
        ValueError: an argument is out of range.
    """

    base_batch_size: int
    every_epochs: int
    factor: float = 2.0

    def __post_init__(self) -> None:
        _require(self.base_batch_size >= 1, "base_batch_size", "at least 1", self.base_batch_size)
        _require(self.every_epochs >= 1, "every_epochs", "at least 1", self.every_epochs)
        _require(self.factor >= 1, "factor", "at least 1", self.factor)

    def __call__(self, estimate: DiversityEstimate, run: RunState) -> float:  # noqa: ARG002 - the protocol's
        """Return ``base_batch_size * factor^(epoch // every_epochs)``."""
        return self.base_batch_size * self.factor ** (run.epoch // self.every_epochs)


@dataclass(frozen=True)
class Goodput:
    """Pollux's rule (Qiao et al., OSDI 2021): the batch of the largest throughput(B) * efficiency(B).

    Efficiency is ``(N + B0) / (N + B)``, with N the noise scale. A step of B examples takes ``t(B) = a + b B`` seconds
    (``a``: what does not depend on the batch; ``b``: per example), fitted to the sizes measured so far in relative
    terms, so that throughput is ``B / t(B)``. Their product is largest where (derived)::

        d/dB log[ B / ((a + b B) (N + B)) ] = 0     at     B = sqrt(N a / b)

    The batch grows only while each growth is uphill: nothing to gain from parallelism (a = 0) allows nothing, free
    parallelism (b = 0) anything. N is taken at the lower end of its interval. With one size measured, a step up is
    tried on the assumption that larger batches cost nothing, but no further than N: beyond it, even infinite
    parallelism gains less than a factor of 2. With the present size not measured, the batch stays.

    On the dial: delta = ``sqrt(a / (b N))``, the most that the machine makes worth while.
    """

    def __call__(self, estimate: DiversityEstimate, run: RunState) -> float:
        """Return ``sqrt(N a / b)``."""
        if run.batch_size not in run.throughput:
            return 0.0
        noise = lower_noise_scale(estimate)
        if len(run.throughput) == 1:
            return noise
        constant, per_example = step_time(run.throughput)
        if constant == 0 or noise == 0:
            return 0.0
        return math.sqrt(noise * constant / per_example) if per_example > 0 else math.inf


def step_time(throughput: Mapping[int, float]) -> tuple[float, float]:
    """Fit ``t(B) = a + b B`` to examples per second by batch size: a in seconds, b in seconds per example, both >= 0.

    Least squares on relative errors: a large batch takes longer, and its seconds are no better known for it.
    """
    sizes = np.array(list(throughput), dtype=float)
    seconds = sizes / np.array(list(throughput.values()))
    per_example, constant = np.polyfit(sizes, seconds, 1, w=1 / seconds)
    return max(0.0, float(constant)), max(0.0, float(per_example))


def lower_noise_scale(estimate: DiversityEstimate) -> float:
    """Return the lower end of the noise scale ``N = 1 / rho - 1``; infinite where even that is out of sight.

    ``1 / lower = 1/n + (1 - 1/n) rho`` is solved for the upper end of rho, the population's: see
    :func:`~lightning_graddiv.estimate_diversity`.
    """
    inverse = 1 / estimate.lower
    if estimate.dataset_size is not None:
        if estimate.dataset_size == 1:
            return 0.0
        inverse = (estimate.dataset_size * inverse - 1) / (estimate.dataset_size - 1)
    return 1 / inverse - 1 if inverse > 0 else math.inf


def _require(condition: bool, argument: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"Expected argument `{argument}` to be {expected} but got {got}")
