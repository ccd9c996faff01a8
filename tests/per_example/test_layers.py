"""Every layer type's rule against autograd on the layer alone, one example at a time."""

import itertools

import pytest
import torch
from torch import nn

from lightning_graddiv.per_example.directions import Directions
from lightning_graddiv.per_example.layers import LAYER_TYPES, Arrangement, Layout, layer_type, mixes_examples
from lightning_graddiv.per_example.probes import image_of

N = 4


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def reference(layer, inputs, output_gradients):
    """Name to gradients of shape (n, ...): the layer is run on one example at a time."""
    names, parameters = zip(*((k, p) for k, p in layer.named_parameters() if p.requires_grad), strict=True)
    rows = [
        torch.autograd.grad(layer(inputs[i : i + 1]), parameters, output_gradients[i : i + 1])
        for i in range(len(inputs))
    ]
    return dict(zip(names, map(torch.stack, zip(*rows, strict=True)), strict=True))


def contributions_of(layer, inputs, output_gradients, arrangement=None):
    kind = layer_type(layer)
    assert kind is not None
    arrangement = arrangement or Arrangement(Layout.FIRST, len(inputs))
    assert arrangement.layout.fits(inputs.shape[: kind.leading(layer, inputs)], arrangement.examples)
    if kind.inputs is None:
        return kind.contributions(layer, inputs, output_gradients, arrangement)
    return kind.contributions(layer, kind.inputs(layer, (inputs,), {}, layer(inputs)), (output_gradients,), arrangement)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, gradients in expected.items():
        right = Directions([gradients[0]], 0).right(0)
        assert found[name].shape == gradients.shape[1:]
        assert len(found[name]) == len(gradients)
        torch.testing.assert_close(found[name].explicit(), gradients, rtol=1e-10, atol=1e-10)
        norms, image = found[name].measure(right)
        torch.testing.assert_close(norms, gradients.reshape(len(gradients), -1).square().sum(1), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(image, image_of(gradients.sum(0), right), rtol=1e-10, atol=1e-10)


def assert_rule_holds(layer, inputs):
    perturb(layer)
    output_gradients = normal(*layer(inputs).shape)
    assert_same(contributions_of(layer, inputs, output_gradients), reference(layer, inputs, output_gradients))


def perturb(layer):
    """Scales of one and shifts of zero would hide that they are left out."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.5 * normal(*parameter.shape)


def tokens(*shape):
    """Few of many, so that an example holds some of them more than once."""
    return torch.randint(0, 4, (N, *shape))


LAYERS = {
    "linear": (lambda: nn.Linear(5, 3), (5,)),
    "linear without bias": (lambda: nn.Linear(5, 3, bias=False), (5,)),
    "linear on sequences": (lambda: nn.Linear(16, 12), (3, 16)),
    "linear on long sequences": (lambda: nn.Linear(4, 3), (20, 4)),
    "linear on images": (lambda: nn.Linear(16, 12, bias=False), (2, 2, 16)),
    "linear on large images": (lambda: nn.Linear(4, 3), (5, 4, 4)),
    "layer norm": (lambda: nn.LayerNorm(6), (6,)),
    "layer norm on sequences": (lambda: nn.LayerNorm(6), (3, 6)),
    "layer norm on images": (lambda: nn.LayerNorm(6), (3, 2, 6)),
    "layer norm over two dimensions": (lambda: nn.LayerNorm((3, 4)), (3, 4)),
    "layer norm over two dimensions of sequences": (lambda: nn.LayerNorm((3, 4)), (5, 3, 4)),
    "layer norm without bias": (lambda: nn.LayerNorm(6, bias=False), (3, 6)),
    "layer norm with a large epsilon": (lambda: nn.LayerNorm(6, eps=0.5), (3, 6)),
    "rms norm": (lambda: nn.RMSNorm(6), (6,)),
    "rms norm on sequences": (lambda: nn.RMSNorm(6), (3, 6)),
    "rms norm over two dimensions of sequences": (lambda: nn.RMSNorm((3, 4)), (5, 3, 4)),
    "rms norm with a large epsilon": (lambda: nn.RMSNorm(6, eps=0.5), (3, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 6), (6,)),
    "group norm on sequences": (lambda: nn.GroupNorm(2, 6), (6, 5)),
    "group norm on images": (lambda: nn.GroupNorm(3, 6, eps=0.5), (6, 4, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_contributions_are_the_gradients_of_each_example_alone(name):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    assert_rule_holds(make().double(), normal(N, *shape))


class TestStatisticsOfAGroupNorm:
    """Those that autograd keeps are used, unless they are hidden or not exact."""

    def known(self, layer, inputs):
        kind = layer_type(layer)
        return kind.inputs(layer, (inputs,), {}, layer(inputs))

    def expect_rule_to_hold(self, layer, inputs, known):
        output_gradients = torch.randn_like(inputs)
        kind = layer_type(layer)
        found = kind.contributions(layer, known, (output_gradients,), Arrangement(Layout.FIRST, N))
        # PyTorch's own kernel for channels_last crashes where the input needs no gradient.
        assert_same(found, reference(layer, inputs.contiguous(), output_gradients.contiguous()))

    def test_kept_by_autograd(self):
        layer, inputs = nn.GroupNorm(2, 6).double(), normal(N, 6, 5) + 1
        _, mean, deviation = self.known(layer, inputs)
        torch.testing.assert_close(mean, inputs.unflatten(1, (2, 3)).mean((2, 3)))
        self.expect_rule_to_hold(layer, inputs, (inputs, mean, deviation))

    def test_hidden_by_hooks(self):
        layer, inputs = nn.GroupNorm(2, 6).double(), normal(N, 6, 5)

        def unpack(_):
            raise AssertionError("what is hidden was asked for")

        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
            known = self.known(layer, inputs)
        assert known[1:] == (None, None)
        self.expect_rule_to_hold(layer, inputs, known)

    def test_of_another_node(self):
        """A hook of the user's may put another output in the place of the layer's."""
        layer, inputs = nn.GroupNorm(2, 6).double(), normal(N, 6, 5).requires_grad_()
        other = torch.nn.functional.layer_norm(inputs, (5,))
        assert hasattr(other.grad_fn, "_raw_saved_result1")
        assert layer_type(layer).inputs(layer, (inputs,), {}, other)[1:] == (None, None)

    def test_in_few_digits(self):
        layer, inputs = nn.GroupNorm(2, 6).bfloat16(), normal(N, 6, 5).bfloat16()
        assert self.known(layer, inputs)[1:] == (None, None)

    def test_of_an_input_that_is_not_contiguous(self):
        layer = nn.GroupNorm(2, 6).double()
        inputs = normal(N, 6, 5, 4).to(memory_format=torch.channels_last)
        self.expect_rule_to_hold(layer, inputs, self.known(layer, inputs))
        self.expect_rule_to_hold(layer, inputs, (inputs, None, None))

    @pytest.mark.parametrize("trained", ["weight", "bias"])
    def test_one_of_both_is_trained(self, trained):
        layer, inputs = nn.GroupNorm(2, 6).double(), normal(N, 6, 5)
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name == trained)
        self.expect_rule_to_hold(layer, inputs, self.known(layer, inputs))


@pytest.mark.parametrize("shape", [(), (1,), (6,), (3, 4)], ids=str)
@pytest.mark.parametrize("padding_idx", [None, 0, 3, -7])
def test_contributions_to_a_table_are_the_gradients_of_each_example_alone(shape, padding_idx):
    torch.manual_seed(0)
    assert_rule_holds(nn.Embedding(7, 5, padding_idx=padding_idx).double(), tokens(*shape))


def test_tokens_may_be_small_integers():
    torch.manual_seed(0)
    assert_rule_holds(nn.Embedding(7, 5).double(), tokens(6).int())


SPATIAL = {1: (5,), 2: (4, 3), 3: (3, 2, 4)}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("running", [True, False], ids=["running statistics", "own statistics"])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_contributions_to_an_instance_norm_are_those_under_the_statistics_it_used(dimensions, running, training):
    torch.manual_seed(0)
    make = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[dimensions - 1]
    layer = make(3, affine=True, track_running_stats=running, eps=0.5).double()
    inputs = 2 * normal(N, 3, *SPATIAL[dimensions]) + 1
    layer(inputs)  # so that there are statistics
    assert_rule_holds(layer.train(training), inputs)


BATCH_NORMS = [
    (nn.BatchNorm1d, ()),
    (nn.BatchNorm1d, SPATIAL[1]),
    (nn.BatchNorm2d, SPATIAL[2]),
    (nn.BatchNorm3d, SPATIAL[3]),
]


@pytest.mark.parametrize(("make", "space"), BATCH_NORMS)
def test_contributions_to_a_batch_norm_in_evaluation_are_the_gradients_of_each_example_alone(make, space):
    torch.manual_seed(0)
    layer, inputs = make(3, eps=0.5).double(), 2 * normal(N, 3, *space) + 1
    layer(inputs)
    assert_rule_holds(layer.eval(), inputs)


@pytest.mark.parametrize("running", [True, False], ids=["running statistics", "own statistics"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("make", "space"), BATCH_NORMS)
def test_contributions_to_a_batch_norm_add_up_to_the_gradient(make, space, training, running):
    """Under the batch's statistics no example has a gradient of its own, but each has a share of the whole."""
    torch.manual_seed(0)
    layer, inputs = make(3, eps=0.5, track_running_stats=running).double(), 2 * normal(N, 3, *space) + 1
    layer(inputs)
    layer.train(training)
    perturb(layer)
    output_gradients = normal(*inputs.shape)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    found = contributions_of(layer, inputs, output_gradients)
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())
    whole = torch.autograd.grad(layer(inputs), [*layer.parameters()], output_gradients)
    for name, gradient in zip(("weight", "bias"), whole, strict=True):
        assert len(found[name]) == N
        torch.testing.assert_close(found[name].explicit().sum(0), gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("layer", "mixes"),
    [
        (nn.BatchNorm1d(3), True),
        (nn.BatchNorm2d(3).eval(), False),
        (nn.BatchNorm3d(3, track_running_stats=False).eval(), True),
        (nn.InstanceNorm1d(3, affine=True), False),
        (nn.LayerNorm(3), False),
    ],
    ids=str,
)
def test_only_a_batch_norm_under_the_batchs_own_statistics_mixes_examples(layer, mixes):
    assert mixes_examples(layer) is mixes


