"""One optimizer step measured while training takes it: all its micro-batches, with no pass of its own.

What the hooks see are contributions c_i = a_i g_i, which add up to the gradient that the optimizer applies. With k the
divisor that stands before a micro-batch's loss and m its examples, a process sees a_i = 1/(k m) for a mean loss and 1/k
for a sum; the mean over the processes is taken later.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_graddiv.errors import MeasurementError
from lightning_graddiv.per_example.directions import Spaces
from lightning_graddiv.per_example.fingerprint import KnownGraphs
from lightning_graddiv.per_example.ghost import GhostRecorder, WatchedLayer
from lightning_graddiv.per_example.losses import StepLoss
from lightning_graddiv.per_example.probes import DIRECTIONS
from lightning_graddiv.per_example.proof import GhostPlan
from lightning_graddiv.per_example.received import Received
from lightning_graddiv.per_example.select import PerExampleEngine


@dataclass
class StepSums:
    """What one process's examples of a step add up to, as contributions to its own gradient; all may be added up.

    Attributes:
        sum_sq_norms: ``sum |c_i|^2`` over the parameters measured in-band.
        rest_sq_norms: the same over those that are measured by running the step again.
        sum_weights: ``sum a_i``.
        sum_sq_weights: ``sum a_i^2``.
    """

    sum_sq_norms: float = 0.0
    rest_sq_norms: float = 0.0
    sum_weights: float = 0.0
    sum_sq_weights: float = 0.0


class InBandStep(ABC):
    """The measurement of one optimizer step, fed micro-batch by micro-batch.

    Args:
        parameters: all that the optimizer holds and that require a gradient.
        recorder: of those.

    """

    def __init__(self, parameters: Sequence[nn.Parameter], recorder: GhostRecorder) -> None:
        self._projections: list[Tensor] = []  # of each pass
        self._parameters = list(parameters)
        self._recorder = recorder
        self._is_expecting = False

    @property
    def seconds(self) -> float:
        """Seconds spent in hooks."""
        return self._recorder.seconds

    @property
    def projections(self) -> Tensor:
        """Of this process's gradient, for a comparison with what the optimizer applies: shape (p,), float64."""
        if not self._projections:
            return torch.zeros(DIRECTIONS, dtype=torch.float64, device="cpu")
        return torch.stack(self._projections).sum(0)

    def applied_projections(self) -> Tensor:
        """Return the projections of the gradient that the optimizer is about to apply, as :attr:`projections`."""
        return self._recorder.projected([parameter.grad for parameter in self._parameters])

    def close(self) -> None:
        """Remove every hook; may be called more than once."""
        self._recorder.detach()

    def _expect_one_backward(self) -> None:
        if not self._is_expecting:
            raise MeasurementError(
                "training_step runs several backward passes, whose gradients cannot be told apart. Add the losses up "
                "and run one.",
                lasting=True,
            )
        self._is_expecting = False

    @abstractmethod
    def forward(self, module: nn.Module, loss: StepLoss | None, batch: Any, examples: int, divisor: int) -> None:
        """Get ready for the forward and backward pass of a micro-batch."""

    def look_at(self, loss: Tensor) -> None:  # noqa: B027 - most have nothing to look at
        """Look at the loss of a micro-batch before its backward pass.

        Raises:
            UncoveredError: it is not computed as when that was last checked.
        """

    @abstractmethod
    def backward(self, scale: float) -> None:
        """Take in what the backward pass showed.

        Args:
            scale: by which the loss was multiplied beside its divisor (a gradient scaler's).

        Raises:
            MeasurementError: it cannot be trusted.
        """


