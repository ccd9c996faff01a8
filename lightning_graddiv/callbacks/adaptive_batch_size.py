"""The callback that lets the batch grow as far as gradient diversity allows."""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_graddiv.batching.learning_rate import (
    RULES,
    LearningRateRule,
    LearningRateScale,
    largest_learning_rate,
    learning_rate_factor,
)
from lightning_graddiv.batching.loops import (
    draws_a_new_epoch,
    is_closing_an_epoch,
    restart_iterator,
    single_train_loader,
)
from lightning_graddiv.batching.resizer import BatchResizer
from lightning_graddiv.batching.sampler import drawn_examples
from lightning_graddiv.callbacks.checks import (
    refuse_other_resizers,
    require,
    require_among_callbacks,
    require_automatic_optimization,
)
from lightning_graddiv.callbacks.growth import Growth, Throughput, explain
from lightning_graddiv.callbacks.monitor import GradientDiversityMonitor
from lightning_graddiv.callbacks.stability import DifferentialDiversityMonitor
from lightning_graddiv.distributed import smallest_over_ranks
from lightning_graddiv.diversity import DiversityEstimate, GradientMoments
from lightning_graddiv.policies import DiversityBound, Policy, RunState
from lightning_graddiv.window import MIN_PROBES_KEPT_BY_AGE


