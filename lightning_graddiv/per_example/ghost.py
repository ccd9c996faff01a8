"""Per-example gradient norms in-band: from the forward and backward pass that training makes anyway.

A forward hook keeps a layer's input and puts a hook on its output tensor, which sees the gradient of the output in the
backward pass. Both together hold every example's contribution to the layer's parameters. (Full backward hooks would
break in-place activations.) Each parameter's whole gradient is seen before processes exchange theirs, so that a use of
the parameter that no layer accounts for is noticed in the very step that makes it: by a hook on the parameter or, where
one backward pass of one process is the whole step, once that is over.
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils.hooks import RemovableHandle

from lightning_graddiv.errors import MeasurementError
from lightning_graddiv.per_example.devices import is_accelerator
from lightning_graddiv.per_example.directions import Directions, Spaces
from lightning_graddiv.per_example.layers import LayerType, layer_type
from lightning_graddiv.per_example.ledger import Ledger
from lightning_graddiv.per_example.norms import dense
from lightning_graddiv.per_example.one_pass import Layouts, Pass
from lightning_graddiv.per_example.records import Recorded, Use

WatchedLayer = tuple[nn.Module, LayerType, dict[str, int]]
"""A layer, what is known of its type, and which of its parameters are measured, name to index."""

_ATTACHED: "WeakSet[GhostRecorder]" = WeakSet()


@contextmanager
def recorders_paused() -> Iterator[None]:
    """Let recorders of a training step sleep while a copy of its module runs, to which their hooks were copied too."""
    paused = [recorder for recorder in _ATTACHED if not recorder.is_paused]
    for recorder in paused:
        recorder.is_paused = True
    try:
        yield
    finally:
        for recorder in paused:
            recorder.is_paused = False


class GhostRecorder:
    """Records the layers of a module while it trains. A context manager: leaving it removes every hook.

    Args:
        parameters: the parameters to measure; everything is known by its index in here.
        layouts: where the examples lie, proven before.
        shared: parameters that are known to be used more than once, which wait for the end of the backward pass.
        measured: the parameters that matter, by index. None: all.
        keeps_local: whether to keep the norm of the gradient so far, before processes exchange theirs.
        keeps_norms: whether to keep the norm of the gradient of each pass.
        assumed: whether a leading dimension of the right size is taken for the examples, without proof.
        awaits_loss: whether the parameters are left alone until :meth:`await_end_of`.
        seed: of the random directions that a gradient is compared in; the same on every process.
        spaces: of the parameters, where these have been looked at before.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        layouts: Layouts | None = None,
        *,
        shared: frozenset[int] = frozenset(),
        measured: frozenset[int] | None = None,
        keeps_local: bool = False,
        keeps_norms: bool = False,
        assumed: bool = False,
        awaits_loss: bool = False,
        seed: int = 0,
        spaces: Spaces | None = None,
    ) -> None:
        self.seconds = 0.0
        self.is_paused = False
        self._parameters = list(parameters)
        self._layouts = layouts
        self._shared = shared
        self._measured = frozenset(range(len(self._parameters))) if measured is None else measured
        self._assumed = assumed
        self._awaits_loss = awaits_loss
        self._directions = Directions(self._parameters, seed, spaces=spaces)
        self._keeps_local = keeps_local
        self._keeps_norms = keeps_norms
        self._handles: list[RemovableHandle] = []
        self._unsharded: set[int] = set()
        self._pass: Pass | None = None
        self._passing: list[RemovableHandle] = []  # on what came out of layers in this pass

    @property
    def uses(self) -> list[Use]:
        """Of layers in this pass that are still to be measured, in the order of the calls."""
        return [] if self._pass is None else self._pass.uses

    def __enter__(self) -> "GhostRecorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def attach(
        self,
        module: nn.Module,
        stand_ins: Sequence[Tensor] | None = None,
        layers: Sequence[WatchedLayer] | None = None,
    ) -> None:
        """Put hooks on every layer with a rule, and on the parameters, unless these await the loss.

        Args:
            module: what runs.
            stand_ins: the tensors that stand in for the parameters in ``module``. None: the parameters themselves.
            layers: of ``module``, where these have been looked for before; of none are the parameters sharded.
        """
        if self._handles:
            self.detach()  # from what ran before
        _ATTACHED.add(self)
        tensors = self._parameters if stand_ins is None else stand_ins
        found = layers_of(module, tensors, self._measured) if layers is None else layers
        for layer, kind, held in found:
            self._attach_layer(layer, kind, held)
            if layers is None and any(is_sharded(layer._parameters[name]) for name in held):
                self._await_whole(layer, held)
        if not self._awaits_loss:
            self._attach_parameters(tensors)

    def _attach_parameters(self, tensors: Sequence[Tensor], others_than: frozenset[int] = frozenset()) -> None:
        for index, tensor in enumerate(tensors):  # of all: what is applied must be what all of them received
            if index not in others_than and tensor.requires_grad and not is_sharded(tensor):
                self._handles.append(tensor.register_hook(self._gradient_hook(index)))

    def await_end_of(self, loss: Tensor) -> None:
        """Get ready for the backward pass of a loss, the only one of a step that is measured on this process alone.

        Where parameters hold no gradients yet, and no hook follows, those that are measured are looked at when the pass
        is over, all at once: a hook on each would cost calls, and copies of what it keeps. Large ones on a processor
        are read as they come by, while it has them at hand. Of the others nothing else tells what the pass gave them.
        """
        if self._pass is None:
            return
        if any(p.grad is not None or p._post_accumulate_grad_hooks for p in self._parameters):
            self._attach_parameters(self._parameters)
            return
        self._attach_parameters(self._parameters, others_than=self._measured)
        for index in self._measured - self._directions.small:
            if self._parameters[index].requires_grad and not is_accelerator(self._parameters[index].device):
                look = partial(self._guarded, Pass.look_at, index)
                self._passing.append(self._parameters[index].register_hook(look))
        self._pass.await_end()
        queue = torch.autograd.Variable._execution_engine.queue_callback
        at_end = partial(self._guarded, Pass.look_at_end, self._parameters)
        self._passing.append(loss.register_hook(lambda _: self._guarded(lambda _: queue(at_end))))

    def _attach_layer(self, layer: nn.Module, kind: LayerType, held: dict[str, int]) -> None:
        def after(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            """Record a call. Copies of the module share a function; a partial would be copied with all it holds."""
            self._guarded(self._on_call, layer, kind, held, args, kwargs, output)

        # The first hook sees what the layer itself put out; those of the user may replace it.
        self._handles.append(layer.register_forward_hook(after, prepend=True, with_kwargs=True))

    def _await_whole(self, layer: nn.Module, held: dict[str, int]) -> None:
        before = layer.register_forward_pre_hook(lambda layer, _: self._guarded(self._unshard, layer, held))
        self._handles.append(before)

    def _unshard(self, _: Pass, layer: nn.Module, held: dict[str, int]) -> None:
        """Watch the whole parameters that FSDP2 puts in place of the sharded ones while the layer runs."""
        for name, index in held.items():
            whole = layer._parameters[name]
            if whole is not None and whole.requires_grad and index not in self._unsharded and not is_sharded(whole):
                self._unsharded.add(index)
                self._handles.append(whole.register_hook(self._gradient_hook(index)))

    def detach(self) -> None:
        """Remove every hook and let go of every tensor; may be called more than once."""
        _ATTACHED.discard(self)
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._unsharded = set()
        self._end_pass()

    def begin(self, examples: int) -> None:
        """Expect a forward and backward pass of so many examples."""
        self._end_pass()
        ledger = Ledger(
            self._parameters,
            self._directions,
            examples,
            measured=self._measured,
            keeps_local=self._keeps_local,
            keeps_norms=self._keeps_norms,
        )
        self._pass = Pass(ledger, examples, self._layouts, shared=self._shared, assumed=self._assumed)

    def _end_pass(self) -> None:
        for handle in self._passing:
            handle.remove()
        self._passing = []
        if self._pass is not None:
            self._pass.error = None  # whose traceback holds the pass
        self._pass = None

    def finish(self) -> Recorded:
        """Return what the backward pass showed.

        Raises:
            MeasurementError: something could not be recorded, or is not finite; or no pass was begun.
        """
        if self._pass is None:
            raise MeasurementError("No pass to record was begun.")
        try:
            return self._pass.finish(self._parameters)
        finally:
            self._end_pass()

    def used(self, index: int) -> list[Use]:
        """Return the uses of a parameter that the backward pass has reached, in the order of the calls."""
        return [use for use in self.uses if index in use.parameters.values() and use.is_measurable]

    def _guarded(self, record: Callable[..., None], *what: Any) -> None:
        """Run our part of a training step on the pass that was begun: it must not end the step."""
        current = self._pass
        if current is None or self.is_paused:
            return
        start = time.perf_counter()
        current.attempt(record, current, *what)
        self.seconds += time.perf_counter() - start

    def _on_call(
        self,
        current: Pass,
        layer: nn.Module,
        kind: LayerType,
        held: dict[str, int],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        outputs = [output] if isinstance(output, Tensor) else _tensors(output)
        if not outputs or not outputs[0].requires_grad:
            return
        if outputs[0].numel() == 0:  # an expert that no row was sent to
            return
        inputs = (_one_tensor if kind.inputs is None else kind.inputs)(layer, args, kwargs, outputs[0])
        if inputs is None:
            return
        use = current.called(layer, kind, held, inputs, outputs[0])
        on_gradients = partial(self._guarded, Pass.reached, use)
        if len(outputs) == 1:
            self._passing.append(outputs[0].register_hook(lambda gradient: on_gradients((gradient,))))
        else:  # called once, when all gradients are there that there will be
            self._passing.append(register_multi_grad_hook(outputs, on_gradients))

    def _gradient_hook(self, index: int) -> Callable[[Tensor], None]:
        return partial(self._guarded, Pass.receive, index)

    def projected(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Return the projections of all parameters' gradients together, shape (p,), float64."""
        return self._directions.projections_of(
            {
                index: dense(gradient)
                for index, gradient in enumerate(gradients)
                if gradient is not None and not gradient.is_complex()
            }
        )


def layers_of(module: nn.Module, parameters: Sequence[Tensor], measured: Collection[int]) -> list[WatchedLayer]:
    """Return the layers with a rule that hold some of the parameters that are measured, by index."""
    indices = {id(tensor): index for index, tensor in enumerate(parameters) if index in measured}
    found = []
    for layer in module.modules():
        kind = layer_type(layer)
        if kind is not None:
            named = ((name, layer._parameters.get(name)) for name in kind.parameters(layer))
            held = {name: indices[id(parameter)] for name, parameter in named if id(parameter) in indices}
            if held:
                found.append((layer, kind, held))
    return found


def _one_tensor(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: Tensor) -> tuple[Tensor] | None:
    inputs = args[0] if args else next(iter(kwargs.values()), None)
    return (inputs,) if isinstance(inputs, Tensor) else None


def _tensors(output: Any) -> list[Tensor]:
    """Return all tensors of an output, which may be a tuple of some and of tuples of some."""
    if isinstance(output, tuple):
        return [tensor for part in output for tensor in _tensors(part)]
    return [output] if isinstance(output, Tensor) else []


def is_sharded(tensor: Tensor | None) -> bool:
    """Tell a parameter of which this process holds only a part (FSDP2)."""
    return hasattr(tensor, "device_mesh")


def reshard(module: nn.Module) -> None:
    """Put this process's pieces of parameters (FSDP2), which the optimizer holds, back in the place of whole ones.

    The outermost sharded modules have whole ones after a validation: it is a backward pass that puts the pieces back.
    """
    from torch.distributed.fsdp import FSDPModule  # where torch is built without processes, nothing is sharded

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
