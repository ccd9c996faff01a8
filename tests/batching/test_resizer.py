"""BatchResizer: what only several processes could show."""

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_graddiv.batching.plan import BatchPlan
from lightning_graddiv.batching.resizer import BatchResizer
from tests.audit import AuditModule, quiet_trainer


def test_a_batch_that_the_processes_cannot_share_is_refused():
    """As after a checkpoint of two processes, on three."""
    trainer = quiet_trainer()
    trainer.strategy.connect(AuditModule(4))
    resizer = BatchResizer(trainer, max_batch_size=64, max_micro_batch_size=None, merge_batches=False)
    resizer.base = BatchPlan(4, 1, 3)
    with pytest.raises(MisconfigurationException, match="16 examples cannot be shared equally by 3 processes"):
        resizer.offer(16, at=0)
    assert resizer.plan == BatchPlan(1)
    resizer.remove()
    assert "setup_data" not in trainer.fit_loop.__dict__
