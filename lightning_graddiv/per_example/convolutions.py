"""The rule for the weight of a convolution."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lightning_graddiv.per_example.convolved import Convolved
from lightning_graddiv.per_example.convolved_by_products import ConvolvedByProducts
from lightning_graddiv.per_example.devices import is_accelerator


def convolution_weight(
    layer: Any, inputs: Tensor, output_gradients: Tensor, arrange: Callable[[Tensor, int], Tensor]
) -> Convolved:
    """Return the contributions of each example to the weight of a ``Conv1d``, ``Conv2d`` or ``Conv3d``."""
    inputs, padding = _padded(layer, inputs)
    kind = ConvolvedByProducts if is_accelerator(inputs.device) else Convolved
    return kind(
        arrange(inputs, 1),
        arrange(output_gradients, 1),
        layer.weight.shape,
        layer.stride,
        padding,
        layer.dilation,
        layer.groups,
    )


def _padded(layer: Any, inputs: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return the input with the padding that a weight gradient does not know, and the padding left to do."""
    if isinstance(layer.padding, str):
        reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        sides = [(r // 2, r - r // 2) if layer.padding == "same" else (0, 0) for r in reach]
    else:
        sides = [(p, p) for p in layer.padding]
    if layer.padding_mode == "zeros" and all(before == after for before, after in sides):
        return inputs, tuple(before for before, _ in sides)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    widths = [width for side in reversed(sides) for width in side]
    return F.pad(inputs, widths, mode=mode), (0,) * len(sides)
