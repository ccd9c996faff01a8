"""The rule of each layer type: from a layer's inputs and output gradients to the contributions of its examples.

One registry and one signature. A rule holds for exactly its type, since a subclass may compute something else, and for
the options that it names; everything else is left to another engine.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_graddiv.per_example.convolutions import convolution_weight
from lightning_graddiv.per_example.factors import Contributions, Explicit, Factor, Lookup
from lightning_graddiv.per_example.linear_maps import Outer, Rows
from lightning_graddiv.per_example.recurrent import (
    cell_parameters,
    has_known_gates,
    is_whole,
    layer_parameters,
    recurrent_cell,
    recurrent_layer,
    what_goes_in,
)


class Layout(Enum):
    """Where the examples are among a layer's leading dimensions, those that its parameters do not see."""

    FIRST = "(n, ...)"
    FOLDED = "(n k, ...), an example's rows together"
    STRIDED = "(k n, ...), an example's rows n apart"
    SECOND = "(T, n, ...)"

    def fits(self, leading: tuple[int, ...], examples: int) -> bool:
        """Tell whether leading dimensions of this shape can hold so many examples in this way."""
        if not leading or examples < 1:
            return False
        if self is Layout.FIRST:
            return leading[0] == examples
        if self is Layout.SECOND:
            return len(leading) > 1 and leading[1] == examples
        return leading[0] > examples and leading[0] % examples == 0

    def arrange(self, values: Tensor, leading: int, examples: int) -> Tensor:
        """Return the values with shape (n, T, ...), where the first ``leading`` dimensions hold examples and positions.

        Raises:
            ValueError: they do not fit.
        """
        shape = values.shape[:leading]
        if not self.fits(shape, examples):
            raise ValueError(f"{examples} examples cannot lie in {tuple(shape)} as {self.value}")
        if self is Layout.FIRST and leading <= 2:
            return values.unsqueeze(1) if leading == 1 else values
        trailing = values.shape[leading:]
        if self is Layout.SECOND:
            values = values.transpose(0, 1)
        elif self is Layout.STRIDED:
            values = values.unflatten(0, (-1, examples)).transpose(0, 1)
        return values.reshape(examples, math.prod(shape) // examples, *trailing)


@dataclass(eq=False)
class Arrangement:
    """A layout together with the number of examples.

    Attributes:
        layout: where the examples are.
        examples: n.
    """

    layout: Layout
    examples: int

    def __call__(self, values: Tensor, leading: int) -> Tensor:
        """Return the values with shape (n, T, ...)."""
        return self.layout.arrange(values, leading, self.examples)

    def summed(self, values: Tensor, leading: int) -> Tensor:
        """Return the values summed over an example's positions, shape (n, ...): as they are if rows are examples."""
        return values if self.has_rows(values, leading) else self(values, leading).sum(1)

    def has_rows(self, values: Tensor, leading: int) -> bool:
        """Tell whether each row of the values is an example."""
        return leading == 1 and self.layout is Layout.FIRST and values.shape[0] == self.examples > 0


Leading = Callable[[Any, Tensor], int]
"""(layer, input) -> how many leading dimensions of the input the layer's parameters do not see."""

Rule = Callable[[Any, Any, Any, Arrangement], dict[str, Contributions]]
"""(layer, input, gradient of the output, arrangement) -> contributions to each parameter of the layer that has one.

Where a layer has several of them, both are tuples: what went in and, last, the first of what came out if that is kept
(None where it was changed since); and the gradient of all that came out (None where there is none).
"""

Inputs = Callable[[Any, tuple[Any, ...], dict[str, Any], Tensor], tuple[Tensor | None, ...] | None]
"""(layer, arguments, keywords, the first of what came out) -> what a call depends on, that which holds the examples
first; None: no rule."""


def _weight_and_bias(_: Any) -> Sequence[str]:
    return ("weight", "bias")


@dataclass(frozen=True)
class LayerType:
    """What is known of a layer type.

    Attributes:
        contributions: the rule.
        leading: where its examples may lie.
        accepts: whether the rule holds for this layer's options.
        parameters: what the layer's parameters are called.
        inputs: what its rule needs of a call, if that is several tensors. None: its one argument.
        keeps_output: whether its rule needs what came out, too.
    """

    contributions: Rule
    leading: Leading
    accepts: Callable[[Any], bool]
    parameters: Callable[[Any], Sequence[str]] = _weight_and_bias
    inputs: Inputs | None = None
    keeps_output: bool = False


LAYER_TYPES: dict[type[nn.Module], LayerType] = {}


def layer_type(layer: nn.Module) -> LayerType | None:
    """Return what is known of a layer; None for types and options without a rule."""
    found = LAYER_TYPES.get(_plain_type(layer))
    if found is None or "forward" in layer.__dict__ or not found.accepts(layer):
        return None
    return found


def mixes_examples(layer: nn.Module) -> bool:
    """Tell batch normalisation with the batch's own statistics, where an example's output depends on the others."""
    return isinstance(layer, nn.modules.batchnorm._BatchNorm) and (layer.training or layer.running_mean is None)


def _plain_type(layer: nn.Module) -> type[nn.Module]:
    """Return the layer's type; FSDP2 makes a subclass of it that computes the same."""
    kind = type(layer)
    bases = [base.__name__ for base in kind.__bases__]
    return kind.__bases__[-1] if len(bases) == 2 and bases[0] == "FSDPModule" else kind


def rule(
    *types: type[nn.Module],
    leading: Leading,
    accepts: Callable[[Any], bool] = lambda _: True,
    parameters: Callable[[Any], Sequence[str]] = _weight_and_bias,
    inputs: Inputs | None = None,
    keeps_output: bool = False,
) -> Callable[[Rule], Rule]:
    """Register a rule for exactly these types."""

    def register(function: Rule) -> Rule:
        """Enter the decorated rule."""
        LAYER_TYPES.update(
            dict.fromkeys(types, LayerType(function, leading, accepts, parameters, inputs, keeps_output))
        )
        return function

    return register


def _all_but_last(_: Any, inputs: Tensor) -> int:
    return inputs.ndim - 1


def _all(_: Any, inputs: Tensor) -> int:
    return inputs.ndim


def _all_but_normalized(layer: Any, inputs: Tensor) -> int:
    return inputs.ndim - len(layer.normalized_shape)


def _first(_: Any, __: Tensor) -> int:
    return 1


def _first_if_batched(dimensions: int) -> Leading:
    """Convolutions, instance norms and cells also take a single example without a leading dimension."""
    return lambda _, inputs: 1 if inputs.ndim == dimensions + 2 else 0


@rule(nn.Linear, leading=_all_but_last)
def _linear(
    layer: nn.Linear, inputs: Tensor, output_gradients: Tensor, arrange: Arrangement
) -> dict[str, Contributions]:
    leading = output_gradients.ndim - 1
    weight, bias = layer.weight, layer.bias
    found: dict[str, Contributions] = {}
    if arrange.has_rows(output_gradients, leading):
        shared = Factor(output_gradients)
        if _wants(weight):
            found["weight"] = Rows(inputs, output_gradients, weight.shape, shared)
        if _wants(bias):
            found["bias"] = Explicit(output_gradients, shared)
        return found
    b = arrange(output_gradients, leading)
    if _wants(weight):
        found["weight"] = Outer(arrange(inputs, leading), b, weight.shape)
    if _wants(bias):
        found["bias"] = Explicit(b.sum(1))
    return found


def _convolution(
    layer: Any, inputs: Tensor, output_gradients: Tensor, arrange: Arrangement
) -> dict[str, Contributions]:
    found: dict[str, Contributions] = {}
    if _wants(layer.weight):
        found["weight"] = convolution_weight(layer, inputs, output_gradients, arrange)
    if _wants(layer.bias):
        found["bias"] = Explicit(arrange.summed(output_gradients.flatten(2).sum(2), 1))
    return found


for _dimensions, _type in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), 1):
    rule(_type, leading=_first_if_batched(_dimensions))(_convolution)


