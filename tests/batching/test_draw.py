"""Examples drawn beside the training leave the data set as it was."""

import random
import threading

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_graddiv.batching.draw import draw
from lightning_graddiv.errors import MeasurementError


class Augmented(Dataset):
    def __init__(self):
        self.x = torch.eye(3)
        self.generators = [np.random.default_rng(0), random.Random(0), torch.Generator().manual_seed(0)]
        self.asked = []
        self.scale = lambda x: 2 * x

    def __len__(self):
        return 3

    def __getitem__(self, i):
        self.asked.append(i)
        noise = self.generators[0].random() + self.generators[1].random()
        return self.scale(self.x[i]), noise + torch.rand((), generator=self.generators[2])


def test_as_the_loader_makes_them_over_and_over():
    x, noise = draw(DataLoader(Augmented(), 2), 7)
    assert torch.equal(x, 2 * torch.eye(3)[[0, 1, 2, 0, 1, 2, 0]])
    assert len(noise.unique()) == 7


def test_the_data_set_does_not_notice():
    asked, left = Augmented(), Augmented()
    draw(DataLoader(asked, 2), 7)
    assert asked.asked == []
    assert all(torch.equal(a, b) for a, b in zip(asked[0], left[0], strict=True))


def test_the_data_itself_is_not_copied():
    class Points(Dataset):
        def __init__(self):
            self.x = torch.eye(3)

        def __len__(self):
            return 3

        def __getitems__(self, indices):
            return [self.x for _ in indices]

    data = Points()
    loader = DataLoader(data, 2, collate_fn=lambda items: items)
    assert all(item.data_ptr() == data.x.data_ptr() for item in draw(loader, 4))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.eye(3))


class Locked(Augmented):
    def __init__(self):
        self.lock = threading.Lock()


class Empty(Augmented):
    def __len__(self):
        return 0


@pytest.mark.parametrize(
    ("loader", "why"),
    [
        (DataLoader(Stream()), "a stream"),
        ([torch.eye(3)], "a stream"),
        (DataLoader(Locked(), sampler=[0]), "cannot be copied"),
        (DataLoader(Empty(), sampler=[0]), "empty"),
    ],
)
def test_what_cannot_be_drawn_is_refused(loader, why):
    with pytest.raises(MeasurementError, match=why):
        draw(loader, 2)
