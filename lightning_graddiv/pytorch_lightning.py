"""The callbacks for programs that `import pytorch_lightning` instead of `lightning.pytorch`.

The two packages hold the same code twice, and each knows a callback by its own class: a ``LightningCLI`` of
``pytorch_lightning`` refuses any other, its ``Trainer`` does so before version 2.6, or where one stands alone instead
of in a list. The classes in here are callbacks of both; they behave, log and load checkpoints as those that they are
made of. Nothing else imports this module, so that the package does not need ``pytorch_lightning``.

Example::

    from lightning_graddiv.pytorch_lightning import AdaptiveBatchSize

    trainer = pytorch_lightning.Trainer(callbacks=AdaptiveBatchSize(max_batch_size=1024))
"""

from pytorch_lightning import Callback

import lightning_graddiv

__all__ = [
    "AdaptiveBatchSize",
    "BatchSizeBoundFinder",
    "DifferentialDiversityMonitor",
    "DropConnect",
    "GradientDiversityMonitor",
    "GradientQuantization",
    "LangevinNoise",
]

# The types of the two packages disagree in every hook: each names its own Trainer. Names stay as they are, since
# a checkpoint finds its callback's state by them.


class GradientDiversityMonitor(lightning_graddiv.GradientDiversityMonitor, Callback):  # type: ignore[misc]
    """As :class:`lightning_graddiv.GradientDiversityMonitor`."""


class AdaptiveBatchSize(lightning_graddiv.AdaptiveBatchSize, GradientDiversityMonitor):  # type: ignore[misc]
    """As :class:`lightning_graddiv.AdaptiveBatchSize`."""


class BatchSizeBoundFinder(lightning_graddiv.BatchSizeBoundFinder, Callback):  # type: ignore[misc]
    """As :class:`lightning_graddiv.BatchSizeBoundFinder`."""


class DifferentialDiversityMonitor(lightning_graddiv.DifferentialDiversityMonitor, Callback):  # type: ignore[misc]
    """As :class:`lightning_graddiv.DifferentialDiversityMonitor`."""


class DropConnect(lightning_graddiv.DropConnect, Callback):  # type: ignore[misc]
    """As :class:`lightning_graddiv.DropConnect`."""


class GradientQuantization(lightning_graddiv.GradientQuantization, Callback):  # type: ignore[misc]
    """As :class:`lightning_graddiv.GradientQuantization`."""


class LangevinNoise(lightning_graddiv.LangevinNoise, Callback):  # type: ignore[misc]
    """As :class:`lightning_graddiv.LangevinNoise`."""
