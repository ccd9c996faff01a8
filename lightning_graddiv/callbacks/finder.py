"""The callback that looks for the batch size when training starts."""

import math
from collections.abc import Iterator
from dataclasses import replace

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_graddiv.batching.learning_rate import (
    RULES,
    LearningRateRule,
    largest_learning_rate,
    learning_rate_factor,
)
from lightning_graddiv.batching.loops import single_train_loader
from lightning_graddiv.batching.plan import BatchPlan
from lightning_graddiv.batching.recommendation import (
    fastest_plan,
    growth_steps,
    step_to_take,
    throughput_of_steps,
)
from lightning_graddiv.batching.sampler import drawn_batch_size, draws_plainly
from lightning_graddiv.callbacks.checks import require, require_one_optimizer
from lightning_graddiv.callbacks.mechanism import require_whole_gradients
from lightning_graddiv.distributed import agreed_over_ranks, smallest_over_ranks
from lightning_graddiv.diversity import MIN_PROBES_FOR_INTERVAL, DiversityEstimate
from lightning_graddiv.finding import BatchSizeFinding
from lightning_graddiv.per_example.losses import StepLoss
from lightning_graddiv.per_example.select import check_engine_name
from lightning_graddiv.policies import DiversityBound, Policy, RunState
from lightning_graddiv.probing import LoaderProbe
from lightning_graddiv.random_states import random_states_put_back


