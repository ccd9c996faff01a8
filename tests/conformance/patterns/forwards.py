"""Forward passes that do more than call layers: hooks, overrides, in-place writes, transforms, checkpoints."""

import types

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

from tests.conformance.patterns import Parts, Setup, T, of_rows, parameter, pattern, plain, rows


def two_layers() -> Parts:
    return Parts(one=nn.Linear(4, 4), two=nn.Linear(4, 3))


@pattern()
def keyword_input():
    return Setup(two_layers(), rows(4), of_rows(lambda m, x: m.two(input=m.one(input=x).tanh())))


@pattern()
def keyword_inputs_of_a_convolution_and_a_table():
    net = Parts(conv=nn.Conv1d(2, 3, 2), table=nn.Embedding(5, 3))

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        kinds = x[:, 0].abs().long().clamp(max=4)
        return net.conv(input=x) + net.table(input=kinds).mT[:, :, 1:]

    return Setup(net, rows(2, T), of_rows(forward))


@pattern()
def hook_that_doubles_the_output():
    net = two_layers()
    net.one.register_forward_hook(lambda layer, args, output: 2 * output)
    return Setup(net, rows(4), of_rows(lambda m, x: m.two(m.one(x).tanh())))


@pattern()
def hook_that_writes_to_the_output():
    net = two_layers()
    net.one.register_forward_hook(lambda layer, args, output: output.mul_(2))
    return Setup(net, rows(4), of_rows(lambda m, x: m.two(m.one(x).tanh())))


@pattern()
def hook_that_uses_the_weight():
    net = two_layers()
    net.one.register_forward_hook(lambda layer, args, output: output + layer.weight.sum())
    return Setup(net, rows(4), of_rows(lambda m, x: m.two(m.one(x).tanh())))


@pattern()
def hook_that_scales_the_input():
    net = two_layers()
    net.one.register_forward_pre_hook(lambda layer, args: (3 * args[0],))
    return Setup(net, rows(4), of_rows(lambda m, x: m.two(m.one(x).tanh())))


@pattern()
def hook_on_the_gradient_of_the_output():
    net = Parts(zero=nn.Linear(4, 4), one=nn.Linear(4, 4), two=nn.Linear(4, 3))
    net.one.register_full_backward_hook(lambda layer, inputs, outputs: tuple(2 * gradient for gradient in inputs))
    return Setup(net, rows(4), of_rows(lambda m, x: m.two(m.one(m.zero(x).tanh()).tanh())))


@pattern()
def hook_that_scales_the_gradient_of_a_tensor():
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        hidden = net.one(x)
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: 0.5 * gradient)
        return net.two(hidden.tanh())

    return Setup(two_layers(), rows(4), of_rows(forward))


@pattern()
def subclass_that_overrides_forward():
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * F.linear(x, self.weight, self.bias)

    return Setup(nn.Sequential(Scaled(4, 4), nn.Tanh(), nn.Linear(4, 3)), rows(4), plain)


@pattern()
def instance_with_another_forward():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    net[0].forward = types.MethodType(lambda self, x: 2 * F.linear(x, self.weight, self.bias), net[0])
    return Setup(net, rows(4), plain)


@pattern()
def subclass_that_overrides_call():
    class Doubling(nn.Linear):
        def __call__(self, x: Tensor) -> Tensor:
            return 2 * super().__call__(x)

    return Setup(nn.Sequential(Doubling(4, 4), nn.Tanh(), nn.Linear(4, 3)), rows(4), plain)


@pattern()
def forward_called_without_hooks():
    return Setup(two_layers(), rows(4), of_rows(lambda m, x: m.two.forward(m.one.forward(x).tanh())))


@pattern()
def layers_called_with_and_without_hooks():
    return Setup(two_layers(), rows(4), of_rows(lambda m, x: m.two(m.one.forward(x).tanh() + m.one(x))))


@pattern()
def inplace_relu_after_a_linear():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.ReLU(inplace=True))
    return Setup(net.append(nn.Linear(4, 3)), rows(4), plain)


@pattern()
def inplace_addition_after_a_linear():
    return Setup(two_layers(), rows(4), of_rows(lambda m, x: m.two(m.one(x).add_(x).tanh())))


