"""What only a GPU has: its own precision, its generator, its memory, its compiler. Skipped where there is none.

``pytest --device cuda`` makes the other tests train on it, too.
"""

import warnings

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from lightning_graddiv import AdaptiveBatchSize, GradientDiversityMonitor, find_batch_size
from lightning_graddiv.per_example.norms import distances, sq_norm_of_each
from tests.audit import quiet_trainer
from tests.in_band import Collector, Convolutional, Wide, Witness, rho, signals, trained, worst_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ON_A_GPU = {"accelerator": "gpu", "devices": 1}


@pytest.fixture(autouse=True)
def _seeded():
    seed_everything(0, verbose=False)


class TestPrecision:
    def test_whole(self, monkeypatch):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        module = Witness(Convolutional())
        monitor = trained(module, **ON_A_GPU)
        assert worst_error(monitor.probes, module) < 1e-5
        assert monitor.coverages == [1.0] * 6

    def test_tensor_cores_round(self, monkeypatch):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
        module = Witness(Wide())
        monitor = trained(module, signals(192), batch_size=32, **ON_A_GPU)
        assert monitor.coverages == [1.0] * 6
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
        assert worst_error(monitor.probes, module) < 1e-2

    @pytest.mark.parametrize(
        ("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)], ids=str
    )
    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_mixed(self, precision, dtype, accumulate):
        module = Witness(Wide())
        monitor = trained(
            module, signals(192), batch_size=32, precision=precision, accumulate_grad_batches=accumulate, **ON_A_GPU
        )
        half = {"autocast": lambda: torch.autocast("cuda", dtype)}
        steps = len(module.steps)
        module.steps = module.steps[steps - len(monitor.probes) :]  # a scaler begins with steps that overflow
        assert len(monitor.probes) >= steps - 1
        assert worst_error(monitor.probes, module, **half) < 1e-2


class Noisy(LightningModule):
    """Draws on the GPU: dropout, and noise on what goes in."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 3))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return cross_entropy(self.net(x + 0.1 * torch.randn_like(x)), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def rows(examples=96):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(examples, 6, generator=generator)
    return TensorDataset(x, x[:, :3].argmax(1))


def fit(*callbacks, seed=3, module=None, ckpt_path=None, **kwargs):
    seed_everything(seed, verbose=False)
    module = Noisy() if module is None else module
    trainer = quiet_trainer(**{"max_epochs": 2, **ON_A_GPU, "callbacks": list(callbacks), **kwargs})
    loader = DataLoader(rows(), 8, shuffle=True, generator=torch.Generator().manual_seed(5))
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return module, trainer


def weights(module):
    return nn.utils.parameters_to_vector(module.parameters()).detach().cpu()


@pytest.mark.parametrize("engine", ["auto", "ghost", "functional", "loop", "microbatch"])
def test_training_is_the_same_to_the_bit(engine):
    accumulate = {"accumulate_grad_batches": 2} if engine == "microbatch" else {}
    monitor = GradientDiversityMonitor(every_n_steps=2, engine=engine)
    measured, _ = fit(monitor, **accumulate)
    plain, _ = fit(**accumulate)
    assert monitor.measurements >= 3
    assert torch.equal(weights(measured), weights(plain))


def test_a_resumed_training_is_the_same_to_the_bit(tmp_path):
    def growing():
        return AdaptiveBatchSize(every_n_steps=2, max_batch_size=32, cooldown=2, policy=lambda *_: 100.0)

    whole, trainer = fit(growing(), max_epochs=4)
    fit(growing(), max_epochs=2)[1].save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(growing(), max_epochs=4, seed=9, ckpt_path=tmp_path / "half.ckpt")
    assert trainer.callbacks[0].batch_size > 8
    assert torch.equal(weights(resumed), weights(whole))


def test_a_step_that_is_not_measured_waits_for_nothing():
    def waits(*callbacks):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                _, trainer = fit(*callbacks)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert trainer.global_step == 24
        return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)

    assert waits(GradientDiversityMonitor(every_n_steps=10**6)) == waits()


class Hungry(Noisy):
    """Holds so many MiB of activations for each example."""

    MIB = 16

    def __init__(self):
        super().__init__()
        self.micro_batches = []

    def on_train_batch_start(self, batch, batch_idx):
        self.micro_batches.append(len(batch[0]))

    def training_step(self, batch, batch_idx):
        x, y = batch
        held = self.net(x).repeat(1, self.MIB * 2**20 // 12).exp()  # kept for the backward pass
        return cross_entropy(self.net(x), y) + 0 * held.mean()


@pytest.fixture
def small_memory():
    """A GPU of 2 GiB."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(2 * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.usefixtures("small_memory")
class TestMemory:
    def test_accumulation_makes_up_for_what_does_not_fit(self):
        adaptive = AdaptiveBatchSize(
            every_n_steps=2, max_batch_size=64, cooldown=0, warm_in=0, policy=lambda *_: 1000.0
        )
        module, _ = fit(adaptive, module=Hungry(), max_epochs=6)
        assert adaptive.batch_size == 64
        assert 8 <= max(module.micro_batches) < 64
        assert torch.cuda.memory_allocated() < 256 * 2**20

    def test_the_finder_says_what_does_not_fit(self):
        seed_everything(3, verbose=False)
        finding = find_batch_size(
            quiet_trainer(max_epochs=1, **ON_A_GPU), Hungry(), DataLoader(rows(), 8), repeats=1, max_batch_size=64
        )
        assert 8 in finding.throughput
        assert 8 < finding.out_of_memory_at <= 64


@pytest.mark.parametrize("mode", ["layers", "whole"])
def test_compiled(mode):
    net = Convolutional()
    module = Witness(net)
    if mode == "layers":
        compiled = torch.compile(net)
        module.loss = lambda _, batch: mse_loss(compiled(batch[0]), batch[1])
    monitor = trained(torch.compile(module) if mode == "whole" else module, **ON_A_GPU)
    module.loss = lambda net, batch: mse_loss(net(batch[0]), batch[1])
    assert worst_error(monitor.probes, module) < 1e-4


def test_the_same_as_on_the_processor():
    found = []
    for where in (ON_A_GPU, {"accelerator": "cpu"}):
        seed_everything(0, verbose=False)
        module = Witness(Convolutional().double())
        found.append(
            [rho(p) for p in trained(module, signals(dtype=torch.float64), precision="64-true", **where).probes]
        )
    assert found[0] == pytest.approx(found[1], rel=1e-9)


class TestOneProcessOfMany:
    """One process is all that one GPU has, but NCCL's collectives and the wrappers are the real ones."""

    @pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
    def test_measured_as_alone(self, strategy):
        alone = trained(Witness(Convolutional()), **ON_A_GPU)
        torch.manual_seed(0)
        module = Witness(Convolutional()) if strategy == "ddp" else Sharded()
        monitor = Collector()
        kind = "ddp" if strategy == "ddp" else ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
        seed_everything(0, verbose=False)
        trained(module, monitor=monitor, strategy=kind, **ON_A_GPU)
        assert len(monitor.probes) == len(alone.probes)
        assert monitor._measurer.engine == "ghost"


class Sharded(Witness):
    def __init__(self):
        super().__init__(Convolutional())

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def on_train_batch_start(self, batch, batch_idx):
        """Nothing is taken down of pieces."""


def test_norms_of_tensors_of_all_kinds_are_those_of_float64():
    """With one call for those of a type, and float64 sums."""
    torch.manual_seed(0)
    tensors = [
        torch.randn(3000, 5000),
        torch.randn(300, 50).T,
        torch.randn(7, 3, 5, 5).to(memory_format=torch.channels_last),
        torch.tensor(2.0),
        torch.zeros(0, 3),
        1e-30 * torch.randn(40),
        1e25 * torch.randn(40),
        torch.randn(3, 4).bfloat16(),
        torch.randn(3, 4, dtype=torch.float64),
        torch.randn(3, 4, dtype=torch.complex64),
    ]
    on_gpu = [tensor.cuda() for tensor in tensors]
    wanted = torch.stack([tensor.to(torch.complex128).abs().square().sum() for tensor in tensors])
    assert sq_norm_of_each(on_gpu) == pytest.approx(wanted.tolist(), rel=1e-6, abs=0)
    others = [torch.randn(tensor.shape).to(tensor.dtype) for tensor in tensors[:3]]
    expected = [float((a.double() - b.double()).norm()) for a, b in zip(tensors[:3], others, strict=True)]
    assert distances(on_gpu[:3], [other.cuda() for other in others]) == pytest.approx(expected, rel=1e-6)
