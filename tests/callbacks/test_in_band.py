"""In-band measuring against the plain loop over the same effective batch, in every setting that training knows."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_graddiv import GradientDiversityMonitor
from tests.audit import ScaledInFull, warned
from tests.devices import DEVICE
from tests.in_band import (
    Collector,
    Convolutional,
    Wide,
    Witness,
    contributions,
    rho,
    rho_of,
    signals,
    trained,
    worst_error,
)

EXACT = 1e-5


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def test_every_step_is_measured_as_the_loop_would():
    module = Witness(Convolutional())
    monitor = trained(module)
    assert len(monitor.probes) == 6
    assert worst_error(monitor.probes, module) < EXACT
    assert monitor.coverages == [1.0] * 6


def test_in_float64_to_the_last_digits():
    module = Witness(Convolutional().double())
    monitor = trained(module, signals(dtype=torch.float64), precision="64-true")
    assert worst_error(monitor.probes, module) < 1e-12


@pytest.mark.parametrize("accumulate", [1, 2])
def test_with_weights_too_large_to_be_kept(accumulate):
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 2000), nn.Tanh(), nn.Linear(2000, 40), nn.Tanh(), nn.Linear(40, 4))
    module = Witness(net.double())
    data = signals(16, dtype=torch.float64)
    monitor = trained(module, data, precision="64-true", accumulate_grad_batches=accumulate)
    assert worst_error(monitor.probes, module) < 1e-12
    module = Witness(net.float())
    monitor = trained(module, signals(16), accumulate_grad_batches=accumulate)
    assert worst_error(monitor.probes, module) < EXACT


def test_over_the_whole_accumulation_window():
    module = Witness(Convolutional())
    monitor = trained(module, accumulate_grad_batches=3)
    assert [probe.count for probe in monitor.probes] == pytest.approx([24, 24])
    assert worst_error(monitor.probes, module) < EXACT


def test_with_ragged_micro_batches_and_a_window_that_is_not_full():
    module = Witness(Convolutional())
    monitor = trained(module, signals(43), accumulate_grad_batches=4)  # 8 8 8 8, 8 3
    assert monitor.probes[1].count == pytest.approx((1 + 1) ** 2 / (1 / 8 + 1 / 3))
    assert worst_error(monitor.probes, module) < EXACT


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_before_clipping(algorithm):
    module = Witness(Convolutional())
    monitor = trained(module, gradient_clip_val=1e-3, gradient_clip_algorithm=algorithm, accumulate_grad_batches=2)
    assert worst_error(monitor.probes, module) < EXACT


def test_in_bf16_mixed():
    module = Witness(Wide())
    monitor = trained(module, signals(192), batch_size=32, precision="bf16-mixed", accumulate_grad_batches=2)
    assert worst_error(monitor.probes, module, autocast=lambda: torch.autocast(DEVICE, torch.bfloat16)) < 1e-3


def test_with_a_gradient_scaler():
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**12)
    module = Witness(Convolutional())
    monitor = trained(module, plugins=[MixedPrecision("16-mixed", DEVICE, scaler)], accumulate_grad_batches=3)
    half = {"autocast": lambda: torch.autocast(DEVICE, torch.float16)}
    assert worst_error(monitor.probes, module, **half) < 1e-3
    own = [float(contributions(module.net, module.loss, step, **half)[0].square().sum()) for step in module.steps]
    found = [probe.sum_sq_norms / 24**2 for probe in monitor.probes]
    assert found == pytest.approx(own, rel=1e-3)


def test_the_scalers_factor_itself_costs_no_digit():
    module = Witness(Convolutional())
    monitor = trained(module, plugins=[ScaledInFull()], accumulate_grad_batches=3)
    assert worst_error(monitor.probes, module) < EXACT


def test_a_step_that_the_scaler_skips_is_dropped():
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**40)
    module, monitor = Witness(Convolutional()), Collector()
    with warned("not finite"):
        trained(module, monitor=monitor, plugins=[MixedPrecision("16-mixed", DEVICE, scaler)])
    assert len(monitor.probes) < len(module.steps)


class Checkpointed(Convolutional):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x):
        x = self.body[0](x)
        return self.body[6:](checkpoint(self.body[1:6], x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_activation_checkpoints(reentrant):
    module = Witness(Checkpointed(reentrant))
    monitor = trained(module)
    assert monitor.coverages == [1.0] * 6
    plain = Witness(Convolutional())
    plain.steps = module.steps
    assert worst_error(monitor.probes, plain) < EXACT


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 3), nn.Flatten())

    def forward(self, x):
        return self.body(x.to(memory_format=torch.channels_last))


def test_with_channels_last():
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(24, 3, 7, 7, generator=generator), torch.randn(24, 36, generator=generator))
    module = Witness(Images().to(memory_format=torch.channels_last))
    assert worst_error(trained(module, data).probes, module) < EXACT


def test_with_compiled_layers_and_without_recompiling_them():
    net = Convolutional()
    module = Witness(net)
    compiled = torch.compile(net, backend="aot_eager")
    module.loss = lambda _, batch: F.mse_loss(compiled(batch[0]), batch[1])
    monitor = Collector(every_n_steps=2)
    from torch._dynamo.utils import counters

    counters.clear()
    trained(module, monitor=monitor)
    assert len(monitor.probes) == 3
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    expected = [rho_of(*contributions(net, lambda n, b: F.mse_loss(n(b[0]), b[1]), s))[0] for s in module.steps[1::2]]
    assert [rho(probe) for probe in monitor.probes] == pytest.approx(expected, abs=EXACT / 7)


def test_with_frozen_parameters_and_adapters():
    class Adapted(nn.Module):
        """A frozen layer with a trained detour of low rank."""

        def __init__(self):
            super().__init__()
            self.base, self.down, self.up = nn.Linear(36, 4), nn.Linear(36, 2, bias=False), nn.Linear(2, 4, bias=False)
            self.base.requires_grad_(False)

        def forward(self, x):
            return self.base(x.flatten(1)) + self.up(self.down(x.flatten(1)))

    module = Witness(Adapted())
    monitor = trained(module)
    assert worst_error(monitor.probes, module) < EXACT


def test_with_several_forward_passes_in_one_step():
    def siamese(net, batch):
        x, y = batch
        return (F.mse_loss(net(x), y) + F.mse_loss(net(x.flip(2)), y)) / 2

    module = Witness(Convolutional(), siamese)
    assert worst_error(trained(module).probes, module) < EXACT


def test_with_views_stacked_under_each_other():
    """The layers see three rows for each example, which do not stand together."""

    def views(net, batch):
        x, y = batch
        out = net(torch.cat([x, x.flip(2), 2 * x])).unflatten(0, (3, -1))
        return F.mse_loss(out.mean(0), y) + F.mse_loss(out[0], out[1])

    module = Witness(Convolutional(), views)
    assert worst_error(trained(module).probes, module) < EXACT


class Sequential(nn.Module):
    """A recurrent layer of two layers in both directions, of which the output and the last state are used."""

    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(3, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        output, state = self.rnn(x.transpose(1, 2))
        hidden = state[0] if isinstance(state, tuple) else state
        return self.head(torch.cat([output.mean(1), hidden[0], hidden[-1]], 1))


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_measured_in_the_step_itself(kind, accumulate):
    module = Witness(Sequential(kind))
    monitor = trained(module, accumulate_grad_batches=accumulate)
    assert worst_error(monitor.probes, module) < EXACT
    assert monitor._measurer.engine == "ghost"
    assert monitor.coverages == [1.0] * len(monitor.probes)
    assert monitor._measurer._ghost.misses == {}  # nothing was left to another engine


def test_recurrent_layers_in_float64_to_the_last_digits():
    module = Witness(Sequential(nn.LSTM).double())
    monitor = trained(module, signals(dtype=torch.float64), precision="64-true")
    assert worst_error(monitor.probes, module) < 1e-12


class Manual(Witness):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss


def test_with_manual_optimization():
    module = Manual(Convolutional())
    monitor = trained(module)
    assert worst_error(monitor.probes, module) < EXACT


def test_manual_optimization_that_accumulates():
    class Twice(Manual):
        def training_step(self, batch, batch_idx):
            loss = Witness.training_step(self, batch, batch_idx)
            self.manual_backward(loss / 2)
            if batch_idx % 2:
                self.optimizers().step()
                self.optimizers().zero_grad()

    module = Twice(Convolutional())
    monitor = trained(module)
    assert [probe.count for probe in monitor.probes] == pytest.approx([16] * 3)
    assert worst_error(monitor.probes, module) < EXACT


def test_several_backward_passes_in_one_step_are_refused():
    class Both(Manual):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(Witness.training_step(self, batch, batch_idx))
            self.manual_backward(Witness.training_step(self, batch, batch_idx))
            optimizer.step()

    monitor = Collector()
    with warned("several backward passes"):
        trained(Both(Convolutional()), monitor=monitor)
    assert not monitor.probes


def test_gradients_that_training_changes_before_the_step_are_refused():
    class Clips(Manual):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(Witness.training_step(self, batch, batch_idx))
            self.clip_gradients(optimizer, gradient_clip_val=1e-3)
            optimizer.step()

    monitor = Collector()
    with warned("is not the mean of what the processes' backward passes gave"):
        trained(Clips(Convolutional()), monitor=monitor)
    assert not monitor.probes


@pytest.mark.parametrize("name", ["body.0.weight", "body.6.bias"], ids=["a matrix", "a vector"])
def test_gradients_that_a_callback_before_ours_changes_are_refused(name):
    """It sees them before we are told that the backward pass is over."""

    class Triples(Callback):
        def on_after_backward(self, trainer, pl_module):
            pl_module.net.get_parameter(name).grad.mul_(3)

    monitor = Collector()
    with warned("is not the mean of what the processes' backward passes gave"):
        trained(Witness(Convolutional()), monitor=monitor, callbacks=[Triples(), monitor])
    assert not monitor.probes


class Bag(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.table, self.head = nn.Embedding(rows, 6, sparse=True), nn.Linear(6, 3)

    def forward(self, index):
        return self.head(torch.tanh(self.table(index)).mean(1))


def bag_mean(net, batch):
    return F.cross_entropy(net(batch[0]), batch[1])


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("rows", [11, 12_000], ids=["small", "large"])
def test_with_a_table_whose_gradient_is_sparse(rows, accumulate):
    index, target = torch.randint(rows, (48, 5)), torch.randint(3, (48,))
    module = Witness(Bag(rows), bag_mean)
    monitor = trained(module, TensorDataset(index, target), accumulate_grad_batches=accumulate)
    assert monitor._measurer.engine == "ghost"
    assert worst_error(monitor.probes, module) < EXACT


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(11, 6, padding_idx=0), nn.Linear(6, 11)

    def forward(self, index):
        return self.head(torch.tanh(self.table(index)))


def token_mean(net, batch):
    index, target = batch
    return F.cross_entropy(net(index).flatten(0, 1), target.flatten(), ignore_index=0)


def padded(examples=4096, length=8, seed=2):
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(1, 11, (examples, length), generator=generator)
    lengths = torch.randint(1, length + 1, (examples, 1), generator=generator)
    index = index.masked_fill(torch.arange(length) >= lengths, 0)
    return TensorDataset(index, (index * 3 % 11).masked_fill(index == 0, 0))


def test_a_mean_over_the_tokens_of_padded_sequences_has_weighted_examples():
    """Truth: the noise of whole batches' gradients at fixed weights, without a look at single examples."""
    net = Tokens().double()
    module = Witness(net, token_mean, learning_rate=0.0)
    monitor = trained(module, padded(), batch_size=32, precision="64-true", monitor=Collector(window=128))
    gradients = []
    for step in module.steps:
        value = token_mean(net, [part.cpu() for part in step.batches[0]])
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, list(net.parameters()))]))
    gradients = torch.stack(gradients)
    noise = float(gradients.var(0).sum())
    signal = float(gradients.mean(0).square().sum()) - noise / len(gradients)
    assert monitor.latest.bound == pytest.approx(1 + 32 * noise / signal, rel=0.1)


