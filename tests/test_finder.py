"""find_batch_size: what it finds is right, and nobody can tell that it has looked."""

import copy
import math
import random
import time
from dataclasses import replace

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

from lightning_graddiv import (
    AdaptiveBatchSize,
    BatchSizeBoundFinder,
    DiversityEstimate,
    Goodput,
    MeasurementError,
    NoiseScale,
    batch_size_bound,
    find_batch_size,
)
from lightning_graddiv.batching.plan import BatchPlan
from lightning_graddiv.finding import BatchSizeFinding
from lightning_graddiv.per_example import speed
from lightning_graddiv.theory import gain
from tests.audit import AuditModule, loader, quiet_trainer

EXAMPLES = 256
FEW = {"repeats": 1, "max_batch_size": 64}


class Classifier(L.LightningModule):
    """Dropout, a scheduler, an optimizer with state."""

    def __init__(self, *layers, learning_rate=0.01):
        super().__init__()
        seed_everything(1, verbose=False)
        self.net = nn.Sequential(nn.Linear(6, 16), *layers, nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))
        self.learning_rate = learning_rate

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), self.learning_rate)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def data(examples=EXAMPLES):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(examples, 6, generator=generator), torch.randint(3, (examples,), generator=generator)


class Augmented(Dataset):
    """Counts what is read, and jitters it with a generator of its own and with the global ones."""

    def __init__(self):
        self.x, self.y = data()
        self.noise = np.random.default_rng(0)
        self.reads = []

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        self.reads.append(index)
        jitter = self.noise.normal() + random.random() + np.random.random() + torch.rand(()).item()
        return self.x[index] + jitter, self.y[index]


def plain(batch_size=16, **kwargs):
    return DataLoader(TensorDataset(*data()), batch_size, **{"shuffle": True, **kwargs})


def jittered(**kwargs):
    return DataLoader(Augmented(), 16, **{"shuffle": True, **kwargs})


def with_own_generators():
    sampler = RandomSampler(range(EXAMPLES), generator=torch.Generator().manual_seed(5))
    return DataLoader(Augmented(), 16, sampler=sampler, generator=torch.Generator().manual_seed(6))


class Stream(IterableDataset):
    """Goes on where it was left, like a queue."""

    def __init__(self):
        self.x, self.y = data()
        self.position = 0

    def __iter__(self):
        for _ in range(128):
            self.position += 1
            yield self.x[self.position % EXAMPLES], self.y[self.position % EXAMPLES]


class Data(LightningDataModule):
    def __init__(self):
        super().__init__()
        self.setups = 0
        self.generator = torch.Generator().manual_seed(7)
        self.permute = lambda x: x  # cannot be pickled

    def setup(self, stage):
        self.setups += 1
        self.set = Augmented()

    def train_dataloader(self):
        return DataLoader(self.set, 16, shuffle=True, generator=self.generator)


SOURCES = {
    "plain": plain,
    "jittered": jittered,
    "workers": lambda: jittered(num_workers=2),
    "persistent workers": lambda: plain(num_workers=2, persistent_workers=True),
    "own generators": with_own_generators,
    "stream": lambda: DataLoader(Stream(), 16),
    "data module": Data,
}


class Weights(Callback):
    """Keeps what training has done."""

    def on_train_start(self, trainer, pl_module):
        self.losses, self.seen = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())
        self.seen.append(batch[0].double().sum().item())


def trained(source, find, *, before=0, **kwargs):
    """A training, its batches and losses, and all random states after it."""
    source, module, weights = source(), Classifier(), Weights()
    trainer = quiet_trainer(max_epochs=max(1, before), callbacks=[weights], **kwargs)
    seed_everything(3, verbose=False)
    if before:
        trainer.fit(module, source)
        trainer.fit_loop.max_epochs = before + 2
    if find:
        find(trainer, module, source)
    trainer.fit(module, source)
    states = random.random(), np.random.random(), torch.rand(()).item()
    optimizer = trainer.optimizers[0].state_dict()["state"]
    return {
        "weights": [p.detach().clone() for p in module.parameters()],
        "optimizer": [value for state in optimizer.values() for value in state.values()],
        "losses": weights.losses,
        "seen": weights.seen,
        "states": states,
        "steps": trainer.global_step,
        "epoch": trainer.current_epoch,
        "callbacks": len(trainer.callbacks),
    }