def laid_out(values, layout):
    """Lay out values of shape (n, k, ...) in the way that the layout describes, entry by entry."""
    n, k = values.shape[:2]
    if layout is Layout.FIRST:
        return values
    if layout is Layout.SECOND:
        return torch.stack([values[:, t] for t in range(k)])
    pairs = itertools.product(range(n), range(k))
    order = pairs if layout is Layout.FOLDED else ((i, t) for t in range(k) for i in range(n))
    return torch.stack([values[i, t] for i, t in order])


@pytest.mark.parametrize("trailing", [(), (2,), (5, 2)], ids=str)
@pytest.mark.parametrize("leading", [2, 3])
@pytest.mark.parametrize("layout", Layout)
def test_values_are_arranged_by_example(layout, leading, trailing):
    more = (7,) * (leading - (1 if layout in (Layout.FOLDED, Layout.STRIDED) else 2))
    values = normal(N, 3, *more, *trailing)
    arrange = Arrangement(layout, N)
    arranged = arrange(laid_out(values, layout), leading)
    assert torch.equal(arranged, values.reshape(N, -1, *trailing))
    torch.testing.assert_close(arrange.summed(laid_out(values, layout), leading), arranged.sum(1))


def test_values_that_lie_as_they_should_are_left_alone():
    arrange, rows, positions = Arrangement(Layout.FIRST, N), normal(N, 2), normal(N, 3, 2)
    assert arrange(positions, 2) is positions
    assert torch.equal(arrange(rows, 1), rows[:, None])
    assert arrange.summed(rows, 1) is rows
    with pytest.raises(ValueError, match="cannot lie in"):
        arrange.summed(normal(N + 1, 2), 1)


