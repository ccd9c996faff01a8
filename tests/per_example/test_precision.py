"""Checks compute in full precision, whichever names users choose theirs by, and put it back."""

import subprocess
import sys

import pytest

CHOICES = {
    "nothing": "",
    "matrices, by the old name": "torch.set_float32_matmul_precision('high')",
    "matrices on a GPU, by the old name": "cuda.matmul.allow_tf32 = True",
    "convolutions, by the old name": "cudnn.allow_tf32 = False",
    "matrices, by the new name": "cuda.matmul.fp32_precision = 'tf32'",
    "convolutions, by the new name": "cudnn.conv.fp32_precision = 'ieee'",
    "all, by the new name": "torch.backends.fp32_precision = 'tf32'",
    "on the processor": "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
}

SCRIPT = """
import torch
from torch.backends import cuda, cudnn, mkldnn
{choice}
from lightning_graddiv import per_example_squared_norms
from lightning_graddiv.per_example.precision import full_precision, rounds_products

def read(name):
    try:
        return eval(name)
    except RuntimeError:
        return None

def state():
    new = [of.fp32_precision for of in (torch.backends, cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv)]
    return new, read("torch.get_float32_matmul_precision()"), read("cudnn.allow_tf32"), read("cuda.matmul.allow_tf32")

def loss(net, x):
    assert not any(rounds_products(torch.device(kind)) for kind in ("cpu", "cuda")) or not checking
    return net(x).square().mean()

before, checking = state(), True
try:
    with full_precision():
        loss(torch.nn.Linear(3, 1), torch.randn(2, 3))
        raise KeyError
except KeyError:
    pass
assert state() == before, (before, state())
checking = False
assert per_example_squared_norms(torch.nn.Linear(3, 1), torch.randn(4, 3), loss_fn=loss).shape == (4,)
assert state() == before, (before, state())
print(*(rounds_products(torch.device(kind)) for kind in ("cpu", "cuda")))
"""


@pytest.mark.parametrize("choice", CHOICES)
def test_is_full_within_and_the_users_after(choice):
    """Each in a process of its own: what has once been set by a new name cannot be unset."""
    command = [sys.executable, "-c", SCRIPT.format(choice=CHOICES[choice])]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    on_processor = choice == "on the processor"
    on_gpu = choice != "convolutions, by the old name"  # whose tensor cores are on by default
    assert finished.stdout.split() == [str(on_processor), str(on_gpu)]
