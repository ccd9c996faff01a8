"""In-band measuring on two processes (DDP and FSDP2 over gloo); each process writes what it saw to a folder.

Run as `python -m tests.in_band_runs FOLDER`; test_in_band_ddp.py reads the folder.
"""

import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_graddiv.per_example.in_band import GroupStep
from tests.audit import quiet_trainer
from tests.in_band import Collector, Convolutional, Step, Wide, Witness, signals
from tests.processes import record

SHARDS = (8, 5)


def shard(rank: int, sizes: tuple[int, int] = SHARDS, steps: int = 6) -> TensorDataset:
    """This process's own examples: the sampler is off, so that the shards may be uneven."""
    whole = signals(steps * sum(sizes))
    first = steps * sizes[0]
    rows = slice(0, first) if rank == 0 else slice(first, None)
    return TensorDataset(*(tensor[rows] for tensor in whole.tensors))


class OwnShard(Witness):
    def __init__(self, sizes=SHARDS, steps=6, **kwargs):
        torch.manual_seed(0)
        super().__init__(self.make_net(), **kwargs)
        self.sizes, self.epoch_steps = sizes, steps

    def make_net(self):
        return Convolutional()

    def train_dataloader(self):
        rank = self.trainer.global_rank
        return DataLoader(shard(rank, self.sizes, self.epoch_steps), self.sizes[rank])


def run(module, strategy="ddp", **kwargs):
    monitor = Collector()
    settings = {"max_epochs": 1, "devices": 2, "use_distributed_sampler": False, "log_every_n_steps": 1}
    quiet_trainer(callbacks=[monitor], strategy=strategy, **{**settings, **kwargs}).fit(module)
    return {
        "probes": [vars(probe) for probe in monitor.probes],
        "coverages": monitor.coverages,
        "steps": [vars(step) for step in module.steps],
        "engine": monitor._measurer.engine,
    }


def quietly(run, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run(*args)


def uneven(rank):
    return run(OwnShard())


def accumulated(rank):
    return run(OwnShard(), accumulate_grad_batches=3, gradient_clip_val=0.01)


def unused(rank):
    """A layer that one process uses and the other does not."""

    class Sometimes(OwnShard):
        def make_net(self):
            net = Convolutional()
            net.extra = nn.Linear(4, 4)
            return net

        def training_step(self, batch, batch_idx):
            out = self.net(batch[0])
            return F.mse_loss(out + self.net.extra(out) if self.global_rank == 0 else out, batch[1])

    return run(Sometimes(), DDPStrategy(find_unused_parameters=True))


def static(rank):
    return run(OwnShard(), DDPStrategy(static_graph=True, gradient_as_bucket_view=True))


def bucket_view(rank):
    return run(OwnShard(), DDPStrategy(gradient_as_bucket_view=True), accumulate_grad_batches=2)


def in_bf16(rank):
    class Wider(OwnShard):
        def make_net(self):
            return Wide()

    return run(Wider((32, 20)), precision="bf16-mixed", accumulate_grad_batches=2)


class Sharded(OwnShard):
    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        if self.is_sharded:
            return
        self.is_sharded = True
        mesh = self.device_mesh["data_parallel"]
        for layer in (self.net.body[0], self.net.body[3]):  # a wrapped layer changes its class
            fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    is_sharded = False

    def on_train_batch_start(self, batch, batch_idx):
        if self.opens:
            state = self.net.state_dict()
            weights = {name: getattr(value, "full_tensor", value.clone)() for name, value in state.items()}
            self.steps.append(Step(weights, divisor=self.trainer.accumulate_grad_batches))
            self.opens = False
        self.steps[-1].batches.append(batch)


def fsdp2(rank):
    return run(Sharded(), ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1))


def fsdp2_accumulated(rank):
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    return run(Sharded(), strategy, accumulate_grad_batches=3)


