"""Which engine measures a batch, and the checks that it must pass first."""

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from lightning_graddiv.diversity import GradientMoments
from lightning_graddiv.errors import FunctionalEngineError, MeasurementError
from lightning_graddiv.per_example.batches import count_examples, select
from lightning_graddiv.per_example.functional import PerExampleGradients, functional_gradients, loop_gradients
from lightning_graddiv.per_example.guard import FrozenParameterWritten
from lightning_graddiv.per_example.losses import LossFunction, StepLoss, measuring
from lightning_graddiv.per_example.microbatch import group_moments
from lightning_graddiv.per_example.partition import ghost_gradients
from lightning_graddiv.per_example.separability import check_engine, check_separable, check_sum, held_still

Measured = TypeVar("Measured")

Engine = Callable[[StepLoss, Any, int], PerExampleGradients]

ENGINE_NAMES = ("auto", "ghost", "functional", "loop", "microbatch")
"""In the order in which ``auto`` tries them."""

_REPLAYING: dict[str, Engine] = {"functional": functional_gradients, "loop": loop_gradients}


def check_engine_name(engine: str) -> str:
    """Return ``engine`` if it names one.

    Raises:
        ValueError: it does not.
    """
    if engine not in ENGINE_NAMES:
        raise ValueError(f"Expected argument `engine` to be one of {ENGINE_NAMES} but got {engine!r}")
    return engine


