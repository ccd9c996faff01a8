"""The memory trial: a larger micro-batch is tried before it is adopted, and training does not notice."""

import gc
import random
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_graddiv import AdaptiveBatchSize
from lightning_graddiv.callbacks import trial
from lightning_graddiv.callbacks.micro_batch import MicroBatchSizes
from lightning_graddiv.callbacks.out_of_memory import is_out_of_memory
from lightning_graddiv.callbacks.trial import MicroBatchTrial, TrialResult, Verdict
from tests.audit import AuditModule, assert_each_example_once, loader, quiet_trainer, warned

EXAMPLES = 64
RAN: list[int] = []
"""The size of every batch that a step of at least four examples ran on, shadows' included, which copy all else."""


@pytest.fixture(autouse=True)
def _forget_what_ran():
    RAN.clear()


@pytest.fixture
def trials(monkeypatch):
    """What was tried, and how that ended."""
    seen: list[tuple[int, Verdict]] = []
    run = MicroBatchTrial.run

    def watched(self, examples, trained):
        result = run(self, examples, trained)
        seen.append((examples, result.verdict))
        return result

    monkeypatch.setattr(MicroBatchTrial, "run", watched)
    return seen


@contextmanager
def nothing_tried():
    """Let every size fit without a look."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MicroBatchTrial, "run", lambda *_: TrialResult(Verdict.FITS))
        yield


def holds(batch, most):
    """Stand in for a memory of so many examples."""
    if len(batch) >= 4:
        RAN.append(len(batch))
    if len(batch) > most:
        raise torch.OutOfMemoryError(f"out of memory with {len(batch)} examples")


def adaptive(**kwargs):
    defaults = {"every_n_steps": 1, "max_batch_size": 32, "cooldown": 0, "warm_in": 0, "policy": lambda *_: 1000.0}
    return AdaptiveBatchSize(**{**defaults, **kwargs})


class Narrow(AuditModule):
    """Has room for so many examples."""

    def __init__(self, most=8, examples=EXAMPLES):
        super().__init__(examples)
        self.most = most

    def training_step(self, batch, batch_idx):
        holds(batch[0], self.most)
        return super().training_step(batch, batch_idx)


def fit(module, callback, *, train=None, epochs=2, callbacks=(), ckpt_path=None, **kwargs):
    trainer = quiet_trainer(max_epochs=epochs, callbacks=[callback, *callbacks], **kwargs)
    trainer.fit(module, loader(EXAMPLES, 4) if train is None else train, ckpt_path=ckpt_path)
    return trainer


# Training is bit-identical.


class Noisy(LightningModule):
    """What a trial could disturb: dropout, batch normalisation, metrics, counters, three sources of random numbers."""

    def __init__(self, most=10**9):
        super().__init__()
        self.most = most
        self.first = nn.Linear(6, 8)
        self.net = nn.Sequential(nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(8, 3))
        self.accuracy = MulticlassAccuracy(3)
        self.seen = {"steps": 0}
        self.generator = torch.Generator().manual_seed(5)

    def hidden(self, x):
        return self.first(x)

    def training_step(self, batch, batch_idx):
        x, y = batch["x"], batch["y"]
        holds(x, self.most)
        x = x * (1 + 0.1 * random.random()) + 0.1 * np.random.rand() + 0.1 * torch.randn_like(x)
        x += torch.rand((), generator=self.generator).to(x.device)
        logits = self.net(self.hidden(x))
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.seen["steps"] += 1
        self.log("loss", loss, on_epoch=True)
        self.log("accuracy", self.accuracy, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


class RandomData(Dataset[Any]):
    """Augments each example by three sources of random numbers, and one of its own."""

    def __init__(self):
        self.x = torch.randn(EXAMPLES, 6, generator=torch.Generator().manual_seed(1))
        self.noise = np.random.default_rng(3)
        self.asked: list[int] = []

    def __len__(self):
        return EXAMPLES

    def __getitem__(self, i):
        self.asked.append(i)
        noise = random.random() + np.random.rand() + torch.rand(()) + self.noise.random()
        return {"x": self.x[i] + 0.01 * noise, "y": i % 3}


class Records(Callback):
    """All that training goes by, before each step and at the end of each batch."""

    def __init__(self):
        self.states = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.note(trainer, module, batch)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.note(trainer, module, outputs)

    def note(self, trainer, module, batch):
        gradients = [None if p.grad is None else p.grad.clone() for p in module.parameters()]
        metrics = {k: v.clone() for k, v in trainer.callback_metrics.items() if not k.startswith("graddiv")}
        generators = [random.getstate(), np.random.get_state(), torch.get_rng_state(), module.generator.get_state()]
        counts = [m._update_count for m in module.modules() if hasattr(m, "_update_count")]
        states = {k: torch.as_tensor(v).clone() for k, v in module.accuracy.metric_state.items()}
        optimizer = {i: dict(s) for i, s in enumerate(trainer.optimizers[0].state.values())}
        copied = torch.utils._pytree.tree_map(
            lambda v: v.clone() if isinstance(v, torch.Tensor) else v,
            [batch, module.state_dict(), module.seen["steps"], optimizer, states, counts, generators],
        )
        self.states.append([*copied, gradients, metrics])


def trained(callback, *, most=10**9, module=Noisy, workers=0, compiled=None, **kwargs):
    seed_everything(0, verbose=False)
    module, data, records = module(most), RandomData(), Records()
    whole = module if compiled is None else torch.compile(module, backend=compiled)
    train = DataLoader(data, 4, shuffle=True, num_workers=workers)
    fit(whole, callback, train=train, callbacks=[records], log_every_n_steps=1, **kwargs)
    return records.states, data.asked, [growth.to_batch_size for growth in callback.history]


def assert_same(ours, theirs):
    assert ours[1:] == theirs[1:]
    assert len(ours[0]) == len(theirs[0])
    for i, (a, b) in enumerate(zip(ours[0], theirs[0], strict=True)):
        flat_a, flat_b = torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b)
        assert len(flat_a) == len(flat_b), i
        for x, y in zip(flat_a, flat_b, strict=True):
            assert _is_same(x, y), (i, x, y)


def _is_same(x, y):
    if isinstance(x, torch.Tensor):
        return torch.equal(x, y)
    return np.array_equal(x, y) if isinstance(x, np.ndarray) else x == y


class Checkpointed(Noisy):
    """The first layer's activations are computed again in the backward pass."""

    use_reentrant = False

    def hidden(self, x):
        return checkpoint(self.first, x.requires_grad_(), use_reentrant=self.use_reentrant)


