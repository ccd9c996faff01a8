"""DropConnect, Langevin noise and quantisation in one process: their laws, their place in a step, their resumption."""

import copy
import csv
import math
import pickle

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_graddiv import (
    AdaptiveBatchSize,
    DropConnect,
    GradientDiversityMonitor,
    GradientQuantization,
    LangevinNoise,
    theory,
)
from lightning_graddiv.callbacks.quantized import quantized_mean
from tests.audit import AuditModule, ScaledInFull, loader, quiet_trainer, warned
from tests.in_band import Collector

MECHANISMS = {
    "langevin": lambda: LangevinNoise(0.1),
    "quantised": lambda: GradientQuantization(),
    "worker": lambda: DropConnect(0.4),
    "example": lambda: DropConnect(0.4, per="example"),
}


class Wide(LightningModule):
    """One vector with a known gradient: entry l of every example's gradient is ``slope_l``."""

    def __init__(self, slopes: torch.Tensor, learning_rate: float = 1.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(len(slopes)))
        self.slopes = slopes
        self.learning_rate = learning_rate
        self.seen: list[torch.Tensor] = []
        self.updates: list[torch.Tensor] = []
        self.before = self.w.detach().clone()

    def training_step(self, batch, batch_idx):
        return (batch[0][:, 0] * (self.w @ self.slopes)).mean()

    def on_before_optimizer_step(self, optimizer):
        self.seen.append(self.w.grad.clone())

    def on_train_batch_end(self, *_):
        if not torch.equal(self.w, self.before):
            self.updates.append((self.before - self.w.detach()) / self.learning_rate)
            self.before = self.w.detach().clone()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.learning_rate)


class Regression(LightningModule):
    """Two layers in float64 whose weights stay put; keeps every step's gradient as the optimizer gets it."""

    def __init__(self, learning_rate: float = 0.0, *, reduction: str = "mean", hidden: int = 5) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 1)).double()
        self.learning_rate = learning_rate
        self.reduction = reduction
        self.gradients: list[torch.Tensor] = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.net(x)[:, 0], y, reduction=self.reduction)

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append(torch.cat([p.grad.flatten() for p in self.parameters()]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.learning_rate, momentum=0.9)


def ones(batches, batch_size):
    return DataLoader(TensorDataset(torch.ones(batches * batch_size, 1)), batch_size)


def rows(count: int, seed: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, dtype=torch.float64, generator=generator)
    return x, x.sum(1).sin() + torch.randn(count, dtype=torch.float64, generator=generator)


def same_batch(batch_size: int, steps: int) -> DataLoader:
    """So many batches of the same examples."""
    x, y = rows(batch_size)
    return DataLoader(TensorDataset(x.repeat(steps, 1), y.repeat(steps)), batch_size)


def data(examples: int = 48, batch_size: int = 8) -> DataLoader:
    return DataLoader(TensorDataset(*rows(examples)), batch_size, shuffle=True)


def unit_gradients(module, x, y) -> torch.Tensor:
    found = []
    for a, b in zip(x, y, strict=True):
        loss = (module.net(a[None])[:, 0] - b).square().sum()
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))]))
    return torch.stack(found)


def fit(module, batches, *callbacks, **kwargs):
    trainer = quiet_trainer(callbacks=list(callbacks), log_every_n_steps=1, **{"max_epochs": 1, **kwargs})
    trainer.fit(module, batches)
    return trainer


