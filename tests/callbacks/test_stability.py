"""DifferentialDiversityMonitor against plain autograd at two weight vectors, and as a second cap on growth."""

import copy
import csv
import dataclasses
import io
import math
import pickle

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_graddiv import (
    AdaptiveBatchSize,
    DifferentialDiversityMonitor,
    DifferentialMoments,
    GradientMoments,
    LearningRateCap,
    estimate_stability,
    theory,
)
from tests.audit import quiet_trainer, warned


class Net(LightningModule):
    """Remembers the weights before every step, and its batches."""

    def __init__(self, learning_rate: float = 0.05, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 1)).double()
        self.learning_rate = learning_rate
        self.weights: list[dict] = []
        self.batches: list[tuple] = []

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.weights.append({n: p.detach().cpu().clone() for n, p in self.named_parameters()})
            self.batches.append([part.cpu() for part in batch])

    def training_step(self, batch, batch_idx):
        x, y = batch
        return (self.net(x)[:, 0] - y).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.learning_rate, momentum=0.5)


def data(examples: int = 64, batch_size: int = 8) -> DataLoader:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(examples, 4, dtype=torch.float64, generator=generator)
    y = x.sum(1).sin() + 0.3 * torch.randn(examples, dtype=torch.float64, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size)


def fit(module, *callbacks, batches=None, **kwargs):
    trainer = quiet_trainer(callbacks=list(callbacks), log_every_n_steps=1, **{"max_epochs": 1, **kwargs})
    trainer.fit(module, batches or data())
    return trainer


def gradients(weights: dict, batch) -> torch.Tensor:
    """One example and one backward pass at a time."""
    clone, rows = Net(), []
    clone.load_state_dict(weights)
    for x, y in zip(*batch, strict=True):
        clone.zero_grad()
        (clone.net(x[None])[:, 0] - y).square().mean().backward()
        rows.append(torch.cat([p.grad.flatten() for p in clone.parameters()]))
    return torch.stack(rows)


def expected_probe(here: dict, there: dict, batch) -> DifferentialMoments:
    step = torch.cat([(here[name] - there[name]).flatten() for name in here])
    differences = gradients(here, batch) - gradients(there, batch)
    distance = float(step.norm())
    moments = GradientMoments.from_gradients(differences / distance)
    return DifferentialMoments(moments, float((differences @ step).sum()) / distance**2, distance)


def assert_same_probe(found: DifferentialMoments, expected: DifferentialMoments) -> None:
    for a, b in ((found.moments, expected.moments), (found, expected)):
        for name in [f.name for f in dataclasses.fields(a) if isinstance(getattr(a, f.name), float)]:
            assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-9), name


