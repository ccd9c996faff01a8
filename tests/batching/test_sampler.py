"""AdaptiveBatchSampler draws what torch's BatchSampler draws, in batches of a size that may change."""

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from lightning_graddiv.batching.sampler import AdaptiveBatchSampler, drawn_batch_size, drawn_examples, is_adaptable


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


def test_a_new_size_counts_from_the_next_iteration():
    sampler = AdaptiveBatchSampler(range(8), 2, False)
    running = iter(sampler)
    assert next(running) == [0, 1]
    sampler.batch_size = 4
    assert next(running) == [2, 3]
    assert list(sampler) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(sampler) == 2


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


def test_only_plain_batch_samplers_are_replaced():
    class Own(BatchSampler):
        pass

    assert is_adaptable(DataLoader(range(10), 4))
    assert not is_adaptable(DataLoader(range(10), batch_sampler=Own(RandomSampler(range(10)), 4, False)))
    assert not is_adaptable(DataLoader(range(10), batch_size=None))
    assert not is_adaptable([1, 2, 3])
