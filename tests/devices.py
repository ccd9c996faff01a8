"""The device that tests train on: ``pytest --device cuda`` trains on a GPU what the tests train on one processor.

An environment variable, since the processes that tests start read it, too.
"""

import os
from typing import Any

import torch

VARIABLE = "GRADDIV_TEST_DEVICE"
DEVICE = os.environ.get(VARIABLE, "cpu")


def chosen(device: str) -> None:
    """Use this device in what is imported from now on; before CUDA is."""
    os.environ[VARIABLE] = device
    if device == "cuda":
        # References compare digits, and trainings bits.
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True


def accelerator(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a Trainer's arguments for the device; trainings of several processes stay where there is one for each."""
    is_single = kwargs.get("devices", 1) == 1 and not isinstance(kwargs.get("strategy"), str)
    if DEVICE == "cuda" and is_single:
        return {"accelerator": "gpu", "devices": 1}
    return {"accelerator": "cpu"}
