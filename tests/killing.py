"""A training that is killed again and again, with SIGKILL, and goes on from the newest checkpoint each time.

Run as `python -m tests.killing FOLDER PROCESSES KILLS SEED WORKERS`: an uninterrupted training first, then one that is
killed. Every process of a training is forked from this one, which has imported what takes long and begun nothing. Each
writes a line for every optimizer step; test_killing.py compares them.
"""

import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from zlib import crc32

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from tests.resuming import Traced, growing, numbered_rows, run, train_loader

EXAMPLES = 160
SECONDS_A_STEP = 0.01
LARGEST = 64
FIRST_SEED = 5


class Written(Callback):
    """Writes what each optimizer step was made of, and lets time pass in which a training can be killed."""

    def __init__(self, file: Path) -> None:
        whole = "".join(whole_lines(file))
        self.file = file.open("a")
        self.file.truncate(len(whole))  # a kill may have come in the middle of a line, before its step was saved

    def on_train_start(self, trainer, pl_module):
        self.steps = trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, *_):
        time.sleep(SECONDS_A_STEP / 2)
        if trainer.global_step > self.steps:
            self.steps, step = trainer.global_step, pl_module.latest_step()
            weights = crc32(step.weights.numpy().tobytes())
            self.file.write(
                json.dumps([self.steps, step.epoch, step.batches, step.examples, step.rate, weights]) + "\n"
            )
            self.file.flush()
        time.sleep(SECONDS_A_STEP / 2)


def train(folder: Path, processes: int, rank: int, workers: int, seed: int) -> None:
    module = Traced()
    if processes > 1:
        module.net[2] = nn.Identity()  # what the processes draw for dropout is not in a checkpoint
    keeps = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    kwargs = {"strategy": "ddp", "devices": processes} if processes > 1 else {}
    train_on = train_loader(batch_size=4 // processes, dataset=numbered_rows(EXAMPLES), num_workers=workers)
    callback = growing(every_n_steps=2, cooldown=6, max_micro_batch_size=8, max_batch_size=LARGEST)
    run(
        callback,
        train_on,
        Written(folder / f"steps-{rank}.jsonl"),
        keeps,
        module=module,
        ckpt_path=newest(folder),
        seed=seed if newest(folder) else FIRST_SEED,
        enable_checkpointing=True,
        val_check_interval=0.5,
        accumulate_grad_batches=2,
        max_epochs=5,
        **kwargs,
    )
    growths = [(growth.step, growth.to_batch_size) for growth in callback.history]
    (folder / f"end-{rank}.json").write_text(json.dumps(growths))


def newest(folder: Path) -> Path | None:
    files = sorted(folder.glob("*.ckpt"), key=lambda file: int(file.stem.partition("=")[2]))
    return files[-1] if files else None


def begin(folder: Path, processes: int, workers: int, seed: int) -> list[int]:
    """Fork the processes of a training, each with a process group of its own for its workers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            if processes > 1:
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0")
                os.environ.update(WORLD_SIZE=str(processes))
            status = 1
            try:
                train(folder, processes, rank, workers, seed)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        with suppress(PermissionError):  # the child has done it and gone on
            os.setpgid(child, child)
        children.append(child)
    return children


def main(folder: Path, processes: int, kills: int, seed: int, workers: int) -> None:
    torch.set_num_threads(1)
    whole, killed = folder / "whole", folder / "killed"
    whole.mkdir()
    killed.mkdir()
    for child in begin(whole, processes, workers, seed=FIRST_SEED):
        assert os.waitpid(child, 0)[1] == 0
    steps, chance, at = written(whole), random.Random(seed), []
    for count in range(kills):
        share = 2 * (steps - 2 - written(killed)) // (kills - count)
        last = min(written(killed) + chance.randint(0, max(1, share)), steps - 2)
        children = begin(killed, processes, workers, seed=100 + count)
        while written(killed) < last:
            assert all(os.waitpid(child, os.WNOHANG)[0] == 0 for child in children), "a process ended by itself"
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 4 * SECONDS_A_STEP))
        for child in children:
            os.killpg(child, signal.SIGKILL)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        at.append(written(killed))
    (folder / "kills.json").write_text(json.dumps(at))
    for child in begin(killed, processes, workers, seed=99):
        assert os.waitpid(child, 0)[1] == 0


def written(folder: Path) -> int:
    """Return the last step that was written down."""
    lines = whole_lines(folder / "steps-0.jsonl")
    return int(json.loads(lines[-1])[0]) if lines else 0


def whole_lines(file: Path) -> list[str]:
    """Return the lines that have been written to their end: one may be on its way, or have been cut off by a kill."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [line for line in lines if line.endswith("\n")]


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
