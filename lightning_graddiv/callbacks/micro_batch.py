"""How large a micro-batch may be: what was tried, and what all processes have agreed on."""

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_graddiv.callbacks.trial import MicroBatchTrial, TrialResult, Verdict
from lightning_graddiv.distributed import smallest_over_ranks


class MicroBatchSizes:
    """Remembers which sizes of a micro-batch were tried, alike on every process.

    Args:
        trusts: a size that cannot be tried is taken, because the user has said how large a micro-batch may be.

    Attributes:
        cap: the largest micro-batch that may be offered; None while nothing is known against any.
        is_untried: whether the cap holds back what could not be tried, rather than what failed.
    """

    def __init__(self, *, trusts: bool) -> None:
        self.cap: int | None = None
        self.is_untried = False
        self._trusts = trusts
        self._takes_any = False
        self._tried = 0

    def admit(self, size: int, trained: int, trial: MicroBatchTrial) -> bool:
        """Tell whether to train on micro-batches of that size, which is tried if it is new. Else the cap is lower.

        Every process must call this.

        Args:
            size: the size.
            trained: one that training has had.
            trial: by which to try another.
        """
        device = trial.trainer.strategy.root_device
        is_known = self._takes_any or size <= max(trained, self._tried)
        if smallest_over_ranks([float(is_known)], device)[0] > 0:
            return True
        own = trial.run(size, trained)
        verdict = Verdict(int(smallest_over_ranks([float(own.verdict)], device)[0]))
        reason = own.reason if own.verdict is verdict else "another process says so"
        return self._takes(size, trained, TrialResult(verdict, reason))

    def _takes(self, size: int, trained: int, result: TrialResult) -> bool:
        if result.verdict is Verdict.FITS:
            self._tried = size
            return True
        if result.verdict is Verdict.OUT_OF_MEMORY:
            self.cap = size - 1
            rank_zero_info(
                f"AdaptiveBatchSize: a micro-batch of {size} examples was tried and does not fit into memory, so "
                "gradient accumulation makes up for it."
            )
            return False
        if result.verdict is Verdict.UNTRIED and self._trusts:
            self._takes_any = True
            return True
        self.cap, self.is_untried = trained, result.verdict is Verdict.UNTRIED
        self._say_why(size, trained, result)
        return False

    def _say_why(self, size: int, trained: int, result: TrialResult) -> None:
        if result.verdict is Verdict.FAILS:
            rank_zero_warn(
                f"AdaptiveBatchSize: the training step was tried on a micro-batch of {size} examples and fails, where "
                f"it does not with {trained} ({result.reason}). The micro-batch stays at {trained}, and gradient "
                "accumulation makes up for it. Take the size from the batch in `training_step`, or set "
                f"`max_micro_batch_size={trained}`."
            )
        else:
            rank_zero_warn(
                f"AdaptiveBatchSize: whether a micro-batch of {size} examples fits into memory cannot be tried "
                f"({result.reason}). The micro-batch stays at {trained}, and gradient accumulation makes up for it. "
                "Set `max_micro_batch_size` to a size that you know to fit."
            )

    def load(self, cap: int | None, *, is_untried: bool) -> None:
        """Go on with what an earlier run knew; the user may have said since what that could not try."""
        is_overruled = is_untried and self._trusts
        self.cap, self.is_untried = (None, False) if is_overruled else (cap, is_untried)