class BatchSizeBoundFinder(Callback):
    """Find the batch size to train with when training starts, and print it; training itself goes on as it was.

    At the weights that training starts from, it measures B_S(w) (Yin et al., Definition 5) on the first batches of a
    pass and pools them to one estimate with its interval. It times forward and backward passes for micro-batches of the
    loader's own size, twice that, and so on, as far as they fit into memory. It recommends the effective batch that the
    policy allows, in steps of ``growth_factor`` from the present one (one step, where that is infinite); the
    micro-batch of the best throughput among those that divide it; and the learning rate that belongs to it. A smaller
    batch than the present one is recommended only where even the upper end of the interval asks for it.

    Nothing is changed: batches are drawn from a copy of the loader and run on copies of the module, and random states
    are put back. Under DDP all processes measure and pool; the slowest one's seconds count, without communication.
    Compiled modules are timed uncompiled.

    Args:
        probes: batches to measure; a pass with fewer is split into smaller ones.
        engine: ``"auto"``, ``"ghost"``, ``"functional"``, ``"loop"`` or ``"microbatch"`` (one process only); see
            :func:`~lightning_graddiv.measure_moments`. ``auto`` measures batch normalisation between groups.
        confidence: of the two-sided interval.
        delta: accepted loss of efficiency in ``B <= delta * B_S + 1``. Used where ``policy`` is None.
        policy: ``policy(estimate, run) -> largest effective batch size allowed``. None: ``DiversityBound(delta)``.
        max_batch_size: the largest effective batch size to recommend.
        max_micro_batch_size: the largest micro-batch to time. None: as far as ``max_batch_size`` and memory go.
        growth_factor: integer of at least 2, as that of :class:`~lightning_graddiv.AdaptiveBatchSize`.
        scale_lr: rule for the learning rate, likewise.
        repeats: passes that are timed for each micro-batch; their median counts.

    Raises:
        ValueError: an argument out of range.
        MisconfigurationException: when training starts, for several training loaders or optimizers, strategies other
            than a single device and DDP, a starting batch above ``max_batch_size``, training data that cannot be
            copied.
        MeasurementError: likewise, where the model cannot be measured.

    Example::

        finder = BatchSizeBoundFinder(max_batch_size=1024)
        Trainer(callbacks=[finder]).fit(model, train_loader)
        finder.finding.recommended

    Attributes:
        finding: what was found; None before training starts.
    """

    def __init__(
        self,
        probes: int = 16,
        engine: str = "auto",
        confidence: float = 0.9,
        *,
        delta: float = 2.0,
        policy: Policy | None = None,
        max_batch_size: int = 4096,
        max_micro_batch_size: int | None = None,
        growth_factor: int = 2,
        scale_lr: LearningRateRule = "auto",
        repeats: int = 5,
    ) -> None:
        super().__init__()
        require(probes >= MIN_PROBES_FOR_INTERVAL, "probes", f"at least {MIN_PROBES_FOR_INTERVAL}", probes)
        require(0 < confidence < 1, "confidence", "between 0 and 1", confidence)
        require(max_batch_size >= 1, "max_batch_size", "at least 1", max_batch_size)
        is_cap = max_micro_batch_size is None or max_micro_batch_size >= 1
        require(is_cap, "max_micro_batch_size", "None or at least 1", max_micro_batch_size)
        is_factor = isinstance(growth_factor, int) and growth_factor >= 2
        require(is_factor, "growth_factor", "an integer of at least 2", growth_factor)
        require(scale_lr in RULES, "scale_lr", f"one of {RULES}", scale_lr)
        require(repeats >= 1, "repeats", "at least 1", repeats)
        self.probes = probes
        self.engine = check_engine_name(engine)
        self.confidence = confidence
        self.policy: Policy = DiversityBound(delta) if policy is None else policy
        self.max_batch_size = max_batch_size
        self.max_micro_batch_size = max_micro_batch_size
        self.growth_factor = growth_factor
        self.scale_lr = scale_lr
        self.repeats = repeats
        self.finding: BatchSizeFinding | None = None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        require_whole_gradients(trainer, "BatchSizeBoundFinder")
        require_one_optimizer(trainer, pl_module, "BatchSizeBoundFinder")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with random_states_put_back(None):
            self.finding = self._find(trainer, pl_module)
        trainer.print(str(self.finding))

    def _find(self, trainer: Trainer, module: LightningModule) -> BatchSizeFinding:
        loader = single_train_loader(trainer)
        if loader is None:
            raise MisconfigurationException("BatchSizeBoundFinder needs one training loader, not several.")
        parameters = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
        loss = StepLoss(module, parameters=parameters)
        probe = LoaderProbe(trainer, loss, loader, probes=self.probes, engine=self.engine)
        estimate = probe.estimate(self.confidence)
        size, accumulate = drawn_batch_size(loader) or probe.total, int(trainer.accumulate_grad_batches)
        if agreed_over_ranks(size, trainer.strategy.root_device) is None:
            raise MisconfigurationException("BatchSizeBoundFinder needs the same batch size on every process.")
        plan = BatchPlan(size, accumulate, trainer.world_size)
        self._require_room(plan)
        largest = min(self.max_batch_size, estimate.dataset_size or math.inf)  # an epoch must hold a batch
        is_adaptable = draws_plainly(loader)
        seconds = probe.seconds(self._micro_batches(plan, largest if is_adaptable else 0), self.repeats)
        steps = growth_steps(plan, self.growth_factor, largest, is_adaptable=is_adaptable)
        return self._recommend(trainer, estimate, plan, seconds, steps, probe.mean_loss)

    def _require_room(self, plan: BatchPlan) -> None:
        if plan.batch_size > self.max_batch_size:
            raise MisconfigurationException(
                f"Expected argument `max_batch_size` to be at least the present effective batch size {plan.batch_size} "
                f"({plan}) but got {self.max_batch_size}"
            )

    def _micro_batches(self, plan: BatchPlan, largest: float) -> Iterator[int]:
        """Return the micro-batch sizes to time: the present one, and its doublings."""
        at_most = min(largest / plan.world_size, self.max_micro_batch_size or math.inf)
        size = plan.micro_batch_size
        yield size
        while (size := 2 * size) <= at_most:
            yield size

    def _recommend(
        self,
        trainer: Trainer,
        estimate: DiversityEstimate,
        present: BatchPlan,
        timed: dict[int, float],
        steps: list[int],
        loss: float,
    ) -> BatchSizeFinding:
        optimizer = trainer.optimizers[0]
        seconds = {size: value for size, value in timed.items() if math.isfinite(value)}
        rate = largest_learning_rate(optimizer)
        throughput = throughput_of_steps(steps, seconds, present)
        run = RunState(present.batch_size, learning_rate=rate, loss=loss, throughput=throughput)
        allowed, at_most = self._limits(estimate, run, trainer)
        target = step_to_take(steps, present.batch_size, allowed, at_most)
        sizes = {"batch_size": target, "base_batch_size": present.batch_size}
        return BatchSizeFinding(
            estimate=estimate,
            confidence=self.confidence,
            present=present,
            recommended=fastest_plan(target, seconds, present),
            allowed=allowed,
            learning_rate=rate,
            learning_rate_factor=learning_rate_factor(
                self.scale_lr, **sizes, bound=estimate.lower, optimizer=optimizer
            ),
            seconds=seconds,
            out_of_memory_at=next((size for size, value in timed.items() if math.isinf(value)), None),
        )

    def _limits(self, estimate: DiversityEstimate, run: RunState, trainer: Trainer) -> list[float]:
        """Return what the policy allows by the lower end of the interval, and by its upper end; on every process."""
        ends = [estimate, replace(estimate, lower=estimate.upper)]
        allowed = [float(self.policy(end, run)) for end in ends]
        return smallest_over_ranks(
            [0.0 if math.isnan(size) else size for size in allowed], trainer.strategy.root_device
        )
