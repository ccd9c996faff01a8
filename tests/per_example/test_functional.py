"""The engines against a reference that is written anew: one deep copy and one backward for each example."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_graddiv import measure_moments, per_example_squared_norms
from lightning_graddiv.errors import MeasurementError
from lightning_graddiv.per_example import functional
from lightning_graddiv.per_example.functional import differentiate, functional_gradients, loop_gradients
from lightning_graddiv.per_example.losses import StepLoss, measuring
from lightning_graddiv.per_example.norms import sum_of_squares
from tests.models import CASES, MLP, Base, Case, N, reference_gradients, reference_norms, relative_error, vectors

ENGINES = ["functional", "loop"]
PRECISIONS = [(torch.float32, 1e-5), (torch.float64, 1e-12)]


def skip_where_torch_cannot(name, engine, dtype):
    if name == "lstm" and engine != "loop" and dtype == torch.float64:
        pytest.skip("torch's LSTM runs under vmap in float32 only")


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=["float32", "float64"])
@pytest.mark.parametrize("engine", [*ENGINES, "auto"])
@pytest.mark.parametrize("name", CASES)
def test_every_engine_gives_the_norms_of_one_backward_per_example(name, engine, dtype, tolerance):
    skip_where_torch_cannot(name, engine, dtype)
    module, batch = CASES[name].build(dtype=dtype)
    norms = per_example_squared_norms(module, batch, engine=engine)
    assert norms.shape == (N,)
    assert norms.dtype == torch.float64
    assert relative_error(norms, reference_norms(module, batch)) < tolerance


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CASES)
def test_the_moments_are_those_of_the_gradients(name, engine):
    skip_where_torch_cannot(name, engine, torch.float64)
    module, batch = CASES[name].build()
    gradients = reference_gradients(module, batch)
    moments = measure_moments(module, batch, engine=engine)
    assert moments.count == N
    assert moments.sum_sq_norms == pytest.approx(gradients.square().sum().item(), rel=1e-12)
    assert moments.sq_norm_of_sum == pytest.approx(gradients.sum(0).square().sum().item(), rel=1e-12)


@pytest.mark.parametrize("engine", [functional_gradients, loop_gradients])
def test_two_parameters_with_one_gradient_tensor_are_summed_apart(engine):
    """For `x @ (a + b)` autograd hands out one and the same tensor twice."""
    module, batch = CASES["bare"].build()
    found = engine(StepLoss(module), batch, N).gradient_sum
    torch.testing.assert_close(found, reference_gradients(module, batch).sum(0), rtol=1e-12, atol=1e-15)


def test_the_sum_over_many_examples_does_not_stay_in_low_precision():
    module, batch = Case(MLP).build(64, torch.bfloat16)
    for engine in (functional_gradients, loop_gradients):
        found = engine(StepLoss(module), batch, 64)
        assert found.gradient_sum.dtype == torch.float32
        assert found.sq_norms.dtype == torch.float64


@pytest.mark.parametrize("engine", ENGINES)
def test_low_precision_parameters_are_measured(engine):
    module, batch = Case(MLP).build(dtype=torch.bfloat16)
    norms = per_example_squared_norms(module, batch, engine=engine)
    expected = reference_norms(module.double(), (batch[0].double(), batch[1]))
    assert relative_error(norms, expected) < 0.1


class MixedPrecision(Base):
    """Full-precision adapters on a frozen low-precision body: the rounding is the body's."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 64).bfloat16().requires_grad_(False)
        self.head = nn.Linear(64, 3)

    def logits(self, x):
        return self.head((self.body(x.bfloat16()).exp() * (1 + self.head.bias.mean().bfloat16())).float())


def test_the_tolerance_is_that_of_the_coarsest_parameter():
    torch.manual_seed(0)
    per_example_squared_norms(MixedPrecision(), (10 * torch.randn(64, 5), torch.arange(64) % 3))


class ComplexModel(Base):
    def __init__(self):
        super().__init__()
        self.mixing = nn.Parameter(torch.randn(5, 3, dtype=torch.complex128))

    def logits(self, x):
        return (x.to(self.mixing.dtype) @ self.mixing).abs()


