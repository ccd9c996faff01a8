"""Whether the batch may grow: the policy's answer, and what all processes can do."""

import math
from dataclasses import replace

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_graddiv.batching.resizer import BatchResizer, Offer
from lightning_graddiv.callbacks.micro_batch import MicroBatchSizes
from lightning_graddiv.callbacks.refusals import Refusals
from lightning_graddiv.callbacks.trial import MicroBatchTrial
from lightning_graddiv.distributed import smallest_over_ranks
from lightning_graddiv.diversity import DiversityEstimate
from lightning_graddiv.policies import DiversityBound, Policy, RunState


class GrowthDecision:
    """Decides on the next effective batch size, alike on every process.

    Args:
        policy: the largest effective batch size allowed, from an estimate.
        growth_factor: by which the batch grows.
        max_batch_size: the largest effective batch size.
    """

    def __init__(self, policy: Policy, growth_factor: int, max_batch_size: int) -> None:
        self.policy = policy
        self.growth_factor = growth_factor
        self.max_batch_size = max_batch_size

    def take(
        self,
        estimate: DiversityEstimate,
        run: RunState,
        resizer: BatchResizer,
        device: torch.device,
        said: Refusals,
        *,
        at_most: float = math.inf,
        sizes: MicroBatchSizes,
        trial: MicroBatchTrial,
    ) -> tuple[Offer, float] | None:
        """Return what to go on with, and what the policy allowed; None to stay. Every process must call this.

        Args:
            estimate: the same on every process.
            run: for the policy.
            resizer: that could change the batch.
            device: of collectives.
            said: what has been warned of.
            at_most: another limit than the policy's.
            sizes: of a micro-batch, as far as they were tried.
            trial: by which to try others.
        """
        allowed = float(self.policy(estimate, run))
        allowed = 0.0 if math.isnan(allowed) else min(allowed, at_most)
        allowed, latest = smallest_over_ranks([allowed, -float(resizer.earliest())], device)
        target = run.batch_size * self.growth_factor
        if target > min(allowed, self.max_batch_size):
            return None
        offer = self._offer(target, resizer, int(-latest), device, said)
        while offer is not None and not sizes.admit(offer.plan.micro_batch_size, resizer.plan.micro_batch_size, trial):
            resizer.micro_batch_cap = sizes.cap
            offer = self._offer(target, resizer, int(-latest), device, said)
        return None if offer is None else (offer, allowed)

    def _offer(self, target: int, resizer: BatchResizer, at: int, device: torch.device, said: Refusals) -> Offer | None:
        """Return the resizer's offer, if all processes have one: of as many batches as the process with the fewest."""
        offer = resizer.offer(target, at)
        lengths = [0.0] * 3 if offer is None else [float(offer.now is not None), offer.end, offer.whole]
        fits, is_now, end, whole = smallest_over_ranks([float(offer is not None), *lengths], device)
        if not fits or offer is None:
            if said.is_new("epoch"):
                rank_zero_warn(
                    f"AdaptiveBatchSize: an epoch does not hold a single batch of {target} examples, so the batch "
                    f"stays at {target // self.growth_factor}."
                )
            return None
        now = offer.now if is_now and at < end else None
        return replace(offer, now=now, end=end if now else resizer.epoch_end, whole=whole)

    def warn_of_a_start_too_large(self, estimate: DiversityEstimate, batch_size: int, said: Refusals) -> None:
        """Say once that training starts with more than even the upper end of the interval allows."""
        if not isinstance(self.policy, DiversityBound):
            return
        at_most = self.policy.delta * estimate.upper + 1
        if batch_size > at_most and said.is_new("start"):
            rank_zero_warn(
                f"AdaptiveBatchSize: the starting effective batch size of {batch_size} is above the {at_most:.4g} "
                f"that the policy allows even at the upper end of the interval (B_S <= {estimate.upper:.4g}). The "
                "batch never shrinks: start with a smaller one."
            )
