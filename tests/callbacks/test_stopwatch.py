"""What measuring costs, by a clock that the test sets."""

import pytest
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
    device = torch.device(device)
    for seconds in plain:
        watch.begin_step(device, is_measured=False)
        now[0] += seconds
        watch.end_step(device, is_measured=False)
    watch.begin_step(device, is_measured=True)
    watch.add(1)
    now[0] += measured
    watch.end_step(device, is_measured=True)


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
    for device, plain in (("cpu", [2] * 8), ("meta", [2]), ("meta", [])):
        now[0], few = 0.0, stopwatch.Stopwatch()
        few.resume()
        steps(now, few, plain, 5, device)
        assert few.overhead == 1 / (sum(plain) + 4)


def test_on_an_accelerator_plain_steps_are_timed_together(monkeypatch):
    """It is waited for where a measured step begins and ends, and nowhere in between."""
    now, waited = [0.0], []
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(stopwatch, "_finish", lambda device: waited.append(now[0]))
    watch, device = stopwatch.Stopwatch(), torch.device("meta")
    watch.resume()
    steps(now, watch, [50, 1, 2, 3], 5, "meta")  # three plain steps of two seconds, after the first of all
    assert watch.overhead == pytest.approx(3 / (50 + 6 + 2))
    assert set(waited) == {50, 56, 61}
    waited.clear()
    with watch.measuring(device):  # between two steps, where what was measured is logged
        now[0] += 1
    watch.begin_step(device, is_measured=False)
    now[0] += 4
    watch.end_step(device, is_measured=False)
    watch.begin_step(device, is_measured=True)
    with watch.measuring(device):
        now[0] += 3
    now[0] += 6
    watch.end_step(device, is_measured=True)
    assert watch.overhead == pytest.approx((3 + 1 + 9 - 3) / (50 + 6 + 2 + 4 + 3))  # plain steps: of 2 and of 4
    assert set(waited) == {61, 62, 66, 75}


def test_a_pause_ends_a_span_of_plain_steps(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now[0])
    watch, device = stopwatch.Stopwatch(), torch.device("meta")
    watch.resume()
    steps(now, watch, [2, 2, 2], 5, "meta")
    for seconds in (30, 2, 4):
        watch.begin_step(device, is_measured=False)
        now[0] += seconds
        watch.end_step(device, is_measured=False)
        if seconds == 30:
            watch.pause()
            now[0] += 100
            watch.resume()
    before = watch.overhead * watch._training()
    watch.begin_step(device, is_measured=True)
    now[0] += 8
    watch.end_step(device, is_measured=True)
    assert watch.overhead * watch._training() - before == pytest.approx(8 - 3)  # spans of 2 and 4 seconds a step


def test_a_step_with_a_pause_in_it_is_not_compared(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now[0])
    watch = stopwatch.Stopwatch()
    watch.resume()
    steps(now, watch, [2] * 9, 2)
    watch.begin_step(torch.device("cpu"), is_measured=True)
    watch.pause()
    now[0] += 100
    watch.resume()
    watch.end_step(torch.device("cpu"), is_measured=True)
    assert watch.overhead == 0


@pytest.mark.parametrize(
    ("behind", "plain"), [(0, (14 - 6) / 2), (1, (15 - 3) / 2), (5, 19 / 2)], ids=["idle", "half", "busy"]
)
def test_between_steps_an_accelerator_is_idle_or_still_at_work(behind, plain, monkeypatch):
    """Batches take two seconds to draw, while an accelerator that is ``behind`` goes on with the step before."""
    now, waits = [0.0], [False]

    def finish(_):
        now[0] += behind if waits[0] else 0

    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(stopwatch, "_finish", finish)
    watch, device = stopwatch.Stopwatch(), torch.device("meta")
    watch.resume()
    steps(now, watch, [4], 4, "meta")
    for _ in range(2):
        now[0] += 2
        watch.begin_step(device, is_measured=False)
        now[0] += 4
        watch.end_step(device, is_measured=False)
    now[0], waits[0] = now[0] + 2, True
    before, at = watch.overhead * watch._training(), now[0]
    watch.begin_step(device, is_measured=True)
    assert now[0] == at + behind
    waits[0] = False
    now[0] += 20
    watch.end_step(device, is_measured=True)
    # From one measured step to the next it is 14 seconds and what the accelerator is behind, for two steps; of three
    # gaps of two seconds all, half or none were idle.
    assert watch.overhead * watch._training() - before == pytest.approx(20 - plain)


def test_a_step_that_a_hook_skipped_is_no_gap_of_its_own(monkeypatch):
    """Lightning then ends no batch: from the step's begin to the next one it is a gap, once."""
    now = [0.0]
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now[0])
    watch, device = stopwatch.Stopwatch(), torch.device("meta")
    watch.resume()
    steps(now, watch, [4], 4, "meta")
    for is_skipped in (False, True, False):
        now[0] += 2
        watch.begin_step(device, is_measured=False)
        if not is_skipped:
            now[0] += 4
            watch.end_step(device, is_measured=False)
    now[0] += 2
    before = watch.overhead * watch._training()
    watch.begin_step(device, is_measured=True)
    now[0] += 20
    watch.end_step(device, is_measured=True)
    assert watch.overhead * watch._training() - before == pytest.approx(20 - 4)
