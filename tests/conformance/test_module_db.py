"""Every module type of torch that has parameters, with the options that torch's own tests build it with.

torch lists them in ``torch.testing._internal.common_modules``, which takes a while to import and sets global state:
hence only here, and only once a test asks for it. Torch samples single examples, or pairs; the inputs here are larger
batches for the same options.
"""

import importlib.util
import sys
import types
import unittest
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from tests.conformance.reference import RELATIVE, Verdict, agrees, curved, judge
from tests.devices import DEVICE

N = 7
T = 4
MOST_OPTIONS = 8
"""Sets of options of one type that are tried, evenly spaced among those that torch tries."""

pytestmark = [
    pytest.mark.conformance,
    # Torch telling that it takes a slower way with some options.
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning"),
    pytest.mark.filterwarnings("ignore:linear_cross_entropy. ``options`` ignored:UserWarning"),
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk:UserWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
]

KNOWN = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "LazyConv1d",
    "LazyConv2d",
    "LazyConv3d",
    "LazyConvTranspose1d",
    "LazyConvTranspose2d",
    "LazyConvTranspose3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "RMSNorm",
    "Bilinear",
    "Embedding",
    "Linear",
    "LinearCrossEntropyLoss",
    "PReLU",
    "GRU",
    "GRUCell",
    "LSTM",
    "LSTMCell",
    "RNN",
    "RNNCell",
    "MultiheadAttention",
    "Transformer",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
"""Types with parameters in torch 2.13; each has its inputs below."""

Batch = tuple[Tensor, ...]


# Inputs: from a module to a batch of N examples, with the examples first.


def spatial(dimensions: int) -> Callable[[Any], Batch]:
    def inputs(net: Any) -> Batch:
        return (torch.randn(N, _channels(net), *(6, 5, 4)[:dimensions]),)

    return inputs


def _channels(net: Any) -> int:
    width = next(getattr(net, name) for name in ("in_channels", "num_features", "num_channels") if hasattr(net, name))
    return width or 4  # zero: of a lazy layer, which takes what it is given


def transformer_width(net: nn.Module) -> int:
    return next(part.embed_dim for part in net.modules() if isinstance(part, nn.MultiheadAttention))


def sequence(net: Any) -> Batch:
    return (torch.randn(N, T, transformer_width(net)),)


def two_sequences(net: Any) -> Batch:
    return torch.randn(N, T, transformer_width(net)), torch.randn(N, T - 1, transformer_width(net))


def query_key_value(net: Any) -> Batch:
    return torch.randn(N, T, net.embed_dim), torch.randn(N, T + 1, net.kdim), torch.randn(N, T + 1, net.vdim)


def cell(net: Any) -> Batch:
    states = 2 if isinstance(net, nn.LSTMCell) else 1
    return torch.randn(N, net.input_size), *(torch.randn(N, net.hidden_size) for _ in range(states))


def recurrent(net: Any) -> Batch:
    layers = net.num_layers * (2 if net.bidirectional else 1)
    widths = [net.proj_size or net.hidden_size]
    widths += [net.hidden_size] if isinstance(net, nn.LSTM) else []
    return torch.randn(N, T, net.input_size), *(torch.randn(N, layers, width) for width in widths)


def rows_and_targets(net: Any) -> Batch:
    return torch.randn(N, net.linear.in_features), torch.randint(net.num_classes, (N, *net.out_features))


INPUTS: dict[str, Callable[[Any], Batch]] = {
    "Bilinear": lambda net: (torch.randn(N, net.in1_features), torch.randn(N, net.in2_features)),
    "Embedding": lambda net: (torch.randint(net.num_embeddings, (N, T)),),
    "GRU": recurrent,
    "GRUCell": cell,
    "GroupNorm": spatial(2),
    "LSTM": recurrent,
    "LSTMCell": cell,
    "LayerNorm": lambda net: (torch.randn(N, 3, *net.normalized_shape),),
    "Linear": lambda net: (torch.randn(N, T, net.in_features),),
    "LinearCrossEntropyLoss": rows_and_targets,
    "MultiheadAttention": query_key_value,
    "PReLU": lambda net: (torch.randn(N, net.num_parameters, 3),),
    "RMSNorm": lambda net: (torch.randn(N, 3, *net.normalized_shape),),
    "RNN": recurrent,
    "RNNCell": cell,
    "Transformer": two_sequences,
    "TransformerDecoderLayer": two_sequences,
    "TransformerEncoder": sequence,
    "TransformerEncoderLayer": sequence,
}
for _dimensions in (1, 2, 3):
    for _name in ("BatchNorm", "InstanceNorm", "Conv", "ConvTranspose", "LazyConv", "LazyConvTranspose"):
        INPUTS[f"{_name}{_dimensions}d"] = spatial(_dimensions)


# Outputs: whatever comes out, with the examples first again.


def loss_of(net: nn.Module, batch: Batch) -> Tensor:
    out = run(net, batch)
    return curved(out).mean() if out.ndim > 0 else out  # a loss module's own


def run(net: Any, batch: Batch) -> Tensor:
    turned = not next((part.batch_first for part in net.modules() if hasattr(part, "batch_first")), True)
    if isinstance(net, nn.RNNBase):
        return _run_recurrent(net, batch, turned)
    if isinstance(net, nn.LSTMCell):
        return torch.cat(net(batch[0], batch[1:]), 1)
    arguments = [part.transpose(0, 1) for part in batch] if turned else batch
    out = net(*arguments)
    weights = [out[1].flatten(1)] if isinstance(out, tuple) else []
    out = out[0] if isinstance(out, tuple) else out
    out = out.transpose(0, 1) if turned else out
    return torch.cat([out.reshape(len(out), -1), *weights], 1) if out.ndim > 0 else out