def assert_same(one, other):
    for name in ("losses", "seen", "states", "steps", "epoch", "callbacks"):
        assert one[name] == other[name], name
    for a, b in zip(one["weights"] + one["optimizer"], other["weights"] + other["optimizer"], strict=True):
        assert torch.equal(a, b)


def look(trainer, module, source):
    return find_batch_size(trainer, module, source, **FEW)


class TestNobodyCanTell:
    @pytest.mark.parametrize("source", SOURCES)
    def test_a_fit_after_it_is_that_without_it(self, source):
        assert_same(trained(SOURCES[source], look), trained(SOURCES[source], None))

    @pytest.mark.parametrize("source", ["jittered", "stream"])
    def test_a_fit_with_the_callback_is_that_without_it(self, source):
        def add(trainer, module, source):
            trainer.callbacks.insert(0, BatchSizeBoundFinder(**FEW))

        found, alone = trained(SOURCES[source], add), trained(SOURCES[source], None)
        assert found.pop("callbacks") == alone["callbacks"] + 1
        assert_same({**found, "callbacks": alone["callbacks"]}, alone)

    @pytest.mark.parametrize("what", ["module", "net", "in place"])
    def test_a_compiled_module_is_measured_as_a_plain_one_and_stays_compiled(self, what):
        class Silent(Classifier):  # the compiler does not understand `self.log`
            def training_step(self, batch, batch_idx):
                return F.cross_entropy(self.net(batch[0]), batch[1])

        def compiled():
            module = Silent()
            if what == "module":
                return module, torch.compile(module, backend="aot_eager")
            if what == "net":
                module.net = torch.compile(module.net, backend="aot_eager")
            else:
                module.compile(backend="aot_eager")
            return module, module

        def estimate(model):
            seed_everything(3, verbose=False)
            return find_batch_size(quiet_trainer(max_epochs=1), model, plain(), **FEW).estimate

        def weights_after_fit(module, model, *, looks):
            found = estimate(model) if looks else None
            seed_everything(3, verbose=False)
            quiet_trainer(max_epochs=1).fit(model, plain())
            return found, [p.detach().clone() for p in module.parameters()]

        found, weights = weights_after_fit(*compiled(), looks=True)
        assert found == estimate(Silent())
        _, wanted = weights_after_fit(*compiled(), looks=False)
        assert all(torch.equal(a, b) for a, b in zip(weights, wanted, strict=True))

    def test_a_fit_that_goes_on_does_so_after_it(self):
        assert_same(trained(jittered, look, before=1), trained(jittered, None, before=1))

    def test_one_that_has_been_fitted_to_its_end_can_be_looked_at(self):
        module = Classifier()
        trainer = quiet_trainer(max_epochs=1)
        trainer.fit(module, plain())
        assert find_batch_size(trainer, module, plain(), **FEW).estimate.num_probes == 16
        assert (trainer.max_epochs, trainer.current_epoch, trainer.global_step) == (1, 1, 16)

    @pytest.mark.filterwarnings("ignore:Found 1 module.* in eval mode")
    def test_the_module_keeps_its_weights_modes_and_statistics_and_gets_no_gradients(self):
        module = Classifier(nn.BatchNorm1d(16))
        module.net[-1].eval()
        before = copy.deepcopy(module.state_dict())
        find_batch_size(quiet_trainer(max_epochs=1), module, plain(), **FEW)
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
        assert all(p.grad is None for p in module.parameters())
        assert not module.net[-1].training
        assert module.net[0].training

    def test_callbacks_and_loggers_hear_nothing(self, tmp_path):
        class Deaf(Callback):
            def __getattribute__(self, name):
                if name.startswith(("on_", "setup", "teardown")):
                    raise AssertionError(name)
                return super().__getattribute__(name)

        callbacks = [Deaf(), ModelCheckpoint(tmp_path / "saved")]
        logger = CSVLogger(tmp_path, name="log")
        trainer = quiet_trainer(max_epochs=1, enable_checkpointing=True, logger=logger, log_every_n_steps=1)
        trainer.callbacks = callbacks
        find_batch_size(trainer, Classifier(), plain(), **FEW)
        assert trainer.callbacks == callbacks
        assert trainer.loggers == [logger]
        assert not list(tmp_path.iterdir())

    def test_after_an_error_too(self):
        module, trainer = Classifier(), quiet_trainer(max_epochs=1, callbacks=[Weights()])
        callbacks = trainer.callbacks
        module.training_step = lambda batch, batch_idx: 1 / 0
        state = torch.get_rng_state()
        with pytest.raises((MeasurementError, ZeroDivisionError)):
            find_batch_size(trainer, module, plain(), **FEW)
        assert trainer.callbacks is callbacks
        assert torch.equal(torch.get_rng_state(), state)

    def test_a_stream_that_would_be_used_up_is_refused(self):
        class Once(IterableDataset):
            def __init__(self):
                self.rows = iter(zip(*data(), strict=True))
                self.rows = (row for row in self.rows)

            def __iter__(self):
                return self.rows

        source = DataLoader(Once(), 16)
        with pytest.raises(MisconfigurationException, match="`Once` cannot be copied"):
            find_batch_size(quiet_trainer(max_epochs=1), Classifier(), source, **FEW)
        assert len(list(source)) == 16