ON_POSITIONS = {
    "linear": (lambda: nn.Linear(6, 5), lambda: normal(N, 3, 6)),
    "embedding": (lambda: nn.Embedding(7, 5, padding_idx=1), lambda: tokens(3)),
    "layer norm": (lambda: nn.LayerNorm(6), lambda: normal(N, 3, 6)),
    "rms norm": (lambda: nn.RMSNorm(6), lambda: normal(N, 3, 6)),
}
ON_ROWS = {
    "conv": (lambda: nn.Conv1d(2, 3, 3), lambda: normal(N, 3, 2, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 4), lambda: normal(N, 3, 4, 5)),
    "instance norm": (lambda: nn.InstanceNorm1d(2, affine=True), lambda: normal(N, 3, 2, 6)),
    "batch norm": (lambda: nn.BatchNorm1d(2).eval(), lambda: normal(N, 3, 2, 6)),
}
IN_LAYOUTS = [
    *itertools.product(ON_POSITIONS, Layout),
    *itertools.product(ON_ROWS, [Layout.FOLDED, Layout.STRIDED]),
]


@pytest.mark.parametrize(("name", "layout"), IN_LAYOUTS)
def test_rules_hold_wherever_the_examples_lie(name, layout):
    torch.manual_seed(0)
    make, draw = (ON_POSITIONS | ON_ROWS)[name]
    layer, inputs = make().double(), draw()  # inputs of shape (n, 3, ...)
    perturb(layer)
    output_gradients = normal(N, 3, *layer(inputs[:, 0]).shape[1:])
    alone = [reference(layer, x, b) for x, b in zip(inputs, output_gradients, strict=True)]
    expected = {name: torch.stack([gradients[name].sum(0) for gradients in alone]) for name in alone[0]}
    arrangement = Arrangement(layout, N)
    found = contributions_of(layer, laid_out(inputs, layout), laid_out(output_gradients, layout), arrangement)
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("leading", "examples", "fitting"),
    [
        ((4,), 4, {Layout.FIRST}),
        ((4, 3), 4, {Layout.FIRST}),
        ((3, 4), 4, {Layout.SECOND}),
        ((3, 5, 4), 4, set()),
        ((4, 4), 4, {Layout.FIRST, Layout.SECOND}),
        ((8,), 4, {Layout.FOLDED, Layout.STRIDED}),
        ((8, 4), 4, {Layout.FOLDED, Layout.STRIDED, Layout.SECOND}),
        ((10,), 4, set()),
        ((2,), 4, set()),
        ((0,), 4, set()),
        ((), 4, set()),
        ((3,), 1, {Layout.FOLDED, Layout.STRIDED}),
        ((1,), 1, {Layout.FIRST}),
        ((0,), 0, set()),
        ((4,), 0, set()),
        ((4,), -2, set()),
    ],
)
def test_layouts_fit_where_the_examples_can_lie(leading, examples, fitting):
    assert {layout for layout in Layout if layout.fits(leading, examples)} == fitting