def test_parameters_that_no_rule_covers_are_measured_by_running_the_step_again():
    class Scaled(Convolutional):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3, 1))

        def forward(self, x):
            return super().forward(x * self.scale)

    module = Witness(Scaled())
    monitor = trained(module, accumulate_grad_batches=2)
    assert worst_error(monitor.probes, module) < EXACT
    assert monitor.coverages == [1.0] * 3


def test_or_left_out_where_that_is_impossible_and_the_share_is_told():
    class Scaled(Tokens):
        def __init__(self):
            super().__init__()
            self.offset = nn.Parameter(torch.zeros(11))

        def forward(self, index):
            return super().forward(index) + 0.01 * self.offset

    module, monitor = Witness(Scaled(), token_mean), Collector()
    with warned(r"1 parameters cannot be measured.*The estimate is that of the others") as said:
        trained(module, padded(64), monitor=monitor)
    assert len(said) == 1
    assert all(0.99 < coverage < 1 for coverage in monitor.coverages)


def test_below_nine_tenths_of_the_gradient_the_next_engine_takes_over():
    class Scaled(Tokens):
        def __init__(self):
            super().__init__()
            self.offset = nn.Parameter(torch.zeros(11))

        def forward(self, index):
            return super().forward(index) + 100 * self.offset

    module, monitor = Witness(Scaled(), token_mean), Collector()
    with warned("engine `ghost` cannot measure this model: the layers with a rule hold only"):
        trained(module, padded(64), monitor=monitor)
    assert monitor._measurer.engine == "microbatch"


