"""Contributions to the weights of convolutions, on every way to their norms, against autograd on each example alone."""

from dataclasses import fields

import pytest
import torch
from torch import nn

from lightning_graddiv.per_example import convolved, devices
from lightning_graddiv.per_example.convolved import Convolved
from lightning_graddiv.per_example.convolved_by_products import ConvolvedByProducts, Patches
from lightning_graddiv.per_example.directions import Directions
from lightning_graddiv.per_example.layers import Arrangement, Layout, layer_type
from lightning_graddiv.per_example.probes import image_of
from lightning_graddiv.per_example.totals import Total

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")

N = 3
TYPES = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
KERNELS = {1: (4,), 2: (3, 2), 3: (2, 3, 2)}
OPTIONS = {
    "plain": {},
    "no bias": dict(bias=False),
    "padding": dict(padding=(1, 0, 2)),
    "stride": dict(stride=(2, 3, 2)),
    "dilation": dict(dilation=(2, 1, 2)),
    "groups": dict(groups=2),
    "each channel by itself": dict(groups=4),
    "all at once": dict(padding=(2, 1, 1), stride=(2, 1, 2), dilation=(1, 2, 2), groups=2),
    "valid": dict(padding="valid"),
    "same": dict(padding="same"),
    "same, dilated, in groups": dict(padding="same", dilation=(3, 1, 2), groups=2),
}
MODES = ["zeros", "reflect", "replicate", "circular"]
PADDINGS = {"numbers": (1, 1, 1), "same": "same", "valid": "valid"}


def convolution(dimensions, many, **options):
    """A convolution, and the extent of an input with ``many`` or few output positions for it."""
    torch.manual_seed(0)
    options = {k: v[:dimensions] if isinstance(v, tuple) else v for k, v in options.items()}
    channels = (4, 8) if many else (16, 128)
    extent = {1: 29, 2: 13, 3: 8} if many else {1: 7, 2: 5, 3: 3}
    layer = TYPES[dimensions](*channels, KERNELS[dimensions], **options).double()
    return layer, torch.randn(N, channels[0], *(extent[dimensions],) * dimensions, dtype=torch.float64)


def gradients_of(layer, rows, output_gradients):
    """Return the gradients of one example, name to tensor."""
    return dict(
        zip(
            dict(layer.named_parameters()),
            torch.autograd.grad(layer(rows), [*layer.parameters()], output_gradients),
            strict=True,
        )
    )


def take(monkeypatch, *, pixels):
    """Take one of the two ways, whichever is cheaper."""
    monkeypatch.setattr(Convolved, "takes_pixels", pixels)


def as_on_an_accelerator(found):
    return ConvolvedByProducts(**{field.name: getattr(found, field.name) for field in fields(found)})


def refuse(*_):
    pytest.fail("this way was not to be taken")


def assert_rule_holds(layer, inputs, many, monkeypatch):
    output_gradients = torch.randn_like(layer(inputs))
    kind = layer_type(layer)
    assert kind.leading(layer, inputs) == 1
    found = kind.contributions(layer, inputs, output_gradients, Arrangement(Layout.FIRST, N))
    alone = [gradients_of(layer, inputs[i : i + 1], output_gradients[i : i + 1]) for i in range(N)]
    expected = {name: torch.stack([gradients[name] for gradients in alone]) for name in alone[0]}
    take(monkeypatch, pixels=not many)
    assert_same(found, expected, "_norms_by_pixels" if many else "explicit", monkeypatch)