class TestTheBound:
    @pytest.mark.filterwarnings("ignore:Found 6 module.* in eval mode")
    def test_is_that_of_plain_gradients_of_the_loaders_batches(self):
        module = Classifier().eval()
        x, y = data()
        rows = []
        for i in range(EXAMPLES):
            loss = F.cross_entropy(module.net(x[i : i + 1]), y[i : i + 1])
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))]))
        signal = second_moment = 0.0
        for batch in torch.stack(rows).double().split(16):
            squares = batch.square().sum()
            signal += float(batch.sum(0).square().sum() - squares)
            second_moment += float(15 * squares)
        found = find_batch_size(quiet_trainer(max_epochs=1), module, plain(shuffle=False), **FEW).estimate
        assert (found.num_probes, found.num_examples, found.dataset_size) == (16, 256, 256)
        assert 1 / found.bound == pytest.approx(1 / 256 + 255 / 256 * signal / second_moment, rel=1e-4)
        assert found.lower < float(batch_size_bound(torch.stack(rows))) < found.upper

    def test_few_batches_are_split_so_that_there_is_an_interval(self):
        found = find_batch_size(quiet_trainer(max_epochs=1), Classifier(), plain(batch_size=128), repeats=1)
        assert (found.estimate.num_probes, found.estimate.num_examples) == (16, 256)
        assert found.estimate.lower > 1

    def test_at_a_checkpoints_weights_and_then_back(self, tmp_path):
        module = Classifier()
        trainer = quiet_trainer(max_epochs=3)
        trainer.fit(module, plain())
        trainer.save_checkpoint(tmp_path / "saved.ckpt")
        there = find_batch_size(trainer, module, plain(shuffle=False), engine="functional", **FEW).estimate
        fresh = Classifier()
        before = copy.deepcopy(fresh.state_dict())
        again = quiet_trainer(max_epochs=3)
        run = {"engine": "functional", **FEW}
        found = find_batch_size(again, fresh, plain(shuffle=False), ckpt_path=str(tmp_path / "saved.ckpt"), **run)
        here = find_batch_size(again, fresh, plain(shuffle=False), **run)
        assert found.estimate.second_moment == pytest.approx(there.second_moment, rel=0.3)  # other dropout masks
        assert here.estimate.second_moment != pytest.approx(there.second_moment, rel=0.3)
        assert again.global_step == 0
        assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())

    def test_batch_normalisation_is_measured_between_groups(self):
        found = find_batch_size(quiet_trainer(max_epochs=1), Classifier(nn.BatchNorm1d(16)), plain(), **FEW)
        assert found.estimate.num_probes == 16

    def test_what_cannot_be_measured_is_refused(self):
        class Contrastive(Classifier):
            def training_step(self, batch, batch_idx):
                z = self.net(batch[0])
                return (z @ z.T).logsumexp(1).mean()

        with pytest.raises(MeasurementError, match="mixes the examples"):
            find_batch_size(quiet_trainer(max_epochs=1), Contrastive(), plain(), **FEW)

    def test_several_loaders_are_refused(self):
        class Both(Classifier):
            def training_step(self, batch, batch_idx):
                return super().training_step(batch["a"], batch_idx)

        with pytest.raises(MisconfigurationException, match="one training loader"):
            quiet_trainer(max_epochs=1, callbacks=[BatchSizeBoundFinder(**FEW)]).fit(
                Both(), {"a": plain(), "b": plain()}
            )