@pytest.mark.parametrize("engine", ENGINES)
def test_complex_parameters_count_with_their_modulus(engine):
    torch.manual_seed(0)
    module, batch = ComplexModel(), vectors(N, torch.float64)
    assert (
        relative_error(per_example_squared_norms(module, batch, engine=engine), reference_norms(module, batch)) < 1e-12
    )


class SparseEmbedding(Base):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 3, sparse=True)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.embed(batch[0]).mean(1), batch[1])


def test_sparse_gradients_are_measured():
    torch.manual_seed(0)
    batch = torch.tensor([[1, 1, 2], [2, 3, 3], [4, 5, 6], [0, 0, 0]]), torch.tensor([0, 1, 2, 0])
    module = SparseEmbedding().double()
    norms = per_example_squared_norms(module, batch, engine="loop")
    assert relative_error(norms, reference_norms(module, batch, 4)) < 1e-12


class Detector(MLP):
    """An image without objects adds a constant to the loss."""

    def training_step(self, batch, batch_idx):
        x = batch[0]
        losses = [F.cross_entropy(self.logits(a[None]), b[None]) if b > 0 else torch.zeros(()) for a, b in zip(*batch)]  # noqa: B905
        return torch.stack([loss.to(x.dtype) for loss in losses]).mean()


def test_an_example_that_the_loss_ignores_has_gradient_zero():
    module, batch = Case(Detector).build()
    norms = per_example_squared_norms(module, batch, engine="loop")
    assert norms.gt(0).tolist() == batch[1].gt(0).tolist()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("chunk_bytes", [1, 2000, 10**9])
def test_results_do_not_depend_on_the_chunk(engine, chunk_bytes, monkeypatch):
    module, batch = CASES["cnn"].build(n=7)
    expected = per_example_squared_norms(module, batch, engine=engine)
    monkeypatch.setattr(functional, "_CHUNK_BYTES", chunk_bytes)
    assert relative_error(per_example_squared_norms(module, batch, engine=engine), expected) < 1e-12


def test_gradients_that_are_held_at_a_time_are_bounded(monkeypatch):
    module, batch = Case(lambda: Wide()).build(n=32)
    parameter_bytes = 8 * sum(p.numel() for p in module.parameters())
    monkeypatch.setattr(functional, "_CHUNK_BYTES", 4 * parameter_bytes)
    held, original = [], functional.sum_of_squares
    monkeypatch.setattr(
        functional,
        "sum_of_squares",
        lambda gradients, **keywords: (held.append(_gradient_bytes()), original(gradients, **keywords))[1],
    )
    functional_gradients(StepLoss(module), batch, 32)
    assert len(held) == 8
    assert max(held) <= 9 * parameter_bytes  # a chunk, and at most what the chunk before has not released yet


class Wide(MLP):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(5, 3)
        self.wide = nn.Parameter(torch.randn(5, 1000))

    def logits(self, x):
        return self.net(x) + (x @ self.wide).square().mean(1, keepdim=True) * torch.arange(3)


def _gradient_bytes():
    tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.ndim == 3 and t.shape[1:] == (5, 1000)]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


@pytest.mark.parametrize("engine", [functional_gradients, loop_gradients])
def test_dropout_masks_are_fresh_for_each_example(engine):
    module, (x, y) = Case(lambda: MLP(dropout=0.5)).build(2)
    same = x[:1].expand(64, -1).contiguous(), y[:1].expand(64).contiguous()
    with measuring(module):
        norms = engine(StepLoss(module), same, 64).sq_norms
    assert len(norms.unique()) > 32


def test_without_noise_identical_examples_have_identical_norms():
    module, (x, y) = Case(MLP).build(2)
    same = x[:1].expand(64, -1).contiguous(), y[:1].expand(64).contiguous()
    norms = per_example_squared_norms(module, same, engine="functional")
    assert relative_error(norms, norms[:1].expand(64)) < 1e-12


