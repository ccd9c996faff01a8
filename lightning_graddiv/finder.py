"""Find the batch size to train with, beside Lightning's ``lr_find``."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from typing_extensions import override

from lightning_graddiv.batching.loops import leave_fit
from lightning_graddiv.batching.twins import twin_loader, twin_of
from lightning_graddiv.callbacks.finder import BatchSizeBoundFinder
from lightning_graddiv.finding import BatchSizeFinding
from lightning_graddiv.random_states import random_states_put_back


def find_batch_size(
    trainer: Trainer,
    model: LightningModule,
    train_dataloaders: Any = None,
    datamodule: Any = None,
    *,
    ckpt_path: str | None = None,
    **options: Any,
) -> BatchSizeFinding:
    """Find the batch size to train with at the present weights, and print it; used like Lightning's ``lr_find``.

    Runs ``trainer.fit`` up to where training would start, with :class:`BatchSizeBoundFinder` as the only callback and
    without loggers, on copies of the loader and the data module. A ``fit`` after it is the one that would have been
    without it. As with ``lr_find``, the module's own hooks up to there (``setup``, ``configure_optimizers``, its
    loaders) are called once more.

    Args:
        trainer: to train with.
        model: to train.
        train_dataloaders: a training loader, or a data module.
        datamodule: a data module.
        ckpt_path: a checkpoint to take the weights from. They are put back. None: the model's own.
        options: those of :class:`BatchSizeBoundFinder`.

    Raises:
        ValueError: an argument out of range.
        MisconfigurationException: as for :class:`BatchSizeBoundFinder`; or training would not start at all.
        MeasurementError: the model cannot be measured.

    Example::

        finding = find_batch_size(trainer, model, train_loader, max_batch_size=1024)
        finding.recommended.batch_size, finding.learning_rate_factor
        finding.plot()
    """
    if hasattr(train_dataloaders, "prepare_data"):
        train_dataloaders, datamodule = None, train_dataloaders
    finder = _Finder(ckpt_path, **options)
    loader = None if train_dataloaders is None else twin_loader(train_dataloaders)
    with random_states_put_back(None), _alone(trainer, finder):
        trainer.fit(model, loader, datamodule=_data_module(trainer, datamodule))
    if finder.finding is None:
        raise MisconfigurationException("find_batch_size: there is no training to come, by `max_steps` or the loaders.")
    return finder.finding


class _Finder(BatchSizeBoundFinder):
    """Leaves ``fit`` when it has found."""

    def __init__(self, ckpt_path: str | None, **options: Any) -> None:
        super().__init__(**options)
        self._ckpt_path = ckpt_path

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with _weights_of(trainer, pl_module, self._ckpt_path):
            super().on_train_start(trainer, pl_module)
        leave_fit(trainer)


@contextmanager
def _alone(trainer: Any, finder: Callback) -> Iterator[None]:
    """Let ``fit`` run with no other callback, without loggers, and also after the last epoch."""
    kept = trainer.callbacks, trainer.loggers, trainer.num_sanity_val_steps, trainer.max_epochs
    trainer.callbacks, trainer.num_sanity_val_steps = [finder], 0
    trainer.loggers = [DummyLogger() for _ in trainer.loggers]
    if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch:
        trainer.fit_loop.max_epochs = trainer.current_epoch + 1
    try:
        yield
    finally:
        trainer.callbacks, trainer.loggers, trainer.num_sanity_val_steps, trainer.fit_loop.max_epochs = kept


@contextmanager
def _weights_of(trainer: Any, module: LightningModule, ckpt_path: str | None) -> Iterator[None]:
    """Give the module a checkpoint's weights for a while."""
    if ckpt_path is None:
        yield
        return
    own = {name: value.clone() for name, value in module.state_dict().items()}
    try:
        trainer.strategy.load_model_state_dict(trainer.strategy.load_checkpoint(ckpt_path))
        yield
    finally:
        module.load_state_dict(own)


def _data_module(trainer: Trainer, datamodule: Any) -> Any:
    """Return a copy of the data module; itself where it cannot be copied."""
    try:
        return twin_of(datamodule, [trainer, trainer.lightning_module])
    except Exception:  # whatever pickling raises
        return datamodule
