"""What the recorder sees of a backward pass, and what it does not let pass."""

import gc
import math
import weakref
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_graddiv.errors import MeasurementError
from lightning_graddiv.per_example import devices, layers, ledger, norms, one_pass
from lightning_graddiv.per_example.ghost import GhostRecorder
from lightning_graddiv.per_example.layers import Layout

N = 4


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def batch(width=5):
    return torch.randn(N, width, dtype=torch.float64)


def every_use(parameters, uses=3):
    return {(index, use): Layout.FIRST for index in range(len(parameters)) for use in range(uses)}


def recorded(net, loss, **kwargs):
    """Watch one backward pass; return what was recorded."""
    parameters = list(net.parameters())
    with GhostRecorder(parameters, every_use(parameters), **kwargs) as recorder:
        recorder.attach(net)
        recorder.begin(N)
        loss(net).backward()
        return recorder.finish()


def recorded_at_the_end(net, loss, before=lambda recorder: None, **kwargs):
    """Watch the only backward pass of a step, after which gradients are looked at; return what was recorded."""
    parameters = list(net.parameters())
    with GhostRecorder(parameters, every_use(parameters), awaits_loss=True, keeps_norms=True, **kwargs) as recorder:
        recorder.attach(net)
        recorder.begin(N)
        value = loss(net)
        recorder.await_end_of(value)
        before(recorder)
        value.backward()
        return recorder.finish()


def break_rule(monkeypatch):
    known = layers.LAYER_TYPES[nn.Linear]
    broken = layers.LayerType(lambda *_: 1 / 0, known.leading, known.accepts)
    monkeypatch.setitem(layers.LAYER_TYPES, nn.Linear, broken)


def test_norms_and_nothing_missed():
    x, net = batch(), nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    found = recorded(net, lambda net: net(x).square().sum())
    for i in range(N):
        alone = torch.autograd.grad(net(x[i : i + 1]).square().sum(), list(net.parameters()))
        for index, gradient in enumerate(alone):
            assert found.sq_norms[index][i] == pytest.approx(float(gradient.square().sum()), rel=1e-12)
    assert found.misses == {}
    assert found.total([0, 1, 2, 3]) == pytest.approx(sum(found.sq_norms.values()))
    assert found.local_sq_norms is None
    assert found.gradient_sq_norm is None


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("watch", [recorded, recorded_at_the_end])
class TestAUseOutsideOfTheLayerIsMissedWhateverTheDirections:
    MISSES = dict.fromkeys((0, 1), "it is used outside of its layer")

    def test_of_two_classes(self, watch, seed):
        """Rows of the weight's gradient are each other's negatives."""
        x, y, net = batch(7), torch.tensor([0, 1, 1, 0]), nn.Linear(7, 2).double()

        def loss(net):
            return F.cross_entropy(net(x), y) + F.cross_entropy(F.linear(x.flip(0), net.weight, net.bias), y)

        assert watch(net, loss, seed=seed).misses == self.MISSES

    @pytest.mark.parametrize("at", [-1.0, 1.0])
    def test_at_a_boundary(self, watch, seed, at):
        """Gradients of the weight and of the bias are the same or each other's negatives."""
        x, net = batch(1), nn.Linear(1, 3).double()

        def loss(net):
            return net(x).square().sum() + F.linear(torch.full_like(x, at), net.weight, net.bias).square().sum()

        assert watch(net, loss, seed=seed).misses == self.MISSES


def test_a_parameter_without_a_layer_is_missed():
    net = nn.Linear(5, 3).double()
    net.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))
    x = batch()
    misses = recorded(net, lambda net: (net(x) * net.scale).square().sum()).misses
    assert list(misses.values()) == ["no layer with a rule uses it"]


@pytest.mark.parametrize("awaits_loss", [False, True])
@pytest.mark.parametrize("left_out", [0, 1])
def test_contributions_to_what_received_no_gradient_are_missed(left_out, awaits_loss):
    net, x = nn.Linear(5, 3).double(), batch()
    parameters = list(net.parameters())
    with GhostRecorder(parameters, every_use(parameters), awaits_loss=awaits_loss) as recorder:
        recorder.attach(net)
        recorder.begin(N)
        loss = net(x).square().sum()
        if awaits_loss:
            recorder.await_end_of(loss)
        loss.backward(inputs=[parameters[1 - left_out]])
        assert recorder.finish().misses == {left_out: "it is used outside of its layer"}


