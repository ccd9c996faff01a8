"""Policies: an estimate in, the largest effective batch out."""

import dataclasses

import pytest
import torch

from lightning_graddiv import DiversityBound, GradientMoments, RunState, estimate_diversity

ESTIMATE = estimate_diversity([GradientMoments.from_gradients(torch.eye(8))], dataset_size=8)


def test_the_bound_acts_on_the_lower_end():
    estimate = dataclasses.replace(ESTIMATE, bound=100.0, lower=60.0, upper=200.0)
    assert DiversityBound(0.5)(estimate, RunState(batch_size=8)) == 31.0


def test_at_a_bound_of_one_no_batch_grows():
    assert DiversityBound(0.5)(dataclasses.replace(ESTIMATE, lower=1.0), RunState(batch_size=1)) < 2


@pytest.mark.parametrize("delta", [0.0, -1.0, float("nan")])
def test_delta_must_be_positive(delta):
    with pytest.raises(ValueError, match="Expected argument `delta` to be positive"):
        DiversityBound(delta)
