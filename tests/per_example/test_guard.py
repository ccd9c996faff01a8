"""Training steps that write to parameters: seen before it happens, and undone where it could not be seen."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_graddiv import per_example_squared_norms
from lightning_graddiv.errors import FunctionalEngineError, MeasurementError
from lightning_graddiv.per_example.functional import functional_gradients
from lightning_graddiv.per_example.guard import parameters_guarded, writes_refused
from lightning_graddiv.per_example.losses import StepLoss
from lightning_graddiv.per_example.select import PerExampleEngine
from tests.models import MLP, Case, N, reference_norms, relative_error, state_of

ENGINES = ["auto", "functional", "loop"]


class MomentumTeacher(MLP):
    """BYOL, DINO, MoCo, mean teachers: a teacher that follows the student within training_step."""

    def __init__(self):
        super().__init__()
        self.teacher = nn.Linear(5, 3).requires_grad_(False)

    def update(self, teacher, student):
        teacher.mul_(0.9).add_(student, alpha=0.1)

    @torch.no_grad()
    def update_all(self):
        self.update(self.teacher.bias, self.net[3].bias)

    def training_step(self, batch, batch_idx):
        self.update_all()
        return F.mse_loss(self.logits(batch[0]), self.teacher(batch[0]))


class TeacherData(MomentumTeacher):
    def update(self, teacher, student):
        teacher.data = teacher.data * 0.9 + student.data * 0.1


class TeacherInPlaceData(MomentumTeacher):
    def update(self, teacher, student):
        teacher.data.mul_(0.9).add_(student.data, alpha=0.1)


class TeacherCopy(MomentumTeacher):
    def update(self, teacher, student):
        teacher.copy_(teacher * 0.9 + student * 0.1)


class TeacherForeach(MomentumTeacher):
    def update_all(self):
        torch._foreach_mul_([p.data for p in self.teacher.parameters()], 0.9)


@pytest.mark.filterwarnings("ignore:Engine `functional` cannot measure")
@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("make", [MomentumTeacher, TeacherData, TeacherInPlaceData, TeacherCopy, TeacherForeach])
def test_a_momentum_teacher_is_measured_and_stays_where_it_is(make, engine):
    module, batch = Case(make).build()
    before = state_of(module)
    norms = per_example_squared_norms(module, batch, engine=engine)
    assert state_of(module) == before
    assert relative_error(norms, reference_norms(module, batch)) < 1e-12


class StartsEqual(TeacherData):
    """At the first step teacher and student agree, so that nothing but the write itself gives it away."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(5, 3)
        self.teacher.load_state_dict(self.net.state_dict())

    def update_all(self):
        with torch.no_grad():
            self.update(self.teacher.weight, self.net.weight)

    def training_step(self, batch, batch_idx):
        self.update_all()
        return F.mse_loss(self.net(batch[0]), self.teacher(batch[0]) + 1)


@pytest.mark.filterwarnings("ignore:Engine `functional` cannot measure")
@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_a_teacher_that_still_equals_its_student_is_found_too(engine):
    module, batch = Case(StartsEqual).build()
    before = state_of(module)
    norms = per_example_squared_norms(module, batch, engine=engine)
    assert state_of(module) == before
    assert relative_error(norms, reference_norms(module, batch)) < 1e-12


def test_replacing_data_within_a_transform_is_an_error_and_no_crash():
    """Torch would end the process, were the parameter itself replaced there."""
    module, batch = Case(TeacherData).build()
    before = state_of(module)
    for copies_frozen in (False, True):
        loss = StepLoss(module)
        loss.copies_frozen = copies_frozen
        with pytest.raises(FunctionalEngineError, match="data"):
            functional_gradients(loss, batch, N)
    assert state_of(module) == before


class Normalises(MLP):
    """SwAV normalises its prototypes in training_step; a critic clips its weights there."""

    def write(self, weight):
        weight.copy_(F.normalize(weight))

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.write(self.net[3].weight)
        return super().training_step(batch, batch_idx)


