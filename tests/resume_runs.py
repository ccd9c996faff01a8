"""Trainings on two processes that are resumed; each process writes in what they differed to a folder.

Run as `python -m tests.resume_runs FOLDER`; test_resume_ddp.py reads the folder.
"""

import json
import multiprocessing
import os
import random
import warnings

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard

from tests.processes import rank_and_folder
from tests.resuming import Saves, Traced, differences, growing, numbered_rows, run, train_loader

EXAMPLES = 64
"""A last batch of one example could prove nothing after the checkpoint, where it need not have before it."""

# Workers that are forked from a process with the threads of a process group may hang; these are not.
WORKERS = {"num_workers": 2, "multiprocessing_context": "forkserver"}
TWO = {"strategy": "ddp", "devices": 2}


class WithoutNoise(Traced):
    """What the processes draw for dropout is not in a checkpoint, which is the first process's."""

    def __init__(self):
        super().__init__()
        self.net[2] = nn.Identity()


CASES = {
    "plain": ({}, {}, {}),
    "idle": ({}, {"every_n_steps": 10**9}, {"accumulate_grad_batches": 2}),
    "windows": ({}, {"max_micro_batch_size": 4}, {"accumulate_grad_batches": 2, "val_check_interval": 0.5}),
    "workers": (WORKERS, {}, {}),
    "max_steps": ({**WORKERS, "persistent_workers": True}, {}, {"max_epochs": -1, "max_steps": 30}),
    "anew": (WORKERS, {}, {"reload_dataloaders_every_n_epochs": 1}),
}
HOOKS = ("on_before_backward", "on_train_batch_end", "on_validation_end", "on_train_epoch_end")


def training(case, *others, ckpt_path=None):
    of_loader, of_callback, of_trainer = CASES[case]

    class OwnLoader(WithoutNoise):
        def train_dataloader(self):
            return train_loader(**{"batch_size": 2, "dataset": numbered_rows(EXAMPLES), **of_loader})

    callback = growing(cooldown=5, **of_callback)
    module, _ = run(callback, None, *others, module=OwnLoader(), ckpt_path=ckpt_path, **TWO, **of_trainer)
    return module, callback


def from_everywhere(folder, case, picks=3):
    saves = Saves(folder / case, HOOKS)
    whole = training(case, saves)
    assert (case == "idle") == (not whole[1].history)
    ends = [file for file in saves.files if "epoch_end" in file.name][:1]
    files = random.Random(case).sample(saves.files, picks) + ends
    found = {file.name: differences(whole, training(case, ckpt_path=file)) for file in files}
    return {name: wrong for name, wrong in found.items() if wrong}


def sharded(folder):
    """Under FSDP2 a checkpoint is a folder that all processes write to."""

    class Sharded(WithoutNoise):
        def configure_model(self):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

        def train_dataloader(self):
            return train_loader(batch_size=2, dataset=numbered_rows(EXAMPLES))

    def training(*others, ckpt_path=None):
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        callback = growing(cooldown=5)
        kwargs = {"strategy": strategy, "devices": 2, "accumulate_grad_batches": 2, "max_epochs": 2}
        module, _ = run(callback, None, *others, module=Sharded(), ckpt_path=ckpt_path, **kwargs)
        return module, callback

    saves = Saves(folder / "sharded", HOOKS)
    whole = training(saves)
    assert whole[1].history
    found = {file.name: differences(whole, training(ckpt_path=file)) for file in saves.files[4::17]}
    return {name: wrong for name, wrong in found.items() if wrong}


def orders_of_their_own(folder):
    """One process's random states do for all only where they are the same."""
    rank = int(os.environ.get("LOCAL_RANK", 0))

    class Sharded(WithoutNoise):
        def train_dataloader(self):
            torch.manual_seed(rank)
            return train_loader(batch_size=2)

    saves = Saves(folder / "own", ("on_train_batch_end",))
    kwargs = {**TWO, "use_distributed_sampler": False, "max_epochs": 1}
    run(growing(), None, saves, module=Sharded(), **kwargs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(growing(), None, ckpt_path=saves.files[3], module=Sharded(), **kwargs)
    return sum("in another order" in str(warning.message) for warning in caught)


def fewer_processes(folder):
    """A checkpoint of two processes goes on with one: with the examples that neither had trained on."""
    (file,) = [file for file in sorted((folder / "plain").glob("*.ckpt")) if "batch_end-epoch0-batch5" in file.name]
    return str(file)


def main() -> None:
    rank, folder = rank_and_folder()
    multiprocessing.set_forkserver_preload(["tests.resuming"])
    results = {case: from_everywhere(folder, case) for case in CASES}
    results["sharded"] = sharded(folder)
    results["own orders"] = orders_of_their_own(folder)
    results["for one process"] = fewer_processes(folder)
    (folder / f"{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
