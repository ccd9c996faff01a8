"""Where the examples lie in what a layer sees: not always first, not always in order, not always all."""

import random

import torch
from torch import Tensor, nn

from tests.conformance.patterns import MIXES, N, Parts, Setup, T, of_rows, parameter, pattern, rows

SAMPLED = 4
"""How many examples a proof may look at; what only the others do must show as well."""


MANY = 32
"""Examples where two neighbours at the end are in no sample of the first seed."""

LAST_UNSAMPLED = MANY - 2


def two_layers(width: int = 4) -> Parts:
    return Parts(one=nn.Linear(4, width), two=nn.Linear(width, 3))


@pattern()
def time_first_inside():
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return net.two(net.one(x.transpose(0, 1)).tanh()).transpose(0, 1)

    return Setup(two_layers(), rows(T, 4), of_rows(forward))


@pattern()
def time_first_with_as_many_steps_as_examples():
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return net.two(net.one(x.transpose(0, 1)).tanh()).transpose(0, 1)

    return Setup(two_layers(), rows(N, 4), of_rows(forward))


@pattern()
def time_first_with_as_many_steps_as_sampled_examples():
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return net.two(net.one(x.transpose(0, 1)).tanh()).transpose(0, 1)

    return Setup(two_layers(), rows(SAMPLED, 4), of_rows(forward))


def columns(batch: tuple[Tensor, Tensor], example: int, examples: int) -> tuple[Tensor, Tensor]:
    return batch[0][:, example : example + 1], batch[1][example : example + 1]


def time_first_batch(steps: int) -> Setup:
    def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return (net.two(net.one(x).tanh()).mean(0) - y).square().sum(1).mean()

    return Setup(two_layers(), (torch.randn(steps, N, 4), rows(3)), loss, pick=columns)


@pattern(refused=MIXES + "|part of its batch|rows are not examples")
def time_first_in_the_batch_itself():
    return time_first_batch(T)


@pattern(refused=MIXES + "|part of its batch|rows are not examples")
def time_first_in_the_batch_itself_with_as_many_steps_as_examples():
    return time_first_batch(N)


@pattern()
def time_last():
    def forward(net: nn.Module, x: Tensor) -> Tensor:  # (n, d, T)
        return net.two(net.one(x.transpose(1, 2)).tanh())

    return Setup(two_layers(), rows(4, T), of_rows(forward))


@pattern()
def positions_folded_into_the_batch():
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return net.two(net.one(x.reshape(-1, 4)).tanh()).view(len(x), T, 3)

    return Setup(two_layers(), rows(T, 4), of_rows(forward))


@pattern()
def positions_folded_time_first():
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return net.two(net.one(x.transpose(0, 1).reshape(-1, 4)).tanh()).view(T, len(x), 3).transpose(0, 1)

    return Setup(two_layers(), rows(T, 4), of_rows(forward))


@pattern()
def two_views_one_after_the_other():
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        z = net.two(net.one(torch.cat([x, x.flip(1)])).tanh())
        return z[: len(x)] * z[len(x) :]

    return Setup(two_layers(), rows(4), of_rows(forward))


@pattern()
def two_views_side_by_side():
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        z = net.two(net.one(torch.stack([x, x.flip(1)], 1).flatten(0, 1)).tanh())
        return z[::2] * z[1::2]

    return Setup(two_layers(), rows(4), of_rows(forward))


@pattern()
def two_views_and_a_single_one():
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        z = net.one(torch.cat([x, x.flip(1)])).tanh()
        return net.two(z[: len(x)] * z[len(x) :])

    return Setup(two_layers(), rows(4), of_rows(forward))


@pattern()
def as_many_positions_as_examples():
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return net.two(net.one(x).tanh()).cumsum(1)

    return Setup(two_layers(), rows(N, 4), of_rows(forward))


@pattern()
def rows_turned_around_between_two_layers():
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return net.two(net.one(x).tanh().flip(0)).flip(0)

    return Setup(two_layers(), rows(4), of_rows(forward))


@pattern()
def rows_permuted_between_two_layers():
    order = torch.tensor([3, 0, 5, 1, 4, 2])

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        chosen = order[order < len(x)]
        return net.two(net.one(x).tanh()[chosen])[chosen.argsort()]

    return Setup(two_layers(), rows(4), of_rows(forward))


@pattern()
def rows_permuted_and_never_put_back():
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return net.two(net.one(x).tanh().roll(1, 0))

    return Setup(two_layers(), rows(4), of_rows(forward))


