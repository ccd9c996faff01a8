"""Searches for the batch size on two processes (DDP over gloo); each process writes what it found to a folder.

Run as `python -m tests.finder_runs FOLDER`; test_finder_ddp.py reads the folder.
"""

import time
from dataclasses import asdict

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, TensorDataset

from lightning_graddiv import BatchSizeBoundFinder, MeasurementError, find_batch_size
from tests.audit import quiet_trainer
from tests.ddp_runs import OwnShard, Regression, regression_data
from tests.processes import record

RUN = {"repeats": 3, "max_batch_size": 32}


def two_processes(*callbacks, **kwargs):
    return quiet_trainer(max_epochs=1, callbacks=list(callbacks), strategy="ddp", devices=2, **kwargs)


def batches():
    return DataLoader(TensorDataset(*regression_data()), 4)


def summary(finding):
    return {
        "estimate": asdict(finding.estimate),
        "present": asdict(finding.present),
        "recommended": asdict(finding.recommended),
        "seconds": list(finding.seconds.items()),
        "throughput": list(finding.throughput.items()),
        "factor": finding.learning_rate_factor,
    }


class Uneven(Regression):
    """The second process is the slower one."""

    def training_step(self, batch, batch_idx):
        time.sleep(0.002 if self.trainer.global_rank == 1 else 0.0)
        return super().training_step(batch, batch_idx)


def by_function(rank):
    return summary(find_batch_size(two_processes(), Uneven(), batches(), **RUN))


def by_callback(rank):
    finder = BatchSizeBoundFinder(**RUN)
    trainer = two_processes(finder)
    trainer.fit(Uneven(), batches())
    return {"steps": trainer.global_step, "estimate": asdict(finder.finding.estimate)}


def two_sizes(rank):
    trainer = two_processes(BatchSizeBoundFinder(**RUN), use_distributed_sampler=False)
    try:
        trainer.fit(OwnShard())
    except MisconfigurationException as error:
        return {"error": str(error)}
    return {"error": None}


def one_process_refuses(rank):
    """The other one must not wait for it."""

    class Refuses(Uneven):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if self.trainer.global_rank == 1 else loss

    try:
        two_processes(BatchSizeBoundFinder(**RUN)).fit(Refuses(), batches())
    except MeasurementError as error:
        return {"error": str(error)}
    return {"error": None}


RUNS = (by_function, by_callback, two_sizes, one_process_refuses)


if __name__ == "__main__":
    record(RUNS)