class Reentrant(Checkpointed):
    use_reentrant = True


class Consuming(Noisy):
    """Takes the batch apart, so that only the loader can make another one."""

    def training_step(self, batch, batch_idx):
        whole = dict(batch)
        del batch["y"]
        return super().training_step(whole, batch_idx)


class Hooked(Noisy):
    """Counts the gradients that reach a parameter."""

    def __init__(self, most=10**9):
        super().__init__(most)
        self.first.weight.register_hook(lambda gradient: self.seen.update(steps=self.seen["steps"] + 100))


KINDS = {"plain": Noisy, "checkpoint": Checkpointed, "re-entrant": Reentrant, "consuming": Consuming, "hooked": Hooked}


def untouched(trials, module=Noisy, **kwargs):
    """Train with trials of which all fit, and with some that fail, and each time without any."""
    kwargs = {"module": module, **kwargs}

    def grown(**given):
        return adaptive(engine="microbatch", **given)

    fitting = trained(grown(), **kwargs)
    assert {verdict for _, verdict in trials} == {Verdict.FITS}
    trials.clear()
    failing = trained(grown(), most=8, **kwargs)
    assert (16, Verdict.OUT_OF_MEMORY) in trials
    with nothing_tried():
        assert_same(fitting, trained(grown(), **kwargs))
        assert_same(failing, trained(grown(max_micro_batch_size=8), most=8, **kwargs))
    assert fitting[2] == failing[2] == [8, 16, 32]


