"""The recent probes that one estimate pools: short, because the weights move and ``B_S(w)`` with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightning_graddiv.diversity import DiversityEstimate, GradientMoments, estimate_diversity

# Old probes are better than the wide interval of a few: age alone never leaves fewer than this.
MIN_PROBES_KEPT_BY_AGE = 8


@dataclass(frozen=True)
class _Probe:
    moments: GradientMoments
    learning_rate: float
    examples_seen: float

    def is_before_drop_to(self, learning_rate: float) -> bool:
        """Tell whether the learning rate has been halved since, at least."""
        # The tolerance is for schedulers that multiply their way to one half. At a rate of 0 nothing moves.
        return self.learning_rate > 0 and self.learning_rate >= 2 * learning_rate * (1 - 1e-9)


class ProbeWindow:
    """A bounded queue of :class:`GradientMoments` that forgets what was measured in another regime.

    It forgets probes beyond ``size``, probes taken before the learning rate fell by half or more, and
    probes older than ``max_age_examples``, of which the newest 8 stay. Call :meth:`clear` when the batch
    grows: probes of two sizes in one window are unbiased, but their jackknife interval is too short.

    Args:
        size: The most probes it holds.
        max_age_examples: Age, in examples trained on since, beyond which a probe is dropped; one pass over
            the data.

    Raises:
        ValueError: If ``size < 1`` or ``max_age_examples <= 0``.

    """

    def __init__(self, size: int, max_age_examples: float = float("inf")) -> None:
        if size < 1:
            raise ValueError(f"Expected argument `size` to be at least 1 but got {size}")
        if not max_age_examples > 0:
            raise ValueError(f"Expected argument `max_age_examples` to be positive but got {max_age_examples}")
        self.size = size
        self.max_age_examples = max_age_examples
        self._probes: list[_Probe] = []

    def __len__(self) -> int:
        return len(self._probes)

    @property
    def probes(self) -> tuple[GradientMoments, ...]:
        """The probes held, oldest first."""
        return tuple(probe.moments for probe in self._probes)

    def append(self, moments: GradientMoments, *, learning_rate: float, examples_seen: float) -> None:
        """Add a probe taken at ``learning_rate`` after ``examples_seen`` examples; forget the outdated."""
        kept = [probe for probe in self._probes if not probe.is_before_drop_to(learning_rate)]
        kept.append(_Probe(moments, learning_rate, examples_seen))
        oldest = examples_seen - self.max_age_examples
        protected = len(kept) - MIN_PROBES_KEPT_BY_AGE
        kept = [probe for i, probe in enumerate(kept) if i >= protected or probe.examples_seen >= oldest]
        self._probes = kept[-self.size :]

    def clear(self) -> None:
        """Forget every probe; for when the batch has grown."""
        self._probes = []

    def estimate(self, dataset_size: int | None = None, confidence: float = 0.9) -> DiversityEstimate:
        """Pool the probes held, by :func:`~lightning_graddiv.diversity.estimate_diversity`."""
        return estimate_diversity(self.probes, dataset_size=dataset_size, confidence=confidence)

    def __copy__(self) -> ProbeWindow:
        """Return a window of the same probes: a callback takes one down after every optimizer step."""
        copied = ProbeWindow.__new__(ProbeWindow)
        copied.__dict__.update(self.__dict__)  # its list of probes is replaced when they change, never written to
        return copied

    def state_dict(self) -> dict[str, Any]:
        """The probes as lists, dicts and floats: loads with ``torch.load(weights_only=True)``."""
        return {"probes": [asdict(probe) for probe in self._probes]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over the probes of ``state_dict``; of more than ``size``, the newest."""
        probes = [_Probe(**{**probe, "moments": GradientMoments(**probe["moments"])}) for probe in state_dict["probes"]]
        self._probes = probes[-self.size :]
