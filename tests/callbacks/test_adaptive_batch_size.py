"""AdaptiveBatchSize: grows exactly as far as the policy allows, and the epoch stays an epoch."""

import math

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint, TQDMProgressBar
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, TensorDataset

from lightning_graddiv import AdaptiveBatchSize, DiversityBound, GradientDiversityMonitor, RunState
from tests.audit import (
    AuditModule,
    ValidatedAudit,
    assert_each_example_once,
    loader,
    one_hot,
    quiet_trainer,
    warned,
)
from tests.callbacks.test_monitor import Copies, Everything, assert_same_training
from tests.callbacks.test_monitor import train as train_everything

EXAMPLES = 64


def adaptive(**kwargs):
    defaults = {"every_n_steps": 1, "max_batch_size": 16, "delta": 1.0, "cooldown": 4, "warm_in": 0}
    return AdaptiveBatchSize(**{**defaults, **kwargs})


def fit(callback, *, module=None, train=None, val=None, epochs=4, callbacks=(), ckpt_path=None, **kwargs):
    module = AuditModule(EXAMPLES) if module is None else module
    trainer = quiet_trainer(max_epochs=epochs, callbacks=[callback, *callbacks], **kwargs)
    trainer.fit(module, loader(EXAMPLES, 4) if train is None else train, val, ckpt_path=ckpt_path)
    return module, trainer


def sizes(steps):
    """Examples in each step."""
    return [int((step > 0).sum()) for step in steps]


def sizes_by_epoch(module):
    """Examples in the first step of each epoch."""
    return sizes(module.steps_of(epoch)[0] for epoch in sorted(set(module.step_epochs)))


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            ({"max_batch_size": 0}, "max_batch_size"),
            ({"delta": 0.0}, "delta"),
            ({"delta": -1.0}, "delta"),
            ({"growth_factor": 1}, "growth_factor"),
            ({"growth_factor": 1.5}, "growth_factor"),
            ({"max_micro_batch_size": 0}, "max_micro_batch_size"),
            ({"cooldown": -1}, "cooldown"),
            ({"scale_lr": "cubic"}, "scale_lr"),
            ({"every_n_steps": 0}, "every_n_steps"),
            ({"warm_in": -1}, "warm_in"),
        ],
    )
    def test_out_of_range_is_refused_by_name(self, arguments, named):
        with pytest.raises(ValueError, match=f"Expected argument `{named}` to be"):
            adaptive(**arguments)

    def test_the_cap_must_admit_the_starting_batch(self):
        with pytest.raises(MisconfigurationException, match=r"`max_batch_size` to be at least.*16.*but got 8"):
            fit(adaptive(max_batch_size=8), train=loader(EXAMPLES, 16))

    def test_the_cap_is_on_the_effective_batch(self):
        with pytest.raises(MisconfigurationException, match="accumulation 4"):
            fit(adaptive(max_batch_size=8), accumulate_grad_batches=4)

    def test_the_micro_batch_limit_must_admit_the_loaders(self):
        with pytest.raises(MisconfigurationException, match="max_micro_batch_size"):
            fit(adaptive(max_micro_batch_size=2))

    def test_a_gradient_accumulation_scheduler_alongside_is_refused(self):
        with pytest.raises(MisconfigurationException, match="GradientAccumulationScheduler"):
            fit(adaptive(), callbacks=[GradientAccumulationScheduler({1: 2})])

    def test_a_second_one_is_refused(self):
        class Another(AdaptiveBatchSize):
            pass

        second = Another(every_n_steps=7, max_batch_size=16, log_prefix="second")
        with pytest.raises(MisconfigurationException, match="Only one"):
            fit(adaptive(), callbacks=[second])

    def test_two_that_log_under_one_name_are_refused(self):
        with pytest.raises(MisconfigurationException, match="Two callbacks log under `graddiv/`"):
            fit(adaptive(), callbacks=[GradientDiversityMonitor()])

    def test_several_training_loaders_of_different_sizes_are_refused(self):
        class Both(AuditModule):
            def training_step(self, batch, batch_idx):
                return super().training_step(batch["a"], batch_idx)

            def on_train_batch_start(self, batch, batch_idx):
                pass

        loaders = {"a": loader(EXAMPLES, 4), "b": loader(EXAMPLES, 8)}
        with pytest.raises(MisconfigurationException, match=r"of one batch size.*but got \[4, 8\]"):
            fit(adaptive(), module=Both(EXAMPLES), train=loaders)
        assert all(type(one.batch_sampler) is BatchSampler for one in loaders.values())

    def test_batches_that_do_not_tell_their_size_are_refused(self):
        class Bare(AuditModule):
            def on_train_batch_start(self, batch, batch_idx):
                pass

        words = DataLoader([["a", "b"], ["c", "d"]], batch_size=None)
        with (
            pytest.raises(MisconfigurationException, match="neither the training loader nor its first batch tells"),
            warned("gradient accumulation only"),
        ):
            fit(adaptive(), module=Bare(EXAMPLES), train=words)