class TestLangevin:
    d, sigma = 20_000, 0.5

    def variances(self, batches, module=None, **kwargs):
        module = module or Wide(torch.zeros(self.d))
        fit(module, batches, LangevinNoise(self.sigma), **kwargs)
        for update in module.updates:
            assert abs(float(update.mean())) < 4 * float(update.std()) / math.sqrt(self.d)
        return [float(update.var()) for update in module.updates]

    def about(self, *sizes):
        return [pytest.approx(self.sigma**2 / size, rel=0.05) for size in sizes]

    def test_it_is_sigma_squared_over_the_batch(self):
        assert self.variances(ones(2, 4)) == self.about(4, 4)

    def test_of_the_whole_effective_batch(self):
        assert self.variances(ones(6, 4), accumulate_grad_batches=3) == self.about(12, 12)

    def test_a_last_batch_has_noise_of_its_own_size(self):
        batches = DataLoader(TensorDataset(torch.ones(11, 1)), 8)
        assert self.variances(batches) == self.about(8, 3)

    def test_the_last_window_weighs_its_micro_batch_by_the_whole_accumulation_as_lightning_does(self):
        # sum a_i^2 = 4 / (4 * 2)^2 = 1/16, as if there were 16 examples
        assert self.variances(ones(3, 4), accumulate_grad_batches=2) == self.about(8, 16)

    def test_it_follows_a_batch_that_grows(self):
        module = Wide(torch.zeros(self.d))
        adaptive = AdaptiveBatchSize(
            every_n_steps=1, max_batch_size=16, cooldown=0, policy=lambda *_: 1e9, scale_lr=None, window=4
        )
        module.slopes = torch.ones(self.d)
        fit(module, ones(8, 4), LangevinNoise(self.sigma), adaptive, max_epochs=3)
        sizes = [4, 8, 16, 4] + [16] * 4  # 32 examples an epoch: four are left after the first growths
        assert [float(update.var()) for update in module.updates] == self.about(*sizes)

    def test_clipping_neither_sees_nor_shrinks_it(self):
        module = Wide(torch.ones(self.d))
        assert self.variances(ones(2, 4), None, gradient_clip_val=1e-3) == self.about(4, 4)
        fit(module, ones(1, 4), LangevinNoise(self.sigma), gradient_clip_val=1e-3)
        assert module.seen[0].eq(1).all()
        assert float(module.updates[0].mean()) < 0.1  # the gradient of ones is clipped away

    def test_a_scaler_does_not_scale_it(self):
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
        assert self.variances(ones(2, 4), plugins=[plugin]) == self.about(4, 4)

    def test_without_noise_training_is_what_it_is(self):
        plain, noisy = Regression(0.1), Regression(0.1)
        for module, callbacks in ((plain, []), (noisy, [LangevinNoise(0.0)])):
            seed_everything(0, verbose=False)
            fit(module, data(), *callbacks)
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), noisy.parameters(), strict=True))

    def test_manual_optimization_has_a_batch_too(self):
        class Manual(Wide):
            automatic_optimization = False

            def training_step(self, batch, batch_idx):
                self.optimizers().zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                self.optimizers().step()

        assert self.variances(ones(2, 4), Manual(torch.zeros(self.d))) == self.about(4, 4)

    def test_sparse_gradients_are_refused_by_name(self):
        class Embeds(LightningModule):
            def __init__(self):
                super().__init__()
                self.table = nn.Embedding(5, 2, sparse=True)

            def training_step(self, batch, batch_idx):
                return self.table(batch[0].long()).mean()

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), 0.1)

        for mechanism in (LangevinNoise(0.1), GradientQuantization(), DropConnect(0.5)):
            with pytest.raises(MisconfigurationException, match=r"of `table.weight` is sparse"):
                fit(Embeds(), ones(2, 4), mechanism)


class TestQuantization:
    v = torch.tensor([3.0, -1.0, 0.5, 0.0, 2.0, -0.25], dtype=torch.float64)

    def drawn(self, draws=4000):
        return torch.stack([torch.cat(quantized_mean([self.v[:2], self.v[2:]], 0, i).gradients) for i in range(draws)])

    def test_its_first_two_moments_are_the_papers(self):
        drawn = self.drawn()
        norm = self.v.norm()
        torch.testing.assert_close(drawn[drawn != 0].abs().unique(), norm[None])
        assert (drawn.sign() * self.v.sign() >= 0).all()
        torch.testing.assert_close(drawn.mean(0), self.v, rtol=0, atol=4 * float(norm) / math.sqrt(4000) / 1.5)
        second = drawn.square().sum(1)
        expected = float(norm * self.v.abs().sum())
        assert abs(float(second.mean()) - expected) < 4 * float(second.std()) / math.sqrt(4000)
        variance = quantized_mean([self.v], 0).variance
        assert variance == pytest.approx(expected - float(norm) ** 2, rel=1e-12)

    def test_entries_are_independent(self):
        drawn = self.drawn()
        chosen = (drawn != 0).double() - self.v.abs() / self.v.norm()
        covariance = (chosen.T @ chosen / len(chosen)).fill_diagonal_(0)
        assert float(covariance.abs().max()) < 0.03

    def test_zero_stays_zero_and_what_is_not_finite_shows(self):
        zeros = torch.zeros(3)
        assert torch.equal(quantized_mean([zeros], 0).gradients[0], zeros)
        assert quantized_mean([torch.tensor([1.0, math.inf]), zeros], 0).gradients[1].isnan().all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64])
    def test_it_keeps_types_and_shapes(self, dtype):
        given = [torch.ones(2, 3, dtype=dtype), torch.ones((), dtype=dtype)]
        found = quantized_mean(given, 0).gradients
        assert [(g.dtype, g.shape) for g in found] == [(g.dtype, g.shape) for g in given]

    def test_the_optimizer_gets_the_quantised_gradient_of_the_whole_step(self):
        module, x, y = Regression(hidden=50), *rows(8)
        expected = unit_gradients(module, x, y).mean(0)
        batches = DataLoader(TensorDataset(x.repeat(200, 1), y.repeat(200)), 4)
        fit(module, batches, GradientQuantization(), accumulate_grad_batches=2)
        found = torch.stack(module.gradients)
        assert len(found) == 200
        nonzero = found[found != 0].abs()
        torch.testing.assert_close(nonzero, expected.norm().expand_as(nonzero))
        error = found.mean(0) - expected
        assert float(error.norm()) < 3 * math.sqrt(float(expected.norm() * expected.abs().sum()) / 200)
        second = found.square().sum(1)
        assert abs(float(second.mean() - expected.norm() * expected.abs().sum())) < 4 * float(second.std()) / math.sqrt(
            200
        )

    def test_clipping_comes_after_it(self):
        module = Regression(1.0)
        before = [p.detach().clone() for p in module.parameters()]
        fit(module, same_batch(8, 1), GradientQuantization(), gradient_clip_val=1e-3)
        moved = torch.cat([(a - b.detach()).flatten() for a, b in zip(before, module.parameters(), strict=True)])
        assert float(moved.norm()) == pytest.approx(1e-3, rel=1e-3)
        assert len(moved[moved.abs() > 1e-9].abs().unique()) <= 2  # equal entries, up to rounding


