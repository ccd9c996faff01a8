"""Growth in the middle of an epoch: the traps of Lightning's loops, each with the test that catches it.

The audit device shows with which weight each example entered which optimizer step.
"""

import warnings

import lightning
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, LearningRateFinder, RichProgressBar
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler

from lightning_graddiv import AdaptiveBatchSize, GradientDiversityMonitor
from tests.audit import (
    AuditModule,
    ValidatedAudit,
    assert_each_example_once,
    loader,
    one_hot,
    quiet_trainer,
    warned,
)

EXAMPLES = 64


def adaptive(**kwargs):
    """Grows after five measurements, so that windows begin where no multiple of their size is."""
    defaults = {"every_n_steps": 1, "max_batch_size": 32, "delta": 1.0, "cooldown": 5, "warm_in": 0}
    return AdaptiveBatchSize(**{**defaults, **kwargs})


def by_accumulation(**kwargs):
    return adaptive(max_micro_batch_size=4, **kwargs)


def fit(callback, *, module=None, train=None, val=None, epochs=3, callbacks=(), **kwargs):
    if module is None:
        module = AuditModule(EXAMPLES) if val is None else ValidatedAudit(EXAMPLES)
    trainer = quiet_trainer(max_epochs=epochs, callbacks=[callback, *callbacks], **kwargs)
    trainer.fit(module, loader(EXAMPLES, 4) if train is None else train, val)
    return module, trainer


def held_out():
    return loader(EXAMPLES, 8, shuffle=False)


def sizes(steps):
    return [int((step > 0).sum()) for step in steps]


def assert_every_epoch_whole(module, epochs=3):
    for epoch in range(epochs):
        assert_each_example_once(module, epoch)


class Counts(Callback):
    """What happens between two optimizer steps, and Lightning's two counters of steps before each batch."""

    def __init__(self):
        self.zeroed = self.backward = 0
        self.steps, self.counters = [], []

    def on_before_zero_grad(self, *_):
        self.zeroed += 1

    def on_after_backward(self, *_):
        self.backward += 1

    def on_before_optimizer_step(self, *_):
        self.steps.append((self.zeroed, self.backward))
        self.zeroed = self.backward = 0

    def on_train_batch_start(self, trainer, *_):
        self.counters.append((trainer.fit_loop.epoch_loop._batches_that_stepped, trainer.global_step))


def test_t1_accumulation_that_grows_in_mid_epoch_adds_nothing_twice():
    counts = Counts()
    module, _ = fit(by_accumulation(), callbacks=[counts])
    assert sizes(module.steps_of(0)) == [4] * 5 + [8] * 5 + [4]
    assert sizes(module.steps_of(1)) == [16] * 4
    assert_every_epoch_whole(module)
    assert counts.steps[:11] == [(1, 1)] * 5 + [(1, 2)] * 5 + [(1, 1)]
    assert all(zeroed == 1 for zeroed, _ in counts.steps)


