"""What measuring costs, by a clock that the test sets."""

import torch

from lightning_graddiv.callbacks import stopwatch


def test_overhead_is_measuring_over_training_without_pauses(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now[0])
    watch = stopwatch.Stopwatch()
    assert watch.overhead == 0
    watch.resume()
    now[0] += 6
    with watch.measuring(torch.device("cpu")):
        now[0] += 2
    watch.pause()
    now[0] += 100  # validation
    watch.resume()
    watch.resume()
    now[0] += 2
    assert watch.overhead == 2 / 8
