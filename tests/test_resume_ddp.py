"""What test_resume.py says of one process, of two."""

import json

import pytest
import torch
from torch.utils.data import DistributedSampler

from tests import resume_runs
from tests.processes import start
from tests.resuming import growing, numbered_rows, run, train_loader


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    start(resume_runs, folder, timeout=400)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", resume_runs.CASES)
def test_from_checkpoints_in_any_hook(runs, case):
    """T7 is among them: two workers, from an epoch's end."""
    assert [result[case] for result in runs] == [{}, {}]


def test_with_sharded_parameters(runs):
    assert [result["sharded"] for result in runs] == [{}, {}]


def test_orders_that_differ_between_processes_are_said(runs):
    assert [result["own orders"] for result in runs] == [1, 0]


def test_with_fewer_processes_the_epoch_goes_on_with_the_examples_that_are_left(runs):
    file = runs[0]["for one process"]
    seen = torch.load(file)["callbacks"]["AdaptiveBatchSize"]["position"]["place"]["examples"] * 2
    assert seen == 20
    rows = numbered_rows(resume_runs.EXAMPLES)
    order = DistributedSampler(rows, num_replicas=1, rank=0, shuffle=True)
    one = train_loader(dataset=rows, batch_size=4, shuffle=False, sampler=order)
    module, _ = run(growing(every_n_steps=10**9), one, ckpt_path=file, max_epochs=1)
    trained = [example for step in module.steps for batch in step.examples for example in batch]
    assert trained == list(order)[seen:]