PLAN = BatchPlan(16)
SECONDS = {16: 0.016, 32: 0.020, 64: 0.030, 128: 0.090}


class TestTheRecommendation:
    def test_a_run_recommends_what_its_numbers_say(self):
        """Orthogonal gradients: B_S is 64 and known exactly."""
        module = AuditModule(64, learning_rate=0.1)
        found = find_batch_size(quiet_trainer(max_epochs=1), module, loader(64, 4), repeats=1, delta=0.5)
        assert (found.estimate.bound, found.estimate.lower) == (pytest.approx(64), pytest.approx(64))
        assert found.allowed == pytest.approx(33)
        assert found.recommended.batch_size == 32
        assert list(found.seconds) == [4, 8, 16, 32, 64]
        rate = {size: size / seconds for size, seconds in found.seconds.items() if 32 % size == 0}
        assert found.recommended.micro_batch_size == max(rate, key=rate.get)
        assert found.throughput[8] == pytest.approx(8 / found.seconds[8])
        assert found.learning_rate == 0.1
        assert found.learning_rate_factor == 32 / 4

    def test_the_rate_follows_the_rule_that_is_asked_for(self):
        module = AuditModule(64, learning_rate=0.1)
        arguments = {"repeats": 1, "delta": 0.5, "scale_lr": "gain"}
        found = find_batch_size(quiet_trainer(max_epochs=1), module, loader(64, 4), **arguments)
        assert found.learning_rate_factor == pytest.approx(gain(32, 64) / gain(4, 64))

    def test_and_gradients_that_are_alike_the_smallest(self):
        alike = DataLoader(TensorDataset(torch.ones(64, 64)), 4)
        found = find_batch_size(quiet_trainer(max_epochs=1), AuditModule(64), alike, repeats=1, delta=0.5)
        assert (found.allowed, found.recommended.batch_size) == (pytest.approx(1.5), 1)

    def test_a_present_batch_within_the_interval_stays(self):
        found = find_batch_size(quiet_trainer(max_epochs=1), Classifier(), plain(shuffle=False), delta=0.1, **FEW)
        assert 0.1 * found.estimate.lower + 1 < 8 < 16 < 0.1 * found.estimate.upper + 1  # the premise
        assert found.recommended.batch_size == 16

    def test_the_rule_and_the_learning_rates_are_the_users(self):
        module = AuditModule(64, learning_rate=0.1)
        run = {"repeats": 1, "growth_factor": 4, "scale_lr": "sqrt", "max_batch_size": 128}
        found = find_batch_size(quiet_trainer(max_epochs=1), module, loader(64, 4), policy=NoiseScale(), **run)
        assert (found.allowed, found.recommended.batch_size) == (math.inf, 16)
        assert found.learning_rate_factor == 2

    def test_accumulation_is_part_of_the_present_batch(self):
        trainer = quiet_trainer(max_epochs=1, accumulate_grad_batches=2)
        run = {"repeats": 1, "max_micro_batch_size": 8, "delta": 0.5}
        found = find_batch_size(trainer, AuditModule(64), loader(64, 4), **run)
        assert found.present == BatchPlan(4, 2)
        assert list(found.seconds) == [4, 8]
        assert found.recommended.batch_size == 32
        assert found.recommended.micro_batch_size in (4, 8)

    def test_a_loader_that_keeps_its_batches_gets_accumulation(self):
        class Batches:
            def __iter__(self):
                return iter([(part,) for part in torch.eye(64).split(4)])

        found = find_batch_size(quiet_trainer(max_epochs=1), AuditModule(64), Batches(), repeats=1)
        assert list(found.seconds) == [4]
        assert found.recommended.micro_batch_size == 4
        assert found.recommended.accumulate > 1

    def test_a_start_above_the_limit_is_refused(self):
        with pytest.raises(MisconfigurationException, match=r"`max_batch_size` to be at least.*16.*but got 8"):
            find_batch_size(quiet_trainer(max_epochs=1), AuditModule(64), loader(64, 16), max_batch_size=8)


