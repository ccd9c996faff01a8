"""The only module that touches Lightning's private loop state, but for :mod:`.resumed_loop`.

Public ways that were ruled out: ``reload_dataloaders_every_n_epochs`` makes loaders anew only from hooks, restarts the
workers and re-reads the user's batch size; there is none to change a loader's length after the fit loop has read it
(``limit_train_batches``, the validation interval and the end of the epoch would follow the old length). Where
:func:`missing_privates` names any, nothing else in here is called but :func:`train_loaders`. :func:`batch_to_device`
and :func:`leave_fit` are the finder's, and need what Lightning's own tuners need.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from inspect import signature
from itertools import count
from operator import attrgetter
from typing import Any, NoReturn

import lightning
from lightning.fabric.utilities.data import sized_len
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_graddiv.batching.accumulation import every
from lightning_graddiv.batching.sampler import Pass
from lightning_graddiv.distributed import smallest_over_ranks

_NEEDED_BEFORE = (
    "strategy.process_dataloader",
    "fit_loop.setup_data",
    "fit_loop.restarting",
    "fit_loop.max_batches",
    "fit_loop.epoch_loop.batch_progress",
    "fit_loop.epoch_progress.current",
    "fit_loop.epoch_loop._batches_that_stepped",
    "fit_loop.epoch_loop._should_check_val_fx",
    "fit_loop.epoch_loop.restarted_on_train_batch_end",
    "fit_loop.epoch_loop.val_loop.batch_progress",
    "fit_loop._combined_loader",
    "fit_loop._data_fetcher",
)
_NEEDED_AFTER = (
    "val_check_batch",
    "val_check_interval",
    "fit_loop._combined_loader.flattened",
    "fit_loop._combined_loader.limits",
    "fit_loop._combined_loader._iterator.limits",
    "fit_loop._combined_loader._iterator.iterators",
    "fit_loop._data_fetcher.length",
    "fit_loop._data_fetcher.fetched",
)


class TrainLoaderWatch:
    """Tells when training loaders are made, before anybody asks for their length, and when an epoch is about to start.

    Works on the trainer's own objects, never on the user's, and is undone by :meth:`remove`.

    Args:
        trainer: the trainer; its fit loop is watched until :meth:`remove`.
        on_loader: called with each final training loader (samplers injected), and whether it is the first of several,
            before its length is read; returns the loader to use.
        is_resized: whether batches have another size than the user's.
        on_epoch: called at each start of an epoch, before anybody's ``on_train_epoch_start`` and before the epoch's
            iterator is made (the first epoch's exists already), and once when the loaders are set up.
    """

    def __init__(
        self,
        trainer: Any,
        *,
        on_loader: Callable[[Any, bool], Any],
        is_resized: Callable[[], bool],
        on_epoch: Callable[[], None],
    ) -> None:
        self._trainer = trainer
        set_up = trainer.fit_loop.setup_data

        def watched() -> None:
            """Set up the loop's loaders, and see each as it is processed."""
            before = trainer.fit_loop._combined_loader
            process = trainer.strategy.process_dataloader
            order = count()
            trainer.strategy.process_dataloader = lambda loader: on_loader(process(loader), next(order) == 0)
            interval = trainer.val_check_interval
            if is_resized() and isinstance(interval, int):  # Lightning refuses one that is longer than the epoch
                trainer.val_check_interval = 1.0
            try:
                set_up()
            finally:
                trainer.val_check_interval = interval
                trainer.strategy.__dict__.pop("process_dataloader", None)
            is_new = trainer.fit_loop._combined_loader is not before
            if is_new:
                end_together(trainer)
            on_epoch()
            # An epoch that goes on after a checkpoint keeps the lengths that it had.
            if is_resized() and train_loaders(trainer) and (is_new or draws_a_new_epoch(trainer)):
                refresh_lengths(trainer)

        trainer.fit_loop.setup_data = watched

    def remove(self) -> None:
        """Put the fit loop back as it was; may be called more than once."""
        self._trainer.fit_loop.__dict__.pop("setup_data", None)


def missing_privates(trainer: Any, *, is_set_up: bool) -> str | None:
    """Say what this module needs of Lightning and does not find; None where all is as expected.

    Args:
        trainer: the trainer.
        is_set_up: whether the training loaders are, so that all can be looked at.
    """
    names = _NEEDED_AFTER if is_set_up else _NEEDED_BEFORE
    missing = [f"`trainer.{name}`" for name in names if not _has(trainer, name)]
    if missing:
        return f"Lightning {lightning.__version__} has no {', '.join(missing)}"
    if "dataloader_iter" in signature(trainer.lightning_module.training_step).parameters:
        return "`training_step` takes `dataloader_iter`: it draws its batches after the hooks that could count them"
    return None


def train_loaders(trainer: Any) -> list[Any]:
    """Return the training loaders that the fit loop draws from; empty before they are set up."""
    loaders = trainer.train_dataloader
    return [] if loaders is None else list(_flattened(loaders))


def single_train_loader(trainer: Any) -> Any:
    """Return the training loader where there is exactly one, else None."""
    loaders = train_loaders(trainer)
    return loaders[0] if len(loaders) == 1 else None


def running_pass(trainer: Any) -> Pass | None:
    """Return the pass that the fit loop draws from, not one that somebody else has begun with the same loader."""
    iterator = trainer.fit_loop._combined_loader._iterator
    iterators = getattr(iterator, "iterators", None) or [None]
    drawn_from = getattr(iterators[0], "_sampler_iter", None)
    if isinstance(drawn_from, Pass):
        return drawn_from
    latest: Pass | None = single_train_loader(trainer).batch_sampler.latest
    return latest


def is_begun(trainer: Any) -> bool:
    """Tell whether the fit loop has taken batches of its present pass already, as after a tuner's own training."""
    fetcher = trainer.fit_loop._data_fetcher
    return bool(fetcher.fetched > len(getattr(fetcher, "batches", [])))


def goes_on_with_an_epoch(trainer: Any) -> bool:
    """Tell whether the loop, resumed from a checkpoint, still has to finish the epoch of that checkpoint.

    It does not where it :func:`opens_the_next`.
    """
    return bool(trainer.fit_loop.restarting) and not opens_the_next(trainer)


def opens_the_next(trainer: Any) -> bool:
    """Tell whether the checkpoint was made while an epoch's last batch ended: the loop then opens the next epoch."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    is_midway = bool(progress.total.completed < progress.total.processed)
    return bool(trainer.fit_loop.restarting) and bool(progress.is_last_batch) and is_midway


def updates_statistics(trainer: Any) -> bool:
    """Tell whether this epoch trains nothing: averaged weights get their batch statistics in one long window."""
    return bool(getattr(trainer.fit_loop, "_skip_backward", False))


def refresh_lengths(trainer: Any) -> None:
    """Make the fit loop read the loaders' lengths again: limits, batches per epoch, validation interval.

    ``limit_train_batches`` as a fraction follows the new length; as a number of batches it stays one. A validation
    interval in batches that no longer fits into an epoch becomes the epoch's end.
    """
    combined = trainer.fit_loop._combined_loader
    limits = [limited(sized_len(loader), trainer.limit_train_batches) for loader in combined.flattened]
    combined.limits = limits
    combined._iterator.limits = limits
    batches = sized_len(combined)
    set_epoch_end(trainer, _of_shortest(trainer, float("inf") if batches is None else batches))
    if trainer.val_check_batch is None:  # validation goes by the clock
        return
    interval = trainer.val_check_interval
    if isinstance(interval, int):
        every_epoch = trainer.check_val_every_n_epoch is not None
        trainer.val_check_batch = min(interval, trainer.num_training_batches) if every_epoch else interval
    elif trainer.num_training_batches != float("inf"):
        trainer.val_check_batch = max(1, int(trainer.num_training_batches * interval))


def end_together(trainer: Any) -> None:
    """Let an epoch end on all processes with the one that has the fewest batches, which the others would wait for."""
    batches = float(trainer.num_training_batches)
    fewest = _of_shortest(trainer, batches)
    (differs,) = smallest_over_ranks([-float(fewest != batches)], trainer.strategy.root_device)
    if differs == 0:
        return
    rank_zero_warn(
        f"AdaptiveBatchSize: the processes have training batches in different numbers, the fewest {fewest:.0f}. Each "
        "epoch ends after those, for one process would wait for another in vain. Give every process as many examples."
    )
    if fewest != batches:
        set_epoch_end(trainer, fewest)
    if fewest > 0 and isinstance(trainer.val_check_interval, float) and trainer.val_check_batch is not None:
        trainer.val_check_batch = max(1, int(fewest * trainer.val_check_interval))


def _of_shortest(trainer: Any, batches: float) -> float:
    (fewest,) = smallest_over_ranks([batches], trainer.strategy.root_device)
    return fewest if math.isinf(fewest) else int(fewest)


def set_epoch_end(trainer: Any, batches: float) -> None:
    """Let the epoch that runs, or is about to, end after so many batches; infinite: with its data."""
    trainer.fit_loop.max_batches = batches
    trainer.fit_loop._data_fetcher.length = None if batches == float("inf") else batches


def moved_validations(trainer: Any, moved: Callable[[int], int], whole: int) -> tuple[int, int] | None:
    """Return where to validate in an epoch whose batches change their size, as for :func:`set_validations`.

    Args:
        trainer: with the epoch's old end.
        moved: maps a batch of the old sizes to the one that ends with the same example.
        whole: batches in an epoch of the new size.

    Returns:
        None where validation does not go by the batches of an epoch.
    """
    interval, old = trainer.val_check_interval, trainer.val_check_batch
    if old is None or old == float("inf") or trainer.check_val_every_n_epoch is None:
        return None
    end = int(trainer.num_training_batches)
    if isinstance(interval, int):
        return min(interval, moved(end)), 0
    last = end - end % old  # the epoch's last validation: one at its end stays there
    return max(1, int(whole * interval)), moved(last)


def validations(trainer: Any) -> tuple[int, int] | None:
    """Return where the epoch validates: every so many batches, counted from a batch; None where they do not matter."""
    now = getattr(trainer, "val_check_batch", None)
    return None if now is None or now == float("inf") else (int(now), getattr(now, "origin", 0))


def set_validations(trainer: Any, interval: int, origin: int) -> None:
    """Let the epoch validate after each batch ``origin + i * interval``."""
    trainer.val_check_batch = every(interval, origin)


def restart_iterator(trainer: Any) -> None:
    """Begin the coming epoch's iteration anew; what the present iterator has prefetched is thrown away."""
    iter(trainer.fit_loop._data_fetcher)


def batch_to_device(trainer: Any, batch: Any) -> Any:
    """Do with a batch of the training loader what the loop does with it before hooks and ``training_step`` see it."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def leave_fit(trainer: Any) -> NoReturn:
    """Leave ``fit`` as Lightning's own tuners do: teardown hooks are called, and nothing has failed."""
    modules = [cls.__module__ for cls in type(trainer).__mro__]
    namespace = next(name for name in modules if name.endswith("trainer.trainer")).removesuffix(".trainer.trainer")
    raise import_module(f"{namespace}.utilities.exceptions")._TunerExitException


def limited(length: float | None, limit: float) -> float:
    """Return the batches of an epoch of that length under ``limit_train_batches``, which Lightning has checked."""
    if isinstance(limit, int):
        return limit if length is None else min(length, limit)
    return float("inf") if length in (None, float("inf")) else int(length * limit)


def draws_a_new_epoch(trainer: Any) -> bool:
    """Tell whether the epoch that is about to start will make a new iterator of its loaders."""
    fit_loop = trainer.fit_loop
    return trainer.current_epoch > 0 and not fit_loop.restarting and not getattr(fit_loop, "is_resuming", False)


def _has(trainer: Any, path: str) -> bool:
    """Tell whether there is an attribute of that path."""
    try:
        attrgetter(path)(trainer)
    except AttributeError:
        return False
    return True


def _flattened(loaders: Any) -> Iterator[Any]:
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if not isinstance(loaders, (list, tuple)):
        yield loaders
        return
    for loader in loaders:
        yield from _flattened(loader)
