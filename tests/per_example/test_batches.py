"""What an example is, in batches of every shape that people train on."""

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from lightning_graddiv.errors import MeasurementError
from lightning_graddiv.per_example.batches import (
    count_examples,
    has_row_per_example,
    own_copy,
    repeated,
    replace_leaves,
    select,
    tensor_leaves,
)

N = 5
X, Y = torch.arange(N * 2.0).reshape(N, 2), torch.arange(N) * 10


@dataclass
class Plain:
    x: Tensor
    y: Tensor
    name: str = "plain"


@dataclass(slots=True)
class Slotted:
    x: Tensor
    y: Tensor
    extra: Any = None


@dataclass(frozen=True)
class Frozen:
    x: Tensor
    y: Tensor


class BatchEncoding(UserDict):
    """What Hugging Face tokenizers return."""


Named = namedtuple("Named", ["x", "y"])
NamedDefault = namedtuple("NamedDefault", ["x", "y", "z"], defaults=[None])

BATCHES = {
    "tensor": X,
    "tuple": (X, Y),
    "list": [X, Y],
    "dict": {"x": X, "y": Y},
    "ordered": OrderedDict(x=X, y=Y),
    "defaultdict": defaultdict(list, x=X, y=Y),
    "dataclass": Plain(X, Y),
    "slots": Slotted(X, Y),
    "named tuple": Named(X, Y),
    "named tuple with default": NamedDefault(X, Y),
    "encoding": BatchEncoding({"x": X, "y": Y}),
    "nested": [{"x": (X, None), "y": [Slotted(Y, Y, {"z": Y})]}, "name", 3, None, 2.5, torch.tensor(1.0)],
    "padded": (X, None, Y),
}


@pytest.mark.parametrize("name", BATCHES)
def test_examples_are_counted_and_picked_in_every_container(name):
    batch = BATCHES[name]
    assert count_examples(batch) == N
    picked = select(batch, [3, 1], N)
    assert type(picked) is type(batch)
    leaves = list(zip(tensor_leaves(batch), tensor_leaves(picked), strict=True))
    assert leaves
    for whole, part in leaves:
        torch.testing.assert_close(part, whole[[3, 1]] if whole.ndim else whole)


@pytest.mark.parametrize("name", BATCHES)
def test_leaves_come_back_where_they_were(name):
    batch = BATCHES[name]
    marked = replace_leaves(batch, [leaf + i for i, leaf in enumerate(tensor_leaves(batch))])
    assert type(marked) is type(batch)
    for i, (old, new) in enumerate(zip(tensor_leaves(batch), tensor_leaves(marked), strict=True)):
        torch.testing.assert_close(new, old + i)


@pytest.mark.parametrize("name", BATCHES)
def test_an_own_copy_shares_no_tensor(name):
    batch = BATCHES[name]
    before = [leaf.clone() for leaf in tensor_leaves(batch)]
    copied = own_copy(batch)
    assert type(copied) is type(batch)
    for leaf in tensor_leaves(copied):
        leaf.zero_()
    for leaf, old in zip(tensor_leaves(batch), before, strict=True):
        assert torch.equal(leaf, old)


def test_an_own_copy_has_its_own_containers():
    batch = {"x": X, "names": ["a", "b"], "array": np.zeros(2), "targets": [{"y": Y}]}
    copied = own_copy(batch)
    copied["names"].pop()
    copied["array"] += 1
    copied["targets"][0].pop("y")
    copied.pop("x")
    assert set(batch) == {"x", "names", "array", "targets"}
    assert batch["names"] == ["a", "b"]
    assert not batch["array"].any()
    assert set(batch["targets"][0]) == {"y"}


@pytest.mark.parametrize("names", [list("abcde"), tuple("abcde")], ids=["list", "tuple"])
def test_as_many_strings_as_examples_belong_to_the_examples(names):
    batch = {"x": X, "names": names, "nested": [names], "other": ["u", "v"]}
    picked = select(batch, [4, 0], N)
    assert picked["names"] == type(names)(["e", "a"])
    assert picked["nested"] == [type(names)(["e", "a"])]
    assert picked["other"] == ["u", "v"]


def test_arrays_and_lists_of_numbers_have_rows_too():
    picked = select({"x": X, "a": np.arange(N), "b": np.arange(3), "c": [1, 2, 3, 4, 5], "d": np.array(3)}, [1], N)
    assert picked["a"].tolist() == [1]
    assert picked["b"].tolist() == [0, 1, 2]
    assert picked["c"] == [2]
    assert picked["d"] == 3