class TestGrowth:
    def test_grows_by_the_whole_factor_up_to_the_cap(self):
        callback = adaptive()
        module, _ = fit(callback)
        assert sizes(module.steps) == [4] * 4 + [8] * 4 + [16] + [16] * 4 * 3
        assert callback.batch_size == 16
        assert [(g.from_batch_size, g.to_batch_size) for g in callback.history] == [(4, 8), (8, 16)]
        assert [(g.step, g.epoch, g.examples_seen) for g in callback.history] == [(4, 0, 16), (8, 0, 48)]
        assert "B_S = 64" in callback.history[0].why

    def test_the_factor_is_the_users(self):
        module, _ = fit(adaptive(growth_factor=4, max_batch_size=40))
        assert sizes(module.steps_of(0)) == [4] * 4 + [16] * 3

    def test_only_a_whole_factor(self):
        callback = adaptive(max_batch_size=15)
        module, _ = fit(callback)
        assert sizes_by_epoch(module) == [4, 8, 8, 8]

    def test_waits_for_four_probes_where_they_are_alike(self):
        module, _ = fit(adaptive(every_n_steps=6, cooldown=0))
        assert sizes(module.steps)[:25] == [4] * 24 + [8]

    def test_waits_for_two_probes_where_that_is_the_cooldown(self):
        module, _ = fit(adaptive(every_n_steps=3, cooldown=2, policy=lambda estimate, run: math.inf))
        assert sizes(module.steps)[:13] == [4] * 6 + [8] * 6 + [16]

    def test_waits_for_as_many_probes_as_it_cools_down(self):
        module, _ = fit(adaptive(cooldown=17))  # of a window of 16, eight are enough for the first growth
        assert sizes(module.steps) == [4] * 8 + [8] * 4 + [8] * 8 + [8] * 5 + [16, 8] + [16] * 4
        module, _ = fit(adaptive(cooldown=17, every_n_steps=3))
        assert sizes(module.steps) == [4] * 24 + [8] * 4 + [8] * 16

    def test_a_window_that_restarted_with_the_learning_rate_is_too_short_to_decide_on(self):
        module = AuditModule(EXAMPLES, learning_rate=1.0)  # halves at each epoch's end
        fit(adaptive(cooldown=8, every_n_steps=3), module=module, train=loader(EXAMPLES, 4))  # 5 probes an epoch
        assert sizes_by_epoch(module) == [4, 4, 4, 4]

    def test_it_measures_as_often_while_it_waits_to_grow(self):
        measured = []

        class Tells(AdaptiveBatchSize):
            def on_estimate(self, trainer, pl_module, estimate):
                measured.append((self.optimizer_steps, self.batch_size))

        policy = lambda _, run: 8 if run.step >= 200 else 0  # noqa: E731
        fit(Tells(max_batch_size=16, window=4, policy=policy), epochs=50)
        assert measured[:5] == [(100, 4), (200, 4), (300, 8), (400, 8), (500, 8)]
        assert [step for step, _ in measured] == [*range(100, measured[-1][0] + 1, 100)]

    def test_cools_down_between_growths(self):
        module, _ = fit(adaptive(cooldown=9))
        assert sizes(module.steps) == [4] * 8 + [8] * 4 + [8] * 5 + [16, 8] + [16] * 4 * 2

    def test_a_policy_decides(self):
        asked = []

        def policy(estimate, run):
            asked.append(run)
            return 8.0 if run.epoch >= 2 else 4.0

        callback = adaptive(policy=policy, cooldown=0)
        module, _ = fit(callback)
        assert sizes(module.steps) == [4] * 33 + [8] * 7 + [4] + [8] * 8
        run = asked[31]
        assert isinstance(run, RunState)
        assert (run.batch_size, run.step, run.examples_seen, run.epoch) == (4, 32, 128, 1)
        assert run.moments.count == 4
        assert run.throughput == {}  # every step was measured
        assert run.loss == 0.0

    def test_a_policy_that_answers_nan_allows_nothing(self):
        module, _ = fit(adaptive(policy=lambda estimate, run: math.nan))
        assert sizes_by_epoch(module) == [4, 4, 4, 4]

    def test_the_loss_that_a_policy_sees_is_not_divided_by_accumulation(self):
        class Constant(AuditModule):
            def training_step(self, batch, batch_idx):
                return super().training_step(batch, batch_idx) + 3

        asked = []
        policy = lambda estimate, run: asked.append(run.loss) or run.batch_size  # noqa: E731
        fit(adaptive(policy=policy), module=Constant(EXAMPLES), accumulate_grad_batches=2)
        assert asked == [3.0] * len(asked)
        assert asked

    def test_a_start_above_the_bound_is_said_once(self):
        seed_everything(0, verbose=False)  # one order in some twenty gives a wider interval
        x = torch.eye(2).repeat(32, 1)
        data = DataLoader(TensorDataset(x), 16, shuffle=True)
        with warned(r"starting effective batch size of 16 is above the 3") as messages:
            fit(adaptive(max_batch_size=64), module=AuditModule(2), train=data)
        assert len(messages) == 1

    def test_a_start_at_the_bound_is_not_said_to_be_above_it_by_an_unsure_interval(self):
        seed_everything(0, verbose=False)
        data = DataLoader(TensorDataset(torch.eye(3).repeat(32, 1)), 4, shuffle=True)  # 4 = delta * 3 + 1
        # A warning would be an error.
        fit(adaptive(max_batch_size=4, confidence=0.01), module=AuditModule(3), train=data)

    def test_idle_training_is_bit_identical(self):
        plain, _ = train_everything()
        idle, _ = train_everything(AdaptiveBatchSize(every_n_steps=10**9, max_batch_size=64))
        assert_same_training(plain, idle)


