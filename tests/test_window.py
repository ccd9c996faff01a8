"""The window of probes: what it forgets, and what survives a checkpoint."""

import copy
import io
import math

import pytest
import torch

from lightning_graddiv.diversity import GradientMoments, estimate_diversity
from lightning_graddiv.window import ProbeWindow


def probe(i: int) -> GradientMoments:
    """A probe that tells its number."""
    return GradientMoments(32, 32.0 + i, 40.0 + 2 * i)


def numbers(window: ProbeWindow) -> list[int]:
    return [int(p.sum_sq_norms - 32) for p in window.probes]


def filled(count: int, size: int = 16, *, learning_rate: float = 0.1, every: int = 100, **kwargs) -> ProbeWindow:
    window = ProbeWindow(size, **kwargs)
    for i in range(count):
        window.append(probe(i), learning_rate=learning_rate, examples_seen=every * i)
    return window


def test_it_holds_the_newest_probes_in_order():
    window = filled(10, size=4)
    assert numbers(window) == [6, 7, 8, 9]
    assert len(window) == 4
    assert isinstance(window.probes, tuple)


def test_it_pools_what_it_holds():
    window = filled(6)
    expected = estimate_diversity(window.probes, dataset_size=500, confidence=0.8)
    assert window.estimate(500, 0.8) == expected
    assert window.estimate(dataset_size=500, confidence=0.8) == expected
    assert window.estimate() == estimate_diversity(window.probes)


def test_an_empty_window_has_no_estimate():
    with pytest.raises(ValueError, match="Expected argument `probes` to hold"):
        ProbeWindow(4).estimate()


def test_clear_forgets_everything():
    window = filled(6)
    window.clear()
    assert len(window) == 0
    window.append(probe(9), learning_rate=0.1, examples_seen=1)
    assert numbers(window) == [9]


@pytest.mark.parametrize("learning_rate", [0.05, 0.1 * 0.9**7, 0.001, 0.0, math.nextafter(0.05, 1)])
def test_a_learning_rate_that_fell_by_half_restarts_it(learning_rate):
    window = filled(6, learning_rate=0.1)
    window.append(probe(6), learning_rate=learning_rate, examples_seen=600)
    assert numbers(window) == [6]


@pytest.mark.parametrize("learning_rate", [0.0501, 0.1, 0.2, 10.0])
def test_a_learning_rate_that_fell_by_less_or_rose_keeps_it(learning_rate):
    window = filled(6, learning_rate=0.1)
    window.append(probe(6), learning_rate=learning_rate, examples_seen=600)
    assert len(window) == 7


def test_a_slow_decay_drops_the_probes_from_before_it_halved():
    window = ProbeWindow(100)
    for i in range(30):
        window.append(probe(i), learning_rate=0.9**i, examples_seen=i)
    assert numbers(window) == [23, 24, 25, 26, 27, 28, 29]  # .9^6 = .53 of the rate then, .9^7 = .48


def test_while_nothing_is_learnt_nothing_is_forgotten():
    # A warm-up that starts at zero: w stood still.
    window = filled(5, learning_rate=0.0)
    window.append(probe(5), learning_rate=0.0, examples_seen=500)
    window.append(probe(6), learning_rate=1e-5, examples_seen=600)
    assert len(window) == 7


def test_probes_older_than_a_pass_go():
    window = filled(16, every=100, max_age_examples=1000)
    assert numbers(window) == [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]  # number 5 is exactly one pass old


def test_age_alone_leaves_eight():
    assert numbers(filled(16, every=10_000, max_age_examples=1000)) == [8, 9, 10, 11, 12, 13, 14, 15]


def test_without_an_age_limit_nothing_is_too_old():
    assert len(filled(16, every=10**9)) == 16


def test_the_size_holds_below_eight_too():
    assert numbers(filled(16, size=3, every=10_000, max_age_examples=1000)) == [13, 14, 15]


def test_the_learning_rate_is_not_bound_by_the_eight():
    window = filled(16, learning_rate=0.1, max_age_examples=1000)
    window.append(probe(16), learning_rate=0.01, examples_seen=1600)
    assert numbers(window) == [16]


class TestState:
    def window(self) -> ProbeWindow:
        window = filled(3, max_age_examples=1000)
        grouped = GradientMoments(28.4, math.pi, 1e-17, group_sq_norms_of_sums=0.1, group_sq_counts=4.25)
        window.append(grouped, learning_rate=0.3, examples_seen=300)
        return window

    def through_a_checkpoint(self, state):
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=True)

    def test_it_survives_a_weights_only_checkpoint_exactly(self):
        window, restored = self.window(), ProbeWindow(16, max_age_examples=1000)
        restored.load_state_dict(self.through_a_checkpoint(window.state_dict()))
        assert restored.probes == window.probes
        assert restored.probes[-1].group_sq_counts == 4.25
        assert restored.probes[0].group_sq_counts is None
        assert restored.state_dict() == window.state_dict()

    def test_a_resumed_window_forgets_as_the_original_does(self):
        window, restored = self.window(), ProbeWindow(16, max_age_examples=1000)
        restored.load_state_dict(self.through_a_checkpoint(window.state_dict()))
        for learning_rate, seen in ((0.149, 310), (0.149, 5000), (0.05, 5001)):
            for each in (window, restored):
                each.append(probe(9), learning_rate=learning_rate, examples_seen=seen)
            assert restored.state_dict() == window.state_dict()

    def test_loading_replaces_what_was_held(self):
        restored = filled(5)
        restored.load_state_dict(self.window().state_dict())
        assert restored.probes == self.window().probes

    def test_a_smaller_window_takes_the_newest(self):
        restored = ProbeWindow(2)
        restored.load_state_dict(self.window().state_dict())
        assert restored.probes == self.window().probes[-2:]

    def test_the_state_is_a_copy(self):
        window = self.window()
        state = window.state_dict()
        window.clear()
        assert len(state["probes"]) == 4


def test_a_copy_keeps_what_it_held_whatever_becomes_of_the_window():
    window = filled(3)
    kept, before = copy.copy(window), numbers(window)
    window.append(probe(7), learning_rate=0.1, examples_seen=400)
    assert numbers(kept) == before != numbers(window)
    window.clear()
    assert numbers(kept) == before
    assert kept.size == window.size


@pytest.mark.parametrize("size", [0, -1])
def test_a_window_without_room_is_refused(size):
    with pytest.raises(ValueError, match="Expected argument `size` to be at least 1 but got"):
        ProbeWindow(size)


@pytest.mark.parametrize("age", [0, -1.0, math.nan])
def test_an_age_that_nothing_can_have_is_refused(age):
    with pytest.raises(ValueError, match="Expected argument `max_age_examples` to be positive but got"):
        ProbeWindow(4, max_age_examples=age)
