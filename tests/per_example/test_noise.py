"""With noise off, what was random is a constant that depends on no batch, and it is known that it was random."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import vmap

from lightning_graddiv.per_example.noise import noise_off, restart_noise

CONSTANTS = {
    "rand": lambda n: torch.rand(n, 3),
    "rand_like": lambda n: torch.rand_like(torch.zeros(n, 3)),
    "randn": lambda n: torch.randn(n, 3),
    "normal": lambda n: torch.normal(torch.zeros(n, 3), 1.0),
    "uniform_": lambda n: torch.empty(n, 3).uniform_(2, 3),
    "randint": lambda n: torch.randint(2, 9, (n, 3)),
    "bernoulli": lambda n: torch.bernoulli(torch.full((n, 3), 0.5)),
    "multinomial": lambda n: torch.ones(n, 3).multinomial(1),
    "exponential": lambda n: torch.empty(n, 3).exponential_(),
    "poisson": lambda n: torch.poisson(torch.ones(n, 3)),
    "generator": lambda n: torch.rand(n, 3, generator=torch.Generator().manual_seed(n)),
    "gumbel": lambda n: F.gumbel_softmax(torch.zeros(n, 3)),
    "normal distribution": lambda n: torch.distributions.Normal(torch.zeros(n, 3), 1.0).rsample(),
    "categorical": lambda n: torch.distributions.Categorical(torch.ones(n, 3)).sample(),
    "beta": lambda n: torch.distributions.Beta(torch.ones(n), 1.0).sample(),
}


@pytest.mark.parametrize("high", [False, True])
@pytest.mark.parametrize("name", CONSTANTS)
def test_random_tensors_are_the_same_for_every_example_and_batch(name, high):
    draw = CONSTANTS[name]
    with noise_off(high=high) as noise:
        one, many = draw(1), draw(5)
    assert noise.drawn
    assert torch.equal(many, one.expand_as(many))
    assert bool(torch.isfinite(many).all())


DROPOUTS = {
    "dropout": lambda x: F.dropout(x, 0.5),
    "inplace": lambda x: F.dropout(x, 0.5, inplace=True),
    "dropout1d": lambda x: F.dropout1d(x, 0.5),
    "alpha": lambda x: F.alpha_dropout(x, 0.5, training=True),
    "feature alpha": lambda x: F.feature_alpha_dropout(x, 0.5, training=True),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    "lstm": lambda x: _seeded(nn.LSTM(4, 4, 2, dropout=0.5, batch_first=True))(x)[0],
    "encoder": lambda x: _seeded(nn.TransformerEncoderLayer(4, 1, 4, dropout=0.5, batch_first=True))(x),
}


def _seeded(module):
    for parameter in module.parameters():
        parameter.data = torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape)
    return module


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_keeps_everything(name):
    x = torch.linspace(-1, 1, 24).reshape(2, 3, 4)
    with noise_off() as noise:
        first, second = DROPOUTS[name](x.clone()), DROPOUTS[name](x.clone())
        alone = DROPOUTS[name](x[:1].clone())
    assert noise.drawn
    assert torch.equal(first, second)
    torch.testing.assert_close(alone, first[:1])
    assert first.count_nonzero() == first.numel()


def test_gradients_flow_through_dropout_without_noise():
    x = torch.ones(100, requires_grad=True)
    with noise_off():
        F.dropout(x, 0.5).sum().backward()
    assert x.grad.count_nonzero() == 100
    assert len(x.grad.unique()) == 1


@pytest.mark.parametrize(
    "draw",
    [lambda: F.dropout(torch.ones(3), 0.0), lambda: torch.zeros(3).sort(), lambda: nn.Linear(2, 2)],
    ids=["dropout of nothing", "sort", "a layer"],
)
def test_what_is_not_random_is_left_alone(draw):
    with noise_off() as noise:
        F.dropout(torch.ones(3), 0.5, training=False), F.dropout(torch.ones(3), 0.0)
        torch.testing.assert_close(torch.zeros(3).sort()[1], torch.arange(3))
    assert not noise.drawn


@pytest.mark.parametrize(
    "shuffle",
    [lambda n: torch.randperm(n), lambda n: torch.rand(n).argsort(), lambda n: torch.randn(n).topk(n)[1]],
    ids=["randperm", "argsort", "topk"],
)
@pytest.mark.parametrize("n", [2, 5])
def test_shuffles_move_every_example(shuffle, n):
    with noise_off():
        permutation = shuffle(n)
    assert sorted(permutation.tolist()) == list(range(n))
    assert all(permutation != torch.arange(n))


def test_shuffles_within_examples_are_the_same_in_every_batch():
    with noise_off():
        one, many = torch.rand(1, 4).argsort(1), torch.rand(3, 4).argsort(1)
    assert torch.equal(many, one.expand(3, -1))


@pytest.mark.parametrize(
    "draw", [random.random, np.random.rand, lambda: torch.rand(()).item()], ids=["py", "np", "torch"]
)
def test_whatever_happens_with_some_probability_happens_and_does_not(draw):
    found = []
    for high in (False, True):
        with noise_off(high=high):
            restart_noise()
            found.append(draw())
    assert found[0] < 0.15
    assert found[1] > 0.85


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["python", "numpy"])
def test_noise_from_outside_torch_is_noticed_and_begins_the_same_in_every_step(draw):
    with noise_off() as noise:
        restart_noise()
        first = draw()
        restart_noise()
        assert draw() == first
        assert noise.drawn
    with noise_off() as noise:
        restart_noise()
    assert not noise.drawn
    with noise_off() as noise:
        restart_noise()
        draw()
    assert noise.drawn


def test_a_normal_number_that_was_kept_before_is_no_noise():
    np.random.seed(0)
    np.random.randn()
    with noise_off() as noise:
        for _ in range(3):
            restart_noise()
    assert not noise.drawn


def test_steps_outside_of_a_check_keep_their_noise():
    random.seed(1)
    first = random.random()
    restart_noise()
    assert random.random() != first


def test_noise_is_off_under_vmap_too():
    with noise_off() as noise:
        kept = vmap(lambda x: F.dropout(x, 0.5) + torch.rand_like(x), randomness="different")(torch.ones(3, 4))
    assert noise.drawn
    assert len(kept.unique()) == 1


def test_noise_comes_back():
    with pytest.raises(KeyError), noise_off():
        raise KeyError
    assert len(torch.rand(9).unique()) > 1
    state = random.getstate()
    restart_noise()
    assert random.getstate() == state