class AdaptiveBatchSize(GradientDiversityMonitor):
    """Grow the effective batch size while it stays under the measured batch-size bound.

    Measures like :class:`GradientDiversityMonitor`. At the start of each epoch the batch is multiplied by
    ``growth_factor`` if the policy allows the whole factor: by default while ``B <= delta * lower + 1``, with ``lower``
    the lower end of the interval of B_S(w). It never shrinks. The micro-batch grows up to ``max_micro_batch_size``,
    then gradient accumulation makes up the rest. The learning rate follows by ``scale_lr``, around each optimizer step,
    so that any learning-rate scheduler goes on as if the batch had not grown. Validation, test and predict loaders, the
    module and its loader code are not touched.

    Sizes are *effective*: examples per optimizer step = micro-batch x accumulation x processes. ``max_steps`` and
    schedulers with ``interval="step"`` count optimizer steps, of which an epoch has fewer after growth;
    ``limit_train_batches`` as an integer counts batches, which hold more examples then.

    Args:
        every_n_steps: see :class:`GradientDiversityMonitor`, as for the next five.
        engine: see there.
        max_examples: see there.
        window: see there; it also restarts at growth.
        confidence: see there.
        log_prefix: see there.
        max_batch_size: the largest effective batch size.
        delta: accepted loss of efficiency in ``B <= delta * B_S + 1``. Used where ``policy`` is None.
        policy: ``policy(estimate, run) -> largest effective batch size allowed``. None: ``DiversityBound(delta)``.
        growth_factor: integer of at least 2.
        max_micro_batch_size: the most examples that one process takes at a time. None: no limit; the loader's own batch
            size if gradients are accumulated already or the loader's batches cannot be changed.
        cooldown: measurements after a growth before the next, and probes that a growth needs (no more than ``window``).
        scale_lr: ``"gain"``, ``"linear"``, ``"sqrt"``, None, or ``"auto"``: gain for SGD, its square root for any other
            optimizer; see :func:`~lightning_graddiv.batching.learning_rate.learning_rate_factor`.
        stability: a second cap, for near a minimum B_S grows without limit: a :class:`.DifferentialDiversityMonitor`
            of the same trainer. The batch grows only if the learning rate that it would have then is at most the lower
            end of what that finds stable.

    Raises:
        ValueError: an argument out of range.
        MisconfigurationException: at the start of ``fit``, where the monitor refuses; ``max_batch_size`` below the
            starting effective batch size; several training loaders, or one that does not tell its batch size; a
            ``GradientAccumulationScheduler`` or a second ``AdaptiveBatchSize`` alongside; a ``stability`` monitor that
            is not among the trainer's callbacks.

    Example::

        trainer = Trainer(callbacks=[AdaptiveBatchSize(max_batch_size=1024)])
        trainer.fit(model, train_loader)

    Attributes:
        batch_size: the effective batch size now; 0 before the loaders are known.
        history: every :class:`Growth`, oldest first.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        engine: str = "auto",
        max_examples: int | None = None,
        window: int = 16,
        confidence: float = 0.9,
        log_prefix: str = "graddiv",
        *,
        max_batch_size: int,
        delta: float = 0.5,
        policy: Policy | None = None,
        growth_factor: int = 2,
        max_micro_batch_size: int | None = None,
        cooldown: int = 8,
        scale_lr: LearningRateRule = "auto",
        stability: DifferentialDiversityMonitor | None = None,
    ) -> None:
        self._scale = LearningRateScale()
        self._resizer: BatchResizer | None = None
        super().__init__(every_n_steps, engine, max_examples, window, confidence, log_prefix)
        require(max_batch_size >= 1, "max_batch_size", "at least 1", max_batch_size)
        is_factor = isinstance(growth_factor, int) and growth_factor >= 2
        require(is_factor, "growth_factor", "an integer of at least 2", growth_factor)
        is_cap = max_micro_batch_size is None or max_micro_batch_size >= 1
        require(is_cap, "max_micro_batch_size", "None or at least 1", max_micro_batch_size)
        require(cooldown >= 0, "cooldown", "at least 0", cooldown)
        require(scale_lr in RULES, "scale_lr", f"one of {RULES}", scale_lr)
        self.max_batch_size = max_batch_size
        self.policy: Policy = DiversityBound(delta) if policy is None else policy
        self.growth_factor = growth_factor
        self.max_micro_batch_size = max_micro_batch_size
        self.cooldown = cooldown
        self.scale_lr = scale_lr
        self.stability = stability

    @override
    def _forget(self) -> None:
        super()._forget()
        self.batch_size = 0
        self.history: list[Growth] = []
        self._scale.factor = 1.0
        self._epoch_is_open = False
        self._measured_since_growth = 0
        self._moments: GradientMoments | None = None
        self._loss = math.nan
        self._throughput = Throughput()
        self._batch_started = 0.0

    @property
    @override
    def state_key(self) -> str:
        """One resizes the batch: a run goes on with it whatever its other arguments are then."""
        return type(self).__qualname__

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        refuse_other_resizers(trainer, self)
        if self.stability is not None:
            require_among_callbacks(trainer, self.stability, "stability")
        self._resizer = BatchResizer(
            trainer,
            max_batch_size=self.max_batch_size,
            max_micro_batch_size=self.max_micro_batch_size,
            batch_size=lambda: self.batch_size if self.history else None,
            on_epoch=lambda: self._on_epoch(trainer),
        )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        require_automatic_optimization(pl_module, type(self).__name__)
        self._scale.attach(trainer.optimizers[0])

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._running().start()
        # After a checkpoint taken between two epochs, the iterator exists already: decide here, and begin it anew.
        if self._decide(trainer):
            restart_iterator(trainer)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self._epoch_is_open = True

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epoch_is_open = False

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._batch_started = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._measured is None:
            examples = (drawn_examples(single_train_loader(trainer), batch_idx) or 0) * trainer.world_size
            self._throughput.add(self.batch_size, examples, time.perf_counter() - self._batch_started)
        else:
            self._moments = self._measured
            self._measured_since_growth += 1
            loss = outputs.get("loss", math.nan) if isinstance(outputs, Mapping) else math.nan
            self._loss = float(loss) * trainer.accumulate_grad_batches  # Lightning has divided by it
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._let_go()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._let_go()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "batch_size": self.batch_size,
            "history": [growth.state_dict() for growth in self.history],
            "epoch_is_open": self._epoch_is_open,
            "measured_since_growth": self._measured_since_growth,
            "learning_rate_factor": self._scale.factor,
            "loss": self._loss,
            "moments": None if self._moments is None else asdict(self._moments),
            "throughput": self._throughput.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if not state_dict:
            return
        self.batch_size = state_dict["batch_size"]
        self.history = [Growth.from_state_dict(growth) for growth in state_dict["history"]]
        self._epoch_is_open = state_dict["epoch_is_open"]
        self._measured_since_growth = state_dict["measured_since_growth"]
        self._scale.factor = state_dict["learning_rate_factor"]
        self._loss = state_dict["loss"]
        moments = state_dict["moments"]
        self._moments = None if moments is None else GradientMoments(**moments)
        self._throughput.load_state_dict(state_dict["throughput"])

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_resizer": None}

    def _let_go(self) -> None:
        self._scale.detach()
        if self._resizer is not None:
            self._resizer.remove()
            self._resizer = None

    def _on_epoch(self, trainer: Trainer) -> None:
        """The loaders are ready and an epoch is about to start."""
        resizer = self._running()
        self.batch_size = resizer.plan.batch_size
        if resizer.is_running and draws_a_new_epoch(trainer):
            self._decide(trainer)

    def _decide(self, trainer: Trainer) -> bool:
        """Grow the batch for the coming epoch if the policy allows the whole factor; tell whether it grew."""
        if self._epoch_is_open or is_closing_an_epoch(trainer) or len(self._window) == 0 or self.latest is None:
            return False
        run = self._run_state(trainer)
        allowed = self._allowed(trainer, self.latest, run)
        self._warn_of_a_start_too_large(self.latest)
        target = self.batch_size * self.growth_factor
        if not (self._has_measured_enough() and target <= allowed and target <= self.max_batch_size):
            return False
        self._grow(trainer, target, allowed, self.latest)
        return True

    def _has_measured_enough(self) -> bool:
        """A drop of the learning rate empties the window too, and the interval of a few probes is a gamble."""
        is_cool = not self.history or self._measured_since_growth >= self.cooldown
        return is_cool and len(self._window) >= min(self.cooldown, self._window.size, MIN_PROBES_KEPT_BY_AGE)

    def _allowed(self, trainer: Trainer, estimate: DiversityEstimate, run: RunState) -> float:
        allowed = float(self.policy(estimate, run))
        target = self.batch_size * self.growth_factor
        if target <= min(allowed, self.max_batch_size) and not self._running().fits_an_epoch(target):
            if self._refusals.is_new("epoch"):
                rank_zero_warn(
                    f"AdaptiveBatchSize: an epoch does not hold a single batch of {target} examples, so the batch "
                    f"stays at {self.batch_size}."
                )
            allowed = 0.0
        if target <= min(allowed, self.max_batch_size) and not self._is_stable(trainer, target, estimate, run):
            allowed = float(self.batch_size)
        allowed = 0.0 if math.isnan(allowed) else allowed
        return smallest_over_ranks([allowed], trainer.strategy.root_device)[0]

    def _grow(self, trainer: Trainer, target: int, allowed: float, estimate: DiversityEstimate) -> None:
        resizer = self._running()
        resizer.resize(target)
        self._scale.factor = self._factor_at(trainer, target, estimate)
        growth = Growth(
            step=self.optimizer_steps,
            epoch=trainer.current_epoch,
            examples_seen=self.examples_seen,
            from_batch_size=self.batch_size,
            to_batch_size=target,
            allowed=allowed,
            learning_rate_factor=self._scale.factor,
            estimate=estimate,
            why=explain(estimate, self.confidence, allowed, target),
        )
        self.history.append(growth)
        rank_zero_info(
            f"AdaptiveBatchSize: {growth.from_batch_size} -> {target} from epoch {growth.epoch} on ({resizer.plan}), "
            f"because {growth.why}; learning rate x {self._scale.factor:.3g}"
        )
        self.batch_size = target
        self._measured_since_growth = 0
        self._window.clear()

    def _factor_at(self, trainer: Trainer, target: int, estimate: DiversityEstimate) -> float:
        return learning_rate_factor(
            self.scale_lr,
            batch_size=target,
            base_batch_size=self.history[0].from_batch_size if self.history else self.batch_size,
            bound=estimate.lower,
            optimizer=trainer.optimizers[0],
        )

    def _is_stable(self, trainer: Trainer, target: int, estimate: DiversityEstimate, run: RunState) -> bool:
        """Tell whether the learning rate at the target size is within what is measured to be stable."""
        if self.stability is None:
            return True
        rate = run.learning_rate / self._scale.factor * self._factor_at(trainer, target, estimate)
        cap = self.stability.learning_rate_cap(target)
        if rate > cap.lower and self._refusals.is_new("stability"):
            rank_zero_info(
                f"AdaptiveBatchSize: the batch stays at {self.batch_size} for now: {target} examples would be trained "
                f"on with a learning rate of {rate:.3g}, and {cap.lower:.3g} to {cap.upper:.3g} is what is stable."
            )
        return rate <= cap.lower

    def _run_state(self, trainer: Trainer) -> RunState:
        return RunState(
            batch_size=self.batch_size,
            learning_rate=largest_learning_rate(trainer.optimizers[0]) * self._scale.factor,
            loss=self._loss,
            throughput=self._throughput.per_second(),
            moments=self._moments,
            step=self.optimizer_steps,
            examples_seen=self.examples_seen,
            epoch=trainer.current_epoch,
        )

    def _warn_of_a_start_too_large(self, estimate: DiversityEstimate) -> None:
        if self.history or not isinstance(self.policy, DiversityBound):
            return
        at_most = self.policy.delta * estimate.upper + 1
        if self.batch_size > at_most and self._refusals.is_new("start"):
            rank_zero_warn(
                f"AdaptiveBatchSize: the starting effective batch size of {self.batch_size} is above the {at_most:.4g} "
                f"that the policy allows even at the upper end of the interval (B_S <= {estimate.upper:.4g}). The "
                "batch never shrinks: start with a smaller one."
            )

    @override
    def _effective_batch_size(self, trainer: Trainer) -> int:
        return self.batch_size

    @override
    def _learning_rate_factor(self) -> float:
        return self._scale.factor

    def _running(self) -> BatchResizer:
        if self._resizer is None:
            raise RuntimeError("AdaptiveBatchSize resizes batches only while `fit` runs.")
        return self._resizer