class TestNegativeControls:
    """Data of few distinct points has a small, known B_S: its number of points, as gradients are orthogonal."""

    @pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
    @pytest.mark.parametrize("cooldown", [2, 4])
    def test_few_distinct_points_keep_the_batch_under_their_bound(self, seed, cooldown):
        seed_everything(seed, verbose=False)
        data = DataLoader(TensorDataset(torch.eye(8).repeat(80, 1)), 2, shuffle=True)
        callback = adaptive(max_batch_size=512, every_n_steps=4, cooldown=cooldown)
        fit(callback, module=AuditModule(8), train=data, epochs=6)
        assert 2 < callback.batch_size <= 8
        for growth in callback.history:
            assert growth.to_batch_size <= 1.0 * growth.estimate.lower + 1
            assert growth.to_batch_size <= growth.allowed

    @pytest.mark.parametrize("cooldown", [0, 4])
    def test_identical_examples_never_grow_the_batch(self, cooldown):
        class Regression(LightningModule):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(5, 1)

            def training_step(self, batch, batch_idx):
                return self.layer(batch[0]).square().mean()

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), 1e-3)

        callback = adaptive(max_batch_size=512, cooldown=cooldown)
        data = DataLoader(TensorDataset(torch.ones(64, 5)), 2, shuffle=True)
        fit(callback, module=Regression(), train=data, epochs=5)
        assert callback.history == []
        assert callback.latest.bound == pytest.approx(1, rel=1e-5)