class Clips(Normalises):
    def write(self, weight):
        weight.data.clamp_(-0.01, 0.01)


class Replaces(Normalises):
    def write(self, weight):
        weight.data = F.normalize(weight.data)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("make", [Normalises, Clips, Replaces])
def test_writing_to_a_trained_parameter_is_refused_and_not_done(make, engine):
    module, batch = Case(make).build()
    before = state_of(module)
    with pytest.raises(MeasurementError, match=r"writes to `net.3.weight` itself.*on_train_batch_end") as refused:
        per_example_squared_norms(module, batch, engine=engine)
    assert refused.value.lasting
    assert state_of(module) == before


@pytest.mark.parametrize("has_gradient", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_backward_pass_of_the_steps_own_is_refused_and_leaves_no_gradient(engine, has_gradient):
    class Backward(MLP):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx).backward()
            return super().training_step(batch, batch_idx)

    module, batch = Case(lambda: Backward()).build()
    if has_gradient:
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
    before = state_of(module)
    with pytest.raises(MeasurementError, match=r"writes to `net.*grad` itself.*leave backward\(\) to Lightning"):
        per_example_squared_norms(module, batch, engine=engine)
    assert state_of(module) == before


def test_a_write_between_the_checks_is_reported():
    module, _ = Case(MLP).build()
    with pytest.raises(MeasurementError, match=r"writes to `net.0.bias` itself"), parameters_guarded(module):
        torch.nn.init.zeros_(module.net[0].bias)


class ReplacesAtTimes(MLP):
    """A hard update of a target network, every so many steps."""

    due = False

    def training_step(self, batch, batch_idx):
        if self.due:
            self.net[0].bias.data = torch.zeros_like(self.net[0].bias)
        return super().training_step(batch, batch_idx)


def test_data_that_is_replaced_between_the_checks_is_put_back():
    module, batch = Case(ReplacesAtTimes).build()
    engine, loss = PerExampleEngine("loop"), StepLoss(module)
    for _ in range(3):
        engine.measure(loss, batch)
    module.due = True
    before = state_of(module)
    with pytest.raises(MeasurementError, match=r"writes to `net.0.bias` itself"):
        engine.measure(loss, batch)
    assert state_of(module) == before


def test_a_check_puts_replaced_data_back_before_anything_else_runs():
    module, _ = Case(MLP).build()
    before = state_of(module)
    with pytest.raises(MeasurementError, match=r"writes to `net.0.bias` itself"), writes_refused(module):
        module.net[0].bias.data = torch.zeros_like(module.net[0].bias)
    assert state_of(module) == before


def test_replaced_data_and_gradients_are_put_back_after_an_exception_too():
    module, _ = Case(MLP).build()
    module.net[0].weight.grad = torch.ones_like(module.net[0].weight)
    before = state_of(module)
    with pytest.raises(MeasurementError), parameters_guarded(module):  # noqa: PT012 - and then raises
        module.net[0].weight.data = torch.zeros_like(module.net[0].weight)
        module.net[0].weight.grad = None
        raise KeyError
    assert state_of(module) == before


def test_reading_is_allowed():
    module, batch = Case(MLP).build()
    with parameters_guarded(module), writes_refused(module):
        loss = module.training_step(batch, 0)
        torch.autograd.grad(loss, list(module.parameters()))
        scratch = module.net[0].weight.detach().clone()
        scratch.zero_()
    assert len(batch[0]) == N


def test_parameters_without_a_plain_storage_do_not_get_in_the_way():
    class Sparse(MLP):
        def __init__(self):
            super().__init__()
            self.adjacency = nn.Parameter(torch.eye(3).to_sparse(), requires_grad=False)

    module, batch = Case(lambda: Sparse()).build()
    with parameters_guarded(module), writes_refused(module):
        module.training_step(batch, 0)
