"""On every kind of training data: idle, the callback changes not a bit; growing, it loses no example."""

import pytest
import torch

from lightning_graddiv import AdaptiveBatchSize
from tests.loader_matrix import EPOCHS, EXAMPLES, Corner, covering, train

FAST = covering(2, workers="none")[::2]
PARTS = 12

pytestmark = [
    pytest.mark.filterwarnings("ignore:AdaptiveBatchSize. the batch grows by gradient accumulation only"),
    pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined"),
    # A tuner that finds nothing on three flat steps says so, and Lightning resumes from what it saved before it.
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Consider setting `persistent_workers=True`"),
    pytest.mark.filterwarnings("ignore:You requested to overfit but enabled"),
]


def assert_idle_changes_nothing(corner: Corner, folder):
    plain, _ = train(corner, folder)
    rng = torch.get_rng_state()
    idle, _ = train(corner, folder, AdaptiveBatchSize(every_n_steps=10**9, max_batch_size=512))
    assert torch.equal(torch.get_rng_state(), rng)
    assert len(plain.steps) == len(idle.steps)
    assert all(torch.equal(a, b) for a, b in zip(plain.steps, idle.steps, strict=True))
    assert torch.equal(plain.w, idle.w)
    assert plain.micro_batches == idle.micro_batches
    assert plain.validations == idle.validations
    assert plain.lengths == idle.lengths


def assert_growth_loses_nothing(corner: Corner, folder):
    plain, _ = train(corner, folder)
    callback = AdaptiveBatchSize(
        every_n_steps=1, max_batch_size=16, max_micro_batch_size=8, delta=1.0, cooldown=4, merge_batches=True
    )
    grown, trainer = train(corner, folder, callback)
    if corner.limit != "fast_dev_run":
        assert callback.history
        assert grown.validations == plain.validations
        assert trainer.current_epoch == EPOCHS
    assert type(trainer.accumulate_grad_batches) is int
    assert trainer.accumulate_grad_batches == corner.accumulate
    for (expected, taken), of_plain in zip(grown.lengths, plain.lengths, strict=True):
        # After a tuner's own training, older versions of Lightning begin with what that has left of an epoch.
        assert expected in (taken, float("inf")) or of_plain[0] != of_plain[1]
    for epoch in range(trainer.current_epoch):
        steps = torch.stack(grown.steps_of(epoch))
        seen = (steps > 0).sum(0)
        assert int(seen.max()) == 1
        expected = (torch.stack(plain.steps_of(epoch)) > 0).sum()
        if corner.limit in ("none", "half"):  # a number of batches holds more examples after growth
            lost = 2 * 16 if corner.drop_last and "2" in corner.workers else 16 if corner.drop_last else 0
            assert (
                int(expected) - lost <= int(seen.sum()) <= int(expected) + (16 if corner.limit == "half" else EXAMPLES)
            )
        is_grown = epoch > callback.history[0].epoch if callback.history else False
        if corner.knows_its_end and is_grown:
            torch.testing.assert_close(steps.sum(1), torch.ones(len(steps)))


@pytest.mark.parametrize("corner", FAST, ids=str)
class TestSample:
    def test_idle_changes_nothing(self, corner, tmp_path):
        assert_idle_changes_nothing(corner, tmp_path)

    def test_growth_loses_nothing(self, corner, tmp_path):
        assert_growth_loses_nothing(corner, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
class TestWhole:
    """Every combination of three values, workers among them."""

    def corners(self, part):
        for corner in covering(3)[part::PARTS]:
            print(corner)  # the last one said is the one that failed
            yield corner

    def test_idle_changes_nothing(self, part, tmp_path):
        for corner in self.corners(part):
            assert_idle_changes_nothing(corner, tmp_path)

    def test_growth_loses_nothing(self, part, tmp_path):
        for corner in self.corners(part):
            assert_growth_loses_nothing(corner, tmp_path)