class TestTheEpochStaysAnEpoch:
    """After growth: every example once, validation and epoch schedulers each epoch, lengths and limits right."""

    @pytest.mark.parametrize("drop_last", [False, True])
    @pytest.mark.parametrize("workers", [0, 2])
    def test_every_example_is_in_exactly_one_step(self, workers, drop_last):
        module, _ = fit(adaptive(), train=loader(EXAMPLES, 4, drop_last=drop_last, num_workers=workers))
        for epoch in range(4):
            assert_each_example_once(module, epoch)
        # Two workers have four batches in hand when a decision falls.
        assert sizes(module.steps_of(0)) == ([4] * 8 + [8] * 4 if workers else [4] * 4 + [8] * 4 + [16])
        assert sizes(module.steps_of(1)) == [16] * 4

    def test_persistent_workers_follow(self):
        module, _ = fit(adaptive(), train=loader(EXAMPLES, 4, num_workers=2, persistent_workers=True))
        assert sizes_by_epoch(module) == [4, 16, 16, 16]
        for epoch in range(4):
            assert_each_example_once(module, epoch)

    def test_a_last_batch_that_is_not_full(self):
        module, _ = fit(adaptive(max_batch_size=32), train=loader(EXAMPLES - 5, 4), module=AuditModule(EXAMPLES - 5))
        for epoch in range(4):
            assert_each_example_once(module, epoch)
        assert module.micro_batches[-2:] == [32, 27]

    def test_validation_and_epoch_schedulers_go_on(self):
        module = ValidatedAudit(EXAMPLES, learning_rate=1.0)
        _, trainer = fit(adaptive(), module=module, val=loader(EXAMPLES, 8, shuffle=False))
        assert module.validations == [0, 1, 2, 3]
        assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5**4
        assert len(trainer.val_dataloaders) == 8

    @pytest.mark.parametrize(("interval", "times"), [(0.5, 8), (4, 2 + 1 + 1 + 1), (16, 4)])
    def test_a_validation_interval_is_kept_or_ends_with_the_epoch(self, interval, times):
        module = ValidatedAudit(EXAMPLES)
        fit(adaptive(), module=module, val=loader(EXAMPLES, 8, shuffle=False), val_check_interval=interval)
        assert len(module.validations) == times
        assert set(module.validations) == {0, 1, 2, 3}

    def test_a_fraction_of_an_epoch_stays_that_fraction(self):
        module, _ = fit(adaptive(), limit_train_batches=0.5)
        examples = [sum(int((step > 0).sum()) for step in module.steps_of(epoch)) for epoch in range(4)]
        assert examples == [32, 32, 32, 32]

    def test_a_number_of_batches_stays_that_number(self):
        module, _ = fit(adaptive(), limit_train_batches=5)
        assert [len(module.steps_of(epoch)) for epoch in range(4)] == [5, 5, 4, 4]

    @pytest.mark.parametrize("drop_last", [False, True])
    def test_an_epoch_holds_a_whole_batch(self, drop_last):
        callback = adaptive(max_batch_size=512, policy=lambda estimate, run: math.inf)
        with warned("an epoch does not hold a single batch of 128 examples") as messages:
            _, trainer = fit(callback, train=loader(100, 8, drop_last=drop_last), module=AuditModule(100), epochs=8)
        assert len(messages) == 1
        assert callback.batch_size == 64
        assert trainer.current_epoch == 8

    def test_a_fraction_of_an_epoch_holds_a_whole_batch(self):
        callback = adaptive(cooldown=0, max_batch_size=512, policy=lambda estimate, run: math.inf)
        with warned("an epoch does not hold"):
            fit(callback, limit_train_batches=0.25, epochs=6)
        assert callback.batch_size == 16

    @pytest.mark.parametrize("reload", [0, 1])
    def test_an_interval_longer_than_a_grown_epoch_survives_loaders_made_anew(self, reload, tmp_path):
        class OwnLoaders(ValidatedAudit):
            def train_dataloader(self):
                return loader(EXAMPLES, 4, shuffle=False)

            def val_dataloader(self):
                return loader(EXAMPLES, 8, shuffle=False)

        def trainer(epochs):
            checkpoint = ModelCheckpoint(tmp_path, save_last=True)
            return quiet_trainer(
                max_epochs=epochs,
                callbacks=[adaptive(), checkpoint],
                enable_checkpointing=True,
                val_check_interval=10,
                reload_dataloaders_every_n_epochs=reload,
            )

        module = OwnLoaders(EXAMPLES)
        trainer(3).fit(module)
        assert set(module.validations) == {0, 1, 2}
        resumed = OwnLoaders(EXAMPLES)
        trainer(5).fit(resumed, ckpt_path=str(tmp_path / "last.ckpt"))
        assert set(resumed.validations) >= {3, 4}

    def test_a_loader_that_serves_for_validation_too_stays_as_it_is(self):
        seen = []

        class Sizes(ValidatedAudit):
            def validation_step(self, batch, batch_idx):
                seen.append(len(batch[0]))

        mine = loader(EXAMPLES, 4, shuffle=False)
        fit(adaptive(), module=Sizes(EXAMPLES), train=mine, val=mine)
        assert set(seen) == {4}

    def test_loaders_made_anew_do_not_pile_up(self):
        import multiprocessing

        alive, before = [], set(multiprocessing.active_children())

        class OwnLoader(AuditModule):
            def train_dataloader(self):
                return loader(EXAMPLES, 4, num_workers=1, persistent_workers=True)

            def on_train_epoch_end(self):
                alive.append(len(set(multiprocessing.active_children()) - before))

        trainer = quiet_trainer(max_epochs=4, callbacks=[adaptive()], reload_dataloaders_every_n_epochs=1)
        trainer.fit(OwnLoader(EXAMPLES))
        assert max(alive) <= 2

    @pytest.mark.parametrize("first", [True, False])
    def test_the_progress_bar_knows_the_length(self, first, capsys):
        totals = []

        class Bar(TQDMProgressBar):
            def on_train_epoch_end(self, trainer, pl_module):
                super().on_train_epoch_end(trainer, pl_module)
                totals.append(self.train_progress_bar.total)

        bar, callback = Bar(), adaptive()
        both = [bar, callback] if first else [callback, bar]
        trainer = quiet_trainer(max_epochs=4, callbacks=both, enable_progress_bar=True)
        trainer.fit(AuditModule(EXAMPLES), loader(EXAMPLES, 4))
        assert totals == [9, 4, 4, 4]

    def test_loaders_made_anew_each_epoch_keep_the_grown_batch(self):
        class OwnLoader(AuditModule):
            def train_dataloader(self):
                return loader(EXAMPLES, 4)

        module = OwnLoader(EXAMPLES)
        quiet_trainer(max_epochs=4, callbacks=[adaptive()], reload_dataloaders_every_n_epochs=1).fit(module)
        assert sizes_by_epoch(module) == [4, 16, 16, 16]
        for epoch in range(4):
            assert_each_example_once(module, epoch)

    @pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined")
    @pytest.mark.parametrize("sized", [False, True])
    def test_a_stream_grows_too(self, sized):
        module = ValidatedAudit(EXAMPLES)
        stream = (SizedStream if sized else Stream)()
        callback = adaptive()
        fit(
            callback,
            module=module,
            train=DataLoader(stream, 4),
            val=loader(EXAMPLES, 8, shuffle=False),
        )
        assert callback.batch_size == 16
        assert callback.latest.dataset_size is None
        assert module.validations == [0, 1, 2, 3]
        assert_each_example_once(module, 3)

    def test_a_custom_batch_sampler_grows_by_accumulation(self):
        class Pairs(BatchSampler):
            """Not a plain BatchSampler: what it does cannot be known."""

        data = DataLoader(one_hot(EXAMPLES), batch_sampler=Pairs(SequentialSampler(range(EXAMPLES)), 4, False))
        with warned("gradient accumulation only, because the training loader draws by a batch sampler of its own, `P"):
            module, _ = fit(adaptive(), train=data)
        assert set(module.micro_batches) == {4}
        assert sizes_by_epoch(module) == [4, 16, 16, 16]
        for epoch in range(4):
            assert_each_example_once(module, epoch)

    def test_accumulation_makes_up_what_a_micro_batch_may_not_hold(self):
        module, _ = fit(adaptive(max_micro_batch_size=8, max_batch_size=32))
        assert sizes(module.steps) == [4] * 4 + [8] * 4 + [16] + [16] * 3 + [16] + [32] * 2 * 2
        assert max(module.micro_batches) == 8
        for epoch in range(4):
            assert_each_example_once(module, epoch)

    def test_where_the_user_accumulates_the_micro_batch_stays(self):
        module, trainer = fit(adaptive(max_batch_size=32), accumulate_grad_batches=2)
        assert sizes(module.steps) == [8] * 4 + [16] * 2 + [16] * 2 + [32] + [32] * 2 * 2
        assert set(module.micro_batches) == {4}
        assert trainer.accumulate_grad_batches == 2


