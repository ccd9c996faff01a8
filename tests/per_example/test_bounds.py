"""Indices out of range are refused before a GPU would trap on them; here on a processor, which is told to be one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_graddiv import MeasurementError, per_example_squared_norms
from lightning_graddiv.per_example import losses
from lightning_graddiv.per_example.bounds import indices_checked

ROWS = torch.arange(12.0).view(4, 3)
TABLE = torch.arange(6.0).view(3, 2)

USES = {
    "index": lambda i: ROWS[i],
    "index of a column": lambda i: ROWS[:, i],
    "index beside a mask": lambda i: ROWS.T.contiguous().view(3, 2, 2)[:, torch.ones(2, dtype=torch.bool)][i],
    "two indices": lambda i: ROWS[i, torch.zeros_like(i)],
    "written by index": lambda i: ROWS.clone().index_put_((i,), torch.zeros(())),
    "gather": lambda i: ROWS.gather(0, i[:, None]),
    "scatter": lambda i: ROWS.scatter(0, i[:, None], 1.0),
    "scatter_add_": lambda i: ROWS.clone().scatter_add_(0, i[:, None], torch.ones(len(i), 1)),
    "index_select": lambda i: ROWS.index_select(0, i),
    "index_add_": lambda i: ROWS.clone().index_add_(0, i, torch.ones(len(i), 3)),
    "index_fill": lambda i: ROWS.index_fill(0, i, 1.0),
    "take": lambda i: ROWS.flatten()[:4].take(i),
    "embedding": lambda i: F.embedding(i, ROWS),
    "bag": lambda i: F.embedding_bag(i, ROWS, torch.tensor([0])),
    "classes": lambda i: F.cross_entropy(torch.zeros(len(i), 4), i),
    "classes of pixels": lambda i: F.cross_entropy(torch.zeros(len(i), 4, 1, 1), i.view(-1, 1, 1)),
}
COUNT_FROM_THE_END = {"index", "index of a column", "two indices", "written by index", "index_fill", "take"}
ENTRIES = dict.fromkeys(USES, 4) | {"index of a column": 3, "index beside a mask": 3}


@pytest.fixture
def watched():
    with indices_checked(nn.Linear(1, 1), frozenset({"cpu"})):
        yield


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("name", USES)
def test_out_of_range(name):
    size = ENTRIES[name]
    USES[name](torch.tensor([0, size - 1]))
    for wrong in (size, -size - 1):
        with pytest.raises(IndexError, match=rf"index {wrong} is out of range for {size} entries"):
            USES[name](torch.tensor([0, wrong]))
    if name in COUNT_FROM_THE_END:
        USES[name](torch.tensor([0, -1]))


@pytest.mark.usefixtures("watched")
def test_bags_begin_with_the_first_index():
    with pytest.raises(IndexError, match="index 2 is out of range for 1 entries"):
        F.embedding_bag(torch.tensor([0, 1, 2]), ROWS, torch.tensor([2]))
    with pytest.raises(IndexError, match="index 4 is out of range for 4 entries"):
        F.embedding_bag(torch.tensor([0, 1, 2]), ROWS, torch.tensor([0, 4]))


@pytest.mark.usefixtures("watched")
def test_what_is_ignored_and_what_is_empty_is_in_range():
    F.cross_entropy(torch.zeros(2, 4), torch.tensor([-100, 3]))
    assert ROWS[torch.zeros(0, dtype=torch.long)].shape == (0, 3)
    assert ROWS[ROWS > 5].shape == (6,)
    assert ROWS[None, :, torch.tensor([0, 2])].shape == (1, 4, 2)


def test_a_processor_looks_for_itself(monkeypatch):
    monkeypatch.setattr("lightning_graddiv.per_example.bounds._check", lambda *_: pytest.fail("it was looked at"))
    with indices_checked(nn.Linear(1, 1)):
        F.embedding(torch.tensor([1]), TABLE)


def test_a_step_that_needs_its_whole_batch_is_refused_before_it_traps(monkeypatch):
    """Triplets: rows that the batch is known to have."""
    seen = []

    def checked(module):
        seen.append(module)
        return indices_checked(module, frozenset({"cpu"}))

    def triplets(net, batch):
        out = net(batch)
        return (out[torch.tensor([0, 3])] - out[torch.tensor([1, 4])]).square().mean()

    monkeypatch.setattr(losses, "indices_checked", checked)
    with pytest.raises(MeasurementError, match="IndexError: index 3 is out of range for 1 entries"):
        per_example_squared_norms(nn.Linear(3, 2), torch.randn(6, 3), loss_fn=triplets)
    assert seen