class TestTrainingIsUntouched:
    @pytest.mark.parametrize("module", KINDS.values(), ids=KINDS)
    def test_bit_identical(self, trials, module):
        untouched(trials, module)

    def test_with_workers(self, trials):
        untouched(trials, workers=2, epochs=3)

    @pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
    def test_in_another_precision(self, trials, precision):
        class Cast(Noisy):
            def hidden(self, x):
                hidden = super().hidden(x.to(self.first.weight.dtype))
                assert hidden.dtype == torch.bfloat16  # in the trial as in training
                return hidden

        untouched(trials, Cast, precision=precision)

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_compiled(self, trials, backend):
        untouched(trials, compiled=backend, epochs=1)
        torch._dynamo.reset()

    def test_nothing_is_compiled_for_it(self, monkeypatch):
        compiled = []

        def backend(graph, inputs):
            compiled.append(len(inputs))
            return graph.forward

        doubled = torch.compile(lambda x: 2 * x, backend=backend, dynamic=False)

        class Partly(AuditModule):
            def training_step(self, batch, batch_idx):
                return super().training_step((doubled(batch[0]),), batch_idx)

        run = MicroBatchTrial.run

        def looked_at(*args):
            before = len(compiled)
            result = run(*args)
            assert len(compiled) == before > 0  # plain steps came before
            return result

        monkeypatch.setattr(MicroBatchTrial, "run", looked_at)
        fit(Partly(EXAMPLES), adaptive(engine="microbatch", every_n_steps=3), epochs=1)
        assert len(compiled) > 1
        torch._dynamo.reset()

    def test_loggers_hear_nothing(self):
        class Heard(DummyLogger):
            sizes: list[float] = []  # noqa: RUF012 - of all of them

            def log_metrics(self, metrics, step=None):
                self.sizes += [metrics["size"]] if "size" in metrics else []

        class Logs(AuditModule):
            def training_step(self, batch, batch_idx):
                self.logger.log_metrics({"size": len(batch[0])})
                return super().training_step(batch, batch_idx)

        module, logger = Logs(EXAMPLES), Heard()
        fit(module, adaptive(engine="microbatch"), logger=logger)
        assert Heard.sizes == module.micro_batches

    def test_gradients_of_a_window_that_is_under_way(self, trials):
        def accumulated(**given):
            return adaptive(engine="functional", max_micro_batch_size=8, max_examples=2, **given)

        class Plain(Noisy):
            def __init__(self, most):
                super().__init__(most)
                self.net = nn.Linear(8, 3)

        ours = trained(accumulated(), module=Plain, accumulate_grad_batches=2)
        assert trials
        with nothing_tried():
            assert_same(ours, trained(accumulated(), module=Plain, accumulate_grad_batches=2))

    def test_a_refused_step_has_written_nothing(self):
        class Writes(Noisy):
            def training_step(self, batch, batch_idx):
                with torch.no_grad():
                    self.first.weight.mul_(0.99)
                return super().training_step(batch, batch_idx)

        with warned("cannot be tried"):
            ours = trained(adaptive(engine="microbatch"), module=Writes)
        with nothing_tried():
            assert_same(ours, trained(adaptive(engine="microbatch", max_micro_batch_size=4), module=Writes))


# What a failure makes of the growth.


