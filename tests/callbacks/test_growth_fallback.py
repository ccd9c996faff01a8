"""Where Lightning's loop state is not what it should be, the batch grows between epochs, and says so."""

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_graddiv import AdaptiveBatchSize
from lightning_graddiv.batching import loops
from lightning_graddiv.batching.sampler import AdaptiveBatchSampler
from tests.audit import AuditModule, assert_each_example_once, loader, quiet_trainer, warned

EXAMPLES = 64


def adaptive():
    return AdaptiveBatchSize(every_n_steps=1, max_batch_size=16, delta=1.0, cooldown=4)


@pytest.fixture(params=["_NEEDED_BEFORE", "_NEEDED_AFTER"])
def renamed(monkeypatch, request):
    """A private that the next Lightning has renamed: one looked for at once, or one looked for with the loaders."""
    monkeypatch.setattr(loops, request.param, (*getattr(loops, request.param), "fit_loop._was_renamed"))


class Loops(Callback):
    def on_train_batch_start(self, trainer, *_):
        self.sampler = trainer.train_dataloader.batch_sampler
        self.accumulate = trainer.accumulate_grad_batches


@pytest.mark.usefixtures("renamed")
@pytest.mark.parametrize("workers", [0, 2])
def test_grows_between_epochs_by_accumulation_and_says_so_once(workers):
    callback, look, module = adaptive(), Loops(), AuditModule(EXAMPLES)
    trainer = quiet_trainer(max_epochs=4, callbacks=[callback, look])
    with warned(r"between epochs only.*no `trainer\.fit_loop\._was_renamed`. Use a version of Lightning") as messages:
        trainer.fit(module, loader(EXAMPLES, 4, num_workers=workers))
    assert len(messages) == 1
    assert [[int((step > 0).sum()) for step in module.steps_of(epoch)] for epoch in range(4)] == [
        [4] * 16,
        [8] * 8,
        [16] * 4,
        [16] * 4,
    ]
    for epoch in range(4):
        assert_each_example_once(module, epoch)
    assert set(module.micro_batches) == {4}
    assert [(growth.epoch, growth.to_batch_size) for growth in callback.history] == [(1, 8), (2, 16)]
    assert type(look.accumulate) is int
    assert trainer.accumulate_grad_batches == 1


def test_it_touches_nothing_private(monkeypatch):
    monkeypatch.setattr(loops, "_NEEDED_BEFORE", ("fit_loop._was_renamed",))
    for name in ("refresh_lengths", "set_epoch_end", "restart_iterator", "running_pass", "set_validations"):
        monkeypatch.setattr(loops, name, None)
    callback, look = adaptive(), Loops()
    trainer = quiet_trainer(max_epochs=3, callbacks=[callback, look])
    with warned("between epochs only"):
        trainer.fit(AuditModule(EXAMPLES), loader(EXAMPLES, 4))
    assert callback.batch_size == 16
    assert not isinstance(look.sampler, AdaptiveBatchSampler)


@pytest.mark.usefixtures("renamed")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_it_resumes(tmp_path):
    def fit(**kwargs):
        checkpoint = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        callback, module = adaptive(), AuditModule(EXAMPLES)
        trainer = quiet_trainer(max_epochs=4, callbacks=[callback, checkpoint], enable_checkpointing=True)
        with warned("between epochs only"):
            trainer.fit(module, loader(EXAMPLES, 4), **kwargs)
        return callback, module

    fit()
    callback, module = fit(ckpt_path=str(tmp_path / "epoch=1.ckpt"))
    assert [len(module.steps_of(epoch)) for epoch in (2, 3)] == [4, 4]
    assert [(growth.epoch, growth.to_batch_size) for growth in callback.history] == [(1, 8), (2, 16)]


def test_a_step_that_draws_its_own_batches_is_such_a_case():
    class Draws(AuditModule):
        def training_step(self, dataloader_iter):
            (x,), _, _ = next(dataloader_iter)
            return (x @ self.w).mean()

        def on_train_batch_start(self, batch, batch_idx):
            pass

    trainer = quiet_trainer(max_epochs=1, callbacks=[adaptive()])
    with warned("between epochs only.*because `training_step` takes `dataloader_iter`"):
        trainer.fit(Draws(EXAMPLES), loader(EXAMPLES, 4))
    assert trainer.global_step == 16
