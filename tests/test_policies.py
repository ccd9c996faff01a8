"""Policies: an estimate in, the largest effective batch out; and what a training makes of them."""

import dataclasses
import math
import time

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_graddiv import (
    CABS,
    AdaptiveBatchSize,
    BatchSizeBoundFinder,
    DiversityBound,
    Doubling,
    Goodput,
    GradientMoments,
    NoiseScale,
    NormTest,
    RunState,
    estimate_diversity,
)
from lightning_graddiv.theory import Dial, sample_efficiency
from tests.audit import loader, quiet_trainer

ESTIMATE = estimate_diversity([GradientMoments.from_gradients(torch.eye(8))], dataset_size=8)
RUN = RunState(batch_size=8)


def estimated(lower, *, dataset_size=None, **kwargs):
    return dataclasses.replace(ESTIMATE, lower=lower, dataset_size=dataset_size, **kwargs)


def test_the_bound_acts_on_the_lower_end():
    estimate = dataclasses.replace(ESTIMATE, bound=100.0, lower=60.0, upper=200.0)
    assert DiversityBound(0.5)(estimate, RUN) == 31.0


def test_the_default_is_the_races_wherever_it_is_asked_for():
    assert (
        AdaptiveBatchSize(max_batch_size=8).policy
        == BatchSizeBoundFinder().policy
        == DiversityBound()
        == DiversityBound(2)
    )


def test_at_a_bound_of_one_no_batch_grows():
    assert DiversityBound(0.5)(dataclasses.replace(ESTIMATE, lower=1.0), RunState(batch_size=1)) < 2


@pytest.mark.parametrize(
    ("policy", "arguments", "named"),
    [
        (DiversityBound, {"delta": 0.0}, "delta` to be positive"),
        (DiversityBound, {"delta": -1.0}, "delta` to be positive"),
        (DiversityBound, {"delta": math.nan}, "delta` to be positive"),
        (NoiseScale, {"multiple": 0.0}, "multiple` to be positive"),
        (NormTest, {"eta": 0.0}, "eta` to be positive"),
        (NormTest, {"eta": math.nan}, "eta` to be positive"),
        (Doubling, {"base_batch_size": 0, "every_epochs": 1}, "base_batch_size` to be at least 1"),
        (Doubling, {"base_batch_size": 8, "every_epochs": 0}, "every_epochs` to be at least 1"),
        (Doubling, {"base_batch_size": 8, "every_epochs": 1, "factor": 0.5}, "factor` to be at least 1"),
    ],
)
def test_out_of_range_is_refused_by_name(policy, arguments, named):
    with pytest.raises(ValueError, match=f"Expected argument `{named} but got"):
        policy(**arguments)


class TestNoiseScale:
    def test_a_streams_is_one_less_than_the_bound(self):
        assert NoiseScale()(estimated(100.0), RUN) == pytest.approx(99.0)
        assert NoiseScale(0.5)(estimated(100.0), RUN) == pytest.approx(49.5)

    def test_of_a_finite_set_it_is_the_populations(self):
        """Of n gradients: tr(Sigma) with n - 1, and |G|^2 as the mean product of two different ones."""
        torch.manual_seed(0)
        gradients = torch.randn(30, 4, dtype=torch.float64) + 0.5
        estimate = estimate_diversity([GradientMoments.from_gradients(gradients)], dataset_size=30)
        products = gradients @ gradients.T
        signal = (products.sum() - products.trace()) / (30 * 29)
        noise = gradients.var(0, correction=1).sum() / signal
        exact = dataclasses.replace(estimate, lower=estimate.bound)
        assert NoiseScale()(exact, RUN) == pytest.approx(float(noise), rel=1e-9)
        assert NoiseScale()(exact, RUN) == pytest.approx(estimate.noise_scale, rel=1e-9)

    def test_beyond_sight_it_is_infinite(self):
        assert NoiseScale()(estimated(math.inf), RUN) == math.inf
        assert NoiseScale()(estimated(8.0, dataset_size=8), RUN) == math.inf  # orthogonal gradients

    def test_without_noise_it_is_zero(self):
        assert NoiseScale()(estimated(1.0), RUN) == 0.0
        assert NoiseScale()(estimated(1.0, dataset_size=8), RUN) == pytest.approx(0.0)
        assert NoiseScale()(estimated(1.0, dataset_size=1), RUN) == 0.0

    def test_it_reads_the_lower_end(self):
        low = estimated(10.0, bound=100.0, upper=1000.0, noise_scale=99.0)
        assert NoiseScale()(low, RUN) == pytest.approx(9.0)

    @pytest.mark.parametrize("lower", [1e3, 1e5])
    def test_on_the_dial_it_is_a_delta_of_one(self, lower):
        ratio = NoiseScale()(estimated(lower), RUN) / DiversityBound(1.0)(estimated(lower), RUN)
        assert ratio == pytest.approx(1.0, abs=3 / lower)
        assert ratio < 1.0


