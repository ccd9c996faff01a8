"""The only module that touches Lightning's private loop state.

Public ways that were ruled out: ``reload_dataloaders_every_n_epochs`` makes loaders anew only from hooks, restarts the
workers and re-reads the user's batch size; there is none to change a loader's length after the fit loop has read it
(``limit_train_batches``, the validation interval and the end of the epoch would follow the old length).
"""

from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.trainer.connectors.data_connector import _parse_num_batches
from lightning.pytorch.trainer.states import RunningStage


class TrainLoaderWatch:
    """Tells when training loaders are made, before anybody asks for their length, and when an epoch is about to start.

    Works on the trainer's own objects, never on the user's, and is undone by :meth:`remove`.

    Args:
        trainer: the trainer; its fit loop is watched until :meth:`remove`.
        on_loader: called with each final training loader (samplers injected), before its length is read; returns the
            loader to use.
        is_resized: whether batches have another size than the user's.
        on_epoch: called at each start of an epoch, before anybody's ``on_train_epoch_start`` and before the epoch's
            iterator is made (the first epoch's exists already), and once when the loaders are set up.
    """

    def __init__(
        self,
        trainer: Any,
        *,
        on_loader: Callable[[Any], Any],
        is_resized: Callable[[], bool],
        on_epoch: Callable[[], None],
    ) -> None:
        self._trainer = trainer
        set_up = trainer.fit_loop.setup_data

        def watched() -> None:
            process = trainer.strategy.process_dataloader
            trainer.strategy.process_dataloader = lambda loader: on_loader(process(loader))
            interval = trainer.val_check_interval
            if is_resized() and isinstance(interval, int):  # Lightning refuses one that is longer than the epoch
                trainer.val_check_interval = 1.0
            try:
                set_up()
            finally:
                trainer.val_check_interval = interval
                trainer.strategy.__dict__.pop("process_dataloader", None)
            if is_resized() and train_loaders(trainer):
                refresh_lengths(trainer)
            on_epoch()

        trainer.fit_loop.setup_data = watched

    def remove(self) -> None:
        """Put the fit loop back as it was; may be called more than once."""
        self._trainer.fit_loop.__dict__.pop("setup_data", None)


def train_loaders(trainer: Any) -> list[Any]:
    """Return the training loaders that the fit loop draws from; empty before they are set up."""
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else list(combined.flattened)


def single_train_loader(trainer: Any) -> Any:
    """Return the training loader where there is exactly one, else None."""
    loaders = train_loaders(trainer)
    return loaders[0] if len(loaders) == 1 else None


def is_closing_an_epoch(trainer: Any) -> bool:
    """Tell whether the loop, resumed from a checkpoint, still has to finish the epoch of that checkpoint."""
    return bool(trainer.fit_loop.restarting)


def draws_a_new_epoch(trainer: Any) -> bool:
    """Tell whether the epoch that is about to start will make a new iterator of its loaders."""
    fit_loop = trainer.fit_loop
    return trainer.current_epoch > 0 and not fit_loop.restarting and not getattr(fit_loop, "is_resuming", False)


def refresh_lengths(trainer: Any) -> None:
    """Make the fit loop read the loaders' lengths again: limits, batches per epoch, validation interval.

    ``limit_train_batches`` as a fraction follows the new length; as a number of batches it stays one. A validation
    interval in batches that no longer fits into an epoch becomes the epoch's end.
    """
    fit_loop = trainer.fit_loop
    combined = fit_loop._combined_loader
    lengths = [_length(loader) for loader in combined.flattened]
    limits = [_parse_num_batches(RunningStage.TRAINING, length, trainer.limit_train_batches) for length in lengths]
    combined.limits = limits
    combined._iterator.limits = limits
    batches = sized_len(combined)
    fit_loop.max_batches = float("inf") if batches is None else batches
    fit_loop._data_fetcher.length = batches
    if trainer.val_check_batch is None:  # validation goes by the clock
        return
    interval = trainer.val_check_interval
    if isinstance(interval, int):
        every_epoch = trainer.check_val_every_n_epoch is not None
        trainer.val_check_batch = min(interval, fit_loop.max_batches) if every_epoch else interval
    elif fit_loop.max_batches != float("inf"):
        trainer.val_check_batch = max(1, int(fit_loop.max_batches * interval))


def restart_iterator(trainer: Any) -> None:
    """Begin the coming epoch's iteration anew; what the present iterator has prefetched is thrown away."""
    iter(trainer.fit_loop._data_fetcher)


def _length(loader: Any) -> float:
    length = sized_len(loader)
    return float("inf") if length is None else length