def test_a_complex_parameter_is_missed():
    net = nn.Linear(5, 3).double()
    net.phase = nn.Parameter(torch.ones(3, dtype=torch.complex128))
    x = batch()
    assert "it is complex" in recorded(net, lambda net: (net(x) * net.phase.imag).square().sum()).misses.values()


def test_two_backward_passes_are_told_from_one():
    net, x = nn.Linear(5, 3).double(), batch()

    def twice(net):
        loss = net(x).square().sum()
        loss.backward(retain_graph=True)
        return loss

    assert set(recorded(net, twice).misses.values()) == {"it takes part in more than one backward pass"}


def test_a_layer_that_is_used_again_after_it_was_measured_is_missed_unless_that_is_known():
    """With re-entrant checkpoints the second use shows only after the first one's gradient."""
    net, x = nn.Linear(5, 5).double(), batch().requires_grad_()

    def loss(net):
        once = checkpoint(net, x, use_reentrant=True)
        return checkpoint(net, once.tanh(), use_reentrant=True).square().sum()

    assert set(recorded(net, loss).misses.values()) == {"it was used more often than before"}
    assert recorded(net, loss, shared=frozenset({0, 1})).misses == {}


@pytest.mark.parametrize("watch", [recorded, recorded_at_the_end], ids=lambda watch: watch.__name__)
def test_an_input_that_was_changed_after_the_call_is_an_error(watch):
    """Autograd itself does not mind where the weight is frozen."""
    net, x = nn.Linear(5, 3).double(), batch()
    net.weight.requires_grad_(False)

    def loss(net):
        out = net(x)
        x.add_(1)
        return out.square().sum()

    with pytest.raises(MeasurementError, match="the input of a `Linear` was changed in place"):
        watch(net, loss)


def test_an_error_of_ours_does_not_end_the_backward_pass(monkeypatch):
    break_rule(monkeypatch)
    net, x = nn.Linear(5, 3).double(), batch()
    with pytest.raises(MeasurementError, match="Recording the backward pass failed: division by zero"):
        recorded(net, lambda net: net(x).square().sum())
    assert net.weight.grad is not None


def test_gradients_that_are_not_finite_are_an_error():
    net, x = nn.Linear(5, 3).double(), batch()
    with pytest.raises(MeasurementError, match="not finite"):
        recorded(net, lambda net: net(x).sum() * float("inf"))


def test_rows_that_do_not_hold_the_examples_are_missed():
    net, x = nn.Linear(5, 3).double(), batch()
    misses = recorded(net, lambda net: net(x[:3]).square().sum()).misses
    assert all("do not hold the examples" in reason for reason in misses.values())


def test_the_gradient_so_far_is_known_before_processes_exchange_theirs():
    net, x = nn.Linear(5, 3).double(), batch()
    net(2 * x).sum().backward()
    found = recorded(net, lambda net: net(x).square().sum(), keeps_local=True)
    assert sum(found.local_sq_norms.values()) == pytest.approx(
        float(sum(p.grad.square().sum() for p in net.parameters()))
    )


def test_the_norm_of_a_pass_is_kept_where_it_is_asked_for():
    net, x = nn.Linear(5, 3).double(), batch()
    found = recorded(net, lambda net: net(x).square().sum(), keeps_norms=True)
    assert found.gradient_sq_norm == pytest.approx(float(sum(p.grad.square().sum() for p in net.parameters())))


def test_it_is_not_known_where_a_parameter_was_not_reached():
    net, x = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 3)]).double(), batch()
    (net[0](x) + net[1](x)).sum().backward()
    assert set(recorded(net, lambda net: net[0](x).sum(), keeps_local=True).local_sq_norms) == {0, 1}


def test_projections_are_those_of_the_gradient():
    net, x = nn.Linear(5, 3).double(), batch()
    parameters = list(net.parameters())
    with GhostRecorder(parameters, every_use(parameters)) as recorder:
        recorder.attach(net)
        recorder.begin(N)
        net(x).square().sum().backward()
        found = recorder.finish()
        applied = recorder.projected([p.grad for p in parameters])
    torch.testing.assert_close(found.received.projections(), applied)


