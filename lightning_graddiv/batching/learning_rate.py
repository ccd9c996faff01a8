"""The learning rate that belongs to a batch size."""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor
from torch.optim import ASGD, LBFGS, SGD, Optimizer

from lightning_graddiv.theory import gain

LearningRateRule = Literal["auto", "gain", "linear", "sqrt"] | None
RULES: tuple[LearningRateRule, ...] = ("auto", "gain", "linear", "sqrt", None)


def learning_rate_factor(
    rule: LearningRateRule, *, batch_size: int, base_batch_size: int, bound: float, optimizer: Optimizer
) -> float:
    """Return the factor on the learning rate that was chosen for ``base_batch_size``.

    ========  ==========================================================  =========================================
    rule      factor                                                      source
    ========  ==========================================================  =========================================
    gain      gain(B) / gain(B0), gain(B) = B B_S / (B_S + B - 1)         derived from Lemma 1; linear while B << B_S
    linear    B / B0                                                      theorems 2-5, while B <= delta B_S + 1
    sqrt      sqrt(B / B0)                                                usual for Adam
    auto      linear for SGD, sqrt for any other                          theorems 2-5; usual for Adam
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
    if rule == "gain":
        return gain(batch_size, bound) / gain(base_batch_size, bound)
    is_linear = rule == "linear" or (rule == "auto" and isinstance(optimizer, (SGD, ASGD)))
    ratio = batch_size / base_batch_size
    return ratio if is_linear else ratio**0.5


def largest_learning_rate(optimizer: Optimizer) -> float:
    """Return the largest learning rate of any parameter group; 0 where the optimizer sets its own."""
    return max((float(rate) for _, rate in _rates(optimizer)), default=0.0)


class LearningRateScale:
    """Multiplies an optimizer's learning rates while it steps, and only then, so that no scheduler sees the factor.

    A parameter group may have a rule of its own under the key ``"scale_lr"``.

    Args:
        rule: of all groups without their own.
        warm_in: optimizer steps over which a new factor is reached, in equal parts; 0 and 1 reach it at once.

    Attributes:
        applied: the factor on the largest learning rate at the latest optimizer step; 1 before the first.
    """

    def __init__(self, rule: LearningRateRule = None, warm_in: int = 0) -> None:
        self.rule = rule
        self.warm_in = warm_in
        self._groups: list[tuple[dict[str, Any], float | Tensor]] = []
        self._undo: list[Callable[[], None]] = []
        self.reset()

    def reset(self) -> None:
        """Begin a new training."""
        self.applied = 1.0
        self._factors: dict[LearningRateRule, float] = dict.fromkeys(RULES, 1.0)
        self._earlier = self._factors
        self._steps = self.warm_in

    @property
    def factor(self) -> float:
        """The factor of the rule once it is reached."""
        return self._factors[self.rule]

    def set(self, **sizes: Any) -> None:
        """Take the factors of another batch size, with the arguments of :func:`learning_rate_factor` but the rule."""
        self._earlier = {rule: self._now(rule) for rule in self._factors}
        self._factors = {rule: learning_rate_factor(rule, **sizes) for rule in RULES}
        self._steps = 0

    def attach(self, optimizer: Optimizer) -> None:
        """Scale this optimizer's steps from now on.

        Raises:
            ValueError: a parameter group has a rule that there is not.
        """
        for group in optimizer.param_groups:
            if group.get("scale_lr") not in RULES:
                raise ValueError(
                    f"Expected `scale_lr` of a parameter group to be one of {RULES} but got {group['scale_lr']!r}"
                )
        before = optimizer.register_step_pre_hook(self._before_step)
        after = optimizer.register_step_post_hook(lambda *_: self._after_step())
        self._undo = [before.remove, after.remove]

    def detach(self) -> None:
        """Leave the optimizer, with its own learning rates; may be called more than once, also after a failed step."""
        self._restore()
        for undo in self._undo:
            undo()
        self._undo = []

    def largest_at(self, optimizer: Optimizer, *, batch_size: int, base_batch_size: int, bound: float) -> float:
        """Return the largest learning rate of any parameter group at another batch size, once that is warmed in."""
        sizes = {"batch_size": batch_size, "base_batch_size": base_batch_size}
        rates = [
            float(rate) * learning_rate_factor(self._rule_of(group), **sizes, bound=bound, optimizer=optimizer)
            for group, rate in _rates(optimizer)
        ]
        return max(rates, default=0.0)

    def largest(self, optimizer: Optimizer) -> float:
        """Return the largest learning rate of any parameter group, as the next step will use it."""
        rates = [float(rate) * self._now(self._rule_of(group)) for group, rate in _rates(optimizer)]
        return max(rates, default=0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return the factors as primitives."""
        return {"applied": self.applied, "factors": self._factors, "earlier": self._earlier, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.applied, self._steps = state["applied"], state["steps"]
        self._factors, self._earlier = dict(state["factors"]), dict(state["earlier"])

    def _now(self, rule: LearningRateRule) -> float:
        """Return a rule's factor at the coming step."""
        share = min(1.0, (self._steps + 1) / self.warm_in) if self.warm_in > 0 else 1.0
        return self._earlier[rule] + share * (self._factors[rule] - self._earlier[rule])

    def _rule_of(self, group: dict[str, Any]) -> LearningRateRule:
        rule: LearningRateRule = group.get("scale_lr", self.rule)
        return rule

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Scale after the closure, in which Lightning runs the whole training step and the hooks around it."""
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # the first is the optimizer
        if closure is None or isinstance(optimizer, LBFGS):  # which reads its rate before the closure
            self._scale(optimizer)
            return None

        def closure_then_scale() -> Any:
            """Let the closure see the rates of the schedule, and the step those that are scaled."""
            self._restore()
            loss = closure()
            self._scale(optimizer)
            return loss

        if len(args) > 1:
            return (args[0], closure_then_scale, *args[2:]), kwargs
        return args, {**kwargs, "closure": closure_then_scale}

    def _scale(self, optimizer: Optimizer) -> None:
        if self._groups or all(factor == 1.0 for factor in (*self._factors.values(), *self._earlier.values())):
            return
        before, after = largest_learning_rate(optimizer), self.largest(optimizer)
        self.applied = after / before if before > 0 else self._now(self.rule)
        self._groups = _rates(optimizer)
        for group, learning_rate in self._groups:
            group["lr"] = learning_rate * self._now(self._rule_of(group))

    def _after_step(self) -> None:
        self._restore()
        self._steps += 1

    def _restore(self) -> None:
        for group, learning_rate in self._groups:
            group["lr"] = learning_rate
        self._groups = []

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are not attached to any optimizer."""
        return {**self.__dict__, "_groups": [], "_undo": []}


def _rates(optimizer: Optimizer) -> list[tuple[dict[str, Any], float | Tensor]]:
    """Return each parameter group with its learning rate, where the optimizer does not set that itself."""
    return [(group, group["lr"]) for group in optimizer.param_groups if group.get("lr") is not None]
