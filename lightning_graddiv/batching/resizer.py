"""Changes the size of the batches that a trainer trains on, at any accumulation window, and puts everything back."""

import math
from dataclasses import dataclass, replace
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_graddiv.batching import loops, resumed_loop
from lightning_graddiv.batching.accumulation import every
from lightning_graddiv.batching.adoption import AdoptedLoader
from lightning_graddiv.batching.plan import BatchPlan
from lightning_graddiv.batching.position import Change, EpochPosition, PassPlace, mark
from lightning_graddiv.batching.progress_bar import show_epoch_end
from lightning_graddiv.batching.random_states import RandomStates
from lightning_graddiv.batching.resumed_loop import ResumedLoop
from lightning_graddiv.batching.sampler import Pass, Window, drawn_batch_size
from lightning_graddiv.distributed import agreed_over_ranks


@dataclass(frozen=True)
class Offer:
    """What another batch would make of the present epoch and of whole ones, on this process.

    Attributes:
        plan: of the new batch, in whole epochs.
        now: of the new batch in this epoch; None if it has to wait for the next.
        at: the batch of this epoch that it begins with.
        end: batches in this epoch then.
        whole: batches in a whole epoch then; infinite for a stream.
    """

    plan: BatchPlan
    now: BatchPlan | None
    at: int
    end: float
    whole: float


