"""What a search for the batch size has found, as numbers, a table and a picture."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_graddiv.batching.plan import BatchPlan
from lightning_graddiv.diversity import DiversityEstimate
from lightning_graddiv.theory import sample_efficiency

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class BatchSizeFinding:
    """What :func:`find_batch_size` has found at one weight vector.

    Attributes:
        estimate: B_S(w), in examples, with its interval.
        confidence: of the interval.
        present: how the effective batch is made now.
        recommended: how it should be made.
        allowed: the largest effective batch that the policy allows, in examples per optimizer step; may be infinite.
        learning_rate: the largest learning rate of any parameter group, as it is set for the present batch.
        learning_rate_factor: what to multiply it by for the recommended batch.
        seconds: median seconds of one forward and backward pass by micro-batch size, in examples per process; those of
            the slowest process.
        out_of_memory_at: the smallest micro-batch tried that did not fit; None if all did.
    """

    estimate: DiversityEstimate
    confidence: float
    present: BatchPlan
    recommended: BatchPlan
    allowed: float
    learning_rate: float
    learning_rate_factor: float
    seconds: Mapping[int, float]
    out_of_memory_at: int | None = None

    @property
    def throughput(self) -> dict[int, float]:
        """Examples per second over all processes, by micro-batch size; forward and backward passes only."""
        return {size: size * self.present.world_size / seconds for size, seconds in self.seconds.items()}

    def sample_efficiency(self, batch_size: float) -> float:
        """Return what an example of an effective batch of that size is worth: ``1 / (1 + (B - 1) / B_S)``."""
        return sample_efficiency(batch_size, self.estimate.bound)

    def plot(self, *, ax: "Axes | None" = None) -> "Axes":
        """Draw throughput and sample efficiency by batch size; see :func:`.plotting.plot_finding`."""
        from lightning_graddiv.plotting import plot_finding

        return plot_finding(self, ax=ax)

    def __str__(self) -> str:
        return "\n".join([*self._summary(), "", *self._table()])

    def _summary(self) -> Iterator[str]:
        estimate, factor = self.estimate, self.learning_rate_factor
        yield (
            f"B_S(w)         {_short(estimate.bound)}  ({self.confidence:.0%} interval {_short(estimate.lower)} to "
            f"{_short(estimate.upper)}, {estimate.num_probes} probes, {estimate.num_examples:,.0f} examples)"
        )
        yield f"batch now      {self.present.batch_size:,} = {self.present}"
        yield f"allowed        {_short(self.allowed)}"
        yield f"recommended    {self.recommended.batch_size:,} = {self.recommended}"
        yield f"learning rate  {self.learning_rate:.4g} x {factor:.3g} = {self.learning_rate * factor:.4g}"

    def _table(self) -> Iterator[str]:
        yield f"{'micro-batch':>11}  {'ms per pass':>11}  {'examples/s':>10}  {'efficiency':>10}"
        for size, rate in self.throughput.items():
            efficiency = self.sample_efficiency(size * self.present.world_size)
            mark = "  <- recommended" if size == self.recommended.micro_batch_size else ""
            yield f"{size:>11,}  {1e3 * self.seconds[size]:>11.3g}  {rate:>10,.0f}  {efficiency:>10.3f}{mark}"
        if self.out_of_memory_at is not None:
            yield f"{self.out_of_memory_at:>11,}  out of memory"


def _short(number: float) -> str:
    return f"{number:,.0f}" if math.isfinite(number) and number >= 100 else f"{number:.3g}"
