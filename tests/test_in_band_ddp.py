"""Two processes measured in-band are one set of examples, with the weights that they enter the step with."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests import in_band_runs
from tests.in_band import Convolutional, Step, Wide, contributions, mean_squares, rho, rho_of
from tests.processes import results_of


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return results_of(in_band_runs, tmp_path_factory.mktemp("in_band"))


def probes_of(result):
    return [SimpleNamespace(**probe) for probe in result["probes"]]


def worst_error(results, net=None, **kwargs):
    """Return the largest (M - 1) |rho - rho of the loop over both processes' examples|."""
    net = net or Convolutional()
    first, second = results
    assert first["probes"] == second["probes"]
    assert len(first["probes"]) == len(first["steps"]) > 0
    errors = []
    for probe, *steps in zip(probes_of(first), first["steps"], second["steps"], strict=True):
        parts = [contributions(net, mean_squares, Step(**step), world=2, **kwargs) for step in steps]
        found, weights = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
        expected, count = rho_of(found, weights)
        assert probe.count == pytest.approx(count, rel=1e-9)
        errors.append((count - 1) * abs(rho(probe) - expected))
    return max(errors)


@pytest.mark.parametrize(
    "run",
    [
        in_band_runs.uneven,
        in_band_runs.accumulated,
        in_band_runs.static,
        in_band_runs.bucket_view,
        in_band_runs.fsdp2,
        in_band_runs.fsdp2_accumulated,
        in_band_runs.fsdp2_validated,
    ],
    ids=lambda run: run.__name__,
)
def test_the_loop_over_both_processes_finds_the_same(runs, run):
    results = runs(run)
    assert worst_error(results) < 1e-5
    assert set(results[0]["coverages"]) == {1.0}
    assert results[0]["engine"] == "ghost"


def test_in_bf16_too(runs):
    autocast = {"autocast": lambda: torch.autocast("cpu", torch.bfloat16)}
    assert worst_error(runs(in_band_runs.in_bf16), Wide(), **autocast) < 1e-3


def test_a_layer_that_one_process_alone_uses(runs):
    first, second = runs(in_band_runs.unused)

    class Extended(Convolutional):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(4, 4)

        def forward(self, x):
            out = super().forward(x)
            return out + self.extra(out) if self.uses else out

    net = Extended()
    assert first["probes"] == second["probes"]
    for probe, *steps in zip(probes_of(first), first["steps"], second["steps"], strict=True):
        parts = []
        for net.uses, step in zip((True, False), steps, strict=True):
            parts.append(contributions(net, mean_squares, Step(**step), world=2))
        expected, count = rho_of(*(torch.cat(pieces) for pieces in zip(*parts, strict=True)))
        assert (count - 1) * abs(rho(probe) - expected) < 1e-5


def test_groups_of_processes_tell_within_from_between(runs):
    first, second = runs(in_band_runs.uneven)
    net = Convolutional()
    for probe, *steps in zip(probes_of(first), first["steps"], second["steps"], strict=True):
        sums = [contributions(net, mean_squares, Step(**step), world=2)[0].sum(0) for step in steps]
        scale = probe.sq_norm_of_sum / float((sums[0] + sums[1]).square().sum())
        own = scale * sum(float(total.square().sum()) for total in sums)
        assert probe.group_sq_norms_of_sums == pytest.approx(own, rel=1e-4)
        assert probe.group_sq_counts == pytest.approx(2 * probe.count**2 / 4)


def test_sixty_four_examples_beside_eight_are_not_seventy_two(runs):
    """The true bound is 1 + 200 of spread over a mean of one; with M = 72 the same sums give 525."""
    probes = probes_of(runs(in_band_runs.known_truth)[0])
    assert probes[0].count == pytest.approx(2**2 / (1 / 64 + 1 / 8))
    signal = sum(probe.sq_norm_of_sum - probe.sum_sq_norms for probe in probes)
    moment = sum((probe.count - 1) * probe.sum_sq_norms for probe in probes)
    assert len(probes) == 200
    assert moment / signal == pytest.approx(201, rel=0.15)


def test_a_contrastive_loss_is_measured_between_the_processes(runs):
    first, second = runs(in_band_runs.contrastive)
    assert first["engine"] == "microbatch"
    assert first["probes"] == second["probes"]
    assert len(first["probes"]) >= 5


def test_batch_normalisation_over_sharded_parameters_is_refused(runs):
    for result in runs(in_band_runs.fsdp2_uncovered):
        assert result["probes"] == []
        assert "mixes the examples of a batch, and the parameters are sharded" in result["said"][0]


def test_what_one_process_does_to_its_gradient_both_refuse(runs):
    for result in runs(in_band_runs.changed_by_one):
        assert result["probes"] == []
        assert len(result["steps"]) == 6


def test_an_error_on_one_process_costs_one_measurement_on_both(runs):
    first, second = runs(in_band_runs.fails_on_one)
    assert first["probes"] == second["probes"]
    assert len(first["probes"]) == 2
    assert len(first["steps"]) == 6


def test_a_measurement_sends_twenty_numbers_whatever_the_model(runs):
    """The sums and two verdicts; where a proof is due, one number for each parameter more."""
    for result in runs(in_band_runs.numbers_sent):
        for counts in result.values():
            assert sorted(counts)[:3] == [20, 20, 20] or sorted(counts)[:3] == [19, 20, 20]