class BatchResizer:
    """Holds a trainer's effective batch size, made of its loader's micro-batch, its accumulation and its processes.

    A change takes effect with the first accumulation window that is not drawn yet; a window never mixes sizes. Where
    batches cannot be followed from the sampler to the trainer, the present epoch accumulates more instead, and the next
    has the larger micro-batches. Where Lightning's loop state is not what it should be, nothing but the accumulation
    changes, and only between epochs.

    Args:
        trainer: the trainer, before its loaders are set up.
        max_batch_size: the largest effective batch size, at least the one that training starts with.
        max_micro_batch_size: the most examples that one process takes at a time; None for the default.
        merge_batches: micro-batches may be merged of those of a batch sampler of the user's.

    Attributes:
        base: the plan that the user's loader and trainer make; None before that is known.
        plan: the plan now.
        window: the micro-batches of the optimizer step that is under way.
        micro_batch_cap: the most examples that one process takes at a time, as far as memory allows; None if any.
    """

    def __init__(
        self, trainer: Any, *, max_batch_size: int, max_micro_batch_size: int | None, merge_batches: bool
    ) -> None:
        self.base: BatchPlan | None = None
        self.plan = BatchPlan(1)
        self.micro_batch_cap: int | None = None
        self._missing = loops.missing_privates(trainer, is_set_up=False)
        self.window = Window(self.plan, (1,))
        self._trainer = trainer
        self._max_batch_size = max_batch_size
        self._max_micro_batch_size = max_micro_batch_size
        self._merge_batches = merge_batches
        self._accumulate = trainer.accumulate_grad_batches
        self._loader = AdoptedLoader(None)
        # The same loader may come by again, after a tuner's training: its persistent workers are then the copy's.
        self._copied: tuple[Any, Any] = (None, None)
        self._is_running = False
        self._coming = self.plan
        self._offer: Offer | None = None
        self._validations: tuple[int, int] | None = None
        self._is_new_epoch = True
        self._pass: Pass | None = None
        self._begun: Pass | None = None
        self._pass_start = self._taken = self._window_end = 0
        # After the latest optimizer step: micro-batches of this epoch, examples of this pass, mark of the last one.
        self._stepped = self._examples = self._last = self._last_taken = 0
        self._is_order_shared = True
        self._goes_on = False
        # A resumed training that opens an epoch may have its loader made anew for that.
        self._opens_resumed = self._is_reloaded = False
        self._random: RandomStates | None = None
        self._resumed = ResumedLoop()
        self._watch = None if self._missing else self._watched()

    @property
    def known_base(self) -> BatchPlan:
        """The plan that the user's loader and trainer make, once there was a batch."""
        if self.base is None:
            raise RuntimeError("The loader's batch size is not known before its first batch.")
        return self.base

    @property
    def has_larger_micro_batch(self) -> bool:
        """Whether it trains on larger micro-batches than the user's loader makes."""
        return self.base is not None and self.plan.micro_batch_size > self.base.micro_batch_size

    def micro_batch_of(self, batch_size: int) -> int:
        """Return the micro-batch of an effective batch size that was trained on."""
        return self._plan_of(batch_size).micro_batch_size

    @property
    def works_within_epochs(self) -> bool:
        """Whether changes can take effect in the middle of an epoch."""
        return self._missing is None

    @property
    def limits(self) -> list[str]:
        """What cannot be done with this loader or this version of Lightning, in words."""
        if self._missing:
            return [
                f"the batch grows between epochs only, and by gradient accumulation only, because {self._missing}. Use "
                "a version of Lightning from 2.5 to 2.6."
            ]
        if self._loader.is_adaptable:
            return []
        return [
            f"the batch grows by gradient accumulation only, because {self._loader.reason}. For larger micro-batches, "
            "use a DataLoader with `batch_size`."
        ]

    def start(
        self, batch_size: int | None, position: EpochPosition | None = None, random: RandomStates | None = None
    ) -> None:
        """Training starts: a loader that is made from now on gets the present size, whatever its own.

        Args:
            batch_size: to go on with, after a checkpoint; None for the loader's own.
            position: where the checkpoint's epoch stood; None without one.
            random: what the random states were then; None to leave them.

        Raises:
            MisconfigurationException: it starts with larger batches than allowed, with several loaders of different
                batch sizes, or after a checkpoint of batches that these processes cannot make.
        """
        self._missing = self._missing or loops.missing_privates(self._trainer, is_set_up=True)
        if self._missing:
            self._stop_watching()
            self._loader = AdoptedLoader(loops.single_train_loader(self._trainer), keeps="nothing else is followed")
            self._begin()
        self._refuse_loaders_of_several_sizes()
        self._is_running = True
        if self._loader.is_followed and loops.is_begun(self._trainer):
            self._begun = loops.running_pass(self._trainer)  # nobody knows which of its windows is under way
        if self.base is not None:
            self._check_limits()
            self._go_on_with(batch_size)
        if position is not None and not self._missing:
            self._go_on_from(position, random)

    def learn(self, micro_batch_size: int, batch_size: int | None) -> None:
        """Take the micro-batch from the first batch, where the loader does not tell it; else as :meth:`start`."""
        self.base = BatchPlan(micro_batch_size, self._accumulate, self._trainer.world_size)
        self.plan = self._coming = self.base
        self._check_limits()
        self._go_on_with(batch_size)

    def validates(self) -> None:
        """A validation begins."""
        self._resumed.validates()

    def open(self, batch_idx: int) -> bool:
        """Set the accumulation where a window begins; tell whether batches have another size from this one on."""
        self._resumed.leaves()
        self._opens_resumed = False
        is_new_epoch = self._follow(batch_idx)
        if batch_idx < self._window_end:
            return False
        self.window = self._next_window(batch_idx, is_new_epoch)
        before, self.plan = self.plan, self.window.plan
        if self.plan != before:
            self._loader.trains_on(self.plan)
            if self._validations is not None:
                loops.set_validations(self._trainer, *self._validations)
        self._validations = None if self.plan != before else self._validations
        self._accumulate_window(batch_idx)
        return self.plan.batch_size != before.batch_size

    def begin_epoch(self) -> None:
        """An epoch begins whose batches have not been drawn yet."""
        self._stepped = self._examples = self._last = 0
        self._offer = self._validations = None

    def end_epoch(self) -> None:
        """An epoch has ended."""
        self._resumed.leaves()

    def step(self) -> None:
        """An optimizer step has ended: that of the window which is under way."""
        self._stepped, self._last = self._window_end, self._last_taken
        self._examples += sum(self.window.sizes)

    @property
    def base_steps(self) -> int:
        """The optimizer steps that the examples of the window under way make at the starting batch size, rounded up."""
        base = self.known_base
        return -(-sum(self.window.sizes) // (base.micro_batch_size * base.accumulate))

    def position(self, *, after_window: bool = False, is_validated: bool = False) -> EpochPosition | None:
        """Return where the epoch stands after its latest optimizer step; None where nobody can go on from there.

        Args:
            is_validated: whether a validation that was due there has been run.
            after_window: after that of the window under way, which has not been told of yet.
        """
        if self._missing:
            return None
        stepped, examples, last = self._stepped, self._examples, self._last
        if after_window:
            stepped, examples, last = self._window_end, examples + sum(self.window.sizes), self._last_taken
        running = self._pass_of_epoch(stepped)
        origin = running.origin if running is not None and self._loader.is_replayable else None
        return EpochPosition(
            plan=self.plan if stepped else self._coming,
            taken=stepped,
            batches=float(self._trainer.num_training_batches),
            validations=loops.validations(self._trainer),
            change=self._change(stepped),
            place=None
            if origin is None
            else PassPlace(replace(origin, is_known=self._is_order_shared), examples, last),
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

    @property
    def epoch_end(self) -> float:
        """The batches of the epoch that runs."""
        return float(self._trainer.num_training_batches)

    def earliest(self) -> int:
        """Return the first batch of this epoch that could belong to another plan; asked where a window has ended."""
        return self._window_end if self._pass is None else self._pass_start + self._pass.boundary

    def offer(self, batch_size: int, at: int) -> Offer | None:
        """Return what a change to that effective batch size would make, from batch ``at`` of this epoch on.

        Returns:
            None if an epoch does not hold one whole batch of that size.

        Raises:
            MisconfigurationException: it cannot be made of equal micro-batches on each process.
        """
        plan, end = self._plan_of(batch_size), self._trainer.num_training_batches
        if self._epoch_of(plan, whole_batches=True) < plan.accumulate:
            return None
        whole = self._epoch_of(plan)
        now = plan if self._pass is not None else self.plan.accumulated(batch_size)
        new_end = end if now is None or self._pass is None else self._end_after(plan, at)
        if self._missing or now is None or at >= min(end, new_end):
            return Offer(plan, None, at, end, whole)
        return Offer(plan, now, at, new_end, whole)

    def _change(self, stepped: int) -> Change | None:
        """Return the change that is decided for this epoch and that no optimizer step was made by yet."""
        offer = self._offer
        if offer is None or offer.now is None or stepped > offer.at:
            return None
        return Change(offer.now, offer.at, self._validations)

    def _pass_of_epoch(self, stepped: int) -> Pass | None:
        if stepped or not self._loader.is_followed or loops.draws_a_new_epoch(self._trainer):
            return self._pass if stepped else None
        running = loops.running_pass(self._trainer)  # begun before the epoch's first batch
        return None if running is self._begun else running

    def resize(self, offer: Offer) -> None:
        """Go on with another batch: in this epoch where the offer says so, and in all that follow."""
        self._coming, self._offer = offer.plan, offer
        self._loader.draws(self._coming, splits_tail=True)
        if offer.now is None or self._pass is None:
            return
        if offer.whole != float("inf"):
            self._validations = loops.moved_validations(
                self._trainer,
                lambda batch: min(self._moved(batch, offer.plan, offer.at), int(offer.end)),
                int(offer.whole),
            )
        self._pass.change(offer.now, offer.at - self._pass_start)
        loops.set_epoch_end(self._trainer, offer.end)
        show_epoch_end(self._trainer, offer.end)

    def remove(self) -> None:
        """Leave the trainer with its own accumulation; may be called more than once."""
        self._stop_watching()
        self._resumed.forget()
        self._loader, self._copied = AdoptedLoader(None), (None, None)
        self._trainer.accumulate_grad_batches = self._accumulate

    # What follows happens while loaders are set up and epochs begin.

    def _watched(self) -> loops.TrainLoaderWatch:
        return loops.TrainLoaderWatch(
            self._trainer,
            on_loader=self._adopt,
            is_resized=lambda: self.base is not None and self._coming != self.base,
            on_epoch=self._epoch_is_about_to_start,
        )

    def _stop_watching(self) -> None:
        self._loader.lets_go()
        if self._watch is not None:
            self._watch.remove()
            self._watch = None

    def _adopt(self, loader: Any, is_first: bool) -> Any:
        if not is_first:
            self._loader.lets_go()  # the first of several goes on as the user's
        theirs, copied = self._copied
        self._is_reloaded = self._opens_resumed
        if self._is_reloaded and self._random is not None:
            self._random.restore((), self._trainer.strategy.root_device)
        self._loader = AdoptedLoader(
            copied if loader is theirs else loader,
            keeps=None if is_first else "there are several training loaders, each of which gives a part of a batch",
            merges=self._merge_batches,
            limit=self._trainer.limit_train_batches,
        )
        if is_first:
            self._copied = loader, self._loader.loader
        if not self._is_running:
            self._begin()
        self._loader.draws(self._coming, splits_tail=self._is_grown(self._coming))
        self._loader.trains_on(self._coming)
        return self._loader.loader

    def _begin(self) -> None:
        size = self._loader.batch_size
        self.base = None if size is None else BatchPlan(size, self._accumulate, self._trainer.world_size)
        self.plan = self._coming = self.base or BatchPlan(1, self._accumulate, self._trainer.world_size)

    def _epoch_is_about_to_start(self) -> None:
        self._refuse_loaders_of_several_sizes()
        self._is_new_epoch = True
        if self._is_reloaded:
            resumed_loop.begin_epoch(self._trainer)
            self._is_reloaded = False
        self._loader.draws(self._coming, splits_tail=self._is_grown(self._coming))
        if self._is_running and self._is_grown(self._coming) and not loops.goes_on_with_an_epoch(self._trainer):
            self._trainer.accumulate_grad_batches = self._coming.accumulate  # counted from the epoch's start again

    def _refuse_loaders_of_several_sizes(self) -> None:
        sizes = [drawn_batch_size(loader) for loader in loops.train_loaders(self._trainer)]
        if len(sizes) > 1 and (None in sizes or len(set(sizes)) > 1):
            raise MisconfigurationException(
                f"Expected training loaders of one batch size, so that an example is one of each, but got {sizes}. "
                "Give all of them the same `batch_size`."
            )

    def _go_on_with(self, batch_size: int | None) -> None:
        if batch_size is None or batch_size == self.plan.batch_size:
            return
        before = self._coming
        self.plan = self._coming = self._plan_of(batch_size)
        self._loader.draws(self._coming, splits_tail=True)
        self._loader.trains_on(self._coming)
        self._trainer.accumulate_grad_batches = self.plan.accumulate
        if self._missing:
            return
        if self._coming.micro_batch_size != before.micro_batch_size:
            loops.restart_iterator(self._trainer)
        loops.refresh_lengths(self._trainer)

    def _go_on_from(self, position: EpochPosition, random: RandomStates | None) -> None:
        """Go on after a checkpoint: with the epoch that it was made in, or with the next."""
        trainer, replays = self._trainer, self._loader.is_replayable
        position, self._random = self._here(position), random if trainer.world_size == 1 else None
        if replays:
            self._resumed.is_known_to_go_on(trainer)
        if replays and loops.opens_the_next(trainer) and position.taken >= position.batches:
            resumed_loop.reopen_epoch(trainer)  # which Lightning would leave without validating
        elif not loops.goes_on_with_an_epoch(trainer):
            self._restore()
            if replays:
                resumed_loop.begin_epoch(trainer)
                self._opens_resumed = True
            return
        if not position.is_begun:
            self._restore()
        if replays and position.taken < position.batches:
            self._draw_on(position)
        elif not replays:
            resumed_loop.load_loader_states(trainer)
        if position.is_begun:
            self._restore()
        taken = position.taken if replays else resumed_loop.batches_done(trainer)
        self._restore_epoch(position, taken)
        if replays or taken >= position.batches:
            self._resumed.go_on(trainer, taken, position.batches, is_validated=position.is_validated)

    def _restore(self) -> None:
        if self._random is not None:
            self._random.restore(self._loader.generators, self._trainer.strategy.root_device)

    def _here(self, position: EpochPosition) -> EpochPosition:
        """Return the position as these processes and this loader have it."""
        then, now = position.plan, self.plan
        if position.place is not None and (self._trainer.global_rank > 0 or then.world_size != now.world_size):
            examples = position.place.examples * then.world_size // now.world_size
            position = replace(position, place=position.place.unmarked(examples))
        if then.world_size == now.world_size and (self._loader.is_adaptable or then == now):
            return position
        left = (position.batches - position.taken) * then.micro_batch_size * then.world_size
        batches = (
            position.batches
            if math.isinf(left)
            else position.taken + math.ceil(left / (now.micro_batch_size * now.world_size))
        )
        return replace(position, plan=now, batches=batches, change=None)

    def _draw_on(self, position: EpochPosition) -> None:
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
        if position.change is not None:
            change = position.change
            self._offer = Offer(self._coming, change.plan, change.at, position.batches, position.batches)
            self._validations = change.validations

    def _check_limits(self) -> None:
        base = self.known_base
        if self._max_batch_size < base.batch_size:
            raise MisconfigurationException(
                f"Expected argument `max_batch_size` to be at least the effective batch size that training starts "
                f"with, {base.batch_size} ({base}), but got {self._max_batch_size}"
            )
        limit = self._max_micro_batch_size
        if self._loader.is_adaptable and limit is not None and limit < base.micro_batch_size:
            raise MisconfigurationException(
                f"Expected argument `max_micro_batch_size` to be at least the loader's batch size of "
                f"{base.micro_batch_size} but got {limit}"
            )

    # Plans and lengths.

    def _plan_of(self, batch_size: int) -> BatchPlan:
        base, is_adaptable = self.known_base, self._loader.is_adaptable
        limit = self._micro_batch_limit(base)
        item_size = self._loader.item_size
        plan = base.resized(batch_size, limit, item_size) if is_adaptable else base.accumulated(batch_size)
        if plan is None:
            raise MisconfigurationException(
                f"An effective batch of {batch_size} examples cannot be shared equally by {base.world_size} "
                f"processes, in micro-batches of {base.micro_batch_size} where the loader's cannot be changed."
            )
        return plan

    def _micro_batch_limit(self, base: BatchPlan) -> int:
        own, cap = base.micro_batch_size, self.micro_batch_cap or 2**62
        if self._max_micro_batch_size is not None:
            return max(own, min(self._max_micro_batch_size, cap))
        return own if self._accumulate > 1 else max(own, cap)

    def _is_grown(self, plan: BatchPlan) -> bool:
        return self.base is not None and plan != self.base

    def _epoch_of(self, plan: BatchPlan, *, whole_batches: bool = False) -> float:
        """Return the number of micro-batches of an epoch; of whole ones only, if wanted."""
        if not self._loader.is_adaptable:
            return float(self._trainer.num_training_batches)
        batches = self._loader.batches(plan, whole_batches=whole_batches)
        return loops.limited(batches, self._trainer.limit_train_batches)

    def _moved(self, batch: int, plan: BatchPlan, at: int) -> int:
        """Map a batch of this epoch to the one that ends with the same example, if ``plan`` begins at batch ``at``."""
        examples = (batch - at) * self.plan.micro_batch_size
        return batch if batch <= at else at - (-examples // plan.micro_batch_size)

    def _end_after(self, plan: BatchPlan, at: int) -> float:
        """Return the number of batches of this epoch, if ``plan`` begins at batch ``at``."""
        end = self._trainer.num_training_batches
        if end == float("inf") or self._pass is None:
            return float(end)
        is_number = isinstance(self._trainer.limit_train_batches, int)
        limit = end if is_number else self._moved(int(end), plan, at)
        left = self._pass.batches_left(plan, at - self._pass_start)
        return limit if left is None else min(limit, at + left)

    # Windows.

    def _follow(self, batch_idx: int) -> bool:
        """Keep up with the batches that the trainer takes; tell whether this is the first of an epoch."""
        is_new_epoch, self._is_new_epoch = self._is_new_epoch or (bool(self._missing) and batch_idx == 0), False
        running = loops.running_pass(self._trainer) if self._loader.is_followed else None
        running = None if running is self._begun else running
        if is_new_epoch or running is not self._pass:
            self._pass = running
            if not self._goes_on:
                self._offer = self._validations = None
            self._goes_on = False
            self._pass_start = self._taken = self._window_end = self._stepped = batch_idx
            self._examples = 0 if running is None else running.begins_after
            self._is_order_shared = running is None or self._is_shared(running)
        while self._pass is not None and self._taken <= batch_idx:  # a batch of None passes by without a hook
            drawn = self._pass.drawn.popleft()
            self._loader.takes(drawn.examples)
            self._last_taken = drawn.last
            self._taken += 1
        return is_new_epoch

    def _is_shared(self, running: Pass) -> bool:
        """Tell whether the states that one process has drawn its order from will do for all."""
        random = None if running.origin is None else running.origin.random
        if self._trainer.world_size == 1:
            return True
        drawn_from = 0 if random is None else mark(random.processor.tolist())
        return agreed_over_ranks(drawn_from, self._trainer.strategy.root_device) is not None

    def _next_window(self, batch_idx: int, is_new_epoch: bool) -> Window:
        while self._pass is not None:
            window = self._pass.windows.popleft()
            self._window_end += len(window.sizes)
            if batch_idx < self._window_end:
                return Window(window.plan, window.sizes[batch_idx - self._window_end :])
        plan = self._coming if is_new_epoch else self.plan
        if self._offer is not None and self._offer.now is not None and batch_idx >= self._offer.at:
            plan = self._offer.now
        self._window_end = batch_idx + plan.accumulate
        return Window(plan, (plan.micro_batch_size,) * plan.accumulate)

    def _accumulate_window(self, batch_idx: int) -> None:
        count, start = self.plan.accumulate, self._window_end - len(self.window.sizes)
        is_grown = self._is_grown(self.plan)
        if loops.updates_statistics(self._trainer) or not (is_grown or start % count):
            return  # as somebody else has set it
        if is_grown and not self._missing:  # an epoch's last window may hold fewer micro-batches
            left = self._trainer.num_training_batches - batch_idx
            sizes = self.window.sizes if left == float("inf") else self.window.sizes[: max(1, int(left))]
            self.window, count, start = Window(self.plan, sizes), len(sizes), batch_idx
        self._trainer.accumulate_grad_batches = count if self._missing else every(count, start)
