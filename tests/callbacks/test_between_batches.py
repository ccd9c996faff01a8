"""What cannot be split into examples is measured between groups of them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_graddiv import estimate_diversity
from tests.audit import warned
from tests.in_band import Collector, Convolutional, Witness, signals, trained


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class Normalized(Convolutional):
    def __init__(self):
        super().__init__()
        self.body[1] = nn.BatchNorm1d(8)


def group_gradients(module, step, batches, loss=None):
    """Gradients of whole groups at the step's weights, on copies."""
    found = []
    for batch in batches:
        net = copy.deepcopy(module.net)
        net.load_state_dict(step.weights)
        value = (loss or module.loss)(net.train(), batch)
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, list(net.parameters()))]).double())
    return torch.stack(found)


def expected_moments(groups, size):
    """Return M, S1 and S2 of equal groups: an analysis of variance, written anew."""
    count = len(groups) * size
    mean = groups.mean(0)
    trace = size * float((groups - mean).square().sum()) / (len(groups) - 1)
    sq_norm = float(mean.square().sum())
    return count, count * (sq_norm - trace / count + trace), count**2 * sq_norm


def assert_moments(probe, expected):
    assert (probe.count, probe.sum_sq_norms, probe.sq_norm_of_sum) == pytest.approx(expected, rel=1e-4)


def measured(module, *args, match, **kwargs):
    monitor = Collector()
    with warned(match) as said:
        trained(module, *args, monitor=monitor, **kwargs)
    assert len(said) == 1
    assert monitor._measurer.engine == "microbatch"
    return monitor.probes


def test_batch_normalisation_is_measured_between_groups_of_the_micro_batch():
    module = Witness(Normalized())
    probes = measured(module, signals(96), batch_size=16, match="mixes the examples.*engine `microbatch`")
    assert len(probes) == len(module.steps) == 6
    for probe, step in zip(probes, module.steps, strict=True):
        (x, y), *_ = step.batches
        groups = group_gradients(module, step, [(x[:8], y[:8]), (x[8:], y[8:])])
        assert_moments(probe, expected_moments(groups, 8))


def test_and_training_with_it_stays_bit_identical():
    def state(*callbacks):
        torch.manual_seed(3)
        module = Witness(Normalized())
        trained(module, signals(96), batch_size=16, callbacks=list(callbacks))
        return module.net.state_dict()

    with warned("mixes the examples"):
        measured_state = state(Collector())
    plain = state()
    assert all(torch.equal(plain[name], measured_state[name]) for name in plain)


def test_a_last_batch_that_is_too_small_to_regroup_is_passed_over():
    module = Witness(Normalized())
    probes = measured(module, signals(36), batch_size=16, match="mixes the examples")
    assert len(probes) == 2


def test_between_the_micro_batches_of_a_window_where_there_are_some():
    module = Witness(Normalized())
    probes = measured(module, signals(96), accumulate_grad_batches=3, match="mixes the examples")
    assert len(probes) == len(module.steps) == 4
    for probe, step in zip(probes, module.steps, strict=True):
        assert_moments(probe, expected_moments(group_gradients(module, step, step.batches), 8))


def test_a_window_that_is_not_full_counts_the_micro_batches_it_has():
    module = Witness(Normalized())
    probes = measured(module, signals(40), accumulate_grad_batches=3, match="mixes the examples")
    assert [probe.count for probe in probes] == pytest.approx([24, 16])
    assert_moments(probes[1], expected_moments(group_gradients(module, module.steps[1], module.steps[1].batches), 8))


def contrast(net, batch):
    x, y = batch
    return F.cross_entropy(net(x) @ y.T, torch.arange(len(x)))


@pytest.mark.parametrize("net", [Convolutional, Normalized])
def test_a_contrastive_loss_is_measured_between_consecutive_steps(net):
    module = Witness(net(), contrast)
    probes = measured(module, signals(48), match="mixes the examples|cannot be split|needs more than one")
    assert len(probes) == 3
    for probe, first, second in zip(probes, module.steps[::2], module.steps[1::2], strict=True):
        groups = torch.cat([group_gradients(module, step, step.batches) for step in (first, second)])
        assert_moments(probe, expected_moments(groups, 8))


def test_rows_that_are_not_examples_are_counted_by_the_loader():
    """Eight graphs of three or four nodes each: 28 rows."""

    def collate(examples):
        x, y = (torch.stack(parts) for parts in zip(*examples, strict=True))
        nodes = [3, 4] * (len(x) // 2)
        return (
            x.repeat_interleave(torch.tensor(nodes), 0),
            torch.repeat_interleave(torch.arange(len(x)), torch.tensor(nodes)),
            y,
        )

    def graphs(net, batch):
        x, owner, y = batch
        return F.mse_loss(torch.zeros(len(y), 4).index_add(0, owner, net(x)), y)

    module = Witness(Convolutional(), graphs)
    loader = DataLoader(signals(48), 8, collate_fn=collate)
    probes = measured(module, loader, match="cannot be split into examples")
    assert [probe.count for probe in probes] == pytest.approx([16] * 3)


def test_the_engine_can_be_asked_for():
    module = Witness(Convolutional())
    monitor = trained(module, monitor=Collector(engine="microbatch"), accumulate_grad_batches=2)
    for probe, step in zip(monitor.probes, module.steps, strict=True):
        assert_moments(probe, expected_moments(group_gradients(module, step, step.batches), 8))


def test_it_finds_the_known_bound_under_batch_normalisation():
    """Truth: independent micro-batches at fixed weights."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    module = Witness(net, learning_rate=0.0)
    data = signals(32 * 120)
    monitor = Collector(window=4)
    with warned("mixes the examples|cannot be differentiated"):
        trained(module, data, batch_size=32, monitor=monitor)
    gradients = torch.cat([group_gradients(module, step, step.batches) for step in module.steps])
    noise = float(gradients.var(0).sum())
    truth = 32 * noise / (float(gradients.mean(0).square().sum()) - noise / len(gradients)) + 1
    assert len(monitor.probes) == 120
    assert estimate_diversity(monitor.probes).rho == pytest.approx(1 / truth, rel=0.2)


def test_ragged_micro_batches_are_weighed_as_the_optimizer_weighs_them():
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(13 * 400, 3, generator=generator, dtype=torch.float64) + torch.tensor([1.0, 0.0, 0.0])

    class Ragged(torch.utils.data.Sampler):
        batch_size = None

        def __iter__(self):
            for start in range(0, len(x), 13):
                yield list(range(start, start + 11))
                yield list(range(start + 11, start + 13))

        def __len__(self):
            return 2 * len(x) // 13

    module = Witness(nn.Linear(3, 1, bias=False).double(), lambda net, batch: net(batch[0]).mean(), learning_rate=0.0)
    monitor = Collector(engine="microbatch", window=400)
    loader = DataLoader(TensorDataset(x), batch_sampler=Ragged())
    trained(module, loader, monitor=monitor, accumulate_grad_batches=2, precision="64-true")
    assert monitor.probes[0].count == pytest.approx(4 / (1 / 11 + 1 / 2))
    assert monitor.latest.rho == pytest.approx(1 / 4, rel=0.1)  # |G|^2 = 1 and trace 3
