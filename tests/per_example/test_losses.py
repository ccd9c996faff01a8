"""Any training_step as a loss: every signature, every kind of output, every reason to refuse."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_graddiv import measure_moments, per_example_squared_norms
from lightning_graddiv.errors import MeasurementError
from lightning_graddiv.per_example.losses import StepLoss, measuring
from tests.models import MLP, Case, N, random_states, reference_norms, relative_error, state_of, vectors

ENGINES = ["auto", "functional", "loop"]


class BatchOnly(MLP):
    def training_step(self, batch):
        return super().training_step(batch, 0)


class WithDataloader(MLP):
    def training_step(self, batch, batch_idx, dataloader_idx=0):
        assert (batch_idx, dataloader_idx) == (0, 0)
        return super().training_step(batch, batch_idx)


class AnyArguments(MLP):
    def training_step(self, *args):
        batch, batch_idx = args
        return super().training_step(batch, batch_idx)


class KeywordOnly(MLP):
    def training_step(self, batch, *, scale=1.0):
        return super().training_step(batch, 0) * scale


class ReturnsDict(MLP):
    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step(batch, batch_idx), "log": {}}


class ReturnsOneElement(MLP):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx)[None]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("make", [BatchOnly, WithDataloader, AnyArguments, KeywordOnly, ReturnsDict, ReturnsOneElement])
def test_every_signature_and_output_is_understood(make, engine):
    module, batch = Case(make).build()
    expected = reference_norms(
        module, batch, loss_fn=lambda net, batch: F.cross_entropy(net.logits(batch[0]), batch[1])
    )
    assert relative_error(per_example_squared_norms(module, batch, engine=engine), expected) < 1e-12


def test_the_arguments_that_training_got_are_handed_on():
    class Scaled(MLP):
        def training_step(self, batch, batch_idx, dataloader_idx=0):
            return super().training_step(batch, batch_idx) * (10 * batch_idx + dataloader_idx)

    module, batch = Case(lambda: Scaled()).build()
    plain = StepLoss(module, step_args=(0, 1))(batch)
    torch.testing.assert_close(StepLoss(module, step_args=(2, 1))(batch), 21 * plain)


@pytest.mark.parametrize(
    ("output", "found"),
    [(None, "NoneType"), ({"other": 1}, "NoneType"), (1.5, "float"), (torch.zeros(3), r"a tensor of shape \(3,\)")],
    ids=str,
)
@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_no_loss_is_refused_this_once(output, found, engine):
    """None means "skip this batch" to Lightning: the next one may be measured."""

    class Returns(MLP):
        def training_step(self, batch, batch_idx):
            return output

    module, batch = Case(lambda: Returns()).build()
    with pytest.raises(MeasurementError, match=f"returned {found} where a scalar loss was expected") as refused:
        per_example_squared_norms(module, batch, engine=engine)
    assert not refused.value.lasting


def classify(net, batch):
    return F.cross_entropy(net(batch[0]), batch[1])


@pytest.mark.parametrize("engine", ENGINES)
def test_any_module_is_measured_with_a_loss_function(engine):
    torch.manual_seed(0)
    net, batch = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double(), vectors(N, torch.float64)
    before = state_of(net)
    norms = per_example_squared_norms(net, batch, loss_fn=classify, engine=engine)
    assert state_of(net) == before
    assert relative_error(norms, reference_norms(net, batch, loss_fn=classify)) < 1e-12
    assert measure_moments(net, batch, loss_fn=classify, engine=engine).sum_sq_norms == pytest.approx(
        float(norms.sum())
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loss_function_that_holds_the_net_itself_is_right_too(engine):
    torch.manual_seed(0)
    net, batch = nn.Sequential(nn.Linear(5, 3), nn.GroupNorm(1, 3)).double(), vectors(N, torch.float64)
    norms = per_example_squared_norms(net, batch, loss_fn=lambda _, batch: classify(net, batch), engine=engine)
    assert relative_error(norms, reference_norms(net, batch, loss_fn=classify)) < 1e-12


@pytest.mark.parametrize("engine", ENGINES)
def test_a_teacher_that_only_the_loss_function_holds_is_not_written_to(engine):
    torch.manual_seed(0)
    net, batch = nn.Linear(5, 3).double(), vectors(N, torch.float64)
    teacher = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).double().requires_grad_(False)
    teacher[1].eval()
    teacher.register_buffer("calls", torch.zeros(()))

    def distill(net, batch):
        teacher.calls = teacher.calls + 1
        return F.mse_loss(net(batch[0]), teacher(batch[0]))

    before = state_of(teacher)
    norms = per_example_squared_norms(net, batch, loss_fn=distill, engine=engine)
    assert state_of(teacher) == before
    assert relative_error(norms, reference_norms(net, batch, loss_fn=distill)) < 1e-12


def test_a_plain_module_without_a_loss_function_is_a_type_error():
    with pytest.raises(TypeError, match=r"Expected argument `loss_fn`.*`Linear` is not a LightningModule"):
        per_example_squared_norms(nn.Linear(5, 3), vectors(N, torch.float32))


@pytest.mark.parametrize("engine", ENGINES)
def test_manual_optimization_is_measured_up_to_its_backward_pass(engine):
    class Manual(MLP):
        steps = 0

        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def optimizers(self):
            return self.optimizer

        def training_step(self, batch, batch_idx):
            self.optimizers().zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.optimizers().step()
            type(self).steps += 1

    module, batch = Case(lambda: Manual()).build()
    module.optimizer = torch.optim.SGD(module.parameters(), 0.1)
    before = [p.detach().clone() for p in module.parameters()]
    norms = per_example_squared_norms(module, batch, engine=engine)
    plain = MLP().to(torch.float64)
    plain.load_state_dict(module.state_dict())
    assert relative_error(norms, reference_norms(plain, batch)) < 1e-12
    assert Manual.steps == 0
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_manual_optimization_without_a_backward_pass_is_refused():
    class Manual(MLP):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    module, batch = Case(lambda: Manual()).build()
    module._trainer = None
    with pytest.raises(MeasurementError, match=r"`Manual` uses manual optimization.*calls no") as refused:
        per_example_squared_norms(module, batch)
    assert refused.value.lasting
    assert per_example_squared_norms(module, batch, loss_fn=lambda m, b: classify(m.net, b)).all()


def test_nothing_to_train_is_refused():
    module, batch = Case(MLP).build()
    module.requires_grad_(False)
    with pytest.raises(MeasurementError, match="`MLP` has no trainable parameters") as refused:
        per_example_squared_norms(module, batch)
    assert refused.value.lasting


def test_lazy_parameters_are_refused_until_they_have_a_shape():
    class Lazy(MLP):
        def __init__(self):
            super().__init__()
            self.net = nn.LazyLinear(3)

    module, batch = Lazy(), vectors(N, torch.float32)
    with pytest.raises(MeasurementError, match=r"`Lazy` holds a lazy parameter.*run one forward pass") as refused:
        per_example_squared_norms(module, batch)
    assert not refused.value.lasting
    module.net(batch[0])
    assert per_example_squared_norms(module, batch).all()


def test_sharded_parameters_are_refused():
    module, batch = Case(MLP).build()
    module.net[0].weight.device_mesh = "what a DTensor has"
    with pytest.raises(MeasurementError, match=r"sharded parameters \(DTensor\).*single device or DDP") as refused:
        per_example_squared_norms(module, batch)
    assert refused.value.lasting


def test_only_the_optimizers_parameters_are_measured():
    module, _ = Case(MLP).build()
    chosen = [*module.net[3].parameters()]
    loss = StepLoss(module, parameters=[*chosen, nn.Parameter(torch.zeros(3), requires_grad=False)])
    assert [id(p) for p in loss.parameters] == [id(p) for p in chosen]


def test_parameters_that_only_the_optimizer_knows_are_refused():
    module, _ = Case(MLP).build()
    with pytest.raises(MeasurementError, match=r"1 of the optimizer's parameters.*Register them"):
        StepLoss(module, parameters=[*module.parameters(), nn.Parameter(torch.zeros(3))])


def test_the_loss_at_other_values_is_the_loss_of_a_module_with_those_values():
    module, batch = Case(MLP).build()
    loss = StepLoss(module)
    moved = [p.detach() + 1 for p in loss.parameters]
    expected, _ = Case(MLP).build()
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter += 1
    torch.testing.assert_close(loss.at(moved, batch), expected.training_step(batch, 0))


def test_random_states_come_back_and_the_default_seed_is_used_meanwhile():
    module, _ = Case(MLP).build()
    before = random_states()
    with pytest.raises(KeyError), measuring(module):  # noqa: PT012 - what happens before the exception is the point
        torch.rand(1), random.random(), np.random.rand()
        assert random_states() != before
        raise KeyError
    assert random_states() == before
