"""Kill it anywhere, with a real SIGKILL: the same run goes on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.killing import Written, written


def kill(folder, processes, kills, workers, seed=0):
    arguments = [str(folder), *map(str, (processes, kills, seed, workers))]
    finished = subprocess.run(
        [sys.executable, "-m", "tests.killing", *arguments],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads((folder / "kills.json").read_text())


def steps(folder, rank):
    """Return what each optimizer step was made of, every time that it was taken."""
    taken = {}
    for line in (folder / f"steps-{rank}.jsonl").read_text().splitlines():
        step, *made_of = json.loads(line)
        taken.setdefault(step, []).append(made_of)
    return taken


def assert_the_same(folder, processes):
    growths = json.loads((folder / "whole" / "end-0.json").read_text())
    assert len(growths) == 3
    for rank in range(processes):
        whole, again = steps(folder / "whole", rank), steps(folder / "killed", rank)
        assert whole.keys() == again.keys()
        for step, (made_of,) in whole.items():
            assert all(other == made_of for other in again[step]), f"step {step}"
        assert json.loads((folder / "killed" / f"end-{rank}.json").read_text()) == growths
    return growths


def test_a_line_that_a_kill_cut_off_counts_for_nothing(tmp_path):
    file = tmp_path / "steps-0.jsonl"
    assert written(tmp_path) == 0
    file.write_text("[1, 0]\n[2, ")
    assert written(tmp_path) == 1
    Written(file).file.close()
    assert file.read_text() == "[1, 0]\n"


@pytest.mark.parametrize(("processes", "workers"), [(1, 2), (2, 0)])
def test_a_few_times(processes, workers, tmp_path):
    kill(tmp_path, processes, 3, workers)
    assert_the_same(tmp_path, processes)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (1, 2), (2, 0), (2, 2)])
def test_twenty_times(processes, workers, tmp_path):
    at = kill(tmp_path, processes, 20, workers, seed=processes + workers)
    growths = assert_the_same(tmp_path, processes)
    assert len(at) == 20
    assert at[0] < growths[0][0] < growths[1][0] < at[-1]