class TestAccumulationMakesUp:
    def test_every_example_is_in_one_step(self, trials):
        module, callback = Narrow(8), adaptive()
        fit(module, callback)
        assert trials == [(8, Verdict.FITS), (16, Verdict.OUT_OF_MEMORY)]  # which is not tried again
        assert max(module.micro_batches) == 8
        assert [growth.to_batch_size for growth in callback.history] == [8, 16, 32]
        for epoch in range(2):
            assert_each_example_once(module, epoch)

    def test_a_size_between_is_tried(self, trials):
        module = Narrow(8)
        fit(module, adaptive(growth_factor=4, max_batch_size=16))
        assert trials == [(16, Verdict.OUT_OF_MEMORY), (8, Verdict.FITS)]
        assert max(module.micro_batches) == 8
        assert_each_example_once(module, 1)

    def test_a_size_that_waits_for_the_next_epoch_is_tried_once(self, trials):
        class OwnWay(DataLoader):
            def __iter__(self):
                yield from super().__iter__()

        module = Narrow(8)
        fit(module, adaptive(), train=OwnWay(loader(EXAMPLES, 4).dataset, 4))
        assert trials == [(8, Verdict.FITS), (16, Verdict.OUT_OF_MEMORY)]
        assert [max(module.micro_batches[:16]), max(module.micro_batches[16:])] == [4, 8]

    def test_what_has_been_tried_is_what_a_real_step_runs_on(self):
        module = Narrow(8)
        fit(module, adaptive())
        assert RAN.count(16) == 1  # and training went on

    def test_the_cap_goes_into_the_checkpoint(self, trials, tmp_path):
        kept = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        first = adaptive(max_batch_size=16)
        fit(Narrow(8), first, callbacks=[kept], epochs=1, enable_checkpointing=True)
        path = str(tmp_path / "epoch=0.ckpt")
        state = torch.load(path, weights_only=True)["callbacks"]["AdaptiveBatchSize"]
        assert state["micro_batch_cap"] == first.state_dict()["micro_batch_cap"] == 15
        trials.clear()
        module, resumed = Narrow(8), adaptive(max_batch_size=64)
        fit(module, resumed, callbacks=[kept], epochs=3, ckpt_path=path, enable_checkpointing=True)
        assert trials == []
        assert resumed.batch_size == 64
        assert set(module.micro_batches) == {8}

    def test_the_cap_is_forgotten_with_the_training(self):
        callback = adaptive()
        fit(Narrow(8), callback)
        fit(Narrow(16), callback)
        assert callback.state_dict()["micro_batch_cap"] == 31

    def test_nothing_is_known_against_a_size_before(self):
        callback = adaptive()
        fit(Narrow(8), callback, epochs=1, limit_train_batches=1)
        assert callback.state_dict()["micro_batch_cap"] is None

    def test_not_more_than_the_user_allows_is_tried(self, trials):
        fit(Narrow(8), adaptive(max_micro_batch_size=8))
        assert trials == [(8, Verdict.FITS)]

    def test_a_loader_that_cannot_change_is_not_tried(self, trials):
        words = DataLoader(torch.eye(EXAMPLES).view(-1, 1, 4, EXAMPLES).unbind(), batch_size=None)
        with warned("gradient accumulation only"):
            fit(Narrow(4), adaptive(), train=words)
        assert trials == []


# Steps that cannot be tried, or fail for another reason than memory.


class FixedSize(AuditModule):
    """Has a batch size of four, and of no other, in it."""

    def training_step(self, batch, batch_idx):
        holds(batch[0], 10**9)
        return super().training_step((batch[0].view(4, EXAMPLES),), batch_idx)


