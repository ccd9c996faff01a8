"""The learning rate that belongs to a batch size."""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor
from torch.optim import ASGD, LBFGS, SGD, Optimizer

from lightning_graddiv.theory import gain

LearningRateRule = Literal["auto", "gain", "linear", "sqrt"] | None
RULES = ("auto", "gain", "linear", "sqrt", None)


def learning_rate_factor(
    rule: LearningRateRule, *, batch_size: int, base_batch_size: int, bound: float, optimizer: Optimizer
) -> float:
    """Return the factor on the learning rate that was chosen for ``base_batch_size``.

    ========  ==========================================================  =========================================
    rule      factor                                                      source
    ========  ==========================================================  =========================================
    gain      gain(B) / gain(B0), gain(B) = B B_S / (B_S + B - 1)         derived from Lemma 1; linear while B << B_S
    linear    B / B0                                                      theorems 2-5, within the bound
    sqrt      sqrt(B / B0)                                                usual for Adam
    auto      gain for plain SGD, its square root for any other           derived
    None      1
    ========  ==========================================================  =========================================

    Args:
        rule: which rule.
        batch_size: effective batch size B.
        base_batch_size: the effective batch size B0 that training started with.
        bound: B_S, at least 1; infinite makes the gain linear.
        optimizer: decides what ``auto`` means.
    """
    if rule is None:
        return 1.0
    if rule in ("linear", "sqrt"):
        ratio = batch_size / base_batch_size
        return ratio if rule == "linear" else ratio**0.5
    ratio = gain(batch_size, bound) / gain(base_batch_size, bound)
    return ratio if rule == "gain" or isinstance(optimizer, (SGD, ASGD)) else ratio**0.5


def largest_learning_rate(optimizer: Optimizer) -> float:
    """Return the largest learning rate of any parameter group; 0 where the optimizer sets its own."""
    rates = [float(group["lr"]) for group in optimizer.param_groups if group.get("lr") is not None]
    return max(rates, default=0.0)


class LearningRateScale:
    """Multiplies an optimizer's learning rates while it steps, and only then, so that no scheduler sees the factor.

    Attributes:
        factor: the multiplier; 1 leaves the optimizer alone.
    """

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor
        self._groups: list[tuple[dict[str, Any], float | Tensor]] = []
        self._undo: list[Callable[[], None]] = []

    def attach(self, optimizer: Optimizer) -> None:
        """Scale this optimizer's steps from now on."""
        before = optimizer.register_step_pre_hook(self._before_step)
        after = optimizer.register_step_post_hook(lambda *_: self._restore())
        self._undo = [before.remove, after.remove]

    def detach(self) -> None:
        """Leave the optimizer, with its own learning rates; may be called more than once, also after a failed step."""
        self._restore()
        for undo in self._undo:
            undo()
        self._undo = []

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Scale after the closure, in which Lightning runs the whole training step and the hooks around it."""
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # the first is the optimizer
        if closure is None or isinstance(optimizer, LBFGS):  # which reads its rate before the closure
            self._scale(optimizer)
            return None

        def closure_then_scale() -> Any:
            self._restore()
            loss = closure()
            self._scale(optimizer)
            return loss

        if len(args) > 1:
            return (args[0], closure_then_scale, *args[2:]), kwargs
        return args, {**kwargs, "closure": closure_then_scale}

    def _scale(self, optimizer: Optimizer) -> None:
        if self.factor == 1.0 or self._groups:
            return
        self._groups = [(group, group["lr"]) for group in optimizer.param_groups if group.get("lr") is not None]
        for group, learning_rate in self._groups:
            group["lr"] = learning_rate * self.factor

    def _restore(self) -> None:
        for group, learning_rate in self._groups:
            group["lr"] = learning_rate
        self._groups = []

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are not attached to any optimizer."""
        return {"factor": self.factor, "_groups": [], "_undo": []}