@pytest.mark.parametrize("layout", Layout)
def test_examples_that_do_not_fit_are_not_arranged(layout):
    with pytest.raises(ValueError, match=r"4 examples cannot lie in \(5, 3\) as \("):
        layout.arrange(normal(5, 3, 2), 2, 4)
    with pytest.raises(ValueError, match=r"4 examples cannot lie in \(\)"):
        layout.arrange(normal(4, 3), 0, 4)


class Scaled(nn.Linear):
    def forward(self, inputs):
        return 2 * super().forward(inputs)


def with_its_own_forward():
    layer = nn.Linear(5, 3)
    layer.forward = lambda inputs: inputs
    return layer


DECLINED = {
    "a table that renormalises": lambda: nn.Embedding(7, 5, max_norm=1.0),
    "a table that looks at frequencies": lambda: nn.Embedding(7, 5, scale_grad_by_freq=True),
    "a subclass": lambda: Scaled(5, 3),
    "a layer with a forward of its own": with_its_own_forward,
    "a parametrised layer": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(5, 3)),
    "two bases": lambda: type("Both", (Scaled, nn.Linear), {})(5, 3),
    "a bilinear layer": lambda: nn.Bilinear(2, 3, 4),
    "an lstm with projections": lambda: nn.LSTM(2, 3, proj_size=2),
    "a transposed convolution": lambda: nn.ConvTranspose1d(2, 3, 3),
    "a container": lambda: nn.Sequential(nn.Linear(5, 3)),
}


@pytest.mark.parametrize("name", DECLINED)
def test_layers_that_no_rule_describes_are_declined(name):
    assert layer_type(DECLINED[name]()) is None


def test_a_layer_that_fsdp_has_taken_over_is_still_its_type():
    layer = nn.Linear(5, 3)
    sharded = type("FSDPLinear", (type("FSDPModule", (), {}), nn.Linear), {})
    layer.__class__ = sharded
    assert layer_type(layer) is LAYER_TYPES[nn.Linear]


UNBATCHED = [
    (lambda: nn.Linear(5, 3), (5,)),
    (lambda: nn.LayerNorm((3, 4)), (3, 4)),
    (lambda: nn.RMSNorm(4), (4,)),
    (lambda: nn.Conv1d(2, 3, 3), (2, 5)),
    (lambda: nn.Conv2d(2, 3, 3), (2, 5, 5)),
    (lambda: nn.Conv3d(2, 3, 3), (2, 5, 5, 5)),
    (lambda: nn.InstanceNorm1d(2, affine=True), (2, 5)),
    (lambda: nn.InstanceNorm2d(2, affine=True), (2, 5, 5)),
    (lambda: nn.InstanceNorm3d(2, affine=True), (2, 5, 5, 5)),
]


@pytest.mark.parametrize(("make", "shape"), UNBATCHED)
def test_a_single_example_without_a_leading_dimension_has_no_examples_in_it(make, shape):
    layer, inputs = make().double(), normal(*shape)
    layer(inputs)  # it does run
    assert layer_type(layer).leading(layer, inputs) == 0
    assert layer_type(layer).leading(layer, inputs[None]) == 1


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize(
    "name", ["linear", "conv", "layer norm", "group norm on images", "instance norm", "batch norm"]
)
def test_frozen_parameters_are_left_out(name, frozen):
    torch.manual_seed(0)
    make, shape = LAYERS[name] if name in LAYERS else (ON_ROWS[name][0], (2, 6))
    layer = make().double()
    getattr(layer, frozen).requires_grad_(False)
    assert_rule_holds(layer, normal(N, *shape))