def fsdp2_validated(rank):
    """A validation has no backward pass, after which FSDP2 would put the parameters' pieces back."""

    class Validated(Sharded):
        def on_train_batch_start(self, batch, batch_idx):
            held = self.trainer.optimizers[0].param_groups[0]["params"]  # a state_dict would put the pieces back
            weights = {name: p.full_tensor().detach() for name, p in zip(self.names, held, strict=True)}
            self.steps.append(Step(weights, divisor=1))
            self.steps[-1].batches.append(batch)

        def configure_optimizers(self):
            self.names = [name for name, _ in self.net.named_parameters()]
            return super().configure_optimizers()

        def validation_step(self, batch, batch_idx):
            self.net(batch[0])

        def val_dataloader(self):
            return self.train_dataloader()

    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    return run(Validated(), strategy, val_check_interval=2, num_sanity_val_steps=1)


def fsdp2_uncovered(rank):
    """Batch normalisation cannot be looked into where the parameters are in pieces."""

    class Normalized(Sharded):
        def make_net(self):
            net = Convolutional()
            net.body[1] = nn.BatchNorm1d(8)
            return net

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run(Normalized(), ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1))
    return {**result, "said": [str(w.message) for w in caught if "Collector" in str(w.message)]}


def contrastive(rank):
    def loss(net, batch):
        return F.cross_entropy(net(batch[0]) @ batch[1].T, torch.arange(len(batch[0])))

    return quietly(run, OwnShard(loss=loss))


def known_truth(rank):
    """Gradients x_i with a known mean and spread; 64 examples on one process and 8 on the other."""
    torch.manual_seed(rank)
    spread = 200**0.5
    rows = [torch.randn(200 * (64 if rank == 0 else 8), 128, dtype=torch.float64)]
    x = spread * rows[0] / 128**0.5
    x[:, 0] += 1.0

    class Given(Witness):
        def train_dataloader(self):
            return DataLoader(TensorDataset(x), 64 if rank == 0 else 8)

    def linear(net, batch):
        return net(batch[0]).mean()

    torch.manual_seed(0)
    module = Given(nn.Linear(128, 1, bias=False).double(), linear, learning_rate=0.0)
    result = run(module, precision="64-true")
    return {"probes": result["probes"]}


def changed_by_one(rank):
    """One process alone changes its gradient: what is decided about that, all of them must decide."""

    class Noisy(OwnShard):
        def on_after_backward(self):
            if self.global_rank == 1:
                for parameter in self.parameters():
                    parameter.grad.add_(1.0)

    return quietly(run, Noisy())


def fails_on_one(rank):
    """An error of ours on one process, while two consecutive steps are compared."""

    class Gathers(OwnShard):
        def training_step(self, batch, batch_idx):
            everybody = self.all_gather(batch[0])
            return F.mse_loss(self.net(batch[0] - everybody.mean((0, 1)) / 2), batch[1])

    original, calls = GroupStep.backward, []

    def fails(self, scale):
        calls.append(1)
        if rank == 1 and len(calls) == 1:
            raise RuntimeError("once")
        original(self, scale)

    GroupStep.backward = fails
    try:
        return quietly(run, Gathers((4, 4)))
    finally:
        GroupStep.backward = original


def numbers_sent(rank):
    """How many numbers our own collectives carry in each measurement, for a small and a larger model."""

    class Deep(OwnShard):
        def make_net(self):
            return nn.Sequential(Convolutional(), *(nn.Linear(4, 4) for _ in range(40)))

    def count(module):
        sent, original = [0], dist.all_reduce

        def counted(tensor, *args, **kwargs):
            sent[-1] += tensor.numel()
            return original(tensor, *args, **kwargs)

        module.on_before_zero_grad = lambda optimizer: sent.append(0)  # after the proofs of a step, before its end
        dist.all_reduce = counted
        try:
            run(module)
        finally:
            dist.all_reduce = original
        return sent[1:]

    return {"small": count(OwnShard()), "large": count(Deep())}


RUNS = (
    numbers_sent,
    changed_by_one,
    fails_on_one,
    uneven,
    accumulated,
    unused,
    static,
    bucket_view,
    in_bf16,
    contrastive,
    known_truth,
    fsdp2,
    fsdp2_accumulated,
    fsdp2_validated,
    fsdp2_uncovered,
)


if __name__ == "__main__":
    record(RUNS)
