"""Lightning's fit loop after a checkpoint: made to go on where training was, not where its counters say.

With :mod:`.loops`, the only module that touches Lightning's private loop state. There is no public way to go on in the
middle of an epoch: a DataLoader begins it anew, and what an accumulation window had gathered is lost.
"""

from typing import Any

from lightning_graddiv.batching.loops import draws_a_new_epoch, restart_iterator, train_loaders


def begin_epoch(trainer: Any) -> None:
    """Let the next epoch be drawn in its own order, as it would have been without the interruption.

    Lightning keeps an iterator that it has made before it told the sampler which epoch this is.
    """
    _tell_epoch(trainer)
    if not draws_a_new_epoch(trainer):
        restart_iterator(trainer)


def batches_done(trainer: Any) -> int:
    """Return how many batches of its epoch the loop takes for trained on."""
    epoch_loop = trainer.fit_loop.epoch_loop
    return int(epoch_loop.batch_progress.current.completed) + int(epoch_loop.restarted_on_train_batch_end)


def load_loader_states(trainer: Any) -> None:
    """Give loaders that keep their own state what the checkpoint holds of it, where Lightning has not.

    It does not where the loaders were set up before the loops were restored: for ``estimated_stepping_batches``.
    """
    states = getattr(trainer.fit_loop, "_combined_loader_states_to_load", None)
    if states:
        trainer.fit_loop._combined_loader._load_state_dicts(states)
        trainer.fit_loop._combined_loader_states_to_load = []
        restart_iterator(trainer)


class ResumedLoop:
    """What the fit loop is told before it goes on after a checkpoint, and what is taken back afterwards."""

    def __init__(self) -> None:
        self._trainer: Any = None
        self._loaders: list[Any] = []

    def is_known_to_go_on(self, trainer: Any) -> None:
        """Keep Lightning from warning that the loader begins anew."""
        self._trainer = trainer
        self._loaders = [loader for loader in train_loaders(trainer) if not hasattr(loader, "state_dict")]
        for loader in self._loaders:  # Lightning looks for loaders without, and would keep what they return
            loader.__dict__.update(state_dict=dict, load_state_dict=_load_nothing)

    def go_on(self, trainer: Any, taken: int, batches: float, *, is_validated: bool) -> None:
        """Go on with an epoch after ``taken`` of its ``batches``, whatever the loop has counted.

        Batches of a window that was not complete count as if they had not been: their gradients are not in the
        checkpoint.

        Args:
            trainer: before its epoch loop runs.
            taken: batches that are in optimizer steps.
            batches: in the epoch.
            is_validated: whether a validation that was due after them has been run.
        """
        epoch_loop = trainer.fit_loop.epoch_loop
        progress = epoch_loop.batch_progress
        has_begun_more = taken == 0 or progress.current.ready > taken
        total = progress.total.completed - progress.current.completed + taken
        for counter, done in ((progress.current, taken), (progress.total, total)):
            counter.ready = counter.started = counter.processed = counter.completed = done
        progress.is_last_batch = taken >= batches
        if is_validated and has_begun_more and isinstance(trainer.val_check_batch, int):
            trainer.val_check_batch = NeverDue(trainer.val_check_batch)
        elif not is_validated and epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
            _interrupt_validation(epoch_loop.val_loop)
        epoch_loop.update_restart_stage()
        if progress.is_last_batch:
            reopen_epoch(trainer)  # it will be counted when it ends, once more if it had been
            trainer.fit_loop._data_fetcher.iterator = iter(())  # Lightning may ask it for one batch more

    def validates(self) -> None:
        """The validation that was due has begun; may be called before any other."""
        if self._trainer is not None:
            epoch_loop = self._trainer.fit_loop.epoch_loop
            total = epoch_loop.val_loop.batch_progress.total
            total.ready = total.started = total.processed
            epoch_loop._batches_that_stepped = self._trainer.global_step - 1  # counted after validation
            self._take_back()

    def leaves(self) -> None:
        """The first batch has begun, or the epoch has ended without one; may be called at any other time too."""
        if self._trainer is not None:
            self._trainer.fit_loop.epoch_loop._batches_that_stepped = self._trainer.global_step
            self.forget()

    def forget(self) -> None:
        """The training has ended; may be called at any time."""
        self._take_back()
        self._trainer = None

    def _take_back(self) -> None:
        for loader in self._loaders:
            del loader.__dict__["state_dict"], loader.__dict__["load_state_dict"]
        self._loaders = []
        if self._trainer is not None and isinstance(self._trainer.val_check_batch, NeverDue):
            self._trainer.val_check_batch = self._trainer.val_check_batch.interval


class NeverDue(int):
    """A validation interval that no batch is a multiple of.

    Args:
        interval: the true one.
    """

    interval: int

    def __new__(cls, interval: int) -> "NeverDue":
        """Make the number."""
        made = super().__new__(cls, interval)
        made.interval = interval
        return made

    def __rmod__(self, other: int) -> int:
        return 1


def reopen_epoch(trainer: Any) -> None:
    """Go back to the epoch whose last batch has ended, as if nothing after that had."""
    progress = trainer.fit_loop.epoch_progress
    for counter in (progress.current, progress.total):
        counter.processed = counter.completed = counter.started - 1


def _interrupt_validation(val_loop: Any) -> None:
    """Make a validation that was due look as if it had been interrupted in its first batch: it is run."""
    val_loop.batch_progress.current.reset()
    total = val_loop.batch_progress.total
    total.ready = total.started = total.processed + 1
    total.completed = total.processed


def _load_nothing(state: Any) -> None:
    """There is none."""


def _tell_epoch(trainer: Any) -> None:
    for loader in train_loaders(trainer):
        batch_sampler = getattr(loader, "batch_sampler", None)
        samplers: tuple[Any, Any] = (getattr(loader, "sampler", None), getattr(batch_sampler, "sampler", None))
        for sampler in {id(sampler): sampler for sampler in samplers}.values():
            if callable(getattr(sampler, "set_epoch", None)):
                sampler.set_epoch(trainer.fit_loop.epoch_progress.current.processed)
