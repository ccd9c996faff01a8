"""Batches that are more than a tuple of tensors."""

from collections import UserDict, namedtuple
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.conformance.patterns import N, Setup, T, of_rows, pattern, plain, rows, tokens
from tests.conformance.reference import curved

Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Item:
    x: Tensor
    y: Tensor
    name: str = "train"


@dataclass(frozen=True)
class FrozenItem:
    x: Tensor
    y: Tensor


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def cross_entropy(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(m(x), y)


@pattern()
def dictionary():
    batch = {"x": rows(4), "y": tokens(3), "source": "train"}
    return Setup(net(), batch, lambda m, b: cross_entropy(m, b["x"], b["y"]))


@pattern()
def dictionary_in_a_list_in_a_tuple():
    batch = ([{"x": rows(4)}], tokens(3))
    return Setup(net(), batch, lambda m, b: cross_entropy(m, b[0][0]["x"], b[1]))


@pattern()
def dictionary_of_the_user():
    class Encoding(UserDict):
        pass

    batch = Encoding({"x": rows(4), "y": tokens(3)})
    return Setup(net(), batch, lambda m, b: cross_entropy(m, b["x"], b["y"]))


@pattern()
def data_class():
    return Setup(net(), Item(rows(4), tokens(3)), lambda m, b: cross_entropy(m, b.x, b.y))


@pattern(refused="cannot be taken apart")
def frozen_data_class():
    return Setup(net(), FrozenItem(rows(4), tokens(3)), lambda m, b: cross_entropy(m, b.x, b.y))


@pattern()
def named_tuple():
    return Setup(net(), Pair(rows(4), tokens(3)), lambda m, b: cross_entropy(m, b.x, b.y))


@pattern()
def strings_beside_tensors():
    batch = rows(4), [f"file {i}" for i in range(N)]

    def loss(m: nn.Module, batch: tuple[Tensor, list[str]]) -> Tensor:
        x, names = batch
        assert len(names) == len(x)
        return (curved(m(x)) * torch.tensor([float(name[-1]) + 1 for name in names])).mean()

    return Setup(net(), batch, loss)


@pattern()
def nothing_and_numbers_beside_tensors():
    return Setup(net(), (rows(4), None, 3.0, True), lambda m, b: plain(m, b[0]) * b[2])


@pattern()
def constants_beside_rows():
    batch = rows(4), torch.randn(4), torch.tensor(2.0)
    return Setup(net(), batch, lambda m, b: plain(m, b[0] * b[1] + b[2]))


@pattern(refused="mixes the examples|part of its batch|weighs the examples")
def constant_with_as_many_rows_as_examples():
    # Nothing in the batch tells that this is no row for each example, but the parts do not add up to the whole.
    def alone(batch, example, examples):
        return batch[0][example : example + 1], batch[1]

    return Setup(net(), (rows(4), rows(4)), lambda m, b: plain(m, b[0] + b[1].sum(0)), pick=alone)


@pattern(refused="part of its batch|mixes the examples|weighs the examples")
def tensors_that_are_views_of_a_graph():
    # Edges of all graphs in one list: rows are no examples.
    def alone(batch, example, examples):
        x, owner = batch
        return x[owner == example], torch.zeros(int((owner == example).sum()), dtype=torch.long)

    owner = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 4, 5])

    def loss(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, owner = batch
        graphs = int(owner.max()) + 1
        return curved(torch.zeros(graphs, 3, dtype=x.dtype).index_add(0, owner, m(x)).tanh()).mean()

    return Setup(net(), (torch.randn(10, 4), owner), loss, pick=alone)


@pattern()
def bare_tensor():
    return Setup(net(), rows(4), plain)


@pattern()
def list_of_one_tensor_for_each_input():
    return Setup(net(), [rows(4), rows(4)], of_rows(lambda m, b: m(b[0]) * m(b[1])))


@pattern()
def expanded_and_strided_rows():
    x = torch.randn(1, 4).expand(N, 4)
    y = torch.randn(4, 2 * N).T[::2]
    return Setup(net(), (x, y), of_rows(lambda m, b: m(b[0]) * m(b[1])))


@pattern()
def batch_that_the_step_writes_to():
    def loss(m: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        batch["x"] = batch["x"].mul_(2)
        return plain(m, batch["x"])

    # The reference takes rows of the batch itself: it must not be written to before the package sees it.
    return Setup(net(), {"x": rows(4)}, loss, pick=lambda b, i, n: {"x": b["x"][i : i + 1].clone()})


@pattern()
def identical_examples():
    return Setup(net(), torch.randn(1, 4).repeat(N, 1), plain)


@pattern()
def rows_of_integers_and_booleans():
    batch = tokens(9, 4), torch.rand(N, 4) < 0.5
    return Setup(net(), batch, lambda m, b: plain(m, b[0].to(m[0].weight) * b[1]))


@pattern()
def many_examples():
    return Setup(net(), torch.randn(70, T, 4), plain, examples=70)