class TestDropConnect:
    p, size = 0.3, 8

    def found(self, steps=60, *, accumulate=1, reduction="mean", seed=0, **kwargs):
        module = Regression(reduction=reduction, hidden=200)  # many entries tell what many steps would
        batches = same_batch(self.size, steps * accumulate)
        fit(module, batches, DropConnect(self.p, seed=seed, **kwargs), accumulate_grad_batches=accumulate)
        own = unit_gradients(module, *rows(self.size))
        return torch.stack(module.gradients), own / (self.size if reduction == "mean" else 1)

    def assert_moments(self, found, mean, variance):
        """Per entry: four standard errors of the mean, and the total variance within four percent."""
        error = (found.mean(0) - mean).abs()
        assert (error <= 5 * (variance / len(found)).sqrt() + 1e-12).all()
        assert float(found.var(0).sum()) == pytest.approx(float(variance.sum()), rel=0.04)

    def test_one_mask_for_a_micro_batch(self):
        found, parts = self.found()
        whole = parts.sum(0)
        kept = found[found != 0]
        torch.testing.assert_close(kept, whole.expand_as(found)[found != 0])
        assert float((found == 0).double().mean()) == pytest.approx(self.p, abs=0.02)
        self.assert_moments(found, (1 - self.p) * whole, self.p * (1 - self.p) * whole.square())

    def test_another_for_each_micro_batch_that_is_accumulated(self):
        found, parts = self.found(accumulate=3)
        whole = parts.sum(0)
        self.assert_moments(found, (1 - self.p) * whole, self.p * (1 - self.p) * whole.square() / 3)

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_one_for_each_example(self, reduction):
        found, parts = self.found(per="example", reduction=reduction)
        self.assert_moments(found, (1 - self.p) * parts.sum(0), self.p * (1 - self.p) * parts.square().sum(0))

    def test_examples_under_accumulation(self):
        found, parts = self.found(30, per="example", accumulate=2)
        variance = self.p * (1 - self.p) * parts.square().sum(0) / 2
        self.assert_moments(found, (1 - self.p) * parts.sum(0), variance)

    @pytest.mark.parametrize("per", ["worker", "example"])
    def test_rescaled_it_is_unbiased(self, per):
        found, parts = self.found(per=per, rescale=True)
        spread = parts.square().sum(0) if per == "example" else parts.sum(0).square()
        self.assert_moments(found, parts.sum(0), self.p / (1 - self.p) * spread)

    @pytest.mark.parametrize("per", ["worker", "example"])
    def test_nothing_dropped_is_the_plain_gradient(self, per):
        plain, masked = Regression(0.1), Regression(0.1)
        for module, callbacks in ((plain, []), (masked, [DropConnect(0.0, per=per)])):
            seed_everything(0, verbose=False)
            fit(module, data(), *callbacks, accumulate_grad_batches=2)
        torch.testing.assert_close(torch.stack(plain.gradients), torch.stack(masked.gradients), rtol=1e-9, atol=1e-12)

    def test_batch_normalisation_cannot_be_masked_per_example(self):
        class Normalised(Regression):
            def __init__(self):
                super().__init__()
                self.net.insert(1, nn.BatchNorm1d(5, dtype=torch.float64))

        with pytest.raises(MisconfigurationException, match=r"cannot take the batch apart.*`per='worker'` masks whole"):
            fit(Normalised(), data(), DropConnect(0.3, per="example"))
        fit(Normalised(), data(), DropConnect(0.3))

    def test_what_does_not_run_under_torch_func_is_looped_over(self):
        class Branches(Regression):
            def training_step(self, batch, batch_idx):
                loss = super().training_step(batch, batch_idx)
                return loss if loss.item() >= 0 else -loss

        plain, looped = Regression(), Branches()
        fit(plain, same_batch(8, 2), DropConnect(0.3, per="example"))
        with warned("DropConnect: `Branches`: it does not run under torch.func"):
            fit(looped, same_batch(8, 2), DropConnect(0.3, per="example"))
        torch.testing.assert_close(torch.stack(plain.gradients)[0], torch.stack(looped.gradients)[0])

    def test_a_loss_that_is_not_finite_shows_as_in_plain_training(self):
        class Broken(Regression):
            def training_step(self, batch, batch_idx):
                return super().training_step(batch, batch_idx) * (math.nan if batch_idx == 1 else 1.0)

        module = Broken()
        fit(module, same_batch(8, 2), DropConnect(0.3, per="example"))
        assert [bool(g.isfinite().all()) for g in module.gradients] == [True, False]

    def test_gradients_that_others_ask_for_are_not_masked_or_kept(self):
        class Penalty(Regression):
            def training_step(self, batch, batch_idx):
                loss = super().training_step(batch, batch_idx)
                torch.autograd.grad(loss, list(self.parameters()), retain_graph=True)
                return loss

        plain, penalty = Regression(), Penalty()
        for module in (plain, penalty):
            fit(module, same_batch(8, 3), DropConnect(0.3))
        assert torch.equal(torch.stack(plain.gradients), torch.stack(penalty.gradients))


