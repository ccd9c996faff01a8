"""What the diversity-inducing mechanisms share: where they act, their random numbers, what they tell the monitor."""

import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_graddiv.batching.loops import single_train_loader
from lightning_graddiv.batching.sampler import drawn_examples
from lightning_graddiv.callbacks.checks import require
from lightning_graddiv.callbacks.monitor import GradientDiversityMonitor
from lightning_graddiv.distributed import summed_over_ranks
from lightning_graddiv.errors import MeasurementError
from lightning_graddiv.per_example.batches import count_examples
from lightning_graddiv.theory import MechanismEffect


class Mechanism(Callback):
    """Base of the callbacks that put noise into gradients.

    Monitors measure a step's gradient before any mechanism changes it, wherever they stand in the list of callbacks,
    and training is bit-identical with a monitor and without.

    Args:
        seed: of the mechanism's random numbers, which it shares with nothing else.

    Attributes:
        effect: what it did to the latest step's gradient, the same on every process; None where no monitor asks, or the
            examples cannot be counted.
        acts_at_update: whether it acts after clipping, right before the update.
    """

    acts_at_update = False

    def __init__(self, seed: int) -> None:
        super().__init__()
        require(isinstance(seed, int) and seed >= 0, "seed", "an integer of at least 0", seed)
        self.seed = seed
        self._forget()

    def _forget(self) -> None:
        """Begin a new training."""
        self.effect: MechanismEffect | None = None
        self._draws = 0
        self._sq_weights: float | None = 0.0
        self._undo: list[Callable[[], None]] = []

    @property
    @override
    def state_key(self) -> str:
        """One of each kind acts: a run goes on with its random numbers whatever its other arguments are then."""
        return type(self).__qualname__

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        require_whole_gradients(trainer, type(self).__name__)
        _move_behind_monitors(trainer)
        if trainer.global_step == 0:  # a new training; a checkpoint's state is loaded after this
            self._forget()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Add up ``sum a_i^2`` of this process: its ``m`` examples enter a mean loss by ``a_i = 1 / (k m)`` each."""
        divisor = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
        if batch_idx % divisor == 0:
            self._sq_weights = 0.0
            self._begin_step()
        examples = _count(trainer, batch, batch_idx)
        if self._sq_weights is not None:
            self._sq_weights = None if examples is None else self._sq_weights + 1 / (divisor**2 * examples)

    def _begin_step(self) -> None:
        """Let go of what an optimizer step that was never taken has left."""

    def _summed_sq_weights(self, trainer: Trainer) -> float | None:
        """Return ``sum a_i^2`` of this step's examples on all processes; every process must call this."""
        known = -math.inf if self._sq_weights is None else self._sq_weights
        (total,) = summed_over_ranks([known], trainer.strategy.root_device)
        return total / int(trainer.world_size) ** 2 if total > 0 else None

    def _note(self, trainer: Trainer, scale: float, variance: float) -> None:
        """Note the effect on this step's gradient, for monitors; ``variance`` is that over all processes."""
        self.effect = None
        if self._is_monitored(trainer):
            weights = self._summed_sq_weights(trainer)
            self.effect = None if weights is None else MechanismEffect(scale, variance, weights)

    def _is_monitored(self, trainer: Trainer) -> bool:
        return bool(self._monitors(trainer))

    def _monitors(self, trainer: Any) -> list[GradientDiversityMonitor]:
        return [callback for callback in trainer.callbacks if isinstance(callback, GradientDiversityMonitor)]

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._let_go()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._let_go()

    def _let_go(self) -> None:
        """Remove every hook; may be called more than once."""
        for undo in self._undo:
            undo()
        self._undo = []

    @override
    def state_dict(self) -> dict[str, Any]:
        """Random numbers depend on the seed and this count only: see :mod:`lightning_graddiv.streams`."""
        return {"draws": self._draws}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            self._draws = state_dict["draws"]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running trainer; Lightning puts ``log`` and ``log_dict`` on every callback."""
        kept = {name: value for name, value in self.__dict__.items() if name not in {"log", "log_dict"}}
        return {**kept, "_undo": []}


def gradient_scale(trainer: Any, optimizer: Any) -> tuple[float, float]:
    """Return the AMP scale of gradients in the backward pass, and of those that the optimizer is about to apply."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None:
        return 1.0, 1.0
    scale = float(scaler.get_scale())
    unscales_itself = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
    return scale, scale if unscales_itself else 1.0


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters that the optimizer holds, in its order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def require_dense(gradient: Tensor, callback: str, name: str) -> None:
    """Refuse a sparse gradient.

    Raises:
        MisconfigurationException: it is sparse.
    """
    if gradient.layout != torch.strided:
        raise MisconfigurationException(
            f"{callback} acts on every entry of a gradient, but that of `{name}` is sparse: use `sparse=False` in its "
            "embedding."
        )


def refuse_several_gradients(trainer: Any) -> None:
    """Refuse two mechanisms that would each put a gradient of its own in the place of the other's.

    Raises:
        MisconfigurationException: there are two.
    """
    names = {type(callback).__name__ for callback in trainer.callbacks}
    if {"DropConnect", "GradientQuantization"} <= names:
        raise MisconfigurationException(
            "DropConnect and GradientQuantization each put a gradient of their own in the place of the workers' mean: "
            "use one of them. LangevinNoise goes with either."
        )


def _count(trainer: Any, batch: Any, batch_idx: int) -> int | None:
    """Return the number of examples of this process's micro-batch; None where nothing tells."""
    examples = drawn_examples(single_train_loader(trainer), batch_idx)
    if examples is not None:
        return examples
    try:
        return count_examples(batch)
    except MeasurementError:
        return None


def require_whole_gradients(trainer: Any, callback: str) -> None:
    """Refuse strategies whose processes hold parts of a gradient.

    Raises:
        MisconfigurationException: the strategy is neither a single device nor DDP.
    """
    names = {base.__name__ for base in type(trainer.strategy).__mro__}
    if not names & {"SingleDeviceStrategy", "DDPStrategy"} or any("DeepSpeed" in n or "XLA" in n for n in names):
        raise MisconfigurationException(
            f"{callback} supports a single device and DDP, but the strategy is `{type(trainer.strategy).__name__}`, "
            "whose processes do not hold whole gradients."
        )


def _move_behind_monitors(trainer: Any) -> None:
    """Put every mechanism behind the last monitor, so that monitors see gradients as the backward passes gave them.

    A new list, because Lightning is on its way through the present one.
    """
    callbacks = trainer.callbacks
    last = max((i for i, c in enumerate(callbacks) if isinstance(c, GradientDiversityMonitor)), default=-1)
    moved = [callback for callback in callbacks[: last + 1] if isinstance(callback, Mechanism)]
    if moved:
        others = [callback for callback in callbacks[: last + 1] if not isinstance(callback, Mechanism)]
        trainer.callbacks = [*others, *moved, *callbacks[last + 1 :]]