class Stream(IterableDataset):
    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        rows = torch.eye(EXAMPLES)
        share = rows if info is None else rows[info.id :: info.num_workers]
        return iter([(row,) for row in share])


class SizedStream(Stream):
    def __len__(self):
        return EXAMPLES


class TestLeavingTheTrainer:
    def test_the_users_loader_is_given_back(self):
        mine = loader(EXAMPLES, 4)
        sampler = mine.batch_sampler
        _, trainer = fit(adaptive(), train=mine)
        assert mine.batch_sampler is sampler
        assert sampler.batch_size == 4
        assert "setup_data" not in trainer.fit_loop.__dict__
        assert "process_dataloader" not in trainer.strategy.__dict__

    def test_also_after_an_exception_and_then_it_fits_again(self):
        class Stops(Callback):
            def on_train_epoch_start(self, trainer, pl_module):
                if trainer.current_epoch == 2:
                    raise KeyError("stop")

        mine, callback, module = loader(EXAMPLES, 4), adaptive(max_micro_batch_size=8, max_batch_size=32), None
        sampler = mine.batch_sampler
        module = AuditModule(EXAMPLES, learning_rate=1.0)
        trainer = quiet_trainer(max_epochs=4, callbacks=[callback, Stops()])
        with pytest.raises(KeyError, match="stop"):
            trainer.fit(module, mine)
        assert mine.batch_sampler is sampler
        assert trainer.accumulate_grad_batches == 1
        assert "setup_data" not in trainer.fit_loop.__dict__
        optimizer = trainer.optimizers[0]
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
        again, _ = fit(callback, train=mine)
        assert sizes_by_epoch(again) == [4, 16, 32, 32]

    def test_it_can_be_copied_and_pickled_at_every_hook(self):
        callback = adaptive()
        copies = Copies(callback)
        fit(callback, callbacks=[copies])
        assert copies.copies > 60

    def test_a_copy_reads_like_the_one_that_ran(self):
        import copy

        callback = adaptive()
        fit(callback)
        copied = copy.deepcopy(callback)
        assert copied.history == callback.history
        assert copied.batch_size == 16


