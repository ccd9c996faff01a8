"""The race of benchmarks/ counts what it says it counts, and runs from end to end."""

import copy
import functools
import json
import logging
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = tuple(str(ROOT / folder) for folder in ("benchmarks", "experiments/paper", "examples"))


@pytest.fixture
def benchmarks(monkeypatch):
    """The benchmarks' folder on the path, as when one of them is run; what that changes put back afterwards."""
    monkeypatch.syspath_prepend(FOLDERS[0])
    monkeypatch.setattr(sys, "path", list(sys.path))
    names = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
    loggers = [logging.getLogger(name) for name in (*names, "lightning_utilities.core.rank_zero")]
    levels = [logger.level for logger in loggers]
    before = set(sys.modules)
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(FOLDERS):
            del sys.modules[name]


def test_the_target_is_reached_on_the_line_between_two_evaluations(benchmarks):
    from race_run import first_reached

    curve = {"seconds": [0.0, 2.0, 4.0, 9.0], "steps": [0, 10, 20, 30], "accuracy": [0.1, 0.5, 0.4, 0.9]}
    assert first_reached(curve, 0.3, "seconds") == pytest.approx(1.0)
    assert first_reached(curve, 0.65, "seconds") == pytest.approx(6.5)
    assert first_reached(curve, 0.65, "steps") == pytest.approx(25)
    assert first_reached(curve, 0.05, "seconds") == 0.0
    assert first_reached(curve, 0.95, "seconds") is None


def test_measuring_costs_what_measured_steps_take_longer_than_plain_ones_of_their_size(benchmarks):
    from race_run import overhead_seen

    seconds = {(32, False): [1.0, 1.0, 7.0], (32, True): [3.0, 4.0], (64, False): [2.0], (16, True): [9.0]}
    assert overhead_seen(seconds) == pytest.approx(2 + 3)
    assert overhead_seen({(32, True): [3.0]}) is None


def test_the_clock_stands_still_while_it_is_paused(benchmarks, monkeypatch):
    import race_run

    now = iter([10.0, 13.0, 20.0, 21.0])
    monkeypatch.setattr(race_run.time, "perf_counter", lambda: next(now))
    clock = race_run.Clock()
    clock.resume()
    clock.pause()
    clock.resume()
    assert clock.seconds == pytest.approx(4.0)


class Regression(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))
        self.examples = TensorDataset(torch.randn(22, 5), torch.randn(22, 1))
        self.batch_size = 4
        self.sizes = []

    def train_dataloader(self):
        return DataLoader(self.examples, self.batch_size)

    def training_step(self, batch, batch_idx):
        self.sizes.append(len(batch[0]))
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.05)
        return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)]


def accumulated_diversity(module):
    """A plain loop: the sum of squared norms over the squared norm of the sum, while the weights move."""
    net, sum_sq_norms, total = copy.deepcopy(module.net), 0.0, 0.0
    for x, y in module.train_dataloader():
        rows = []
        for i in range(len(x)):
            loss = nn.functional.mse_loss(net(x[i : i + 1]), y[i : i + 1])
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))]))
        sum_sq_norms += float(torch.stack(rows).square().sum())
        total = total + torch.stack(rows).sum(0)
        with torch.no_grad():
            step = nn.utils.parameters_to_vector(net.parameters()) - 0.05 * torch.stack(rows).mean(0)
            nn.utils.vector_to_parameters(step, net.parameters())
    return sum_sq_norms / float(total.square().sum())


@pytest.mark.filterwarnings("ignore:The .train_dataloader. does not have many workers")
def test_divebatch_grows_by_the_diversity_of_a_whole_epoch_and_its_rate_follows(benchmarks):
    from divebatch import DiveBatch

    module = Regression()
    expected = accumulated_diversity(module)
    dive = DiveBatch(max_batch_size=16, delta=9.5 / (22 * expected))
    trainer = L.Trainer(
        max_epochs=2,
        callbacks=[dive],
        accelerator="cpu",
        reload_dataloaders_every_n_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)
    assert dive.diversities[0] == pytest.approx(expected, rel=1e-5)
    assert max(module.sizes[-3:]) == 9
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 * module.batch_size / 4)


def test_divebatch_neither_shrinks_nor_passes_its_largest(benchmarks):
    from divebatch import next_batch_size

    sizes = [next_batch_size(64, diversity, 1000, 0.1, 512) for diversity in (0.1, 1.0, 100.0, float("inf"))]
    assert sizes == [64, 100, 512, 512]
    assert next_batch_size(64, float("nan"), 1000, 0.1, 512) == 64


def test_a_grid_grows_beyond_the_edge_that_the_best_rate_lies_on(benchmarks):
    from race import extended

    assert extended([1, 2, 4], 2) == [1, 2, 4]
    assert extended([1, 2, 4], 4) == [1, 2, 4, 8]
    assert extended([1, 2, 4], 1) == [0.5, 1, 2, 4]


def test_a_rate_that_misses_the_target_with_one_seed_loses_to_one_that_does_not(benchmarks):
    from race import best_rate, mean

    def run(seconds, accuracy):
        return {"seconds_to_target": seconds, "accuracy": accuracy, "seconds": 9.0, "batch_size": 32}

    steady, lucky = mean([run(7.0, 0.8), run(5.0, 0.9)]), mean([run(1.0, 0.9), run(None, 0.9)])
    assert (steady["seconds_to_target"], steady["accuracy"]) == (6.0, pytest.approx(0.85))
    assert lucky["seconds_to_target"] is None
    assert best_rate({0.1: lucky, 0.2: steady}) == 0.2