def assert_same(found, expected, not_taken, monkeypatch):
    assert found.keys() == expected.keys()
    for name, gradients in expected.items():
        assert found[name].shape == gradients.shape[1:]
        assert len(found[name]) == len(gradients)
        torch.testing.assert_close(found[name].explicit(), gradients, rtol=1e-10, atol=1e-10)
        if isinstance(found[name], Convolved):  # what a GPU takes, and what shares of the examples it takes it of
            by_products = as_on_an_accelerator(found[name])
            torch.testing.assert_close(by_products._patches().explicit(), gradients, rtol=1e-10, atol=1e-10)
            if found[name].inputs.shape[1] * found[name].groups == 1 and set(found[name].stride) == {1}:
                torch.testing.assert_close(by_products._by_steps(), gradients, rtol=1e-10, atol=1e-10)
        part = found[name].at(slice(1, 3))
        torch.testing.assert_close(part.explicit(), gradients[1:3], rtol=1e-10, atol=1e-10)
    monkeypatch.setattr(Convolved, not_taken, refuse)
    for name, gradients in expected.items():
        right = Directions([gradients[0]], 0).right(0)
        norms, image = found[name].measure(right)
        torch.testing.assert_close(norms, gradients.flatten(1).square().sum(1), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(image, image_of(gradients.sum(0), right), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("many", [True, False], ids=["many positions", "few positions"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dimensions", TYPES)
def test_contributions_are_the_gradients_of_each_example_alone(dimensions, name, many, monkeypatch):
    layer, inputs = convolution(dimensions, many, **OPTIONS[name])
    assert_rule_holds(layer, inputs, many, monkeypatch)


@pytest.mark.parametrize("many", [True, False], ids=["many positions", "few positions"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dimensions", TYPES)
def test_every_padding_mode_is_that_of_the_layer(dimensions, mode, padding, many, monkeypatch):
    layer, inputs = convolution(dimensions, many, padding=PADDINGS[padding], padding_mode=mode)
    assert_rule_holds(layer, inputs, many, monkeypatch)


@pytest.mark.parametrize("many", [True, False], ids=["many positions", "few positions"])
@pytest.mark.parametrize("layout", [Layout.FOLDED, Layout.STRIDED])
@pytest.mark.parametrize("dimensions", TYPES)
def test_examples_of_several_rows_have_the_sum_of_their_contributions(dimensions, layout, many, monkeypatch):
    """The frames of a video, one after another or side by side."""
    layer, _ = convolution(dimensions, many, groups=2, stride=(2, 1, 2), padding=(1, 1, 1))
    rows = torch.randn(N, 2, layer.in_channels, *((9 if many else 2,) * dimensions), dtype=torch.float64)
    output_gradients = torch.randn(N, *layer(rows[0]).shape, dtype=torch.float64)
    alone = [gradients_of(layer, x, b) for x, b in zip(rows, output_gradients, strict=True)]
    expected = {name: torch.stack([gradients[name] for gradients in alone]) for name in alone[0]}
    if layout is Layout.STRIDED:
        rows, output_gradients = rows.transpose(0, 1), output_gradients.transpose(0, 1)
    arguments = [values.flatten(0, 1) for values in (rows, output_gradients)]
    found = layer_type(layer).contributions(layer, *arguments, Arrangement(layout, N))
    take(monkeypatch, pixels=not many)
    assert_same(found, expected, "_norms_by_pixels" if many else "explicit", monkeypatch)


@pytest.mark.parametrize(
    ("channels", "extent", "rows", "options", "pixels"),
    [
        ((64, 64), 8, 1, {}, False),
        ((64, 64), 4, 1, {}, True),
        ((64, 64), 16, 1, {}, False),
        ((64, 64), 8, 2, {}, False),
        ((64, 64), 8, 1, dict(groups=4), False),
        ((64, 64), 8, 1, dict(stride=2), False),
        ((512, 512), 8, 1, dict(stride=2), True),
        ((3, 64), 32, 1, {}, False),
    ],
    ids=str,
)
def test_the_way_is_chosen_by_pixels_positions_and_channels(channels, extent, rows, options, pixels):
    layer = nn.Conv2d(*channels, 3, padding=1, **options)
    inputs = torch.randn(2 * rows, channels[0], extent, extent)
    layout = Layout.FIRST if rows == 1 else Layout.FOLDED
    found = layer_type(layer).contributions(layer, inputs, layer(inputs), Arrangement(layout, 2))["weight"]
    assert found.takes_pixels == pixels


def test_norms_that_pixels_cancel_are_taken_from_the_gradient_itself(monkeypatch):
    """Two positions with the same input and opposite output gradients: products of a million cancel to one."""
    layer = nn.Conv1d(2, 2, 1)
    inputs, output_gradients = torch.full((N, 2, 2), 1e3), torch.ones(N, 2, 2)
    output_gradients[..., 1] = -1.0
    output_gradients[1, 0, 1] += 1e-3  # 1.0 comes out with seven digits, or with none
    take(monkeypatch, pixels=True)
    found = layer_type(layer).contributions(layer, inputs, output_gradients, Arrangement(Layout.FIRST, N))["weight"]
    norms, _ = found.measure(Directions([layer.weight], 0).right(0))
    expected = found.explicit().double().flatten(1).square().sum(1)
    torch.testing.assert_close(norms, expected, rtol=1e-6, atol=0)


def measured(contributions, directions):
    return contributions.measure(directions.right(0))


def sketched(contributions, directions):
    return contributions.sketches(directions.probe(0))


def in_a_total(contributions, directions):
    return Total((contributions,)).measure(directions.right(0))


def test_few_examples_are_taken_at_a_time(monkeypatch):
    layer, inputs = nn.Conv2d(2, 3, 3), torch.randn(8, 2, 6, 6)
    found = layer_type(layer).contributions(layer, inputs, layer(inputs), Arrangement(Layout.FIRST, 8))["weight"]
    take(monkeypatch, pixels=True)
    right = Directions([layer.weight], 0).right(0)
    together, _ = found.measure(right)
    sizes, original = [], Convolved._norms_by_pixels
    monkeypatch.setattr(Convolved, "_norms_by_pixels", lambda self: (sizes.append(len(self)), original(self))[1])
    monkeypatch.setattr(convolved, "chunk_bytes", lambda device: 3 * 12 * 36**2)
    apart, _ = found.measure(right)
    assert sizes == [3, 3, 2]
    torch.testing.assert_close(apart, together)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("ask", [measured, sketched, in_a_total], ids=lambda ask: ask.__name__)
def test_patches_are_taken_of_few_examples_at_a_time(ask, rows, monkeypatch):
    layer, inputs = nn.Conv2d(2, 3, 3).double(), torch.randn(8 * rows, 2, 6, 6, dtype=torch.float64)
    layout = Layout.FIRST if rows == 1 else Layout.FOLDED
    found = layer_type(layer).contributions(layer, inputs, layer(inputs), Arrangement(layout, 8))["weight"]
    take(monkeypatch, pixels=False)
    directions = Directions([layer.weight], 0)
    by_kernel = ask(found, directions)
    sizes, multiply = [], torch.bmm
    monkeypatch.setattr(devices, "_PROCESSORS", frozenset())
    monkeypatch.setattr(torch, "bmm", lambda a, b, out: (sizes.append(len(a) // rows), multiply(a, b, out=out))[1])
    monkeypatch.setattr(devices, "_ACCELERATOR_CHUNK_BYTES", 8 * 3 * rows * 2 * 9 * 16)
    by_patches = ask(as_on_an_accelerator(found), directions)
    assert sizes == [3, 3, 2]
    torch.testing.assert_close(by_patches, by_kernel)


@torch.no_grad()
@pytest.mark.parametrize(
    ("channels", "extent", "options", "steps"),
    [
        ((8, 8), 16, {}, True),
        ((1, 8), 16, {}, False),  # few patches: one piece
        ((8, 8), 16, dict(stride=2), False),
        ((8, 8), 16, dict(groups=2), False),
        ((8, 8), 4, {}, False),
    ],
    ids=str,
)
def test_steps_along_the_kernel_are_taken_instead_of_copies_of_many_patches(
    channels, extent, options, steps, monkeypatch
):
    layer = nn.Conv2d(*channels, 3, padding=1, **options).double()
    inputs = torch.randn(8, channels[0], extent, extent, dtype=torch.float64)
    found = layer_type(layer).contributions(layer, inputs, layer(inputs), Arrangement(Layout.FIRST, 8))["weight"]
    right = Directions([layer.weight], 0).right(0)
    take(monkeypatch, pixels=False)
    expected = found.measure(right)
    monkeypatch.setattr(devices, "_PROCESSORS", frozenset())
    monkeypatch.setattr(devices, "_ACCELERATOR_CHUNK_BYTES", 4 * 8 * (16 * 18 * 18 + 576))
    found = as_on_an_accelerator(found)
    assert found.takes_steps is steps
    monkeypatch.setattr(*((Patches, "explicit") if steps else (ConvolvedByProducts, "_by_steps")), refuse)
    for one, other in zip(found.measure(right), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("many", [True, False], ids=["many positions", "few positions"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dimensions", TYPES)
def test_an_accelerator_finds_the_same_with_fewer_calls(dimensions, name, many, monkeypatch):
    """By products of patches between few positions, which have to be of one linear map."""
    layer, inputs = convolution(dimensions, many, **OPTIONS[name])
    output_gradients = torch.randn_like(layer(inputs))
    found = layer_type(layer).contributions(layer, inputs, output_gradients, Arrangement(Layout.FIRST, N))["weight"]
    right = Directions([layer.weight], 0).right(0)
    take(monkeypatch, pixels=not many)
    expected = found.measure(right)
    monkeypatch.setattr(devices, "_PROCESSORS", frozenset())
    pads, original = [], convolved.F.pad
    monkeypatch.setattr(convolved.F, "pad", lambda *args: (pads.append(args), original(*args))[1])
    monkeypatch.setattr(ConvolvedByProducts, "takes_steps", False)
    found = as_on_an_accelerator(found)
    by_products = not many and layer.groups == 1
    monkeypatch.setattr(Patches, "explicit" if by_products else "_outer", refuse)
    for at_a_time in (1, N) if by_products else (1,):
        monkeypatch.setattr(devices, "_ACCELERATOR_CHUNK_BYTES", 8 * at_a_time * found._patches().patches[0].numel())
        pads.clear()
        assert found.are_formed is not by_products
        for one, other in zip(found.measure(right), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
        assert len(pads) <= 1


@pytest.mark.parametrize("kind", [Convolved, ConvolvedByProducts], ids=lambda kind: kind.__name__)
def test_an_accelerator_multiplies_matrices(kind, monkeypatch):
    if kind is ConvolvedByProducts:
        monkeypatch.setattr(devices, "_PROCESSORS", frozenset())
    layer, inputs = convolution(2, True)
    found = layer_type(layer).contributions(layer, inputs, layer(inputs), Arrangement(Layout.FIRST, N))["weight"]
    assert type(found) is type(found.at(slice(1, 3))) is kind


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_frozen_parameters_are_left_out(frozen):
    layer, inputs = convolution(2, True)
    getattr(layer, frozen).requires_grad_(False)
    output_gradients = torch.randn_like(layer(inputs))
    found = layer_type(layer).contributions(layer, inputs, output_gradients, Arrangement(Layout.FIRST, N))
    assert found.keys() == {"weight", "bias"} - {frozen}


@pytest.mark.parametrize("many", [True, False], ids=["many positions", "few positions"])
def test_tensors_that_training_made_are_not_written_to(many):
    layer, inputs = convolution(2, many, padding=(1, 1))
    output_gradients = torch.randn_like(layer(inputs))
    before = inputs.clone(), output_gradients.clone()
    found = layer_type(layer).contributions(layer, inputs, output_gradients, Arrangement(Layout.FIRST, N))
    found["weight"].measure(Directions([layer.weight], 0).right(0))
    assert torch.equal(inputs, before[0])
    assert torch.equal(output_gradients, before[1])


@pytest.mark.parametrize("missing", [0, 1, 2])
@pytest.mark.parametrize("dimensions", TYPES)
def test_only_a_batch_has_examples(dimensions, missing):
    layer, inputs = convolution(dimensions, True)
    while inputs.ndim > dimensions + 2 - missing:
        inputs = inputs[0]
    assert layer_type(layer).leading(layer, inputs) == (1 if missing == 0 else 0)