def test_leaving_removes_every_hook():
    net = nn.Linear(5, 3).double()
    recorded(net, lambda net: net(batch()).sum())
    assert not net._forward_hooks
    assert not net.weight._backward_hooks


def test_a_frozen_layer_and_an_inference_pass_are_not_watched():
    net = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2)).double()
    net[0].requires_grad_(False)
    parameters = [p for p in net.parameters() if p.requires_grad]
    with GhostRecorder(parameters, every_use(parameters)) as recorder:
        recorder.attach(net)
        recorder.begin(N)
        with torch.no_grad():
            net(batch())
        assert recorder.uses == []
        assert not net[0]._forward_hooks


def test_without_a_pass_that_was_begun_nothing_is_recorded():
    net, x = nn.Sequential(nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 2)).double(), batch(300)
    parameters = list(net.parameters())
    with GhostRecorder(parameters, every_use(parameters), awaits_loss=True, keeps_norms=True) as recorder:
        recorder.attach(net)
        loss = net(x).square().sum()
        recorder.await_end_of(loss)
        loss.backward()
        assert recorder.uses == []
        assert recorder.seconds == 0
        assert not net[0].weight._backward_hooks
        with pytest.raises(MeasurementError, match="No pass to record was begun"):
            recorder.finish()
        recorder.begin(N)  # and from then on it is
        net.zero_grad()
        loss = net(x).square().sum()
        recorder.await_end_of(loss)
        loss.backward()
        assert recorder.finish().totals.keys() == {0, 1, 2, 3}


@pytest.mark.parametrize("ends_by", ["finish", "detach"])
@pytest.mark.parametrize("error", ["a rule fails", "not finite"])
def test_after_an_error_tensors_are_let_go_of_at_once(error, ends_by, monkeypatch):
    """They do not wait for the garbage collector, which pressure on a GPU's memory does not call."""
    net, held = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2)).double(), []
    if error == "a rule fails":
        break_rule(monkeypatch)
    parameters = list(net.parameters())
    with GhostRecorder(parameters, every_use(parameters)) as recorder:
        recorder.attach(net)
        recorder.begin(N)
        x = batch()
        net[1].register_forward_hook(lambda _, __, output: held.append(weakref.ref(output.untyped_storage())))
        (net(x).square().sum() * (math.inf if error == "not finite" else 1.0)).backward()
        held.append(weakref.ref(x))
        del x
        gc.disable()
        try:
            if ends_by == "finish":
                with pytest.raises(MeasurementError):
                    recorder.finish()
            else:
                recorder.detach()
            assert [reference() for reference in held] == [None, None]
        finally:
            gc.enable()


def test_what_is_held_holds_no_graph():
    net, x = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2)).double(), batch()
    with GhostRecorder(list(net.parameters())) as recorder:
        recorder.attach(net)
        recorder.begin(N)
        torch.autograd.grad(net(x).pow(3).sum(), list(net.parameters()), create_graph=True)
        held = [value for use in recorder.uses for value in (*use.inputs, *use.output_gradients)]
        assert len(held) == 4
        assert not any(value.requires_grad for value in held)