class PerExampleEngine:
    """Measures by running the step again on single examples, checking that the first time and ever more rarely.

    ``auto`` is ``functional`` until that fails on this module, then ``loop``, with one warning. The checks run at
    the first measurement, after 1, 2, 4, 8, ... and every 64, because the next batch may be padded where the first was
    not, and again until they pass.

    Args:
        engine: ``"auto"``, ``"functional"`` or ``"loop"``.
        max_examples: measure at most so many examples of a batch, evenly spaced. None: all.

    Attributes:
        measured: measurements so far.
    """

    def __init__(self, engine: str = "auto", max_examples: int | None = None) -> None:
        self._falls_back = engine == "auto"
        self._engine: Engine = functional_gradients if self._falls_back else _REPLAYING[engine]
        self._max_examples = max_examples
        self.measured = 0
        self._is_trusted = False

    def measure(
        self, loss: StepLoss, batch: Any, *, at_most: int | None = None, seed: int | None = None
    ) -> PerExampleGradients:
        """Return the squared norms and the sum of the batch's per-example gradients.

        Args:
            loss: the step's loss.
            batch: a batch of examples.
            at_most: how many examples the loader draws for a full batch, where known.
            seed: of the noise in the step, such as dropout. None: the present random state.

        Raises:
            MeasurementError: the batch cannot be split into examples, or the loss is not finite.
        """
        total = count_examples(batch, at_most)
        if self._max_examples is not None and total > self._max_examples:
            examples = [i * total // self._max_examples for i in range(self._max_examples)]
            batch, total = select(batch, examples, total), self._max_examples
        measured = with_frozen_copied(loss, lambda: self._checked_when_due(loss, batch, total, seed))
        self.measured += 1
        return measured

    def _checked_when_due(self, loss: StepLoss, batch: Any, total: int, seed: int | None) -> PerExampleGradients:
        with measuring(loss.module, seed):
            if total == 1:  # nothing to compare with: the reference itself, at the same cost
                return loop_gradients(loss, batch, total)
            if self._is_trusted and not is_check_due(self.measured):
                return self._measure(loss, batch, total)
            self._is_trusted = False  # until this check has passed
            measured = self._checked(loss, batch, total)
            self._is_trusted = True
        if measured is not None:
            return measured
        with measuring(loss.module, seed):  # the noise is that of a measurement without a check
            return self._measure(loss, batch, total)

    def _checked(self, loss: StepLoss, batch: Any, total: int) -> PerExampleGradients | None:
        """Check, and return what was measured with it; None where that was without the noise of the step."""
        sample = check_separable(loss, batch, total, seed=self.measured)
        if self._engine is functional_gradients:
            try:
                check_engine(functional_gradients, loss, sample)
            except FunctionalEngineError as error:
                self._fall_back(loss, sample.batch, sample.total, error)
        with held_still(loss.module, high=True) as noise:
            measured = self._measure(loss, batch, total)
            check_sum(loss, batch, measured)
        return None if noise.drawn else measured

    def _measure(self, loss: StepLoss, batch: Any, total: int) -> PerExampleGradients:
        try:
            return self._engine(loss, batch, total)
        except FunctionalEngineError as error:
            return self._fall_back(loss, batch, total, error)

    def _fall_back(self, loss: StepLoss, batch: Any, total: int, error: FunctionalEngineError) -> PerExampleGradients:
        name = type(loss.module).__name__
        if not self._falls_back:
            raise MeasurementError(
                f"Engine `functional` cannot measure `{name}`: {error}. Use engine='auto' or 'loop'.",
                lasting=error.lasting,
            ) from error
        measured = loop_gradients(loss, batch, total)  # if the loop fails too, the module is not to blame
        self._engine = loop_gradients
        warnings.warn(
            f"Engine `functional` cannot measure `{name}`: {error}. Falling back to the engine `loop`, which is exact "
            "and takes one forward and backward pass per example; `max_examples` limits its cost.",
            stacklevel=2,
        )
        return measured


def is_check_due(measured: int) -> bool:
    """Tell whether to check again after so many measurements: 0, 1, 2, 4, 8, ... and every 64."""
    return measured & (measured - 1) == 0 or measured % 64 == 0


def with_frozen_copied(loss: StepLoss, measure: Callable[[], Measured]) -> Measured:
    """Measure, and once more on copies of the parameters without gradient where the step writes to those."""
    try:
        return measure()
    except FrozenParameterWritten:
        if loss.copies_frozen:
            raise
        loss.copies_frozen = True
        return measure()


def per_example_squared_norms(
    module: nn.Module, batch: Any, *, loss_fn: LossFunction | None = None, engine: str = "auto"
) -> Tensor:
    """Return the squared norms of the per-example gradients of a module on a batch.

    Entry i is ``|grad of loss(batch of example i alone)|^2`` over all parameters that require a gradient: a gradient of
    the example's own loss, not divided by the batch size, whether the loss averages or sums over the batch. The module,
    its random state and its gradients are left as they were.

    Args:
        module: a LightningModule, or any module together with ``loss_fn``.
        batch: tensors in any nesting of tuples, lists, mappings, dataclasses and named tuples.
        loss_fn: ``loss_fn(module, batch) -> scalar``. None: the module's own ``training_step``.
        engine: ``"ghost"`` (one forward and backward pass, for layers with a rule), ``"functional"`` (``torch.func``),
            ``"loop"`` (plain autograd, the reference), or ``"auto"``: for each parameter the first that can measure it.

    Returns:
        Tensor of shape (n,), float64, on the processor.

    Raises:
        MeasurementError: the batch cannot be split into examples, a loss is not finite, or the engine asked for cannot
            measure every parameter.
        ValueError: an unknown engine, or ``"microbatch"``, which does not look at single examples.
        TypeError: a module that is not a LightningModule, without ``loss_fn``.
    """
    if check_engine_name(engine) == "microbatch":
        raise ValueError(
            "Expected argument `engine` to measure single examples but got 'microbatch', which measures between groups "
            "of them; `measure_moments` takes it"
        )
    return _measure(module, batch, loss_fn, engine).sq_norms


def measure_moments(
    module: nn.Module, batch: Any, *, loss_fn: LossFunction | None = None, engine: str = "auto"
) -> GradientMoments:
    """Return the gradient moments of a module on a batch: one probe for :func:`estimate_diversity`.

    Arguments and errors are those of :func:`per_example_squared_norms`, and ``engine="microbatch"``: moments between
    up to eight groups of examples, for losses that need more than one example.
    """
    if check_engine_name(engine) == "microbatch":
        loss = StepLoss(module, loss_fn=loss_fn)
        return with_frozen_copied(loss, lambda: group_moments(loss, batch, count_examples(batch)))
    return _measure(module, batch, loss_fn, engine).sums().moments()


def _measure(module: nn.Module, batch: Any, loss_fn: LossFunction | None, engine: str) -> PerExampleGradients:
    return measure_loss(StepLoss(module, loss_fn=loss_fn), batch, engine)


def measure_loss(loss: StepLoss, batch: Any, engine: str) -> PerExampleGradients:
    """Measure the examples of a batch, as :func:`per_example_squared_norms` does."""
    total = count_examples(batch)
    if engine in _REPLAYING or total == 1:  # one example is its own reference
        return PerExampleEngine(engine if engine in _REPLAYING else "loop").measure(loss, batch)
    try:
        return with_frozen_copied(loss, lambda: _measure_by_parts(loss, batch, total, engine))
    except MeasurementError:
        if engine == "ghost":
            raise
    return PerExampleEngine().measure(loss, batch)  # which is right, or says why nothing is


def _measure_by_parts(loss: StepLoss, batch: Any, total: int, engine: str) -> PerExampleGradients:
    with measuring(loss.module):
        measured, misses = ghost_gradients(loss, batch, total)
    if not misses:
        return measured
    if engine == "ghost":
        names = {id(p): name for name, p in loss.module.named_parameters()}
        index, reason = min(misses.items())
        raise MeasurementError(
            f"Engine `ghost` cannot measure {len(misses)} of {len(loss.parameters)} parameters of "
            f"`{type(loss.module).__name__}`, the first being `{names[id(loss.parameters[index])]}`: {reason}. Use "
            "engine='auto'.",
            lasting=True,
        )
    rest = PerExampleEngine().measure(loss.of([loss.parameters[index] for index in sorted(misses)]), batch)
    return PerExampleGradients(measured.sq_norms + rest.sq_norms, measured.gradient_sum)