def test_t1_a_window_that_is_not_full_weighs_its_examples_equally():
    """61 examples in windows of four times four: the last holds 13 = 4 + 3 + 3 + 3."""
    module, _ = fit(by_accumulation(cooldown=1), train=loader(61, 4), module=AuditModule(61))
    assert_every_epoch_whole(module)
    assert module.micro_batches[-4:] == [4, 3, 3, 3]
    last = module.steps[-1]
    assert sizes([last]) == [29]
    assert float(last.max()) / float(last[last > 0].min()) == pytest.approx(4 / 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_t2_accumulation_that_shrinks_loses_nothing(workers):
    """From 3 x 4 to 24 x 1; two workers stop drawing in the middle of a window."""
    callback = adaptive(max_micro_batch_size=32, max_batch_size=24)
    module, _ = fit(
        callback, module=AuditModule(120), train=loader(120, 4, num_workers=workers), accumulate_grad_batches=3
    )
    assert callback.batch_size == 24
    assert callback.history[0].epoch == 0
    assert_every_epoch_whole(module)
    micro_batches = [size for size in module.micro_batches if size in (4, 24)]
    assert micro_batches == sorted(micro_batches)


@pytest.mark.parametrize("make", [adaptive, by_accumulation])
def test_t3_the_steps_that_loggers_count_are_those_taken(make):
    counts = Counts()
    fit(make(), callbacks=[counts])
    assert all(logged == taken for logged, taken in counts.counters)
    assert counts.counters[-1][1] == 16


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("drop_last", [False, True])
def test_t4_an_epoch_that_became_shorter_validates_and_ends_as_epochs_do(drop_last, workers):
    module = ValidatedAudit(61, learning_rate=1.0)
    train = loader(61, 4, drop_last=drop_last, num_workers=workers)
    _, trainer = fit(adaptive(), module=module, train=train, val=loader(61, 8, shuffle=False))
    assert module.validations == [0, 1, 2]
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5**3
    seen = [(torch.stack(module.steps_of(epoch)) > 0).sum(0) for epoch in range(3)]
    assert all(int(of_epoch.max()) == 1 for of_epoch in seen)
    if not drop_last:
        assert_every_epoch_whole(module)
    assert trainer.num_training_batches == (3 if drop_last else 4)
    assert len(trainer.train_dataloader) == (15 if drop_last else 16)  # the user's again


def test_t4_an_epoch_whose_rest_makes_no_new_batch_goes_on_with_the_old_ones():
    """After 56 of 63 examples, the last seven do not fill a batch of eight, and the loader drops what is not full."""
    train, val = loader(63, 4, drop_last=True), loader(63, 9, shuffle=False)
    callback = adaptive(policy=lambda estimate, run: 8.0 if run.step >= 14 else 0.0)
    module, _ = fit(callback, train=train, module=ValidatedAudit(63, learning_rate=1.0), val=val)
    assert sizes(module.steps_of(0)) == [4] * 15
    assert sizes(module.steps_of(1)) == [8] * 7
    assert module.validations == [0, 1, 2]


@pytest.mark.parametrize("limit", [0.5, 0.75])
@pytest.mark.parametrize("workers", [0, 2])
def test_t5_a_fraction_of_an_epoch_stays_that_fraction(workers, limit):
    module, _ = fit(
        adaptive(max_batch_size=8), train=loader(EXAMPLES, 4, num_workers=workers), limit_train_batches=limit
    )
    examples = [sum(sizes(module.steps_of(epoch))) for epoch in range(3)]
    first = examples[0]
    assert examples[1:] == [limit * EXAMPLES] * 2
    assert limit * EXAMPLES <= first < limit * EXAMPLES + 8  # in its middle, as near as whole batches come


@pytest.mark.parametrize("drop_last", [False, True])
def test_t6_batches_change_their_size_in_mid_epoch_with_drop_last_too(drop_last):
    module, _ = fit(adaptive(max_batch_size=8), train=loader(EXAMPLES, 4, drop_last=drop_last), epochs=1)
    assert module.micro_batches == [4] * 5 + [8] * 5 + [4] * (not drop_last)


class Constant(AuditModule):
    """A loss of three, whatever the weights."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 3


def test_t18_the_loss_that_a_policy_sees_is_that_of_the_module_in_every_window():
    asked = []
    callback = by_accumulation(policy=lambda estimate, run: asked.append((run.loss, run.batch_size)) or 100.0)
    fit(callback, module=Constant(EXAMPLES))
    assert {size for _, size in asked} == {4, 8, 16}
    assert all(loss == 3.0 for loss, _ in asked)


class Raises(Callback):
    """In the middle of the second accumulated window."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 0 and batch_idx == 7:
            self.accumulated = trainer.accumulate_grad_batches
            raise KeyError("stop")


def test_t22_an_exception_leaves_nothing_behind_and_it_fits_again():
    class Stepwise(AuditModule):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 1.0)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    mine, callback, raises = loader(EXAMPLES, 4), by_accumulation(), Raises()
    sampler, before = mine.batch_sampler, dict(vars(mine))
    trainer = quiet_trainer(max_epochs=2, callbacks=[callback, raises])
    with pytest.raises(KeyError, match="stop"):
        trainer.fit(Stepwise(EXAMPLES), mine)
    assert raises.accumulated == 2
    assert type(trainer.accumulate_grad_batches) is int
    assert trainer.accumulate_grad_batches == 1
    assert "setup_data" not in vars(trainer.fit_loop)
    assert "process_dataloader" not in vars(trainer.strategy)
    assert [config.frequency for config in trainer.lr_scheduler_configs] == [1]
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
    assert mine.batch_sampler is sampler
    assert vars(mine) == before
    again, _ = fit(callback, train=mine, module=Stepwise(EXAMPLES), epochs=2)
    assert_every_epoch_whole(again, 2)


