"""One forward and backward pass of a larger micro-batch, on a copy, before training is made to rely on it."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities.memory import garbage_collection_cuda
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_graddiv.batching.draw import draw
from lightning_graddiv.batching.loops import single_train_loader
from lightning_graddiv.batching.sampler import drawn_batch_size
from lightning_graddiv.callbacks.out_of_memory import is_out_of_memory
from lightning_graddiv.errors import MeasurementError
from lightning_graddiv.per_example.batches import repeated
from lightning_graddiv.per_example.ghost import is_sharded
from lightning_graddiv.per_example.guard import writes_refused
from lightning_graddiv.per_example.losses import LossFunction, StepLoss, default_step_args, measuring
from lightning_graddiv.per_example.select import with_frozen_copied
from lightning_graddiv.per_example.shadow import is_lightning_module

_SHARDED = "its parameters are sharded, so that a forward pass needs the other processes"


class Verdict(IntEnum):
    """How a trial ended. Where processes differ, the smallest counts."""

    OUT_OF_MEMORY = 0
    FAILS = 1
    """With this size only: a training step of it would end the training."""
    UNTRIED = 2
    """The step cannot be run again on a copy, or no batch of the size can be made."""
    FITS = 3


@dataclass(frozen=True)
class TrialResult:
    """A verdict, and the reason for it in words: no exception, whose traceback would keep the memory."""

    verdict: Verdict
    reason: str = ""


@dataclass(frozen=True)
class MicroBatchTrial:
    """Tries sizes of a micro-batch on this process alone, by no collective, and leaves no trace of it.

    The training step runs on a shadow (:mod:`lightning_graddiv.per_example.shadow`), under the trainer's precision, and
    compiled code eagerly. Gradients flow to aliases of the parameters: no ``.grad`` is written and no hook of a
    parameter runs, DDP's included.

    Attributes:
        trainer: that trains.
        module: its module, unwrapped.
        batch: the micro-batch that was trained on last, on its device.
        batch_idx: its index.
    """

    trainer: Any
    module: Any
    batch: Any
    batch_idx: int

    def run(self, examples: int, trained: int) -> TrialResult:
        """Run a step of so many examples.

        They are those of the batch at hand, over and over. Where that cannot be repeated, or the step does not take it,
        they are drawn anew from a copy of the data set.

        Args:
            examples: the size to try.
            trained: one that training has had: what fails with it too does not fail for its size.
        """
        if any(is_sharded(parameter) for parameter in self.module.parameters()):
            return TrialResult(Verdict.UNTRIED, _SHARDED)
        results = []
        on_device = _loss_of_batch(self.trainer, default_step_args(self.module, self.batch_idx))
        drawn = _loss_of_drawn(self.trainer, on_device)
        for loss, batch_of in ((on_device, self._repeated), (drawn, self._drawn)):
            results.append(self._compared(partial(self._step, loss, batch_of), examples, trained))
            if results[-1].verdict in (Verdict.OUT_OF_MEMORY, Verdict.FITS):
                return results[-1]
        return min(results, key=lambda result: result.verdict)

    def _compared(self, step: Callable[[int], None], examples: int, trained: int) -> TrialResult:
        result = self._judged(step, examples)
        if result.verdict is Verdict.FAILS and self._judged(step, trained).verdict is not Verdict.FITS:
            return replace(result, verdict=Verdict.UNTRIED)
        return result

    def _judged(self, step: Callable[[int], None], examples: int) -> TrialResult:
        with _memory_given_back(self.trainer.strategy.root_device):
            return _judgement(step, examples)

    def _step(self, loss_of: LossFunction, batch_of: Callable[[int], Any], examples: int) -> None:
        loss = StepLoss(self.module, loss_fn=loss_of)
        with measuring(self.module), writes_refused(self.module):
            batch = batch_of(examples)
            with_frozen_copied(loss, lambda: loss.gradients_at_aliases(batch))

    def _repeated(self, examples: int) -> Any:
        return repeated(self.batch, examples, drawn_batch_size(single_train_loader(self.trainer)))

    def _drawn(self, examples: int) -> Any:
        return draw(single_train_loader(self.trainer), examples)


def _loss_of_batch(trainer: Any, step_args: tuple[Any, ...]) -> LossFunction:
    """Return the loss of a batch on its device, as the trainer computes it but for the other processes."""

    def loss(shadow: nn.Module, batch: Any) -> Tensor:
        """Run ``training_step`` on a copy of the module."""
        _act_alone(shadow, trainer.world_size)
        with trainer.precision_plugin.train_step_context():
            return shadow.training_step(batch, *step_args)  # type: ignore[operator,no-any-return]

    return loss


def _loss_of_drawn(trainer: Any, on_device: LossFunction) -> LossFunction:
    """Return the loss of a batch that comes from the loader."""
    return lambda shadow, batch: on_device(shadow, _moved(trainer, shadow, batch))


def _moved(trainer: Any, shadow: nn.Module, batch: Any) -> Any:
    """Do with a batch what the trainer does between the loader and the step; the module's hooks run on its shadow."""
    batch = trainer.precision_plugin.convert_input(batch)
    arguments: dict[str, tuple[Any, ...]] = {
        "on_before_batch_transfer": (0,),
        "transfer_batch_to_device": (trainer.strategy.root_device, 0),
        "on_after_batch_transfer": (0,),
    }
    for hook, rest in arguments.items():
        owner = trainer.datamodule if is_overridden(hook, trainer.datamodule) else shadow
        batch = getattr(owner, hook)(batch, *rest)
    return batch


def _act_alone(shadow: nn.Module, world_size: int) -> None:
    """Let a shadow do without the other processes what it would do with them, on as much memory."""

    def gather(data: Any, *_: Any, **__: Any) -> Any:
        """Return as much as all processes would send."""
        return data if world_size == 1 else apply_to_collection(data, Tensor, lambda t: torch.stack([t] * world_size))

    for submodule in shadow.modules():
        if is_lightning_module(submodule):
            submodule.__dict__["all_gather"] = gather
        elif type(submodule) is nn.SyncBatchNorm:
            submodule.__class__ = _OwnBatchNorm


class _OwnBatchNorm(nn.SyncBatchNorm):
    """Normalises by the statistics of this process."""

    def forward(self, input: Tensor) -> Tensor:  # as the base class names it
        """Normalise without telling the other processes."""
        return nn.modules.batchnorm._BatchNorm.forward(self, input)


def _judgement(step: Callable[[int], None], examples: int) -> TrialResult:
    try:
        step(examples)
        return TrialResult(Verdict.FITS)
    except Exception as error:  # trying must never end a training run
        said = str(error).strip().partition("\n")[0]
        if is_out_of_memory(error):
            return TrialResult(Verdict.OUT_OF_MEMORY, said)
        if isinstance(error, MeasurementError):
            return TrialResult(Verdict.UNTRIED, said.removesuffix("."))
        return TrialResult(Verdict.FAILS, f"{type(error).__name__}: {said}")


@contextmanager
def _memory_given_back(device: torch.device) -> Iterator[None]:
    """Free what is left of the block in cycles, a shadow's closures for one, and what the allocator keeps."""
    is_ours = gc.get_freeze_count() == 0
    if is_ours:
        gc.freeze()  # all that was there before: to look through it would take longer than the block
    try:
        yield
    finally:
        if device.type == "cuda":
            garbage_collection_cuda()
        else:
            gc.collect()
        if is_ours:
            gc.unfreeze()
