"""Per-example gradient norms in-band: from the forward and backward pass that training makes anyway.

A forward hook keeps a layer's input and puts a hook on its output tensor, which sees the gradient of the output in the
backward pass. Both together hold every example's contribution to the layer's parameters. (Full backward hooks would
break in-place activations.) Each parameter's whole gradient is seen before processes exchange theirs, so that a use of
the parameter that no layer accounts for is noticed in the very step that makes it: by a hook on the parameter or, where
one backward pass of one process is the whole step, once that is over.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
from lightning_graddiv.per_example.factors import Contributions, Factor
from lightning_graddiv.per_example.layers import LayerType, Layout, layer_type
from lightning_graddiv.per_example.ledger import Ledger
from lightning_graddiv.per_example.modes import as_own_work
from lightning_graddiv.per_example.norms import dense
from lightning_graddiv.per_example.precision import rounds_products
from lightning_graddiv.per_example.records import Recorded, Use
from lightning_graddiv.per_example.totals import added

Layouts = Mapping[tuple[int, int], Layout]
"""How the examples lie in a use of a parameter: (its index, the how-manieth use) -> layout."""


WatchedLayer = tuple[nn.Module, LayerType, dict[str, int]]
"""A layer, what is known of its type, and which of its parameters are measured, name to index."""

_WAITING_BYTES = 4 * 2**20
"""What uses of layers may hold together until the pass is over, to be measured at once, beside those that have to wait:
a processor that has just multiplied large matrices takes up to three times as long for a few small operations as it
does for the same ones again."""

_SECOND_PASS = "it takes part in more than one backward pass"

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
        self.uses: list[Use] = []
        self.seconds = 0.0
        self.is_paused = False
        self._parameters = list(parameters)
        self._knows_layouts = layouts is not None
        self._layouts: Layouts = {} if layouts is None else layouts
        self._shared = shared
        self._measured = frozenset(range(len(self._parameters))) if measured is None else measured
        self._assumed = assumed
        self._awaits_loss = awaits_loss
        self._directions = Directions(self._parameters, seed, spaces=spaces)
        self._ledger = Ledger(
            self._parameters,
            self._directions,
            measured=self._measured,
            keeps_local=keeps_local,
            keeps_norms=keeps_norms,
        )
        self._handles: list[RemovableHandle] = []
        self._passing: list[RemovableHandle] = []  # on what came out of layers in this pass
        self._unsharded: set[int] = set()
        self._clear()

    def _clear(self, examples: int = 0) -> None:
        for handle in self._passing:
            handle.remove()
        self._passing = []
        self.uses = []
        self._examples = examples
        self._calls: dict[int, int] = defaultdict(int)
        self._waiting_bytes = 0.0
        self._ledger.begin(examples)
        self._noted: set[tuple[torch.dtype, torch.device]] = set()
        self._error: Exception | None = None
        self._is_awaiting_end = False

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
        if any(p.grad is not None or p._post_accumulate_grad_hooks for p in self._parameters):
            self._attach_parameters(self._parameters)
            return
        self._attach_parameters(self._parameters, others_than=self._measured)
        for index in self._measured - self._directions.small:
            if self._parameters[index].requires_grad and not is_accelerator(self._parameters[index].device):
                look = partial(self._guarded, self._look_at, index)
                self._passing.append(self._parameters[index].register_hook(look))
        self._is_awaiting_end = True
        self._ledger.expect_all_at_end()
        queue = torch.autograd.Variable._execution_engine.queue_callback
        at_end = partial(self._guarded, self._on_end)
        self._passing.append(loss.register_hook(lambda _: self._guarded(queue, at_end)))

    def _look_at(self, index: int, gradient: Tensor) -> None:
        if self._is_awaiting_end:
            self._ledger.look_at(index, gradient)
        else:
            self._ledger.misses[index] = _SECOND_PASS

    def _on_end(self) -> None:
        """Look at what parameters were given, before anybody else can; a pass that gave them nothing is another one."""
        if not self._is_awaiting_end:
            return
        given = {index: parameter.grad for index, parameter in enumerate(self._parameters)}
        found = {index: gradient for index, gradient in given.items() if gradient is not None}
        if found:
            self._measure_waiting()
            self._is_awaiting_end = False
            self._ledger.receive_all(found)

    def _attach_layer(self, layer: nn.Module, kind: LayerType, held: dict[str, int]) -> None:
        def after(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            """Record a call. Copies of the module share a function; a partial would be copied with all it holds."""
            self._guarded(self._on_call, layer, kind, held, args, kwargs, output)

        # The first hook sees what the layer itself put out; those of the user may replace it.
        self._handles.append(layer.register_forward_hook(after, prepend=True, with_kwargs=True))

    def _await_whole(self, layer: nn.Module, held: dict[str, int]) -> None:
        before = layer.register_forward_pre_hook(lambda layer, _: self._guarded(self._unshard, layer, held))
        self._handles.append(before)

    def _unshard(self, layer: nn.Module, held: dict[str, int]) -> None:
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
        if self._examples > 0 or self.uses or self._passing:
            self._clear()

    def begin(self, examples: int) -> None:
        """Expect a forward and backward pass of so many examples."""
        self._clear(examples)

    def finish(self) -> Recorded:
        """Return what the backward pass showed.

        Raises:
            MeasurementError: something could not be recorded, or is not finite.
        """
        try:
            for rest in (self._on_end, self._measure_waiting):  # the end of another loss
                if self._error is None:
                    self._try(rest)
            if self._error is not None:
                raise MeasurementError(f"Recording the backward pass failed: {self._error}") from self._error
            return as_own_work(self._ledger.balance)
        finally:
            self._clear()

    def used(self, index: int) -> list[Use]:
        """Return the uses of a parameter that the backward pass has reached, in the order of the calls."""
        return [use for use in self.uses if index in use.parameters.values() and use.is_measurable]

    def _guarded(self, record: Callable[..., None], *what: Any) -> None:
        """Run our part of a training step: it must not end the step."""
        if self._error is not None or self.is_paused:
            return
        start = time.perf_counter()
        self._try(record, *what)
        self.seconds += time.perf_counter() - start

    def _try(self, record: Callable[..., None], *what: Any) -> None:
        try:
            as_own_work(record, *what)
        except Exception as error:
            self._error = error

    def _on_call(
        self,
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
        ordinals = {}
        for name, index in held.items():
            ordinals[name] = self._calls[index]
            self._calls[index] += 1
        use = Use(layer, kind, held, ordinals, inputs, outputs[0] if kind.keeps_output else None)
        self.uses.append(use)
        on_gradients = partial(self._guarded, self._on_gradients, use)
        if len(outputs) == 1:
            self._passing.append(outputs[0].register_hook(lambda gradient: on_gradients((gradient,))))
        else:  # called once, when all gradients are there that there will be
            self._passing.append(register_multi_grad_hook(outputs, on_gradients))

    def _on_gradients(self, use: Use, gradients: Sequence[Tensor | None]) -> None:
        if use.is_reached:
            for index in use.parameters.values():
                self._ledger.misses[index] = _SECOND_PASS
            return
        use.receive(gradients)
        must_wait = not self._knows_layouts or not self._shared.isdisjoint(use.parameters.values())
        if not must_wait and not self._put_off(use):
            self._measure([use])

    def _put_off(self, use: Use) -> bool:
        """Leave a use to the end of the pass if that is waited for, and little is held until then; tell whether."""
        if not self._is_awaiting_end:
            return False
        held = self._waiting_bytes + use.held_bytes()
        if held > _WAITING_BYTES:
            return False
        self._waiting_bytes = held
        return True

    def _measure_waiting(self) -> None:
        """Measure what was kept until the whole backward pass was seen."""
        together = [use for use in self.uses if use.is_measurable]
        if self._knows_layouts and together:
            self._measure(together)

    def _measure(self, uses: Sequence[Use]) -> None:
        contributions: dict[int, list[Contributions]] = defaultdict(list)
        for use in uses:
            leading = use.leading
            for name, index in use.parameters.items():
                layout = Layout.FIRST if self._assumed else self._layouts.get((index, use.ordinals[name]))
                if layout is None or not layout.fits(leading, self._examples):
                    self._ledger.misses.setdefault(
                        index, f"the leading dimensions {leading} of its layer's input do not hold the examples"
                    )
                    continue
                found = use.contributions(layout, self._examples)
                if name in found:
                    contributions[index].append(found[name])
            self._note_precision(use)
        if len(uses) > 1:
            alone = [parts[0] for parts in contributions.values() if len(parts) == 1]
            Factor.take_sq_norms([factor for of_one in alone for factor in of_one.factors])
        for index in list(contributions):
            self._ledger.contribute(index, added(contributions.pop(index)))
        for use in uses:
            self.uses.remove(use)
            use.release()

    def _note_precision(self, use: Use) -> None:
        for gradient in use.output_gradients:
            if gradient is not None and (gradient.dtype, gradient.device) not in self._noted:
                self._noted.add((gradient.dtype, gradient.device))
                bits = torch.finfo(gradient.dtype).bits
                rounds = bits == 32 and rounds_products(gradient.device)
                self._ledger.note_precision(16 if rounds else bits)

    def _gradient_hook(self, index: int) -> Callable[[Tensor], None]:
        return partial(self._guarded, self._ledger.receive, index)

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