@pytest.mark.skipif(lightning.__version__ < "2.6", reason="its Rich bar fails with this Rich, without the callback too")
def test_t23_richs_bar_is_told_the_new_length():
    class Bar(RichProgressBar):
        totals = ()

        def on_train_batch_end(self, trainer, *args):
            super().on_train_batch_end(trainer, *args)
            self.totals = (*self.totals, self.train_progress_bar.total)

    first, last = Bar(), Bar()
    for bar, callbacks in ((first, lambda ours: [first, ours]), (last, lambda ours: [ours, last])):
        trainer = quiet_trainer(max_epochs=2, callbacks=callbacks(adaptive(max_batch_size=8)), enable_progress_bar=True)
        trainer.fit(AuditModule(EXAMPLES), loader(EXAMPLES, 4))
        assert bar.totals[:4] == (16,) * 4
        assert bar.totals[5:11] == (11,) * 6
        assert bar.totals[11:] == (8,) * 8


class Stream(IterableDataset):
    """All examples, shared out among workers."""

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        rows = torch.eye(EXAMPLES)
        return iter([(row,) for row in (rows if info is None else rows[info.id :: info.num_workers])])


class SizedStream(Stream):
    def __len__(self):
        return EXAMPLES


class Endless(IterableDataset):
    def __iter__(self):
        return ((row,) for _ in iter(int, 1) for row in torch.eye(EXAMPLES))


def test_t24_a_stream_grows_though_its_sampler_has_no_length():
    train = DataLoader(Stream(), 4)
    with pytest.raises(TypeError):
        bool(train.batch_sampler)
    module, _ = fit(adaptive(max_batch_size=16), train=train, val=held_out())
    assert module.validations == [0, 1, 2]
    assert [len(torch.stack(module.steps_of(epoch)).sum(0).nonzero()) for epoch in range(3)] == [EXAMPLES] * 3
    assert sum(sizes(module.steps)) == 3 * EXAMPLES
    # Lightning holds one batch of a stream in hand.
    assert sizes(module.steps_of(0))[:7] == [4] * 6 + [8]
    assert set(module.micro_batches[:15]) == {4, 8, 16}
    assert sizes(module.steps_of(2)) == [16] * 4
    assert max(module.micro_batches) == 16


@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined")
@pytest.mark.parametrize("sized", [False, True])
def test_t4_a_stream_that_workers_share_grows_by_accumulation(sized):
    """Each worker ends by itself: an epoch of larger batches might be shorter than Lightning was told."""
    train = DataLoader((SizedStream if sized else Stream)(), 4, num_workers=2)
    with warned("gradient accumulation only, because workers share a stream"):
        module, _ = fit(adaptive(max_batch_size=16), train=train, val=held_out())
    assert module.validations == [0, 1, 2]
    assert [len(torch.stack(module.steps_of(epoch)).sum(0).nonzero()) for epoch in range(3)] == [EXAMPLES] * 3
    assert max(module.micro_batches) == 4
    assert max(sizes(module.steps_of(2))) == 16


def test_t4_a_number_of_batches_of_a_stream_is_not_made_larger_than_the_stream():
    with warned("gradient accumulation only, because the stream, whose length is not known"):
        module, _ = fit(
            adaptive(max_batch_size=16), train=DataLoader(Stream(), 4), val=held_out(), limit_train_batches=9
        )
    assert module.validations == [0, 1, 2]
    assert max(module.micro_batches) == 4
    assert max(sizes(module.steps)) == 16


