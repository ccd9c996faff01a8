"""Moments between groups: unbiased whatever the groups' sizes, and exact on groups that can be added up by hand."""

import math
from functools import reduce
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_graddiv.errors import MeasurementError
from lightning_graddiv.per_example.losses import StepLoss
from lightning_graddiv.per_example.microbatch import GroupSums, group_moments
from tests.models import MLP, Case, example_of

DIMENSIONS = 50
REPEATS = 4000


def sums_of(gradients, sizes, weights):
    """GroupSums of mean gradients, shape (groups, d)."""
    groups = zip(gradients.square().sum(1).tolist(), sizes, weights, strict=True)
    return reduce(lambda a, b: a + b, (GroupSums.of_group(*group) for group in groups))


def moments_of(gradients, sizes, weights):
    mean = torch.tensor(weights, dtype=gradients.dtype) @ gradients
    return sums_of(gradients, sizes, weights).moments(float(mean.square().sum()))


GROUPS = {
    "equal": ([4, 4, 4], [1 / 3] * 3),
    "unequal": ([2, 3, 7], [2 / 12, 3 / 12, 7 / 12]),
    "single examples": ([1] * 5, [0.2] * 5),
    "means of unequal groups that count the same": ([1, 2, 9, 30], [0.25] * 4),
    "weights that have nothing to do with the sizes": ([8, 2, 5], [0.1, 0.7, 0.2]),
    "two": ([2, 6], [0.5, 0.5]),
}


@pytest.mark.parametrize("name", GROUPS)
def test_moments_of_groups_are_unbiased(name):
    """Examples are normal with a known mean G and covariance; what a probe estimates is known, too."""
    sizes, weights = GROUPS[name]
    generator = torch.Generator().manual_seed(0)
    mean = torch.linspace(-0.3, 0.4, DIMENSIONS, dtype=torch.float64)
    scales = torch.linspace(0.2, 1.5, DIMENSIONS, dtype=torch.float64)
    noise = torch.randn(REPEATS, len(sizes), DIMENSIONS, generator=generator, dtype=torch.float64) * scales
    drawn = mean + noise / torch.tensor(sizes, dtype=torch.float64)[:, None].sqrt()
    found = [moments_of(gradients, sizes, weights) for gradients in drawn]
    M = found[0].count
    second_moments = torch.tensor([m.sum_sq_norms / M for m in found])
    signals = torch.tensor([(m.sq_norm_of_sum - m.sum_sq_norms) / (M * (M - 1)) for m in found])
    signal = float(mean.square().sum())
    for estimates, expected in [(signals, signal), (second_moments, signal + float(scales.square().sum()))]:
        error = float(estimates.std()) / math.sqrt(REPEATS)
        assert error < 0.03 * expected  # the test can see a bias
        assert abs(float(estimates.mean()) - expected) < 4 * error


@pytest.mark.parametrize("name", ["equal", "unequal", "single examples"])
def test_groups_weighted_by_their_sizes_have_the_moments_of_all_their_examples(name):
    sizes, weights = GROUPS[name]
    torch.manual_seed(0)
    gradients = torch.randn(len(sizes), 7, dtype=torch.float64)
    moments = moments_of(gradients, sizes, weights)
    summed = torch.tensor(sizes, dtype=torch.float64) @ gradients
    assert moments.count == pytest.approx(sum(sizes), rel=1e-12)
    assert moments.sq_norm_of_sum == pytest.approx(float(summed.square().sum()), rel=1e-12)


def test_groups_of_one_have_the_moments_of_single_examples_but_for_the_pairs():
    """One example a group: the between-group trace is the sample covariance's."""
    sizes, weights = GROUPS["single examples"]
    torch.manual_seed(0)
    gradients = torch.randn(5, 7, dtype=torch.float64)
    moments = moments_of(gradients, sizes, weights)
    trace = float(gradients.var(0).sum())
    assert (moments.sum_sq_norms - moments.sq_norm_of_sum / 5) / 4 == pytest.approx(trace, rel=1e-12)


@pytest.mark.parametrize("name", GROUPS)
def test_groups_may_be_added_in_any_order_and_association(name):
    sizes, weights = GROUPS[name]
    parts = [GroupSums.of_group(1.5 * j + 1, m, v) for j, (m, v) in enumerate(zip(sizes, weights, strict=True))]
    left = reduce(lambda a, b: a + b, parts, GroupSums())
    right = reduce(lambda a, b: b + a, reversed(parts))
    assert left.moments(0.5).sum_sq_norms == pytest.approx(right.moments(0.5).sum_sq_norms, rel=1e-12)
    for name in ("weighted_sq_norms", "spread", "inverse_count"):
        assert getattr(left, name) == pytest.approx(getattr(right, name), rel=1e-12)


@pytest.mark.parametrize("sums", [GroupSums(), GroupSums.of_group(2.0, 8, 1.0)], ids=["none", "one"])
def test_a_single_group_has_nothing_to_be_compared_with(sums):
    with pytest.raises(MeasurementError, match="One group") as refused:
        sums.moments(1.0)
    assert not refused.value.lasting


@pytest.mark.parametrize("rounding", [0.0, 1e-9])
def test_groups_that_agree_have_no_noise_and_rounding_does_not_make_it_negative(rounding):
    sums = GroupSums.of_group(3.0, 4, 0.5) + GroupSums.of_group(3.0, 4, 0.5)
    moments = sums.moments(3.0 * (1 + rounding))
    assert moments.sum_sq_norms == pytest.approx(moments.sq_norm_of_sum / moments.count, rel=1e-15)


