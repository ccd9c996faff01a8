"""Contributions to the weights of recurrent layers and cells.

The gradients of the gates, which a fused layer does not show, are computed again from its inputs, its outputs and their
gradients (:mod:`.gates`). Then a recurrent layer is two linear maps: of what it reads, and of its own last output.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_graddiv.per_example.factors import Contributions, Explicit, Factor
from lightning_graddiv.per_example.gates import GateGradients, Scan, gru_gates, lstm_gates, relu_gates, tanh_gates
from lightning_graddiv.per_example.linear_maps import Outer

_GATES: dict[str, GateGradients] = {
    "LSTM": lstm_gates,
    "GRU": gru_gates,
    "RNN_TANH": tanh_gates,
    "RNN_RELU": relu_gates,
}

_FUSED: dict[str, Any] = {
    "LSTM": torch.lstm,
    "GRU": torch.gru,
    "RNN_TANH": torch.rnn_tanh,
    "RNN_RELU": torch.rnn_relu,
}

_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")

Arrange = Callable[[Tensor, int], Tensor]


def has_known_gates(layer: Any) -> bool:
    """Tell layers whose hidden states can be computed again: without projections, dropout between layers, or FSDP2."""
    drops = layer.num_layers > 1 and layer.dropout > 0 and layer.training
    return not drops and layer.proj_size == 0 and is_whole(layer)


def is_whole(layer: nn.Module) -> bool:
    """Tell whether this process holds all of the weights (not under FSDP2)."""
    return not any(hasattr(parameter, "device_mesh") for parameter in layer.parameters(recurse=False))


def layer_parameters(layer: nn.RNNBase) -> list[str]:
    """Return the names of all parameters of a recurrent layer."""
    return [name for suffix in _suffixes(layer) for name in _names(layer, suffix)]


def cell_parameters(layer: nn.RNNCellBase) -> list[str]:
    """Return the names of all parameters of a recurrent cell."""
    return _names(layer, "")


def _names(layer: Any, suffix: str) -> list[str]:
    return [name + suffix for name in _NAMES[: 4 if layer.bias else 2]]


def _suffixes(layer: nn.RNNBase) -> Iterator[str]:
    for depth in range(layer.num_layers):
        yield f"_l{depth}"
        if layer.bidirectional:
            yield f"_l{depth}_reverse"


@dataclass(frozen=True)
class RecurrentCall:
    """What went into a call of a recurrent layer or cell, in one row and back.

    Attributes:
        inputs: what it read.
        states: h and, of an LSTM, c to begin with; None where they were not given.
        weights: as they were in this call.
        output: every h_t of the last layer; None where it was changed since.
    """

    inputs: Tensor
    states: tuple[Tensor | None, ...]
    weights: tuple[Tensor, ...]
    output: Tensor | None

    @classmethod
    def of(cls, layer: Any, row: Sequence[Any]) -> "RecurrentCall":
        """Take apart what a rule is given."""
        states = 1 + _number_of_states(layer)
        return cls(row[0], tuple(row[1:states]), tuple(row[states:-1]), row[-1])


def what_goes_in(
    layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], _: Tensor
) -> tuple[Tensor | None, ...] | None:
    """Return the tensors that a call depends on; None for packed sequences."""
    names = cell_parameters(layer) if isinstance(layer, nn.RNNCellBase) else layer_parameters(layer)
    given = dict(zip(("input", "hx"), args, strict=False)) | kwargs
    inputs, states = given.get("input"), given.get("hx")
    if not isinstance(inputs, Tensor):
        return None
    if states is None:
        states = (None,) * _number_of_states(layer)
    return inputs, *([states] if isinstance(states, Tensor) else states), *(getattr(layer, name) for name in names)


def _number_of_states(layer: Any) -> int:
    return 2 if isinstance(layer, nn.LSTM) else 1


def recurrent_cell(
    layer: Any, row: tuple[Any, ...], output_gradients: tuple[Tensor | None, ...], arrange: Arrange
) -> dict[str, Contributions]:
    """Rule of ``GRUCell`` and ``RNNCell``: a layer that reads one position.

    An ``LSTMCell`` has none: whether the gradient that reaches c contains what comes by way of h depends on the kernel.
    """
    call, (of_hidden,) = RecurrentCall.of(layer, row), output_gradients
    if call.output is None or of_hidden is None:
        raise RuntimeError("the output of a cell was changed in place")  # which autograd itself refuses
    before = torch.zeros_like(call.output) if call.states[0] is None else call.states[0]
    scan = Scan(
        inputs=call.inputs.unsqueeze(0),
        start=before,
        after=call.output.unsqueeze(0),
        cell=before,
        weights=call.weights,
        of_outputs=of_hidden.unsqueeze(0),
        of_hidden=of_hidden,
        of_cell=of_hidden,
    )
    mode = "GRU" if isinstance(layer, nn.GRUCell) else f"RNN_{layer.nonlinearity.upper()}"
    gradients = _GATES[mode](scan)
    return _contributions(layer, cell_parameters(layer), scan, gradients, lambda values: arrange(values[0], 1))


def recurrent_layer(
    layer: Any, row: tuple[Any, ...], output_gradients: tuple[Tensor | None, ...], arrange: Arrange
) -> dict[str, Contributions]:
    """Rule of ``LSTM``, ``GRU`` and ``RNN``."""
    found: dict[str, Contributions] = {}

    def arranged(values: Tensor) -> Tensor:
        """Return values of shape (T, n, ...) as (n, T, ...)."""
        return arrange(values.transpose(0, 1) if layer.batch_first else values, 2)

    stack = _Stack(layer, RecurrentCall.of(layer, row))
    for suffix, scan, gradients in stack.scans(output_gradients):
        found |= _contributions(layer, _names(layer, suffix), scan, gradients, arranged)
    return found


def _contributions(
    layer: Any,
    names: Sequence[str],
    scan: Scan,
    gradients: tuple[Tensor, Tensor],
    arranged: Callable[[Tensor], Tensor],
) -> dict[str, Contributions]:
    """Return those of two linear maps, of inputs and of the hidden state before; values of shape (T, n, ...)."""
    found: dict[str, Contributions] = {}
    sides = [arranged(gradients[0])]
    sides.append(sides[0] if gradients[1] is gradients[0] else arranged(gradients[1]))
    shared = Factor(sides[0]) if sides[1] is sides[0] else None
    for name, b, a in zip(names[:2], sides, (scan.inputs, scan.before), strict=True):
        if getattr(layer, name).requires_grad:
            found[name] = Outer(arranged(a), b, getattr(layer, name).shape, shared)
    for name, b in zip(names[2:], sides, strict=False):
        if getattr(layer, name).requires_grad:
            found[name] = Explicit(b.sum(1))
    return found


class _Stack:
    """Layers on top of each other, in one or two directions, with time first."""

    def __init__(self, layer: Any, call: RecurrentCall) -> None:
        self._layer = layer
        self._directions = 2 if layer.bidirectional else 1
        self._weights = call.weights
        inputs = self._time_first(call.inputs)
        self._zeros = inputs.new_zeros(self._directions * layer.num_layers, inputs.shape[1], layer.hidden_size)
        self._states = [self._zeros if state is None else state for state in call.states]
        # What each layer reads, and what the last one puts out.
        self._values = [inputs]
        for depth in range(layer.num_layers - 1):
            self._values.append(self._run(depth))
        self._values.append(self._run(layer.num_layers - 1) if call.output is None else self._time_first(call.output))

    def _time_first(self, values: Tensor) -> Tensor:
        return values.transpose(0, 1) if self._layer.batch_first else values

    def _weights_of(self, scan: int) -> tuple[Tensor, ...]:
        size = 4 if self._layer.bias else 2
        return self._weights[scan * size : (scan + 1) * size]

    def _run(self, depth: int) -> Tensor:
        """Return what one layer puts out, shape (T, n, directions H)."""
        scans = slice(depth * self._directions, (depth + 1) * self._directions)
        states = [state[scans].contiguous() for state in self._states]
        weights = [weight for scan in range(scans.start, scans.stop) for weight in self._weights_of(scan)]
        options = (self._layer.bias, 1, 0.0, False, self._layer.bidirectional, False)
        fused, state = _FUSED[self._layer.mode], states if len(states) > 1 else states[0]
        with torch.backends.cudnn.flags(enabled=False):  # it warns where weights do not lie side by side
            output: Tensor = fused(self._values[depth], state, weights, *options)[0]
        return output

    def scans(self, output_gradients: tuple[Tensor | None, ...]) -> Iterator[tuple[str, Scan, tuple[Tensor, Tensor]]]:
        """Go down through the layers; yield each direction's suffix, what it did, and the gradients of its gates."""
        of_output, *of_states = output_gradients
        gradients_of_states = [self._zeros if gradient is None else gradient for gradient in (*of_states, None)]
        above = torch.zeros_like(self._values[-1]) if of_output is None else self._time_first(of_output)
        suffixes = list(_suffixes(self._layer))
        for depth in reversed(range(self._layer.num_layers)):
            below: Tensor | None = None
            for direction in range(self._directions):
                index = depth * self._directions + direction
                scan = self._scan(depth, direction, above, [gradient[index] for gradient in gradients_of_states])
                gradients = _GATES[self._layer.mode](scan)
                if depth > 0:
                    through = _turned(gradients[0], direction) @ scan.weights[0]
                    below = through if below is None else below + through
                yield suffixes[index], scan, gradients
            above = above if below is None else below

    def _scan(self, depth: int, direction: int, of_output: Tensor, of_states: Sequence[Tensor]) -> Scan:
        index, units = depth * self._directions + direction, self._layer.hidden_size
        own = slice(direction * units, (direction + 1) * units)
        after = _turned(self._values[depth + 1][..., own], direction)
        of_outputs = _turned(of_output[..., own], direction)
        return Scan(
            inputs=_turned(self._values[depth], direction),
            start=self._states[0][index],
            after=after,
            cell=self._states[-1][index],
            weights=self._weights_of(index),
            of_outputs=of_outputs,
            of_hidden=of_outputs[-1] + of_states[0],
            of_cell=of_states[1],
        )


def _turned(values: Tensor, direction: int) -> Tensor:
    """Return values in the order in which a direction reads them, or back."""
    return values.flip(0) if direction else values
