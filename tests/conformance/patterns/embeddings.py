"""Tables that examples take rows from."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.conformance.patterns import N, Parts, Setup, T, of_rows, pattern, plain, rows, tokens


def classifier(**options: object) -> nn.Module:
    return nn.Sequential(nn.Embedding(7, 4, **options), nn.Flatten(), nn.Linear(4 * T, 3))


@pattern()
def repeated_tokens():
    return Setup(classifier(), torch.tensor([[1, 1, 1, 1, 1], [1, 2, 1, 2, 1], [0, 1, 2, 3, 4]] * 2), plain)


@pattern()
def padding_tokens():
    x = tokens(7, T)
    x[:, 3:] = 2
    x[0] = 2  # nothing but padding
    return Setup(classifier(padding_idx=2), x, plain)


@pattern()
def padding_tokens_counted_from_the_end():
    x = tokens(7, T)
    x[:, 3:] = 6
    return Setup(classifier(padding_idx=-1), x, plain)


@pattern(refused="mixes the examples|weighs the examples|or mixes them")
def table_that_scales_by_frequency_in_the_batch():
    return Setup(classifier(scale_grad_by_freq=True), tokens(3, T), plain)


@pattern(refused="writes to `0.weight`")
def table_that_is_renormalised():
    return Setup(classifier(max_norm=0.5), tokens(7, T), plain)


@pattern()
def frozen_table_that_is_renormalised():
    net = classifier(max_norm=0.5)
    net[0].requires_grad_(False)
    return Setup(net, tokens(7, T), plain)


@pattern()
def sparse_gradient():
    return Setup(classifier(sparse=True), tokens(7, T), plain)


@pattern()
def bag_of_rows():
    return Setup(nn.Sequential(nn.EmbeddingBag(7, 4, mode="sum"), nn.Tanh(), nn.Linear(4, 3)), tokens(7, T), plain)


@pattern()
def bag_of_rows_by_their_maximum():
    return Setup(nn.Sequential(nn.EmbeddingBag(7, 4, mode="max"), nn.Tanh(), nn.Linear(4, 3)), tokens(7, T), plain)


@pattern()
def bag_of_weighted_rows():
    net = Parts(bag=nn.EmbeddingBag(7, 4, mode="sum", padding_idx=0))
    return Setup(net, (tokens(7, T), rows(T)), of_rows(lambda m, b: m.bag(b[0], per_sample_weights=b[1])))


@pattern(refused="cannot be differentiated on a part of its batch|mixes the examples")
def bags_in_one_long_list():
    # The list has no row for each example: only the collate function could take it apart.
    def alone(batch, example, examples):
        indices, offsets = batch
        ends = [*offsets.tolist()[1:], len(indices)]
        return indices[offsets[example] : ends[example]], offsets[:1]

    net = Parts(bag=nn.EmbeddingBag(7, 4, mode="sum"))
    batch = torch.randint(7, (15,)), torch.tensor([0, 2, 5, 6, 10, 12])
    return Setup(net, batch, of_rows(lambda m, b: m.bag(*b)), pick=alone)


@pattern()
def table_of_positions():
    net = Parts(word=nn.Embedding(7, 4), position=nn.Embedding(T, 4), head=nn.Linear(4, 3))
    return Setup(
        net, tokens(7, T), of_rows(lambda m, x: m.head((m.word(x) + m.position(torch.arange(x.shape[1]))).tanh()))
    )


@pattern()
def table_of_as_many_positions_as_examples():
    net = Parts(word=nn.Embedding(7, 4), position=nn.Embedding(N, 4), head=nn.Linear(4, 3))
    return Setup(
        net, tokens(7, N), of_rows(lambda m, x: m.head((m.word(x) + m.position(torch.arange(x.shape[1]))).tanh()))
    )


@pattern()
def table_of_positions_with_a_row_of_its_own():
    net = Parts(word=nn.Embedding(7, 4), position=nn.Embedding(T, 4), head=nn.Linear(4, 3))
    return Setup(
        net,
        tokens(7, T),
        of_rows(lambda m, x: m.head((m.word(x) + m.position(torch.arange(x.shape[1])[None])).tanh())),
    )


@pattern()
def one_table_for_two_inputs():
    net = Parts(table=nn.Embedding(7, 4))
    return Setup(
        net, (tokens(7), tokens(7, 3)), of_rows(lambda m, b: (m.table(b[0])[:, None] * m.table(b[1])).tanh().sum(1))
    )


@pattern()
def one_number_for_each_example():
    return Setup(nn.Sequential(nn.Embedding(7, 4), nn.Tanh(), nn.Linear(4, 3)), tokens(7), plain)


@pattern()
def short_token_numbers():
    return Setup(classifier(), tokens(7, T).int(), plain)


@pattern()
def table_used_as_a_matrix():
    net = Parts(table=nn.Embedding(7, 4), head=nn.Linear(4, 3))
    return Setup(net, tokens(7, T), of_rows(lambda m, x: m.head(F.one_hot(x, 7).to(m.table.weight) @ m.table.weight)))


@pattern()
def functional_lookup_beside_the_call():
    net = Parts(table=nn.Embedding(7, 4))
    return Setup(net, tokens(7, T), of_rows(lambda m, x: m.table(x).tanh() + F.embedding(x.flip(1), m.table.weight)))


@pattern()
def recommender_with_bias_tables():
    net = Parts(user=nn.Embedding(7, 4), item=nn.Embedding(9, 4), bias=nn.Embedding(9, 1))

    def forward(net, batch):
        user, item = batch
        return (net.user(user) * net.item(item)).sum(1, keepdim=True) + net.bias(item)

    return Setup(net, (tokens(7), tokens(9)), of_rows(forward))


@pattern()
def pretrained_table_with_negative_samples():
    net = Parts(table=nn.Embedding(7, 4), context=nn.Embedding(7, 4))

    def loss(net, batch):
        word, near, far = batch
        v = net.table(word)
        right = F.logsigmoid((v * net.context(near)).sum(1))
        wrong = F.logsigmoid(-(net.context(far) @ v[..., None]).squeeze(-1)).sum(1)
        return -(right + wrong).mean()

    return Setup(net, (tokens(7), tokens(7), tokens(7, 3)), loss)