class TestNormTest:
    def test_is_passed_from_the_batch_that_it_allows_on(self):
        trace, sq_norm, eta = 300.0, 2.0, 0.6
        lower = 1 + trace / sq_norm
        allowed = NormTest(eta)(estimated(lower), RUN)
        assert allowed == pytest.approx(416.667, rel=1e-5)
        assert trace / (allowed - 1) > eta**2 * sq_norm > trace / (allowed + 1)

    def test_on_the_dial_it_is_a_delta_of_one_over_eta_squared(self):
        delta = Dial.from_norm_test(0.6).delta
        assert NormTest(0.6)(estimated(1e6), RUN) / DiversityBound(delta)(estimated(1e6), RUN) == pytest.approx(
            1.0, abs=3e-6
        )

    def test_without_noise_nothing_grows(self):
        assert NormTest(0.5)(estimated(1.0), RUN) == 0.0


class TestCABS:
    def test_is_its_formula(self):
        estimate = estimated(5.0, second_moment=40.0, signal=8.0)
        run = RunState(batch_size=8, learning_rate=0.5, loss=0.25)
        assert CABS()(estimate, run) == pytest.approx(0.5 * (40 - 8) / 0.25)

    def test_its_delta_is_the_share_of_the_loss_that_a_step_removes(self):
        second_moment, signal, rate, loss = 2001.0, 1.0, 0.1, 0.4
        allowed = CABS()(
            estimated(2001.0, second_moment=second_moment, signal=signal), RunState(8, learning_rate=rate, loss=loss)
        )
        assert (allowed - 1) / (second_moment / signal) == pytest.approx(rate * signal / loss, rel=0.01)

    @pytest.mark.parametrize("loss", [math.nan, 0.0, -1.0])
    def test_a_loss_that_is_not_positive_keeps_the_batch(self, loss):
        assert CABS()(estimated(5.0, second_moment=40.0, signal=8.0), RunState(8, learning_rate=0.5, loss=loss)) == 0.0

    def test_so_does_an_unknown_learning_rate(self):
        assert CABS()(estimated(5.0, second_moment=40.0, signal=8.0), RunState(8, loss=1.0)) == 0.0

    def test_a_signal_above_the_second_moment_is_no_negative_batch(self):
        estimate = estimated(1.0, second_moment=1.0, signal=1.1)
        assert CABS()(estimate, RunState(8, learning_rate=0.5, loss=1.0)) == 0.0


class TestDoubling:
    @pytest.mark.parametrize(("epoch", "allowed"), [(0, 16), (19, 16), (20, 32), (39, 32), (40, 64), (99, 256)])
    def test_doubles_by_the_epoch(self, epoch, allowed):
        assert Doubling(16, 20)(ESTIMATE, RunState(batch_size=16, epoch=epoch)) == allowed

    def test_whatever_is_measured(self):
        assert Doubling(16, 1)(estimated(1.0), RunState(16, epoch=1)) == 32
        assert Doubling(16, 1)(estimated(math.inf), RunState(16, epoch=0)) == 16

    def test_the_factor_is_the_users(self):
        assert Doubling(16, 1, factor=4)(ESTIMATE, RunState(16, epoch=2)) == 256


def rates(constant, per_example, sizes):
    return {size: size / (constant + per_example * size) for size in sizes}


class TestGoodput:
    @pytest.mark.parametrize(("constant", "per_example", "noise"), [(0.01, 1e-4, 900.0), (1e-3, 1e-3, 50.0)])
    def test_is_the_batch_of_the_largest_product(self, constant, per_example, noise):
        """Against a search over all sizes, with the efficiency of theory.py."""
        throughput = rates(constant, per_example, [8, 16, 32])
        allowed = Goodput()(estimated(noise + 1), RunState(32, throughput=throughput))
        products = {
            b: b / (constant + per_example * b) * sample_efficiency(b, noise + 1) for b in range(1, 2 * int(allowed))
        }
        assert abs(max(products, key=products.get) - allowed) <= 1

    def test_a_growth_that_it_allows_is_uphill_all_the_way(self):
        constant, per_example, noise = 0.02, 1e-4, 300.0
        allowed = Goodput()(estimated(noise + 1), RunState(8, throughput=rates(constant, per_example, [4, 8])))
        product = [
            b / (constant + per_example * b) / (noise + b) for b in (allowed / 2, allowed * 0.7, allowed, 2 * allowed)
        ]
        assert product[0] < product[1] < product[2] > product[3]

    def test_without_parallelism_nothing_grows(self):
        assert Goodput()(estimated(101.0), RunState(8, throughput=rates(0.0, 1e-3, [4, 8]))) == 0.0

    def test_where_larger_steps_take_longer_per_example_neither(self):
        assert Goodput()(estimated(101.0), RunState(8, throughput={4: 1000.0, 8: 500.0})) == 0.0

    def test_with_free_parallelism_anything_may(self):
        assert Goodput()(estimated(101.0), RunState(8, throughput={4: 400.0, 8: 900.0})) == math.inf

    def test_without_noise_nothing_grows(self):
        for throughput in ({8: 900.0}, rates(1e-2, 1e-4, [4, 8]), {4: 400.0, 8: 900.0}):
            assert Goodput()(estimated(1.0), RunState(8, throughput=throughput)) == 0.0

    def test_one_size_is_tried_from_up_to_the_noise_scale(self):
        assert Goodput()(estimated(101.0), RunState(8, throughput={8: 500.0})) == pytest.approx(100.0)

    def test_a_size_that_was_not_measured_stays(self):
        for throughput in ({}, {4: 400.0}):
            assert Goodput()(estimated(101.0), RunState(8, throughput=throughput)) == 0.0

    def test_a_large_size_does_not_drown_the_small_ones(self):
        """A tenth more time for the largest is a tenth of it, and hardly moves what the small ones tell."""
        throughput = rates(0.01, 1e-4, [1, 2, 4, 8, 16, 4096])
        throughput[4096] *= 0.9
        allowed = Goodput()(estimated(401.0), RunState(4096, throughput=throughput))
        assert allowed == pytest.approx(math.sqrt(400 * 0.01 / 1e-4), rel=0.1)