@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined")
def test_t25_a_sized_stream_has_the_length_of_its_new_batches():
    lengths = []

    class Look(Callback):
        def on_train_epoch_end(self, trainer, *_):
            taken = trainer.fit_loop.epoch_loop.batch_progress.current.ready
            lengths.append((trainer.num_training_batches, taken, len(trainer.train_dataloader)))

    train = DataLoader(SizedStream(), 4)
    module, trainer = fit(adaptive(max_batch_size=16), train=train, val=held_out(), callbacks=[Look()])
    assert module.validations == [0, 1, 2]
    assert_every_epoch_whole(module)
    assert all(expected == taken for expected, taken, _ in lengths)
    assert lengths[-1] == (4, 4, 4)
    assert len(trainer.train_dataloader) == 16  # the user's again


def test_t26_steps_are_counted_by_the_callback_and_what_is_not_finite_is_dropped():
    class Twice(AuditModule):
        """Steps twice a batch, so that Lightning counts two."""

        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for _ in range(2):
                loss = super().training_step(batch, batch_idx)
                self.optimizers().zero_grad()
                self.manual_backward(loss)
                self.optimizers().step()

    monitor = GradientDiversityMonitor(every_n_steps=2)
    _, trainer = fit(monitor, module=Twice(EXAMPLES), epochs=1)
    assert (trainer.global_step, monitor.optimizer_steps) == (32, 16)

    class Overflows(AuditModule):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss + float("nan") if batch_idx == 2 else loss

    callback = adaptive()
    with warned("not finite"):
        module, _ = fit(callback, module=Overflows(EXAMPLES), epochs=1)
    assert callback.history[0].step == 6  # one measurement later than the fifth step
    assert callback.dropped == 1
    assert callback.measurements == callback.optimizer_steps - 1
    assert len(module.steps) == callback.optimizer_steps


def bare(batches):
    """The batches as tensors, without the tuple of a data set."""

    class Bare(AuditModule):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch,), batch_idx)

        def on_train_batch_start(self, batch, batch_idx):
            self.micro_batches.append(len(batch))

    return Bare(EXAMPLES), batches


def blocks():
    return [torch.eye(EXAMPLES)[i : i + 4] for i in range(0, EXAMPLES, 4)]


class Forever:
    """No DataLoader, no length, no end."""

    def __iter__(self):
        while True:
            yield from blocks()


class Pairs(BatchSampler):
    """Not a plain BatchSampler: what it does cannot be known."""


class Shuffled(BatchSampler):
    """Draws its batches in another order each time, and none twice."""

    def __iter__(self):
        batches = list(super().__iter__())
        return iter([batches[i] for i in torch.randperm(len(batches))])