@pattern()
def inplace_addition_after_a_convolution():
    net = Parts(one=nn.Conv1d(2, 2, 3, padding=1), two=nn.Conv1d(2, 2, 3))
    return Setup(net, rows(2, 6), of_rows(lambda m, x: m.two(m.one(x).add_(x).relu_())))


@pattern()
def inplace_scaling_after_a_linear():
    return Setup(two_layers(), rows(4), of_rows(lambda m, x: m.two(m.one(x).mul_(3).sin())))


@pattern()
def output_written_to_by_slices():
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        hidden = net.one(x)
        hidden[:, 0] = 0
        hidden[:, 1:2] = hidden[:, 2:3] * x[:, :1]
        return net.two(hidden.tanh())

    return Setup(two_layers(), rows(4), of_rows(forward))


@pattern()
def output_written_to_by_a_mask():
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        hidden = net.one(x)
        return net.two(hidden.masked_fill_(x > 0, 0.5).sin())

    return Setup(two_layers(), rows(4), of_rows(forward))


@pattern()
def input_written_to_after_the_call():
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        buffer = x.clone()
        with torch.no_grad():
            hidden = net.frozen(buffer)
        hidden = hidden + net.bias(buffer)
        buffer.add_(1)  # the bias alone does not need the input again
        return net.two(hidden.tanh())

    net = Parts(frozen=nn.Linear(4, 4), bias=nn.Linear(4, 4), two=nn.Linear(4, 3))
    net.bias.weight.requires_grad_(False)
    return Setup(net, rows(4), of_rows(forward))


@pattern()
def views_of_the_output():
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        left, right = net.one(x).chunk(2, 1)
        return net.two(torch.cat([left.sigmoid() * right, right], 1))

    return Setup(two_layers(), rows(4), of_rows(forward))


@pattern()
def checkpoint_that_is_reentrant():
    return Setup(
        two_layers(),
        rows(4),
        of_rows(lambda m, x: m.two(checkpoint(m.one, x.requires_grad_(), use_reentrant=True).tanh())),
    )


@pattern()
def checkpoint_that_is_not_reentrant():
    return Setup(two_layers(), rows(4), of_rows(lambda m, x: m.two(checkpoint(m.one, x, use_reentrant=False).tanh())))


@pattern()
def checkpoint_twice_over_one_layer():
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        for _ in range(2):
            x = checkpoint(net.one, x, use_reentrant=False).tanh()
        return net.two(x)

    return Setup(two_layers(), rows(4), of_rows(forward))


@pattern()
def checkpoint_inside_a_checkpoint():
    def inner(net: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(net.one, x, use_reentrant=False).tanh()

    return Setup(two_layers(), rows(4), of_rows(lambda m, x: m.two(checkpoint(inner, m, x, use_reentrant=False))))


@pattern()
def vmap_inside():
    return Setup(two_layers(), rows(T, 4), of_rows(lambda m, x: vmap(lambda row: m.two(m.one(row).tanh()))(x)))


@pattern()
def vmap_over_positions_inside():
    return Setup(two_layers(), rows(T, 4), of_rows(lambda m, x: vmap(lambda row: m.two(m.one(row).tanh()), 1, 1)(x)))


@pattern()
def ensemble_by_vmap():
    members = [nn.Linear(4, 3) for _ in range(3)]
    values, _ = stack_module_state(members)
    net = Parts(weight=nn.Parameter(values["weight"].detach()), bias=nn.Parameter(values["bias"].detach()))

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        out = vmap(F.linear, (None, 0, 0))(x, net.weight, net.bias)
        return out.transpose(0, 1)

    return Setup(net, rows(4), of_rows(forward))


@pattern()
def gradient_by_transform_inside():
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        slopes = vmap(torch.func.grad(lambda row: net.two(net.one(row).tanh()).sum()))(x)
        return net.one(x) + slopes

    return Setup(two_layers(), rows(4), of_rows(forward))


@pattern()
def functional_call_inside():
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        values = {name: 2 * held for name, held in net.one.named_parameters()}
        return net.two(functional_call(net.one, values, (x,)).tanh())

    return Setup(two_layers(), rows(4), of_rows(forward))


@pattern()
def functional_call_beside_the_plain_call():
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        values = {name: 2 * held for name, held in net.one.named_parameters()}
        return net.two(functional_call(net.one, values, (x,)).tanh() + net.one(x))

    return Setup(two_layers(), rows(4), of_rows(forward))


@pattern()
def functional_call_on_the_same_parameters():
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return net.two(functional_call(net.one, dict(net.one.named_parameters()), (x,)).tanh())

    return Setup(two_layers(), rows(4), of_rows(forward))


@pattern()
def one_step_of_adaptation_inside():
    def loss(net: nn.Module, batch: Tensor) -> Tensor:
        losses = []
        for row in batch:
            inner = net(row[:2]).square().sum()
            steps = torch.autograd.grad(inner, list(net.parameters()), create_graph=True)
            values = {name: p - 0.1 * g for (name, p), g in zip(net.named_parameters(), steps, strict=True)}
            losses.append(functional_call(net, values, (row[2:],)).sin().sum())
        return torch.stack(losses).mean()

    return Setup(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), rows(4, 3), loss)


