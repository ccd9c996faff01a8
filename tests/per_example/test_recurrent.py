"""Rules of recurrent layers against the plain loop, with every combination of their options."""

import gc
import itertools
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from lightning_graddiv import MeasurementError, per_example_squared_norms
from lightning_graddiv.per_example.ghost import GhostRecorder
from lightning_graddiv.per_example.layers import Layout, layer_type
from lightning_graddiv.per_example.losses import StepLoss, measuring
from lightning_graddiv.per_example.proof import ghost_pass, prove

N, T, WIDTH, UNITS = 5, 4, 3, 6
CLOSE = {torch.float64: 1e-10, torch.float32: 1e-4}
LAYERS = {
    "LSTM": nn.LSTM,
    "GRU": nn.GRU,
    "RNN tanh": nn.RNN,
    "RNN relu": lambda *args, **kwargs: nn.RNN(*args, nonlinearity="relu", **kwargs),
}
CELLS = {
    "GRU": nn.GRUCell,
    "RNN tanh": nn.RNNCell,
    "RNN relu": lambda *args, **kwargs: nn.RNNCell(*args, nonlinearity="relu", **kwargs),
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def curved(values):
    """A loss for each row, with weights that are not alike, so that no two errors cancel by accident."""
    rows = values.flatten(1)
    return torch.linspace(0.5, 1.5, rows.shape[1], dtype=rows.dtype) @ (rows.square() + rows.sin()).T


def scaled_up(net):
    """Larger weights than torch draws: every gate is far from its middle."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2)
    return net


class Reader(nn.Module):
    """A recurrent layer on examples with their first dimension first, and a loss on some of what it puts out."""

    def __init__(self, rnn, used=("output",), starts=False):
        super().__init__()
        self.rnn, self.used, self.starts = rnn, used, starts

    def forward(self, x, *states):
        is_first = self.rnn.batch_first
        hx = None
        if self.starts:
            hx = tuple(state.transpose(0, 1).contiguous() for state in states)
            hx = hx if isinstance(self.rnn, nn.LSTM) else hx[0]
        output, after = self.rnn(x if is_first else x.transpose(0, 1), hx)
        hidden, cell = after if isinstance(after, tuple) else (after, None)
        found = {"output": output if is_first else output.transpose(0, 1), "hidden": hidden.transpose(0, 1)}
        if cell is not None:
            found["cell"] = cell.transpose(0, 1)
        return torch.cat([found[name].flatten(1) for name in self.used if name in found], 1)


def batch_for(net, dtype, examples=N, length=T):
    rows = [torch.randn(examples, length, WIDTH, dtype=dtype)]
    if getattr(net, "starts", False):
        directions = net.rnn.num_layers * (1 + net.rnn.bidirectional)
        rows += [torch.randn(examples, directions, UNITS, dtype=dtype) for _ in range(2)]
    return tuple(rows)


def mean_loss(net, batch):
    return curved(net(*batch)).mean()


def alone(net, batch, parameters, loss=mean_loss):
    """Return the squared norms of each example's gradient of each parameter, shape (parameters, n)."""
    norms = []
    for i in range(len(batch[0])):
        found = torch.autograd.grad(loss(net, [part[i : i + 1] for part in batch]), parameters, allow_unused=True)
        norms.append([0.0 if g is None else float(g.double().square().sum()) for g in found])
    return torch.tensor(norms, dtype=torch.float64).T


def measured(net, batch, loss=mean_loss):
    """Return the squared norms by the rules, with nothing left to another engine, shape (parameters, n)."""
    step = StepLoss(net, loss_fn=loss)
    with measuring(net):
        plan, _ = prove(step, batch, len(batch[0]))
        assert plan.misses == {}
        recorded, _ = ghost_pass(step, batch, len(batch[0]), plan)
    assert recorded.misses == {}
    zero = torch.zeros(len(batch[0]), dtype=torch.float64)
    return len(batch[0]) ** 2 * torch.stack([recorded.sq_norms.get(i, zero) for i in range(len(step.parameters))])


def recorded(net, batch, loss=mean_loss):
    """As :func:`measured`, with the layout taken for granted: without the proof."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    layout = Layout.FIRST if net.rnn.batch_first else Layout.SECOND
    layouts = {(index, 0): layout for index in range(len(parameters))}
    with GhostRecorder(parameters, layouts) as recorder:
        recorder.attach(net)
        recorder.begin(len(batch[0]))
        loss(net, batch).backward()
        found = recorder.finish()
    assert found.misses == {}
    return len(batch[0]) ** 2 * torch.stack([found.sq_norms[i] for i in range(len(parameters))])


def assert_measured(net, batch, loss=mean_loss, by=measured):
    parameters = [p for p in net.parameters() if p.requires_grad]
    wanted, found = alone(net, batch, parameters, loss), by(net, batch, loss)
    assert bool((wanted.sum(1) > 0).all()), "a parameter without a gradient shows nothing"
    worst = float(((found - wanted).abs() / wanted.clamp(min=1e-300)).max())
    assert worst < CLOSE[batch[0].dtype], worst


OPTIONS = list(itertools.product([1, 2, 3], [False, True], [False, True], [False, True], [False, True]))
USED = [("output",), ("hidden",), ("cell",), ("output", "hidden", "cell")]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", LAYERS)
def test_each_example_contributes_what_it_does_alone_with_all_options(name, dtype):
    for number, (depth, both, bias, first, starts) in enumerate(OPTIONS):
        rnn = LAYERS[name](
            WIDTH, UNITS, num_layers=depth, bidirectional=both, bias=bias, batch_first=first, dtype=dtype
        )
        used = USED[number % 4] if name == "LSTM" else USED[number % 2]
        net = Reader(scaled_up(rnn), used, starts)
        assert_measured(net, batch_for(net, dtype), by=recorded)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 9, 16])
@pytest.mark.parametrize("name", LAYERS)
def test_sequences_of_any_length_in_whatever_parts_the_way_back_is_taken(name, length):
    rnn = LAYERS[name](WIDTH, UNITS, num_layers=2, bidirectional=True, batch_first=True, dtype=torch.float64)
    net = Reader(scaled_up(rnn), starts=True)
    assert_measured(net, batch_for(net, torch.float64, length=length), by=recorded)


@pytest.mark.parametrize("used", USED, ids="+".join)
@pytest.mark.parametrize("name", LAYERS)
def test_whatever_the_loss_looks_at(name, used):
    if used == ("cell",) and name != "LSTM":
        pytest.skip("only an LSTM has a cell state")
    rnn = LAYERS[name](WIDTH, UNITS, num_layers=2, bidirectional=True, batch_first=True, dtype=torch.float64)
    net = Reader(scaled_up(rnn), used)
    assert_measured(net, batch_for(net, torch.float64), by=recorded)


@pytest.mark.parametrize("name", LAYERS)
def test_a_loss_that_looks_at_nothing_of_it(name):
    net = nn.ModuleDict({"rnn": LAYERS[name](WIDTH, UNITS, batch_first=True), "head": nn.Linear(WIDTH, 2)}).double()

    def loss(net, batch):
        net["rnn"](batch[0])
        return curved(net["head"](batch[0][:, 0])).mean()

    batch = batch_for(net, torch.float64)
    wanted = alone(net, batch, list(net.parameters()), loss)
    torch.testing.assert_close(measured(net, batch, loss), wanted, rtol=1e-10, atol=0)
    assert bool((wanted[:4] == 0).all())


@pytest.mark.parametrize("name", LAYERS)
def test_frozen_parameters_are_left_out(name):
    for frozen in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l1", "bias_hh_l1_reverse"):
        rnn = LAYERS[name](WIDTH, UNITS, num_layers=2, bidirectional=True, batch_first=True, dtype=torch.float64)
        rnn.get_parameter(frozen).requires_grad_(False)
        net = Reader(rnn)
        assert_measured(net, batch_for(net, torch.float64), by=recorded)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("first", [False, True])
def test_as_many_positions_as_examples(name, first):
    """Where the examples lie does not show in the shape."""
    net = Reader(LAYERS[name](WIDTH, UNITS, batch_first=first, dtype=torch.float64))
    assert_measured(net, batch_for(net, torch.float64, examples=T))


def test_several_sequences_of_each_example():
    net = Reader(nn.GRU(WIDTH, UNITS, batch_first=True, dtype=torch.float64))

    def loss(net, batch):
        return curved(net(batch[0].flatten(0, 1)).unflatten(0, batch[0].shape[:2])).mean()

    assert_measured(net, (torch.randn(N, 2, T, WIDTH, dtype=torch.float64),), loss)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_that_is_used_twice(name):
    net = Reader(LAYERS[name](UNITS, UNITS, num_layers=2, batch_first=True, dtype=torch.float64))

    def loss(net, batch):
        once, state = net.rnn(batch[0])
        return curved(net.rnn(once.relu(), state)[0]).mean()

    assert_measured(net, (torch.randn(N, T, UNITS, dtype=torch.float64),), loss)


@pytest.mark.parametrize("name", LAYERS)
def test_an_output_that_was_changed_in_place_is_computed_again(name):
    net = Reader(LAYERS[name](WIDTH, UNITS, num_layers=2, dtype=torch.float64))

    def loss(net, batch):
        return curved(net.rnn(batch[0].transpose(0, 1))[0].mul_(2).transpose(0, 1)).mean()

    assert_measured(net, batch_for(net, torch.float64), loss)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_under_checkpoints(name, reentrant):
    net = nn.ModuleDict({"below": nn.Linear(WIDTH, WIDTH), "rnn": LAYERS[name](WIDTH, UNITS, batch_first=True)})

    def run(net, x):
        output, state = net["rnn"](x)
        return torch.cat([output.flatten(1), *(s[0] for s in (state if isinstance(state, tuple) else (state,)))], 1)

    def plain(net, batch):
        return curved(run(net, net["below"](batch[0]))).mean()

    def loss(net, batch):
        return curved(checkpoint(run, net, net["below"](batch[0]), use_reentrant=reentrant)).mean()

    net = net.double()
    batch = batch_for(net, torch.float64)
    wanted = alone(net, batch, list(net.parameters()), plain)
    torch.testing.assert_close(measured(net, batch, loss), wanted, rtol=1e-10, atol=0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize("name", CELLS)
def test_cells_in_a_loop(name, starts, bias):
    net = nn.ModuleDict({"cell": CELLS[name](WIDTH, UNITS, bias=bias), "head": nn.Linear(UNITS, 2)}).double()
    scaled_up(net)

    def loss(net, batch):
        x, *states = batch
        state = states[0] if starts else None
        for position in range(x.shape[1]):
            state = net["cell"](x[:, position], state)
        return curved(net["head"](state)).mean()

    states = [torch.randn(N, UNITS, dtype=torch.float64)]
    assert_measured(net, (torch.randn(N, T, WIDTH, dtype=torch.float64), *(states if starts else [])), loss)


def of_packed(net, batch):
    lengths = torch.arange(len(batch[0])) % T + 1
    packed = pack_padded_sequence(batch[0], lengths[: len(batch[0])], batch_first=True, enforce_sorted=False)
    return curved(net.rnn(packed)[1][-1]).mean()


def test_packed_sequences_are_left_to_the_next_engine():
    net = Reader(nn.GRU(WIDTH, UNITS, batch_first=True, dtype=torch.float64))
    batch = batch_for(net, torch.float64)
    parameters = list(net.parameters())
    with GhostRecorder(parameters, {}) as recorder:
        recorder.attach(net)
        recorder.begin(N)
        of_packed(net, batch).backward()
        assert set(recorder.finish().misses.values()) == {"no layer with a rule uses it"}


def test_one_sequence_without_a_dimension_of_examples_is_not_covered():
    layer, inputs = nn.LSTM(WIDTH, UNITS), torch.randn(T, WIDTH)
    assert layer_type(layer).leading(layer, inputs) == 0
    assert layer_type(layer).leading(layer, inputs[:, None]) == 2
    cell = nn.GRUCell(WIDTH, UNITS)
    assert layer_type(cell).leading(cell, inputs[0]) == 0
    assert layer_type(cell).leading(cell, inputs) == 1


class Doubled(nn.GRU):
    def forward(self, x):
        return super().forward(2 * x)


DECLINED = {
    "with projections": lambda: nn.LSTM(WIDTH, UNITS, proj_size=2),
    "with dropout between layers": lambda: nn.GRU(WIDTH, UNITS, num_layers=2, dropout=0.1),
    "cells with two states": lambda: nn.LSTMCell(WIDTH, UNITS),
    "a subclass": lambda: Doubled(WIDTH, UNITS),
}


@pytest.mark.parametrize("name", DECLINED)
def test_layers_whose_gates_are_not_known_are_declined(name):
    assert layer_type(DECLINED[name]()) is None


def test_dropout_in_eval_mode_drops_nothing():
    net = Reader(nn.GRU(WIDTH, UNITS, num_layers=2, dropout=0.5, batch_first=True, dtype=torch.float64).eval())
    assert_measured(net, batch_for(net, torch.float64))


def test_gates_of_other_weights_do_not_pass():
    """A recurrent weight that takes part elsewhere is noticed in the step that does it."""
    net = Reader(nn.LSTM(WIDTH, UNITS, batch_first=True, dtype=torch.float64))

    def loss(net, batch):
        return mean_loss(net, batch) + net.rnn.weight_hh_l0.square().sum()

    batch = batch_for(net, torch.float64)
    layouts = {(index, 0): Layout.FIRST for index in range(4)}
    with GhostRecorder(list(net.parameters()), layouts) as recorder:
        recorder.attach(net)
        recorder.begin(N)
        loss(net, batch).backward()
        assert recorder.finish().misses == {1: "it is used outside of its layer"}


@pytest.mark.parametrize("is_used", [False, True])
def test_nothing_is_kept_once_a_pass_is_over(is_used):
    net = Reader(nn.LSTM(WIDTH, UNITS, batch_first=True))
    layouts = {(index, 0): Layout.FIRST for index in range(4)}
    with GhostRecorder(list(net.parameters()), layouts) as recorder:
        recorder.attach(net)
        recorder.begin(N)
        inputs = torch.randn(N, T, WIDTH, requires_grad=True)
        output, (hidden, cell) = net.rnn(inputs)
        if is_used:
            (output.sum() + hidden.sum()).backward()
            assert recorder.uses == []
        assert recorder.finish().misses == {}
        kept = [weakref.ref(tensor) for tensor in (inputs, output, hidden, cell)]
        del inputs, output, hidden, cell
        gc.collect()
        assert [tensor() for tensor in kept] == [None] * 4


def test_from_outside_on_any_module():
    net = Reader(nn.LSTM(WIDTH, UNITS, num_layers=2, batch_first=True, dtype=torch.float64))
    batch = batch_for(net, torch.float64)
    found = per_example_squared_norms(net, batch, loss_fn=mean_loss, engine="ghost")
    torch.testing.assert_close(found, alone(net, batch, list(net.parameters())).sum(0), rtol=1e-10, atol=0)
    with pytest.raises(MeasurementError):
        per_example_squared_norms(net, batch, loss_fn=of_packed, engine="ghost")