@pytest.fixture
def digits_track(benchmarks, monkeypatch):
    import race_tracks
    from data import digits

    @functools.cache
    def data():
        train, held_out = digits()
        return race_tracks.Data(train.tensors, held_out.tensors, "digits")

    here = race_tracks.Phase(jobs=0, threads=1)
    track = race_tracks.Track(
        "digits",
        "digits, MLP",
        data,
        lambda: nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
        rate=0.05,
        target=0.9,
        epochs=3,
        small=16,
        large=128,
        between=(32,),
        evaluations=1,
        grid=1,
        tuning=here,
        racing=here,
    )
    monkeypatch.setitem(race_tracks.TRACKS, "digits", track)
    return track


def test_a_race_runs_from_tuning_to_tables_and_goes_on_where_it_was(digits_track, tmp_path, capsys, monkeypatch):
    import race
    import race_report
    from race_contestants import DEFAULT

    monkeypatch.setattr(race, "EXTENSIONS", 0)
    command = ["--track", "digits", "--seeds", "1", "--out", str(tmp_path), "--results", str(tmp_path)]
    command += ["--every-n-steps", "4", "--cooldown", "4", "--contestants", "small", "best fixed", "Doubling"]
    command += ["DiveBatch 0.1", DEFAULT]
    race.main(command)
    found = json.loads((tmp_path / "race.json").read_text())["tracks"]["digits"]
    runs = {(run["contestant"], run["seed"]): run for run in found["runs"]}
    assert len(runs) == 5
    assert found["failed"] == []
    assert all(run["curve"]["examples"][-1] == 3 * 1200 for run in runs.values())
    assert runs["small", 0]["steps"] == 3 * 75
    assert runs["Doubling", 0]["growths"]
    assert runs[DEFAULT, 0]["steps"] < 3 * 75
    assert runs[DEFAULT, 0]["curve"]["accuracy"][0] == runs["small", 0]["curve"]["accuracy"][0]
    assert runs["DiveBatch", 0]["is"] == "DiveBatch 0.1"

    finished = (tmp_path / "runs.jsonl").read_text()
    monkeypatch.setattr(race, "run", lambda plan: pytest.fail(f"{plan} was run again"))
    race.main(command)
    assert (tmp_path / "runs.jsonl").read_text() == finished

    page = tmp_path / "race.md"
    page.write_text((ROOT / "docs" / "race.md").read_text())
    race_report.main(["--results", str(tmp_path), "--page", str(page), "--readme", str(page)])
    assert f"| **{DEFAULT}** |" in page.read_text()
    assert (tmp_path / "race.png").stat().st_size > 10_000


def test_a_race_takes_over_what_was_tuned_for_the_one_before(digits_track, tmp_path, monkeypatch):
    import race

    monkeypatch.setattr(race, "ROOT", tmp_path)
    results = tmp_path / "benchmarks" / "results"
    command = ["--track", "digits", "--seeds", "1", "--results", str(results)]
    race.main([*command, "--out", str(tmp_path / "before"), "--contestants", "small", "best fixed"])
    before = json.loads((results / "race.json").read_text())["tracks"]["digits"]

    plans, run = [], race.run
    monkeypatch.setattr(race, "run", lambda plan: plans.append(plan) or run(plan))
    again = [*command, "--out", str(tmp_path / "again"), "--tuned", "small", "best fixed"]
    race.main([*again, "--contestants", "small", "best fixed", "large"])
    after = json.loads((results / "race.json").read_text())["tracks"]["digits"]
    assert after["tuned_before"] == ["small", "fixed 32"]
    assert {plan.contestant for plan in plans if plan.ends_at_target} == {"large"}
    assert {plan.contestant for plan in plans if not plan.ends_at_target} == {"small", "fixed 32", "large"}
    assert {name: after["finals"][name] for name in before["finals"]} == before["finals"]

    with pytest.raises(SystemExit, match="of another training"):
        race.main([*again, "--target", "0.5"])
    with pytest.raises(SystemExit, match="not of Doubling"):
        race.main([*command, "--out", str(tmp_path / "again"), "--contestants", "Doubling", "--tuned", "Doubling"])


def test_a_run_that_fails_is_told_with_its_traceback(digits_track, tmp_path, capsys, monkeypatch):
    import race
    import race_run

    def broken(batch):
        raise RuntimeError("no such batch")

    monkeypatch.setattr(race_run, "take_batch", broken)
    command = ["--track", "digits", "--out", str(tmp_path), "--results", str(tmp_path), "--contestants", "fixed 32"]
    with pytest.raises(SystemExit, match="runs failed"):
        race.main([*command, "--tune-only"])
    assert "RuntimeError: no such batch" in capsys.readouterr().err
    assert "no such batch" in (tmp_path / "race.json").read_text()


def test_the_command_in_the_results_names_no_folder(benchmarks):
    from race import without_folders

    command = ["--track", "char-lm", "--results", "a/b", "--out=c", "--seeds", "2", "--data-dir", "d"]
    assert without_folders(command) == ["--track", "char-lm", "--seeds", "2"]
