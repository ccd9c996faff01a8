import pytest
import torch

from tests import devices

torch.set_num_threads(1)  # the models are so small that threads only wait for one another


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default=devices.DEVICE, choices=["cpu", "cuda"], help="that tests train on")


def pytest_configure(config: pytest.Config) -> None:
    devices.DEVICE = config.getoption("device")
    devices.chosen(devices.DEVICE)