class TestProtections:
    """Each of them is all that stands between a user and a wrong number."""

    def test_coverage_is_proven_in_the_very_step(self):
        """The check saw the layer alone; later steps use its weight once more."""

        class Late(Convolutional):
            calls = 0

            def forward(self, x):
                out = super().forward(x)
                if torch.is_grad_enabled() and self.late:
                    out = out + 0.1 * F.linear(out, self.body[6].weight[:, :4])
                return out

        net = Late()
        net.late = False
        module, monitor = Witness(net), Collector()

        witness = module.on_train_batch_start

        def turn(batch, batch_idx):
            witness(batch, batch_idx)
            net.late = len(module.steps) > 5  # no check is due there

        module.on_train_batch_start = turn
        with warned("is not what it was when it was last checked"):
            trained(module, monitor=monitor, data=signals(64))
        assert len(monitor.probes) == 7
        for probe, step in zip(monitor.probes[:5], module.steps, strict=False):
            net.late = False
            assert rho(probe) == pytest.approx(rho_of(*contributions(net, module.loss, step))[0], abs=EXACT)
        net.late = True
        assert rho(monitor.probes[-1]) == pytest.approx(
            rho_of(*contributions(net, module.loss, module.steps[-1]))[0], abs=EXACT
        )

    def test_a_layer_that_another_is_put_in_the_place_of_costs_one_measurement(self):
        """Layers are looked for when they are proven; here another holds the same parameters, and is not watched."""

        class Replacing(Witness):
            def on_train_batch_start(self, batch, batch_idx):
                super().on_train_batch_start(batch, batch_idx)
                if len(self.steps) == 6:  # no check is due there
                    old, new = self.net.body[6], nn.Linear(30, 4)
                    new.weight, new.bias = old.weight, old.bias
                    self.net.body[6] = new

        module, monitor = Replacing(Convolutional()), Collector()
        with warned("is not what it was when it was last checked"):
            trained(module, monitor=monitor, data=signals(64))
        assert len(monitor.probes) == 7
        assert monitor.coverages == [1.0] * 7
        del module.steps[5]
        assert worst_error(monitor.probes, module) < EXACT

    def test_mixing_is_found_by_its_own_probe(self):
        def neighbours(net, batch):
            """An example alone has no neighbour, and a gradient all the same."""
            x, y = batch
            out = net(x)
            return F.mse_loss(out, y) + F.mse_loss(out, out.roll(1, 0))

        monitor = Collector()
        with warned("engine `ghost` cannot measure this model: The loss mixes the examples of a batch"):
            trained(Witness(Convolutional(), neighbours), monitor=monitor)
        assert monitor._measurer.engine == "microbatch"

    def test_a_rule_that_does_not_hold_is_found_by_the_self_check(self, monkeypatch):
        from lightning_graddiv.per_example import layers

        known = layers.LAYER_TYPES[nn.GroupNorm]

        def wrong(layer, inputs, output_gradients, arrange):
            """The right sum, shared out to the wrong examples."""
            found = known.contributions(layer, inputs, output_gradients, arrange)
            return {name: type(part)(part.values.roll(1, 0)) for name, part in found.items()}

        monkeypatch.setitem(layers.LAYER_TYPES, nn.GroupNorm, replace(known, contributions=wrong))
        module = Witness(Convolutional())
        monitor = trained(module)
        assert set(monitor._measurer._ghost.misses) == {2, 3}
        assert worst_error(monitor.probes, module) < EXACT


