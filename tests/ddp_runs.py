"""Real trainings on two processes (DDP over gloo); each process writes what it saw to a folder.

Run as `python -m tests.ddp_runs FOLDER`; test_ddp.py reads the folder.
"""

import tempfile
import warnings
from dataclasses import asdict

import torch
import torch.multiprocessing as multiprocessing
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from lightning_graddiv import AdaptiveBatchSize, GradientDiversityMonitor
from lightning_graddiv.callbacks.trial import MicroBatchTrial
from tests import loader_matrix
from tests.audit import AuditModule, loader, quiet_trainer
from tests.processes import record

EXAMPLES = 64
SHARDS = (5, 3)


def two_processes(callback, epochs=1, **kwargs):
    return quiet_trainer(
        max_epochs=epochs, callbacks=[callback], strategy="ddp", devices=2, **{"log_every_n_steps": 1, **kwargs}
    )


class Regression(LightningModule):
    """Two layers in float64, whose weights stay put, so that every step measures the same."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)).double()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return (self.net(x)[:, 0] - y).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def regression_data():
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(4 * sum(SHARDS), 6, dtype=torch.float64, generator=generator)
    return x, x.sum(1).sin() + torch.randn(len(x), dtype=torch.float64, generator=generator)


def shard(values, rank):
    return values[: 4 * SHARDS[0]] if rank == 0 else values[4 * SHARDS[0] :]


class OwnShard(Regression):
    """Five examples a batch on the first process, three on the second."""

    def train_dataloader(self):
        rank = self.trainer.global_rank
        x, y = regression_data()
        return DataLoader(TensorDataset(shard(x, rank), shard(y, rank)), SHARDS[rank])


def uneven_shards(rank):
    monitor = GradientDiversityMonitor(every_n_steps=1, engine="functional")
    two_processes(monitor, use_distributed_sampler=False).fit(OwnShard())
    return {"probes": [asdict(probe) for probe in monitor._window.probes], "bound": monitor.latest.bound}


def growth(rank):
    return grown(workers=0)


def growth_with_workers_and_tails(rank):
    """62 examples; the micro-batch stops at 8, then accumulation grows."""
    return grown(workers=2, examples=62, max_micro_batch_size=8)


def grown(workers, examples=EXAMPLES, **kwargs):
    callback = AdaptiveBatchSize(
        every_n_steps=1, max_batch_size=32, delta=1.0, cooldown=0, scale_lr="linear", warm_in=0, **kwargs
    )
    module = AuditModule(examples)
    trainer = two_processes(callback, epochs=4)
    trainer.fit(module, loader(examples, 4, num_workers=workers))
    steps = torch.stack(module.steps)
    return {
        "sizes": [int((step > 0).sum()) for step in module.steps],
        "epochs": module.step_epochs,
        "seen_each_epoch": [(torch.stack(module.steps_of(epoch)) > 0).sum(0).unique().tolist() for epoch in range(4)],
        "sums": steps.sum(1).unique().tolist(),
        "history": [(g.from_batch_size, g.to_batch_size, g.learning_rate_factor) for g in callback.history],
        "micro_batches": module.micro_batches,
        "examples_seen": callback.examples_seen,
    }


CORNERS = (
    loader_matrix.Corner("map", "loader", "none", False, 1, None, 0, "none", None),
    loader_matrix.Corner("map", "datamodule", "2 persistent", True, 2, None, 1, "none", None),
    loader_matrix.Corner("merged", "loader", "2", False, 1, "min_size", 0, "none", None),
    loader_matrix.Corner("two", "datamodule", "none", False, 1, "max_size", 0, "half", None),
)


def corners(rank):
    return [at_corner(corner) for corner in CORNERS]


def at_corner(corner):
    """With samplers that Lightning injects: without a callback, with an idle one, and with one that grows."""
    folder = tempfile.mkdtemp()
    on_two = {"strategy": "ddp", "devices": 2}
    plain, _ = loader_matrix.train(corner, folder, **on_two)
    rng = torch.get_rng_state()
    idle, _ = loader_matrix.train(corner, folder, AdaptiveBatchSize(every_n_steps=10**9, max_batch_size=512), **on_two)
    is_idle = torch.equal(torch.get_rng_state(), rng) and torch.equal(plain.w, idle.w)
    is_idle &= all(torch.equal(a, b) for a, b in zip(plain.steps, idle.steps, strict=True))
    is_idle &= plain.micro_batches == idle.micro_batches and plain.lengths == idle.lengths
    callback = AdaptiveBatchSize(
        every_n_steps=1, max_batch_size=32, max_micro_batch_size=8, delta=1.0, cooldown=4, merge_batches=True
    )
    grown, _ = loader_matrix.train(corner, folder, callback, **on_two)
    return {
        "is_idle": is_idle and plain.validations == idle.validations,
        "history": [growth.to_batch_size for growth in callback.history],
        "micro_batches": sorted(set(grown.micro_batches)),
        "seen": [[seen_in(module, epoch) for epoch in range(loader_matrix.EPOCHS)] for module in (plain, grown)],
        "validations": [plain.validations, grown.validations],
        "lengths": grown.lengths,
    }


def seen_in(module, epoch):
    """How many examples are in one step of the epoch, and how many in more."""
    seen = (torch.stack(module.steps_of(epoch)) > 0).sum(0)
    return int((seen == 1).sum()), int((seen > 1).sum())


class Noisy(Regression):
    """Gradients with a mean and a spread, so that the two kinds of pairs can be told apart."""

    def train_dataloader(self):
        x, y = regression_data()
        generator = torch.Generator().manual_seed(0)  # the same order on both processes
        return DataLoader(TensorDataset(x, y), 4, shuffle=True, generator=generator)


def same_data(rank):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        two_processes(GradientDiversityMonitor(every_n_steps=1), use_distributed_sampler=False).fit(Noisy())
    return {"warned": sum("see the same examples" in str(warning.message) for warning in caught)}


def sampled_data(rank):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        two_processes(GradientDiversityMonitor(every_n_steps=1), epochs=3).fit(Noisy())
    return {"warned": sum("see the same examples" in str(warning.message) for warning in caught)}


def divergent_policies(rank):
    callback = AdaptiveBatchSize(
        every_n_steps=1, max_batch_size=64, cooldown=0, policy=lambda estimate, run: 1000.0 if rank == 0 else 16.0
    )
    two_processes(callback, epochs=4).fit(AuditModule(EXAMPLES), loader(EXAMPLES, 4))
    return {"history": [g.to_batch_size for g in callback.history], "allowed": [g.allowed for g in callback.history]}


def lengths_that_would_part(rank):
    """Nine and ten examples are three batches of three on each process, but of nine: one here, two there."""

    class Shards(AuditModule):
        def train_dataloader(self):
            rows = torch.eye(19)
            return DataLoader(TensorDataset(rows[:9] if self.trainer.global_rank == 0 else rows[9:]), 3)

    return shares(Shards(19), growth_factor=3, limit_train_batches=3)


def shares(module, growth_factor=2, **kwargs):
    callback = AdaptiveBatchSize(
        every_n_steps=1, max_batch_size=64, cooldown=0, growth_factor=growth_factor, policy=lambda estimate, run: 1000.0
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = two_processes(callback, epochs=3, use_distributed_sampler=False, **kwargs)
        trainer.fit(module)
    said = [str(warning.message) for warning in caught if "in different numbers" in str(warning.message)]
    return {
        "history": [growth.to_batch_size for growth in callback.history],
        "steps": [module.step_epochs.count(epoch) for epoch in range(3)],
        "said": said,
    }


def shards_of_two_sizes(rank):
    class Shards(AuditModule):
        def train_dataloader(self):
            rows = torch.eye(48)
            return DataLoader(TensorDataset(rows[:13] if self.trainer.global_rank == 0 else rows[13:]), 2)

    return shares(Shards(48))


def an_empty_shard(rank):
    class Shards(AuditModule):
        def train_dataloader(self):
            rows = torch.eye(19)
            return DataLoader(TensorDataset(rows[:0] if self.trainer.global_rank == 0 else rows), 3)

    module = Shards(19)
    module.allow_zero_length_dataloader_with_multiple_devices = True
    return shares(module)


def batches_of_two_sizes(rank):
    """Processes that start with batches of different sizes cannot grow together."""
    callback = AdaptiveBatchSize(every_n_steps=1, max_batch_size=64)
    try:
        two_processes(callback, use_distributed_sampler=False).fit(OwnShard())
    except MisconfigurationException as refused:
        return {"refused": str(refused)}
    return {"refused": ""}


def one_process_refuses(rank):
    class Sometimes(AuditModule):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss + float("nan") if rank == 1 and batch_idx == 2 else loss

    monitor = GradientDiversityMonitor(every_n_steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        two_processes(monitor).fit(Sometimes(EXAMPLES), loader(EXAMPLES, 4))
    said = [str(w.message) for w in caught if "dropped the measurement" in str(w.message)]
    return {"measurements": monitor.measurements, "said": said}


def collectives(rank):
    class Gathers(AuditModule):
        def training_step(self, batch, batch_idx):
            everybody = self.all_gather(batch[0])
            return super().training_step((batch[0] - everybody.mean((0, 1)) / 2,), batch_idx)

    monitor = GradientDiversityMonitor(every_n_steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        two_processes(monitor).fit(Gathers(EXAMPLES), loader(EXAMPLES, 4))
    said = [str(w.message) for w in caught if "cannot measure this model" in str(w.message)]
    return {"measurements": monitor.measurements, "said": said}


class Masked(Regression):
    def __init__(self):
        super().__init__()
        self.net.insert(2, nn.Dropout(0.5))

    def train_dataloader(self):
        x, y = regression_data()
        return DataLoader(TensorDataset(x, y), 8)


def masks(rank):
    """The same examples on both processes, so that their gradients differ by nothing but the masks."""
    monitor = GradientDiversityMonitor(every_n_steps=1, engine="functional")
    two_processes(monitor, use_distributed_sampler=False).fit(Masked())
    return {"probes": [asdict(probe) for probe in monitor._window.probes]}


def leftovers(rank):
    """Nine examples on one process and ten on the other: the last batch holds a pair on one of them only."""

    class Tails(AuditModule):
        def train_dataloader(self):
            rows = torch.eye(19)
            return DataLoader(TensorDataset(rows[:9] if self.trainer.global_rank == 0 else rows[9:]), 4)

    monitor = GradientDiversityMonitor(every_n_steps=3)
    trainer = two_processes(monitor, epochs=2, use_distributed_sampler=False)
    trainer.fit(Tails(19))
    return {"measurements": monitor.measurements, "steps": trainer.global_step}


def no_room_on_one_process(rank):
    """The second process has room for eight examples, the first for any number."""

    class Narrow(AuditModule):
        def training_step(self, batch, batch_idx):
            if len(batch[0]) > 8 and rank == 1:
                raise torch.OutOfMemoryError("out of memory")
            return super().training_step(batch, batch_idx)

    callback = AdaptiveBatchSize(
        every_n_steps=1, max_batch_size=64, cooldown=0, warm_in=0, policy=lambda estimate, run: 1000.0
    )
    module = Narrow(EXAMPLES)
    two_processes(callback, epochs=3).fit(module, loader(EXAMPLES, 4))
    return {
        "micro_batches": max(module.micro_batches),
        "history": [growth.to_batch_size for growth in callback.history],
        "cap": callback.state_dict()["micro_batch_cap"],
        "seen": [seen_in(module, epoch) for epoch in range(3)],
    }


class Coupled(Regression):
    """Normalises, gathers and logs over all processes."""

    def __init__(self):
        super().__init__()
        self.net.insert(1, nn.SyncBatchNorm(5).double())
        self.mean = MeanMetric(sync_on_compute=True, dist_sync_on_step=True)

    def training_step(self, batch, batch_idx):
        self.all_gather(batch[0])
        loss = super().training_step(batch, batch_idx)
        self.log("mean", self.mean(loss), sync_dist=True)
        return loss


def tried_by_one_process_alone(rank):
    """A collective in it would wait for the other one in vain."""
    monitor = GradientDiversityMonitor(every_n_steps=1)
    trainer = two_processes(monitor)
    trainer.fit(Noisy())
    if rank > 0:
        return {}
    module, batch = Coupled(), [values[:4] for values in regression_data()]
    module.trainer = trainer
    results = [MicroBatchTrial(trainer, each, batch, 0).run(16, 4) for each in (module, Reduces())]
    return {"verdicts": [result.verdict.name for result in results], "reason": results[-1].reason}


class Reduces(Regression):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        torch.distributed.all_reduce(loss.detach())
        return loss


RUNS = (
    no_room_on_one_process,
    tried_by_one_process_alone,
    leftovers,
    masks,
    uneven_shards,
    growth,
    growth_with_workers_and_tails,
    corners,
    lengths_that_would_part,
    shards_of_two_sizes,
    an_empty_shard,
    batches_of_two_sizes,
    same_data,
    sampled_data,
    divergent_policies,
    one_process_refuses,
    collectives,
)


if __name__ == "__main__":
    # Workers that are forked from a process with the threads of a process group may hang; these are not.
    multiprocessing.set_start_method("forkserver")
    multiprocessing.set_forkserver_preload(["tests.ddp_runs"])
    record(RUNS)