class TestOtherFailures:
    def test_a_fixed_batch_size_is_kept(self, trials):
        module, callback = FixedSize(EXAMPLES), adaptive(engine="microbatch")
        with warned(r"fails, where it does not with 4 \(RuntimeError: shape .* `max_micro_batch_size=4`") as messages:
            fit(module, callback, epochs=3)
        assert len(messages) == 1
        assert trials == [(8, Verdict.FAILS)]
        assert set(module.micro_batches) == {4}
        assert callback.batch_size == 32
        assert callback.state_dict()["micro_batch_cap"] == 4

    def test_batches_that_cannot_be_repeated_are_drawn(self, trials):
        @dataclass
        class Ragged:
            values: torch.Tensor
            lengths: list[int]

        class Joined(Narrow):
            def training_step(self, batch, batch_idx):
                rows = batch.values[::2]
                assert rows.shape[0] == len(batch.lengths)
                return super().training_step((rows,), batch_idx)

            def on_train_batch_start(self, batch, batch_idx):
                self.micro_batches.append(len(batch.lengths))

            def on_after_batch_transfer(self, batch, dataloader_idx):
                batch.values = batch.values.reshape(-1, EXAMPLES)  # the trainer's hooks run on what is drawn
                return batch

        def collate(rows):  # two rows of each example
            return Ragged(torch.stack(rows).repeat_interleave(2, 0).flatten(), [2] * len(rows))

        module = Joined(8)
        train = DataLoader(torch.eye(EXAMPLES).unbind(), 4, shuffle=True, collate_fn=collate)
        fit(module, adaptive(engine="microbatch"), train=train)
        assert trials == [(8, Verdict.FITS), (16, Verdict.OUT_OF_MEMORY)]
        assert_each_example_once(module, 1)

    def test_a_stream_of_such_batches_cannot_be_tried(self, trials):
        class Stream(IterableDataset):
            def __iter__(self):
                return iter(torch.eye(EXAMPLES))

        class Turned(Narrow):
            def training_step(self, batch, batch_idx):
                return super().training_step((batch[0].T,), batch_idx)

            def on_train_batch_start(self, batch, batch_idx):
                self.micro_batches.append(batch[0].shape[1])

        def run(**kwargs):
            module, callback = Turned(16), adaptive(engine="microbatch", max_batch_size=16, **kwargs)
            columns = DataLoader(Stream(), 4, collate_fn=lambda rows: (torch.stack(rows, 1), torch.zeros(len(rows))))
            fit(module, callback, train=columns)
            return max(module.micro_batches), callback

        with warned(r"a micro-batch of 8 examples fits into memory cannot be tried \(The batch of 4 .*Set") as messages:
            kept, callback = run()
        assert len(messages) == 1
        assert kept == 4
        assert callback.batch_size == 16
        assert trials == [(8, Verdict.UNTRIED)]
        assert run(max_micro_batch_size=16)[0] == 16  # as the user says
        assert trials == [(8, Verdict.UNTRIED)] * 2

    def test_sharded_parameters_are_not_tried(self, monkeypatch):
        monkeypatch.setattr(trial, "is_sharded", lambda parameter: True)
        module = Narrow(8)
        with warned("sharded, so that a forward pass needs the other processes"):
            fit(module, adaptive())
        assert set(module.micro_batches) == {4}
        assert RAN.count(8) == 0

    def test_what_could_not_be_tried_is_taken_once_the_user_says_so(self):
        sizes = MicroBatchSizes(trusts=True)
        sizes.load(4, is_untried=True)
        assert sizes.cap is None
        sizes.load(4, is_untried=False)
        assert sizes.cap == 4

    def test_a_step_that_fails_on_every_copy_says_nothing_about_its_size(self, trials):
        class Uncopied(AuditModule):
            def training_step(self, batch, batch_idx):
                assert self.trainer.lightning_module is self
                return super().training_step(batch, batch_idx)

        with warned(r"cannot be tried \(AssertionError"):
            fit(Uncopied(EXAMPLES), adaptive(engine="microbatch"))
        assert trials == [(8, Verdict.UNTRIED)]

    def test_collectives_are_done_without(self):
        norm = nn.SyncBatchNorm(3)
        trial._act_alone(nn.Sequential(norm), world_size=2)
        x = torch.randn(5, 3)
        assert torch.equal(norm(x), nn.BatchNorm1d(3)(x))
        assert int(norm.num_batches_tracked) == 1

    def test_gathered_tensors_are_as_large(self):
        module = AuditModule(3)
        trial._act_alone(module, world_size=2)
        assert module.all_gather({"a": torch.ones(5, 3)})["a"].shape == (2, 5, 3)
        trial._act_alone(module, world_size=1)
        assert module.all_gather(torch.ones(5, 3)).shape == (5, 3)


# A real step that is out of memory.


class Explodes(AuditModule):
    """Is out of memory in every real step from one on, whatever was tried."""

    def __init__(self, step, error=torch.OutOfMemoryError):
        super().__init__(EXAMPLES)
        self.step, self.error = step, error

    def on_before_backward(self, loss):  # no part of a trial
        if self.global_step == self.step:
            raise self.error("out of memory")