class TestEach:
    @pytest.mark.parametrize("name", MECHANISMS)
    def test_a_resumed_run_is_the_same_run(self, name, tmp_path):
        def run(epochs, **kwargs):
            seed_everything(0, verbose=False)
            module = Regression(0.05)
            loader = DataLoader(TensorDataset(*rows(48)), 8)
            trainer = fit(module, loader, MECHANISMS[name](), max_epochs=epochs, **kwargs)
            return module, trainer

        whole, _ = run(3)
        _, trainer = run(1)
        trainer.save_checkpoint(tmp_path / "one.ckpt")
        seed_everything(1, verbose=False)
        resumed = Regression(0.05)
        later = quiet_trainer(callbacks=[MECHANISMS[name]()], max_epochs=3, log_every_n_steps=1)
        later.fit(resumed, DataLoader(TensorDataset(*rows(48)), 8), ckpt_path=tmp_path / "one.ckpt")
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
        assert torch.equal(torch.stack(whole.gradients[6:]), torch.stack(resumed.gradients))

    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize("name", MECHANISMS)
    def test_a_gradient_scaler_changes_no_bit(self, name, fused):
        """A fused optimizer takes gradients that are still scaled."""

        class Single(Regression):
            def training_step(self, batch, batch_idx):
                return super().training_step([part.float() for part in batch], batch_idx)

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), 0.05, fused=fused)

        ends = []
        for plugins in ([], [ScaledInFull()]):
            module = Single()
            module.net.float()
            fit(module, DataLoader(TensorDataset(*rows(48)), 8), MECHANISMS[name](), plugins=plugins)
            ends.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
        assert torch.equal(*ends)

    @pytest.mark.parametrize("name", MECHANISMS)
    def test_another_seed_is_another_run_and_the_same_one_the_same(self, name):
        ends = []
        for seed in (0, 0, 1):
            module, mechanism = Regression(0.05), MECHANISMS[name]()
            mechanism.seed = seed
            fit(module, DataLoader(TensorDataset(*rows(48)), 8), mechanism)
            ends.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
        assert torch.equal(ends[0], ends[1])
        assert not torch.equal(ends[0], ends[2])

    @pytest.mark.parametrize("name", MECHANISMS)
    def test_it_draws_nothing_from_the_global_generator(self, name):
        states = []
        for callbacks in ([], [MECHANISMS[name]()]):
            torch.manual_seed(5)
            fit(Regression(0.05), DataLoader(TensorDataset(*rows(48)), 8), *callbacks)
            states.append(torch.get_rng_state())
        assert torch.equal(*states)

    @pytest.mark.parametrize("name", MECHANISMS)
    def test_a_second_fit_begins_anew(self, name):
        mechanism, ends = MECHANISMS[name](), []
        for _ in range(2):
            module = Regression(0.05)
            fit(module, DataLoader(TensorDataset(*rows(48)), 8), mechanism)
            ends.append(torch.stack(module.gradients))
        assert torch.equal(*ends)

    @pytest.mark.parametrize("name", MECHANISMS)
    def test_nothing_is_left_behind_by_an_exception(self, name):
        class Fails(Regression):
            def training_step(self, batch, batch_idx):
                if batch_idx == 2:
                    raise RuntimeError("on purpose")
                return super().training_step(batch, batch_idx)

        module, mechanism = Fails(), MECHANISMS[name]()
        with pytest.raises((RuntimeError, MisconfigurationException), match="on purpose"):
            fit(module, data(), mechanism)
        assert not any(p._backward_hooks for p in module.parameters())
        assert not module.trainer.optimizers[0]._optimizer_step_pre_hooks
        assert "training_step" not in module.trainer.strategy.__dict__

    @pytest.mark.parametrize("name", MECHANISMS)
    def test_it_can_be_copied_and_pickled(self, name):
        mechanism = MECHANISMS[name]()
        fit(Regression(), data(), mechanism)
        assert copy.deepcopy(mechanism)._draws == pickle.loads(pickle.dumps(mechanism))._draws == 6

    def test_two_that_replace_the_gradient_are_refused(self):
        with pytest.raises(MisconfigurationException, match="use one of them"):
            fit(Regression(), data(), DropConnect(0.3), GradientQuantization())

    def test_masks_under_manual_optimization_are_refused(self):
        class Manual(Regression):
            automatic_optimization = False

        with pytest.raises(MisconfigurationException, match="DropConnect needs automatic optimization"):
            fit(Manual(), data(), DropConnect(0.3))

    def test_strategies_that_split_gradients_are_refused(self):
        class ModelParallelStrategy:
            pass

        trainer = quiet_trainer()
        trainer._accelerator_connector.strategy = ModelParallelStrategy()
        with pytest.raises(MisconfigurationException, match="LangevinNoise supports a single device and DDP"):
            LangevinNoise(0.1).setup(trainer, Regression(), "fit")

    @pytest.mark.parametrize(
        ("make", "named"),
        [
            (lambda: LangevinNoise(-1), "sigma"),
            (lambda: DropConnect(1.0), "probability"),
            (lambda: DropConnect(0.5, per="layer"), "per"),
            (lambda: GradientQuantization(seed=-1), "seed"),
        ],
    )
    def test_out_of_range_is_refused_by_name(self, make, named):
        with pytest.raises(ValueError, match=f"Expected argument `{named}` to be"):
            make()


