"""What is proven about a module's parameters, from one measured step to the next."""

from collections.abc import Hashable, Sequence
from typing import Any

from torch import nn

from lightning_graddiv.errors import MeasurementError
from lightning_graddiv.per_example.directions import Spaces
from lightning_graddiv.per_example.fingerprint import KnownGraphs, modes_of
from lightning_graddiv.per_example.ghost import WatchedLayer, is_sharded, layers_of
from lightning_graddiv.per_example.in_band import GhostStep
from lightning_graddiv.per_example.layers import layer_type, mixes_examples
from lightning_graddiv.per_example.losses import StepLoss, measuring
from lightning_graddiv.per_example.proof import GhostPlan, prove
from lightning_graddiv.per_example.select import PerExampleEngine, with_frozen_copied


def is_proof_due(measured: int, *, is_wrapped: bool) -> bool:
    """Tell whether to prove again after so many measurements: 0, 64 and every 256.

    Rarer than the checks of engines that run the step again: here a changed step is noticed when it happens. That costs
    the measurement, and the second one always where the module ``is_wrapped``: DDP's first step is not like the others.
    """
    return measured == 64 or measured % 256 == 0 or (is_wrapped and measured == 1)


class GhostEngine:
    """What is proven about a module's parameters, over a whole training.

    The proof is made where :func:`is_proof_due`, and again when the step changes and after a failure. Every
    decision is taken from what all processes agree on.

    Attributes:
        covered: the parameters that are measured in-band, by index.
        misses: why the others are not.
        measured: good measurements so far.
    """

    def __init__(self) -> None:
        self.covered: list[int] = []
        self.misses: dict[int, str] = {}
        self._plan = GhostPlan()
        self._rest: PerExampleEngine | None = PerExampleEngine()
        self.measured = 0
        self._is_trusted = False
        self._known: list[int] = []
        self._spaces: Spaces | None = None
        self._layers: list[WatchedLayer] | None = None
        self._modes: Hashable = None
        self._graphs = KnownGraphs()
        self._is_just_checked = False

    def __getstate__(self) -> dict[str, Any]:
        """Forget which objects the parameters and layers were: a copy has others."""
        return {**self.__dict__, "_known": [], "_layers": None}

    def is_check_due(self, module: nn.Module, parameters: Sequence[nn.Parameter], *, is_wrapped: bool) -> bool:
        """Tell whether the next step must be preceded by :meth:`check` and :meth:`adopt`.

        Args:
            module: that trains.
            parameters: all that are measured.
            is_wrapped: whether what trains is another module around it, as under DDP.
        """
        is_known = self._known == [id(parameter) for parameter in parameters] and self._modes == modes_of(module)
        return not self._is_trusted or not is_known or is_proof_due(self.measured, is_wrapped=is_wrapped)

    def check(self, loss: StepLoss, batch: Any, total: int, *, seed: int) -> list[float]:
        """Prove on a few examples what can be measured.

        Returns:
            One for every parameter that can, zero for the others.

        Raises:
            MeasurementError: the batch cannot be split into examples.
        """
        with measuring(loss.module, seed):
            self._plan, _ = with_frozen_copied(loss, lambda: prove(loss, batch, total, seed=self.measured))
        return [0.0 if index in self._plan.misses else 1.0 for index in range(len(loss.parameters))]

    def assume(self, module: nn.Module, parameters: Sequence[nn.Parameter]) -> list[float]:
        """Take the layers' rules on trust where no process holds the whole parameters to prove them on (FSDP2).

        That a layer's uses add up to its parameter's gradient is still checked in every measurement.

        Raises:
            MeasurementError: a layer is known to mix examples.
        """
        held = set()
        for name, layer in module.named_modules():
            if mixes_examples(layer):
                raise MeasurementError(
                    f"`{name}` ({type(layer).__name__}) mixes the examples of a batch, and the parameters are sharded.",
                    lasting=True,
                )
            if layer_type(layer) is not None:
                held |= {id(parameter) for parameter in layer.parameters(recurse=False)}
        mask = [float(id(parameter) in held) for parameter in parameters]
        misses = {index: "no layer with a rule holds it" for index, known in enumerate(mask) if not known}
        self._plan, self._rest = GhostPlan(misses=misses, assumed=True), None
        return mask

    def adopt(self, mask: Sequence[float], module: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        """Take over what is proven on every process."""
        covered, modes = [index for index, is_proven in enumerate(mask) if is_proven], modes_of(module)
        if (covered, modes) != (self.covered, self._modes):
            self._graphs.clear()
        self.covered, self._modes, self._is_just_checked = covered, modes, True
        self.misses = dict(self._plan.misses)
        for index, is_proven in enumerate(mask):
            if not is_proven:
                self.misses.setdefault(index, "another process cannot measure it so")
        self._known, self._spaces = [id(parameter) for parameter in parameters], Spaces.of(parameters)
        # FSDP2 puts others in the place of sharded parameters, and takes them back.
        is_sharded_somewhere = any(is_sharded(parameter) for parameter in parameters)
        self._layers = None if is_sharded_somewhere else layers_of(module, parameters, frozenset(covered))
        self._is_trusted = True

    def step(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        compares_processes: bool,
        holds_all: bool,
        seed: int,
        noise_seed: int,
    ) -> GhostStep:
        """Begin the measurement of a step; see :class:`.GhostStep`."""
        is_just_checked, self._is_just_checked = self._is_just_checked, False
        is_known = self._known == [id(parameter) for parameter in parameters]
        return GhostStep(
            parameters,
            self._plan,
            self.covered,
            self._rest,
            compares_processes=compares_processes,
            holds_all=holds_all,
            seed=seed,
            noise_seed=noise_seed,
            graphs=self._graphs,
            is_just_checked=is_just_checked,
            spaces=self._spaces if is_known else None,
            layers=self._layers if is_known else None,
        )

    def leave_out_the_rest(self) -> None:
        """From now on measure only what is covered."""
        self._rest = None

    def settle(self, *, is_good: bool) -> None:
        """Note how a measurement ended, on every process alike."""
        self.measured += is_good
        self._is_trusted = is_good
