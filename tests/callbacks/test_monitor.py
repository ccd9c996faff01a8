"""GradientDiversityMonitor: measures what is there, says it everywhere, and leaves training as it was."""

import copy
import csv
import io
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset, WeightedRandomSampler
from torchmetrics.classification import MulticlassAccuracy

from lightning_graddiv import AdaptiveBatchSize, GradientDiversityMonitor, GradientMoments, estimate_diversity
from lightning_graddiv.callbacks.checks import require_one_optimizer
from lightning_graddiv.callbacks.tap import TrainingStepTap
from lightning_graddiv.per_example.ghost_engine import GhostEngine
from tests.audit import AuditModule, loader, quiet_trainer, warned


class Everything(LightningModule):
    """What can go wrong in one module: dropout, a shared submodule, metrics, growing lists, counters, an LSTM."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, batch_first=True)
        self.shared = nn.Linear(6, 6)
        self.again = self.shared
        self.net = nn.Sequential(self.shared, nn.ReLU(inplace=True), nn.Dropout(dropout), nn.Linear(6, 3))
        self.accuracy = MulticlassAccuracy(3)
        self.outputs: list[torch.Tensor] = []
        self.seen = {"batches": 0}
        self.register_buffer("count", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        x, y = batch["x"], batch["y"]
        logits = self.net(self.again(self.lstm(x)[0][:, -1]))
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.outputs.append(loss.detach())
        self.seen["batches"] += 1
        self.count = self.count + 1
        self.log("loss", loss)
        self.log("accuracy", self.accuracy, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


class DictData(torch.utils.data.Dataset):
    def __init__(self, examples=48):
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(examples, 5, 4, generator=generator)
        self.y = torch.randint(0, 3, (examples,), generator=generator)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"x": self.x[i], "y": self.y[i]}


def train(*callbacks, workers=0, module=None, epochs=2, **trainer_arguments):
    seed_everything(0, verbose=False)
    module = Everything() if module is None else module
    trainer = quiet_trainer(max_epochs=epochs, callbacks=list(callbacks), **trainer_arguments)
    trainer.fit(module, DataLoader(DictData(), 8, shuffle=True, num_workers=workers))
    return module, trainer


def assert_same_training(a, b):
    for (name, x), (_, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert torch.equal(x, y), name
    assert torch.equal(torch.stack(a.outputs), torch.stack(b.outputs))
    assert a.seen == b.seen


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            ({"every_n_steps": 0}, "every_n_steps"),
            ({"engine": "magic"}, "engine"),
            ({"max_examples": 1}, "max_examples"),
            ({"window": 1}, "window"),
            ({"confidence": 0.0}, "confidence"),
            ({"confidence": 1.0}, "confidence"),
            ({"log_prefix": ""}, "log_prefix"),
        ],
    )
    def test_out_of_range_is_refused_by_name(self, arguments, named):
        with pytest.raises(ValueError, match=f"Expected argument `{named}` to be"):
            GradientDiversityMonitor(**arguments)

    @pytest.mark.parametrize(
        "callback",
        [
            GradientDiversityMonitor(engine="loop"),
            GradientDiversityMonitor(engine="functional"),
            AdaptiveBatchSize(max_batch_size=8),
        ],
        ids=["loop", "functional", "growth"],
    )
    def test_manual_optimization_is_refused_where_it_cannot_be_measured_or_grown(self, callback):
        class Manual(AuditModule):
            def __init__(self):
                super().__init__(8)
                self.automatic_optimization = False

        with pytest.raises(MisconfigurationException, match="automatic optimization"):
            quiet_trainer(max_epochs=1, callbacks=[callback]).fit(Manual(), loader(8, 4))

    def test_a_strategy_that_shards_parameters_is_refused(self):
        class FSDPStrategy:
            pass

        monitor, trainer = GradientDiversityMonitor(), quiet_trainer()
        trainer._accelerator_connector.strategy = FSDPStrategy()
        with pytest.raises(MisconfigurationException, match=r"single device, DDP, and FSDP2.*FSDPStrategy"):
            monitor.setup(trainer, AuditModule(4), "fit")

    @pytest.mark.parametrize(
        ("name", "reason"), [("DeepSpeedStrategy", "fixes the accumulation"), ("XLAStrategy", "compiles it again")]
    )
    @pytest.mark.parametrize("make", [GradientDiversityMonitor, lambda: AdaptiveBatchSize(max_batch_size=8)])
    def test_strategies_that_step_by_themselves_are_refused_with_the_reason(self, name, reason, make):
        strategy = type(name, (DDPStrategy,), {})
        callback, trainer = make(), quiet_trainer(strategy="ddp", devices=1)
        trainer._accelerator_connector.strategy = strategy()
        with pytest.raises(MisconfigurationException, match=f"{name}.*{reason}"):
            callback.setup(trainer, AuditModule(4), "fit")

    def test_two_monitors_may_differ_in_their_state(self):
        assert GradientDiversityMonitor(5).state_key != GradientDiversityMonitor(10).state_key


class TestTrainingIsUntouched:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_an_idle_monitor_leaves_the_weights_bit_identical(self, workers):
        plain, _ = train(workers=workers)
        idle, _ = train(GradientDiversityMonitor(every_n_steps=10**9), workers=workers)
        assert_same_training(plain, idle)

    @pytest.mark.parametrize("engine", ["auto", "functional", "loop", "microbatch"])
    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_measuring_monitor_leaves_the_weights_bit_identical(self, engine, workers):
        plain, plain_trainer = train(workers=workers)
        monitor = GradientDiversityMonitor(every_n_steps=1, engine=engine)
        measured, trainer = train(monitor, workers=workers)
        assert monitor.measurements == (6 if engine == "microbatch" else 12)  # of two consecutive steps each
        assert_same_training(plain, measured)
        assert float(plain_trainer.callback_metrics["accuracy"]) == float(trainer.callback_metrics["accuracy"])

    def test_a_measurement_that_raises_leaves_them_bit_identical_too(self):
        class Fragile(Everything):
            """Runs on its whole batch only, and says so from the middle of the step."""

            def training_step(self, batch, batch_idx):
                loss = super().training_step(batch, batch_idx)
                if len(batch["x"]) < 8:
                    raise RuntimeError("eight at least")
                return loss

        plain, _ = train(module=seeded(Fragile))
        monitor = GradientDiversityMonitor(every_n_steps=1)
        with warned("eight at least"):
            measured, _ = train(monitor, module=seeded(Fragile))
        assert monitor._measurer.engine == "microbatch"
        assert_same_training(plain, measured)

    def test_the_parameters_stay_those_of_the_optimizer(self):
        module, trainer = train(GradientDiversityMonitor(every_n_steps=1))
        held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
        assert {id(p) for p in module.parameters()} == held
        assert module.shared is module.again

    def test_nothing_is_left_on_the_strategy_after_an_exception(self):
        class Stops(Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                raise KeyError("stop")

        monitor = GradientDiversityMonitor(every_n_steps=1)
        trainer = quiet_trainer(max_epochs=1, callbacks=[monitor, Stops()])
        with pytest.raises(KeyError, match="stop"):
            trainer.fit(AuditModule(8), loader(8, 4))
        assert "training_step" not in trainer.strategy.__dict__

    def test_logs_and_checkpoints_hold_no_tensor_that_escaped(self, tmp_path):
        monitor = GradientDiversityMonitor(every_n_steps=1)
        checkpoint = ModelCheckpoint(tmp_path, save_last=True)
        module, trainer = train(monitor, checkpoint, logger=CSVLogger(tmp_path), enable_checkpointing=True)
        for value in (*trainer.callback_metrics.values(), *trainer.logged_metrics.values(), *module.outputs):
            assert not torch._C._functorch.is_functorch_wrapped_tensor(torch.as_tensor(value))
        torch.load(tmp_path / "last.ckpt", weights_only=True)


def seeded(module_class):
    seed_everything(0, verbose=False)
    return module_class()


class TestWhatIsMeasured:
    def test_one_hot_examples_have_a_bound_of_their_number(self):
        monitor = GradientDiversityMonitor(every_n_steps=1)
        quiet_trainer(max_epochs=1, callbacks=[monitor]).fit(AuditModule(32), loader(32, 8))
        assert monitor.latest.bound == pytest.approx(32)
        assert monitor.latest.diversity == pytest.approx(1)
        assert (monitor.latest.num_probes, monitor.latest.num_examples) == (4, 32)

    def test_the_arguments_are_those_that_training_step_receives(self):
        class Later(Callback):
            """Rewrites the batch after our hook has seen it."""

            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                batch[0].copy_(torch.eye(8)[0].expand(4, 8))

        monitor = GradientDiversityMonitor(every_n_steps=1)
        quiet_trainer(max_epochs=4, callbacks=[monitor, Later()]).fit(AuditModule(8), loader(8, 4))
        assert monitor.latest.bound == pytest.approx(1)

    def test_the_weights_are_those_before_the_step(self):
        seen = []

        class Quadratic(LightningModule):
            """|grad|^2 = sum (w - x_i)^2: the second moment tells where w is."""

            def __init__(self):
                super().__init__()
                self.w = nn.Parameter(torch.zeros(3))

            def training_step(self, batch, batch_idx):
                return 0.5 * (self.w - batch[0]).square().sum(1).mean()

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), 0.5)

        class Reader(GradientDiversityMonitor):
            def on_estimate(self, trainer, pl_module, estimate):
                seen.append(self._window.probes[-1])

        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
        quiet_trainer(max_epochs=2, callbacks=[Reader(every_n_steps=1)]).fit(
            Quadratic(), DataLoader(TensorDataset(x), 4)
        )
        after_one = 0.5 * x.mean(0)
        for moments, w in zip(seen, [torch.zeros(3), after_one], strict=True):
            reference = GradientMoments.from_gradients((w - x).double())
            assert moments.sum_sq_norms == pytest.approx(reference.sum_sq_norms, rel=1e-5)
            assert moments.sq_norm_of_sum == pytest.approx(reference.sq_norm_of_sum, rel=1e-5)

    def test_only_due_steps_and_only_their_first_micro_batch(self):
        sizes = []

        class Reader(GradientDiversityMonitor):
            def on_estimate(self, trainer, pl_module, estimate):
                sizes.append((self.optimizer_steps, self._window.probes[-1].count))

        reader = Reader(every_n_steps=2)
        trainer = quiet_trainer(max_epochs=1, callbacks=[reader], accumulate_grad_batches=3)
        trainer.fit(AuditModule(48), loader(48, 4))
        assert trainer.global_step == reader.optimizer_steps == 4
        assert [count for _, count in sizes] == [4, 4]
        assert reader.examples_seen == 48

    def test_max_examples_limits_what_is_measured(self):
        monitor = GradientDiversityMonitor(every_n_steps=1, max_examples=3)
        quiet_trainer(max_epochs=1, callbacks=[monitor]).fit(AuditModule(32), loader(32, 8))
        assert monitor.latest.num_examples == 12

    def test_the_estimate_is_that_of_the_window(self):
        monitor = GradientDiversityMonitor(every_n_steps=1, window=5)
        train(monitor)
        assert len(monitor._window) == 5
        assert monitor.latest == estimate_diversity(monitor._window.probes, dataset_size=48)

    def test_the_window_restarts_when_the_learning_rate_halves(self):
        monitor = GradientDiversityMonitor(every_n_steps=1)
        module = AuditModule(32, learning_rate=0.1)  # halves after each epoch of four steps
        quiet_trainer(max_epochs=3, callbacks=[monitor]).fit(module, loader(32, 8))
        assert len(monitor._window) == 4

    @pytest.mark.parametrize(
        ("make", "size"),
        [
            (lambda data: DataLoader(data, 8, shuffle=True), 48),
            (lambda data: DataLoader(data, 8), 48),
            (lambda data: DataLoader(data, 8, sampler=RandomSampler(data, replacement=True)), None),
            (lambda data: DataLoader(data, 8, sampler=WeightedRandomSampler([1.0] * 48, 48)), None),
            (lambda data: DataLoader(data, batch_sampler=[list(range(8)), list(range(8, 16))]), None),
            (lambda data: DataLoader(Stream(data), 8), None),
        ],
        ids=["shuffled", "in order", "with replacement", "weighted", "own batch sampler", "stream"],
    )
    def test_n_is_the_number_of_distinct_examples_drawn_without_replacement(self, make, size):
        monitor = GradientDiversityMonitor(every_n_steps=1)
        quiet_trainer(max_epochs=1, callbacks=[monitor]).fit(Everything(), make(DictData()))
        assert monitor.latest.dataset_size == size
        assert (monitor.latest.diversity is None) == (size is None)

    def test_n_counts_only_what_a_limited_epoch_in_fixed_order_reaches(self):
        monitor = GradientDiversityMonitor(every_n_steps=1)
        trainer = quiet_trainer(max_epochs=1, callbacks=[monitor], limit_train_batches=2)
        trainer.fit(Everything(), DataLoader(DictData(), 8))
        assert monitor.latest.dataset_size == 16


class Stream(IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter([self.data[i] for i in range(len(self.data))])


class TestLogging:
    NAMES = (
        "batch_size_bound",
        "bound_lower",
        "bound_upper",
        "diversity",
        "noise_scale",
        "grad_sq_norm",
        "second_moment",
        "batch_size",
        "learning_rate",
        "sample_efficiency",
        "overhead",
    )

    def test_sparse_measurements_reach_the_logger_once_and_at_their_step(self, tmp_path):
        logger = CSVLogger(tmp_path)
        train(GradientDiversityMonitor(every_n_steps=5), logger=logger, log_every_n_steps=50)
        with open(f"{logger.log_dir}/metrics.csv") as file:
            rows = list(csv.DictReader(file))
        ours = [row for row in rows if row["graddiv/batch_size_bound"]]
        assert [int(row["step"]) for row in ours] == [4, 9]
        for row in ours:
            assert all(row[f"graddiv/{name}"] for name in self.NAMES)
            assert float(row["graddiv/batch_size"]) == 8
            assert float(row["graddiv/learning_rate"]) == pytest.approx(1e-2)
            efficiency = 1 / (1 + 7 / float(row["graddiv/batch_size_bound"]))
            assert float(row["graddiv/sample_efficiency"]) == pytest.approx(efficiency)

    def test_every_logger_is_told(self, tmp_path):
        loggers = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "tb")]
        train(GradientDiversityMonitor(every_n_steps=5), logger=loggers)
        with open(f"{loggers[0].log_dir}/metrics.csv") as file:
            assert "graddiv/bound_lower" in file.readline()
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(loggers[1].log_dir).Reload()
        assert [event.step for event in events.Scalars("graddiv/batch_size_bound")] == [4, 9]

    def test_the_progress_bar_shows_the_bound_and_only_that(self):
        shown = {}

        class Look(Callback):
            def on_train_end(self, trainer, pl_module):
                shown.update(trainer.progress_bar_metrics)

        _, trainer = train(GradientDiversityMonitor(every_n_steps=3), Look(), enable_progress_bar=True)
        assert [name for name in shown if name.startswith("graddiv/")] == ["graddiv/batch_size_bound"]
        assert f"graddiv/{self.NAMES[1]}" in trainer.callback_metrics

    def test_the_prefix_is_the_users(self):
        _, trainer = train(GradientDiversityMonitor(every_n_steps=3, log_prefix="noise"))
        assert "noise/batch_size_bound" in trainer.callback_metrics

    def test_barebones_logs_nothing_and_still_measures(self):
        monitor = GradientDiversityMonitor(every_n_steps=3)
        seed_everything(0, verbose=False)
        from lightning.pytorch import Trainer

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*barebones.*")
            Trainer(max_epochs=1, barebones=True, accelerator="cpu", callbacks=[monitor]).fit(
                Everything(), DataLoader(DictData(), 8)
            )
        assert monitor.measurements == 2

    def test_overhead_is_the_share_of_time_spent_measuring(self):
        _, often = train(GradientDiversityMonitor(every_n_steps=1, engine="loop"))
        overhead = float(often.callback_metrics["graddiv/overhead"])
        assert 0.5 < overhead < math.inf


class TestRefusals:
    """A number that cannot be trusted is dropped with one warning; training goes on."""

    def test_a_loss_that_mixes_examples(self):
        class Normalised(Everything):
            def __init__(self):
                super().__init__()
                self.net.insert(1, nn.BatchNorm1d(6))

        plain, _ = train(module=seeded(Normalised))
        monitor = GradientDiversityMonitor(every_n_steps=1)
        with warned("cannot be split into examples.*Falling back to the engine `microbatch`") as caught:
            measured, _ = train(monitor, module=seeded(Normalised))
        assert len(caught) == 1
        assert monitor.latest is not None
        assert_same_training(plain, measured)

    def test_a_loss_that_is_not_finite_once(self):
        class Once(AuditModule):
            def training_step(self, batch, batch_idx):
                loss = super().training_step(batch, batch_idx)
                return loss + float("nan") if batch_idx == 1 else loss

        monitor = GradientDiversityMonitor(every_n_steps=1)
        with warned("step 1: The loss .* is not finite"):
            quiet_trainer(max_epochs=1, callbacks=[monitor]).fit(Once(32), loader(32, 8))
        assert monitor.measurements == 3
        assert monitor.latest.bound == pytest.approx(32)

    def test_a_batch_of_one_example(self):
        monitor = GradientDiversityMonitor(every_n_steps=1)
        with warned("one example") as caught:
            quiet_trainer(max_epochs=1, callbacks=[monitor]).fit(AuditModule(4), loader(4, 1))
        assert len(caught) == 1
        assert monitor.measurements == 0

    def test_a_last_batch_of_one_example_is_passed_over_in_silence(self):
        monitor = GradientDiversityMonitor(every_n_steps=1)
        quiet_trainer(max_epochs=2, callbacks=[monitor]).fit(AuditModule(9), loader(9, 4))
        assert monitor.measurements == 4

    def test_gradients_that_are_all_zero(self):
        class Flat(AuditModule):
            def training_step(self, batch, batch_idx):
                return super().training_step(batch, batch_idx) * 0

        with warned("exactly zero"):
            quiet_trainer(max_epochs=1, callbacks=[GradientDiversityMonitor(1)]).fit(Flat(8), loader(8, 4))

    def test_rows_that_are_not_examples(self):
        def twice(examples):
            x = torch.stack([e[0] for e in examples])
            return (torch.cat([x, x]),)

        with warned(r"draws 4 examples.*\[8\] rows"):
            quiet_trainer(max_epochs=1, callbacks=[GradientDiversityMonitor(1)]).fit(
                AuditModule(8), loader(8, 4, collate_fn=twice)
            )

    def test_no_trainable_parameters(self):
        class Frozen(AuditModule):
            def training_step(self, batch, batch_idx):
                self.w.requires_grad_(False)
                return torch.zeros((), requires_grad=True) * 1

            def on_before_optimizer_step(self, optimizer):
                pass

        module = Frozen(8)
        module.w.requires_grad_(False)
        with warned("no trainable parameters"):
            quiet_trainer(max_epochs=1, callbacks=[GradientDiversityMonitor(1)]).fit(module, loader(8, 4))

    def test_an_error_inside_measuring_does_not_end_training(self, monkeypatch):
        monitor = GradientDiversityMonitor(every_n_steps=1)
        monkeypatch.setattr(GhostEngine, "check", lambda *_, **__: 1 / 0)
        with warned("ZeroDivisionError"):
            train(monitor)


class Copies(Callback):
    """Deep-copies and pickles a callback at every hook."""

    HOOKS = (
        "setup",
        "on_fit_start",
        "on_sanity_check_start",
        "on_train_start",
        "on_train_epoch_start",
        "on_train_batch_start",
        "on_before_zero_grad",
        "on_before_backward",
        "on_after_backward",
        "on_before_optimizer_step",
        "on_train_batch_end",
        "on_train_epoch_end",
        "on_validation_start",
        "on_train_end",
        "teardown",
    )

    def __init__(self, callback):
        self.callback = callback
        self.copies = 0

    def take(self, *_, **__):
        copied, pickled = copy.deepcopy(self.callback), pickle.loads(pickle.dumps(self.callback))
        assert copied.latest == pickled.latest == self.callback.latest
        self.copies += 1


for hook in Copies.HOOKS:
    setattr(Copies, hook, Copies.take)


def test_the_callback_can_be_copied_and_pickled_at_every_hook():
    monitor = GradientDiversityMonitor(every_n_steps=1)
    copies = Copies(monitor)
    train(monitor, copies)
    assert copies.copies > 60
    assert copy.deepcopy(monitor).latest == monitor.latest


def test_the_state_resumes_the_window_and_the_count():
    monitor = GradientDiversityMonitor(every_n_steps=2)
    train(monitor)
    buffer = io.BytesIO()
    torch.save(monitor.state_dict(), buffer)
    buffer.seek(0)
    resumed = GradientDiversityMonitor(every_n_steps=2)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert resumed._window.probes == monitor._window.probes
    assert resumed.optimizer_steps == monitor.optimizer_steps == 12
    assert resumed.examples_seen == 96


def test_a_second_training_starts_afresh():
    monitor = GradientDiversityMonitor(every_n_steps=1)
    train(monitor)
    train(monitor, epochs=1)
    assert monitor.optimizer_steps == 6


def test_a_batch_that_a_hook_ends_the_epoch_at_is_not_measured_twice():
    class Skips(AuditModule):
        def on_train_batch_start(self, batch, batch_idx):
            super().on_train_batch_start(batch, batch_idx)
            return -1 if batch_idx == 2 else None

    monitor = GradientDiversityMonitor(every_n_steps=1)
    quiet_trainer(max_epochs=3, callbacks=[monitor]).fit(Skips(32), loader(32, 8))
    assert monitor.measurements == 6


def test_what_is_due_on_a_leftover_is_measured_at_the_next_batch():
    monitor = GradientDiversityMonitor(every_n_steps=3)
    quiet_trainer(max_epochs=4, callbacks=[monitor]).fit(AuditModule(17), loader(17, 8))
    assert monitor.measurements == 3


def test_several_optimizers_are_refused_by_name():
    from types import SimpleNamespace

    module = SimpleNamespace()
    with pytest.raises(MisconfigurationException, match=r"Monitor needs one optimizer.*made 2"):
        require_one_optimizer(SimpleNamespace(optimizers=[1, 2]), module, "Monitor")


def test_a_tap_that_is_never_reached_is_taken_off():
    class Strategy:
        def training_step(self, x):
            return x

    strategy, seen = Strategy(), []
    tap = TrainingStepTap(strategy, seen.append)
    tap.remove()
    tap.remove()
    assert strategy.training_step(1) == 1
    assert seen == []
    TrainingStepTap(strategy, seen.append)
    assert [strategy.training_step(2), strategy.training_step(3)] == [2, 3]
    assert seen == [(2,)]
