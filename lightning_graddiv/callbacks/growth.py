"""What is kept of a run whose batch grows."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightning_graddiv.diversity import DiversityEstimate


@dataclass(frozen=True)
class Growth:
    """One decision that changed the batch.

    Attributes:
        step: optimizer steps taken before the first with the new size.
        epoch: the epoch of that step.
        examples_seen: examples trained on before it, over all processes.
        from_batch_size: effective batch size before.
        to_batch_size: effective batch size after.
        allowed: the largest effective batch size that the policy allowed.
        learning_rate_factor: factor on the learning rate from now on.
        estimate: the estimate that the policy decided on.
        why: the decision in words.
    """

    step: int
    epoch: int
    examples_seen: float
    from_batch_size: int
    to_batch_size: int
    allowed: float
    learning_rate_factor: float
    estimate: DiversityEstimate
    why: str

    def state_dict(self) -> dict[str, Any]:
        """Return the decision as primitives."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Growth":
        """Return the decision that :meth:`state_dict` was taken from."""
        return cls(**{**state, "estimate": DiversityEstimate(**state["estimate"])})


def explain(estimate: DiversityEstimate, confidence: float, allowed: float, batch_size: int) -> str:
    """Say in one line why the batch may grow to ``batch_size``."""
    return (
        f"B_S = {estimate.bound:.4g} ({confidence:.0%} interval {estimate.lower:.4g} to {estimate.upper:.4g}, "
        f"{estimate.num_probes} probes) allows {allowed:.4g} >= {batch_size}"
    )


class Throughput:
    """Examples per second of training for each effective batch size, over all steps without a measurement."""

    def __init__(self) -> None:
        self._examples: dict[int, float] = defaultdict(float)
        self._seconds: dict[int, float] = defaultdict(float)

    def add(self, batch_size: int, examples: float, seconds: float) -> None:
        """Count one micro-batch."""
        self._examples[batch_size] += examples
        self._seconds[batch_size] += seconds

    def state_dict(self) -> dict[str, dict[int, float]]:
        """Return the sums as primitives."""
        return {"examples": dict(self._examples), "seconds": dict(self._seconds)}

    def load_state_dict(self, state: Mapping[str, Mapping[int, float]]) -> None:
        """Go on from the sums of :meth:`state_dict`."""
        self._examples.update(state["examples"])
        self._seconds.update(state["seconds"])

    def per_second(self) -> Mapping[int, float]:
        """Return examples per second by effective batch size."""
        return {size: self._examples[size] / seconds for size, seconds in self._seconds.items() if seconds > 0}
