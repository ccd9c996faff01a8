"""What measuring costs, as a share of training."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up seconds of training and, among them, of measuring; starts paused."""

    def __init__(self) -> None:
        self._elapsed = 0.0
        self._measuring = 0.0
        self._resumed: float | None = None

    def resume(self) -> None:
        """Training goes on."""
        if self._resumed is None:
            self._resumed = time.perf_counter()

    def pause(self) -> None:
        """Something that is not training begins, validation for example."""
        self._elapsed, self._resumed = self._total(), None

    @contextmanager
    def measuring(self, device: torch.device) -> Iterator[None]:
        """Count the block as measuring; what the device had still to do is not."""
        _finish(device)
        start = time.perf_counter()
        try:
            yield
        finally:
            _finish(device)
            self._measuring += time.perf_counter() - start

    def add(self, seconds: float) -> None:
        """Count seconds of training as measuring."""
        self._measuring += seconds

    @property
    def overhead(self) -> float:
        """Seconds of measuring over seconds of training without measuring."""
        training = self._total() - self._measuring
        return self._measuring / training if training > 0 else 0.0

    def _total(self) -> float:
        running = 0.0 if self._resumed is None else time.perf_counter() - self._resumed
        return self._elapsed + running


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