class TestRealSteps:
    def message(self, module, callback, error=torch.OutOfMemoryError, **kwargs):
        with pytest.raises(error, match=r"^out of memory") as raised:
            fit(module, callback, **kwargs)
        return str(raised.value)

    def test_a_grown_micro_batch_names_the_last_that_trained(self):
        callback = adaptive(max_batch_size=16)
        said = self.message(Explodes(4), callback, epochs=4)
        assert callback.batch_size == 16
        assert "with a micro-batch of 16 examples, which has grown from 4" in said
        assert "`max_micro_batch_size=8`" in said

    def test_setting_it_goes_on_from_the_checkpoint(self, tmp_path):
        kept = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        callback = adaptive(max_batch_size=16)
        self.message(Explodes(10), callback, callbacks=[kept], epochs=4, enable_checkpointing=True)
        module = AuditModule(EXAMPLES)
        resumed = adaptive(max_batch_size=16, max_micro_batch_size=8)
        path = str(tmp_path / "epoch=0.ckpt")
        fit(module, resumed, callbacks=[kept], epochs=4, ckpt_path=path, enable_checkpointing=True)
        assert (set(module.micro_batches), resumed.batch_size) == ({8}, 16)

    def test_a_step_that_is_measured_says_so(self):
        said = self.message(Explodes(1), adaptive(engine="microbatch", every_n_steps=2))
        assert "this step was being measured (engine `microbatch`)" in said
        assert "max_micro_batch_size" not in said
        assert all(name in said for name in ("max_examples", "every_n_steps"))

    def test_else_the_message_is_left_alone(self):
        assert self.message(Explodes(1), adaptive(every_n_steps=50)) == "out of memory"
        kept = adaptive(max_micro_batch_size=4)
        assert self.message(Explodes(4), kept) == "out of memory"
        assert kept.batch_size == 32

    def test_other_errors_are_left_alone(self):
        assert self.message(Explodes(4, ValueError), adaptive(), ValueError, epochs=4) == "out of memory"

    def test_validation_is_left_alone(self):
        class Validates(Explodes):
            def validation_step(self, batch, batch_idx):
                raise torch.OutOfMemoryError("out of memory")

            def val_dataloader(self):
                return loader(EXAMPLES, 4, shuffle=False)

        said = self.message(Validates(-1), adaptive(), num_sanity_val_steps=0)
        assert said == "out of memory"

    @pytest.mark.parametrize(
        "error",
        [RuntimeError("CUDA error: out of memory"), RuntimeError("[..] DefaultCPUAllocator: can't allocate memory")],
    )
    def test_it_is_told_by_its_message_and_its_cause(self, error):
        outer = ValueError("cannot be copied")
        assert not is_out_of_memory(outer)
        outer.__cause__ = error
        assert is_out_of_memory(error)
        assert is_out_of_memory(outer)


class TestMemory:
    @pytest.mark.parametrize("most", [8, 16])
    def test_it_is_given_back(self, monkeypatch, most):
        """Also what an exception or a cycle would hold, without waiting for the garbage collector."""
        kept = []

        class Cyclic(Narrow):
            def training_step(self, batch, batch_idx):
                if len(batch[0]) == 16:
                    self.box = [self]
                    kept.append(weakref.ref(self))
                    batch[0].requires_grad_()
                return super().training_step(batch, batch_idx)

        run, frozen = MicroBatchTrial.run, gc.get_freeze_count()

        def looked_at(self, examples, trained):
            gc.disable()
            try:
                result = run(self, examples, trained)
                assert [ref() for ref in kept] == [None] * (examples == 16)
                assert gc.get_freeze_count() == frozen
            finally:
                gc.enable()
            return result

        monkeypatch.setattr(MicroBatchTrial, "run", looked_at)
        fit(Cyclic(most), adaptive(max_batch_size=16), epochs=1, limit_train_batches=3)
        assert kept

    def test_what_somebody_else_has_frozen_stays_so(self):
        gc.freeze()
        try:
            fit(Narrow(8), adaptive(max_batch_size=8), epochs=1)
            assert gc.get_freeze_count() > 0
        finally:
            gc.unfreeze()
