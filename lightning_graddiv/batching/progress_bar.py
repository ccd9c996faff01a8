"""The progress bar's idea of how long an epoch is: Lightning's bars read it once, at the epoch's start."""

from typing import Any


def show_epoch_end(trainer: Any, batches: float) -> None:
    """Tell tqdm's or Rich's bar that the epoch which runs has so many batches; bars of other kinds ask the trainer."""
    bar = trainer.progress_bar_callback
    names = {base.__name__ for base in type(bar).__mro__}  # by name: Lightning lives in two namespaces
    total = None if batches == float("inf") else batches
    if "TQDMProgressBar" in names:
        try:
            bar.train_progress_bar.total = total
        except TypeError:  # not drawn yet
            return
        bar.train_progress_bar.refresh()
    elif "RichProgressBar" in names and bar.progress is not None and bar.train_progress_bar_id is not None:
        bar.progress.update(bar.train_progress_bar_id, total=total)
