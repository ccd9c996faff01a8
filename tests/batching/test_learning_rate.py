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


def test_auto_is_gain_for_sgd_and_its_root_for_the_rest():
    assert factor("auto", SGD) == factor("gain")
    assert factor("auto", ADAM) == pytest.approx(factor("gain") ** 0.5)
    assert factor("gain", ADAM) == factor("gain")


def test_linear_sqrt_and_none_ignore_the_bound():
    assert [factor(rule, bound=3.0) for rule in ("linear", "sqrt", None)] == [4, 2, 1]


def stepping(scale, learning_rate=0.1, **kwargs):
    w = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([w], learning_rate, **kwargs)
    scale.attach(optimizer)
    w.grad = torch.ones(2)
    return w, optimizer


def test_scales_the_step_and_nothing_else():
    scale = LearningRateScale(4.0)
    w, optimizer = stepping(scale)
    optimizer.step()
    assert torch.equal(w, torch.full((2,), -0.4))
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_tensor_learning_rate_is_the_same_tensor_afterwards():
    rate = torch.tensor(0.1)
    w, optimizer = stepping(LearningRateScale(4.0), learning_rate=rate)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.1)
    assert torch.allclose(w, torch.full((2,), -0.4))


def test_a_scheduler_composes_without_drift():
    scale = LearningRateScale(4.0)
    w, optimizer = stepping(scale)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 8)
    assert float(w[0].detach()) == pytest.approx(-0.4 * (1 + 0.5 + 0.25))


def test_the_closure_runs_at_the_users_rate_and_the_update_at_the_scaled_one():
    scale = LearningRateScale(4.0)
    w, optimizer = stepping(scale)
    seen = []
    optimizer.step(lambda: seen.append(optimizer.param_groups[0]["lr"]))
    assert seen == [0.1]
    assert torch.equal(w, torch.full((2,), -0.4))
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_optimizers_that_set_their_own_rate_are_left_alone():
    scale = LearningRateScale(4.0)
    _, optimizer = stepping(scale)
    optimizer.param_groups[0]["lr"] = None
    assert largest_learning_rate(optimizer) == 0
    scale._scale(optimizer)
    assert optimizer.param_groups[0]["lr"] is None


def test_a_failed_step_leaves_the_users_rate():
    scale = LearningRateScale(4.0)
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
    scale = LearningRateScale(4.0)
    _, optimizer = stepping(scale)
    for copied in (copy.deepcopy(scale), pickle.loads(pickle.dumps(scale))):
        assert copied.factor == 4.0
        copied.detach()
    assert optimizer._optimizer_step_pre_hooks