class Slow(AuditModule):
    """Takes a while for each pass, or each example, and has no memory for more than some."""

    def __init__(self, *, per_pass=0.0, per_example=0.0, room=math.inf):
        super().__init__(64)
        self.per_pass, self.per_example, self.room = per_pass, per_example, room

    def training_step(self, batch, batch_idx):
        examples = len(batch[0])
        if examples > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        time.sleep(self.per_pass + self.per_example * examples)
        return super().training_step(batch, batch_idx)


class TestTheThroughput:
    def test_seconds_are_those_of_a_pass(self):
        slow = Slow(per_pass=0.01, per_example=0.001)
        found = find_batch_size(quiet_trainer(max_epochs=1), slow, loader(64, 4), max_batch_size=32)
        for size, seconds in found.seconds.items():
            assert 0.01 + 0.001 * size <= seconds < 4 * (0.01 + 0.001 * size)  # machines are busy
        assert found.recommended == BatchPlan(32)

    def test_goodput_follows_from_them(self, monkeypatch):
        """N is 38: 4 ms a pass and 0.03 ms an example pay for up to 71 examples, 20 ms an example for up to 2.8."""
        source = DataLoader(TensorDataset(torch.eye(64) + 0.01), 4, shuffle=True)

        def recommended(per_pass, per_example):
            monkeypatch.setattr(speed, "_seconds", lambda run, batch, loss: per_pass + per_example * len(batch[0]))
            run = {"policy": Goodput(), "max_batch_size": 128, "repeats": 1}
            return find_batch_size(quiet_trainer(max_epochs=1), AuditModule(64), source, **run).recommended.batch_size

        assert recommended(0.004, 0.00003) == 64
        assert recommended(0.004, 0.02) == 2

    def test_out_of_memory_ends_the_search(self):
        tried = []

        class Full(Slow):
            def training_step(self, batch, batch_idx):
                tried.append(len(batch[0]))
                return super().training_step(batch, batch_idx)

        found = find_batch_size(quiet_trainer(max_epochs=1), Full(room=16), loader(64, 4), repeats=1, delta=0.5)
        assert list(found.seconds) == [4, 8, 16]
        assert (found.out_of_memory_at, max(tried)) == (32, 32)
        assert found.recommended.batch_size == 32
        assert found.recommended.micro_batch_size <= 16
        assert "32  out of memory" in str(found)

    def test_other_errors_do_not(self):
        class Broken(Slow):
            def training_step(self, batch, batch_idx):
                if len(batch[0]) > self.room:
                    raise RuntimeError("a bug of the user's")
                return super().training_step(batch, batch_idx)

        with pytest.raises(RuntimeError, match="a bug of the user's"):
            find_batch_size(quiet_trainer(max_epochs=1), Broken(room=8), loader(64, 4), repeats=1)

    def test_the_first_pass_does_not_count_and_the_middle_one_does(self, monkeypatch):
        ticks = iter([9.0, 3.0, 1.0, 2.0])
        monkeypatch.setattr(speed, "_seconds", lambda *_: next(ticks))
        module = Classifier()
        loss = speed.StepLoss(module)
        assert speed.seconds_of_a_step(loss, data(16), 16, 32, repeats=3) == 2.0

    def test_a_pass_runs_on_so_many_examples_in_the_trainers_precision(self):
        seen = []

        class Seen(Classifier):
            def training_step(self, batch, batch_idx):
                loss = super().training_step(batch, batch_idx)
                seen.append((len(batch[0]), self.net[0](batch[0]).dtype))
                return loss

        trainer = quiet_trainer(max_epochs=1, precision="bf16-mixed")
        find_batch_size(trainer, Seen(), plain(), **FEW)
        assert {size for size, dtype in seen if dtype == torch.bfloat16} == {16, 32, 64}
        assert {size for size, dtype in seen if dtype == torch.float32} <= set(range(1, 17))


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            ({"probes": 1}, "probes"),
            ({"engine": "magic"}, "engine"),
            ({"confidence": 1.0}, "confidence"),
            ({"delta": 0.0}, "delta"),
            ({"max_batch_size": 0}, "max_batch_size"),
            ({"max_micro_batch_size": 0}, "max_micro_batch_size"),
            ({"growth_factor": 1}, "growth_factor"),
            ({"scale_lr": "cubic"}, "scale_lr"),
            ({"repeats": 0}, "repeats"),
        ],
    )
    def test_out_of_range_is_refused_by_name(self, arguments, named):
        with pytest.raises(ValueError, match=f"Expected argument `{named}` to be"):
            find_batch_size(quiet_trainer(), Classifier(), plain(), **arguments)


