"""Batches that go on after a checkpoint as if training had not been interrupted."""

import math
from dataclasses import replace
from typing import Any

from typing_extensions import override

from lightning_graddiv.batching import loops, resumed_loop
from lightning_graddiv.batching.accumulation import every
from lightning_graddiv.batching.position import Change, EpochPosition
from lightning_graddiv.batching.resizer import BatchResizer, Offer
from lightning_graddiv.batching.resumed_loop import ResumedLoop
from lightning_graddiv.random_states import RandomStates


class ResumableResizer(BatchResizer):
    """A resizer that can say where an epoch stands, and go on from there in another process.

    Examples that are in optimizer steps are not drawn again where the order of the others can be; see
    ``docs/resume.md``. Arguments and attributes are those of :class:`.BatchResizer`.
    """

    def __init__(self, trainer: Any, **kwargs: Any) -> None:
        super().__init__(trainer, **kwargs)
        self._resumed = ResumedLoop()
        self._random: RandomStates | None = None
        self._goes_on = False
        # A resumed training that opens an epoch may have its loader made anew for that.
        self._opens_epoch = self._is_reloaded = False

    def position(self, *, after_window: bool = False, is_validated: bool = False) -> EpochPosition | None:
        """Return where the epoch stands after its latest optimizer step; None where nobody can go on from there.

        Args:
            after_window: after that of the window under way, which has not been told of yet.
            is_validated: whether a validation that was due there has been run.
        """
        if self._missing:
            return None
        follower = self._follower
        stepped = follower.end_of_step if after_window else follower.stepped
        examples = sum(self.window.sizes) if after_window else None
        return EpochPosition(
            plan=self.plan if stepped else self._coming,
            taken=stepped,
            batches=self.epoch_end,
            validations=loops.validations(self._trainer),
            change=self._change_after(stepped),
            place=follower.place(examples) if self._loader.is_replayable else None,
            is_begun=stepped > 0 or not loops.draws_a_new_epoch(self._trainer),
            is_validated=is_validated or stepped == 0,
        )

    def random_states(self) -> RandomStates | None:
        """Return what the random states are; None with several processes, each of which may have others."""
        if self._trainer.world_size > 1:
            return None
        return RandomStates.now(self._loader.generators, self._trainer.strategy.root_device)

    @property
    def global_step(self) -> int:
        """The optimizer steps that the trainer has taken."""
        return int(self._trainer.global_step)

    def go_on_from(self, position: EpochPosition, random: RandomStates | None) -> None:
        """Go on after a checkpoint, once :meth:`start` was called: with the epoch that it was made in, or the next.

        Args:
            position: where the checkpoint's epoch stood.
            random: what the random states were then; None to leave them.
        """
        if self._missing:
            return
        trainer, replays = self._trainer, self._loader.is_replayable
        position, self._random = self._here(position), random if trainer.world_size == 1 else None
        if replays:
            self._resumed.is_known_to_go_on(trainer)
        if replays and loops.opens_the_next(trainer) and position.taken >= position.batches:
            resumed_loop.reopen_epoch(trainer)  # which Lightning would leave without validating
        elif not loops.goes_on_with_an_epoch(trainer):
            self._open_epoch(replays)
            return
        if not position.is_begun:
            self._restore_random()
        if replays and position.taken < position.batches:
            self._draw_on(position)
        elif not replays:
            resumed_loop.load_loader_states(trainer)
        if position.is_begun:
            self._restore_random()
        taken = position.taken if replays else resumed_loop.batches_done(trainer)
        self._restore_epoch(position, taken)
        if replays or taken >= position.batches:
            self._resumed.go_on(trainer, taken, position.batches, is_validated=position.is_validated)

    def validates(self) -> None:
        """A validation begins."""
        self._resumed.validates()

    @override
    def open(self, batch_idx: int) -> bool:
        self._resumed.leaves()
        self._opens_epoch = False
        return super().open(batch_idx)

    def end_epoch(self) -> None:
        """An epoch has ended."""
        self._resumed.leaves()

    @override
    def remove(self) -> None:
        self._resumed.forget()
        super().remove()

    @override
    def _adopt(self, loader: Any, is_first: bool) -> Any:
        self._is_reloaded = self._opens_epoch
        if self._is_reloaded and self._random is not None:
            self._random.restore((), self._trainer.strategy.root_device)
        return super()._adopt(loader, is_first)

    @override
    def _epoch_is_about_to_start(self) -> None:
        if self._is_reloaded:
            resumed_loop.begin_epoch(self._trainer)
            self._is_reloaded = False
        super()._epoch_is_about_to_start()

    @override
    def _begin_pass(self) -> None:
        if not self._goes_on:
            super()._begin_pass()
        self._goes_on = False

    def _change_after(self, stepped: int) -> Change | None:
        """Return the change that is decided for this epoch and that no optimizer step was made by yet."""
        offer = self._offer
        if offer is None or offer.now is None or stepped > offer.at:
            return None
        return Change(offer.now, offer.at, self._validations)

    def _here(self, position: EpochPosition) -> EpochPosition:
        """Return the position as these processes and this loader have it."""
        then, now = position.plan, self.plan
        if position.place is not None and (self._trainer.global_rank > 0 or then.world_size != now.world_size):
            examples = position.place.examples * then.world_size // now.world_size
            position = replace(position, place=position.place.unmarked(examples))
        same_size = self._loader.is_adaptable or then.micro_batch_size == now.micro_batch_size
        if self.base is None or (then.world_size == now.world_size and same_size):
            return position
        batches = position.batches
        if not math.isinf(batches):
            batches = position.taken + math.ceil(position.examples_left / (now.micro_batch_size * now.world_size))
        return replace(position, plan=now, batches=batches, change=None)

    def _open_epoch(self, replays: bool) -> None:
        self._restore_random()
        if replays:
            resumed_loop.begin_epoch(self._trainer)
            self._opens_epoch = True

    def _restore_random(self) -> None:
        if self._random is not None:
            self._random.restore(self._loader.generators, self._trainer.strategy.root_device)

    def _draw_on(self, position: EpochPosition) -> None:
        """Draw the rest of the epoch, by its own plan; epochs to come by theirs."""
        change = position.change
        self._loader.draws(position.plan, splits_tail=self._is_grown(position.plan))
        self._loader.goes_on_at(position.place, None if change is None else (change.plan, change.at - position.taken))
        resumed_loop.begin_epoch(self._trainer)
        self._loader.draws(self._coming, splits_tail=self._is_grown(self._coming))

    def _restore_epoch(self, position: EpochPosition, taken: int) -> None:
        """Give the epoch its own length, windows and validations back, and the change that was to come."""
        self._goes_on = True
        self.plan = position.plan
        self._loader.trains_on(self.plan)
        self._trainer.accumulate_grad_batches = every(self.plan.accumulate, taken)
        loops.set_epoch_end(self._trainer, position.batches)
        if position.validations is not None:
            loops.set_validations(self._trainer, *position.validations)
        change = position.change
        if change is not None:
            self._offer = Offer(self._coming, change.plan, change.at, position.batches, position.batches)
            self._validations = change.validations
