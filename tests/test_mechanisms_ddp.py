"""Mechanisms and the differential monitor on two real processes: in sync to the bit, moments as the formulas say."""

import math

import pytest
import torch

from lightning_graddiv import DifferentialMoments, GradientMoments, estimate_stability
from tests import mechanism_runs
from tests.mechanism_runs import SIZES, Share, batch_of, flat
from tests.processes import results_of


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return results_of(mechanism_runs, tmp_path_factory.mktemp("mechanisms"), timeout=400)


def unit_gradients(module, rank):
    found = []
    for a, b in zip(*batch_of(rank), strict=True):
        loss = (module.net(a[None])[:, 0] - b).square().mean()
        found.append(flat(torch.autograd.grad(loss, list(module.parameters()))))
    return torch.stack(found)


SHARES = [unit_gradients(Share(), rank) for rank in range(2)]
WORKERS = [share.mean(0) for share in SHARES]
MEAN = (WORKERS[0] + WORKERS[1]) / 2


def assert_moments(run, mean, variance, rel):
    """In sync; unbiased within the noise of the mean; the variance that the formula and the callback say."""
    first, second = run
    assert first["weights"] == second["weights"]
    assert first["gradients"] == second["gradients"]
    applied = torch.tensor(first["applied"], dtype=torch.float64)
    assert float(applied.var(0).sum()) == pytest.approx(variance, rel=rel)
    spread = math.sqrt(variance / len(applied))
    assert float((applied.mean(0) - mean).norm()) < 1.5 * spread
    return applied


def test_quantised_gradients(runs):
    run = runs(mechanism_runs.quantised_moments)
    variance = sum(float(w.norm() * w.abs().sum() - w.square().sum()) for w in WORKERS) / 4
    applied = assert_moments(run, MEAN, variance, rel=0.1)
    # Every entry is 0 or a worker's norm over two, with the worker's sign, or two of them.
    a, b = (float(worker.norm()) / 2 for worker in WORKERS)
    allowed = torch.tensor([0, a, b, a + b, abs(a - b)], dtype=torch.float64)
    assert float((applied.abs().flatten()[:, None] - allowed).abs().min(1).values.max()) < 1e-9
    assert (applied != 0).double().mean() < 2 / math.sqrt(len(MEAN))
    assert run[0]["effect"] == run[1]["effect"]
    assert run[0]["effect"]["variance"] == pytest.approx(variance, rel=1e-9)
    assert run[0]["effect"]["sum_sq_weights"] == pytest.approx(sum(1 / size for size in SIZES) / 4)


def test_a_mask_for_each_worker(runs):
    run = runs(mechanism_runs.masked_moments)
    variance = 0.3 * 0.7 * sum(float(w.square().sum()) for w in WORKERS) / 4
    applied = assert_moments(run, 0.7 * MEAN, variance, rel=0.06)
    entry = int(MEAN.abs().argmax())
    kinds = applied[:, entry].unique()
    assert len(kinds) == 4  # both kept, one of them, the other, none: the workers' masks are their own
    assert run[0]["effect"]["variance"] == pytest.approx(variance, rel=1e-9)


def test_a_mask_for_each_example(runs):
    run = runs(mechanism_runs.masked_examples)
    parts = [share / (2 * len(share)) for share in SHARES]
    variance = 0.3 * 0.7 * sum(float(part.square().sum()) for part in parts)
    assert_moments(run, 0.7 * MEAN, variance, rel=0.06)
    assert run[0]["effect"]["variance"] == pytest.approx(variance, rel=1e-9)


def test_langevin_noise_of_unequal_shares(runs):
    run = runs(mechanism_runs.langevin_moments)
    # Five examples enter the mean by 1/10 each, three by 1/6: sum a^2 is not 1/8.
    weights = sum(1 / size for size in SIZES) / 4
    assert weights != pytest.approx(1 / 8, rel=0.05)
    assert_moments(run, MEAN, len(MEAN) * 0.25 * weights, rel=0.03)
    assert run[0]["effect"]["sum_sq_weights"] == pytest.approx(weights)


@pytest.mark.parametrize("name", ["quantised", "masked", "langevin"])
def test_in_training_they_stay_in_sync_and_a_monitor_changes_nothing(runs, name):
    first, second = (run[name] for run in runs(mechanism_runs.trainings))
    assert first == second
    assert first["plain"] == first["watched"]
    assert first["measurements"] > 5
    assert math.isfinite(first["bound"])
    assert first["resumed"] == first["plain"]["weights"]
    assert first["scaled"][0] == first["scaled"][1]


def test_the_monitor_measures_plain_gradients(runs):
    alone, beside = runs(mechanism_runs.trainings)[0]["probes"]
    assert len(alone) == len(beside) == 8
    for a, b in zip(alone, beside, strict=True):
        assert list(a.values()) == pytest.approx(list(b.values()), rel=1e-9)


def test_a_second_communication_hook_is_refused(runs):
    for result in runs(mechanism_runs.taken_hook):
        assert "by a DDP communication hook, but there is one already" in result["said"]


def test_what_is_not_finite_on_one_process_shows_on_all(runs):
    assert [result["all"] for result in runs(mechanism_runs.not_finite_on_one)] == [True, True]


def test_the_differential_bound_is_that_of_one_process(runs):
    first, second = runs(mechanism_runs.differential)
    assert first == second
    here, there = Share(hidden=20), Share(hidden=20)
    with torch.no_grad():
        for p in there.parameters():
            p.add_(torch.linspace(-0.3, 0.3, p.numel(), dtype=torch.float64).view_as(p))
    differences = torch.cat([unit_gradients(here, rank) - unit_gradients(there, rank) for rank in range(2)])
    step = flat(here.parameters()) - flat(there.parameters())
    distance = float(step.norm())
    probe = DifferentialMoments(
        GradientMoments.from_gradients(differences / distance),
        float((differences @ step).sum()) / distance**2,
        distance,
    )
    assert len(first["probes"]) == 5
    for found in first["probes"]:
        assert found["distance"] == pytest.approx(distance, rel=1e-12)
        assert found["alignment"] == pytest.approx(probe.alignment, rel=1e-9)
        assert found["moments"]["count"] == sum(SIZES)
        assert found["moments"]["sum_sq_norms"] == pytest.approx(probe.moments.sum_sq_norms, rel=1e-9)
        assert found["moments"]["sq_norm_of_sum"] == pytest.approx(probe.moments.sq_norm_of_sum, rel=1e-9)
    expected = estimate_stability([probe]).learning_rate_cap(8).cap
    assert first["cap"]["cap"] == pytest.approx(expected, rel=1e-9)
    assert first["cap"]["lower"] == pytest.approx(expected, rel=1e-6)  # every probe is the same


def test_what_one_process_cannot_measure_both_drop(runs):
    # From the fourth step on: one process's NaN has made the weights of both NaN.
    assert [result["measurements"] for result in runs(mechanism_runs.differential_refused_on_one)] == [2, 2]