@pytest.mark.parametrize("workers", [0, 2])
def test_r14_batches_of_another_sampler_are_merged_where_they_may_be(workers):
    train = DataLoader(one_hot(EXAMPLES), batch_sampler=Shuffled(range(EXAMPLES), 4, False), num_workers=workers)
    callback = adaptive(max_micro_batch_size=12, max_batch_size=16, merge_batches=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*AdaptiveBatchSize")
        module, _ = fit(callback, train=train)
    assert set(module.micro_batches) == {4, 8}  # 12 does not divide 16 among equals
    assert [g.to_batch_size for g in callback.history] == [8, 16]
    assert callback.history[0].epoch == 0
    assert callback.examples_seen == 3 * EXAMPLES
    assert_every_epoch_whole(module)
    for step in module.steps:
        together = step.view(-1, 4) > 0
        assert torch.equal(together.any(1), together.all(1))  # their batches are whole
    assert type(train.batch_sampler) is Shuffled


def test_r14_micro_batches_are_whole_batches_of_the_other_sampler():
    """Three batches of four in micro-batches of at most ten: 4 + 4 + 4, not 6 + 6."""
    train = DataLoader(one_hot(60), batch_sampler=Shuffled(range(60), 4, False))
    callback = adaptive(growth_factor=3, max_batch_size=12, max_micro_batch_size=10, merge_batches=True)
    module, _ = fit(callback, module=AuditModule(60), train=train)
    assert callback.batch_size == 12
    assert set(module.micro_batches) == {4}
    assert sizes(module.steps_of(2)) == [12] * 5
    assert_every_epoch_whole(module)


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
def test_several_loaders_of_one_batch_size_grow_by_accumulation(mode):
    class Both(AuditModule):
        def training_step(self, batch, batch_idx):
            if batch["b"] is None:  # that loader has ended
                return super().training_step(batch["a"], batch_idx)
            return super().training_step(batch["a"], batch_idx) + 0 * batch["b"][0].sum()

        def on_train_batch_start(self, batch, batch_idx):
            super().on_train_batch_start(batch["a"], batch_idx)

    loaders = {"a": loader(EXAMPLES, 4), "b": loader(EXAMPLES // 2, 4)}
    callback = adaptive(max_batch_size=16)
    with warned("gradient accumulation only, because there are several training loaders") as messages:
        module, trainer = fit(callback, module=Both(EXAMPLES), train=CombinedLoader(loaders, mode))
    assert len(messages) == 1
    assert set(module.micro_batches) == {4}
    assert callback.batch_size == 16
    assert trainer.num_training_batches == (8 if mode == "min_size" else 16)
    for epoch in range(3):
        steps = torch.stack(module.steps_of(epoch))
        torch.testing.assert_close(steps.sum(1), torch.ones(len(steps)))
        assert int((steps > 0).sum()) == (EXAMPLES // 2 if mode == "min_size" else EXAMPLES)
    for one in trainer.train_dataloader.values():
        sampler = one.batch_sampler
        assert getattr(sampler, "latest", None) is None or not sampler.latest.drawn  # nobody would take it


def test_a_combined_loader_draws_the_users_batches_again_after_fit():
    combined = CombinedLoader(loader(EXAMPLES, 4), "min_size")
    callback = adaptive()
    fit(callback, train=combined)
    assert callback.batch_size == 32
    assert [len(batch[0]) for batch, *_ in iter(combined)] == [4] * 16
    again = adaptive(max_batch_size=8)
    module, _ = fit(again, train=combined, epochs=1)
    assert again.history[0].from_batch_size == 4
    assert_every_epoch_whole(module, 1)


def test_growth_reaches_persistent_workers_that_the_user_has_begun_with():
    train = loader(EXAMPLES, 4, num_workers=2, persistent_workers=True)
    next(iter(train))
    module, _ = fit(adaptive(max_batch_size=16), train=train)
    assert sizes(module.steps_of(2)) == [16] * 4
    assert 16 in module.micro_batches
    assert_every_epoch_whole(module)
    assert [len(batch[0]) for batch in train] == [4] * 16


@pytest.mark.parametrize("several", [False, True])
def test_idle_with_persistent_workers_that_a_tuner_has_begun_with_changes_nothing(several, tmp_path):
    """Whoever begins them anew draws one random number more."""

    class First(AuditModule):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[0] if several else batch, batch_idx)

        def on_train_batch_start(self, batch, batch_idx):
            pass

    seen = []
    for every_n_steps in (None, 10**9):
        torch.manual_seed(0)
        loaders = [loader(EXAMPLES, 4, num_workers=2, persistent_workers=True) for _ in range(2)]
        finder = LearningRateFinder(min_lr=1e-3, max_lr=1e-2, num_training_steps=3)
        module, own = First(EXAMPLES), [] if every_n_steps is None else [adaptive(every_n_steps=every_n_steps)]
        trainer = quiet_trainer(max_epochs=2, callbacks=[*own, finder], default_root_dir=tmp_path)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*several training loaders")
            trainer.fit(module, loaders if several else loaders[0])
        seen.append((torch.stack(module.steps), torch.get_rng_state()))
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])


@pytest.mark.parametrize("every_n_steps", [1, 10**9], ids=["growing", "idle"])
def test_one_loader_with_persistent_workers_that_is_given_anew_each_epoch(every_n_steps):
    class Again(AuditModule):
        def train_dataloader(self):
            return train

    seen = []
    for callbacks in ([], [adaptive(every_n_steps=every_n_steps, max_batch_size=16)]):
        torch.manual_seed(0)
        train = loader(EXAMPLES, 4, num_workers=2, persistent_workers=True)
        module = Again(EXAMPLES)
        trainer = quiet_trainer(max_epochs=3, callbacks=callbacks, reload_dataloaders_every_n_epochs=1)
        trainer.fit(module)
        seen.append((module.steps, torch.get_rng_state()))
    if every_n_steps == 1:
        assert sizes(module.steps_of(2)) == [16] * 4
        assert_every_epoch_whole(module)
    else:
        assert all(torch.equal(a, b) for a, b in zip(*(steps for steps, _ in seen), strict=True))
        assert torch.equal(seen[0][1], seen[1][1])
    assert len(trainer.train_dataloader) == 16


@pytest.mark.parametrize("persistent", [False, True])
def test_growth_reaches_workers_that_a_tuner_has_begun_with(persistent, tmp_path):
    """They draw from the sampler that they were started with."""
    train = CombinedLoader(loader(EXAMPLES, 4, num_workers=2, persistent_workers=persistent), "min_size")
    finder = LearningRateFinder(min_lr=1e-3, max_lr=1e-2, num_training_steps=3)
    module = AuditModule(EXAMPLES)
    callback = adaptive(cooldown=4, max_batch_size=16)
    fit(callback, module=module, train=train, callbacks=[finder], default_root_dir=tmp_path)
    assert callback.batch_size == 16
    assert module.micro_batches[-4:] == [16] * 4


def r14_loaders():
    batches = BatchSampler(RandomSampler(range(EXAMPLES)), 4, False)
    return {
        "own batch sampler": (
            None,
            DataLoader(one_hot(EXAMPLES), batch_sampler=Pairs(range(EXAMPLES), 4, False)),
            "`P",
        ),
        "BatchSampler as sampler": (
            None,
            DataLoader(one_hot(EXAMPLES), sampler=batches, batch_size=None),
            "`batch_size=N",
        ),
        "made batches": (*bare(DataLoader(blocks(), batch_size=None)), "`batch_size=None`"),
        "endless": (*bare(Forever()), "no DataLoader but a `Forever`"),
    }


@pytest.mark.parametrize("kind", r14_loaders())
def test_r14_what_cannot_change_its_micro_batch_grows_by_accumulation_and_says_so_once(kind):
    module, train, reason = r14_loaders()[kind]
    callback = adaptive()
    limit = {"limit_train_batches": 16} if kind == "endless" else {}
    with warned("gradient accumulation only, because.*" + reason) as messages:
        module, _ = fit(callback, module=module, train=train, **limit)
    assert len(messages) == 1
    assert set(module.micro_batches) == {4}
    assert callback.batch_size == 32
    assert [g.to_batch_size for g in callback.history] == [8, 16, 32]
    assert callback.examples_seen == 3 * EXAMPLES
    assert_every_epoch_whole(module)


def test_r14_an_endless_loader_grows_its_micro_batch_without_an_epochs_end():
    module, _ = fit(adaptive(), train=DataLoader(Endless(), 4), epochs=-1, max_steps=25)
    assert sizes(module.steps) == [4] * 5 + [4] + [8] * 5 + [8] + [16] * 5 + [16] + [32] * 7


def test_r15_what_monitors_validation_goes_on_when_the_batch_grows():
    class Plateau(ValidatedAudit):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 1.0)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", float(self.current_epoch))

    stopping = EarlyStopping("val_loss", patience=3)
    module, trainer = fit(adaptive(), module=Plateau(EXAMPLES), val=held_out(), callbacks=[stopping], epochs=9)
    assert module.validations == [0, 1, 2, 3]
    assert stopping.stopped_epoch == 3
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5**3


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("interval", [0.25, 0.5])
def test_r15_validation_comes_after_the_same_share_of_the_examples(interval, workers):
    seen = []

    class Look(ValidatedAudit):
        def on_validation_epoch_end(self):
            if not self.trainer.sanity_checking:
                seen.append((self.current_epoch, int(callback.examples_seen) % 256))

    callback = adaptive(max_batch_size=16)
    train = loader(256, 4, num_workers=workers)
    fit(callback, module=Look(256), train=train, val=loader(256, 64, shuffle=False), val_check_interval=interval)
    for epoch in range(3):
        marks = [examples or 256 for of, examples in seen if of == epoch]
        expected = [256 * interval * (i + 1) for i in range(round(1 / interval))]
        assert len(marks) == len(expected)
        assert all(abs(mark - at) < 16 for mark, at in zip(marks, expected, strict=True))
        assert marks[-1] == 256
