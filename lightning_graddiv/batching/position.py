"""How far an epoch has come: what a checkpoint needs so that it goes on with the very next example."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any
from zlib import crc32

from lightning_graddiv.batching.plan import BatchPlan
from lightning_graddiv.random_states import RandomStates


@dataclass(frozen=True)
class PassOrigin:
    """How a pass over the data began, so that it can be drawn again.

    Attributes:
        first: mark of the first item drawn; see :func:`mark`. None where that is not known.
        random: what it was drawn from; None if no random number was.
        is_known: whether processes that draw random numbers here draw the same: one's states are kept for all.
    """

    first: int | None
    random: RandomStates | None = None
    is_known: bool = True


@dataclass(frozen=True)
class PassPlace:
    """A place in a pass, after an optimizer step.

    Attributes:
        origin: how the pass began.
        examples: examples of it on one process that are in optimizer steps.
        last: mark of the last of them; None where that is not known.
    """

    origin: PassOrigin
    examples: int
    last: int | None

    def unmarked(self, examples: int) -> "PassPlace":
        """Return a place in the pass of another process, with examples of its own."""
        return PassPlace(replace(self.origin, first=None), examples, None)


@dataclass(frozen=True)
class Change:
    """A change of the batch that was decided on and has not begun.

    Attributes:
        plan: of the new batch.
        at: the batch of the epoch that it begins with.
        validations: where to validate from then on; see :func:`.loops.set_validations`. None: as before.
    """

    plan: BatchPlan
    at: int
    validations: tuple[int, int] | None


@dataclass(frozen=True)
class EpochPosition:
    """Where an epoch stands after an optimizer step, or before the first.

    Attributes:
        plan: by which its batches are made.
        taken: micro-batches in its optimizer steps.
        batches: micro-batches that it has; infinite for a stream.
        validations: where it validates; None where that does not go by batches.
        change: that is coming.
        place: in the pass over the data; None where that had not begun or cannot be followed.
        is_begun: whether the loader's iterator existed, for which random numbers are drawn.
        is_validated: whether a validation that was due there has been run.
    """

    plan: BatchPlan
    taken: int = 0
    batches: float = math.inf
    validations: tuple[int, int] | None = None
    change: Change | None = None
    place: PassPlace | None = None
    is_begun: bool = False
    is_validated: bool = True

    @property
    def examples_left(self) -> float:
        """The examples of the rest of the epoch, over all processes, if its last batch is full."""
        later = self.plan if self.change is None else self.change.plan
        turn = self.batches if self.change is None else self.change.at
        sizes = (turn - self.taken, self.plan.micro_batch_size), (self.batches - turn, later.micro_batch_size)
        return sum(batches * size for batches, size in sizes) * self.plan.world_size

    def state_dict(self) -> dict[str, Any]:
        """Return the position as tensors and primitives."""
        place = self.place
        origin = None if place is None else place.origin
        random = None if origin is None or origin.random is None else origin.random.state_dict()
        change = None if self.change is None else asdict(self.change)
        return {
            "plan": asdict(self.plan),
            "taken": self.taken,
            "batches": self.batches,
            "validations": self.validations and list(self.validations),
            "change": change and {**change, "validations": change["validations"] and list(change["validations"])},
            "place": place and {"examples": place.examples, "last": place.last},
            "origin": origin and {"first": origin.first, "random": random, "is_known": origin.is_known},
            "is_begun": self.is_begun,
            "is_validated": self.is_validated,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "EpochPosition":
        """Return the position that :meth:`state_dict` was taken from."""
        change, place, origin = state["change"], state["place"], state["origin"]
        if origin is not None:
            random = None if origin["random"] is None else RandomStates.from_state_dict(origin["random"])
            origin = PassOrigin(**{**origin, "random": random})
        return cls(
            BatchPlan(**state["plan"]),
            state["taken"],
            state["batches"],
            _pair(state["validations"]),
            change and Change(BatchPlan(**change["plan"]), change["at"], _pair(change["validations"])),
            place and PassPlace(origin, **place),
            state["is_begun"],
            state["is_validated"],
        )


def mark(item: Any) -> int:
    """Return a number by which an index, or a batch of them, can be known again in another process."""
    return crc32(repr(item).encode())


def _pair(numbers: Any) -> tuple[int, int] | None:
    return None if numbers is None else (numbers[0], numbers[1])