class TestWhatIsMeasured:
    def test_against_a_snapshot(self):
        module, monitor = Net(), DifferentialDiversityMonitor(every_n_steps=2)
        fit(module, monitor)
        assert len(monitor._probes) == 3
        for probe, step in zip(monitor._probes, (2, 4, 6), strict=True):
            batch = module.batches[step]
            assert_same_probe(probe, expected_probe(module.weights[step], module.weights[step - 2], batch))

    def test_that_is_younger_than_the_interval(self):
        module, monitor = Net(), DifferentialDiversityMonitor(every_n_steps=3, lag=1)
        fit(module, monitor)
        for probe, step in zip(monitor._probes, (3, 6), strict=True):
            assert_same_probe(
                probe, expected_probe(module.weights[step], module.weights[step - 1], module.batches[step])
            )

    def test_under_accumulation_steps_are_optimizer_steps(self):
        module, monitor = Net(), DifferentialDiversityMonitor(every_n_steps=1)
        fit(module, monitor, accumulate_grad_batches=2)
        assert len(monitor._probes) == 3
        for probe, step in zip(monitor._probes, (1, 2, 3), strict=True):
            assert_same_probe(
                probe, expected_probe(module.weights[step], module.weights[step - 1], module.batches[step])
            )

    def test_against_a_moving_average(self):
        module, monitor = Net(), DifferentialDiversityMonitor(every_n_steps=2, reference="ema", decay=0.8)
        fit(module, monitor)
        average, averages = module.weights[0], []
        for weights in module.weights:
            averages.append(average)  # measured before the present weights enter
            average = {name: 0.8 * average[name] + 0.2 * value for name, value in weights.items()}
        for probe, step in zip(monitor._probes, (2, 4, 6), strict=True):
            assert_same_probe(probe, expected_probe(module.weights[step], averages[step], module.batches[step]))

    @pytest.mark.parametrize("as_function", [False, True])
    def test_against_a_second_run(self, as_function):
        second = Net()
        with torch.no_grad():
            for parameter in second.parameters():
                parameter.add_(0.1)
        there = {n: p.detach() for n, p in second.named_parameters()}
        reference = (lambda: second.state_dict()) if as_function else second.state_dict()
        module, monitor = Net(), DifferentialDiversityMonitor(every_n_steps=3, reference=reference)
        fit(module, monitor)
        assert_same_probe(monitor._probes[0], expected_probe(module.weights[3], there, module.batches[3]))

    def test_what_does_not_run_under_torch_func_is_looped_over(self):
        class Branches(Net):
            def training_step(self, batch, batch_idx):
                loss = super().training_step(batch, batch_idx)
                return loss if loss.item() >= 0 else -loss

        plain, looped = (DifferentialDiversityMonitor(every_n_steps=3) for _ in range(2))
        fit(Net(), plain)
        with warned("DifferentialDiversityMonitor: `Branches`: it does not run under torch.func"):
            fit(Branches(), looped)
        for a, b in zip(plain._probes, looped._probes, strict=True):
            assert_same_probe(a, b)

    def test_at_most_so_many_examples(self):
        monitor = DifferentialDiversityMonitor(every_n_steps=3, max_examples=5)
        fit(Net(), monitor)
        assert [probe.moments.count for probe in monitor._probes] == [5, 5]

    def test_dropout_masks_are_the_same_at_both(self):
        """With other masks the differences would not shrink with the distance."""
        monitor = DifferentialDiversityMonitor(every_n_steps=1, lag=1)
        fit(Net(1e-6, dropout=0.5), monitor)
        assert max(math.sqrt(p.moments.sum_sq_norms / p.moments.count) for p in monitor._probes) < 1e3

    def test_all_examples_give_the_exact_bound_and_cap(self):
        module, monitor = Net(), DifferentialDiversityMonitor(every_n_steps=1, max_examples=None)
        fit(module, monitor, batches=data(24, 24), max_epochs=3)
        monitor._probes = type(monitor._probes)(list(monitor._probes)[-1:])
        estimate = monitor._estimate()
        here, there, batch = module.weights[2], module.weights[1], module.batches[2]
        bound = theory.differential_batch_size_bound(gradients(here, batch), gradients(there, batch))
        assert estimate.diversity.bound == pytest.approx(float(bound), rel=1e-9)
        differences = gradients(here, batch) - gradients(there, batch)
        step = torch.cat([(here[name] - there[name]).flatten() for name in here])
        gram = differences @ differences.T
        pairs = float(gram.sum() - gram.trace()) / (24 * 23)
        exact = theory.stability_learning_rate_cap(
            6,
            inner_product=float(step @ differences.mean(0)),
            second_moment=float(gram.trace()) / 24,
            sq_norm=pairs,
        )
        assert estimate.learning_rate_cap(6).cap == pytest.approx(exact, rel=1e-9)

    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    def test_training_is_bit_identical_with_it_and_without(self, dropout):
        ends = []
        for callbacks in ([], [DifferentialDiversityMonitor(every_n_steps=2)]):
            seed_everything(0, verbose=False)
            module = Net(dropout=dropout)
            fit(module, *callbacks, max_epochs=2)
            ends.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
        assert torch.equal(*ends)


def drawn(k: int, size: int, d: int, bound: float, curvature: float, rng) -> list[DifferentialMoments]:
    """Probes of Dg_i = curvature * (Dw + noise): B_S(w, w') = bound, |Dw| = 1."""
    probes = []
    for _ in range(k):
        noise = rng.standard_normal((size, d)) * math.sqrt((bound - 1) / d)
        noise[:, 0] += 1
        differences = torch.from_numpy(curvature * noise)
        probes.append(
            DifferentialMoments(GradientMoments.from_gradients(differences), float(differences[:, 0].sum()), 1.0)
        )
    return probes