class Paced(LightningModule):
    """Steps whose seconds are what the test says, and gradients that are alike or orthogonal."""

    def __init__(self, seconds=lambda examples: 0.0, loss=1.0, learning_rate=0.0):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(64))
        self.seconds = seconds
        self.loss = loss
        self.learning_rate = learning_rate

    def training_step(self, batch, batch_idx):
        (x,) = batch
        if self._trainer is not None:
            time.sleep(self.seconds(len(x)))
        return self.loss + (x @ self.w).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.learning_rate)


ORTHOGONAL = torch.eye(64)
ALIKE = torch.ones(64, 64) / 8


def noisy(noise_scale):
    """Gradients of norm 1 in the mean, and noise about it."""
    noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) / 8
    return ALIKE + noise_scale**0.5 * noise


def sizes(policy, *, module=None, data=ORTHOGONAL, epochs=2, **kwargs):
    """The sizes that a training goes through."""
    seed_everything(0, verbose=False)
    adaptive = AdaptiveBatchSize(
        policy=policy, **{"every_n_steps": 1, "max_batch_size": 32, "cooldown": 0, "warm_in": 0, **kwargs}
    )
    trainer = quiet_trainer(max_epochs=epochs, callbacks=[adaptive])
    trainer.fit(Paced() if module is None else module, DataLoader(TensorDataset(data), 4, shuffle=True))
    return [4, *(growth.to_batch_size for growth in adaptive.history)]


class TestInATraining:
    @pytest.mark.parametrize("policy", [NoiseScale(), NormTest(1.0)])
    def test_noise_makes_the_batch_grow_and_gradients_that_are_alike_do_not(self, policy):
        assert sizes(policy) == [4, 8, 16, 32]
        assert sizes(policy, data=ALIKE) == [4]

    def test_noise_of_a_few_examples_makes_it_grow_a_little(self):
        """N is about 4: a batch of 4 is enough for McCandlish et al., and too small for a norm test at a half."""
        assert sizes(NoiseScale(), data=noisy(4), epochs=4) == [4]
        assert sizes(NormTest(0.5), data=noisy(4), epochs=4, cooldown=8, confidence=0.8) == [4, 8]

    def test_cabs_grows_by_the_learning_rate_over_the_loss(self):
        """Orthogonal gradients of norm 1: tr(Sigma) is 1."""
        rate = 1e-9
        assert sizes(CABS(), module=Paced(loss=rate / 17, learning_rate=rate), scale_lr=None) == [4, 8, 16]
        assert sizes(CABS(), module=Paced(loss=rate / 7, learning_rate=rate), scale_lr=None) == [4]

    def test_under_accumulation_the_loss_is_still_the_loss(self):
        rate = 1e-9
        module = Paced(loss=rate / 9, learning_rate=rate)
        adaptive = AdaptiveBatchSize(
            policy=CABS(), every_n_steps=1, max_batch_size=32, cooldown=0, warm_in=0, scale_lr=None
        )
        trainer = quiet_trainer(max_epochs=2, callbacks=[adaptive], accumulate_grad_batches=2)
        trainer.fit(module, loader(64, 2))
        assert [growth.to_batch_size for growth in adaptive.history] == [8]

    def test_doubling_grows_at_its_epochs(self):
        assert sizes(Doubling(4, 1), epochs=3, data=ALIKE) == [4, 8, 16]
        assert sizes(Doubling(4, 3), epochs=3) == [4]

    def test_goodput_grows_where_a_step_takes_the_same_time_whatever_its_size_and_not_where_an_example_does(self):
        """N is about 30. With one size measured a growth is tried; it shows that there is nothing to gain."""
        run = {"data": noisy(30), "every_n_steps": 2, "cooldown": 6, "epochs": 10}
        assert sizes(Goodput(), module=Paced(lambda examples: 0.02), **run) == [4, 8, 16, 32]
        assert sizes(Goodput(), module=Paced(lambda examples: 0.002 * examples), **run) == [4, 8]

    def test_goodput_does_not_grow_before_a_size_has_been_measured(self):
        """Measured at every step, no step tells what training takes."""
        assert sizes(Goodput(), every_n_steps=1) == [4]
