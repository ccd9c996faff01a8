"""Norms and projections of contributions that are never formed, against contributions formed by hand."""

import weakref

import pytest
import torch

from lightning_graddiv.per_example import devices, factors
from lightning_graddiv.per_example.directions import Directions
from lightning_graddiv.per_example.factors import Explicit, Factor, Lookup
from lightning_graddiv.per_example.linear_maps import Outer, Rows
from lightning_graddiv.per_example.totals import Total, added

N = 5


def normal(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


def explicit(*shape):
    values = normal(N, *shape)
    return Explicit(values), values


def outer(positions, fan_in, fan_out):
    a, b = normal(N, positions, fan_in), normal(N, positions, fan_out)
    return Outer(a, b, torch.Size((fan_out, fan_in))), torch.stack([b[i].T @ a[i] for i in range(N)])


def lookup(positions, rows, width):
    """At most three different rows for each example, so that some are taken more than once."""
    index, b = (torch.randint(0, 3, (N, positions)) * 2 + torch.arange(N)[:, None]) % rows, normal(N, positions, width)
    formed = torch.zeros(N, rows, width, dtype=b.dtype)
    for i in range(N):
        for t in range(positions):
            formed[i, index[i, t]] += b[i, t]
    return Lookup(index, b, torch.Size((rows, width))), formed


def total(*parts):
    return Total(tuple(part for part, _ in parts)), sum(formed for _, formed in parts)


def rows(fan_in, fan_out):
    a, b = normal(N, fan_in), normal(N, fan_out)
    return Rows(a, b, torch.Size((fan_out, fan_in))), torch.einsum("no,ni->noi", b, a)


ONE_POSITION = {
    "one position": lambda: outer(1, 4, 3),
    "rows": lambda: rows(4, 3),
}
FEW_POSITIONS = {
    "few positions": lambda: outer(3, 8, 9),
    "as many positions as pay": lambda: outer(3, 6, 6),
}
MANY_POSITIONS = {
    "many positions": lambda: outer(20, 4, 3),
    "one position more than pays": lambda: outer(4, 6, 6),
}
LOOKUPS = {
    "a table": lambda: lookup(7, 9, 4),
    "a table that every position takes the same row of": lambda: lookup(4, 1, 3),
    "a table at one position": lambda: lookup(1, 9, 4),
}
TABLES_WITH_A_HEAD = {
    "a table and its head": lambda: total(outer(2, 4, 9), lookup(5, 9, 4)),
    "a head and its table": lambda: total(lookup(5, 9, 4), outer(1, 4, 9)),
}
OTHERS = {
    "a bias": lambda: explicit(4),
    "a number": lambda: explicit(),
    "a matrix": lambda: explicit(2, 3),
    "two biases": lambda: total(explicit(4), explicit(4)),
    "a linear map and what is added to it": lambda: total(outer(3, 4, 9), explicit(9, 4)),
    "a table, its head and what is added to it": lambda: total(outer(2, 4, 9), lookup(5, 9, 4), explicit(9, 4)),
}
CASES = ONE_POSITION | FEW_POSITIONS | MANY_POSITIONS | LOOKUPS | TABLES_WITH_A_HEAD | OTHERS


def build(name, seed=0):
    torch.manual_seed(seed)
    return CASES[name]()


def right_of(shape, seed=1, dtype=torch.float64):
    return Directions([torch.zeros(shape, dtype=dtype)], seed).right(0)


def assert_measures(contributions, formed):
    right = right_of(formed.shape[1:])
    norms, image = contributions.measure(right)
    assert norms.dtype == torch.float64
    torch.testing.assert_close(norms, formed.reshape(len(formed), -1).square().sum(1), rtol=1e-10, atol=1e-10)
    seen = formed.sum(0).reshape(-1, len(right)) @ right
    torch.testing.assert_close(image, seen, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_norms_and_projections_are_those_of_the_contributions(name):
    assert_measures(*build(name))


@pytest.mark.parametrize("name", CASES)
def test_contributions_can_be_formed(name):
    contributions, formed = build(name)
    assert len(contributions) == N
    assert contributions.shape == formed.shape[1:]
    for _ in range(2):  # forming them leaves them as they are
        torch.testing.assert_close(contributions.explicit(), formed, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("examples", [slice(0, 1), slice(1, 4), slice(3, 100)], ids=str)
def test_some_examples_have_their_own_contributions(name, examples):
    contributions, formed = build(name)
    some = contributions.at(examples)
    assert len(some) == len(formed[examples])
    assert some.shape == formed.shape[1:]
    torch.testing.assert_close(some.explicit(), formed[examples], rtol=1e-12, atol=1e-12)
    assert_measures(some, formed[examples])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunk_bytes", [1, 300, 10**9])
def test_numbers_do_not_depend_on_the_chunk(name, chunk_bytes, monkeypatch):
    contributions, formed = build(name)
    monkeypatch.setattr(devices, "_CHUNK_BYTES", chunk_bytes)
    assert_measures(contributions, formed)


@pytest.mark.parametrize(("chunk_bytes", "sizes"), [(1, [1] * 5), (4 * 12 * 2, [2, 2, 1]), (4 * 12 * 5, [5])])
def test_chunks_hold_all_examples_in_their_order_and_no_more_than_fits(chunk_bytes, sizes, monkeypatch):
    monkeypatch.setattr(devices, "_CHUNK_BYTES", chunk_bytes)
    contributions, formed = build("many positions")  # of 12 entries each
    chunks = list(contributions.chunks())
    assert [len(chunk) for chunk in chunks] == sizes
    torch.testing.assert_close(torch.cat([chunk.explicit() for chunk in chunks]), formed)


def refuse(*_):
    pytest.fail("this way was not to be taken")


@pytest.mark.parametrize("name", [*ONE_POSITION, *FEW_POSITIONS, *LOOKUPS, *TABLES_WITH_A_HEAD])
def test_contributions_are_not_formed_where_that_costs_more(name, monkeypatch):
    contributions, formed = build(name)
    for kind in (Outer, Rows, Lookup, Total):
        monkeypatch.setattr(kind, "explicit", refuse)
    assert_measures(contributions, formed)


@pytest.mark.parametrize("name", [*ONE_POSITION, *MANY_POSITIONS])
def test_positions_are_not_compared_with_each_other_where_that_costs_more(name, monkeypatch):
    contributions, formed = build(name)
    monkeypatch.setattr(Outer, "_by_gram", refuse)
    assert_measures(contributions, formed)


def test_products_between_positions_are_bounded(monkeypatch):
    contributions, formed = build("few positions")
    held, products, by_gram, multiply = [], [], Outer._by_gram, Factor.products.func

    def watched(part):
        held.append(len(part))
        assert all(product() is None for product in products)  # of the parts before
        return by_gram(part)

    def multiplied(output_gradients):
        found = multiply(output_gradients)
        products.append(weakref.ref(found))
        return found

    monkeypatch.setattr(Outer, "_by_gram", watched)
    monkeypatch.setattr(Factor.products, "func", multiplied)
    monkeypatch.setattr(devices, "_CHUNK_BYTES", 2 * 8 * 3**2)  # two examples, float64, 3 positions
    assert_measures(contributions, formed)
    assert held == [2, 2, 1]
    assert len(products) == 3


def cancelling(n=400, width=16):
    """Three positions whose products cancel, up to rounding; and a table's rows that do."""
    u, v, w = (normal(n, width, dtype=torch.float32) for _ in range(3))
    a, b = torch.stack([u, v, u + v], 1), torch.stack([w, w, -w], 1)
    summed = Outer(a, b, torch.Size((width, width)))
    head = Outer(a[:, :1], torch.eye(width)[torch.arange(n) % width][:, None], torch.Size((width, width)))
    table = Lookup((torch.arange(n) % width)[:, None].expand(n, 2), torch.stack([v, -u - v], 1), head.shape)
    return {"positions": summed, "a table and its head": Total((head, table))}


@pytest.mark.parametrize("name", ["positions", "a table and its head"])
def test_what_cancels_has_a_norm_of_zero_up_to_rounding_and_never_less(name):
    torch.manual_seed(0)
    norms, _ = cancelling()[name].measure(right_of((16, 16), dtype=torch.float32))
    assert bool((norms >= 0).all())
    assert float(norms.max()) < 1e-3


USES = {
    "linear maps": (FEW_POSITIONS["few positions"], lambda: outer(1, 8, 9)),
    "linear maps of rows": (lambda: rows(8, 9), lambda: outer(2, 8, 9), lambda: rows(8, 9)),
    "tables and heads of rows": (lambda: lookup(5, 9, 4), lambda: rows(4, 9)),
    "tables": (LOOKUPS["a table"], LOOKUPS["a table at one position"]),
    "biases": (OTHERS["a bias"],) * 2,
    "tables and heads": (
        lambda: lookup(5, 9, 4),
        lambda: outer(1, 4, 9),
        lambda: lookup(2, 9, 4),
        lambda: outer(1, 4, 9),
    ),
    "every kind": (lambda: lookup(5, 9, 4), lambda: explicit(9, 4), lambda: outer(2, 4, 9), lambda: explicit(9, 4)),
}


@pytest.mark.parametrize("name", USES)
def test_several_uses_of_a_parameter_are_added_up_before_the_norm(name):
    torch.manual_seed(0)
    uses, formed = zip(*(make() for make in USES[name]), strict=True)
    together = added(uses)
    torch.testing.assert_close(together.explicit(), sum(formed), rtol=1e-12, atol=1e-12)
    assert_measures(together, sum(formed))
    for use, alone in zip(uses, formed, strict=True):  # as they were
        torch.testing.assert_close(use.explicit(), alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in USES if name not in {"biases", "every kind"}])
def test_several_uses_are_not_formed_to_be_added_up(name, monkeypatch):
    torch.manual_seed(0)
    uses, formed = zip(*(make() for make in USES[name]), strict=True)
    for kind in (Outer, Rows, Lookup, Total):
        monkeypatch.setattr(kind, "explicit", refuse)
    assert_measures(added(uses), sum(formed))


@pytest.mark.parametrize("name", ["few positions", "rows", "a table", "a bias", "a table and its head"])
def test_a_single_use_is_left_as_it_is(name):
    contributions, formed = build(name)
    assert type(added([contributions])) is type(contributions)
    assert_measures(added([contributions]), formed)


def test_norms_of_several_maps_can_be_taken_together(monkeypatch):
    (some, formed), (others, formed_too) = build("rows"), build("rows", seed=1)
    Factor.take_sq_norms([*some.factors, *others.factors])
    monkeypatch.setattr(factors, "sq_norms_of_rows", refuse)
    assert_measures(some, formed)
    assert_measures(others, formed_too)


@pytest.mark.parametrize(
    ("contributions", "shape"),
    [
        (Outer(torch.zeros(N, 0, 3), torch.zeros(N, 0, 4), torch.Size((4, 3))), (4, 3)),
        (Lookup(torch.zeros(N, 0, dtype=torch.long), torch.zeros(N, 0, 3), torch.Size((4, 3))), (4, 3)),
    ],
    ids=["linear map", "table"],
)
def test_examples_without_positions_contribute_nothing(contributions, shape):
    """A batch of sequences that are all empty."""
    norms, image = contributions.measure(right_of(shape, dtype=torch.float32))
    assert norms.tolist() == [0.0] * N
    assert image.tolist() == [0.0] * 4


@pytest.mark.parametrize(("device", "width", "formed"), [("cpu", 64, False), ("meta", 64, True), ("meta", 8192, False)])
def test_an_accelerator_forms_what_is_small_where_a_processor_multiplies_positions(device, width, formed):
    inputs, output_gradients = (torch.zeros(N, 2, width, device=device) for _ in "ab")
    assert Outer(inputs, output_gradients, torch.Size((width, width))).are_formed is formed