class TestBesideAMonitor:
    @pytest.mark.parametrize("first", [True, False], ids=["before", "behind"])
    @pytest.mark.parametrize("engine", ["auto", "loop", "microbatch"])
    @pytest.mark.parametrize("name", MECHANISMS)
    def test_both_are_as_they_are_alone(self, name, engine, first):
        """The monitor measures the plain gradient, and training goes as without the monitor."""

        def run(*callbacks, learning_rate):
            seed_everything(0, verbose=False)
            module = Regression(learning_rate)
            fit(module, DataLoader(TensorDataset(*rows(48)), 4), *callbacks, accumulate_grad_batches=2)
            return module

        # At a learning rate of zero both monitors see the same gradients at every step.
        alone, beside = Collector(engine=engine), Collector(engine=engine)
        run(alone, learning_rate=0.0)
        mechanism = MECHANISMS[name]()
        run(*([mechanism, beside] if first else [beside, mechanism]), learning_rate=0.0)
        assert len(alone.probes) == len(beside.probes) > 0
        for a, b in zip(alone.probes, beside.probes, strict=True):
            assert (a.count, a.sum_sq_norms, a.sq_norm_of_sum) == pytest.approx(
                (b.count, b.sum_sq_norms, b.sq_norm_of_sum), rel=1e-9
            )
        watched = run(MECHANISMS[name](), Collector(engine=engine), learning_rate=0.05)
        unwatched = run(MECHANISMS[name](), learning_rate=0.05)
        assert torch.equal(torch.stack(watched.gradients), torch.stack(unwatched.gradients))
        assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), unwatched.parameters(), strict=True))

    def logged(self, tmp_path, *callbacks, batches=None):
        logger = CSVLogger(tmp_path, name="", version="")
        monitor = GradientDiversityMonitor(every_n_steps=1)
        fit(Regression(), batches or data(), monitor, *callbacks, logger=logger)
        with (tmp_path / "metrics.csv").open() as file:
            return [
                {k: float(v) for k, v in row.items() if k.startswith("graddiv/") and v} for row in csv.DictReader(file)
            ]

    def test_without_a_mechanism_nothing_is_said_of_one(self, tmp_path):
        assert not any("mechanism" in name for name in self.logged(tmp_path)[-1])

    def test_langevin_noise_raises_the_second_moment_and_nothing_else(self, tmp_path):
        d = sum(p.numel() for p in Regression().parameters())
        for row in self.logged(tmp_path, LangevinNoise(0.5)):
            assert row["graddiv/mechanism_grad_sq_norm"] == pytest.approx(row["graddiv/grad_sq_norm"], rel=1e-9)
            second = row["graddiv/second_moment"] + d * 0.25
            assert row["graddiv/mechanism_second_moment"] == pytest.approx(second, rel=1e-9)

    def test_masks_per_example_are_those_of_the_formula(self, tmp_path):
        row = self.logged(tmp_path, DropConnect(0.4, per="example"), batches=same_batch(8, 4))[-1]
        assert row["graddiv/mechanism_grad_sq_norm"] == pytest.approx(0.36 * row["graddiv/grad_sq_norm"], rel=1e-9)
        assert row["graddiv/mechanism_second_moment"] == pytest.approx(0.6 * row["graddiv/second_moment"], rel=1e-6)
        expected = theory.drop_connect_batch_size_bound(row["graddiv/batch_size_bound"], 0.4, 32)
        assert row["graddiv/mechanism_bound"] == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize(
        ("make", "accumulate"),
        [
            (lambda: DropConnect(0.4), 1),
            (lambda: DropConnect(0.4, rescale=True), 3),
            (lambda: GradientQuantization(), 2),
            (lambda: LangevinNoise(0.3), 2),
            (lambda: DropConnect(0.4, per="example"), 2),
        ],
        ids=["worker", "accumulated", "quantised", "langevin", "example"],
    )
    def test_the_effect_is_what_the_applied_gradients_show(self, make, accumulate):
        class AtUpdate(Regression):
            """Keeps what the optimizer applies, noise included."""

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), 1e-9)

            def on_train_batch_start(self, batch, batch_idx):
                self.before = torch.cat([p.detach().flatten() for p in self.parameters()])

            def on_train_batch_end(self, outputs, batch, batch_idx):
                if batch_idx % accumulate == accumulate - 1:
                    after = torch.cat([p.detach().flatten() for p in self.parameters()])
                    self.gradients[-1] = (self.before - after) / 1e-9

        module, mechanism = AtUpdate(hidden=100), make()
        whole = unit_gradients(module, *rows(8)).mean(0)
        monitor = GradientDiversityMonitor(every_n_steps=10**9)
        fit(module, same_batch(8, 60 * accumulate), mechanism, monitor, accumulate_grad_batches=accumulate)
        found, effect = torch.stack(module.gradients), mechanism.effect
        assert float(found.var(0).sum()) == pytest.approx(effect.variance, rel=0.1)
        spread = math.sqrt(effect.variance / len(found))
        assert float((found.mean(0) - effect.scale * whole).norm()) < 2.5 * spread + 1e-6
        assert effect.sum_sq_weights == pytest.approx(1 / (8 * accumulate))


def test_an_audit_of_which_examples_a_masked_step_holds():
    """One mask per example on one-hot examples: each entry is its example's weight, or zero."""
    module = AuditModule(64)
    fit(module, loader(64, 8), DropConnect(0.5, per="example"), accumulate_grad_batches=2)
    steps = torch.stack(module.steps)
    assert steps.shape == (4, 64)
    torch.testing.assert_close(steps.unique(), torch.tensor([0.0, 1 / 16]))
    assert ((steps > 0).sum(0) <= 1).all()
    assert 16 < int((steps > 0).sum()) < 48
