"""DropConnect: random entries of gradients are dropped, of each example or of each worker's micro-batch."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_graddiv.batching.loops import single_train_loader
from lightning_graddiv.batching.sampler import drawn_batch_size
from lightning_graddiv.callbacks.checks import require, require_automatic_optimization
from lightning_graddiv.callbacks.mechanism import Mechanism, gradient_scale, refuse_several_gradients, require_dense
from lightning_graddiv.callbacks.replay import SeenStep
from lightning_graddiv.callbacks.tap import TrainingStepTap
from lightning_graddiv.distributed import summed_over_ranks, world_size
from lightning_graddiv.errors import FunctionalEngineError, MeasurementError
from lightning_graddiv.per_example.losses import StepLoss, measuring
from lightning_graddiv.per_example.materialised import ExampleRows, chunks
from lightning_graddiv.per_example.norms import sum_of_squares
from lightning_graddiv.per_example.select import is_check_due, with_frozen_copied
from lightning_graddiv.per_example.separability import check_engine, check_separable
from lightning_graddiv.streams import seed_of, stream


class DropConnect(Mechanism):
    """Drop each entry of a gradient with probability p (section 6 of the paper).

    ``per="worker"``: one mask for the gradient of each micro-batch on each process, drawn before the processes reduce.
    It costs a copy of the gradients and, under DDP, a reduction of the masked gradients beside DDP's own. Examples that
    share a mask share its noise, so that the noise is that of ``world x accumulation`` masks and not of B: the larger
    the micro-batch, the more.

    ``per="example"``: one mask for each example's gradient, as in the paper. For that, per-example gradients are
    materialised at the step's weights, which costs a forward and backward pass of its own by ``torch.func`` (a few
    examples at a time, in memory) or a loop, in the parameters' precision without autocast and with dropout masks of
    its own; the gradient of the ordinary backward pass is replaced, and the loss that is logged is that of the ordinary
    forward pass. Losses that mix or weigh their examples are refused.

    Either way the masked gradient takes the place of ``.grad`` in ``on_before_optimizer_step``, before clipping; what
    other hooks did to ``.grad`` before is lost. As in the paper, what is kept is not scaled: the mean update is
    ``1 - p`` times as long. ``rescale=True`` divides by ``1 - p`` and is unbiased.

    Args:
        probability: ``p``, at least 0 and below 1.
        per: ``"worker"`` or ``"example"``.
        rescale: divide what is kept by ``1 - p``.
        seed: of the masks, others for each process and micro-batch.

    Raises:
        ValueError: an argument out of range.
        MisconfigurationException: at the start of ``fit``, for manual optimization, strategies other than a single
            device and DDP, or :class:`.GradientQuantization` alongside; in training, for sparse gradients, and per
            example for a loss that is not a mean or sum over examples.

    Example::

        trainer = Trainer(callbacks=[DropConnect(0.4)])
    """

    def __init__(
        self,
        probability: float,
        *,
        per: Literal["worker", "example"] = "worker",
        rescale: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        require(0 <= probability < 1, "probability", "at least 0 and below 1", probability)
        require(per in ("worker", "example"), "per", "'worker' or 'example'", per)
        self.probability = probability
        self.per = per
        self.rescale = rescale

    @override
    def _forget(self) -> None:
        super()._forget()
        self._parameters: list[tuple[str, nn.Parameter]] = []
        self._masked: dict[int, Tensor] = {}
        self._sq_norm = 0.0
        self._is_in_backward = False
        self._tap: TrainingStepTap | None = None
        self._rows = ExampleRows(type(self).__name__)
        self._measured = 0
        self._is_trusted = False
        self._is_sum = False

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        require_automatic_optimization(pl_module, type(self).__name__)
        refuse_several_gradients(trainer)
        self._parameters = [(name, p) for name, p in pl_module.named_parameters() if p.requires_grad]
        if self.per == "worker":
            for index, (_, parameter) in enumerate(self._parameters):
                self._undo.append(parameter.register_hook(self._mask_of(trainer, index)).remove)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.per == "example":
            self._disarm()
            self._tap = TrainingStepTap(trainer.strategy, lambda args: self._mask_examples(trainer, pl_module, args))

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._is_in_backward = True

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._is_in_backward = False
        self._draws += 1

    @override
    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        backward, applied = gradient_scale(trainer, optimizer)
        held = backward if self.per == "worker" else 1.0
        present = [(i, p.grad) for i, (_, p) in enumerate(self._parameters) if p.grad is not None]
        masked = [self._masked[i] if i in self._masked else torch.zeros_like(gradient) for i, gradient in present]
        for (_, gradient), own in zip(present, _mean_over_ranks(masked), strict=True):
            gradient.copy_(own.mul_(applied / held))
        if self._is_monitored(trainer):
            (sq_norm,) = summed_over_ranks([self._sq_norm / held**2], trainer.strategy.root_device)
            p = self.probability
            scale = 1.0 if self.rescale else 1 - p
            self._note(trainer, scale, scale**2 * p / (1 - p) * sq_norm / world_size() ** 2)
        self._begin_step()

    @override
    def _begin_step(self) -> None:
        self._masked, self._sq_norm = {}, 0.0

    def _mask_of(self, trainer: Trainer, index: int) -> Callable[[Tensor], None]:
        """Return a hook that masks the gradient of one parameter, as a backward pass of training gives it."""

        def hook(gradient: Tensor) -> None:
            """Take the gradient down, masked."""
            if not self._is_in_backward:  # torch.autograd.grad calls it too
                return
            require_dense(gradient, type(self).__name__, self._parameters[index][0])
            generator = stream(self.seed, self._draws, trainer.global_rank, index, device=gradient.device)
            self._keep(index, gradient.detach()[None], generator, weight=1.0)
            if self._is_monitored(trainer):
                self._sq_norm += float(sum_of_squares([gradient.detach()]))

        return hook

    def _keep(self, index: int, rows: Tensor, generator: torch.Generator, *, weight: float) -> None:
        """Add up rows of gradients, each with a mask of its own."""
        draws = torch.rand(rows.shape, generator=generator, device=rows.device)
        factor = weight / (1 - self.probability) if self.rescale else weight
        masked = (rows * (draws >= self.probability)).sum(0).mul_(factor)  # times 0: NaN stays NaN
        self._masked[index] = self._masked[index].add_(masked) if index in self._masked else masked

    def _mask_examples(self, trainer: Trainer, module: LightningModule, args: tuple[Any, ...]) -> None:
        """Mask the examples of a micro-batch one by one, at the weights that its training step will see."""
        at_most = drawn_batch_size(single_train_loader(trainer))
        seed = seed_of(self.seed, self._draws, trainer.global_rank)
        seen = SeenStep(module, trainer.optimizers[0], args, at_most, seed)
        try:
            loss, total = seen.loss(), seen.count()
            self._check_if_due(loss, args[0], total, seed)
            with measuring(module, seed):
                self._add_examples(trainer, loss, args[0], total)
        except MeasurementError as error:
            if not error.lasting:  # a loss that is not finite: NaN, as the ordinary gradient would be
                self._masked = {i: torch.full_like(p, math.nan) for i, (_, p) in enumerate(self._parameters)}
                return
            raise MisconfigurationException(
                f"DropConnect cannot take the batch apart into examples: {error} `per='worker'` masks whole "
                "micro-batches instead."
            ) from error

    def _check_if_due(self, loss: StepLoss, batch: Any, total: int, seed: int) -> None:
        """Prove that the batch's gradient is a mean or a sum of its examples' gradients, and the engine right."""
        measured, self._measured = self._measured, self._measured + 1
        if total < 2 or (self._is_trusted and not is_check_due(measured)):
            return
        self._is_trusted = False
        with measuring(loss.module, seed):
            sample = with_frozen_copied(loss, lambda: check_separable(loss, batch, total, seed=measured))
            share = float(sample.weights[0])
            if min(abs(share * sample.total - 1), abs(share - 1)) > 1e-2:
                raise MeasurementError(
                    f"an example's gradient enters that of {sample.total} with the weight {share:.4g}, which makes "
                    "neither a mean nor a sum.",
                    lasting=True,
                )
            self._is_sum = abs(share - 1) < abs(share * sample.total - 1)
            try:
                check_engine(self._rows.engine, loss, sample)
            except FunctionalEngineError as error:
                self._rows.fall_back(loss, error)
        self._is_trusted = True

    def _add_examples(self, trainer: Trainer, loss: StepLoss, batch: Any, total: int) -> None:
        weight = (1.0 if self._is_sum else 1 / total) / trainer.accumulate_grad_batches
        index_of = {id(parameter): index for index, (_, parameter) in enumerate(self._parameters)}
        values = [parameter.detach() for parameter in loss.parameters]
        generator = stream(self.seed, self._draws, trainer.global_rank, device=values[0].device)
        for examples, part in chunks(loss, batch, total):
            rows = self._rows(loss, values, part, len(examples))
            for parameter, row in zip(loss.parameters, rows, strict=True):
                self._keep(index_of[id(parameter)], row, generator, weight=weight)
            self._sq_norm += weight**2 * float(sum_of_squares(rows))

    def _disarm(self) -> None:
        if self._tap is not None:
            self._tap.remove()
            self._tap = None

    @override
    def _let_go(self) -> None:
        super()._let_go()
        self._disarm()
        self._begin_step()
        self._is_in_backward, self._parameters = False, []

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_masked": {}, "_parameters": [], "_tap": None}


def _mean_over_ranks(tensors: list[Tensor]) -> list[Tensor]:
    """Average over processes, at once; the reduction gives every process the same bits."""
    world = world_size()
    if world == 1 or not tensors:
        return tensors
    means = list(tensors)
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
        chosen = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
        flat = torch.cat([tensors[i].flatten() for i in chosen]).div_(world)
        dist.all_reduce(flat)
        for i, part in zip(chosen, flat.split([tensors[i].numel() for i in chosen]), strict=True):
            means[i] = part.view(tensors[i].shape)
    return means