class TestTraces:
    def hooks(self, module):
        return sum(
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in module.modules()
        ) + sum(len(p._backward_hooks or ()) for p in module.parameters())

    def test_no_hook_is_left_after_training(self):
        module = Witness(Convolutional())
        trained(module)
        assert self.hooks(module) == 0

    @pytest.mark.parametrize(
        "place", ["training_step", "on_before_backward", "on_after_backward", "on_before_zero_grad"]
    )
    def test_no_hook_is_left_after_an_exception(self, place):
        module = Witness(Convolutional())
        original = getattr(module, place)

        def fails(*args):
            if module.trainer.global_step == 3 and module.trainer.training:  # no check is due there
                raise RuntimeError("on purpose")
            return original(*args)

        setattr(module, place, fails)
        with pytest.raises(RuntimeError, match="on purpose"):
            trained(module)
        assert self.hooks(module) == 0
        assert "training_step" not in module.trainer.strategy.__dict__

    def test_hooks_are_there_on_measured_steps_only(self):
        module, seen = Witness(Convolutional()), []
        module.on_before_zero_grad = lambda optimizer: seen.append(self.hooks(module))
        trained(module, monitor=Collector(every_n_steps=3))
        assert [count > 0 for count in seen] == [False, False, True, False, False, True]

    @pytest.mark.parametrize("every_n_steps", [1, 4, 1000])
    def test_training_is_bit_identical_measured_or_idle(self, every_n_steps):
        def weights(*callbacks):
            torch.manual_seed(5)
            net = Convolutional()
            net.body.insert(6, nn.Dropout(0.3))
            module = Witness(net)
            trained(module, callbacks=list(callbacks), accumulate_grad_batches=2)
            return torch.cat([p.detach().flatten() for p in module.parameters()])

        assert torch.equal(weights(), weights(GradientDiversityMonitor(every_n_steps=every_n_steps)))


def test_both_namespaces_are_measured_alike():
    pytorch_lightning = pytest.importorskip("pytorch_lightning", minversion="2.6")  # older ones refuse our callbacks

    class Other(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = Convolutional()

        def training_step(self, batch, batch_idx):
            return F.mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.05)

    monitor = Collector()
    pytorch_lightning.Trainer(
        max_epochs=1,
        callbacks=[monitor],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    ).fit(Other(), DataLoader(signals(), 8))
    torch.manual_seed(0)
    module = Witness(Convolutional())
    trained(module, monitor=(same := Collector()))
    assert [rho(probe) for probe in monitor.probes] == pytest.approx([rho(probe) for probe in same.probes], rel=1e-6)
