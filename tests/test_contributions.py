"""One place turns contributions to a step into unit gradients."""

import pytest
import torch

from lightning_graddiv import GradientMoments
from lightning_graddiv.contributions import ContributionSums


def sums_of(gradients, weights, groups=None):
    contributions = weights[:, None] * gradients
    by_group = [] if groups is None else [contributions[groups == g].sum(0).square().sum() for g in groups.unique()]
    weights_by_group = [] if groups is None else [weights[groups == g].sum() ** 2 for g in groups.unique()]
    return ContributionSums(
        float(contributions.square().sum()),
        float(contributions.sum(0).square().sum()),
        float(weights.sum()),
        float(weights.square().sum()),
        None if groups is None else float(sum(by_group)),
        None if groups is None else float(sum(weights_by_group)),
    )


GRADIENTS = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scale", [1.0, 1 / 12, 1 / 48])
def test_equal_weights_give_the_unit_gradients_back_whatever_the_scale(scale):
    moments = sums_of(GRADIENTS, torch.full((12,), scale, dtype=torch.float64)).moments()
    expected = GradientMoments.from_gradients(GRADIENTS)
    found = (moments.count, moments.sum_sq_norms, moments.sq_norm_of_sum)
    assert found == pytest.approx((12, expected.sum_sq_norms, expected.sq_norm_of_sum), rel=1e-12)


def test_eight_examples_with_the_weight_of_sixty_four_count_for_as_many_as_their_noise():
    weights = torch.cat([torch.full((64,), 1 / 64), torch.full((8,), 1 / 8)]).double() / 2
    assert sums_of(torch.ones(72, 1).double(), weights).count == pytest.approx(28.44, abs=0.01)


def test_the_signal_is_unbiased_with_unequal_weights():
    """Over all permutations of the gradients among the weights: the mean product of two different gradients."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(12, generator=generator, dtype=torch.float64) + 0.1
    pairs = (GRADIENTS @ GRADIENTS.T).sum() - GRADIENTS.square().sum()
    truth = float(pairs) / (12 * 11)
    found = []
    for _ in range(20000):
        order = torch.randperm(12, generator=generator)
        sums = sums_of(GRADIENTS[order], weights)
        found.append((sums.sq_norm_of_sum - sums.sum_sq_norms) / (sums.sum_weights**2 - sums.sum_sq_weights))
    found = torch.tensor(found)
    assert abs(float(found.mean()) - truth) < 4 * float(found.std()) / 20000**0.5


def test_groups_are_scaled_alike():
    weights, groups = torch.full((12,), 1 / 12, dtype=torch.float64), torch.arange(12) % 3
    moments = sums_of(GRADIENTS, weights, groups).moments()
    sums = [GRADIENTS[groups == g].sum(0) for g in range(3)]
    assert moments.group_sq_norms_of_sums == pytest.approx(float(sum(s.square().sum() for s in sums)))
    assert moments.group_sq_counts == pytest.approx(3 * 4**2)


def test_no_example_counts_for_nothing():
    assert ContributionSums(0.0, 0.0, 0.0, 0.0).count == 0


def test_what_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="sum_sq_norms"):
        ContributionSums(float("inf"), 1.0, 1.0, 0.5).moments()