class TestAsACallback:
    def test_it_finds_prints_and_training_goes_on_beside_growth(self, capsys):
        finder = BatchSizeBoundFinder(repeats=1, max_batch_size=32)
        growing = AdaptiveBatchSize(every_n_steps=1, max_batch_size=16, cooldown=0, warm_in=0)
        trainer = quiet_trainer(max_epochs=2, callbacks=[growing, finder])
        trainer.fit(AuditModule(64), loader(64, 4))
        assert finder.finding.recommended.batch_size == 32
        assert str(finder.finding) in capsys.readouterr().out
        assert growing.batch_size == 16


ESTIMATE = DiversityEstimate(
    bound=280.0,
    lower=200.4,
    upper=math.inf,
    rho=1 / 280,
    noise_scale=279.0,
    second_moment=1.0,
    signal=1 / 280,
    num_probes=16,
    num_examples=1024.0,
    dataset_size=None,
)
FINDING = BatchSizeFinding(
    estimate=ESTIMATE,
    confidence=0.9,
    present=BatchPlan(16, 1, 2),
    recommended=BatchPlan(64, 1, 2),
    allowed=140.2,
    learning_rate=0.1,
    learning_rate_factor=3.12,
    seconds=SECONDS,
    out_of_memory_at=256,
)


class TestWhatIsShown:
    def test_the_table_has_all_numbers(self):
        lines = str(FINDING).splitlines()
        assert lines[0] == "B_S(w)         280  (90% interval 200 to inf, 16 probes, 1,024 examples)"
        assert lines[1].endswith("32 = micro-batch 16 x accumulation 1 x processes 2")
        assert lines[3].endswith("128 = micro-batch 64 x accumulation 1 x processes 2")
        assert lines[4].endswith("0.1 x 3.12 = 0.312")
        assert lines[7].split() == ["16", "16", "2,000", "0.900"]  # 1 / (1 + 31 / 280)
        assert lines[9].split()[:4] == ["64", "30", "4,267", "0.688"]
        assert [line for line in lines if "recommended" in line][1:] == [lines[9]]
        assert lines[-1].split() == ["256", "out", "of", "memory"]

    def test_the_picture_has_both_curves(self):
        pytest.importorskip("matplotlib").use("Agg")
        from matplotlib.figure import Figure

        figure = Figure()
        ax = FINDING.plot(ax=figure.subplots())
        throughput, recommended = ax.get_lines()
        assert list(throughput.get_xdata()) == [32, 64, 128, 256]
        assert list(throughput.get_ydata()) == pytest.approx([2000, 3200, 128 / 0.03, 256 / 0.09])
        assert list(recommended.get_xdata()) == [128, 128]
        right = next(other for other in figure.axes if other is not ax)
        (efficiency,) = right.get_lines()
        at = dict(zip(efficiency.get_xdata(), efficiency.get_ydata(), strict=True))
        assert min(at) == 32
        assert max(at) == pytest.approx(256)
        assert at[32] == pytest.approx(1 / (1 + 31 / 280))
        (band,) = [path.vertices for path in right.collections[0].get_paths()]
        edges = sorted({y for x, y in band if x == 32})
        assert edges == pytest.approx([1 / (1 + 31 / 200.4), 1.0])
        assert [text.get_text() for text in ax.get_legend().get_texts()] == [
            "throughput",
            "recommended: 128",
            "sample efficiency",
        ]

    def test_a_single_size_is_drawn_too(self):
        pytest.importorskip("matplotlib").use("Agg")
        from matplotlib.figure import Figure

        one = replace(FINDING, present=PLAN, recommended=PLAN, seconds={16: 0.016})
        assert list(one.plot(ax=Figure().subplots()).get_lines()[0].get_xdata()) == [16]
