"""Who measures the next step: the engines in their order, armed for one optimizer step at a time."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_graddiv.batching.loops import single_train_loader
from lightning_graddiv.batching.sampler import drawn_batch_size, drawn_examples
from lightning_graddiv.callbacks.eager import ForcedEager
from lightning_graddiv.callbacks.outcome import (
    MIN_COVERAGE,
    AppliedGroups,
    Outcome,
    ghost_outcome,
    group_outcome,
    groups_applied,
)
from lightning_graddiv.callbacks.replay import SeenStep, regrouped, replayed, would_regroup
from lightning_graddiv.callbacks.stopwatch import Stopwatch
from lightning_graddiv.callbacks.tap import TrainingStepTap
from lightning_graddiv.distributed import smallest_over_ranks
from lightning_graddiv.errors import CouplingError, MeasurementError
from lightning_graddiv.per_example.batches import count_examples
from lightning_graddiv.per_example.ghost import is_sharded, reshard
from lightning_graddiv.per_example.ghost_engine import GhostEngine
from lightning_graddiv.per_example.in_band import GhostStep, GroupStep, InBandStep
from lightning_graddiv.per_example.select import PerExampleEngine

_ORDER = {
    "auto": ("ghost", "replay", "microbatch"),
    "ghost": ("ghost",),
    "functional": ("replay",),
    "loop": ("replay",),
    "microbatch": ("microbatch",),
}

_SAID = {
    "replay": "the engines `functional` and `loop`, which run the step again on single examples; `max_examples` limits "
    "their cost",
    "microbatch": "the engine `microbatch`, which compares the gradients of whole micro-batches, of processes, of "
    "groups of a micro-batch, or of consecutive steps",
}


_MOST_SURPRISES = 3
"""Measurements in a row in which a step did other than was proven right before it."""

_LEARNT = ("_attempts", "_successes", "_basis", "_couples_ranks", "_regroups", "_uncovered_in_a_row")

_NOTHING_COVERED = MeasurementError("no layer with a rule holds its parameters.", lasting=True)


class StepMeasurer:
    """Measures optimizer steps, each with the first engine in the order that still can.

    In-band engines watch all micro-batches of the step; those that run it again, its first one.

    Args:
        engine: see :class:`.GradientDiversityMonitor`.
        max_examples: of a micro-batch, for engines that run the step again.
        callback: whose name is said in warnings.
    """

    def __init__(self, engine: str, max_examples: int | None, callback: str) -> None:
        self._engines = list(_ORDER[engine])
        self._replay = PerExampleEngine(engine if engine in {"functional", "loop"} else "auto", max_examples)
        self._ghost = GhostEngine()
        self._callback = callback
        self._attempts = 0
        self._has_said_what = False
        self._couples_ranks = False
        self._regroups = False
        self._basis = 0
        self._successes = 0
        self._uncovered_in_a_row = 0
        self._reset()

    def _reset(self) -> None:
        self._on_outcome: Callable[[Outcome], None] | None = None
        self._tap: TrainingStepTap | None = None
        self._step: InBandStep | None = None
        self._parameters: list[nn.Parameter] = []
        self._earlier: list[AppliedGroups] = []
        self._stopwatch = Stopwatch()
        self._eager = ForcedEager()
        self._error: Exception | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running step."""
        idle = StepMeasurer.__new__(StepMeasurer)
        idle._reset()
        return {**self.__dict__, **idle.__dict__}

    def state_dict(self) -> dict[str, Any]:
        """Return what has been learnt of the model, and what the seeds are made of."""
        learnt = {name: getattr(self, name) for name in _LEARNT}
        return {**learnt, "engines": list(self._engines), "checked": [self._replay.measured, self._ghost.measured]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; the choice of engines only if these are among those asked for."""
        if set(state["engines"]) <= set(self._engines):
            self._engines = list(state["engines"])
        for name in _LEARNT:
            setattr(self, name, state[name])
        self._replay.measured, self._ghost.measured = state["checked"]

    @property
    def engine(self) -> str:
        """The engine in use: ``ghost``, ``replay`` (functional or loop) or ``microbatch``."""
        return self._engines[0]

    @property
    def is_open(self) -> bool:
        """Whether the measurement of a step has begun and not ended."""
        return self._on_outcome is not None

    @property
    def spans_steps(self) -> bool:
        """Whether it waits for the next optimizer step to compare this one with."""
        return bool(self._earlier)

    def open(self, on_outcome: Callable[[Outcome], None], stopwatch: Stopwatch) -> None:
        """Measure the optimizer step that now begins.

        Args:
            on_outcome: called once that is done.
            stopwatch: told what it takes.
        """
        self.close()
        self._on_outcome = on_outcome
        self._stopwatch = stopwatch

    def micro_batch(self, trainer: Any, module: Any, batch_idx: int) -> None:
        """Watch the micro-batch that is about to be trained on."""
        self._disarm()
        self._eager.start()

        def look(args: tuple[Any, ...]) -> None:
            """Get ready for the step, which is about to be given these."""
            self._tap = None
            with self._stopwatch.measuring(trainer.strategy.root_device):
                self._on_step(trainer, module, args, batch_idx)

        self._tap = TrainingStepTap(trainer.strategy, look)

    def before_backward(self, trainer: Any, loss: Tensor) -> None:
        """Look at a loss that is about to be differentiated."""
        if self._step is None or self._error is not None:
            return
        with self._stopwatch.measuring(trainer.strategy.root_device):
            try:
                self._step.look_at(loss)
            except Exception as error:  # measuring must never end a training run
                self._error = error

    def after_backward(self, trainer: Any) -> None:
        """Take in what a backward pass showed."""
        if self._step is None or self._error is not None:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        with self._stopwatch.measuring(trainer.strategy.root_device):
            try:
                self._step.backward(1.0 if scaler is None else float(scaler.get_scale()))
            except Exception as error:  # measuring must never end a training run
                self._error = error

    def before_optimizer_step(self, trainer: Any) -> None:
        """End the measurement of a step that was watched, with the gradient that is about to be applied."""
        if self._step is None:
            return
        with self._stopwatch.measuring(trainer.strategy.root_device):
            self._compare(self._step, trainer.world_size, trainer.strategy.root_device)

    def _compare(self, step: InBandStep, world_size: int, device: torch.device) -> None:
        if isinstance(step, GhostStep):
            outcome = ghost_outcome(step, self._parameters, self._error, device)
            if outcome.leaves_out_rest:
                self._leave_out(step, outcome.coverage)
            self._ghost.settle(is_good=outcome.moments is not None and outcome.moments.count >= 2)
            self._uncovered_in_a_row = self._uncovered_in_a_row + 1 if outcome.is_uncovered else 0
            if self._uncovered_in_a_row == _MOST_SURPRISES:
                outcome = replace(outcome, is_lasting=True)
            self._end(outcome)
        elif isinstance(step, GroupStep):
            groups = groups_applied(step, self._parameters, self._error, device, whole=self._couples_ranks)
            step.close()
            if isinstance(groups, Outcome):
                self._end(groups)
            elif not self._earlier and (self._couples_ranks or world_size * len(groups.groups) == 1):
                self._earlier, self._step = [groups], None  # the next step makes the second group
                self._eager.stop()
            else:
                self._end(group_outcome([*self._earlier, groups], device, whole=self._couples_ranks))

    def close(self) -> None:
        """End what is going on and remove every hook; may be called more than once."""
        if not self.is_open:
            return
        self._disarm()
        if self._step is not None:
            self._step.close()
            self._stopwatch.add(self._step.seconds)
        self._eager.stop()
        self._reset()

    def _disarm(self) -> None:
        if self._tap is not None:
            self._tap.remove()
            self._tap = None

    def _end(self, outcome: Outcome, *, may_fall_back: bool = True) -> None:
        on_outcome, may_fall_back = self._on_outcome, may_fall_back and not self._is_sharded()
        self._attempts += 1
        self._successes += outcome.moments is not None
        self.close()
        if outcome.is_lasting and may_fall_back and self._falls_back_to(self._engines[1:], outcome.refusal):
            outcome = replace(outcome, is_retried=True)
        if on_outcome is not None:
            on_outcome(replace(outcome, basis=self._basis))

    def _falls_back_to(self, engines: Sequence[str], reason: Exception | None) -> bool:
        """Go on with the next engine, if there is one, and say so."""
        if not engines:
            return False
        before, self._engines = self.engine, list(engines)
        self._basis += self._successes > 0
        say = rank_zero_info if reason is _NOTHING_COVERED else rank_zero_warn  # that is a choice, not a failure
        say(
            f"{self._callback}: the engine `{before}` cannot measure this model: "
            f"{reason or 'another process says so.'} Falling back to {_SAID[self.engine]}."
        )
        return True

    def _on_step(self, trainer: Any, module: Any, args: tuple[Any, ...], batch_idx: int) -> None:
        """Look at the arguments of a training step that is about to run, at the weights that it will see."""
        if self._error is not None:
            return
        if self._step is None and not self._earlier:
            optimizer = trainer.optimizers[0]
            if any(is_sharded(parameter) for group in optimizer.param_groups for parameter in group["params"]):
                reshard(module)
            self._parameters = _trained(module, optimizer)
            if not self._parameters:
                self._end(Outcome(None, refusal=_no_parameters(module), is_lasting=True), may_fall_back=False)
                return
        if not module.automatic_optimization and "replay" in self._engines:
            self._engines.remove("replay")  # of several backward passes it would run the first only
        if self._step is None and self.engine == "ghost" and not self._is_proven(trainer, module, args):
            return
        if self.engine == "replay":
            self._end(replayed(self._seen(trainer, module, args), self._replay, trainer.strategy.root_device))
            return
        if self._regroups and trainer.world_size * trainer.accumulate_grad_batches == 1:
            self._end(regrouped(self._seen(trainer, module, args)))
            return
        if self._step is None:
            self._step = self._begun(trainer, is_one_pass=module.automatic_optimization)
        try:
            runs_again = isinstance(self._step, GhostStep) and self._step.measures_rest
            loss = self._seen(trainer, module, args).loss() if runs_again else None
            examples = self._count(trainer, args, batch_idx)
            self._step.forward(module, loss, args[0], examples, trainer.accumulate_grad_batches)
        except Exception as error:  # measuring must never end a training run
            self._error = error

    def _begun(self, trainer: Any, *, is_one_pass: bool) -> InBandStep:
        if self.engine == "microbatch":
            return GroupStep(self._parameters, seed=self._attempts)
        is_sharded = self._is_sharded()
        return self._ghost.step(
            self._parameters,
            compares_processes=trainer.world_size > 1 and not is_sharded,
            holds_all=is_one_pass and trainer.world_size * trainer.accumulate_grad_batches == 1 and not is_sharded,
            seed=self._attempts,
            noise_seed=self._noise_seed(trainer),
        )

    def _is_proven(self, trainer: Any, module: Any, args: tuple[Any, ...]) -> bool:
        """Prove on every process what the rules cover, where that is due; tell whether measuring goes on."""
        device = trainer.strategy.root_device
        is_wrapped = trainer.model is not module
        is_due = self._ghost.is_check_due(module, self._parameters, is_wrapped=is_wrapped)
        if smallest_over_ranks([float(not is_due)], device)[0] > 0:  # none of the processes wants to
            return True
        is_whole = self._is_full_enough(trainer, args)
        mask, error = self._proof(trainer, module, args) if is_whole else ([0.0] * len(self._parameters), None)
        is_lasting = isinstance(error, MeasurementError) and error.lasting
        is_apart = not isinstance(error, CouplingError)
        regroups = is_lasting and would_regroup(self._seen(trainer, module, args))
        numbers = [float(flag) for flag in (error is None, not is_lasting, is_apart, regroups, is_whole)] + mask
        agreed = smallest_over_ranks(numbers, device)
        is_good, is_passing, is_apart, regroups, is_whole = (flag > 0 for flag in agreed[:5])
        mask = agreed[5:]
        if not is_whole:  # a last batch proves too little: the next step is due
            is_last = drawn_batch_size(single_train_loader(trainer)) is not None
            refusal = None if is_last else MeasurementError("The batch holds one example: it proves nothing.")
            self._end(Outcome(None, refusal=refusal, is_retried=is_last), may_fall_back=False)
            return False
        self._couples_ranks, self._regroups = not is_apart, regroups
        if is_good and any(mask):
            before = self._ghost.covered
            self._ghost.adopt(mask, module, self._parameters)
            self._basis += bool(before) and before != self._ghost.covered
            self._say_what(module)
            return True
        self._ghost.settle(is_good=False)
        if is_good:
            error = _NOTHING_COVERED
        # What cannot be split into examples for a proof cannot be split for measuring either.
        following = self._engines[1:] if is_good else [name for name in self._engines[1:] if name == "microbatch"]
        if (is_good or not is_passing) and not self._is_sharded() and self._falls_back_to(following, error):
            return True
        self._end(Outcome(None, refusal=error, is_lasting=is_good or not is_passing), may_fall_back=False)
        return False

    def _is_full_enough(self, trainer: Any, args: tuple[Any, ...]) -> bool:
        """Tell whether a batch can prove anything: of one example, rows and sums look alike however they are made."""
        try:
            seen = self._seen(trainer, None, args)
            return seen.count() >= min(2, seen.at_most or 2)
        except MeasurementError:
            return True  # which is refused for better reasons

    def _proof(self, trainer: Any, module: Any, args: tuple[Any, ...]) -> tuple[list[float], Exception | None]:
        nothing = [0.0] * len(self._parameters)
        try:
            if self._is_sharded():
                return self._ghost.assume(module, self._parameters), None
            seen = self._seen(trainer, module, args)
            return self._ghost.check(seen.loss(), args[0], seen.count(), seed=self._attempts), None
        except Exception as error:  # measuring must never end a training run
            return nothing, error

    def _seen(self, trainer: Any, module: Any, args: tuple[Any, ...]) -> SeenStep:
        at_most = drawn_batch_size(single_train_loader(trainer))
        return SeenStep(module, trainer.optimizers[0], args, at_most, self._noise_seed(trainer))

    def _noise_seed(self, trainer: Any) -> int:
        """Return a seed of fresh noise, another on each process: with equal masks, gradients are too much alike."""
        return self._attempts * int(trainer.world_size) + int(trainer.global_rank)

    def _count(self, trainer: Any, args: tuple[Any, ...], batch_idx: int) -> int:
        loader = single_train_loader(trainer)
        if self.engine == "microbatch":  # rows need not be examples: the loader knows better
            drawn = drawn_examples(loader, batch_idx)
            return drawn if drawn is not None else count_examples(args[0])
        return count_examples(args[0], drawn_batch_size(loader))

    def _is_sharded(self) -> bool:
        return any(is_sharded(parameter) for parameter in self._parameters)

    def _leave_out(self, step: GhostStep, coverage: float) -> None:
        self._ghost.leave_out_the_rest()
        if coverage < MIN_COVERAGE:
            return  # said with the fall to the next engine
        rank_zero_warn(
            f"{self._callback}: {len(self._parameters) - len(step.covered)} parameters cannot be measured "
            f"({step.rest_error or 'another process says so'}). The estimate is that of the others, which hold "
            f"{coverage:.1%} of |gradient|^2 (logged as `coverage`)."
        )

    def _say_what(self, module: nn.Module) -> None:
        if self._has_said_what:
            return
        self._has_said_what = True
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        others = [names[id(self._parameters[index])] for index in sorted(self._ghost.misses)]
        rest = f"; the others by running the step again: {', '.join(others)}" if others else ""
        rank_zero_info(
            f"{self._callback}: {len(self._ghost.covered)} of {len(self._parameters)} parameters are measured in the "
            f"training step itself{rest}"
        )


def _no_parameters(module: nn.Module) -> MeasurementError:
    return MeasurementError(
        f"`{type(module).__name__}` has no trainable parameters that the optimizer holds: there is no gradient.",
        lasting=True,
    )


def _trained(module: nn.Module, optimizer: Any) -> list[nn.Parameter]:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [p for p in module.parameters() if p.requires_grad and id(p) in held]
