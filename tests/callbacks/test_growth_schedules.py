"""Schedules that count optimizer steps follow the examples seen: after growth, the rate is where it would have been."""

import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, ReduceLROnPlateau

from lightning_graddiv import AdaptiveBatchSize
from tests.audit import AuditModule, loader, quiet_trainer, warned


def one_cycle(optimizer, steps):
    return OneCycleLR(optimizer, max_lr=[1.0, 0.5], total_steps=steps)


def cosine(optimizer, steps):
    return CosineAnnealingLR(optimizer, T_max=steps)


def warm_up(optimizer, steps):
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20) * (1 - step / (2 * steps)))


class Scheduled(AuditModule):
    """Two parameter groups and a scheduler that is stepped with the optimizer; notes the rates of each step."""

    def __init__(self, examples, schedule, frequency=1, **config):
        super().__init__(examples)
        self.other = torch.nn.Parameter(torch.zeros(1))
        self.schedule, self.config = schedule, {"interval": "step", "frequency": frequency, **config}
        self.estimated = None

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0 * self.other.sum()

    def configure_optimizers(self):
        groups = [{"params": [self.w], "lr": 1.0}, {"params": [self.other], "lr": 0.5}]
        optimizer = torch.optim.SGD(groups, momentum=0.9)
        self.estimated = self.trainer.estimated_stepping_batches
        scheduler = self.schedule(optimizer, self.estimated)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **self.config}}


class Rates(Callback):
    """The rates that each step applied, by the examples seen before it; and the factor of growth at that step."""

    def __init__(self, adaptive=None):
        self.adaptive, self.rates, self.examples = adaptive, {}, 0
        self.lightnings = {}

    def on_fit_start(self, trainer, pl_module):
        def look(optimizer, *_):
            self.applied = [group["lr"] for group in optimizer.param_groups]

        trainer.optimizers[0].register_step_post_hook(look)  # before ours, which puts the rates back
        self.handle = None

    def on_train_batch_start(self, trainer, *_):
        self.lightnings[self.examples] = [group["lr"] for group in trainer.optimizers[0].param_groups]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if len(pl_module.steps) > len(self.rates):
            self.rates[self.before] = self.applied
        self.examples += len(batch[0])

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        done = sum(int((step > 0).sum()) for step in pl_module.steps)
        self.before = done


def train(schedule, callback=None, *, examples=64, epochs=4, frequency=1, fit=None, **kwargs):
    module, rates = Scheduled(examples, schedule, frequency), Rates(callback)
    callbacks = [rates] if callback is None else [rates, callback]
    trainer = quiet_trainer(max_epochs=epochs, callbacks=callbacks, **kwargs)
    trainer.fit(module, loader(examples, 4), **(fit or {}))
    return module, rates.rates, trainer


def growing(**kwargs):
    defaults = {"every_n_steps": 1, "max_batch_size": 16, "delta": 1.0, "cooldown": 5, "warm_in": 0}
    return AdaptiveBatchSize(**{**defaults, "scale_lr": "linear", **kwargs})


def factor_at(callback, examples):
    factors = [growth.learning_rate_factor for growth in callback.history if growth.examples_seen <= examples]
    return factors[-1] if factors else 1.0


def assert_follows(plain, grown, callback):
    """At each of the grown run's steps, both groups have the ungrown run's rates for the same examples, times it."""
    assert len(grown) < len(plain)
    for examples, rates in grown.items():
        expected = [factor_at(callback, examples) * rate for rate in plain[examples]]
        assert rates == pytest.approx(expected, rel=1e-9, abs=1e-12), examples