class TestTheOnlyPass:
    """Parameters whose gradients nobody else touches are looked at once the pass is over."""

    def net(self):
        return nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2)).double()

    def hooks(self, net):
        return [len(parameter._backward_hooks or ()) for parameter in net.parameters()]

    def test_what_is_seen_is_what_hooks_see(self):
        x, net = batch(), self.net()
        by_hooks = recorded(net, lambda net: net(x).square().sum(), keeps_norms=True)
        net.zero_grad()
        found = recorded_at_the_end(net, lambda net: net(x).square().sum(), lambda _: self.assert_unwatched(net))
        assert found.misses == by_hooks.misses == {}
        assert found.sq_norms.keys() == by_hooks.sq_norms.keys()
        for index, sq_norms in by_hooks.sq_norms.items():
            torch.testing.assert_close(found.sq_norms[index], sq_norms)
        assert found.received.sq_norms == pytest.approx(by_hooks.received.sq_norms)
        torch.testing.assert_close(found.received.projections(), by_hooks.received.projections())
        assert found.received.is_still([parameter.grad for parameter in net.parameters()])

    @pytest.mark.parametrize(("size", "waiting"), [(0, 0), (8 * N * 5, 1), (8 * N * 15, 2), (2**20, 3)])
    def test_small_layers_wait_for_the_end_of_the_pass_as_long_as_they_hold_little(self, size, waiting, monkeypatch):
        monkeypatch.setattr(one_pass, "_WAITING_BYTES", size)
        widths, x, held = [5, 6, 4, 1], batch().requires_grad_(), []
        layers = [part for sizes in pairwise(widths) for part in (nn.Linear(*sizes), nn.Tanh())]
        net = nn.Sequential(*layers).double()

        def look(recorder):
            x.register_hook(lambda _: held.append([use for use in recorder.uses if use.output_gradients]))

        found = recorded_at_the_end(net, lambda net: net(x).square().sum(), look)
        assert len(held[0]) == waiting
        assert not any(use.output_gradients for use in held[0])  # nor afterwards
        assert found.misses == {}
        by_hooks = recorded(net, lambda net: net(x).square().sum())
        for index, sq_norms in by_hooks.sq_norms.items():
            torch.testing.assert_close(found.sq_norms[index], sq_norms, rtol=1e-12, atol=0)

    def test_norms_of_layers_that_wait_are_those_of_a_loop_over_the_examples(self, monkeypatch):
        monkeypatch.setattr(norms, "_FEW", 0)  # as large ones are read
        net, x = self.net().float(), batch().float()
        found = recorded_at_the_end(net, lambda net: net(x).square().sum())
        for i in range(N):
            alone = torch.autograd.grad(net(x[i : i + 1]).square().sum(), list(net.parameters()))
            for index, gradient in enumerate(alone):
                assert found.sq_norms[index][i] == pytest.approx(float(gradient.double().square().sum()), rel=1e-5)

    @pytest.mark.parametrize("is_view", [True, False])
    def test_a_layer_that_sees_a_part_of_much_does_not_wait(self, is_view):
        """It would keep all of it."""
        net, much, waiting = nn.Linear(5, 3).double(), torch.randn(N, 2**18, dtype=torch.float64).requires_grad_(), []

        def look(recorder):
            much.register_hook(lambda _: waiting.append(sum(bool(use.output_gradients) for use in recorder.uses)))

        def loss(net):
            part = much[:, :5]
            return net(part if is_view else part.clone()).square().sum()

        found = recorded_at_the_end(net, loss, look)
        assert waiting == [0 if is_view else 1]
        assert found.misses == {}

    @pytest.mark.parametrize("which", ["the loss", "another loss"])
    def test_an_error_of_ours_at_the_end_does_not_end_the_backward_pass(self, which, monkeypatch):
        break_rule(monkeypatch)
        net, x = nn.Linear(5, 3).double(), batch()

        def run(recorder):
            loss = net(x).square().sum()
            recorder.await_end_of(loss if which == "the loss" else net(x).sum())
            loss.backward()

        with pytest.raises(MeasurementError, match="Recording the backward pass failed: division by zero"):
            self.watched(net, run)
        assert net.weight.grad is not None

    def test_a_gradient_that_another_branch_changes_in_place_is_an_error(self):
        """An addition hands both of its branches the same tensor."""

        class Doubled(torch.autograd.Function):
            @staticmethod
            def forward(ctx, values):
                return values.clone()

            @staticmethod
            def backward(ctx, gradient):
                return gradient.mul_(2)

        net, x, free = nn.Linear(5, 3).double(), batch(), torch.ones(N, 3, dtype=torch.float64, requires_grad=True)

        def loss(net):
            aside = Doubled.apply(free)  # it comes last in the backward pass
            return (net(x) + aside).square().sum()

        with pytest.raises(MeasurementError, match="the gradient of the output of a `Linear` was changed in place"):
            recorded_at_the_end(net, loss)

    def test_a_large_weight_that_is_used_outside_of_the_layer_is_missed(self):
        net, x = nn.Linear(300, 300).double(), batch(300)
        found = recorded_at_the_end(net, lambda net: net(x).square().sum() + net.weight.square().sum())
        assert found.misses == {0: "it is used outside of its layer"}

    def assert_unwatched(self, net):
        assert self.hooks(net) == [0, 0, 0, 0]

    def test_large_gradients_are_read_as_they_come_by(self):
        net, x = nn.Linear(300, 300).double(), batch(300)
        seen = []
        found = recorded_at_the_end(net, lambda net: net(x).square().sum(), lambda _: seen.extend(self.hooks(net)))
        assert seen == [1, 0]
        assert self.hooks(net) == [0, 0]
        assert found.misses == {}
        assert found.received.sq_norms == pytest.approx(
            {index: float(parameter.grad.square().sum()) for index, parameter in enumerate(net.parameters())}
        )

    @pytest.mark.parametrize("name", ["weight", "bias"])
    @pytest.mark.parametrize("used", ["too", "only"])
    def test_a_use_outside_of_the_layer_is_missed(self, name, used):
        net, x = self.net(), batch()

        def loss(net):
            aside = getattr(net[0], name).square().sum()
            return net(x).square().sum() + aside if used == "too" else 0.0 * net(x).sum() + aside

        index = ["weight", "bias"].index(name)
        assert recorded_at_the_end(net, loss).misses == {index: "it is used outside of its layer"}

    def test_gradients_of_parameters_that_are_not_measured_are_known_too(self):
        net, x = self.net(), batch()
        by_hooks = recorded(net, lambda net: net(x).square().sum(), keeps_norms=True)
        net.zero_grad()
        found = recorded_at_the_end(net, lambda net: net(x).square().sum(), measured=frozenset({0, 1}))
        assert found.sq_norms.keys() == {0, 1}
        assert found.received.sq_norms == pytest.approx(by_hooks.received.sq_norms)
        torch.testing.assert_close(found.received.projections(), by_hooks.received.projections())
        assert found.received.is_still([parameter.grad for parameter in net.parameters()])

    @pytest.mark.parametrize("frozen", ["weight", "bias"])
    def test_one_of_a_layers_parameters_alone_is_measured(self, frozen):
        net, x = self.net(), batch()
        getattr(net[0], frozen).requires_grad_(False)
        found = recorded_at_the_end(net, lambda net: net(x).square().sum())
        assert found.misses == {}
        assert found.sq_norms.keys() == {0, 1, 2, 3} - {["weight", "bias"].index(frozen)}

    def test_a_parameter_without_a_layer_and_a_complex_one_are_missed(self):
        net, x = self.net(), batch()
        net.scale = nn.Parameter(torch.ones(2, dtype=torch.float64))
        net.phase = nn.Parameter(torch.ones(2, dtype=torch.complex128))
        names = [name for name, _ in net.named_parameters()]
        misses = recorded_at_the_end(net, lambda net: (net(x) * net.scale * net.phase.real).square().sum()).misses
        assert misses.keys() == {names.index("scale"), names.index("phase")}

    @pytest.mark.parametrize("why", ["a gradient is there", "a hook follows"])
    def test_they_are_watched_where_that_is_not_so(self, why):
        net, x, seen = self.net(), batch(), []
        if why == "a gradient is there":
            net[0].bias.grad = torch.ones(3, dtype=torch.float64)
        else:

            def doubles(parameter):
                parameter.grad.mul_(2)

            net[0].bias.register_post_accumulate_grad_hook(doubles)
        found = recorded_at_the_end(net, lambda net: net(x).square().sum(), lambda _: seen.extend(self.hooks(net)))
        assert seen == [1, 1, 1, 1]
        assert found.misses == {}
        assert not found.received.is_still([parameter.grad for parameter in net.parameters()])

    def watched(self, net, run, **kwargs):
        """Watch what is run on a recorder; return what was recorded."""
        parameters = list(net.parameters())
        with GhostRecorder(
            parameters, every_use(parameters, 9), awaits_loss=True, keeps_norms=True, **kwargs
        ) as recorder:
            recorder.attach(net)
            recorder.begin(N)
            run(recorder)
            return recorder.finish()

    def test_what_is_done_to_a_gradient_after_the_pass_is_seen_afterwards_only(self):
        net, x = self.net(), batch()

        def run(recorder):
            loss = net(x).square().sum()
            recorder.await_end_of(loss)
            loss.backward()
            net[0].weight.grad.mul_(3)  # as a callback before ours may

        found = self.watched(net, run)
        assert found.misses == {}
        assert not found.received.is_still([parameter.grad for parameter in net.parameters()])

    def test_another_loss_is_differentiated(self):
        """By a `backward` of the module's own: gradients are looked at when the measurement asks for them."""
        net, x = self.net(), batch()

        def run(recorder):
            out = net(x)
            recorder.await_end_of(out.square().sum())
            out.square().sum().backward()

        found = self.watched(net, run)
        assert found.misses == {}
        assert found.received.is_still([parameter.grad for parameter in net.parameters()])

    @pytest.mark.parametrize("width", [5, 300])
    def test_a_pass_that_reaches_no_layer_comes_before(self, width):
        """As learned weights of losses are differentiated by themselves."""
        net, x = nn.Linear(width, width).double(), batch(width)
        weight = torch.ones((), dtype=torch.float64, requires_grad=True)

        def run(recorder):
            loss = weight * net(x).square().sum()
            recorder.await_end_of(loss)
            torch.autograd.grad(loss, [weight], retain_graph=True)
            loss.backward()

        found = self.watched(net, run)
        assert found.misses == {}
        assert found.received.is_still([parameter.grad for parameter in net.parameters()])

    @pytest.mark.parametrize("width", [5, 300])
    @pytest.mark.parametrize("how", ["twice", "for nothing before", "of a weight afterwards"])
    def test_several_passes_are_told_from_one(self, how, width):
        net, x = nn.Linear(width, width).double(), batch(width)

        def run(recorder):
            loss = net(x).square().sum()
            recorder.await_end_of(loss)
            if how == "twice":
                loss.backward(retain_graph=True)
            elif how == "for nothing before":
                torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
            loss.backward()
            if how == "of a weight afterwards":
                net.weight.square().sum().backward()

        found = self.watched(net, run)
        is_still = found.received.is_still([parameter.grad for parameter in net.parameters()])
        assert not is_still or set(found.misses.values()) == {"it takes part in more than one backward pass"}

    @pytest.mark.parametrize("parts", [2, 3, 4])
    def test_of_a_large_gradient_in_parts_the_whole_is_taken(self, parts):
        net, x = nn.Linear(300, 300).double(), batch(300).requires_grad_()

        def run(recorder):
            value = x
            for _ in range(parts):
                value = checkpoint(net, value, use_reentrant=True).tanh()
            loss = value.square().sum()
            recorder.await_end_of(loss)
            loss.backward()

        found = self.watched(net, run, shared=frozenset({0, 1}))
        assert found.misses == {}
        assert found.received.sq_norms == pytest.approx(
            {index: float(parameter.grad.square().sum()) for index, parameter in enumerate(net.parameters())}
        )

    def test_what_is_not_measured_keeps_its_hook(self):
        """Nothing else tells what the pass gave it: here a hook of another layer writes to its gradient."""
        net, x, seen = self.net(), batch(), []

        def run(recorder):
            out = net[0](x)

            def writes(gradient):
                net[2].bias.grad.mul_(3)

            out.register_hook(writes)
            loss = net[2](out.tanh()).square().sum()
            recorder.await_end_of(loss)
            seen.extend(self.hooks(net))
            loss.backward()

        found = self.watched(net, run, measured=frozenset({0, 1, 2}))
        assert seen == [0, 0, 0, 1]
        assert found.misses == {}
        assert sorted(found.received.sq_norms) == [0, 1, 2, 3]
        assert not found.received.is_still([parameter.grad for parameter in net.parameters()])

    def test_a_large_parameter_may_be_frozen_within_the_step(self):
        net, x = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 2)).double(), batch(300)

        def run(recorder):
            net[0].weight.requires_grad_(False)
            loss = net(x).square().sum()
            recorder.await_end_of(loss)
            loss.backward()

        found = self.watched(net, run)
        assert found.misses == {}
        assert sorted(found.received.sq_norms) == [1, 2, 3]

    def test_an_exception_in_the_pass_leaves_no_hook(self):
        net, x = nn.Linear(300, 300).double(), batch(300)

        def fails(gradient):
            raise RuntimeError("on purpose")

        def run(recorder):
            out = net(x)
            out.register_hook(fails)
            loss = out.square().sum()
            recorder.await_end_of(loss)
            loss.backward()

        with pytest.raises(RuntimeError, match="on purpose"):
            self.watched(net, run)
        assert self.hooks(net) == [0, 0]
        assert not net._forward_hooks


