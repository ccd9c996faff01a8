"""What a mode sees of a pass, and what it does not: our own work."""

from contextlib import nullcontext

import pytest
import torch

from lightning_graddiv.per_example.modes import OperatorMode, as_own_work, own_work


class Seeing(OperatorMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def call(self, func, args, kwargs):
        self.seen.append(func._schema.name)
        return func(*args, **kwargs)


def test_a_mode_sees_the_operators_of_a_forward_and_a_backward_pass():
    weight = torch.ones(3, requires_grad=True)
    with Seeing() as mode:
        torch.autograd.grad((2 * weight).exp().sum(), weight)
    assert mode.seen.count("aten::mul") == 3  # one in the forward pass, two in the backward pass
    assert mode.seen.count("aten::exp") == 1


def test_own_work_within_is_not_seen_by_any_mode_and_builds_no_graph():
    weight = torch.ones(3, requires_grad=True)
    with Seeing() as outer, Seeing() as inner:
        with own_work():
            found = weight.exp()
        weight.sin()
    assert not found.requires_grad
    assert inner.seen == outer.seen == ["aten::sin"]


def test_own_work_in_a_hook_of_a_watched_backward_pass_is_not_seen():
    def hook(gradient):
        with own_work():
            gradient.exp()

    weight = torch.ones(3, requires_grad=True)
    loss = (weight * weight).sum()
    weight.register_hook(hook)
    with Seeing() as mode:
        torch.autograd.grad(loss, weight)
    assert "aten::exp" not in mode.seen
    assert "aten::mul" in mode.seen


def test_modes_are_entered_again_after_an_error_and_gradients_are_built_again():
    weight = torch.ones(3, requires_grad=True)
    with Seeing() as mode:
        with pytest.raises(KeyError), own_work():
            raise KeyError
        assert weight.exp().requires_grad
    assert mode.seen[0] == "aten::exp"


@pytest.mark.parametrize("is_enabled", [True, False])
@pytest.mark.parametrize("is_seen", [True, False])
def test_a_function_is_called_as_own_work_in_any_state_and_leaves_it(is_enabled, is_seen):
    def work(value):
        assert not torch.is_grad_enabled()
        assert not value.exp().requires_grad
        return "found"

    def fail(_):
        raise KeyError

    weight, mode = torch.ones(3, requires_grad=True), Seeing()
    with torch.set_grad_enabled(is_enabled), mode if is_seen else nullcontext():
        assert as_own_work(work, weight) == "found"
        with pytest.raises(KeyError):
            as_own_work(fail, weight)
        assert mode.seen == []
        assert torch.is_grad_enabled() == is_enabled
        weight.sin()
    assert mode.seen == (["aten::sin"] if is_seen else [])


@pytest.mark.parametrize("is_enabled", [True, False])
def test_without_modes_no_graph_is_built_either_and_the_state_stays(is_enabled):
    weight = torch.ones(3, requires_grad=True)
    with torch.set_grad_enabled(is_enabled):
        with own_work():
            assert not weight.exp().requires_grad
        assert torch.is_grad_enabled() == is_enabled
