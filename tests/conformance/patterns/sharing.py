"""Parameters that are used more than once, in part, outside of their layer, or not at all."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from tests.conformance.patterns import N, Parts, Setup, T, faint, of_rows, parameter, pattern, plain, rows, tokens
from tests.conformance.reference import curved


@pattern()
def tied_embedding_and_head():
    net = Parts(embed=nn.Embedding(11, 4), head=nn.Linear(4, 11, bias=False))
    net.head.weight = net.embed.weight
    return Setup(net, tokens(11, T), of_rows(lambda m, x: m.head(m.embed(x).tanh())))


@pattern()
def tied_embedding_and_functional_head():
    net = Parts(embed=nn.Embedding(11, 4), mix=nn.Linear(4, 4))
    return Setup(net, tokens(11, T), of_rows(lambda m, x: F.linear(m.mix(m.embed(x)).tanh(), m.embed.weight)))


@pattern()
def bare_parameters_that_broadcast():
    net = Parts(first=nn.Linear(4, 3), scale=parameter(3), shift=parameter(1, 3))
    return Setup(net, rows(4), of_rows(lambda m, x: m.scale * m.first(x).tanh() + m.shift))


@pattern()
def scalar_temperature():
    net = Parts(first=nn.Linear(4, 3), temperature=parameter())
    return Setup(net, rows(4), of_rows(lambda m, x: (m.first(x) * m.temperature.exp()).log_softmax(1)))


@pattern()
def bare_parameter_indexed_by_tokens():
    net = Parts(table=parameter(7, 4), head=nn.Linear(4, 3))
    return Setup(net, tokens(7, T), of_rows(lambda m, x: m.head(m.table[x])))


@pattern()
def weight_used_only_functionally():
    return Setup(Parts(layer=nn.Linear(4, 3)), rows(4), of_rows(lambda m, x: F.linear(x, m.layer.weight)))


@pattern()
def weight_used_functionally_beside_the_call():
    net = Parts(layer=nn.Linear(4, 4))
    return Setup(net, rows(4), of_rows(lambda m, x: m.layer(x).tanh() + F.linear(x.cos(), m.layer.weight)))


@pattern()
def weight_used_faintly_beside_the_call():
    net = Parts(layer=nn.Linear(4, 4))
    return Setup(net, rows(4), of_rows(lambda m, x: m.layer(x).tanh() + faint() * F.linear(x.cos(), m.layer.weight)))


@pattern()
def bias_used_beside_the_call():
    return Setup(Parts(layer=nn.Linear(4, 4)), rows(4), of_rows(lambda m, x: m.layer(x).tanh() * m.layer.bias))


@pattern()
def linear_and_its_transpose():
    net = Parts(encode=nn.Linear(6, 3), shift=parameter(6))
    return Setup(net, rows(6), of_rows(lambda m, x: F.linear(m.encode(x).tanh(), m.encode.weight.t(), m.shift) - x))


@pattern()
def tied_linears_on_sequences_of_different_length():
    net = Parts(short=nn.Linear(4, 4), long=nn.Linear(4, 4))
    net.long.weight = net.short.weight
    return Setup(net, rows(T, 4), of_rows(lambda m, x: m.long(x).sum(1) + m.short(x[:, :2]).tanh().sum(1)))


@pattern()
def tied_biases():
    net = Parts(one=nn.Linear(4, 4), two=nn.Linear(4, 4))
    net.two.bias = net.one.bias
    return Setup(net, rows(4), of_rows(lambda m, x: m.two(m.one(x).tanh())))


@pattern()
def one_module_under_two_names():
    layer = nn.Linear(4, 4)
    return Setup(Parts(one=layer, two=layer), rows(4), of_rows(lambda m, x: m.two(m.one(x).tanh())))


@pattern()
def module_reused_in_a_loop():
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        for _ in range(4):
            x = net.layer(x).tanh()
        return x

    return Setup(Parts(layer=nn.Linear(4, 4)), rows(4), of_rows(forward))


@pattern()
def module_reused_on_every_position():
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        state = torch.zeros_like(x[:, 0])
        for position in range(x.shape[1]):
            state = net.cell(torch.cat([state, x[:, position]], 1)).tanh()
        return state

    return Setup(Parts(cell=nn.Linear(8, 4)), rows(T, 4), of_rows(forward))


@pattern()
def module_reused_as_often_as_the_content_says():
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        out = net.layer(x)
        while bool((out.abs().amax() < 2).any()):
            out = net.layer(out) + 0.1 * x
        return out

    # Whether a row goes on depends on the others, but not in a batch of one; weights that grow end the loop.
    net = Parts(layer=nn.Linear(4, 4))
    with torch.no_grad():
        net.layer.weight.copy_(3 * torch.eye(4) + 0.1 * torch.randn(4, 4))
    return Setup(net, torch.ones(N, 4) + 0.01 * rows(4), of_rows(forward))


@pattern()
def tied_convolutions():
    net = Parts(one=nn.Conv2d(2, 2, 3, padding=1), two=nn.Conv2d(2, 2, 3, stride=2, dilation=2))
    net.two.weight = net.one.weight
    return Setup(net, rows(2, 7, 7), of_rows(lambda m, x: m.two(m.one(x).tanh())))


@pattern()
def frozen_parameters():
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    net[2].requires_grad_(False)
    return Setup(net, rows(4), plain)


@pattern()
def frozen_first_layer():
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    net[0].requires_grad_(False)
    return Setup(net, rows(4), plain)


@pattern()
def frozen_biases():
    net = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3), nn.LayerNorm(3))
    for name, held in net.named_parameters():
        held.requires_grad_(not name.endswith("bias"))
    return Setup(net, rows(2, 5), plain)


@pattern()
def only_biases_trained():
    net = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3), nn.LayerNorm(3))
    for name, held in net.named_parameters():
        held.requires_grad_(name.endswith("bias"))
    return Setup(net, rows(2, 5), plain)


@pattern()
def low_rank_adapters():
    net = Parts(base=nn.Linear(6, 6), down=nn.Linear(6, 2, bias=False), up=nn.Linear(2, 6, bias=False))
    net.base.requires_grad_(False)
    return Setup(net, rows(T, 6), of_rows(lambda m, x: m.base(x) + 0.5 * m.up(m.down(x))))


@pattern()
def low_rank_adapters_merged_into_the_weight():
    net = Parts(base=nn.Linear(6, 6), down=parameter(2, 6), up=parameter(6, 2))
    net.base.weight.requires_grad_(False)
    return Setup(
        net, rows(6), of_rows(lambda m, x: F.linear(x, m.base.weight + m.up @ m.down, m.base.bias).tanh() + m.base(x))
    )


@pattern()
def unused_parameter():
    return Setup(Parts(used=nn.Linear(4, 3), unused=nn.Linear(4, 3)), rows(4), of_rows(lambda m, x: m.used(x)))


@pattern()
def parameter_without_entries():
    # A width that a configuration sets to nothing.
    net = Parts(used=nn.Linear(4, 3), none=parameter(0, 4), back=parameter(3, 0))
    return Setup(net, rows(4), of_rows(lambda m, x: m.used(x) + x @ m.none.T @ m.back.T))


@pattern()
def layer_called_and_its_output_thrown_away():
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        net.idle(x)
        return net.used(x) + 0 * net.zeroed(x)

    net = Parts(used=nn.Linear(4, 3), idle=nn.Linear(4, 3), zeroed=nn.Linear(4, 3))
    return Setup(net, rows(4), of_rows(forward))


@pattern()
def complex_parameters():
    net = Parts(layer=nn.Linear(4, 3, dtype=torch.complex128))
    return Setup(net, torch.randn(N, 4, dtype=torch.complex128), of_rows(lambda m, x: m.layer(x)))


@pattern()
def complex_parameter_beside_real_ones():
    net = Parts(layer=nn.Linear(4, 4), filter=nn.Parameter(torch.randn(3, dtype=torch.complex64).to(torch.complex128)))
    return Setup(
        net,
        rows(4),
        of_rows(lambda m, x: torch.fft.irfft(torch.fft.rfft(m.layer(x).double()) * m.filter, n=4).to(x.dtype)),
    )


@pattern()
def class_token_that_is_expanded():
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        tokens = torch.cat([net.token.expand(len(x), -1, -1), net.embed(x)], 1) + net.position
        return net.body(tokens)[:, 0]

    body = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    net = Parts(token=parameter(1, 1, 4), position=parameter(1, T + 1, 4), embed=nn.Linear(3, 4), body=body)
    return Setup(net, rows(T, 3), of_rows(forward))


@pattern()
def class_token_that_goes_through_a_layer_before_it_is_expanded():
    net = Parts(token=parameter(1, 4), project=nn.Linear(4, 4), head=nn.Linear(4, 3))
    return Setup(net, rows(4), of_rows(lambda m, x: m.head((m.project(m.token) + x).tanh())))


@pattern()
def layer_that_sees_both_the_batch_and_a_parameter():
    net = Parts(token=parameter(1, 4), project=nn.Linear(4, 4))
    return Setup(net, rows(4), of_rows(lambda m, x: (m.project(m.token) + m.project(x)).tanh()))


@pattern()
def as_many_queries_as_examples():
    # The layer sees N rows that are not the examples.
    net = Parts(queries=parameter(N, 4), project=nn.Linear(4, 4))
    return Setup(net, rows(4), of_rows(lambda m, x: (x @ m.project(m.queries).T).tanh()))


@pattern()
def as_many_queries_as_sampled_examples():
    net = Parts(queries=parameter(4, 4), project=nn.Linear(4, 4))
    return Setup(net, rows(4), of_rows(lambda m, x: (x @ m.project(m.queries).T).tanh()))


@pattern()
def half_of_the_path_detached():
    net = Parts(one=nn.Linear(4, 4), two=nn.Linear(4, 4))
    return Setup(net, rows(4), of_rows(lambda m, x: m.two(m.one(x).detach()).tanh() + m.one(x)))


@pattern()
def half_of_the_path_without_gradient():
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = net.layer(x.roll(1, 1))
        return net.layer(x) - target

    return Setup(Parts(layer=nn.Linear(4, 4)), rows(4), of_rows(forward))


@pattern()
def teacher_that_is_a_frozen_copy():
    student = nn.Linear(4, 3)
    teacher = copy.deepcopy(student).requires_grad_(False)
    return Setup(
        Parts(student=student, teacher=teacher), rows(4), of_rows(lambda m, x: m.student(x) - 2 * m.teacher(x))
    )


@pattern()
def weight_norm():
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3))
    return Setup(net, rows(4), plain)


@pattern()
def weight_norm_by_hook():
    class Normed(nn.Module):
        """Built anew for a copy: torch cannot copy a module whose weight the deprecated hook computes."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.utils.weight_norm(nn.Linear(4, 5))
            self.head = nn.Linear(5, 3)

        def __deepcopy__(self, memo: dict[int, object]) -> "Normed":
            twin = Normed()
            twin.load_state_dict(self.state_dict())
            return twin

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x).tanh())

    return Setup(Normed(), rows(4), plain)


