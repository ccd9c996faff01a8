"""Changes the size of the batches that a trainer trains on, at any accumulation window, and puts everything back."""

from dataclasses import dataclass
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_graddiv.batching import loops
from lightning_graddiv.batching.accumulation import every
from lightning_graddiv.batching.adoption import AdoptedLoader
from lightning_graddiv.batching.follower import WindowFollower
from lightning_graddiv.batching.plan import BatchPlan
from lightning_graddiv.batching.progress_bar import show_epoch_end
from lightning_graddiv.batching.sampler import Window, drawn_batch_size


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
        self._follower = WindowFollower(trainer)
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

    def start(self, batch_size: int | None) -> None:
        """Training starts: a loader that is made from now on gets the present size, whatever its own.

        Args:
            batch_size: to go on with, after a checkpoint; None for the loader's own.

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
            self._follower.leave_out_running()
        if self.base is not None:
            self._check_limits()
            self._go_on_with(batch_size)

    def learn(self, micro_batch_size: int, batch_size: int | None) -> None:
        """Take the micro-batch from the first batch, where the loader does not tell it; else as :meth:`start`."""
        self.base = BatchPlan(micro_batch_size, self._accumulate, self._trainer.world_size)
        self.plan = self._coming = self.base
        self._check_limits()
        self._go_on_with(batch_size)

    def open(self, batch_idx: int) -> bool:
        """Set the accumulation where a window begins; tell whether batches have another size from this one on."""
        is_new_epoch, self._is_new_epoch = self._is_new_epoch or (bool(self._missing) and batch_idx == 0), False
        if self._follower.follow(self._loader, batch_idx, is_new_epoch=is_new_epoch):
            self._begin_pass()
        if batch_idx < self._follower.window_end:
            return False
        self.window = self._follower.next_window(batch_idx) or self._counted_window(batch_idx, is_new_epoch)
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
        self._follower.begin_epoch()
        self._offer = self._validations = None

    def step(self) -> None:
        """An optimizer step has ended: that of the window which is under way."""
        self._follower.step(sum(self.window.sizes))

    @property
    def trained_on(self) -> int | None:
        """The examples of the micro-batch that is trained on now; None where its loader is not followed."""
        return self._loader.trained_on

    @property
    def base_steps(self) -> int:
        """The optimizer steps that the examples of the window under way make at the starting batch size, rounded up."""
        base = self.known_base
        return -(-sum(self.window.sizes) // (base.micro_batch_size * base.accumulate))

    @property
    def epoch_end(self) -> float:
        """The batches of the epoch that runs."""
        return float(self._trainer.num_training_batches)

    def earliest(self) -> int:
        """Return the first batch of this epoch that could belong to another plan; asked where a window has ended."""
        return self._follower.boundary

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
        is_followed = self._follower.running is not None
        now = plan if is_followed else self.plan.accumulated(batch_size)
        new_end = self._end_after(plan, at) if is_followed else end
        if self._missing or now is None or at >= min(end, new_end):
            return Offer(plan, None, at, end, whole)
        return Offer(plan, now, at, new_end, whole)

    def resize(self, offer: Offer) -> None:
        """Go on with another batch: in this epoch where the offer says so, and in all that follow."""
        self._coming, self._offer = offer.plan, offer
        self._loader.draws(self._coming, splits_tail=True)
        running = self._follower.running
        if offer.now is None or running is None:
            return
        if offer.whole != float("inf"):
            self._validations = loops.moved_validations(
                self._trainer,
                lambda batch: min(self._moved(batch, offer.plan, offer.at), int(offer.end)),
                int(offer.whole),
            )
        running.change(offer.now, offer.at - self._follower.start)
        loops.set_epoch_end(self._trainer, offer.end)
        show_epoch_end(self._trainer, offer.end)

    def remove(self) -> None:
        """Leave the trainer with its own accumulation; may be called more than once."""
        self._stop_watching()
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
        if end == float("inf"):
            return float(end)
        is_number = isinstance(self._trainer.limit_train_batches, int)
        limit = end if is_number else self._moved(int(end), plan, at)
        left = self._follower.batches_left(plan, at)
        return limit if left is None else min(limit, at + left)

    # Windows.

    def _begin_pass(self) -> None:
        """The first batch of another pass over the data has come."""
        self._offer = self._validations = None

    def _counted_window(self, batch_idx: int, is_new_epoch: bool) -> Window:
        plan = self._coming if is_new_epoch else self.plan
        if self._offer is not None and self._offer.now is not None and batch_idx >= self._offer.at:
            plan = self._offer.now
        self._follower.window_end = batch_idx + plan.accumulate
        return Window(plan, (plan.micro_batch_size,) * plan.accumulate)

    def _accumulate_window(self, batch_idx: int) -> None:
        count, start = self.plan.accumulate, self._follower.window_end - len(self.window.sizes)
        is_grown = self._is_grown(self.plan)
        if loops.updates_statistics(self._trainer) or not (is_grown or start % count):
            return  # as somebody else has set it
        if is_grown and not self._missing:  # an epoch's last window may hold fewer micro-batches
            left = self._trainer.num_training_batches - batch_idx
            sizes = self.window.sizes if left == float("inf") else self.window.sizes[: max(1, int(left))]
            self.window, count, start = Window(self.plan, sizes), len(sizes), batch_idx
        self._trainer.accumulate_grad_batches = count if self._missing else every(count, start)
