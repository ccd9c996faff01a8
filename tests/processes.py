"""Trainings on two processes (DDP over gloo), started from a test, which reads what each of them saw.

A module of such trainings has a tuple RUNS of functions of the rank, and ends with ``record(RUNS)`` where it is run.
"""

import faulthandler
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import distributed

ROOT = Path(__file__).parent.parent

MOST_SECONDS = 240
"""Then a process that hangs says where, and ends."""


def start(module, folder, timeout):
    """Run ``python -m module folder`` in a process that starts the second one; return when both have ended."""
    # A seed that another test has set would be that of the samplers.
    env = {name: value for name, value in os.environ.items() if name != "PL_GLOBAL_SEED"}
    command = [sys.executable, "-m", module.__name__, str(folder)]
    finished = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
    assert finished.returncode == 0, finished.stderr[-4000:]


def results_of(module, folder, timeout=300):
    """Start the module's trainings; return a function that reads what each process saw of one of them."""
    start(module, folder, timeout)

    def read(run):
        return [torch.load(folder / f"{run.__name__}.{rank}.pt", weights_only=True) for rank in range(2)]

    return read


def rank_and_folder():
    """Return which process this is and where it writes; one thread each, or two processes wait for one another."""
    torch.set_num_threads(1)
    return int(os.environ.get("LOCAL_RANK", 0)), Path(sys.argv[1])


def record(runs):
    """Make each training, and write what it returns."""
    faulthandler.dump_traceback_later(MOST_SECONDS, exit=True)
    rank, folder = rank_and_folder()
    for run in runs:
        torch.save(run(rank), folder / f"{run.__name__}.{rank}.pt")
    if distributed.is_initialized():  # its threads, left to the interpreter's end, once ended a process with an error
        distributed.destroy_process_group()