class NotANumber(MLP):
    """The gradient is a number all the same."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch[:2], batch_idx) + batch[2].mean()


@pytest.mark.parametrize("engine", [loop_gradients, functional_gradients])
def test_a_loss_that_is_not_finite_gives_no_number(engine):
    module, (x, y) = Case(NotANumber).build()
    offset = torch.zeros(N, dtype=x.dtype)
    offset[2] = float("nan")
    with pytest.raises(MeasurementError, match="not finite"):
        engine(StepLoss(module), (x, y, offset), N)


class RootOfZero(MLP):
    def training_step(self, batch, batch_idx):
        return (self.logits(batch[0]) * batch[0][:, :1]).square().sum(1).sqrt().mean()


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_a_gradient_that_is_not_finite_gives_no_number(engine):
    module, (x, y) = Case(RootOfZero).build()
    x[0] = 0
    with pytest.raises(MeasurementError, match=r"gradient.* is not finite") as refused:
        per_example_squared_norms(module, (x, y), engine=engine)
    assert not refused.value.lasting
    for measure in (functional_gradients, loop_gradients):
        with pytest.raises(MeasurementError, match="not finite"):
            measure(StepLoss(module), (x, y), N)


class Checkpointed(MLP):
    reentrant = False

    def logits(self, x):
        return checkpoint(self.net, x, use_reentrant=self.reentrant)


class Reentrant(MLP):
    """Autograd reaches the last layer, and would take the first for unused."""

    def logits(self, x):
        return self.net[3](checkpoint(self.net[:3], x.requires_grad_(), use_reentrant=True))


@pytest.mark.parametrize("engine", ["auto", "ghost", "loop"])
@pytest.mark.parametrize("kind", [Checkpointed, Reentrant])
def test_both_kinds_of_checkpoints_are_measured(kind, engine):
    module, batch = Case(kind).build()
    norms = per_example_squared_norms(module, batch, engine=engine)
    assert relative_error(norms, reference_norms(Case(MLP).build()[0], batch)) < 1e-12
    assert all(parameter.grad is None for parameter in module.parameters())


class FailsOnOne(MLP):
    def training_step(self, batch, batch_idx):
        if len(batch[0]) == 1:
            raise IndexError("too few rows")
        return super().training_step(batch, batch_idx)


def test_a_step_that_fails_on_one_example_is_refused_with_its_reason():
    module, batch = Case(FailsOnOne).build()
    with pytest.raises(MeasurementError, match=r"FailsOnOne.*part of its batch.*IndexError: too few rows") as refused:
        loop_gradients(StepLoss(module), batch, N)
    assert refused.value.lasting


def test_out_of_memory_is_not_taken_for_a_property_of_the_module():
    class Large(MLP):
        def training_step(self, batch, batch_idx):
            raise torch.OutOfMemoryError("no memory")

    module, batch = Case(Large).build()
    for engine in ("auto", *ENGINES):
        with pytest.raises(torch.OutOfMemoryError):
            per_example_squared_norms(module, batch, engine=engine)


def test_unused_and_empty_parameters_count_zero():
    module, batch = CASES["bare"].build()
    gradients = dict(
        zip(
            [n for n, p in module.named_parameters() if p.requires_grad],
            differentiate(StepLoss(module), batch),
            strict=True,
        )
    )
    assert not gradients["unused"].any()
    assert gradients["empty"].numel() == 0
    assert gradients["a"].any()
    assert "frozen" not in gradients


def test_only_empty_parameters_give_zero():
    class Nothing(MLP):
        def __init__(self):
            super().__init__()
            self.net = nn.Identity()
            self.empty = nn.Parameter(torch.zeros(0))

        def logits(self, x):
            return x + self.empty.sum()

    module, batch = Case(Nothing).build()
    assert not functional_gradients(StepLoss(module), batch, N).sq_norms.any()


def test_squared_norms_are_summed_in_double_precision():
    tiny, huge = torch.full((1000,), 1e-30), torch.full((10,), 1e15)
    assert sum_of_squares([tiny]).item() == pytest.approx(1e-57, rel=1e-6)
    assert sum_of_squares([huge, tiny]).item() == pytest.approx(1e31, rel=1e-6)
    assert sum_of_squares([torch.full((3, 2), 1 + 1j)], per_row=True).tolist() == pytest.approx([4.0] * 3)


@pytest.mark.parametrize("entries", [0, 1, 1023, 1024, 1025, 10**7])
def test_squared_norms_of_float32_are_right_to_the_last_digits(entries):
    gradients = [torch.randn(2, entries, generator=torch.Generator().manual_seed(0))]
    expected = gradients[0].double().square().sum(1)
    torch.testing.assert_close(sum_of_squares(gradients, per_row=True), expected, rtol=3e-7, atol=0)
    torch.testing.assert_close(sum_of_squares(gradients), expected.sum(), rtol=3e-7, atol=0)
