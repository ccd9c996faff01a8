"""Losses that cannot be split into examples are recognised by what they do, and the message says which kind it is."""

import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from lightning_graddiv import per_example_squared_norms
from lightning_graddiv.errors import FunctionalEngineError, MeasurementError, MixingError
from lightning_graddiv.per_example import separability
from lightning_graddiv.per_example.functional import PerExampleGradients, loop_gradients
from lightning_graddiv.per_example.losses import StepLoss, measuring
from lightning_graddiv.per_example.precision import full_precision
from lightning_graddiv.per_example.separability import check_engine, check_separable, check_sum
from tests.models import MLP, Case, GroupNormCNN, pairs, reference_norms, relative_error, state_of, vectors

ENGINES = ["auto", "functional", "loop"]
N = 12


def measure(make, engine="auto", make_batch=vectors, n=N):
    module, batch = Case(make, make_batch).build(n)
    before = state_of(module)
    try:
        return per_example_squared_norms(module, batch, engine=engine)
    finally:
        assert state_of(module) == before


class BatchNormCNN(GroupNormCNN):
    def __init__(self):
        super().__init__()
        self.net[1] = nn.BatchNorm2d(4)


class Mixup(MLP):
    """Mixes every example with another; ``partners`` gives the other's index."""

    def partners(self, n):
        return torch.randperm(n)

    def training_step(self, batch, batch_idx):
        x, y = batch
        other = self.partners(len(x))
        logits = self.logits(0.6 * x + 0.4 * x[other])
        return 0.6 * F.cross_entropy(logits, y) + 0.4 * F.cross_entropy(logits, y[other])


class MixupByFlip(Mixup):
    def partners(self, n):
        return torch.arange(n).flip(0)


class MixupByRoll(Mixup):
    def partners(self, n):
        return torch.arange(n).roll(1)


class MixupByArgsort(Mixup):
    def partners(self, n):
        return torch.rand(n).argsort()


class MixupByTopk(Mixup):
    def partners(self, n):
        return torch.randn(n).topk(n).indices


class MixupByRandint(Mixup):
    def partners(self, n):
        return torch.randint(n, (n,))


class MixupByNumpy(Mixup):
    def partners(self, n):
        return torch.from_numpy(np.random.permutation(n))


class MixupSometimes(Mixup):
    """With a probability that a single try would miss, or always hit."""

    def happens(self):
        return torch.rand(()) < 0.3

    def partners(self, n):
        return super().partners(n) if self.happens() else torch.arange(n)


class MixupUnless(MixupSometimes):
    def happens(self):
        return torch.rand(()) > 0.7


class MixupSometimesByNumpy(MixupSometimes):
    def happens(self):
        return np.random.rand() < 0.3


class MixupUnlessByPython(MixupSometimes):
    def happens(self):
        return random.random() > 0.7


class MixupByBeta(Mixup):
    def training_step(self, batch, batch_idx):
        x, y = batch
        share = torch.distributions.Beta(0.2, 0.2).sample().to(x.dtype)
        return F.cross_entropy(self.logits(share * x + (1 - share) * x[torch.randperm(len(x))]), y)


class BatchHard(MLP):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.logits(x), y, reduction="none").max()


class SumWithRegulariser(MLP):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.logits(x), y, reduction="sum") + self.net[0].weight.square().sum()


MIXED = [
    Mixup,
    MixupByFlip,
    MixupByRoll,
    MixupByArgsort,
    MixupByTopk,
    MixupByRandint,
    MixupByNumpy,
    MixupSometimes,
    MixupUnless,
    MixupSometimesByNumpy,
    MixupUnlessByPython,
    MixupByBeta,
    SumWithRegulariser,
]


@pytest.mark.filterwarnings("ignore:Engine `functional` cannot measure")
@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("make", MIXED, ids=lambda make: make.__name__)
def test_losses_that_mix_examples_are_refused(make, engine):
    with pytest.raises(MeasurementError, match=r"mixes the examples|weighs the examples.*or mixes them") as refused:
        measure(make, engine)
    assert refused.value.lasting


@pytest.mark.parametrize("engine", ENGINES)
def test_batch_normalisation_is_refused_in_training_and_measured_in_evaluation(engine):
    with pytest.raises(MeasurementError, match=r"Batch normalisation in training.*GroupNorm") as refused:
        measure(BatchNormCNN, engine, pairs(2, 6, 6))
    assert refused.value.lasting
    module, batch = Case(BatchNormCNN, pairs(2, 6, 6)).build(N)
    module.net[1].eval()
    norms = per_example_squared_norms(module, batch, engine=engine)
    assert relative_error(norms, reference_norms(module, batch, N)) < 1e-12


def test_a_step_without_a_mean_over_examples_is_refused():
    with pytest.raises(MeasurementError):
        measure(BatchHard)


class Contrastive(MLP):
    def training_step(self, batch, batch_idx):
        features = self.logits(batch[0])
        similarity = features @ features.T
        return F.cross_entropy(similarity, torch.arange(len(similarity)))


