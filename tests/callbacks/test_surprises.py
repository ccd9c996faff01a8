"""What training may do between two checks, and to the gradient after the backward pass: noticed, or harmless."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_graddiv.callbacks.eager import ForcedEager
from tests.audit import warned
from tests.in_band import Collector, Convolutional, Witness, contributions, rho, rho_of, signals, trained, worst_error


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class Scaled(Convolutional):
    """A parameter that no layer holds."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, 1))

    def forward(self, x):
        return super().forward(x * self.scale)


def contrast(net, batch):
    x, y = batch
    return F.cross_entropy(net(x) @ y.T, torch.arange(len(x)))


def means(net, batch):
    return F.mse_loss(net(batch[0]), batch[1])


class TestChangedGradients:
    """The gradient that is applied must be what the backward passes gave, whichever engine measures."""

    def run(self, net, loss, change, **kwargs):
        module, monitor = Witness(net, loss), Collector()
        module.on_after_backward = lambda: change(module.net)
        with warned("is not the mean of what the processes' backward passes gave"):
            trained(module, monitor=monitor, **kwargs)
        assert monitor.probes == []

    def test_of_a_parameter_that_is_measured_by_running_the_step_again(self):
        self.run(Scaled(), means, lambda net: net.scale.grad.mul_(3))

    def test_of_groups(self):
        self.run(
            Convolutional(), contrast, lambda net: [p.grad.mul_(3) for p in net.parameters()], accumulate_grad_batches=2
        )

    def test_that_is_never_set_back_to_zero(self):
        module, monitor = Witness(Convolutional(), contrast), Collector()
        module.optimizer_zero_grad = lambda *args: None
        with warned("is not the mean of what the processes' backward passes gave"):
            trained(module, monitor=monitor, accumulate_grad_batches=2)
        assert len(monitor.probes) == 1


def test_a_gradient_that_comes_in_parts_has_no_norm_for_groups():
    class Twice(Convolutional):
        def forward(self, x):
            return self.body[6:](sum(checkpoint(self.body[:6], s * x, use_reentrant=True) for s in (1, 2)))

        def __call__(self, x):
            return super().__call__(x.requires_grad_())

    module, monitor = Witness(Twice(), contrast), Collector(engine="microbatch")
    with warned("computes a parameter's gradient in parts"):
        trained(module, monitor=monitor)
    assert monitor.probes == []


def test_batch_normalisation_that_starts_to_train_is_noticed_at_once():
    """Fine-tuning often keeps it in eval mode for a while."""

    class Normalized(Convolutional):
        def __init__(self):
            super().__init__()
            self.body[1] = nn.BatchNorm1d(8)

    module, monitor = Witness(Normalized()), Collector()

    def freeze():
        module.net.body[1].train(module.current_epoch > 0)

    module.on_train_epoch_start = freeze
    with warned("mixes the examples.*engine `microbatch`"):
        trained(module, signals(96), batch_size=16, monitor=monitor, max_epochs=2)
    assert len(monitor.probes) == 12
    assert len(monitor._window) == 6  # what was measured by examples is not pooled with what is measured by groups


def test_a_loss_that_begins_to_mix_examples_is_noticed_at_once():
    module = Witness(Convolutional())

    def loss(net, batch):
        x, y = batch
        if module.trainer.global_step < 11:
            return F.mse_loss(net(x), y)
        share = 0.3
        mixed = net(share * x + (1 - share) * x.roll(1, 0))
        return share * F.mse_loss(mixed, y) + (1 - share) * F.mse_loss(mixed, y.roll(1, 0))

    module.loss = loss
    monitor = Collector()
    with warned("training_step computes something else"):
        trained(module, signals(128), monitor=monitor)
    assert monitor._measurer.engine == "microbatch"
    assert len([probe for probe in monitor.probes if probe.count == pytest.approx(8)]) == 11


@pytest.mark.parametrize("stacked", [False, True])
def test_a_last_batch_of_one_example_proves_nothing(stacked):
    """With one example, rows that stand together and rows that stand apart are the same, and so are mean and sum."""

    def loss(net, batch):
        x, y = batch
        if not stacked:
            return (net(x) - y).square().sum()
        first, second = net(torch.cat([x, 2 * x])).unflatten(0, (2, -1))
        return F.mse_loss(first, y) + F.mse_loss(first, second)

    module = Witness(Convolutional(), loss, learning_rate=1e-4)
    monitor = Collector(every_n_steps=3)
    trained(module, signals(17), monitor=monitor, max_epochs=6)
    assert len(monitor.probes) >= 3
    measured = [step for step in module.steps if len(step.batches[0][0]) == 8]
    truths = [rho_of(*contributions(module.net, loss, step))[0] for step in measured]
    for probe in monitor.probes:
        assert min(abs(rho(probe) - truth) for truth in truths) < 1e-6
    moments = [probe.sum_sq_norms for probe in monitor.probes]
    assert max(moments) < 10 * min(moments)  # not of sums once and of means once


class Manual(Witness):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


@pytest.mark.parametrize("engine", ["auto", "microbatch"])
def test_compiled_code_is_compiled_again_after_a_refusal(engine):
    import torch._dynamo  # noqa: F401

    module, monitor = Manual(Convolutional()), Collector(engine=engine)
    with warned("Measuring is now off"):
        trained(module, signals(96), monitor=monitor)
    assert ForcedEager._on == 0


def test_two_monitors_do_not_disturb_each_other():
    import torch._dynamo.eval_frame as dynamo

    module = Witness(Convolutional())
    first, second = Collector(), Collector(log_prefix="other")
    trained(module, callbacks=[first, second])
    for monitor in (first, second):
        assert worst_error(monitor.probes, module) < 1e-5
    assert dynamo._stance.stance == "default"
    assert ForcedEager._on == 0


def test_a_step_that_returns_nothing_once_is_dropped_once():
    module = Witness(Scaled())
    loss = module.loss
    module.loss = lambda net, batch: None if module.trainer.global_step == 2 else loss(net, batch)
    monitor = Collector()
    with warned("NoneType|no backward pass"):
        trained(module, monitor=monitor)
    assert len(monitor.probes) == 5
    assert monitor.coverages == [1.0] * 5


def test_a_step_that_takes_another_way_each_time_is_measured_all_the_same():
    class Turning(Convolutional):
        turns = 0

        def forward(self, x):
            out = super().forward(x)
            for _ in range(self.turns):
                out = out.tanh()
            return out

    net = Turning()
    module, monitor = Witness(net), Collector(window=64)
    witness = module.on_train_batch_start

    def turn(batch, batch_idx):
        witness(batch, batch_idx)
        net.turns = 1 + batch_idx * 5 % 12

    module.on_train_batch_start = turn
    with warned("training_step computes something else"):
        trained(module, DataLoader(signals(512), 8), monitor=monitor)
    assert len(monitor.probes) >= 32  # of 64: a dozen ways are told apart by the kinds of their operations in the end


def test_a_plain_training_is_not_checked_more_often_than_planned():
    module, monitor, checks = Witness(Convolutional()), Collector(), []
    engine = monitor._measurer._ghost
    original = engine.check
    engine.check = lambda *args, **kwargs: (checks.append(1), original(*args, **kwargs))[1]
    monitor._forget = lambda: None  # or the monitor begins with another engine
    trained(module, signals(8 * 66), monitor=monitor)
    assert len(monitor.probes) == 66
    assert len(checks) == 2  # before the first, and after 64
