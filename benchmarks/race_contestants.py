"""Who races: how each chooses its batch."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from divebatch import DiveBatch
from race_tracks import Track

from lightning_graddiv import AdaptiveBatchSize, GradientDiversityMonitor
from lightning_graddiv.policies import DiversityBound, Doubling, Goodput, NoiseScale, NormTest, Policy

DEFAULT = "DiversityBound 2"
"""The contestant that is the callback as it comes."""


@dataclass(frozen=True)
class Contestant:
    """A way to choose the batch.

    Attributes:
        name: on the command line and in the results.
        batch_size: that it starts with on a track.
        policy: the rule of AdaptiveBatchSize on a track; None for a contestant of another kind.
        arguments: of AdaptiveBatchSize that belong to the rule.
        dive_delta: DiveBatch's delta; None for a contestant of another kind.
        dive_rescale: whether its learning rate follows the batch.
        rate_scale: multiple of the track's rate around which its grid lies.
        warm_up: share of all examples over which the learning rate rises from zero.
        group: contestants of which only the best one races, under this name.
    """

    name: str
    batch_size: Callable[[Track], int] = lambda track: track.small
    policy: Callable[[Track], Policy] | None = None
    arguments: Callable[[Track], Mapping[str, Any]] = lambda _: {}
    dive_delta: float | None = None
    dive_rescale: bool = True
    rate_scale: Callable[[Track], float] = lambda _: 1.0
    warm_up: float = 0.0
    group: str | None = None

    def callback(self, track: Track, overrides: Mapping[str, Any]) -> GradientDiversityMonitor | None:
        """Make what grows the batch; None for a fixed one."""
        if self.dive_delta is not None:
            return DiveBatch(track.large, self.dive_delta, rescale=self.dive_rescale)
        if self.policy is None:
            return None
        options = {**overrides, **self.arguments(track)}
        return AdaptiveBatchSize(engine=track.engine, max_batch_size=track.large, policy=self.policy(track), **options)


def callback_arguments(contestant: Contestant, track: Track, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return every argument of the contestant's callback, its defaults too, as numbers and texts."""
    if contestant.dive_delta is not None:
        dive = {"delta": contestant.dive_delta, "rescale": contestant.dive_rescale}
        return {"max_batch_size": track.large, **dive}
    if contestant.policy is None:
        return {}
    parameters = inspect.signature(AdaptiveBatchSize).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    given = {"engine": track.engine, "max_batch_size": track.large, "policy": repr(contestant.policy(track))}
    return {**defaults, **overrides, **contestant.arguments(track), **given}


def fixed(size: int) -> Contestant:
    """A fixed batch between the small and the large one; where it lies, so does the middle of its grid."""
    return Contestant(
        f"fixed {size}",
        batch_size=lambda _: size,
        rate_scale=lambda track: rate_factor(track, size) if size > track.small else 1.0,
        group="best fixed",
    )


def rate_factor(track: Track, size: int) -> float:
    """Return the power of two next to what usually suits a larger batch: the square root of the linear rule."""
    return 2.0 ** round(0.5 * math.log2(size / track.small))


def doubling(track: Track) -> Policy:
    """Double so often that the batch is near the largest when training ends."""
    doublings = round(math.log2(track.large / track.small))
    return Doubling(track.small, every_epochs=max(1, round(track.epochs / (doublings + 1))))


def doubling_arguments(track: Track) -> Mapping[str, Any]:
    """Measure only as often as the schedule needs, which looks at none of it, and grow when it says so.

    AdaBatch doubles the batch and lowers the rate by 3/4 where a small batch would have lowered it by 3/8: the rate for
    each example follows the same schedule. So it does here, with the cosine of all contestants and linear scaling.
    """
    steps_at_the_end = len(track.data().train[0]) // track.large
    return {"cooldown": 0, "growth_factor": 2, "scale_lr": "linear", "every_n_steps": max(1, steps_at_the_end)}


def diversity_bound(delta: float) -> Contestant:
    return Contestant(f"DiversityBound {delta:g}", policy=lambda _: DiversityBound(delta))


CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant("small"),
        *(fixed(2**power) for power in range(5, 12)),
        Contestant("large", batch_size=lambda track: track.large, warm_up=0.05),
        Contestant("Doubling", policy=doubling, arguments=doubling_arguments),
        *(Contestant(f"DiveBatch {delta:g}", dive_delta=delta, group="DiveBatch") for delta in (0.01, 0.1)),
        Contestant("DiveBatch 0.1, same rate", dive_delta=0.1, dive_rescale=False, group="DiveBatch"),
        Contestant("NoiseScale", policy=lambda _: NoiseScale()),
        # Its batch is the least that it takes, four times the noise scale, where linear scaling would be too much.
        Contestant("NormTest", policy=lambda _: NormTest(eta=0.5), arguments=lambda _: {"scale_lr": "gain"}),
        *(diversity_bound(delta) for delta in (0.25, 0.5, 1.0, 2.0)),
        Contestant("Goodput", policy=lambda _: Goodput()),
    )
}