def sorting(net: nn.Module, x: Tensor) -> Tensor:
    order = x[:, 0].argsort()
    return net.two(net.one(x).tanh()[order])[order.argsort()]


@pattern()
def rows_sorted_by_content():
    return Setup(two_layers(), rows(4), of_rows(sorting))


@pattern()
def rows_sorted_already():
    x = rows(4)
    return Setup(two_layers(), x[x[:, 0].argsort()], of_rows(sorting))


def unsampled() -> list[int]:
    """Two examples that a proof on the first seed's sample does not look at."""
    return sorted(set(range(N)) - set(random.Random(0).sample(range(N), SAMPLED)))


@pattern()
def rows_sorted_but_for_two():
    x = rows(4)
    x[:, 0] = torch.arange(N)
    first, second = unsampled()
    x[first, 0], x[second, 0] = float(second), float(first)
    return Setup(two_layers(), x, of_rows(sorting))


@pattern()
def rows_grouped_by_kind_where_only_two_move():
    # As in a mixture of experts that sorts rows by expert: here all kinds but one are zero.
    def forward(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, kind = batch
        order = kind.argsort(stable=True)
        return net.two(net.one(x).tanh()[order])[order.argsort()]

    kind = torch.zeros(MANY, dtype=torch.long)
    kind[LAST_UNSAMPLED] = 1
    kind[LAST_UNSAMPLED + 2 :] = 2
    return Setup(two_layers(), (torch.randn(MANY, 4), kind), of_rows(forward), examples=MANY)


@pattern()
def positions_chosen_by_a_mask_as_many_in_each_example():
    chosen = torch.stack([torch.randperm(T) < 2 for _ in range(N)])
    return masked_head(chosen)


@pattern()
def positions_chosen_by_a_mask():
    chosen = torch.stack([torch.randperm(T) <= i % 3 for i in range(N)])
    return masked_head(chosen)


@pattern()
def positions_chosen_by_a_mask_as_many_in_each_but_two():
    counts = [2] * N
    first, second = unsampled()
    counts[first], counts[second] = 3, 1
    return masked_head(torch.stack([torch.randperm(T) < count for count in counts]))


@pattern()
def positions_chosen_by_a_mask_as_many_in_each_but_two_neighbours():
    # 3 and 1 where all others have 2: the rows of every other example lie where they would lie anyway.
    counts = [2] * MANY
    counts[LAST_UNSAMPLED], counts[LAST_UNSAMPLED + 1] = 3, 1
    setup = masked_head(torch.stack([torch.randperm(T) < count for count in counts]))
    setup.examples = MANY
    return setup


def masked_head(chosen: Tensor) -> Setup:
    """A head that sees the chosen positions only, as in masked language models."""

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, chosen = batch
        hidden = net.one(x).tanh()
        errors = net.two(hidden[chosen]).square().sum(1)
        by_position = torch.zeros(chosen.shape, dtype=x.dtype).masked_scatter(chosen, errors)
        return (by_position.sum(1) / chosen.sum(1)).mean()

    return Setup(two_layers(), (torch.randn(len(chosen), T, 4), chosen), loss)


def experts(net: nn.Module, x: Tensor) -> Tensor:
    choice = net.gate(x).argmax(1)
    out = torch.zeros_like(x)
    for index, expert in enumerate(net.experts):
        out[choice == index] = expert(x[choice == index])
    return out * net.gate(x).softmax(1).amax(1, keepdim=True)


@pattern()
def experts_that_see_some_rows_each():
    net = Parts(gate=nn.Linear(4, 3), experts=nn.ModuleList(nn.Linear(4, 4) for _ in range(3)))
    return Setup(net, 2 * rows(4), of_rows(experts))


@pattern()
def expert_that_sees_no_row():
    net = Parts(gate=nn.Linear(4, 3), experts=nn.ModuleList(nn.Linear(4, 4) for _ in range(3)))
    with torch.no_grad():
        net.gate.bias[1] = -1e3
    return Setup(net, rows(4), of_rows(experts))


@pattern()
def expert_that_sees_every_row():
    net = Parts(gate=nn.Linear(4, 3), experts=nn.ModuleList(nn.Linear(4, 4) for _ in range(3)))
    with torch.no_grad():
        net.gate.bias[1] = 1e3
    return Setup(net, rows(4), of_rows(experts))


@pattern()
def expert_that_only_unsampled_rows_see():
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        rare = x[:, 0] > 5
        out = net.one(x)
        out[rare] = net.other(x[rare])
        return net.two(out.tanh())

    x = rows(4)
    x[unsampled(), 0] = 6.0
    return Setup(Parts(one=nn.Linear(4, 4), other=nn.Linear(4, 4), two=nn.Linear(4, 3)), x, of_rows(forward))


@pattern()
def weight_that_only_unsampled_rows_use_outside_of_its_layer():
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        rare = (x[:, :1] > 5).to(x)
        return net.one(x).tanh() + rare * (x @ net.one.weight.T).cos()

    x = rows(4)
    x[unsampled(), 0] = 6.0
    return Setup(two_layers(), x, of_rows(forward))


@pattern()
def experts_by_a_dense_weighting():
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        shares = net.gate(x).softmax(1)
        return torch.einsum("ne,neo->no", shares, torch.stack([expert(x) for expert in net.experts], 1))

    net = Parts(gate=nn.Linear(4, 3), experts=nn.ModuleList(nn.Linear(4, 4) for _ in range(3)))
    return Setup(net, rows(4), of_rows(forward))


@pattern()
def experts_as_one_stacked_parameter():
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return torch.bmm(net.weights[net.gate(x).argmax(1)], x[..., None])[..., 0] * net.gate(x).amax(1, keepdim=True)

    return Setup(Parts(gate=nn.Linear(4, 3), weights=parameter(3, 4, 4)), rows(4), of_rows(forward))


@pattern()
def experts_with_a_capacity():
    # Rows above the capacity are dropped: which ones depends on the batch, unless there is room for all.
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        choice = net.gate(x).argmax(1)
        slots = torch.zeros(3, len(x), 4, dtype=x.dtype)
        place = torch.stack([(choice[:i] == choice[i]).sum() for i in range(len(x))])
        slots[choice, place] = x
        return net.expert(slots)[choice, place] * net.gate(x).amax(1, keepdim=True)

    return Setup(Parts(gate=nn.Linear(4, 3), expert=nn.Linear(4, 4)), 2 * rows(4), of_rows(forward))


@pattern()
def groups_of_rows_that_are_not_examples_of_their_own():
    # (n, k, d) with a layer over k positions of (n k) rows in blocks of another size.
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        blocks = x.reshape(len(x) * 2, 2, 4)
        return net.two(net.one(blocks).tanh()).view(len(x), 4, 3)

    return Setup(two_layers(), rows(4, 4), of_rows(forward))


@pattern()
def examples_last():
    def forward(net: nn.Module, x: Tensor) -> Tensor:  # a position's features for all examples: (T, d, n) -> (T, n, d)
        return net.two(net.one(x.permute(1, 2, 0).transpose(1, 2)).tanh()).transpose(0, 1)

    return Setup(two_layers(), rows(T, 4), of_rows(forward))


@pattern()
def examples_third():
    def forward(net: nn.Module, x: Tensor) -> Tensor:  # (a, b, n, d)
        return net.two(net.one(x.permute(1, 2, 0, 3)).tanh()).permute(2, 0, 1, 3)

    return Setup(two_layers(), rows(2, 3, 4), of_rows(forward))


@pattern()
def one_row_of_a_layer_for_each_example_and_a_shared_one():
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        out = net.one(torch.cat([x, torch.ones(1, 4, dtype=x.dtype)]))
        return net.two(out[:-1].tanh() + out[-1:])

    return Setup(two_layers(), rows(4), of_rows(forward))


@pattern()
def memory_shared_by_all_examples():
    # As many rows as two for each sampled example, yet no example's own.
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return (x @ net.one(net.memory).tanh().T).softmax(1) @ net.memory

    return Setup(Parts(memory=nn.Buffer(torch.randn(2 * SAMPLED, 4)), one=nn.Linear(4, 4)), rows(4), of_rows(forward))


@pattern()
def attention_across_heads_folded_into_the_batch():
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        heads = net.one(x).unflatten(2, (2, 2)).transpose(1, 2).flatten(0, 1)  # (n h, T, d / h)
        mixed = net.inner((heads @ heads.mT).softmax(-1) @ heads)
        return net.two(mixed.unflatten(0, (len(x), 2)).transpose(1, 2).flatten(2))

    net = Parts(one=nn.Linear(4, 4), inner=nn.Linear(2, 2), two=nn.Linear(4, 3))
    return Setup(net, rows(T, 4), of_rows(forward))


@pattern()
def windows_folded_into_the_batch():
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        windows = x.unfold(1, 2, 1).transpose(2, 3).flatten(0, 1)  # (n windows, 2, d)
        return net.two(net.one(windows).tanh().sum(1)).view(len(x), -1)

    return Setup(two_layers(), rows(T, 4), of_rows(forward))
