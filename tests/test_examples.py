"""The examples run, and print what the README says they print."""

import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture
def examples(monkeypatch):
    """The examples' folder on the path, as when one of them is run; their modules forgotten afterwards."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    log, threads = logging.getLogger("lightning.pytorch.utilities.rank_zero"), torch.get_num_threads()
    filters = list(log.filters)
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        yield
    log.filters[:] = filters
    torch.set_num_threads(threads)
    for name in ("data", "digits", "fashion_mnist"):
        sys.modules.pop(name, None)


def test_digits_trains_three_times_and_leaves_table_picture_and_metrics(examples, tmp_path, capsys):
    import digits

    small, large, adaptive = digits.main(["--epochs", "5", "--seed", "1", "--out", str(tmp_path)])
    assert (small.steps, large.steps) == (5 * 75, 5 * 3)
    assert adaptive.steps < small.steps
    assert adaptive.batch_size > digits.SMALL
    assert small.accuracy > 0.9
    assert adaptive.accuracy > 0.9
    said = capsys.readouterr().out
    for run in (small, large, adaptive):
        assert re.search(rf"^{run.name} +{100 * run.accuracy:.1f} % +{run.steps:,} ", said, re.MULTILINE)
        assert (tmp_path / "digits" / run.name / "metrics.csv").exists()
    assert f"{small.steps / adaptive.steps:.1f} times fewer optimizer steps" in said
    assert len(said.splitlines()) < 40
    assert (tmp_path / "digits.png").stat().st_size > 20_000


def test_digits_is_the_same_again_for_the_same_seed(examples, tmp_path):
    import digits

    def train():
        callback = digits.adaptive_batch_size()
        options = {"epochs": 3, "out": tmp_path, "verbose": False}
        return digits.train_digits("a", 3, callback=callback, **options), callback.history

    digits.quiet(decisions=False)
    (one, history), (two, again) = train(), train()
    assert one.metrics["val_accuracy"] == two.metrics["val_accuracy"]
    assert [growth.why for growth in history] == [growth.why for growth in again]


def test_fashion_mnist_reads_a_folder_only_of_the_true_files(examples, tmp_path):
    import data

    with pytest.raises(SystemExit, match="neither train-images-idx3-ubyte nor"):
        data.fashion_mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 1, 7]))
    with pytest.raises(SystemExit, match="its digest is wrong"):
        data.fashion_mnist(tmp_path)


def test_fashion_mnist_without_apt_asks_for_a_folder(examples, tmp_path, monkeypatch):
    import data

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(data, "FASHION_MNIST", {"a file that no machine has": ""})
    with pytest.raises(SystemExit, match="--data-dir"):
        data.fashion_mnist()


@pytest.mark.slow
def test_ddp_grows_on_both_processes(tmp_path):
    command = [sys.executable, str(EXAMPLES / "ddp.py"), "--epochs", "6", "--out", str(tmp_path)]
    done = run(command)
    assert re.search(r"AdaptiveBatchSize: 16 -> 32 from epoch \d+ on", done.stderr)
    rows = re.findall(r"^adaptive +(\d+\.\d) % +(\d+) +\S+ +(\d+)$", done.stdout, re.MULTILINE)
    assert len(rows) == 1  # from one process
    accuracy, steps, batch_size = map(float, rows[0])
    assert accuracy > 85
    assert steps < 6 * 75
    assert batch_size >= 32


@pytest.mark.slow
@pytest.mark.network
def test_fashion_mnist_trains_twice(tmp_path):
    done = run([sys.executable, str(EXAMPLES / "fashion_mnist.py"), "--epochs", "1", "--out", str(tmp_path)])
    assert re.search(r"^small +\d+\.\d % +1,875 ", done.stdout, re.MULTILINE)
    assert re.search(r"^adaptive +\d+\.\d % ", done.stdout, re.MULTILINE)
    assert (tmp_path / "fashion_mnist.png").stat().st_size > 20_000


def run(command):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done
