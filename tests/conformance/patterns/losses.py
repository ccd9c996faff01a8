"""Losses: what they add up, what they weigh, what they mix."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.conformance.patterns import MIXES, WEIGHS, N, Parts, Setup, T, faint, of_rows, pattern, plain, rows, tokens
from tests.conformance.patterns.layouts import unsampled
from tests.conformance.reference import curved


def net(outputs: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs))


@pattern()
def sum_over_the_batch():
    return Setup(net(), rows(4), lambda m, x: curved(m(x)).sum())


@pattern()
def sum_over_the_batch_times_a_constant():
    # The gradient that each example has alone is what is asked for, whatever multiple the batch takes of it.
    return Setup(net(), rows(4), lambda m, x: 10 * curved(m(x)).sum())


@pattern()
def sum_over_the_batch_by_the_root_of_its_size():
    return Setup(net(), rows(4), lambda m, x: curved(m(x)).sum() / len(x) ** 0.5)


@pattern()
def mean_over_examples_and_positions():
    return Setup(net(), rows(T, 4), lambda m, x: m(x).sin().mean())


def penalised(coefficient: float):
    def loss(m: nn.Module, x: Tensor) -> Tensor:
        return curved(m(x)).mean() + coefficient * sum(p.square().sum() for p in m.parameters())

    return loss


@pattern()
def mean_with_a_penalty_on_the_weights():
    return Setup(net(), rows(4), penalised(0.5))


@pattern()
def mean_with_a_small_penalty_on_the_weights():
    return Setup(net(), rows(4), penalised(1e-4))


@pattern()
def mean_with_a_tiny_penalty_on_the_weights():
    return Setup(net(), rows(4), penalised(1e-6))


@pattern()
def mean_with_a_penalty_on_one_weight():
    return Setup(net(), rows(4), lambda m, x: curved(m(x)).mean() + 0.1 * m[0].weight.abs().sum())


@pattern()
def mean_with_a_small_penalty_where_some_examples_are_fitted():
    scales = torch.tensor([1.0, 1e-4, 1.0, 1e-4, 1.0, 1e-4])

    def loss(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, scale = batch
        return (scale * curved(m(x))).mean() + 1e-5 * sum(p.square().sum() for p in m.parameters())

    return Setup(net(), (rows(4), scales), loss)


@pattern(refused=MIXES + "|" + WEIGHS)
def sum_with_a_penalty_on_the_weights():
    return Setup(net(), rows(4), lambda m, x: curved(m(x)).sum() + sum(p.square().sum() for p in m.parameters()))


@pattern(refused=WEIGHS)
def mean_over_the_tokens_of_padded_sequences():
    lengths = torch.tensor([5, 2, 3, 5, 1, 4])

    def loss(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, lengths = batch
        real = torch.arange(T) < lengths[:, None]
        return m(x)[real].square().sum(1).mean()

    return Setup(net(), (rows(T, 4), lengths), loss)


@pattern(refused=WEIGHS)
def cross_entropy_that_ignores_padding():
    targets = tokens(3, T)
    targets[:, 2:] = torch.where(torch.rand(N, T - 2) < 0.5, -100, targets[:, 2:])
    return Setup(net(), (rows(T, 4), targets), lambda m, b: F.cross_entropy(m(b[0]).mT, b[1]))


@pattern(refused=WEIGHS)
def cross_entropy_with_class_weights():
    weights = torch.tensor([1.0, 2.0, 5.0])
    targets = torch.tensor([0, 1, 2, 0, 1, 2])
    return Setup(net(), (rows(4), targets), lambda m, b: F.cross_entropy(m(b[0]), b[1], weight=weights))


@pattern(refused=WEIGHS)
def padding_that_only_unsampled_examples_have():
    lengths = torch.full((N,), T)
    lengths[unsampled()] = 2

    def loss(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, lengths = batch
        real = torch.arange(T) < lengths[:, None]
        return m(x)[real].square().sum(1).mean()

    return Setup(net(), (rows(T, 4), lengths), loss)


@pattern()
def mean_over_the_tokens_of_each_example_first():
    lengths = torch.tensor([5, 2, 3, 5, 1, 4])

    def loss(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, lengths = batch
        real = (torch.arange(T) < lengths[:, None]).to(x)
        return ((m(x).square().sum(2) * real).sum(1) / lengths).mean()

    return Setup(net(), (rows(T, 4), lengths), loss)


@pattern()
def label_smoothing():
    batch = rows(4), tokens(3)
    return Setup(net(), batch, lambda m, b: F.cross_entropy(m(b[0]), b[1], label_smoothing=0.1))


@pattern()
def weights_that_come_with_the_examples():
    return Setup(net(), (rows(4), torch.rand(N)), lambda m, b: (b[1] * curved(m(b[0]))).mean())


@pattern(refused=MIXES + "|" + WEIGHS + "|needs more than one example")
def contrast_within_the_batch():
    def loss(m: nn.Module, x: Tensor) -> Tensor:
        z = F.normalize(m(x), dim=1)
        return F.cross_entropy(z @ F.normalize(m(x.flip(1)), dim=1).T / 0.5, torch.arange(len(x)))

    return Setup(net(), rows(4), loss)


@pattern(refused=MIXES + "|" + WEIGHS)
def contrast_beside_a_loss_of_each_example():
    def loss(m: nn.Module, x: Tensor) -> Tensor:
        z = F.normalize(m(x), dim=1)
        return curved(m(x)).mean() + F.cross_entropy(z @ z.T, torch.arange(len(x)))

    return Setup(net(), rows(4), loss)


@pattern(refused=MIXES + "|" + WEIGHS)
def variance_over_the_batch():
    return Setup(net(), rows(4), lambda m, x: curved(m(x)).mean() + m(x).var(0, unbiased=False).sum())


@pattern(refused=MIXES + "|" + WEIGHS)
def hardest_examples_of_the_batch():
    return Setup(net(), rows(4), lambda m, x: curved(m(x)).topk(max(1, len(x) // 2)).values.mean())


@pattern(refused=MIXES + "|" + WEIGHS)
def root_of_the_mean():
    return Setup(net(), rows(4), lambda m, x: m(x).square().mean().sqrt())


@pattern(refused=MIXES + "|" + WEIGHS)
def pairs_that_only_unsampled_examples_form():
    groups = torch.arange(N)
    groups[unsampled()] = 99

    def loss(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, group = batch
        out = m(x)
        alike = (group[:, None] == group).to(x).triu(1)
        return (curved(out).sum() + (alike * torch.cdist(out, out).square()).sum()) / len(x)

    return Setup(net(), (rows(4), groups), loss)


@pattern(refused=MIXES + "|" + WEIGHS)
def mixup():
    def loss(m: nn.Module, x: Tensor) -> Tensor:
        return curved(m(0.6 * x + 0.4 * x[torch.randperm(len(x))])).mean()

    return Setup(net(), rows(4), loss)


@pattern(refused=MIXES + "|" + WEIGHS)
def mixup_of_what_lies_next_to_each_other():
    return Setup(net(), rows(4), lambda m, x: curved(m(0.6 * x + 0.4 * x.roll(1, 0))).mean())


@pattern()
def siamese_pairs():
    def loss(m: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        left, right, same = batch
        distance = (m(left) - m(right)).square().sum(1)
        return torch.where(same, distance, (2 - distance).relu()).mean()

    return Setup(net(), (rows(4), rows(4), torch.arange(N) % 2 == 0), loss)


@pattern()
def triplets():
    return Setup(
        net(),
        (rows(4), rows(4), rows(4)),
        lambda m, b: F.triplet_margin_loss(*(m(part) for part in b), margin=3.0),
    )


@pattern()
def gradient_penalty():
    def loss(m: nn.Module, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        out = m(x)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return curved(out).mean() + slope.square().sum(1).mean()

    return Setup(net(), rows(4), loss)


@pattern()
def gradient_penalty_alone():
    def loss(m: nn.Module, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(m(x).sum(), x, create_graph=True)
        return (slope.norm(dim=1) - 1).square().mean()

    return Setup(net(1), rows(4), loss)


@pattern()
def derivative_with_respect_to_the_input():
    # As in physics-informed networks: u'' + u, by two derivatives.
    def loss(m: nn.Module, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        u = m(x)
        (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
        return (second + u).square().mean()

    return Setup(nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)), rows(1), loss)


@pattern()
def derivative_by_forward_mode():
    def loss(m: nn.Module, x: Tensor) -> Tensor:
        out, slope = torch.func.jvp(m, (x,), (torch.ones_like(x),))
        return (curved(out) + slope.square().sum(1)).mean()

    return Setup(net(), rows(4), loss)


@pattern()
def zero_for_some_examples():
    return Setup(net(), (rows(4), torch.tensor([1.0, 0, 1, 0, 1, 1])), lambda m, b: (b[1] * curved(m(b[0]))).mean())


@pattern()
def nothing_at_all_for_some_examples():
    def loss(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, count = batch
        found = [curved(m(row[None]))[0] for row, k in zip(x, count, strict=True) if k > 0]
        return torch.stack(found).sum() if found else torch.zeros((), dtype=x.dtype)

    return Setup(net(), (rows(4), torch.tensor([1, 0, 2, 0, 1, 1])), loss)


@pattern(refused="needs more than one example")
def zero_for_every_example():
    return Setup(net(), rows(4), lambda m, x: 0 * curved(m(x)).mean())


@pattern()
def zero_for_every_sampled_example_of_one_layer():
    # A part of the network that only the others reach.
    def forward(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, use = batch
        return m.one(x) + use[:, None] * m.rare(x)

    use = torch.zeros(N)
    use[unsampled()] = 1.0
    return Setup(Parts(one=nn.Linear(4, 3), rare=nn.Linear(4, 3)), (rows(4), use), of_rows(forward))


@pattern(refused="not finite")
def infinite_for_the_whole_batch():
    def loss(m: nn.Module, x: Tensor) -> Tensor:
        return curved(m(x)).mean() * (torch.inf if len(x) > 1 else 1)

    return Setup(net(), rows(4), loss)


@pattern(refused="scalar loss was expected")
def one_number_for_each_row():
    # Each alone is a scalar; together they are not.
    return Setup(net(), rows(4), lambda m, x: curved(m(x)) if len(x) > 1 else curved(m(x)).mean())


@pattern()
def two_heads_and_two_losses():
    m = Parts(body=nn.Linear(4, 5), kind=nn.Linear(5, 3), size=nn.Linear(5, 1))

    def loss(m: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x, kind, size = batch
        hidden = m.body(x).tanh()
        return F.cross_entropy(m.kind(hidden), kind) + 0.3 * F.huber_loss(m.size(hidden)[:, 0], size)

    return Setup(m, (rows(4), tokens(3), torch.randn(N)), loss)


@pattern()
def variational_bound_without_noise():
    m = Parts(encode=nn.Linear(4, 6), decode=nn.Linear(3, 4))

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        mean, log_variance = m.encode(x).chunk(2, 1)
        divergence = 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum(1)
        return ((m.decode(mean) - x).square().sum(1) + divergence).mean()

    return Setup(m, rows(4), loss)


@pattern()
def adaptive_softmax():
    m = Parts(body=nn.Linear(4, 32), head=nn.AdaptiveLogSoftmaxWithLoss(32, 12, cutoffs=[3, 6]))
    return Setup(m, (rows(4), tokens(12)), lambda m, b: m.head(m.body(b[0]).tanh(), b[1]).loss)


@pattern()
def connectionist_temporal_classification():
    def loss(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, targets = batch
        steps = torch.full((len(x),), T)
        lengths = torch.full((len(x),), targets.shape[1])
        scores = m(x).log_softmax(2).transpose(0, 1)
        return F.ctc_loss(scores, targets, steps, lengths, reduction="sum") / len(x)

    return Setup(net(), (rows(T, 4), torch.randint(1, 3, (N, 2))), loss)


@pattern()
def loss_that_scales_itself_by_a_detached_number():
    def loss(m: nn.Module, x: Tensor) -> Tensor:
        each = curved(m(x))
        return (each.detach().sigmoid() * each).mean()

    return Setup(net(), rows(4), loss)


@pattern(refused=MIXES + "|" + WEIGHS)
def advantages_normalised_over_the_batch():
    def loss(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, reward = batch
        advantage = reward - reward.mean() if len(x) > 1 else reward
        return -(advantage * m(x).log_softmax(1)[:, 0]).mean()

    return Setup(net(), (rows(4), torch.randn(N)), loss)


@pattern(refused=MIXES + "|" + WEIGHS)
def balance_between_experts_over_the_batch():
    def loss(m: nn.Module, x: Tensor) -> Tensor:
        return plain(m, x) + m(x).softmax(1).mean(0).square().sum()

    return Setup(net(), rows(4), loss)


@pattern(refused=MIXES + "|" + WEIGHS, or_right=True)
def faint_contrast_within_the_batch():
    def loss(m: nn.Module, x: Tensor) -> Tensor:
        return plain(m, x) + faint() * m(x).var(0, unbiased=False).sum()

    return Setup(net(), rows(4), loss)