@pattern()
def spectral_norm_in_eval():
    net = nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)).eval()
    return Setup(net, rows(4), plain)


@pattern()
def spectral_norm_in_training():
    # The power iteration moves its vectors at every call, from the same start in each copy of the module.
    net = nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3))
    return Setup(net, rows(4), plain)


@pattern()
def spectral_norm_by_hook():
    net = nn.Sequential(torch.nn.utils.spectral_norm(nn.Conv1d(2, 3, 3)), nn.Tanh(), nn.Flatten())
    return Setup(net.eval(), rows(2, 5), plain)


@pattern()
def orthogonal_parametrization():
    return Setup(nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4)), nn.Tanh()), rows(4), plain)


@pattern()
def pruned_weight():
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    prune.random_unstructured(net[0], "weight", 0.4)
    net[0].weight = net[0].weight.detach()  # torch copies leaves only; the hook computes it anew at every call
    return Setup(net, rows(4), plain)


@pattern()
def standardised_weight():
    class Standardised(nn.Conv1d):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight - self.weight.mean((1, 2), keepdim=True)
            return self._conv_forward(x, weight / weight.std((1, 2), keepdim=True), self.bias)

    return Setup(Standardised(2, 3, 3), rows(2, 5), plain)


@pattern()
def weights_made_by_another_network():
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        weight = net.maker(x).unflatten(1, (3, 4))
        return torch.einsum("noi,ni->no", weight, x)

    return Setup(Parts(maker=nn.Linear(4, 12)), rows(4), of_rows(forward))


