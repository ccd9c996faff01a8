"""Keeps these tests out of every run that does not ask for them: they import torch's own test helpers, which set
global state."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from tests import devices

torch.set_num_threads(1)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    marks = config.getoption("markexpr")
    asked_for = "conformance" in marks and "not conformance" not in marks
    holds_tests = collection_path.name.startswith("test_")  # the rest would be imported a second time, for doctests
    return None if asked_for and holds_tests else True


@pytest.fixture(autouse=True, scope="session")
def _on_the_device() -> Iterator[None]:
    with nullcontext() if devices.DEVICE == "cpu" else torch.device(devices.DEVICE):
        yield
