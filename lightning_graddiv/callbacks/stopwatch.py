"""What measuring costs, as a share of training."""

import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_COMPARED = 9
"""Plain optimizer steps, or spans of them, that a measured one is compared with: few, since the batch may grow."""


class Stopwatch:
    """Adds up seconds of training and, among them, of measuring; starts paused.

    A measured step takes longer by more than the time spent in our own code: what comes after that finds cold caches,
    and an accelerator that it waited for has nothing to do. Whole steps are compared, therefore: a measured one costs
    what it takes longer than the middle one of the plain ones before it. An accelerator is behind the clock, and so its
    plain steps are timed together, from one measured step to the next, at both of which it is waited for. Before there
    are plain steps, the time in our own code counts.
    """

    def __init__(self) -> None:
        self._elapsed = 0.0
        self._measuring = 0.0
        self._resumed: float | None = None
        self._began: tuple[float, float] | None = None
        self._plain: deque[float] = deque(maxlen=_COMPARED)
        self._span: _Span | None = None

    def resume(self) -> None:
        """Training goes on."""
        if self._resumed is None:
            self._resumed = time.perf_counter()

    def pause(self) -> None:
        """Something that is not training begins, validation for example."""
        self._elapsed, self._resumed = self._total(), None
        self._began = self._span = None

    def begin_step(self, device: torch.device, *, is_measured: bool) -> None:
        """An optimizer step begins."""
        if self._span is not None:
            self._span.begin_step(self._training())
        if device.type != "cpu" and is_measured:
            _finish(device)
            if self._span is not None and self._span.steps > 0:
                self._plain.append(self._span.seconds_of_a_step(self._training()))
            self._span = None
        self._began = self._total(), self._measuring

    def end_step(self, device: torch.device, *, is_measured: bool) -> None:
        """It ends."""
        if self._began is None:
            return
        is_ahead = device.type != "cpu"
        if is_ahead and (is_measured or self._span is None):
            _finish(device)
        (start, measuring), self._began = self._began, None
        seconds = self._total() - start
        if is_measured and self._can_compare(device):
            self._measuring = measuring + seconds - statistics.median(self._plain)
        if not is_ahead and not is_measured:
            self._plain.append(seconds)
        elif is_ahead and self._span is not None:
            self._span.end_step(self._training())
        elif is_ahead:  # the first step of all is no measure of the others
            self._span = _Span(self._training())

    def _can_compare(self, device: torch.device) -> bool:
        return len(self._plain) >= (_COMPARED if device.type == "cpu" else 1)

    @contextmanager
    def measuring(self, device: torch.device) -> Iterator[None]:
        """Count the block as measuring; what the device had still to do is not.

        Within a step that is compared as a whole no device is waited for.
        """
        waits = self._began is None or not self._can_compare(device)
        if waits:
            _finish(device)
        start = time.perf_counter()
        try:
            yield
        finally:
            if waits:
                _finish(device)
            self._measuring += time.perf_counter() - start

    def add(self, seconds: float) -> None:
        """Count seconds of training as measuring."""
        self._measuring += seconds

    @property
    def overhead(self) -> float:
        """Seconds of measuring over seconds of training without measuring."""
        training = self._training()
        return max(0.0, self._measuring / training) if training > 0 else 0.0

    def _training(self) -> float:
        return self._total() - self._measuring

    def _total(self) -> float:
        running = 0.0 if self._resumed is None else time.perf_counter() - self._resumed
        return self._elapsed + running


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Span:
    """Plain steps on an accelerator that is not waited for in between.

    What the processor does between two steps, such as drawing a batch, is no part of them, unless the accelerator was
    still at work: the last such gap, after which it is waited for, shows what share of them that was.

    Args:
        start: when the accelerator had nothing to do.
    """

    def __init__(self, start: float) -> None:
        self.steps = 0
        self._start = self._ended = self._began = start
        self._gaps = self._last_gap = 0.0

    def begin_step(self, now: float) -> None:
        """A step begins; the one before may not have ended, if a hook skipped it."""
        self._last_gap, self._began = now - max(self._ended, self._began), now
        self._gaps += self._last_gap

    def end_step(self, now: float) -> None:
        """It ends."""
        self._ended, self.steps = now, self.steps + 1

    def seconds_of_a_step(self, end: float) -> float:
        """Return what each took, as a step begins that is not one of them, and the accelerator has been waited for."""
        waited = end - self._began
        idle = max(0.0, 1 - waited / self._last_gap) if self._last_gap > 0 else 0.0
        return (end - self._start - idle * self._gaps) / self.steps