class TestEstimate:
    @pytest.mark.parametrize("batch_size", [1, 16, 256])
    def test_the_cap_is_not_biased_by_few_examples(self, batch_size):
        # E cap = 2 / curvature * B / (B_S + B - 1); with the plug-in |mean|^2 it would be 2-4 times too low here.
        probes = drawn(400, 16, 200, 50.0, 3.0, np.random.default_rng(0))
        found = estimate_stability(probes).learning_rate_cap(batch_size)
        expected = 2 / 3 * batch_size / (50 + batch_size - 1)
        assert found.cap == pytest.approx(expected, rel=0.05)
        assert found.lower < expected < found.upper

    def test_nine_intervals_in_ten_cover(self):
        rng, hits, expected = np.random.default_rng(1), 0, 2 / 3 * 64 / (20 + 63)
        for _ in range(400):
            cap = estimate_stability(drawn(8, 8, 30, 20.0, 3.0, rng)).learning_rate_cap(64)
            hits += cap.lower <= expected <= cap.upper
        assert hits / 400 == pytest.approx(0.9, abs=0.05)

    def test_probes_at_different_distances_pool_alike(self):
        rng = np.random.default_rng(0)
        probes = drawn(8, 16, 50, 10.0, 2.0, rng)
        far = [dataclasses.replace(p, distance=100.0) for p in probes]
        assert estimate_stability(probes).learning_rate_cap(8) == estimate_stability(far).learning_rate_cap(8)

    def test_three_probes_prove_nothing(self):
        cap = estimate_stability(drawn(3, 8, 30, 20.0, 3.0, np.random.default_rng(0))).learning_rate_cap(8)
        assert (cap.lower, cap.upper) == (0.0, math.inf)

    def test_where_the_loss_bends_down_there_is_no_cap(self):
        probes = drawn(8, 8, 30, 2.0, -3.0, np.random.default_rng(0))
        negative = [dataclasses.replace(p, alignment=-abs(p.alignment)) for p in probes]
        assert estimate_stability(negative).learning_rate_cap(8) == LearningRateCap(math.inf, math.inf, math.inf)
        assert estimate_stability(negative).curvature < 0


class TestItsPlaceInARun:
    def test_what_is_logged(self, tmp_path):
        monitor = DifferentialDiversityMonitor(every_n_steps=1)
        trainer = fit(Net(), monitor, logger=CSVLogger(tmp_path, name="", version=""), accumulate_grad_batches=2)
        with (tmp_path / "metrics.csv").open() as file:
            row = [r for r in csv.DictReader(file) if r.get("stability/learning_rate_cap")][-1]
        cap = monitor.latest.learning_rate_cap(16)
        assert float(row["stability/learning_rate_cap"]) == pytest.approx(cap.cap)
        assert float(row["stability/cap_lower"]) == pytest.approx(cap.lower)
        assert float(row["stability/batch_size_bound"]) == pytest.approx(monitor.latest.diversity.bound)
        assert float(row["stability/learning_rate"]) == 0.05
        assert float(row["stability/curvature"]) == pytest.approx(monitor.latest.curvature)
        assert trainer.callback_metrics["stability/distance"] > 0

    @pytest.mark.parametrize("reference", ["snapshot", "ema"])
    def test_a_resumed_run_measures_the_same(self, reference, tmp_path):
        def monitor():
            return DifferentialDiversityMonitor(every_n_steps=3, reference=reference, decay=0.8)

        whole = monitor()
        fit(Net(), whole, max_epochs=3)
        trainer = fit(Net(), monitor())
        trainer.save_checkpoint(tmp_path / "one.ckpt")
        torch.load(tmp_path / "one.ckpt", weights_only=True)
        resumed = monitor()
        later = quiet_trainer(callbacks=[resumed], max_epochs=3, log_every_n_steps=1)
        later.fit(Net(), data(), ckpt_path=tmp_path / "one.ckpt")
        assert list(whole._probes) == list(resumed._probes)
        assert len(whole._probes) == 7

    def test_a_second_fit_begins_anew(self):
        monitor, probes = DifferentialDiversityMonitor(every_n_steps=3), []
        for _ in range(2):
            fit(Net(), monitor)
            probes.append(list(monitor._probes))
        assert probes[0] == probes[1]

    def test_it_can_be_copied_and_pickled(self):
        monitor = DifferentialDiversityMonitor(every_n_steps=3)
        fit(Net(), monitor)
        assert pickle.loads(pickle.dumps(copy.deepcopy(monitor))).latest == monitor.latest

    def test_weights_that_stand_still_are_said_and_training_goes_on(self):
        monitor = DifferentialDiversityMonitor(every_n_steps=2)
        with warned("The weights and the reference are the same"):
            trainer = fit(Net(0.0), monitor)
        assert trainer.global_step == 8
        assert monitor.latest is None

    def test_batch_normalisation_is_said_and_given_up(self):
        class Normalised(Net):
            def __init__(self):
                super().__init__()
                self.net.insert(1, nn.BatchNorm1d(6, dtype=torch.float64))

        monitor = DifferentialDiversityMonitor(every_n_steps=1)
        with warned("Measuring is now off for this fit") as said:
            fit(Normalised(), monitor)
        assert len(said) == 2
        assert monitor.measurements == 0

    def test_a_second_run_without_a_parameter_is_refused_by_name(self):
        state = Net().state_dict()
        del state["net.0.bias"]
        with pytest.raises(MisconfigurationException, match=r"to hold `net.0.bias` of shape \(6,\), but it is missing"):
            fit(Net(), DifferentialDiversityMonitor(reference=state))

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            ({"every_n_steps": 0}, "every_n_steps"),
            ({"reference": "start"}, "reference"),
            ({"every_n_steps": 5, "lag": 6}, "lag"),
            ({"decay": 1.0}, "decay"),
            ({"max_examples": 1}, "max_examples"),
            ({"window": 3}, "window"),
            ({"confidence": 1.0}, "confidence"),
            ({"log_prefix": ""}, "log_prefix"),
        ],
    )
    def test_out_of_range_is_refused_by_name(self, arguments, named):
        with pytest.raises(ValueError, match=f"Expected argument `{named}` to be"):
            DifferentialDiversityMonitor(**arguments)

    def test_its_state_is_tensors_and_primitives(self):
        monitor = DifferentialDiversityMonitor(every_n_steps=3)
        fit(Net(), monitor)
        buffer = io.BytesIO()
        torch.save(monitor.state_dict(), buffer)
        buffer.seek(0)
        assert torch.load(buffer, weights_only=True)["measurements"] == 2


