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


def steps(now, watch, plain, measured, device="cpu"):
    """Steps of training, of which the measured one spends a second in our own code."""
    for seconds in plain:
        watch.begin_step()
        now[0] += seconds
        watch.end_step(torch.device(device), is_measured=False)
    watch.begin_step()
    watch.add(1)
    now[0] += measured
    watch.end_step(torch.device(device), is_measured=True)


def test_a_measured_step_costs_what_it_takes_longer_than_the_plain_ones_before_it(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now[0])
    watch = stopwatch.Stopwatch()
    watch.resume()
    steps(now, watch, [50, *[2] * 8], 5)  # the first step of all is no measure of the others
    assert watch.overhead == 3 / (50 + 8 * 2 + 2)


def test_time_in_our_own_code_counts_where_steps_cannot_be_compared(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now[0])
    few, elsewhere = stopwatch.Stopwatch(), stopwatch.Stopwatch()
    few.resume()
    steps(now, few, [2] * 8, 5)
    assert few.overhead == 1 / (8 * 2 + 4)
    now[0] = 0.0
    elsewhere.resume()
    steps(now, elsewhere, [2] * 9, 5, device="meta")
    assert elsewhere.overhead == 1 / (9 * 2 + 4)


def test_a_step_with_a_pause_in_it_is_not_compared(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now[0])
    watch = stopwatch.Stopwatch()
    watch.resume()
    steps(now, watch, [2] * 9, 2)
    watch.begin_step()
    watch.pause()
    now[0] += 100
    watch.resume()
    watch.end_step(torch.device("cpu"), is_measured=True)
    assert watch.overhead == 0
