"""Which engine measures: `auto` falls back once, aloud and for good reason; nothing else falls back at all."""

import warnings

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_graddiv import measure_moments, per_example_squared_norms
from lightning_graddiv.errors import MeasurementError
from lightning_graddiv.per_example import select
from lightning_graddiv.per_example.functional import functional_gradients, loop_gradients
from lightning_graddiv.per_example.losses import StepLoss
from lightning_graddiv.per_example.select import PerExampleEngine, check_engine_name
from tests.models import CLASSES, MLP, Case, N, reference_norms, relative_error, state_of


class Item(MLP):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.last = loss.item()
        return loss


class ControlFlow(MLP):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * 2 if loss > 1 else loss


class Checkpointed(MLP):
    def logits(self, x):
        return checkpoint(self.net, x, use_reentrant=False)


class MetricInLoss(MLP):
    """An error measure that is per-example computable, taken from a torchmetrics metric."""

    def __init__(self):
        super().__init__()
        self.error = torchmetrics.MeanSquaredError()

    def training_step(self, batch, batch_idx):
        return self.error(self.logits(batch[0]), torch.eye(CLASSES, dtype=batch[0].dtype)[batch[1]])


class AssignsBatchStatistics(MLP):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(5))

    def logits(self, x):
        self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return self.net(x)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 3 * gradient


class CustomFunction(MLP):
    def logits(self, x):
        return Double.apply(self.net(x))