class TestLearningRate:
    """The factor acts while the optimizer steps; schedulers and checkpoints see the user's own rate."""

    def used(self, callback, epochs=4, **kwargs):
        used = []

        class Recorded(AuditModule):
            def configure_optimizers(self):
                class Recording(torch.optim.SGD):
                    def step(self, closure=None):
                        (w,) = self.param_groups[0]["params"]
                        before = w.detach().clone()
                        super().step(closure)
                        used.append(float((before - w.detach()).sum() / w.grad.sum()))

                return Recording(self.parameters(), 1.0)

        _, trainer = fit(callback, module=Recorded(EXAMPLES), epochs=epochs, **kwargs)
        return used, trainer

    @pytest.mark.parametrize(
        ("rule", "factors"),
        [
            ("linear", [1, 2, 4]),
            ("sqrt", [1, 2**0.5, 2]),
            (None, [1, 1, 1]),
            # gain(B) = B B_S / (B_S + B - 1) with B_S = 64
            ("gain", [1, (8 / 71) / (4 / 67), (16 / 79) / (4 / 67)]),
            ("auto", [1, 2, 4]),
        ],
    )
    def test_follows_the_rule_from_the_starting_batch(self, rule, factors):
        callback = adaptive(scale_lr=rule)
        used, trainer = self.used(callback, epochs=3)
        expected = [factors[0]] * 4 + [factors[1]] * 4 + [factors[2]] * 9
        assert used == pytest.approx(expected, rel=1e-4)
        assert trainer.optimizers[0].param_groups[0]["lr"] == 1.0
        assert [g.learning_rate_factor for g in callback.history] == pytest.approx(factors[1:], rel=1e-6)

    def test_the_bound_of_the_rule_is_the_lower_end(self):
        callback = AdaptiveBatchSize(
            every_n_steps=1, max_batch_size=16, cooldown=4, scale_lr="gain", policy=lambda estimate, run: math.inf
        )
        train_everything(callback)
        (growth,) = callback.history
        lower = growth.estimate.lower
        assert 1 < lower < growth.estimate.bound
        assert growth.learning_rate_factor == pytest.approx((16 / (lower + 15)) / (8 / (lower + 7)))

    def test_nor_does_anything_that_runs_inside_the_step(self):
        """Lightning runs training_step and its hooks in the optimizer's closure; some step schedulers there."""

        class Inside(AuditModule):
            def configure_optimizers(self):
                self.seen = []
                self.optimizer = torch.optim.SGD(self.parameters(), 1.0)
                self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.99)
                return self.optimizer

            def training_step(self, batch, batch_idx):
                self.seen.append(self.optimizer.param_groups[0]["lr"])
                return super().training_step(batch, batch_idx)

            def on_before_optimizer_step(self, optimizer):
                super().on_before_optimizer_step(optimizer)
                if self.global_step > 0:  # a scheduler wants a step of the optimizer first
                    self.scheduler.step()

        module = Inside(EXAMPLES)
        fit(adaptive(scale_lr="linear"), module=module)
        expected = [1.0, *(0.99**i for i in range(len(module.seen) - 1))]
        assert module.seen == pytest.approx(expected, rel=1e-6)

    def test_schedulers_never_see_the_factor(self):
        module = AuditModule(EXAMPLES, learning_rate=1.0)
        seen = []

        class Look(Callback):
            def on_train_epoch_start(self, trainer, pl_module):
                seen.append(trainer.optimizers[0].param_groups[0]["lr"])

        fit(adaptive(scale_lr="linear"), module=module, callbacks=[Look()])
        assert seen == [1.0, 0.5, 0.25, 0.125]

    def test_the_logged_rate_is_the_one_used(self):
        _, trainer = fit(adaptive(scale_lr="linear"), module=AuditModule(EXAMPLES, learning_rate=1.0), epochs=2)
        assert float(trainer.callback_metrics["graddiv/learning_rate"]) == 4 * 0.5
        assert float(trainer.callback_metrics["graddiv/batch_size"]) == 16