def test_a_contrastive_loss_is_recognised_by_gradients_of_zero():
    with pytest.raises(MeasurementError, match=r"needs more than one example.*contrastive") as refused:
        measure(Contrastive)
    assert refused.value.lasting


def test_a_minimum_may_pass():
    """Exactly zero everywhere, the batch's too: the next batch may be measured."""

    class AtTheMinimum(MLP):
        def training_step(self, batch, batch_idx):
            return self.logits(batch[0]).sum() * 0

    with pytest.raises(MeasurementError, match="exactly zero") as refused:
        measure(AtTheMinimum)
    assert not refused.value.lasting


def test_a_gradient_that_vanishes_in_company_is_refused():
    class OnlyAlone(MLP):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (len(batch[0]) == 1)

    with pytest.raises(MeasurementError, match="mixes the examples"):
        measure(lambda: OnlyAlone(), "loop")


class TokenMean(MLP):
    """Padded sequences whose loss averages over all tokens of the batch."""

    def training_step(self, batch, batch_idx):
        x, lengths = batch
        mask = torch.arange(4) < lengths[:, None]
        return (self.logits(x).square().sum(-1) * mask).sum() / mask.sum()


def padded(lengths):
    return lambda n, dtype: (torch.randn(n, 4, 5, dtype=dtype), torch.tensor(lengths))


class ClassWeights(MLP):
    def training_step(self, batch, batch_idx):
        weight = torch.tensor([1.0, 2.0, 5.0], dtype=batch[0].dtype)
        return F.cross_entropy(self.logits(batch[0]), batch[1], weight=weight)


@pytest.mark.parametrize("engine", ENGINES)
def test_token_means_are_recognised_as_weights(engine):
    with pytest.raises(MeasurementError, match=r"weighs the examples.*shares 0\.\d{3}, .*Average within") as refused:
        measure(TokenMean, engine, padded([1, 2, 3, 4]), n=4)
    assert refused.value.lasting


@pytest.mark.parametrize("engine", ENGINES)
def test_class_weights_are_recognised_as_weights(engine):
    with pytest.raises(MeasurementError, match=r"weighs the examples.*class weights") as refused:
        measure(ClassWeights, engine)
    assert refused.value.lasting


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_that_the_tried_examples_do_not_show_are_found_in_the_whole_batch(engine):
    def one_rare(n, dtype):
        return torch.randn(n, 5, dtype=dtype), (torch.arange(n) == untried).long() * 2

    tried = set(random.Random(0).sample(range(64), 4))
    untried = next(i for i in range(64) if i not in tried)
    with pytest.raises(MeasurementError, match=r"although those of a few do.*weighs the examples"):
        measure(ClassWeights, engine, one_rare, n=64)


@pytest.mark.parametrize("engine", ENGINES)
def test_equal_lengths_and_means_of_means_are_no_weights(engine):
    measure(TokenMean, engine, padded([3] * N))

    class MeanOfMeans(MLP):
        def training_step(self, batch, batch_idx):
            x, lengths = batch
            mask = torch.arange(4) < lengths[:, None]
            return ((self.logits(x).square().sum(-1) * mask).sum(1) / mask.sum(1)).mean()

    measure(MeanOfMeans, engine, padded([1, 2, 3, 4] * 3))


@pytest.mark.parametrize("divisor", [1, 7.0], ids=str)
def test_sums_and_other_common_factors_are_fine(divisor):
    class Summed(MLP):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.logits(batch[0]), batch[1], reduction="sum") / divisor

    module, batch = Case(lambda: Summed()).build(N)
    for engine in ENGINES:
        norms = per_example_squared_norms(module, batch, engine=engine)
        assert relative_error(norms, reference_norms(module, batch, N)) < 1e-12


def test_a_regulariser_in_a_mean_loss_belongs_to_every_example():
    class Regularised(MLP):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.net[0].weight.square().sum()

    module, batch = Case(lambda: Regularised()).build(N)
    for engine in ENGINES:
        norms = per_example_squared_norms(module, batch, engine=engine)
        assert relative_error(norms, reference_norms(module, batch, N)) < 1e-12


class Noisy(MLP):
    """Noise of every common kind, drawn for each example."""

    def __init__(self):
        super().__init__(dropout=0.5)

    def logits(self, x):
        keep = torch.rand(len(x), 1) < 0.9
        noise = torch.randn_like(x) + torch.rand(len(x), 1, dtype=x.dtype)
        order = torch.rand(x.shape).argsort(1)  # a shuffle within each example mixes nothing
        return self.net((x + noise * keep).gather(1, order))


@pytest.mark.filterwarnings("ignore:Engine `functional` cannot measure")
@pytest.mark.parametrize("engine", ENGINES)
def test_noise_of_each_examples_own_is_no_mixing(engine):
    assert len(measure(Noisy, engine).unique()) == N


@pytest.mark.parametrize("engine", ENGINES)
def test_one_random_number_for_the_whole_step_is_no_mixing(engine):
    class Temperature(MLP):
        def logits(self, x):
            return self.net(x) * (1 + random.random() + np.random.rand() + torch.rand((), dtype=x.dtype))

    assert len(measure(Temperature, engine)) == N


