"""Two processes find what one would, together."""

import pytest
import torch
from torch.utils.data import DistributedSampler

from lightning_graddiv import estimate_diversity, measure_moments
from tests import finder_runs
from tests.ddp_runs import Regression, regression_data
from tests.processes import results_of


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return results_of(finder_runs, tmp_path_factory.mktemp("finder"), timeout=100)


def test_both_find_the_same_and_count_both(runs):
    first, second = runs(finder_runs.by_function)
    assert first == second
    assert first["present"] == {"micro_batch_size": 4, "accumulate": 1, "world_size": 2}
    assert first["estimate"]["dataset_size"] == 32
    assert first["estimate"]["num_examples"] == 32
    assert first["recommended"]["world_size"] == 2


def test_the_slower_process_counts(runs):
    found = runs(finder_runs.by_function)[0]
    assert [size for size, _ in found["seconds"]] == [4, 8, 16]
    for (size, seconds), (_, rate) in zip(found["seconds"], found["throughput"], strict=True):
        assert seconds >= 0.002
        assert rate == pytest.approx(2 * size / seconds)


def test_the_bound_is_that_of_both_processes_examples(runs):
    """Probe by probe: the sampler deals the examples out in turn, so that a batch on both is eight in its order."""
    first, second = runs(finder_runs.by_callback)
    assert first == second
    assert first["steps"] == 4
    x, y = regression_data()
    order = torch.tensor(list(DistributedSampler(range(32), num_replicas=1, rank=0)))
    probes = [measure_moments(Regression(), (x[rows], y[rows])) for rows in order.split(8)]
    expected = estimate_diversity(probes, dataset_size=32)
    assert first["estimate"]["rho"] == pytest.approx(expected.rho, rel=1e-9)
    assert first["estimate"]["lower"] == pytest.approx(expected.lower, rel=1e-9)


def test_batches_of_two_sizes_are_refused(runs):
    for run in runs(finder_runs.two_sizes):
        assert "the same batch size on every process" in run["error"]


def test_where_one_cannot_measure_both_say_so(runs):
    said = [run["error"] for run in runs(finder_runs.one_process_refuses)]
    assert "finite" in said[1]
    assert said[0] == "Another process could not measure."
