"""A twin draws what its loader would, and leaves it alone."""

import random

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset

from lightning_graddiv.batching.adoption import AdoptedLoader
from lightning_graddiv.batching.plan import BatchPlan
from lightning_graddiv.batching.twins import first_batches, twin_loader, twin_of


def data():
    return torch.randn(64, 3), torch.arange(64)


class Drawn:
    """Local functions, tensors, and what changes."""

    def __init__(self):
        self.values = torch.randn(5)
        self.seen = []
        self.dice = random.Random(0)
        self.generator = torch.Generator().manual_seed(1)
        self.transform = lambda x: x


def test_a_copy_has_its_own_state_and_the_same_tensors():
    one = Drawn()
    one.again = one.seen
    other = twin_of(one)
    other.seen.append(1)
    assert (other.again, one.seen) == ([1], [])
    assert other.values is one.values
    assert other.transform is one.transform
    assert other.dice.random() == random.Random(0).random() == one.dice.random()
    assert torch.equal(torch.rand(3, generator=other.generator), torch.rand(3, generator=one.generator))


def test_what_is_given_is_shared():
    one, other = Drawn(), Drawn()
    one.other = other
    assert twin_of(one).other is not other
    assert twin_of(one, [other]).other is other


def test_a_twin_draws_what_its_loader_draws_next():
    sampler = RandomSampler(range(64), generator=torch.Generator().manual_seed(5))
    loader = DataLoader(TensorDataset(*data()), 8, sampler=sampler)
    next(iter(loader))
    seen = [batch[1].tolist() for batch in first_batches(loader, 3)]
    assert len(seen) == 3
    assert seen == [batch[1].tolist() for batch in first_batches(loader, 3)]
    assert seen == [batch[1].tolist() for batch in loader][:3]


def test_an_adopted_loader_draws_on_by_its_present_size():
    adopted = AdoptedLoader(DataLoader(TensorDataset(*data()), 8)).loader
    running = iter(adopted)
    next(running)
    adopted.batch_sampler.batch_size = 16
    latest = adopted.batch_sampler.latest
    (batch,) = first_batches(adopted, 1)
    assert len(batch[0]) == 16
    assert adopted.batch_sampler.latest is latest
    assert next(running)[1].tolist() == list(range(8, 16))


def test_a_merging_one_draws_the_users_batches():
    class Buckets(BatchSampler):
        pass

    own = Buckets(SequentialSampler(range(64)), 8, False)
    adopted = AdoptedLoader(DataLoader(TensorDataset(*data()), batch_sampler=own), merges=True)
    adopted.draws(BatchPlan(32), splits_tail=False)
    assert type(twin_loader(adopted.loader).batch_sampler) is Buckets
    assert [len(batch[0]) for batch in first_batches(adopted.loader, 2)] == [8, 8]


def test_a_data_set_with_an_open_file_is_read_as_it_is(tmp_path):
    class Open(TensorDataset):
        pass

    (tmp_path / "x").write_text("x")
    with (tmp_path / "x").open() as file:
        opened = Open(*data())
        opened.file = file
        twin = twin_loader(DataLoader(opened, 16, shuffle=True))
        assert twin.dataset is opened
        assert twin.sampler.data_source is opened


def test_a_sampler_that_cannot_be_copied_is_refused():
    class Once(SequentialSampler):
        def __init__(self, source):
            super().__init__(source)
            self.left = (i for i in range(64))

    loader = DataLoader(TensorDataset(*data()), 8, sampler=Once(range(64)))
    with pytest.raises(MisconfigurationException, match="`Once` cannot be copied"):
        twin_loader(loader)