class TestSecondCap:
    def grown(self, cap: float, scale_lr="linear"):
        class Fixed(DifferentialDiversityMonitor):
            def learning_rate_cap(self, batch_size):
                return LearningRateCap(2 * cap * batch_size, cap * batch_size / 8, 4 * cap * batch_size)

        stability = Fixed(every_n_steps=10**6)
        adaptive = AdaptiveBatchSize(
            every_n_steps=1,
            max_batch_size=64,
            cooldown=0,
            window=4,
            policy=lambda *_: 1e9,
            scale_lr=scale_lr,
            stability=stability,
        )
        fit(Net(0.05), stability, adaptive, max_epochs=3)
        return [growth.to_batch_size for growth in adaptive.history]

    def test_a_rate_within_the_cap_lets_the_batch_grow(self):
        assert self.grown(0.06) == [16, 32, 64]

    def test_a_rate_above_it_does_not(self):
        assert self.grown(0.04) == []

    def test_a_rate_that_does_not_grow_may_come_within_it(self):
        # The lower end is 0.005 * B: 0.05 fits from 16 examples on only if the rate stays.
        assert self.grown(0.04, scale_lr=None) == [16, 32, 64]
        assert self.grown(0.02, scale_lr=None) == []

    def test_without_measurements_nothing_grows(self):
        stability = DifferentialDiversityMonitor(every_n_steps=10**6)
        adaptive = AdaptiveBatchSize(
            every_n_steps=1, max_batch_size=64, cooldown=0, policy=lambda *_: 1e9, stability=stability
        )
        fit(Net(0.05), adaptive, stability, max_epochs=2)
        assert adaptive.history == []

    def test_a_measured_cap_stops_growth_near_a_minimum(self):
        """B_S goes to infinity where the gradients cancel; linear scaling would go on to an unstable rate."""

        def run(stability):
            adaptive = AdaptiveBatchSize(
                every_n_steps=1,
                max_batch_size=64,
                cooldown=0,
                window=8,
                policy=lambda *_: 1e9,
                scale_lr="linear",
                stability=stability,
            )
            fit(Net(0.15), *([adaptive] if stability is None else [adaptive, stability]), max_epochs=8)
            return adaptive

        free = run(None)
        stability = DifferentialDiversityMonitor(every_n_steps=1)
        capped = run(stability)
        assert free.batch_size == 64
        assert capped.batch_size < 64
        for growth in capped.history:
            assert growth.to_batch_size < 64

    def test_a_monitor_that_the_trainer_does_not_run_is_refused(self):
        adaptive = AdaptiveBatchSize(max_batch_size=64, stability=DifferentialDiversityMonitor())
        with pytest.raises(MisconfigurationException, match="`stability` to be among the trainer's callbacks"):
            fit(Net(), adaptive)