class GradientPenalty(MLP):
    def training_step(self, batch, batch_idx):
        x = batch[0].requires_grad_()
        logits = self.logits(x)
        (slope,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        return F.cross_entropy(logits, batch[1]) + slope.square().sum(1).mean()


class ParameterHook(MLP):
    def __init__(self):
        super().__init__()
        self.net[0].weight.register_hook(lambda gradient: gradient * 0.5)


class Strings(MLP):
    def training_step(self, batch, batch_idx):
        x, y, names = batch
        scale = torch.tensor([float(name) for name in names], dtype=x.dtype)
        return (F.cross_entropy(self.logits(x), y, reduction="none") * scale[: len(x)]).mean()


def numbered(n, dtype):
    return torch.randn(n, 5, dtype=dtype), torch.arange(n) % CLASSES, [f"{i + 1}" for i in range(n)]


FALLS_BACK = {
    "item": (Item, "item"),
    "control flow": (ControlFlow, "data-dependent control flow"),
    "checkpoint": (Checkpointed, "saved tensor hooks"),
    "metric in the loss": (MetricInLoss, "not finite under torch.func.vmap"),
    "in-place buffer": (AssignsBatchStatistics, "vmap"),
    "custom function": (CustomFunction, "setup_context"),
    "gradient penalty": (GradientPenalty, "requires_grad_"),
}


@pytest.mark.parametrize("name", FALLS_BACK)
def test_auto_falls_back_to_the_loop_with_one_warning_that_says_why(name):
    make, why = FALLS_BACK[name]
    module, batch = Case(make).build()
    engine, loss = PerExampleEngine("auto"), StepLoss(module)
    before = state_of(module)
    with pytest.warns(UserWarning, match=why) as warned:
        found = [engine.measure(loss, batch).sq_norms for _ in range(5)]
    assert len(warned) == 1
    message = str(warned[0].message)
    assert f"`{make.__name__}`" in message
    assert "Falling back to the engine `loop`" in message
    assert "`max_examples` limits its cost" in message
    for norms in found:
        assert relative_error(norms, reference_norms(module, batch)) < 1e-6
    assert state_of(module) == before


@pytest.mark.parametrize("name", FALLS_BACK)
def test_functional_does_not_fall_back_but_refuses(name):
    make, why = FALLS_BACK[name]
    module, batch = Case(make).build()
    with pytest.raises(MeasurementError, match=rf"`functional` cannot measure `{make.__name__}`.*{why}") as refused:
        per_example_squared_norms(module, batch, engine="functional")
    assert "Use engine='auto' or 'loop'" in str(refused.value)


def test_hooks_on_parameters_act_as_they_do_in_training():
    module, batch = Case(ParameterHook).build()
    expected = reference_norms(module, batch, clone_of=lambda _: Case(ParameterHook).build()[0])
    with pytest.warns(UserWarning, match="other gradients than the plain loop"):
        norms = per_example_squared_norms(module, batch)
    assert relative_error(norms, expected) < 1e-12


def test_strings_that_enter_the_loss_go_with_their_examples():
    module, batch = Case(Strings, numbered).build()
    with pytest.warns(UserWarning, match="Falling back"):
        norms = PerExampleEngine().measure(StepLoss(module), batch).sq_norms
    assert relative_error(norms, reference_norms(module, batch)) < 1e-12
    assert relative_error(per_example_squared_norms(module, batch), norms) < 1e-12


@pytest.mark.parametrize("engine", ["auto", "functional"])
def test_a_transient_nan_does_not_demote_the_engine(engine):
    module, (x, y) = Case(MLP).build()
    broken = x.clone()
    broken[1, 0] = float("nan")
    measuring, loss = PerExampleEngine(engine), StepLoss(module)
    for batch in [(x, y)] * 3:  # and no check at the next
        measuring.measure(loss, batch)
    for _ in range(2):
        with pytest.raises(MeasurementError, match="not finite") as refused:
            measuring.measure(loss, (broken, y))
        assert not refused.value.lasting
        assert measuring._engine is functional_gradients
    assert relative_error(measuring.measure(loss, (x, y)).sq_norms, reference_norms(module, (x, y))) < 1e-12


def test_an_error_that_the_loop_shares_does_not_demote_the_engine():
    module, (x, y) = Case(MLP).build()
    engine, loss = PerExampleEngine("auto"), StepLoss(module)
    for _ in range(3):
        engine.measure(loss, (x, y))
    with pytest.raises(MeasurementError, match="part of its batch"):
        engine.measure(loss, (x[:, :2], y))
    assert engine._engine is functional_gradients


@pytest.mark.parametrize("engine", ["ghosts", "", "Loop", None])
def test_an_unknown_engine_is_a_value_error(engine):
    expected = (
        r"Expected argument `engine` to be one of \('auto', 'ghost', 'functional', 'loop', 'microbatch'\) but got"
    )
    with pytest.raises(ValueError, match=expected):
        check_engine_name(engine)
    with pytest.raises(ValueError, match=expected):
        per_example_squared_norms(*Case(MLP).build(), engine=engine)
    with pytest.raises(ValueError, match=expected):
        measure_moments(*Case(MLP).build(), engine=engine)


@pytest.mark.parametrize("engine", ["auto", "functional", "loop"])
def test_at_most_so_many_examples_are_measured_evenly_spaced(engine):
    module, batch = Case(MLP).build(10)
    found = PerExampleEngine(engine, max_examples=4).measure(StepLoss(module), batch)
    assert relative_error(found.sq_norms, reference_norms(module, batch, 10)[[0, 2, 5, 7]]) < 1e-12
    assert len(PerExampleEngine(engine, max_examples=99).measure(StepLoss(module), batch).sq_norms) == 10


def test_one_example_is_measured_by_the_reference():
    """There is nothing to compare with, so no other engine could be trusted."""
    module, batch = Case(MLP).build(1)
    for engine in ("auto", "functional", "loop"):
        assert (
            relative_error(per_example_squared_norms(module, batch, engine=engine), reference_norms(module, batch, 1))
            < 1e-12
        )


def test_checks_are_made_at_the_first_measurement_and_ever_more_rarely(monkeypatch):
    checked, original = [], select.check_separable
    monkeypatch.setattr(select, "check_separable", lambda *a, **k: (checked.append(steps[-1]), original(*a, **k))[1])
    steps = []
    module, batch = Case(MLP).build(2)
    engine, loss = PerExampleEngine("loop"), StepLoss(module)
    for step in range(130):
        steps.append(step)
        engine.measure(loss, batch)
    assert checked == [0, 1, 2, 4, 8, 16, 32, 64, 128]


def test_checks_go_on_until_they_pass():
    class MixesSometimes(MLP):
        mixes = True

        def logits(self, x):
            return self.net(x + x.mean(0) if self.mixes else x)

    module, batch = Case(lambda: MixesSometimes()).build()
    engine, loss = PerExampleEngine("auto"), StepLoss(module)
    for _ in range(4):
        with pytest.raises(MeasurementError, match="mixes"):
            engine.measure(loss, batch)
    module.mixes = False
    for _ in range(4):
        engine.measure(loss, batch)
    module.mixes = True
    with pytest.raises(MeasurementError, match="mixes"):
        engine.measure(loss, batch)
    engine.measure(loss, (batch[0][:1], batch[1][:1]))  # which proves nothing
    with pytest.raises(MeasurementError, match="mixes"):
        engine.measure(loss, batch)


def test_batches_of_one_example_earn_no_trust():
    class Mixes(MLP):
        def logits(self, x):
            return self.net(x + x.mean(0))

    module, (x, y) = Case(lambda: Mixes()).build()
    engine, loss = PerExampleEngine("auto"), StepLoss(module)
    for _ in range(3):
        engine.measure(loss, (x[:1], y[:1]))
    with pytest.raises(MeasurementError, match="mixes"):
        engine.measure(loss, (x, y))


def test_noise_is_off_in_checks_only():
    module, (x, y) = Case(lambda: MLP(dropout=0.5)).build(2)
    same = x[:1].expand(32, -1).contiguous(), y[:1].expand(32).contiguous()
    for engine in ("auto", "functional", "loop"):
        measuring, loss = PerExampleEngine(engine), StepLoss(module)
        for _ in range(4):  # with a check and without
            assert len(measuring.measure(loss, same).sq_norms.unique()) > 16


def test_a_step_without_noise_is_measured_once_in_a_check(monkeypatch):
    sizes = []
    monkeypatch.setitem(
        select._REPLAYING,
        "loop",
        lambda loss, batch, total: (sizes.append(total), loop_gradients(loss, batch, total))[1],
    )
    PerExampleEngine("loop").measure(StepLoss(Case(MLP).build()[0]), Case(MLP).build()[1])
    assert sizes == [N]


def test_hidden_state_that_grows_does_not_leak_from_example_to_example():
    """The third example would otherwise be measured with the state that two others left."""

    class Counts(MLP):
        def __init__(self):
            super().__init__()
            self.calls = 0
            self.register_buffer("sum", torch.zeros(5))

        def logits(self, x):
            self.calls += 1
            self.sum = self.sum + x.detach().sum(0)
            return self.net(x) * self.calls

    module, batch = Case(lambda: Counts()).build()
    for engine in ("auto", "functional", "loop"):
        norms = per_example_squared_norms(module, batch, engine=engine)
        assert relative_error(norms, reference_norms(module, batch)) < 1e-12
    assert module.calls == 0


def test_weights_that_depend_on_the_step_are_common_factors():
    class Anneals(MLP):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (0.5 + self.global_step)

    module, batch = Case(lambda: Anneals()).build()
    assert relative_error(per_example_squared_norms(module, batch), reference_norms(module, batch)) < 1e-12


def test_no_warning_without_a_fallback():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        per_example_squared_norms(*Case(MLP).build())
        per_example_squared_norms(nn.Linear(5, 3), Case(MLP).build(dtype=torch.float32)[1], loss_fn=_loss)


def _loss(net, batch):
    return F.cross_entropy(net(batch[0]), batch[1])