def _run_recurrent(net: nn.RNNBase, batch: Batch, turned: bool) -> Tensor:
    x, *states = batch
    states = [state.transpose(0, 1).contiguous() for state in states]
    out, last = net(x.transpose(0, 1) if turned else x, tuple(states) if len(states) > 1 else states[0])
    out = out.transpose(0, 1) if turned else out
    last = last if isinstance(last, tuple) else (last,)
    return torch.cat([out.flatten(1), *(state.transpose(0, 1).flatten(1) for state in last)], 1)


# What torch lists, and what becomes of it.


class Tried(NamedTuple):
    name: str
    options: str
    verdict: Verdict
    refusal: str | None


@pytest.fixture(scope="module")
def module_infos() -> Iterator[dict[str, Any]]:
    """Torch's list, by the type's name; the global state that the import sets is put back."""
    before = torch.get_default_dtype(), torch.get_num_threads(), torch.random.get_rng_state()
    if importlib.util.find_spec("expecttest") is None:  # of which torch only wants a base class for its own tests
        stand_in = types.ModuleType("expecttest")
        stand_in.TestCase = unittest.TestCase
        sys.modules["expecttest"] = stand_in
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with mock.patch.object(torch.backends, "disable_global_flags"):  # which would freeze them for good
            from torch.testing._internal.common_modules import module_db

        yield {info.module_cls.__name__: info for info in module_db}
    torch.set_default_dtype(before[0])
    torch.set_num_threads(before[1])
    torch.random.set_rng_state(before[2])


@pytest.fixture(scope="module")
def constructors(module_infos: dict[str, Any]) -> dict[str, Callable[[torch.dtype], list[Callable[[], nn.Module]]]]:
    """Of every type that has parameters: how to build it, with each set of options."""
    found = {name: lambda dtype, info=info: builders(info, dtype) for name, info in module_infos.items()}
    return {name: of for name, of in found.items() if of(torch.float64)}


def builders(info: Any, dtype: torch.dtype) -> list[Callable[[], nn.Module]]:
    """Return how to build a type, once for each set of options that torch tries and that has parameters."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    samples = info.module_inputs_func(info, device=DEVICE, dtype=dtype, requires_grad=False, training=True)
    by_options = {}
    for sample in samples:
        given = sample.constructor_input
        by_options.setdefault(
            repr((given.args, given.kwargs)), lambda given=given: info.module_cls(*given.args, **given.kwargs)
        )
    chosen = list(by_options.values())
    chosen = chosen[:: max(1, -(-len(chosen) // MOST_OPTIONS))]
    return [build for build in chosen if any(True for _ in build().parameters())]


def tried(name: str, build: Callable[[], nn.Module], dtype: torch.dtype, training: bool) -> Tried:
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    net = build().to(dtype).train(training)
    batch = INPUTS[name](net)
    _give_it_weights(net, batch)
    return Tried(name, repr(net), judge(net, batch, loss_of, N, dtype), expected_refusal(net, batch))


def _give_it_weights(net: nn.Module, batch: Batch) -> None:
    """Materialise lazy ones; scales of one, shifts of zero and fresh statistics would hide errors."""
    with torch.no_grad():
        if any(nn.parameter.is_lazy(held) for held in net.parameters()):
            net(*batch)
        for held in net.parameters():
            held.add_(0.2 * torch.randn_like(held))
        for name, kept in net.named_buffers():
            if "running" in name:
                kept.add_(torch.rand_like(kept))


def expected_refusal(net: Any, batch: Batch) -> str | None:
    """Return why an example has no gradient of its own; None where it has."""
    if isinstance(net, nn.modules.batchnorm._BatchNorm) and (net.training or net.running_mean is None):
        # In so few dimensions some weights on the examples alone may explain what they mix.
        return "mixes the examples|weighs the examples"
    if isinstance(net, nn.LinearCrossEntropyLoss) and net.reduction == "mean":
        ignored = net.ignore_index is not None and bool((batch[1] == net.ignore_index).any())
        if net.weight is not None or ignored:
            return "weighs the examples"
    return None


@pytest.fixture(scope="module", params=RELATIVE, ids=str)
def outcomes(request: pytest.FixtureRequest, constructors: dict[str, Any]) -> Iterator[list[Tried]]:
    before = torch.get_default_dtype()
    found = []
    for name, build_with in constructors.items():
        for build in build_with(request.param):
            found.append(tried(name, build, request.param, training=True))
            if "Norm" in name:
                found.append(tried(name, build, request.param, training=False))
    yield found
    torch.set_default_dtype(before)


def test_every_type_with_parameters_is_known(constructors: dict[str, Any]):
    assert sorted(constructors) == sorted(KNOWN)


def test_none_is_wrong(outcomes: list[Tried]):
    assert [one for one in outcomes if one.verdict.kind == "wrong"] == []


def test_none_is_refused_without_reason(outcomes: list[Tried]):
    assert [one for one in outcomes if not agrees(one.verdict, one.refusal)] == []


def test_nearly_all_types_are_measured(outcomes: list[Tried]):
    assert len({one.name for one in outcomes if one.verdict.kind == "right"}) >= 35
