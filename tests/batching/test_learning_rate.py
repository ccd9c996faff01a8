"""The learning rate follows the batch while the optimizer steps, and at no other time."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_graddiv.batching.learning_rate import LearningRateScale, largest_learning_rate, learning_rate_factor

W = nn.Parameter(torch.zeros(2))
SGD = torch.optim.SGD([W], 0.1)
ADAM = torch.optim.AdamW([W], 0.1)


def factor(rule, optimizer=SGD, bound=100.0, batch_size=64, base=16):
    return learning_rate_factor(rule, batch_size=batch_size, base_batch_size=base, bound=bound, optimizer=optimizer)


def test_gain_is_linear_far_below_the_bound_and_saturates_above():
    assert factor("gain", bound=float("inf")) == 4
    assert factor("gain", bound=1e9) == pytest.approx(4)
    assert factor("gain", bound=1.0) == 1
    assert factor("gain") == pytest.approx((64 * 100 / 163) / (16 * 100 / 115))


def test_auto_is_linear_for_sgd_and_the_root_for_the_rest():
    assert factor("auto", SGD) == 4
    assert factor("auto", ADAM) == 2
    assert factor("gain", ADAM) == factor("gain")


def test_linear_sqrt_and_none_ignore_the_bound():
    assert [factor(rule, bound=3.0) for rule in ("linear", "sqrt", None)] == [4, 2, 1]


def scaled(factor=4.0, warm_in=0):
    """A scale by that factor, linearly."""
    scale = LearningRateScale("linear", warm_in)
    grow(scale, factor)
    return scale


def grow(scale, factor):
    scale.set(batch_size=16 * factor, base_batch_size=16, bound=100.0, optimizer=SGD)


def stepping(scale, learning_rate=0.1, **kwargs):
    w = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([w], learning_rate, **kwargs)
    scale.attach(optimizer)
    w.grad = torch.ones(2)
    return w, optimizer


def test_scales_the_step_and_nothing_else():
    scale = scaled()
    w, optimizer = stepping(scale)
    optimizer.step()
    assert torch.equal(w, torch.full((2,), -0.4))
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_tensor_learning_rate_is_the_same_tensor_afterwards():
    rate = torch.tensor(0.1)
    w, optimizer = stepping(scaled(), learning_rate=rate)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.1)
    assert torch.allclose(w, torch.full((2,), -0.4))


def test_a_scheduler_composes_without_drift():
    scale = scaled()
    w, optimizer = stepping(scale)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 8)
    assert float(w[0].detach()) == pytest.approx(-0.4 * (1 + 0.5 + 0.25))


def test_the_closure_runs_at_the_users_rate_and_the_update_at_the_scaled_one():
    scale = scaled()
    w, optimizer = stepping(scale)
    seen = []
    optimizer.step(lambda: seen.append(optimizer.param_groups[0]["lr"]))
    assert seen == [0.1]
    assert torch.equal(w, torch.full((2,), -0.4))
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_optimizers_that_set_their_own_rate_are_left_alone():
    scale = scaled()
    _, optimizer = stepping(scale)
    optimizer.param_groups[0]["lr"] = None
    assert largest_learning_rate(optimizer) == 0
    scale._scale(optimizer)
    assert optimizer.param_groups[0]["lr"] is None


def test_the_factor_is_reached_over_a_few_steps_and_from_where_it_was():
    scale, used = scaled(3.0, warm_in=4), []
    w, optimizer = stepping(scale, learning_rate=1.0)

    def step():
        before = w.detach().clone()
        optimizer.step()
        used.append(float(before[0] - w[0].detach()))

    for _ in range(2):
        step()
    grow(scale, 6.0)
    for _ in range(6):
        step()
    assert used == pytest.approx([1.5, 2.0, 3.375, 4.25, 5.125, 6.0, 6.0, 6.0])  # the third would have been at 2.5
    assert scale.applied == 6.0
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_a_parameter_group_may_have_a_rule_of_its_own():
    plain, rooted, fixed = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    groups = [{"params": [plain]}, {"params": [rooted], "scale_lr": "sqrt", "lr": 1.0}]
    optimizer = torch.optim.SGD([*groups, {"params": [fixed], "scale_lr": None}], 0.1)
    scale = scaled(4.0)
    scale.attach(optimizer)
    for parameter in (plain, rooted, fixed):
        parameter.grad = torch.ones(1)
    optimizer.step()
    assert [float(p.detach()) for p in (plain, rooted, fixed)] == pytest.approx([-0.4, -2.0, -0.1])
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 1.0, 0.1]
    assert scale.applied == 2.0  # on the largest rate
    assert scale.largest(optimizer) == 2.0
    scale.detach()


def test_a_rule_that_there_is_not_is_refused():
    optimizer = torch.optim.SGD([{"params": [W], "scale_lr": "cubic"}], 0.1)
    with pytest.raises(ValueError, match=r"Expected `scale_lr` of a parameter group to be one of .* but got 'cubic'"):
        scaled().attach(optimizer)


def test_its_state_goes_on_in_the_middle_of_a_warm_in():
    scale, other = scaled(3.0, warm_in=4), LearningRateScale("linear", 4)
    _, optimizer = stepping(scale)
    optimizer.step()
    other.load_state_dict(scale.state_dict())
    assert other.largest(optimizer) == scale.largest(optimizer) == pytest.approx(0.1 * 2.0)


def test_a_failed_step_leaves_the_users_rate():
    scale = scaled()
    _, optimizer = stepping(scale)

    def fails():
        raise KeyError("closure")

    with pytest.raises(KeyError):
        optimizer.step(fails)
    assert optimizer.param_groups[0]["lr"] == 0.1
    scale.detach()
    scale.detach()
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert not optimizer._optimizer_step_pre_hooks


def test_copies_are_attached_to_nothing():
    scale = scaled()
    _, optimizer = stepping(scale)
    for copied in (copy.deepcopy(scale), pickle.loads(pickle.dumps(scale))):
        assert copied.factor == 4.0
        copied.detach()
    assert optimizer._optimizer_step_pre_hooks
