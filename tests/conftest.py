import pytest
import torch

import lightning_graddiv.per_example.devices
from tests import devices

torch.set_num_threads(1)  # the models are so small that threads only wait for one another


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default=devices.DEVICE, choices=["cpu", "cuda"], help="that tests train on")
    parser.addoption("--few-calls", action="store_true", help="let the processor measure as an accelerator does")


def pytest_configure(config: pytest.Config) -> None:
    devices.DEVICE = config.getoption("device")
    devices.chosen(devices.DEVICE)
    if config.getoption("few_calls"):
        lightning_graddiv.per_example.devices._PROCESSORS = frozenset()