class GhostStep(InBandStep):
    """Measures the contributions of single examples, by the rules of the layers.

    Args:
        parameters: all that the optimizer holds and that require a gradient.
        plan: what was proven.
        covered: the parameters to measure in-band, by index.
        rest: measures the others by running the step again; None: they are left out.
        compares_processes: whether this process's own gradient is asked for.
        holds_all: whether one backward pass of this process is the whole step.
        seed: of random directions, the same on every process.
        noise_seed: of the rest's noise, another on every process.
        graphs: of the steps that were checked.
        is_just_checked: whether this step's first micro-batch was.
        spaces: of the parameters, where these have been looked at before.
        layers: of the module that trains, where these have been looked for before.

    Attributes:
        covered: see above.
        sums: of the micro-batches so far.
        local_sq_norm: ``|sum c_i|^2`` of this process alone, over the parameters measured; None where not known.
        rest_error: why the rest cannot be measured.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        plan: GhostPlan,
        covered: Sequence[int],
        rest: PerExampleEngine | None,
        *,
        compares_processes: bool,
        holds_all: bool,
        seed: int,
        noise_seed: int,
        graphs: KnownGraphs,
        is_just_checked: bool,
        spaces: Spaces | None = None,
        layers: Sequence[WatchedLayer] | None = None,
    ) -> None:
        recorder = GhostRecorder(
            parameters,
            plan.layouts,
            shared=plan.shared,
            measured=frozenset(covered),
            keeps_local=compares_processes,
            keeps_norms=holds_all,
            assumed=plan.assumed,
            awaits_loss=holds_all,
            seed=seed,
            spaces=spaces,
        )
        super().__init__(parameters, recorder)
        self._graphs, self._layers = graphs, layers
        self._holds_all = holds_all
        self._only_pass: tuple[Received, float] | None = None
        self._is_just_checked = is_just_checked
        self.covered = list(covered)
        self.sums = StepSums()
        self.local_sq_norm: float | None = None
        self.rest_error: MeasurementError | None = None
        self._reached: set[int] = set()
        in_band = set(covered)
        self._rest_parameters = [p for i, p in enumerate(parameters) if i not in in_band]
        self._rest = rest if self._rest_parameters else None
        self._plan = plan
        self._noise_seed = noise_seed
        self._is_attached = False
        self._weight = 0.0
        self._pending_sq_norms = 0.0  # until the backward pass shows that the micro-batch is trained on

    @property
    def measures_rest(self) -> bool:
        """Whether parameters that are not covered are measured by running the step again."""
        return self._rest is not None

    @override
    def forward(self, module: nn.Module, loss: StepLoss | None, batch: Any, examples: int, divisor: int) -> None:
        self._is_expecting = True
        self._weight = 1 / divisor if self._plan.reduction == "sum" else 1 / (divisor * examples)
        if self._rest is not None and loss is not None and self.rest_error is None:
            self._measure_rest(self._rest, loss, batch, examples)
        if not self._is_attached:
            self._recorder.attach(module, layers=self._layers)
            self._is_attached = True
        self._recorder.begin(examples)

    def _measure_rest(self, engine: PerExampleEngine, loss: StepLoss, batch: Any, examples: int) -> None:
        """Measure unit gradients, and weigh them as this micro-batch's examples are weighed."""
        try:
            of_rest = loss.of(self._rest_parameters)
            measured = engine.measure(of_rest, batch, at_most=examples, seed=self._noise_seed)
        except MeasurementError as error:
            self.rest_error = error
            return
        self._pending_sq_norms = self._weight**2 * float(measured.sq_norms.sum())

    @override
    def look_at(self, loss: Tensor) -> None:
        if self._is_just_checked:
            self._graphs.add(loss)
            self._is_just_checked = False
        elif not self._graphs.knows(loss):
            raise UncoveredError("training_step computes something else")
        if self._holds_all:
            self._recorder.await_end_of(loss)

    @override
    def backward(self, scale: float) -> None:
        self._expect_one_backward()
        recorded = self._recorder.finish()
        missed = [recorded.misses[index] for index in self.covered if index in recorded.misses]
        if missed:
            raise UncoveredError(missed[0])
        self.sums.sum_sq_norms += sum(recorded.totals.values()) / scale**2
        self.sums.rest_sq_norms += self._pending_sq_norms
        self.sums.sum_weights += self._weight * recorded.examples
        self.sums.sum_sq_weights += self._weight**2 * recorded.examples
        if self._holds_all:
            self._only_pass = recorded.received, scale
        else:
            self._projections.append(recorded.received.projections() / scale)
        self.local_sq_norm = self._local_sq_norm(recorded.local_sq_norms, scale)
        self._reached |= recorded.totals.keys()
        self._pending_sq_norms = 0.0

    @property
    @override
    def projections(self) -> Tensor:
        if self._only_pass is None:
            return super().projections
        received, scale = self._only_pass
        return received.projections() / scale

    def untouched_sq_norms(self) -> list[float] | None:
        """Return |gradient|^2 of each parameter where what is applied is what the only backward pass gave; else None.

        Nothing has to be read again then: no pass over the weights.
        """
        if self._only_pass is None:
            return None
        received, scale = self._only_pass
        if not received.is_still([parameter.grad for parameter in self._parameters]):
            return None
        sq_norms = received.sq_norms
        return [sq_norms.get(index, 0.0) / scale**2 for index in range(len(self._parameters))]

    def _local_sq_norm(self, found: dict[int, float] | None, scale: float) -> float | None:
        indices = range(len(self._parameters)) if self.measures_rest else self.covered
        if found is None or any(self._parameters[i].grad is not None for i in indices if i not in found):
            return None  # a parameter that this pass did not reach holds a gradient that may be everybody's
        return sum(found.get(i, 0.0) for i in indices) / scale**2

    def unreached(self, has_gradient: Sequence[bool]) -> MeasurementError | None:
        """Return an error for parameters that have a gradient although no layer was seen to use them."""
        is_missed = any(has_gradient[i] and i not in self._reached for i in self.covered)
        return UncoveredError("no layer with a rule used a parameter that has a gradient") if is_missed else None


class UncoveredError(MeasurementError):
    """In a training step, parameters were used in a way that was not proven."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"The step is not what it was when it was last checked: {reason}.")


class GroupStep(InBandStep):
    """Measures the gradients of whole micro-batches, for what cannot be split into examples.

    Args:
        parameters: all that the optimizer holds and that require a gradient.
        seed: of random directions, the same on every process.

    Attributes:
        groups: the squared norm of the gradient and the number of examples of each micro-batch so far.
        divisor: that stands before a micro-batch's loss.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, seed: int) -> None:
        super().__init__(parameters, GhostRecorder(parameters, {}, measured=frozenset(), keeps_norms=True, seed=seed))
        self.groups: list[tuple[float, float]] = []
        self.divisor = 1
        self._examples = 0

    @override
    def forward(self, module: nn.Module, loss: StepLoss | None, batch: Any, examples: int, divisor: int) -> None:
        self._is_expecting = True
        self._examples, self.divisor = examples, divisor
        self._recorder.attach(nn.Module(), self._parameters)  # to no layer: the parameters are enough
        self._recorder.begin(examples)

    @override
    def backward(self, scale: float) -> None:
        self._expect_one_backward()
        recorded = self._recorder.finish()
        if recorded.gradient_sq_norm is None:
            raise MeasurementError(
                "A re-entrant checkpoint computes a parameter's gradient in parts, whose norm is not that of the whole."
                " Use `checkpoint(..., use_reentrant=False)`.",
                lasting=True,
            )
        self._projections.append(recorded.received.projections() / scale)
        self.groups.append((recorded.gradient_sq_norm * (self.divisor / scale) ** 2, float(self._examples)))