@pattern()
def weights_made_from_a_constant_by_another_network():
    net = Parts(code=nn.Buffer(torch.randn(3)), maker=nn.Linear(3, 12))
    return Setup(net, rows(4), of_rows(lambda m, x: F.linear(x, m.maker(m.code).view(3, 4)).tanh()))


@pattern()
def parameter_without_any_layer():
    return Setup(Parts(weight=parameter(4, 3)), rows(4), of_rows(lambda m, x: x @ m.weight))


@pattern()
def parameter_lists_and_dicts():
    net = Parts(
        many=nn.ParameterList([parameter(4, 4), parameter(4, 4)]), named=nn.ParameterDict({"scale": parameter(4)})
    )
    return Setup(net, rows(4), of_rows(lambda m, x: (x @ m.many[0]).tanh() @ m.many[1] * m.named["scale"]))


@pattern()
def bilinear():
    net = Parts(pair=nn.Bilinear(3, 4, 2))
    return Setup(net, (rows(3), rows(4)), of_rows(lambda m, b: m.pair(*b)))


@pattern()
def one_example_only():
    return Setup(nn.Linear(4, 3), rows(4)[:1], plain, examples=1)


@pattern()
def two_examples():
    return Setup(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)), rows(4)[:2], plain, examples=2)


@pattern()
def gradients_of_very_different_size():
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    batch = rows(4), torch.logspace(0, -5, N)
    return Setup(net, batch, lambda m, b: (b[1] * curved(m(b[0]))).mean())