# Lightning tells an epoch's end by equally many steps in each, which grown epochs have not: a false alarm there.
class TestResume:
    """A checkpoint of an epoch's end goes on with the grown batch, as if training had not stopped."""

    def ordered(self):
        return loader(EXAMPLES, 4, shuffle=False)

    def whole(self, **kwargs):
        callback = adaptive(scale_lr="linear", cooldown=7)  # grows in the middle of the first epoch and of the second
        module, trainer = fit(
            callback, module=ValidatedAudit(EXAMPLES, 0.1), train=self.ordered(), val=self.ordered(), **kwargs
        )
        return callback, module, trainer

    @pytest.mark.parametrize("at_train_end", [True, False], ids=["train epoch end", "validation end"])
    @pytest.mark.parametrize("limit", [{"epochs": 4}, {"epochs": -1, "max_steps": 28}], ids=["epochs", "steps"])
    @pytest.mark.parametrize("epoch", [0, 1, 2])
    def test_at_an_epochs_end(self, tmp_path, epoch, limit, at_train_end):
        checkpoint = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=at_train_end)
        reference, module, trainer = self.whole(callbacks=[checkpoint], enable_checkpointing=True, **limit)
        assert sizes(module.steps) == [4] * 7 + [8] * 4 + [4] + [8] * 7 + [8] + [16] * 4 * 2
        assert [g.step for g in reference.history] == [7, 19]

        resumed, again, second = self.whole(
            callbacks=[checkpoint],
            enable_checkpointing=True,
            ckpt_path=str(tmp_path / f"epoch={epoch}.ckpt"),
            **limit,
        )
        assert second.global_step == trainer.global_step == 28
        assert second.current_epoch == trainer.current_epoch
        assert [g.to_batch_size for g in resumed.history] == [8, 16]
        assert [g.learning_rate_factor for g in resumed.history] == [2, 4]
        assert resumed.batch_size == 16
        remaining = module.steps[len(module.steps) - len(again.steps) :]
        assert len(again.steps) == sum([12, 8, 4, 4][epoch + 1 :])
        assert all(torch.equal(a, b) for a, b in zip(again.steps, remaining, strict=True))
        assert torch.equal(again.w, module.w)
        assert resumed.latest == reference.latest

    def test_with_another_engine_and_another_loader_it_is_the_same_run(self, tmp_path):
        checkpoint = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        self.whole(callbacks=[checkpoint], enable_checkpointing=True)
        resumed = adaptive(engine="loop", max_batch_size=32, scale_lr="linear")
        fit(
            resumed,
            train=loader(EXAMPLES, 16, shuffle=False),
            ckpt_path=str(tmp_path / "epoch=0.ckpt"),
            callbacks=[checkpoint],
            enable_checkpointing=True,
            epochs=6,
        )
        assert [(g.to_batch_size, g.learning_rate_factor) for g in resumed.history] == [(8, 2), (16, 4), (32, 8)]

    def test_a_policy_sees_after_a_resume_what_it_saw_before(self, tmp_path):
        def policy(estimate, run):
            assert run.loss == 0.0
            return run.moments.count * 4 * bool(run.throughput)

        checkpoint = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
        options = {"callbacks": [checkpoint], "enable_checkpointing": True}
        fit(adaptive(policy=policy, every_n_steps=2), epochs=2, **options)
        resumed = adaptive(policy=policy, every_n_steps=2)
        fit(resumed, ckpt_path=str(tmp_path / "last.ckpt"), **options)
        assert resumed.batch_size == 16

    def test_where_the_schedule_was_estimated_in_steps(self, tmp_path):
        """`estimated_stepping_batches` sets the loaders up before the loops' state is back."""

        class Estimates(ValidatedAudit):
            def configure_optimizers(self):
                assert self.trainer.estimated_stepping_batches > 0
                return super().configure_optimizers()

        checkpoint = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        fit(
            adaptive(),
            module=Estimates(EXAMPLES),
            train=self.ordered(),
            callbacks=[checkpoint],
            enable_checkpointing=True,
            val=self.ordered(),
        )
        resumed = adaptive()
        module, _ = fit(
            resumed,
            module=Estimates(EXAMPLES),
            train=self.ordered(),
            val=self.ordered(),
            callbacks=[checkpoint],
            enable_checkpointing=True,
            ckpt_path=str(tmp_path / "epoch=1.ckpt"),
        )
        assert [len(module.steps_of(epoch)) for epoch in (2, 3)] == [4, 4]

    def test_the_state_loads_with_lightnings_defaults(self, tmp_path):
        checkpoint = ModelCheckpoint(tmp_path, save_last=True)
        self.whole(callbacks=[checkpoint], enable_checkpointing=True)
        state = torch.load(tmp_path / "last.ckpt", weights_only=True)
        (ours,) = [value for key, value in state["callbacks"].items() if "AdaptiveBatchSize" in key]
        assert ours["batch_size"] == 16
        assert ours["measured_since_growth"] == 9


def test_growth_reaches_the_logs():
    rows = []

    class Rows(AdaptiveBatchSize):
        def on_estimate(self, trainer, pl_module, estimate):
            rows.append((self.batch_size, float(trainer.callback_metrics["graddiv/batch_size"])))

    fit(Rows(every_n_steps=1, max_batch_size=16, delta=1.0, cooldown=0))
    assert {size for size, _ in rows} == {4, 8, 16}
    assert all(size == logged for size, logged in rows)


def test_a_real_module_trains_with_it():
    callback = AdaptiveBatchSize(every_n_steps=1, max_batch_size=32, policy=DiversityBound(2.0), cooldown=0)
    module, trainer = train_everything(callback, epochs=5)
    assert isinstance(module, Everything)
    assert callback.measurements == trainer.global_step