def test_statistics_of_a_group_norm_are_not_rounded_under_autocast():
    """On a processor a group norm runs in 16 bits there, and keeps its statistics in 32."""
    layer, x, b = nn.GroupNorm(2, 8), (20 + torch.randn(N, 8, 30)).bfloat16(), (0.5 + torch.rand(N, 8, 30)).bfloat16()

    def loss(layer):
        with torch.autocast("cpu", torch.bfloat16):
            return (layer(x) * b).sum(dtype=torch.float32)

    found = recorded(layer, loss)
    normalized = F.group_norm(x.double(), 2)
    assert found.misses == {}
    for index, gradients in enumerate(((normalized * b.double()).sum(2), b.double().sum(2))):
        torch.testing.assert_close(found.sq_norms[index], gradients.square().sum(1), rtol=1e-4, atol=0)


class TestOnAnAccelerator:
    """All gradients are read with one call when the pass is over; large ones beside the sums of their contributions."""

    WIDTH, POSITIONS = 260, 70  # the weight is large, and no larger than the layer's input

    @pytest.fixture(autouse=True)
    def _few_calls(self, monkeypatch):
        monkeypatch.setattr(devices, "_PROCESSORS", frozenset())

    def net(self, dtype=torch.float64):
        return nn.Sequential(nn.Linear(self.WIDTH, self.WIDTH), nn.Tanh(), nn.Linear(self.WIDTH, 2)).to(dtype)

    def batch(self, dtype=torch.float64):
        return torch.randn(N, self.POSITIONS, self.WIDTH, dtype=dtype)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_what_is_seen_is_what_hooks_see(self, dtype, monkeypatch):
        x, net, seen = self.batch(dtype), self.net(dtype), []
        found = recorded_at_the_end(
            net,
            lambda net: net(x).square().sum(),
            lambda _: seen.extend(parameter._backward_hooks for parameter in net.parameters()),
        )
        assert not any(seen)
        assert found.received.is_still([parameter.grad for parameter in net.parameters()])
        assert found.received.image(0) is None  # it is known by its contributions
        net.zero_grad()
        monkeypatch.undo()
        by_hooks = recorded(net, lambda net: net(x).square().sum(), keeps_norms=True)
        assert found.misses == by_hooks.misses == {}
        close = {"rtol": 1e-4, "atol": 0} if dtype != torch.float64 else {"rtol": 1e-10, "atol": 0}
        for index, sq_norms in by_hooks.sq_norms.items():
            torch.testing.assert_close(found.sq_norms[index], sq_norms, **close)
            assert found.totals[index] == pytest.approx(float(sq_norms.sum()), rel=close["rtol"])
        assert found.parts == {}  # once single examples have been asked for
        assert found.received.sq_norms == pytest.approx(by_hooks.received.sq_norms, rel=close["rtol"])
        scale = sum(by_hooks.received.sq_norms.values()) ** 0.5
        rounding = 1e-10 if dtype == torch.float64 else 1e-5 if dtype == torch.float32 else 1e-2
        difference = found.received.projections() - by_hooks.received.projections()
        assert float(difference.abs().max()) < rounding * scale

    def test_a_use_outside_of_the_layer_is_missed(self):
        net, x = self.net(), self.batch()
        found = recorded_at_the_end(net, lambda net: net(x).square().sum() + net[0].weight.square().sum())
        assert found.misses == {0: "it is used outside of its layer"}

    def test_what_is_done_to_a_gradient_after_the_pass_is_seen_afterwards_only(self):
        """As a gradient scaler writes to all: what the pass gave is known without them."""
        net, x = self.net(), self.batch()
        parameters = list(net.parameters())
        with GhostRecorder(parameters, every_use(parameters), awaits_loss=True, keeps_norms=True) as recorder:
            recorder.attach(net)
            recorder.begin(N)
            loss = net(x).square().sum()
            recorder.await_end_of(loss)
            loss.backward()
            given = recorder.projected([parameter.grad for parameter in parameters])
            for parameter in parameters:
                parameter.grad.mul_(0.5)
            found = recorder.finish()
            applied = recorder.projected([parameter.grad for parameter in parameters])
        assert found.misses == {}
        assert not found.received.is_still([parameter.grad for parameter in parameters])
        torch.testing.assert_close(found.received.projections(), given, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(0.5 * given, applied)

    @pytest.mark.parametrize("how", ["twice", "for nothing before", "of a weight afterwards"])
    def test_several_passes_are_told_from_one(self, how):
        net, x = self.net(), self.batch()
        parameters = list(net.parameters())
        with GhostRecorder(parameters, every_use(parameters, 9), awaits_loss=True, keeps_norms=True) as recorder:
            recorder.attach(net)
            recorder.begin(N)
            loss = net(x).square().sum()
            recorder.await_end_of(loss)
            if how == "for nothing before":
                torch.autograd.grad(loss, parameters, retain_graph=True)
            loss.backward(retain_graph=True)
            if how == "twice":
                loss.backward()
            elif how == "of a weight afterwards":
                net[0].weight.square().sum().backward()
            found = recorder.finish()
            applied = recorder.projected([parameter.grad for parameter in parameters])
        if how == "of a weight afterwards":  # which no layer sees
            assert not found.received.is_still([parameter.grad for parameter in parameters])
            assert float((found.received.projections() - applied).abs().max()) > 1
        else:
            assert set(found.misses.values()) == {"it takes part in more than one backward pass"}

    def test_a_sum_that_is_not_quite_the_gradient_does_not_stand_in_for_it(self, monkeypatch):
        monkeypatch.setattr(ledger, "_SAME", 0.0)
        net, x = self.net(torch.float32), self.batch(torch.float32)
        found = recorded_at_the_end(net, lambda net: net(x).square().sum())
        assert found.misses == {}
        assert found.received.image(0) is not None

    def test_sparse_complex_and_frozen_ones(self):
        table, net = nn.Embedding(9, self.WIDTH, sparse=True).double(), self.net()
        net[0].bias.requires_grad_(False)
        net[2].weight.requires_grad_(False)
        whole = nn.ModuleDict({"table": table, "net": net})
        whole.phase = nn.Parameter(torch.ones(2, dtype=torch.complex128))
        index = torch.randint(0, 9, (N, self.POSITIONS))
        names = [name for name, _ in whole.named_parameters()]

        def loss(whole):
            return (whole["net"](whole["table"](index)) * whole.phase.real).square().sum()

        found = recorded_at_the_end(whole, loss)
        assert found.misses == {names.index("phase"): "it is complex"}
        trained = {name for name, parameter in whole.named_parameters() if parameter.requires_grad}
        assert {names[index] for index in found.totals} == trained - {"phase"}
        for index, sq_norm in found.received.sq_norms.items():
            gradient = list(whole.parameters())[index].grad
            dense = gradient.to_dense() if gradient.is_sparse else gradient
            assert sq_norm == pytest.approx(float(dense.abs().square().sum()), rel=1e-12)

    def test_uses_that_are_added_up_after_the_pass(self):
        net, x = nn.Linear(self.WIDTH, self.WIDTH).double(), self.batch()
        found = recorded_at_the_end(net, lambda net: net(net(x).tanh()).square().sum(), shared=frozenset({0, 1}))
        assert found.misses == {}
        assert found.received.image(0) is None  # their sum is there when the gradient is read: no image is taken
        for i in range(N):
            net.zero_grad()
            net(net(x[i : i + 1]).tanh()).square().sum().backward()
            assert found.sq_norms[0][i] == pytest.approx(float(net.weight.grad.square().sum()), rel=1e-9)

    def test_gradients_whose_squares_leave_float32_are_refused(self):
        x, net = self.batch(torch.float32), self.net(torch.float32)
        with pytest.raises(MeasurementError, match=r"On an accelerator.*range these leave.*Scale the loss"):
            recorded_at_the_end(net, lambda net: 1e-16 * net(x).square().mean())
        net.zero_grad()
        with pytest.raises(MeasurementError, match=r"range these leave: they are inf"):
            recorded_at_the_end(net, lambda net: 1e21 * net(x).square().mean())
        net.zero_grad()
        assert recorded_at_the_end(net, lambda net: 1e-8 * net(x).square().mean()).misses == {}

    def test_gradients_of_zero_are_not_too_small(self):
        x, net = self.batch(torch.float32), self.net(torch.float32)
        found = recorded_at_the_end(net, lambda net: 0 * net(x).sum())
        assert set(found.totals.values()) == {0.0}
