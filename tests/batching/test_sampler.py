"""AdaptiveBatchSampler draws what torch's BatchSampler draws, in batches of a size that may change."""

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from lightning_graddiv.batching.plan import BatchPlan
from lightning_graddiv.batching.sampler import (
    AdaptiveBatchSampler,
    drawn_batch_size,
    drawn_examples,
    draws_mergeably,
    draws_plainly,
    is_followed,
)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("size", [1, 4, 5, 20, 21])
def test_draws_the_same_batches_from_the_same_random_numbers(size, drop_last):
    data = range(20)

    def drawn(sampler_class):
        torch.manual_seed(0)
        sampler = sampler_class(RandomSampler(data), size, drop_last)
        return list(sampler), len(sampler), torch.get_rng_state()

    ours, torchs = drawn(AdaptiveBatchSampler), drawn(BatchSampler)
    assert ours[:2] == torchs[:2]
    assert torch.equal(ours[2], torchs[2])


def test_a_new_plan_counts_from_the_next_pass():
    sampler = AdaptiveBatchSampler(range(8), 2, False)
    running = iter(sampler)
    assert next(running) == [0, 1]
    sampler.plan = BatchPlan(4)
    assert next(running) == [2, 3]
    assert list(sampler) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(sampler) == 2


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("examples", range(20, 45))
def test_a_plan_changes_with_a_window_and_no_example_is_lost(examples, drop_last):
    """In the middle of the second window: 2 x 2 goes on to its end, then comes 5 x 3."""
    sampler = AdaptiveBatchSampler(range(examples), 2, drop_last, records=True)
    sampler.plan = BatchPlan(2, 2)
    running = iter(sampler)
    drawn = [next(running) for _ in range(3)]
    assert running.boundary == 4
    predicted = running.batches_left(BatchPlan(5, 3), 4)
    running.change(BatchPlan(5, 3), 4)
    drawn += list(running)
    flat = [index for batch in drawn for index in batch]
    assert flat == list(range(len(flat)))
    assert [len(batch) for batch in drawn[:4]] == [2] * 4
    assert len(drawn) == 4 + predicted
    whole, rest = divmod(examples - 8, 15)
    tail = [len(batch) for batch in drawn[4 + 3 * whole :]]
    assert [len(batch) for batch in drawn[4 : 4 + 3 * whole]] == [5] * 3 * whole
    if drop_last:
        assert tail == [5] * (rest // 5)
    else:
        assert sum(tail) == rest
        assert len(tail) == -(-rest // 5)
        assert max(tail, default=0) - min(tail, default=0) <= 1
    windows = [window for window in running.windows if window.plan == BatchPlan(5, 3)]
    assert [len(window.sizes) for window in windows][: whole + bool(tail)] == [3] * whole + [len(tail)] * bool(tail)
    assert [of.examples for of in running.drawn] == [len(batch) for batch in drawn]


def test_a_change_may_wait_for_a_later_window():
    sampler = AdaptiveBatchSampler(range(14), 2, False)
    running = iter(sampler)
    assert next(running) == [0, 1]
    assert running.left(3) == 8
    running.change(BatchPlan(4), 3)
    assert [len(batch) for batch in running] == [2, 2, 4, 4]


def test_what_nobody_takes_is_not_kept():
    running = iter(AdaptiveBatchSampler(range(100), 1, False))
    assert len(list(running)) == 100
    assert not running.windows
    assert not running.drawn


def test_a_stream_has_no_length():
    with pytest.raises(TypeError):
        len(AdaptiveBatchSampler(iter(range(8)), 2, False))


def test_says_how_many_examples_a_batch_holds():
    loader = DataLoader(range(10), 4)
    assert drawn_batch_size(loader) == 4
    assert [drawn_examples(loader, i) for i in range(3)] == [4, 4, 2]
    assert drawn_examples(loader, 7) == 4  # resumed in mid-epoch: the loader began anew
    assert drawn_batch_size(DataLoader(range(10), batch_size=None)) is None
    assert drawn_examples([1, 2], 0) is None
    batches = BatchSampler(SequentialSampler(range(10)), 4, False)
    assert drawn_batch_size(DataLoader(range(10), sampler=batches, batch_size=None)) == 4


def test_follows_only_batches_that_arrive_as_they_were_drawn():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(10))

    class Own(DataLoader):
        def __iter__(self):
            return super().__iter__()

    assert is_followed(DataLoader(range(10), 4, num_workers=2))
    assert not is_followed(DataLoader(range(10), 4, num_workers=2, in_order=False))
    assert is_followed(DataLoader(Stream(), 4))
    assert not is_followed(DataLoader(Stream(), 4, num_workers=2))
    assert not is_followed(Own(range(10), 4))


class Own(BatchSampler):
    """Draws as it likes; here backwards."""

    epoch = 0

    def __iter__(self):
        return reversed(list(super().__iter__()))

    def set_epoch(self, epoch):
        self.epoch = epoch


def test_tells_plain_batch_samplers_from_those_whose_batches_could_be_merged():
    class Unsized(Own):
        def __len__(self):
            raise TypeError

    def kinds(loader):
        return draws_plainly(loader), draws_mergeably(loader)

    assert kinds(DataLoader(range(10), 4)) == (True, False)
    assert kinds(DataLoader(range(10), batch_sampler=Own(RandomSampler(range(10)), 4, False))) == (False, True)
    assert kinds(DataLoader(range(10), batch_sampler=Unsized(RandomSampler(range(10)), 4, False))) == (False, False)
    assert kinds(DataLoader(range(10), batch_sampler=[[0, 1], [2]])) == (False, False)  # of what size?
    assert kinds(DataLoader(range(10), batch_size=None)) == (False, False)
    assert kinds([1, 2, 3]) == (False, False)


class TestMerging:
    """Of 11 batches of 2, the first of which holds one example: 20; 19, 18; ..."""

    def sampler(self, drop_last=False, **kwargs):
        return AdaptiveBatchSampler(Own(range(21), 2, False), 2, drop_last, merges=True, records=True, **kwargs)

    def test_an_unchanged_size_draws_the_very_same_batches(self):
        batches = [[0, 1], (2, 3), torch.tensor([4, 5])]
        drawn = list(AdaptiveBatchSampler(batches, 2, False, merges=True))
        assert all(ours is theirs for ours, theirs in zip(drawn, batches, strict=True))
        assert len(self.sampler()) == 11

    @pytest.mark.parametrize("drop_last", [False, True])
    def test_a_larger_micro_batch_holds_several_batches(self, drop_last):
        sampler = self.sampler(drop_last)
        sampler.plan = BatchPlan(6)
        drawn = list(sampler)
        assert drawn[:3] == [[20, 18, 19, 16, 17], [14, 15, 12, 13, 10, 11], [8, 9, 6, 7, 4, 5]]
        assert drawn[3:] == ([] if drop_last else [[2, 3, 0, 1]])
        assert len(sampler) == len(drawn)

    def test_the_last_window_is_split_between_whole_batches(self):
        sampler = self.sampler()
        running = iter(sampler)
        assert [next(running) for _ in range(2)] == [[20], [18, 19]]
        assert running.left(2) == 18
        assert running.batches_left(BatchPlan(4, 4), 2) == 5
        running.change(BatchPlan(4, 4), 2)
        assert [len(batch) for batch in running] == [4, 4, 4, 4, 2]
        sampler.plan, sampler.splits_tail = BatchPlan(6, 4), True  # 22 examples at most, where 24 make a window
        assert [len(batch) for batch in sampler] == [5, 6, 6, 4]

    def test_examples_are_counted_as_they_are_drawn(self):
        running = iter(self.sampler())
        list(running)
        assert [of.examples for of in running.drawn] == [1] + [2] * 10

    def test_what_else_is_asked_of_it_is_asked_of_the_users(self):
        sampler = self.sampler()
        sampler.set_epoch(3)
        assert sampler.epoch == sampler.source.epoch == 3
        assert sampler.sampler == range(21)
        with pytest.raises(AttributeError, match="nonsense"):
            _ = sampler.nonsense
        with pytest.raises(AttributeError, match="no attribute `epoch`"):
            _ = AdaptiveBatchSampler(range(8), 2, False).epoch
