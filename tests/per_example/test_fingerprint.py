"""Graphs of steps: recognised by their operations and how often each occurs."""

import pytest
import torch

from lightning_graddiv.per_example.fingerprint import _UNKNOWN, KnownGraphs, _operations, graph_nodes


@pytest.fixture
def parameter():
    return torch.ones(3, requires_grad=True)


@pytest.fixture(scope="module")
def extension():
    """Return an operation of an extension, without a derivative of its own."""
    library = torch.library.Library("graddiv_fingerprint", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x.detach() * 2, "CPU")
    yield torch.ops.graddiv_fingerprint.twice
    library._destroy()


def reachable(node, seen):
    if node is None or node in seen:
        return seen
    seen.add(node)
    for following, _ in node.next_functions:
        reachable(following, seen)
    return seen


def test_every_node_is_found_once(parameter):
    shared = parameter * 2
    loss = (shared.sin() + shared.cos()).sum() * shared.sum()
    nodes = graph_nodes(loss)
    assert len(nodes) == len(set(nodes))
    assert set(nodes) == reachable(loss.grad_fn, set())
    assert graph_nodes(torch.ones(1)) == []


def test_operations_are_counted_by_name(parameter):
    found = _operations((parameter.sin().sin() + parameter.cos()).sum())
    assert found == {"SumBackward0": 1, "AddBackward0": 1, "SinBackward0": 2, "CosBackward0": 1, "AccumulateGrad": 1}


def test_operations_of_extensions_are_counted_by_the_names_they_give(parameter, extension):
    loss = extension(extension(parameter)).sum()
    assert {type(node).__name__ for node in graph_nodes(loss)} == {"SumBackward0", _UNKNOWN, "AccumulateGrad"}
    found = _operations(loss)
    assert _UNKNOWN not in found
    assert sum(found.values()) == 4
    assert sorted(found.values()) == [1, 1, 2]


def test_a_graph_that_was_added_is_known_and_another_is_not(parameter):
    graphs = KnownGraphs()
    graphs.add(parameter.sin().sum())
    assert graphs.knows((parameter * 1).sin().sum()) is False
    assert graphs.knows((2 + parameter.detach()).requires_grad_().sin().sum())
    assert not graphs.knows(parameter.sin().sin().sum())
    assert not graphs.knows(parameter.cos().sum())
    graphs.clear()
    assert not graphs.knows(parameter.sin().sum())


def test_where_each_step_takes_another_way_the_kinds_of_operations_count(parameter):
    graphs, value = KnownGraphs(), parameter.sin()
    for _ in range(9):
        graphs.add(value.sum())
        value = value.sin()
    assert graphs.knows(value.sin().sin().sum())
    assert not graphs.knows(value.cos().sum())