def test_a_string_is_no_list_of_examples():
    assert select((X, "abcde"), [1], N)[1] == "abcde"


def test_views_of_the_examples_are_no_examples():
    """Two views of two images: the list is as long as the batch, and is no row of it."""
    views = [torch.zeros(2, 3), torch.ones(2, 3)]
    picked = select({"views": views, "named": Named(*views)}, [1], 2)
    assert [len(view) for view in picked["views"]] == [1, 1]
    assert isinstance(picked["named"], Named)
    assert [len(view) for view in picked["named"]] == [1, 1]


def test_picking_copies_rows():
    picked = select((X,), list(range(N)), N)
    picked[0].zero_()
    assert X.any()


def test_tensors_without_a_row_for_each_example_are_passed_on_whole():
    weights = torch.rand(3)
    assert select((X, weights), [0], N)[1] is weights
    assert not has_row_per_example(weights, N)
    assert not has_row_per_example(torch.tensor(1.0), 1)
    assert has_row_per_example(X, N)


def test_a_packed_sequence_is_taken_for_what_it_is():
    packed = pack_sequence([torch.zeros(3), torch.zeros(2)])
    assert isinstance(own_copy(packed), type(packed))


@pytest.mark.parametrize("batch", [Frozen(X, Y), [Frozen(X, Y)], {"x": (Frozen(X, Y),)}], ids=["bare", "list", "dict"])
def test_a_frozen_dataclass_is_refused_with_a_cure(batch):
    with pytest.raises(MeasurementError, match=r"frozen dataclass.*Drop `frozen=True`") as refused:
        count_examples(batch)
    assert refused.value.lasting


def test_a_container_that_cannot_be_rebuilt_is_refused():
    class Stubborn(UserDict):
        def __init__(self, x, y):
            super().__init__(x=x, y=y)

    with pytest.raises(MeasurementError, match=r"Stubborn.*cannot be taken apart") as refused:
        count_examples(Stubborn(X, Y))
    assert refused.value.lasting


@pytest.mark.parametrize("batch", [None, "text", [], {}, {"a": 1}, torch.tensor(3.0), [torch.tensor(1)]], ids=str)
def test_a_batch_without_rows_is_refused(batch):
    with pytest.raises(MeasurementError, match="holds no tensor whose rows could be examples") as refused:
        count_examples(batch)
    assert refused.value.lasting


def test_an_empty_batch_is_refused_this_once():
    with pytest.raises(MeasurementError, match="empty") as refused:
        count_examples((torch.zeros(0, 3), torch.zeros(0)))
    assert not refused.value.lasting


def test_rows_are_counted_by_the_most_tensors_or_by_the_loader():
    batch = torch.zeros(48, 2), torch.zeros(16), torch.zeros(16)
    assert count_examples(batch) == 16
    assert count_examples(batch, at_most=48) == 48
    assert count_examples((X, torch.zeros(3)), at_most=N) == N


def test_fewer_rows_than_the_loader_draws_are_a_last_batch():
    assert count_examples((X, Y), at_most=8) == N


@pytest.mark.parametrize("rows", [(48,), (48, 7), (3, 7)], ids=str)
def test_rows_that_the_loader_did_not_draw_are_refused(rows):
    with pytest.raises(MeasurementError, match=r"The loader draws 16 examples.*rows are not examples") as refused:
        count_examples([torch.zeros(size, 2) for size in rows], at_most=16)
    assert refused.value.lasting


def test_fields_that_a_dataclass_computes_itself_do_not_get_in_the_way():
    @dataclass
    class Computed:
        x: Tensor
        kind: str = field(init=False, default="computed")

    assert select(Computed(X), [1], N).kind == "computed"


class TestRepeated:
    def test_the_examples_come_over_and_over(self):
        batch = {"x": torch.arange(3), "names": ["a", "b", "c"], "more": (np.arange(3), torch.tensor(7.0), None)}
        longer = repeated(batch, 5)
        assert longer["x"].tolist() == [0, 1, 2, 0, 1]
        assert longer["names"] == ["a", "b", "c", "a", "b"]
        assert longer["more"][0].tolist() == [0, 1, 2, 0, 1]
        assert longer["more"][1:] == (torch.tensor(7.0), None)

    def test_fewer_are_the_first(self):
        assert repeated([torch.arange(3)], 2)[0].tolist() == [0, 1]

    def test_rows_that_are_no_examples_are_refused(self):
        with pytest.raises(MeasurementError, match=r"batch of 3 examples holds tensors of \[7\] rows"):
            repeated({"nodes": torch.zeros(7, 2), "y": torch.zeros(3)}, 6, at_most=3)
