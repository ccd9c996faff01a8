"""What is kept of a run whose batch grows."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning_graddiv.batching.accumulation import every
from lightning_graddiv.batching.loops import goes_on_with_an_epoch, set_epoch_end, set_validations, validations
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


@dataclass
class EpochRecord:
    """How far the epoch that runs has come, for a checkpoint.

    Attributes:
        batches: micro-batches that it has; infinite for a stream.
        validations: it validates every so many batches, counted from a batch; None where they do not matter.
        taken: micro-batches in its optimizer steps so far.
        examples: examples of one process in its optimizer steps so far.
    """

    batches: float = math.inf
    validations: Sequence[int] | None = None
    taken: int = 0
    examples: int = 0

    def note(self, trainer: Any) -> None:
        """Take down the epoch's present length."""
        self.batches = float(trainer.num_training_batches)
        self.validations = validations(trainer)

    def step(self, batch_idx: int, examples: int) -> None:
        """An optimizer step has ended with batch ``batch_idx``."""
        self.taken = batch_idx + 1
        self.examples += examples

    def restore(self, trainer: Any) -> None:
        """Give an epoch that goes on after a checkpoint its own length and windows back."""
        if goes_on_with_an_epoch(trainer):
            set_epoch_end(trainer, self.batches)
            trainer.accumulate_grad_batches = every(int(trainer.accumulate_grad_batches), self.taken)
            if self.validations is not None:
                interval, origin = self.validations
                set_validations(trainer, interval, origin)

    def state_dict(self) -> dict[str, Any]:
        """Return the record as primitives."""
        return {**asdict(self), "validations": self.validations and list(self.validations)}


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
