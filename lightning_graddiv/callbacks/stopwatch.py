"""What measuring costs, as a share of training."""

import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_COMPARED = 9
"""Plain optimizer steps that a measured one is compared with: few, since the batch may grow."""


class Stopwatch:
    """Adds up seconds of training and, among them, of measuring; starts paused.

    A measured step takes longer by more than the time spent in our own code: what comes after that finds cold caches.
    On a processor, whole steps are compared, therefore: a measured one costs what it takes longer than the middle one
    of the plain ones before it. On an accelerator, which is ahead of no clock here, and before there are plain steps,
    the time in our own code counts.
    """

    def __init__(self) -> None:
        self._elapsed = 0.0
        self._measuring = 0.0
        self._resumed: float | None = None
        self._began: tuple[float, float] | None = None
        self._plain: deque[float] = deque(maxlen=_COMPARED)

    def resume(self) -> None:
        """Training goes on."""
        if self._resumed is None:
            self._resumed = time.perf_counter()

    def pause(self) -> None:
        """Something that is not training begins, validation for example."""
        self._elapsed, self._resumed = self._total(), None
        self._began = None

    def begin_step(self) -> None:
        """An optimizer step begins."""
        self._began = self._total(), self._measuring

    def end_step(self, device: torch.device, *, is_measured: bool) -> None:
        """It ends."""
        if self._began is None:
            return
        (start, measuring), self._began = self._began, None
        seconds = self._total() - start
        if not is_measured:
            self._plain.append(seconds)
        elif device.type == "cpu" and len(self._plain) == _COMPARED:
            self._measuring = measuring + seconds - statistics.median(self._plain)

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
        return max(0.0, self._measuring / training) if training > 0 else 0.0

    def _total(self) -> float:
        running = 0.0 if self._resumed is None else time.perf_counter() - self._resumed
        return self._elapsed + running


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
