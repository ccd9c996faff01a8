"""Learning-rate schedules that count optimizer steps, run by the examples seen."""

import sys
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

_NEVER = sys.maxsize


class SampleClock:
    """Steps schedulers with ``interval="step"`` as often as they would be without growth, for the same examples.

    Before the batch has grown, Lightning steps them. From then on this does: once for every ``base batch`` of examples
    that an optimizer step has used, so that at any number of examples a schedule is where it would have been. Their
    ``frequency`` is what keeps Lightning from stepping them too; :meth:`release` puts it back. Plateau schedulers count
    measurements of a metric and are left alone.

    Attributes:
        steps: optimizer steps that the examples seen make at the starting batch size.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._steps_in_epoch = 0
        self._end = float("inf")
        self._frequencies: list[tuple[Any, int]] = []
        self._has_said_end = True

    def start(self, end: float, *, ends_by_steps: bool) -> None:
        """Training starts.

        Args:
            end: optimizer steps that a schedule can have been made for: those of the whole training at the starting
                batch size. Not positive or infinite: not known.
            ends_by_steps: whether training goes on until it has taken a number of steps, so that it passes that end.
                Without, epochs of larger batches may hold a few examples more, and there is nothing to say.
        """
        self._end = end if end > 0 else float("inf")
        self._has_said_end = not ends_by_steps

    def start_epoch(self) -> None:
        """An epoch starts: ``frequency`` counts from here."""
        self._steps_in_epoch = 0

    def take_over(self, trainer: Any) -> None:
        """Step the schedulers from now on; may be called more than once."""
        if self._frequencies:
            return
        for config in trainer.lr_scheduler_configs:
            if config.interval == "step" and not config.reduce_on_plateau:
                self._frequencies.append((config, config.frequency))
                config.frequency = _NEVER

    def advance(self, module: Any, steps: int, accumulate: int) -> None:
        """An optimizer step has used as many examples as ``steps`` at the starting batch size.

        Args:
            module: whose ``lr_scheduler_step`` is called.
            steps: how many.
            accumulate: micro-batches in each of those; ``frequency`` counts micro-batches.
        """
        for _ in range(steps):
            self.steps += 1
            self._steps_in_epoch += 1
            if self._frequencies and self.steps > self._end:
                self._say_end()
                continue
            for config, frequency in self._frequencies:
                if self._steps_in_epoch * accumulate % frequency == 0:
                    module.lr_scheduler_step(config.scheduler, None)

    def release(self) -> None:
        """Leave the schedulers to Lightning; may be called more than once."""
        for config, frequency in self._frequencies:
            config.frequency = frequency
        self._frequencies = []

    def state_dict(self) -> dict[str, int]:
        """Return where the clock is."""
        return {"steps": self.steps, "steps_in_epoch": self._steps_in_epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self.steps, self._steps_in_epoch = state["steps"], state["steps_in_epoch"]

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold no schedulers."""
        return {**self.__dict__, "_frequencies": []}

    def _say_end(self) -> None:
        if not self._has_said_end:
            self._has_said_end = True
            rank_zero_warn(
                f"AdaptiveBatchSize: the learning-rate schedule has reached the end of what it can have been made for, "
                f"{self._end:.0f} optimizer steps at the starting batch size, and stays there: `max_steps` counts the "
                "larger steps after growth. Limit the training by `max_epochs` instead."
            )