def test_a_hidden_state_of_the_batchs_size_is_refused():
    """The state that the step before left behind fits the whole batch only."""

    class Stateful(MLP):
        def __init__(self):
            super().__init__()
            self.state = torch.randn(N, 5, dtype=torch.float64)

        def logits(self, x):
            state = self.state if len(x) == N else torch.zeros_like(x)
            self.state = x.detach()
            return self.net(x + state)

    with pytest.raises(MeasurementError, match="although those of a few do"):
        measure(Stateful, "loop")


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def all_reduce(x):
    y = x.detach().clone()
    dist.all_reduce(y)
    return y


def all_gather(x):
    gathered = [torch.zeros_like(x)]
    dist.all_gather(gathered, x.detach())
    return gathered[0]


def functional_all_gather(x):
    from torch.distributed.nn.functional import all_gather as gather

    return gather(x)[0]


def barrier(x):
    dist.barrier()
    return x


@pytest.mark.filterwarnings("ignore:torch.distributed.nn.functional.all_gather is deprecated")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("collective", [all_reduce, all_gather, functional_all_gather, barrier])
def test_collectives_are_refused(collective, engine, process_group):
    class Gathers(MLP):
        def logits(self, x):
            return self.net(x) + collective(self.net(x)).sum()

    with pytest.raises(MeasurementError, match="calls a collective") as refused:
        measure(lambda: Gathers(), engine)
    assert refused.value.lasting


def test_the_examples_that_are_tried_depend_on_the_seed():
    module, batch = Case(MLP).build(64)
    loss = StepLoss(module)
    samples = [check_separable(loss, batch, 64, seed=seed) for seed in (0, 1)]
    assert [sample.total for sample in samples] == [4, 4]
    assert not torch.equal(samples[0].batch[0], samples[1].batch[0])
    assert check_separable(loss, (batch[0][:2], batch[1][:2]), 2).total == 2


def test_an_engine_that_disagrees_with_the_loop_is_found():
    module, batch = Case(MLP).build(N)
    loss = StepLoss(module)
    sample = check_separable(loss, batch, N)

    def off_by(share):
        def engine(loss, batch, total):
            right = loop_gradients(loss, batch, total)
            return PerExampleGradients(right.sq_norms * (1 + share), right.gradient_sum)

        return engine

    check_engine(off_by(1e-8), loss, sample)
    with pytest.raises(FunctionalEngineError, match="other gradients than the plain loop"):
        check_engine(off_by(0.01), loss, sample)


def test_a_sum_that_is_off_is_found():
    module, batch = Case(MLP).build(N)
    loss = StepLoss(module)
    with measuring(module):
        right = loop_gradients(loss, batch, N)
        check_sum(loss, batch, right)
        check_sum(loss, batch, PerExampleGradients(right.sq_norms, 3 * right.gradient_sum))
        for wrong in (-right.gradient_sum, right.gradient_sum.flip(0), right.gradient_sum * 0):
            with pytest.raises(MeasurementError):
                check_sum(loss, batch, PerExampleGradients(right.sq_norms, wrong))


def test_checks_compute_in_full_precision_and_put_the_users_choice_back():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("medium")
    seen = []

    class Looks(MLP):
        def logits(self, x):
            seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
            return super().logits(x)

    try:
        measure(lambda: Looks(), "loop")
        assert set(seen) == {("highest", False)}
        assert torch.get_float32_matmul_precision() == "medium"
        with pytest.raises(KeyError), full_precision():
            raise KeyError
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before[0])
    assert torch.backends.cudnn.allow_tf32 == before[1]


class TestOnAGpu:
    """Which rounds otherwise for each size of batch: told to the checks, where there is none."""

    @pytest.fixture(autouse=True)
    def _told(self, monkeypatch):
        monkeypatch.setattr(separability, "is_on_gpu", lambda _: True)

    def test_a_hundredth_is_allowed(self):
        assert separability.tolerance(MLP()) == 1e-2
        assert separability.tolerance(MLP().double()) == 1e-7
        assert separability.tolerance(MLP().bfloat16()) == 5e-2

    def test_what_mixes_by_accident_is_tried_again_on_other_examples(self, monkeypatch):
        tried, weights = [], separability._weights

        def once(joint, alone, tolerance):
            tried.append(alone)
            if len(tried) == 1:
                raise MixingError("by accident")
            return weights(joint, alone, tolerance)

        monkeypatch.setattr(separability, "_weights", once)
        loss, batch = StepLoss(MLP()), vectors(N, torch.float32)
        sample = check_separable(loss, batch, N)
        assert len(tried) == 2
        assert not torch.equal(tried[0].sq_norms, tried[1].sq_norms)
        assert len(sample.examples) == 4

    def test_what_mixes_again_is_refused(self):
        class Mixes(MLP):
            def logits(self, x):
                logits = super().logits(x)
                return logits - 0.5 * logits.mean(0)

        with pytest.raises(MixingError):
            check_separable(StepLoss(Mixes()), vectors(N, torch.float32), N)
