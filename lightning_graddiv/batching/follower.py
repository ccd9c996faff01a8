"""Which micro-batches the trainer has taken, and which of them are in optimizer steps."""

from dataclasses import replace
from typing import Any

from lightning_graddiv.batching import loops
from lightning_graddiv.batching.adoption import AdoptedLoader
from lightning_graddiv.batching.plan import BatchPlan
from lightning_graddiv.batching.position import PassPlace, mark
from lightning_graddiv.batching.sampler import Pass, Window
from lightning_graddiv.distributed import agreed_over_ranks


class WindowFollower:
    """Follows a pass over the data from the sampler, which is ahead of the trainer by what workers prefetch.

    Args:
        trainer: the trainer.

    Attributes:
        running: the pass that is followed; None where that cannot be.
        start: the batch of the epoch that it began with.
        window_end: the first batch after the window that is under way.
        stepped: the first batch after the latest optimizer step.
    """

    def __init__(self, trainer: Any) -> None:
        self.running: Pass | None = None
        self.start = self.window_end = self.stepped = 0
        self._trainer = trainer
        self._begun: Pass | None = None
        self._taken = 0
        # Examples of the pass in optimizer steps, the mark of the last of them, and of the last that was taken.
        self._examples = self._last = self._last_taken = 0
        self._is_order_shared = True

    def leave_out_running(self) -> None:
        """Do not follow the pass that runs: it had begun before, and nobody knows which window is under way."""
        self._begun = loops.running_pass(self._trainer)

    def begin_epoch(self) -> None:
        """An epoch begins whose batches have not been drawn yet."""
        self.stepped = self._examples = self._last = 0

    def follow(self, loader: AdoptedLoader, batch_idx: int, *, is_new_epoch: bool) -> bool:
        """Keep up with the batches that the trainer takes; tell whether this one begins another pass."""
        running = loops.running_pass(self._trainer) if loader.is_followed else None
        running = None if running is self._begun else running
        is_new = is_new_epoch or running is not self.running
        if is_new:
            self.running = running
            self.start = self._taken = self.window_end = self.stepped = batch_idx
            self._examples = 0 if running is None else running.begins_after
            self._is_order_shared = running is None or self._is_shared(running)
        while running is not None and self._taken <= batch_idx:  # a batch of None passes by without a hook
            drawn = running.drawn.popleft()
            loader.takes(drawn.examples)
            self._last_taken = drawn.last
            self._taken += 1
        return is_new

    def next_window(self, batch_idx: int) -> Window | None:
        """Return the window of a batch that begins one, as it was drawn; None where that is not known."""
        while self.running is not None:
            window = self.running.windows.popleft()
            self.window_end += len(window.sizes)
            if batch_idx < self.window_end:
                return Window(window.plan, window.sizes[batch_idx - self.window_end :])
        return None

    @property
    def boundary(self) -> int:
        """The first batch of this epoch that could belong to another plan; asked where a window has ended."""
        return self.window_end if self.running is None else self.start + self.running.boundary

    def batches_left(self, plan: BatchPlan, at: int) -> int | None:
        """Return how many micro-batches of ``plan`` are left of the epoch from batch ``at`` on; None if unknown."""
        return None if self.running is None else self.running.batches_left(plan, at - self.start)

    def step(self, examples: int) -> None:
        """An optimizer step has ended: that of the window which is under way, of so many examples."""
        self.stepped, self._last = self.end_of_step, self._last_taken
        self._examples += examples

    @property
    def end_of_step(self) -> int:
        """The first batch after the optimizer step that is under way: an epoch's last window may not be full."""
        return int(min(self.window_end, self._trainer.num_training_batches))

    def place(self, examples_more: int | None = None) -> PassPlace | None:
        """Return the place after the latest optimizer step; None where that cannot be found again.

        Args:
            examples_more: after one of so many examples, which has not been told of yet.
        """
        running = self._pass_of_epoch(examples_more is not None)
        if running is None or running.origin is None:
            return None
        is_shared = running.origin.is_known == self._is_order_shared
        origin = running.origin if is_shared else replace(running.origin, is_known=self._is_order_shared)
        if examples_more is None:
            return PassPlace(origin, self._examples, self._last)
        return PassPlace(origin, self._examples + examples_more, self._last_taken)

    def _pass_of_epoch(self, is_followed: bool) -> Pass | None:
        if self.stepped or is_followed:
            return self.running
        if loops.draws_a_new_epoch(self._trainer):
            return None
        running = loops.running_pass(self._trainer)  # begun before the epoch's first batch
        return None if running is self._begun else running

    def _is_shared(self, running: Pass) -> bool:
        """Tell whether the states that one process has drawn its order from will do for all."""
        if self._trainer.world_size == 1:
            return True
        random = None if running.origin is None else running.origin.random
        drawn_from = 0 if random is None else mark(random.processor.tolist())
        return agreed_over_ranks(drawn_from, self._trainer.strategy.root_device) is not None