def part_of(batch, examples, total):
    parts = [example_of(batch, i, total) for i in examples]
    return tuple(torch.cat(leaves) for leaves in zip(*parts, strict=True))


def reference(module, batch, total, groups, loss_fn=None):
    """Moments as the paper has them for equal groups, from one backward pass for each of consecutive groups."""
    bounds = [group * total // groups for group in range(groups + 1)]
    gradients, sizes = [], []
    for start, stop in pairwise(bounds):
        part = part_of(batch, range(start, stop), total)
        module.zero_grad()
        (loss_fn(module, part) if loss_fn else module.training_step(part, 0)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
        sizes.append(stop - start)
    return torch.stack(gradients), sizes


def closed_form(gradients, sizes):
    """(M, S1, S2) from the analysis of variance: the sums of squares between groups, over k - 1, is the trace."""
    m = torch.tensor(sizes, dtype=torch.float64)[:, None]
    total, mean = float(m.sum()), (m * gradients).sum(0) / m.sum()
    trace = float((m * (gradients - mean).square()).sum()) / (len(sizes) - 1)
    P = float(mean.square().sum())
    return total, total * P + (total - 1) * trace, total**2 * P


def assert_moments(moments, expected, rel=1e-10):
    assert (moments.count, moments.sum_sq_norms, moments.sq_norm_of_sum) == pytest.approx(expected, rel=rel)


@pytest.mark.parametrize(
    ("total", "asked", "made"),
    [
        (64, None, 4),
        (24, None, 3),
        (16, None, 2),
        (13, None, 2),
        (4, None, 2),
        (20, 3, 3),
        (6, 8, 3),
        (5, 2, 2),
        (19, 8, 8),
    ],
)
def test_a_batch_is_split_into_groups_of_at_least_two(total, asked, made):
    module, batch = Case(MLP).build(total)
    moments = group_moments(StepLoss(module), batch, total, *([] if asked is None else [asked]))
    gradients, sizes = reference(module, batch, total, made)
    assert min(sizes) >= 2
    assert_moments(moments, closed_form(gradients, sizes))


@pytest.mark.parametrize(("total", "groups"), [(3, 8), (2, 8), (1, 8), (20, 1)])
def test_what_does_not_make_two_groups_of_two_is_refused(total, groups):
    module, batch = Case(MLP).build(total)
    with pytest.raises(MeasurementError, match=f"A batch of {total} examples does not make two groups") as refused:
        group_moments(StepLoss(module), batch, total, groups)
    assert refused.value.lasting


def contrast(net, batch):
    """Every example is a negative of all others: a batch of one has no loss."""
    left, right = (F.normalize(net(view), dim=1) for view in batch)
    if len(left) < 2:
        raise ValueError("no negatives")
    return F.cross_entropy(5 * left @ right.T, torch.arange(len(left)))


NETS = {
    "contrastive loss": lambda: nn.Linear(5, 4),
    "batch normalisation": lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)),
}


@pytest.mark.parametrize("name", NETS)
def test_losses_that_mix_the_examples_of_a_batch_are_measured(name):
    torch.manual_seed(0)
    net, batch = NETS[name]().double(), (torch.randn(12, 5).double(), torch.randn(12, 5).double())
    before = [buffer.clone() for buffer in net.buffers()]
    moments = group_moments(StepLoss(net, loss_fn=contrast), batch, 12, 4)
    assert all(torch.equal(a, b) for a, b in zip(before, net.buffers(), strict=True))
    assert all(parameter.grad is None for parameter in net.parameters())
    assert_moments(moments, closed_form(*reference(net, batch, 12, 4, contrast)))


def test_identical_groups_have_no_noise():
    module, (x, y) = Case(MLP).build(2)
    moments = group_moments(StepLoss(module), (x.repeat(4, 1), y.repeat(4)), 8)
    assert moments.sum_sq_norms * 8 == pytest.approx(moments.sq_norm_of_sum, rel=1e-12)


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3, dtype=torch.complex128))

    def forward(self, x):
        return (x.to(self.weight.dtype) @ self.weight).abs()


def test_complex_parameters_count_with_their_modulus():
    torch.manual_seed(0)
    net, batch = Complex(), (torch.randn(12, 5).double(), torch.arange(12) % 3)

    def classify(net, batch):
        return F.cross_entropy(net(batch[0]), batch[1])

    moments = group_moments(StepLoss(net, loss_fn=classify), batch, 12, 3)
    gradients, sizes = reference(net, batch, 12, 3, classify)
    assert_moments(moments, closed_form(torch.cat([gradients.real, gradients.imag], 1), sizes))


def test_low_precision_gradients_are_added_up_in_single_precision():
    module, batch = Case(MLP).build(64, torch.bfloat16)
    moments = group_moments(StepLoss(module), batch, 64, 8)
    gradients, sizes = reference(module, batch, 64, 8)
    assert_moments(moments, closed_form(gradients.double(), sizes), rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_group_that_is_not_finite_gives_no_number(bad):
    module, (x, y) = Case(MLP).build(8)
    x[5, 0] = bad
    with pytest.raises(MeasurementError, match="not finite") as refused:
        group_moments(StepLoss(module), (x, y), 8)
    assert not refused.value.lasting


class RootOfZero(MLP):
    """The loss is finite where its gradient is not."""

    def training_step(self, batch, batch_idx):
        return (self.logits(batch[0]) * batch[0][:, :1]).square().sum(1).sqrt().mean()


def test_a_gradient_that_is_not_finite_gives_no_number():
    module, (x, y) = Case(RootOfZero).build(8)
    x[5] = 0
    with pytest.raises(MeasurementError, match=r"gradient.*not finite"):
        group_moments(StepLoss(module), (x, y), 8)
