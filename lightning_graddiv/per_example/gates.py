"""Gradients of the gates of a recurrent layer, by hand: from what its outputs receive, back through time.

What a layer read and what it put out are known, and with them every h_{t-1}: so all gates of all positions follow from
one product of matrices. Only the gradient has to go from position to position, in as few operations as can be.
Derivatives are formed by torch's own backward functions, one pass over memory each.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_through_sigmoid = torch.ops.aten.sigmoid_backward.default
"""(gradient of the sigmoid, the sigmoid) -> gradient of what went in."""

_through_tanh = torch.ops.aten.tanh_backward.default

_sigmoid_slope_into = torch.ops.aten.sigmoid_backward.grad_input
_tanh_slope_into = torch.ops.aten.tanh_backward.grad_input

_PARTS = 4
"""In which a sequence is gone back through: slopes of all its positions at once would be the peak of memory."""


@dataclass(frozen=True)
class Scan:
    """One direction of one layer, in the order in which it reads: T positions of n rows, H units.

    Attributes:
        inputs: x_t, shape (T, n, in).
        start: h_0, shape (n, H).
        after: h_t, shape (T, n, H).
        cell: c_0, shape (n, H); only an LSTM looks at it.
        weights: of the input, (g H, in), and of h, (g H, H), followed by their biases where there are any.
        of_outputs: the gradient of each h_t as an output, shape (T, n, H).
        of_hidden: the gradient of h_T, as an output and as the last state, shape (n, H).
        of_cell: the gradient of c_T, shape (n, H), likewise.
    """

    inputs: Tensor
    start: Tensor
    after: Tensor
    cell: Tensor
    weights: tuple[Tensor, ...]
    of_outputs: Tensor
    of_hidden: Tensor
    of_cell: Tensor

    @property
    def before(self) -> Tensor:
        """h_{t-1}, shape (T, n, H): copied whenever it is asked for, and not held on the way back."""
        before = torch.empty_like(self.after)  # which keeps the order in memory
        before[0], before[1:] = self.start, self.after[:-1]
        return before

    def sides(self, gates: int) -> tuple[Tensor, Tensor]:
        """Return ``x W' + b`` and ``h W' + b`` for all positions, shape (T, n, g, H)."""
        of_input, of_hidden, *biases = self.weights
        products = [_product(self.inputs, of_input, *biases[:1]), _product(self.before, of_hidden, *biases[1:])]
        x, h = (product.unflatten(-1, (gates, -1)) for product in products)
        return x, h

    def sum(self, gates: int) -> Tensor:
        """Return the sum of both sides, shape (T, n, g, H), in the order in which the inputs lie in memory."""
        of_input, of_hidden, *biases = self.weights
        is_turned = not self.inputs.is_contiguous()  # as where the batch comes first
        x, h = (values.transpose(0, 1) if is_turned else values for values in (self.inputs, self.before))
        both: Tensor = _product(x, of_input, *([biases[0] + biases[1]] if biases else []))
        both.view(-1, both.shape[-1]).addmm_(h.flatten(0, 1), of_hidden.T)  # a view, or an error: never a copy
        by_gate: Tensor = both.unflatten(-1, (gates, -1))
        return by_gate.transpose(0, 1) if is_turned else by_gate

    def back(self, gate_gradients: Tensor, position: int) -> Tensor:
        """Return the gradient of h at the position before, from outside of the layer and through the gates."""
        return torch.addmm(self.of_outputs[position - 1], gate_gradients.flatten(1), self.weights[1])


GateGradients = Callable[[Scan], tuple[Tensor, Tensor]]
"""The gradients of ``x W' + b`` and of ``h W' + b``, shape (T, n, g H)."""


def _product(values: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
    return torch.nn.functional.linear(values, weight, *bias)


def lstm_gates(scan: Scan) -> tuple[Tensor, Tensor]:
    """``c_t = f c_{t-1} + i g``, ``h_t = o tanh(c_t)``.

    Where the gates were, their slopes come to lie, and then their gradients: little more memory is used than for both.
    """
    gates = scan.sum(4)
    gates[:, :, 2].mul_(2)
    gates.sigmoid_()  # of all at once: tanh(x) = 2 sigmoid(2x) - 1
    i, f, g, o = gates.unbind(2)
    g.mul_(2).sub_(1)
    cells = gates.new_empty(len(gates) + 1, *scan.cell.shape)
    cells[0] = scan.cell
    torch.mul(i, g, out=cells[1:])
    for before, after, kept in zip(cells[:-1], cells[1:], f, strict=True):
        after.addcmul_(kept, before)
    of_hidden, of_cell = scan.of_hidden, scan.of_cell
    some = math.ceil(len(gates) / _PARTS)
    for start in reversed(range(0, len(gates), some)):
        part = slice(start, start + some)
        to_cell, kept = _lstm_slopes(gates[part], cells[start : start + some + 1])
        before_cell, after_cell = gates[part, :, :3].unbind(0), o[part].unbind(0)
        for t in reversed(range(len(to_cell))):
            of_cell = torch.addcmul(of_cell, of_hidden, to_cell[t])
            before_cell[t].mul_(of_cell.unsqueeze(1))
            after_cell[t].mul_(of_hidden)
            if start + t > 0:
                of_hidden, of_cell = scan.back(gates[start + t], start + t), of_cell * kept[t]
    found = gates.flatten(2)
    return found, found


def _lstm_slopes(gates: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """Put slopes in the place of some positions' gates; return how h follows c there, and the share of c that is kept.

    Args:
        gates: i, f, g and o, shape (t, n, 4, H).
        cells: c before each of them and after the last, shape (t + 1, n, H); all but the first are overwritten.
    """
    i, f, g, o = gates.unbind(2)
    kept = f.clone()
    _sigmoid_slope_into(cells[:-1], f, grad_input=f)
    to_cell = cells[1:].tanh_()
    for sigmoid, tanh in ((o, to_cell), (i, g)):
        of_sigmoid = _through_sigmoid(tanh, sigmoid)
        _tanh_slope_into(sigmoid, tanh, grad_input=tanh)
        sigmoid.copy_(of_sigmoid)
    return to_cell, kept


def gru_gates(scan: Scan) -> tuple[Tensor, Tensor]:
    """``h_t = (1 - z) n + z h_{t-1}``, ``n = tanh(x_n + r h_n)``: r stands before the candidate's hidden side only."""
    x, h = scan.sides(3)
    r, z = (x[:, :, :2] + h[:, :, :2]).sigmoid_().unbind(2)
    n = torch.addcmul(x[:, :, 2], r, h[:, :, 2]).tanh_()
    to_candidate = _through_tanh(1 - z, n)
    slopes = torch.stack(
        [
            _through_sigmoid(to_candidate * h[:, :, 2], r),
            _through_sigmoid(scan.before - n, z),
            to_candidate * r,
        ],
        2,
    )
    of_hidden, received = scan.of_hidden, []
    for t in reversed(range(len(slopes))):
        received.append(of_hidden)
        slopes[t].mul_(of_hidden.unsqueeze(1))
        if t > 0:
            of_hidden = scan.back(slopes[t], t).addcmul_(of_hidden, z[t])
    candidate = to_candidate.mul_(torch.stack(received[::-1]))
    return torch.stack([slopes[:, :, 0], slopes[:, :, 1], candidate], 2).flatten(2), slopes.flatten(2)


def tanh_gates(scan: Scan) -> tuple[Tensor, Tensor]:
    """``h_t = tanh(x_h + h_h)``."""
    return _simple_gates(scan, _through_tanh(torch.ones_like(scan.after), scan.after))


def relu_gates(scan: Scan) -> tuple[Tensor, Tensor]:
    """``h_t = max(0, x_h + h_h)``."""
    return _simple_gates(scan, (scan.after > 0).to(scan.after.dtype))


def _simple_gates(scan: Scan, slopes: Tensor) -> tuple[Tensor, Tensor]:
    of_hidden = scan.of_hidden
    for t in reversed(range(len(slopes))):
        slopes[t].mul_(of_hidden)
        if t > 0:
            of_hidden = scan.back(slopes[t], t)
    return slopes, slopes