# Renormalising writes to the table, and frequencies are those of the whole batch.
@rule(nn.Embedding, leading=_all, accepts=lambda layer: layer.max_norm is None and not layer.scale_grad_by_freq)
def _embedding(
    layer: nn.Embedding, inputs: Tensor, output_gradients: Tensor, arrange: Arrangement
) -> dict[str, Contributions]:
    if not _wants(layer.weight):
        return {}
    index = arrange(inputs, inputs.ndim).long()
    b = arrange(output_gradients, inputs.ndim)
    if layer.padding_idx is not None:
        b = b.masked_fill((index == layer.padding_idx)[..., None], 0.0)
    return {"weight": Lookup(index, b, layer.weight.shape)}


def _affine(
    layer: Any, normalized: Tensor, output_gradients: Tensor, arrange: Arrangement, leading: int
) -> dict[str, Contributions]:
    """Contributions to a scale, sum b x, and a shift, sum b, over an example's positions."""
    found: dict[str, Contributions] = {}

    seen = leading + layer.weight.ndim
    has_space = output_gradients.ndim > seen
    if has_space:
        normalized, output_gradients = normalized.flatten(seen), output_gradients.flatten(seen)
    if _wants(layer.weight):
        products = torch.linalg.vecdot(normalized, output_gradients) if has_space else normalized * output_gradients
        found["weight"] = Explicit(arrange.summed(products, leading))
    if _wants(getattr(layer, "bias", None)):
        sums = output_gradients.sum(-1) if has_space else output_gradients
        found["bias"] = Explicit(arrange.summed(sums, leading))
    return found