@pattern()
def examples_one_by_one_in_a_loop():
    return Setup(two_layers(), rows(4), of_rows(lambda m, x: torch.stack([m.two(m.one(row).tanh()) for row in x])))


@pattern()
def examples_in_two_halves():
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return torch.cat([net.two(net.one(part).tanh()) for part in x.chunk(2)])

    return Setup(two_layers(), rows(4), of_rows(forward))


@pattern()
def autocast_inside():
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return net.two(net.one(x).tanh())

    return Setup(two_layers(), rows(4), of_rows(forward))


@pattern()
def own_autograd_function():
    class StraightThrough(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.round()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    return Setup(two_layers(), rows(4), of_rows(lambda m, x: m.two(StraightThrough.apply(m.one(3 * x)))))


@pattern()
def own_autograd_function_for_a_layer():
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return x @ weight.T

        @staticmethod
        def backward(ctx, gradient):
            x, weight = ctx.saved_tensors
            return gradient @ weight, gradient.T @ x

    net = two_layers()
    return Setup(net, rows(4), of_rows(lambda m, x: m.two(Product.apply(x, m.one.weight).tanh())))


@pattern()
def branch_on_the_content():
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return torch.where(x[:, :1] > 0, net.one(x), net.other(x))

    return Setup(Parts(one=nn.Linear(4, 3), other=nn.Linear(4, 3)), rows(4), of_rows(forward))


@pattern()
def lazy_layers_after_a_first_pass():
    net = nn.Sequential(nn.LazyConv1d(3, 2), nn.LazyInstanceNorm1d(affine=True), nn.Flatten(), nn.LazyLinear(3))
    with torch.no_grad():
        net(rows(2, T))
    return Setup(net, rows(2, T), plain)


@pattern(refused="lazy parameter without a shape")
def lazy_layers_before_a_first_pass():
    class Lazy(nn.Sequential):
        """Its reference needs the weights that the first pass draws: the same for each example."""

        def forward(self, x: Tensor) -> Tensor:
            torch.manual_seed(0)
            return super().forward(x)

    return Setup(Lazy(nn.LazyLinear(3)), rows(4), plain)


@pattern()
def gates_and_residuals():
    net = Parts(gate=nn.Linear(4, 4), value=nn.Linear(4, 4), scale=parameter(4))

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return x + net.scale * F.silu(net.gate(x)) * net.value(x)

    return Setup(net, rows(T, 4), of_rows(forward))


@pattern()
def counter_that_changes_what_is_computed():
    class Warming(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.layer(x) * self.calls

    return Setup(Warming(), rows(4), plain)


@pattern()
def cache_kept_between_calls():
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.cache: dict[int, Tensor] = {}

        def forward(self, x: Tensor) -> Tensor:
            mask = self.cache.setdefault(len(x), torch.ones(len(x), 1, dtype=x.dtype))
            return self.layer(x) * mask

    return Setup(Caching(), rows(4), plain)