class TestSchedules:
    @pytest.mark.parametrize("schedule", [one_cycle, cosine, warm_up])
    @pytest.mark.parametrize("examples", [64, 61])
    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_t29_the_rate_by_examples_is_that_of_the_ungrown_run(self, schedule, examples, accumulate):
        _, plain, _ = train(schedule, examples=examples, accumulate_grad_batches=accumulate)
        callback = growing()
        module, grown, trainer = train(schedule, callback, examples=examples, accumulate_grad_batches=accumulate)
        assert [g.to_batch_size for g in callback.history] == [8, 16][accumulate - 1 :]
        assert_follows(plain, grown, callback)
        steps = module.estimated
        assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == steps  # the schedule has run to its end

    @pytest.mark.parametrize("frequency", [2, 3])
    def test_a_frequency_counts_the_ungrown_runs_batches(self, frequency):
        _, plain, _ = train(warm_up, frequency=frequency)
        callback = growing()
        _, grown, _ = train(warm_up, callback, frequency=frequency)
        assert_follows(plain, grown, callback)

    def test_lightning_sees_and_saves_the_unscaled_rate(self, tmp_path):
        _, _, plain = train(cosine)
        _, _, grown = train(cosine, growing())
        rates = [[group["lr"] for group in trainer.optimizers[0].param_groups] for trainer in (plain, grown)]
        assert rates[0] == pytest.approx(rates[1])
        assert [config.frequency for config in grown.lr_scheduler_configs] == [1]

    def test_a_plateau_scheduler_is_left_alone(self):
        class Plateau(Scheduled):
            def configure_optimizers(self):
                configured = super().configure_optimizers()
                scheduler = ReduceLROnPlateau(configured["optimizer"], patience=10**6)
                configured["lr_scheduler"] |= {"scheduler": scheduler, "monitor": "train_loss"}
                self.plateau = scheduler
                return configured

        module = Plateau(64, cosine)
        trainer = quiet_trainer(max_epochs=2, callbacks=[growing()])
        trainer.fit(module, loader(64, 4))
        assert module.plateau.last_epoch == trainer.global_step

    def test_warm_in_reaches_the_factor_in_equal_parts(self):
        _, plain, _ = train(cosine)
        callback = growing(max_batch_size=8, warm_in=4)
        _, grown, _ = train(cosine, callback)
        factors = [rates[0] / plain[examples][0] for examples, rates in list(grown.items())[:12]]
        assert factors == pytest.approx([1] * 5 + [1.25, 1.5, 1.75] + [2] * 4)


class TestLimits:
    """``max_epochs`` counts passes over the data, ``max_steps`` optimizer steps, as without the callback."""

    def test_max_epochs_are_passes_over_the_data(self):
        callback = growing()
        module, _, trainer = train(cosine, callback, epochs=3)
        assert trainer.current_epoch == 3
        assert callback.examples_seen == 3 * 64
        assert trainer.global_step == len(module.steps) < 3 * 16

    def test_max_steps_are_optimizer_steps_and_a_schedule_stays_at_its_end(self):
        """A one-cycle schedule of 30 steps would raise at its 31st."""
        callback = growing()
        with warned("reached the end of what it can have been made for, 30 optimizer steps") as said:
            _, grown, trainer = train(one_cycle, callback, epochs=-1, max_steps=30)
        assert len(said) == 1
        assert trainer.global_step == 30
        assert callback.examples_seen > 30 * 4
        _, plain, _ = train(one_cycle, epochs=-1, max_steps=30)
        assert_follows(plain, {at: rates for at, rates in grown.items() if at in plain}, callback)
        after = [rates for examples, rates in grown.items() if examples >= 30 * 4]
        assert after == [after[0]] * len(after)

    @pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
    @pytest.mark.parametrize("schedule", [one_cycle, warm_up])
    def test_a_resumed_run_estimates_and_goes_on_with_the_same_schedule(self, schedule, tmp_path):
        """A lambda is not in the checkpoint: it is made again from the steps that Lightning estimates."""
        checkpoint = {"enable_checkpointing": True, "plugins": []}
        saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        module, first, rates = Scheduled(64, schedule), growing(), Rates()
        trainer = quiet_trainer(max_epochs=4, callbacks=[rates, first, saver], **checkpoint)
        trainer.fit(module, loader(64, 4, shuffle=False))
        again, second, resumed = Scheduled(64, schedule), growing(), Rates()
        trainer = quiet_trainer(max_epochs=4, callbacks=[resumed, second, saver], **checkpoint)
        trainer.fit(again, loader(64, 4, shuffle=False), ckpt_path=str(tmp_path / "epoch=1.ckpt"))
        assert again.estimated == module.estimated == 64
        whole = list(rates.rates.values())
        assert list(resumed.rates.values()) == whole[len(whole) - len(again.steps) :]
        assert math.isclose(second.examples_seen, 4 * 64)