@rule(nn.LayerNorm, leading=_all_but_normalized)
def _layer_norm(
    layer: nn.LayerNorm, inputs: Tensor, output_gradients: Tensor, arrange: Arrangement
) -> dict[str, Contributions]:
    leading = _all_but_normalized(layer, inputs)
    normalized = F.layer_norm(inputs, layer.normalized_shape, None, None, layer.eps)
    return _affine(layer, normalized, output_gradients, arrange, leading)


@rule(nn.RMSNorm, leading=_all_but_normalized)
def _rms_norm(
    layer: nn.RMSNorm, inputs: Tensor, output_gradients: Tensor, arrange: Arrangement
) -> dict[str, Contributions]:
    leading = _all_but_normalized(layer, inputs)
    normalized = F.rms_norm(inputs, layer.normalized_shape, None, layer.eps)
    return _affine(layer, normalized, output_gradients, arrange, leading)


def _normalized_with(
    _: nn.GroupNorm, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> tuple[Tensor | None, ...] | None:
    """Return a group norm's input, and the mean and the inverse deviation of each group where autograd has them.

    What hooks hide, as a checkpoint's do, is not asked for: they would run part of the model again.
    """
    inputs, node = args[0] if args else kwargs.get("input"), output.grad_fn
    # Of an output in 16 bits they would be rounded with all else that the layer's gradient has the type of.
    if node is None or node.name() != "NativeGroupNormBackward0" or output.dtype not in (torch.float32, torch.float64):
        return inputs, None, None
    saved = [getattr(node, f"_raw_saved_result{i}", None) for i in (1, 2)]
    if any(one is None or getattr(one, "unpack_hook", None) is not None for one in saved):
        return inputs, None, None
    return inputs, *(getattr(node, f"_saved_result{i}") for i in (1, 2))


@rule(nn.GroupNorm, leading=_first, inputs=_normalized_with)
def _group_norm(
    layer: nn.GroupNorm,
    inputs: tuple[Tensor, Tensor | None, Tensor | None],
    output_gradients: tuple[Tensor],
    arrange: Arrangement,
) -> dict[str, Contributions]:
    """By the library's own kernel: the channels of every row become those of a single one."""
    x, mean, deviation = inputs
    (b,) = output_gradients
    rows, channels, space = *x.shape[:2], math.prod(x.shape[2:])
    if mean is None or deviation is None:
        _, mean, deviation = torch.native_group_norm(
            x.contiguous(), None, None, rows, channels, space, layer.num_groups, layer.eps
        )
    in_one = (1, rows * channels, space)
    _, of_scales, of_shifts = torch.ops.aten.native_group_norm_backward(
        b.reshape(in_one),
        x.reshape(in_one),
        mean.view(1, -1),
        deviation.view(1, -1),
        x.new_empty(rows * channels),  # of the scales, which only the gradient of the input depends on
        *in_one,
        rows * layer.num_groups,
        [False, _wants(layer.weight), _wants(layer.bias)],
    )
    found = {"weight": of_scales, "bias": of_shifts}
    return {
        name: Explicit(arrange.summed(values.view(rows, channels), 1))
        for name, values in found.items()
        if _wants(getattr(layer, name))
    }


def _batch_statistics(
    layer: Any, inputs: Tensor, output_gradients: Tensor, arrange: Arrangement
) -> dict[str, Contributions]:
    """Normalise with the statistics that the layer's forward pass used: its running ones, or the input's own."""
    is_instance_norm = isinstance(layer, nn.modules.instancenorm._InstanceNorm)
    normalize = F.instance_norm if is_instance_norm else F.batch_norm
    if layer.training or layer.running_mean is None:
        mean = variance = None
    else:
        mean, variance = (statistic.to(inputs.dtype) for statistic in (layer.running_mean, layer.running_var))
    normalized = normalize(inputs, mean, variance, None, None, mean is None, 0.0, layer.eps)
    return _affine(layer, normalized, output_gradients, arrange, 1)


for _dimensions, _norm in enumerate((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), 1):
    rule(_norm, leading=_first_if_batched(_dimensions))(_batch_statistics)
rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, leading=_first)(_batch_statistics)


def _sequences_if_batched(_: Any, inputs: Tensor) -> int:
    return 2 if inputs.ndim == 3 else 0


rule(
    nn.LSTM,
    nn.GRU,
    nn.RNN,
    leading=_sequences_if_batched,
    accepts=has_known_gates,
    parameters=layer_parameters,
    inputs=what_goes_in,
    keeps_output=True,
)(recurrent_layer)
rule(
    nn.GRUCell,
    nn.RNNCell,
    leading=_first_if_batched(0),
    accepts=is_whole,
    parameters=cell_parameters,
    inputs=what_goes_in,
    keeps_output=True,
)(recurrent_cell)


def _wants(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.requires_grad and not torch.is_complex(parameter)
