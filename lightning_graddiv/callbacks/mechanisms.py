"""Diversity-inducing mechanisms as callbacks: random noise in the gradients, in one process and under DDP."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_graddiv.callbacks.checks import require
from lightning_graddiv.callbacks.drop_connect import DropConnect
from lightning_graddiv.callbacks.exchange import WorkerExchange, is_distributed
from lightning_graddiv.callbacks.mechanism import (
    Mechanism,
    gradient_scale,
    parameters_of,
    refuse_several_gradients,
    require_dense,
)
from lightning_graddiv.callbacks.quantized import quantized_mean
from lightning_graddiv.per_example.norms import real_view
from lightning_graddiv.streams import stream
from lightning_graddiv.theory import MechanismEffect

__all__ = ["DropConnect", "GradientQuantization", "LangevinNoise"]


class LangevinNoise(Mechanism):
    """Add Gaussian noise to the gradient, as stochastic gradient Langevin dynamics does (section 6 of the paper).

    The paper adds ``N(0, sigma^2 I)`` to each example's gradient. On the mean gradient of B examples that is one draw
    of ``N(0, sigma^2 / B)`` for each entry, which is what is added here, once an optimizer step: ``B`` is the number of
    examples of that step over all micro-batches and processes (``1 / sum a_i^2`` where they weigh differently, such as
    in a last batch), so that it follows a batch that grows. It supposes a loss that averages over its batch.

    The noise is added after clipping, right before the update: clipping neither sees nor shrinks it. Under mixed
    precision it is added to unscaled gradients, and steps that the scaler skips get none. Every process adds the same
    numbers, so that weights stay equal bit for bit. Unbiased.

    Args:
        sigma: standard deviation of the noise in each entry of an example's gradient, at least 0; may be set anew
            between steps.
        seed: of the noise.

    Raises:
        ValueError: an argument out of range.
        MisconfigurationException: at the start of ``fit``, for strategies other than a single device and DDP; in
            training, for sparse gradients or a batch whose examples cannot be counted.

    Example::

        trainer = Trainer(callbacks=[LangevinNoise(sigma=0.01)])
    """

    acts_at_update = True

    def __init__(self, sigma: float, *, seed: int = 0) -> None:
        super().__init__(seed)
        require(sigma >= 0, "sigma", "at least 0", sigma)
        self.sigma = sigma

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        for optimizer in trainer.optimizers:
            self._undo.append(_before_update(optimizer, lambda opt: self._add(trainer, opt, names)))

    @torch.no_grad()
    def _add(self, trainer: Trainer, optimizer: Optimizer, names: dict[int, str]) -> None:
        sq_weights = self._summed_sq_weights(trainer)
        if sq_weights is None:
            raise MisconfigurationException(
                "LangevinNoise adds sigma^2 / B and must know B, but the batch does not tell how many examples it "
                "holds: use a loader with a `batch_size`, or collate into tensors with a row per example."
            )
        std = self.sigma * sq_weights**0.5
        scale = gradient_scale(trainer, optimizer)[1]
        generators: dict[torch.device, torch.Generator] = {}
        entries = 0
        for parameter in parameters_of(optimizer):
            if parameter.grad is None:
                continue
            require_dense(parameter.grad, type(self).__name__, names.get(id(parameter), "a parameter"))
            gradient = real_view(parameter.grad)
            if gradient.device not in generators:
                generators[gradient.device] = stream(self.seed, self._draws, device=gradient.device)
            noise = torch.empty_like(gradient).normal_(generator=generators[gradient.device])
            gradient.add_(noise, alpha=std * scale)
            entries += gradient.numel()
        self._draws += 1
        self.effect = MechanismEffect(1.0, entries * std**2, sq_weights)


class GradientQuantization(Mechanism):
    """Quantise each worker's gradient before the workers average theirs (section 6 of the paper).

    ``[Q(v)]_l = |v|_2 sign(v_l) eta_l`` with ``P(eta_l = 1) = |v_l| / |v|_2``: one norm, and the signs of about
    ``sqrt(d)`` entries out of d. Unbiased. ``v`` is the whole gradient of one worker's share of an optimizer step, with
    all its accumulated micro-batches.

    Under DDP a communication hook sends those messages instead of reducing gradients, and every process decodes the
    same tensor, bit for bit; DDP then sends once at the end of the last backward pass, and does not overlap. In one
    process the gradient is quantised in ``on_before_optimizer_step``. Both before clipping. The scale of mixed
    precision passes through; infinities become NaN on every process, and the scaler skips the step.

    On steps that a :class:`.GradientDiversityMonitor` measures, DDP reduces the plain gradient as well, for the
    monitor.

    Args:
        seed: of the random numbers, others for each process and step.

    Raises:
        ValueError: an argument out of range.
        MisconfigurationException: at the start of ``fit``, for strategies other than a single device and DDP, DDP with
            a communication hook of its own, or :class:`DropConnect` alongside; in training, for sparse gradients.

    Example::

        trainer = Trainer(strategy="ddp", devices=2, callbacks=[GradientQuantization()])
    """

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__(seed)
        self._exchange: WorkerExchange | None = None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_several_gradients(trainer)
        self._exchange = None
        if is_distributed(trainer.strategy):
            self._exchange = WorkerExchange(
                [p for p in pl_module.parameters() if p.requires_grad],
                lambda gradients: self._quantized(trainer, gradients),
                lambda: any(monitor.watches_gradients for monitor in self._monitors(trainer)),
                type(self).__name__,
            )
            self._exchange.attach(trainer.strategy)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        present = [(id(p), p.grad) for p in parameters_of(optimizer) if p.grad is not None]
        if self._exchange is not None:
            backward, applied = gradient_scale(trainer, optimizer)
            replacements, self._exchange.replacements = self._exchange.replacements, {}
            for key, gradient in present:
                if key in replacements:
                    gradient.copy_(replacements[key].mul_(applied / backward))
        elif present:
            names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
            for key, gradient in present:
                require_dense(gradient, type(self).__name__, names.get(key, "a parameter"))
            quantized = self._quantized(trainer, [gradient for _, gradient in present])
            for (_, gradient), new in zip(present, quantized, strict=True):
                gradient.copy_(new)

    def _quantized(self, trainer: Trainer, gradients: list[Tensor]) -> list[Tensor]:
        mean = quantized_mean(gradients, self.seed, self._draws, trainer.global_rank)
        self._draws += 1
        backward, applied = gradient_scale(trainer, trainer.optimizers[0])
        scale = applied if self._exchange is None else backward
        self._note(trainer, 1.0, mean.variance / scale**2)
        return mean.gradients

    @override
    def _let_go(self) -> None:
        super()._let_go()
        self._exchange = None  # the hook goes with DDP's wrapper, which the strategy drops

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_exchange": None}


def _before_update(optimizer: Optimizer, act: Callable[[Optimizer], None]) -> Callable[[], None]:
    """Call a function between the closure, in which Lightning runs the training step and clips, and the update.

    Returns:
        What takes it back.
    """

    def before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Act now where the gradients are there, or once the step's closure has made them."""
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # the first is the optimizer
        if closure is None:
            act(optimizer)
            return None

        def closure_then_act() -> Any:
            """Act between the closure and the step."""
            loss = closure()
            act(optimizer)
            return loss

        if len(args) > 1:
            return (args[0], closure_then_act, *args[2:]), kwargs
        return args, {**kwargs, "closure": closure_then_act}

    return optimizer.register_step_pre_hook(before_step).remove
