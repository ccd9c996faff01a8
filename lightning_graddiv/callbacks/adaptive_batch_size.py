"""The callback that lets the batch grow as far as gradient diversity allows."""

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_graddiv.batching.learning_rate import RULES, LearningRateRule, LearningRateScale
from lightning_graddiv.batching.position import EpochPosition
from lightning_graddiv.batching.resumption import ResumableResizer
from lightning_graddiv.batching.sample_clock import SampleClock
from lightning_graddiv.callbacks.checks import (
    count_first_batch,
    refuse_other_resizers,
    require,
    require_among_callbacks,
    require_automatic_optimization,
    require_one_size,
)
from lightning_graddiv.callbacks.decision import GrowthDecision
from lightning_graddiv.callbacks.growth import Growth, Throughput, explain
from lightning_graddiv.callbacks.micro_batch import MicroBatchSizes
from lightning_graddiv.callbacks.monitor import GradientDiversityMonitor
from lightning_graddiv.callbacks.out_of_memory import is_out_of_memory, name_cures
from lightning_graddiv.callbacks.stability import DifferentialDiversityMonitor
from lightning_graddiv.callbacks.trial import MicroBatchTrial
from lightning_graddiv.diversity import DiversityEstimate, GradientMoments
from lightning_graddiv.policies import DiversityBound, Policy, RunState
from lightning_graddiv.random_states import RandomStates
from lightning_graddiv.window import MIN_PROBES_KEPT_BY_AGE

_SURE = 0.95
"""Confidence of a warning, which one batch too early makes untrue; of growth it only costs examples."""


class AdaptiveBatchSize(GradientDiversityMonitor):
    """Grow the effective batch size while it stays under the measured batch-size bound.

    Measures like :class:`GradientDiversityMonitor`. After each measurement the batch is multiplied by ``growth_factor``
    if the policy allows the whole factor: by default while ``B <= delta * lower + 1``, with ``lower`` the lower end of
    the interval of B_S(w). It never shrinks. The micro-batch grows up to ``max_micro_batch_size``, then gradient
    accumulation makes up the rest. The change takes effect in the middle of an epoch, with the first optimizer step
    whose batches are not drawn yet; every example stays in exactly one step of its epoch. The learning rate follows by
    ``scale_lr``, around each optimizer step, and schedulers that count steps follow the examples seen. Validation, test
    and predict loaders, the module and its loader code are not touched.

    Sizes are *effective*: examples per optimizer step = micro-batch x accumulation x processes. ``max_epochs`` counts
    passes over the data, as ever. ``max_steps`` counts optimizer steps, as ever, and those hold more examples after
    growth: limit a training by ``max_epochs``. ``limit_train_batches`` as an integer counts batches, which hold more
    examples then; as a fraction it stays that part of the data.

    Args:
        every_n_steps: see :class:`GradientDiversityMonitor`, as for the next five; twice as often by default, since a
            growth waits for measurements.
        engine: see there.
        max_examples: see there.
        window: see there; it also restarts at growth.
        confidence: see there. Growth goes by the lower end alone, above which B_S is with ``(1 + confidence) / 2``.
        log_prefix: see there.
        max_batch_size: the largest effective batch size.
        delta: accepted loss of efficiency in ``B <= delta * B_S + 1``. Used where ``policy`` is None.
        policy: ``policy(estimate, run) -> largest effective batch size allowed``. None: ``DiversityBound(delta)``.
        growth_factor: integer of at least 2.
        max_micro_batch_size: the most examples that one process takes at a time. None: as many as memory allows; the
            loader's own batch size if gradients are accumulated already or the loader's batches cannot be changed. A
            larger micro-batch is tried before it is adopted, by one forward and backward pass on a copy; accumulation
            makes up for one that fails. One that cannot be tried, under FSDP2 for example, is adopted only if this is
            given.
        cooldown: measurements after a growth before the next, and probes that a growth needs (no more than ``window``).
        scale_lr: ``"gain"``, ``"linear"``, ``"sqrt"``, None, or ``"auto"``: linear for SGD, sqrt for any other
            optimizer; see :func:`~lightning_graddiv.batching.learning_rate.learning_rate_factor`. A parameter group
            may have its own, under the key ``"scale_lr"``.
        warm_in: optimizer steps over which the learning rate reaches a new factor, in equal parts; 0: at once.
        merge_batches: where the loader draws by a batch sampler of its own, merge several of its batches to one larger
            micro-batch. Only if its data set's examples can be collated across its batches. False: there accumulation
            alone grows.
        stability: a second cap, for near a minimum B_S grows without limit: a :class:`.DifferentialDiversityMonitor`
            of the same trainer. The batch grows only if the learning rate that it would have then is at most the lower
            end of what that finds stable.

    Raises:
        ValueError: an argument out of range.
        MisconfigurationException: at the start of ``fit``, where the monitor refuses; ``max_batch_size`` below the
            starting effective batch size; several training loaders of different batch sizes; processes with batches of
            different sizes; a ``GradientAccumulationScheduler`` or a second ``AdaptiveBatchSize`` alongside; a
            ``stability`` monitor that is not among the trainer's callbacks.

    Example::

        trainer = Trainer(callbacks=[AdaptiveBatchSize(max_batch_size=1024)])
        trainer.fit(model, train_loader)

    Attributes:
        batch_size: the effective batch size now; 0 before the loaders are known.
        history: every :class:`Growth`, oldest first.
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        engine: str = "auto",
        max_examples: int | None = None,
        window: int = 16,
        confidence: float = 0.6,
        log_prefix: str = "graddiv",
        *,
        max_batch_size: int,
        delta: float = 2.0,
        policy: Policy | None = None,
        growth_factor: int = 2,
        max_micro_batch_size: int | None = None,
        cooldown: int = 2,
        scale_lr: LearningRateRule = "auto",
        warm_in: int = 20,
        merge_batches: bool = False,
        stability: DifferentialDiversityMonitor | None = None,
    ) -> None:
        self._scale = LearningRateScale(scale_lr, warm_in)
        self._resizer: ResumableResizer | None = None
        self.max_micro_batch_size = max_micro_batch_size
        super().__init__(every_n_steps, engine, max_examples, window, confidence, log_prefix)
        require(max_batch_size >= 1, "max_batch_size", "at least 1", max_batch_size)
        is_factor = isinstance(growth_factor, int) and growth_factor >= 2
        require(is_factor, "growth_factor", "an integer of at least 2", growth_factor)
        is_cap = max_micro_batch_size is None or max_micro_batch_size >= 1
        require(is_cap, "max_micro_batch_size", "None or at least 1", max_micro_batch_size)
        require(cooldown >= 0, "cooldown", "at least 0", cooldown)
        require(scale_lr in RULES, "scale_lr", f"one of {RULES}", scale_lr)
        require(warm_in >= 0, "warm_in", "at least 0", warm_in)
        self.max_batch_size = max_batch_size
        self.policy: Policy = DiversityBound(delta) if policy is None else policy
        self.growth_factor = growth_factor
        self._decision = GrowthDecision(self.policy, growth_factor, max_batch_size)
        self.cooldown = cooldown
        self.scale_lr = scale_lr
        self.merge_batches = merge_batches
        self.stability = stability

    @override
    def _forget(self) -> None:
        super()._forget()
        self.batch_size = 0
        self.history: list[Growth] = []
        self._scale.reset()
        self._clock = SampleClock()
        self._pending: Growth | None = None
        self._position: EpochPosition | None = None
        self._random: RandomStates | None = None
        self._owed = 0
        self._micro_batches = MicroBatchSizes(trusts=self.max_micro_batch_size is not None)
        self._measured_since_growth = 0
        self._throughput = Throughput()
        self._moments: GradientMoments | None = None
        self._loss = math.nan
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
        self._resizer = ResumableResizer(
            trainer,
            max_batch_size=self.max_batch_size,
            max_micro_batch_size=self.max_micro_batch_size,
            merge_batches=self.merge_batches,
        )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        require_automatic_optimization(pl_module, type(self).__name__)
        self._scale.attach(trainer.optimizers[0])

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        resizer = self._running()
        self._clock.start(trainer.estimated_stepping_batches, ends_by_steps=trainer.max_steps != -1)
        resizer.micro_batch_cap = self._micro_batches.cap
        resizer.start(self._size_to_go_on_with())
        if self._position is not None:
            resizer.go_on_from(self._position, self._random)
        self._take_size(trainer)
        for limit in resizer.limits:
            rank_zero_warn(f"AdaptiveBatchSize: {limit}")
        if self.history:
            self._clock.take_over(trainer)
        if self._owed:  # a step that had been taken when the checkpoint was made, and not counted
            self._clock.advance(pl_module, self._owed, resizer.known_base.accumulate)
            self._owed = 0
        super().on_train_start(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock.start_epoch()
        self._running().begin_epoch()
        self._note_position()
        super().on_train_epoch_start(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._running().end_epoch()
        self._note_position(is_validated=True)
        super().on_train_epoch_end(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        self._running().validates()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_between_steps and not trainer.sanity_checking:
            self._note_position(is_validated=True)
        super().on_validation_end(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        resizer = self._running()
        if resizer.base is None:
            resizer.learn(count_first_batch(batch), self._size_to_go_on_with())
            self._take_size(trainer)
        resizer.open(batch_idx)
        if self._pending is not None and resizer.plan.batch_size == self._pending.to_batch_size:
            self._take_effect(trainer, self._pending)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._batch_started = time.perf_counter()

    @override
    def _end_batch(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, seen: tuple[Any, int], examples: int
    ) -> None:
        is_measured = self._measured is not None
        if self._measured is None:
            self._throughput.add(self.batch_size, examples, time.perf_counter() - self._batch_started)
        else:
            self._moments = self._measured
            self._measured_since_growth += 1
            loss = outputs.get("loss", math.nan) if isinstance(outputs, Mapping) else math.nan
            self._loss = float(loss) * trainer.accumulate_grad_batches  # Lightning has divided by it
        super()._end_batch(trainer, pl_module, outputs, seen, examples)
        if self._stepped:
            resizer = self._running()
            self._clock.advance(pl_module, resizer.base_steps, resizer.known_base.accumulate)
            resizer.step()
        if is_measured and self.latest is not None:
            self._decide(trainer, self.latest, MicroBatchTrial(trainer, pl_module, *seen))
        if self._stepped:
            self._note_position()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._let_go()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._save_step_under_way()
        if self._resizer is not None and trainer.training and is_out_of_memory(exception):
            earlier = [growth.from_batch_size for growth in self.history]
            name_cures(exception, self._resizer, earlier, self._measurer.engine if self._measurer.is_open else None)
        super().on_exception(trainer, pl_module, exception)
        self._let_go()

    def _note_position(self, *, is_validated: bool = False) -> None:
        resizer = self._running()
        self._position, self._random = resizer.position(is_validated=is_validated), resizer.random_states()

    @override
    def _snapshot(self, trainer: Trainer) -> dict[str, Any]:
        return {
            **super()._snapshot(trainer),
            "batch_size": self.batch_size,
            "history": tuple(self.history),
            "pending": self._pending,
            "position": self._position,
            "random": self._random,
            "owed": self._owed,
            "measured_since_growth": self._measured_since_growth,
            "micro_batch_cap": self._micro_batches.cap,
            "micro_batch_cap_is_untried": self._micro_batches.is_untried,
            "learning_rate": self._scale.state_dict(),
            "clock": self._clock.state_dict(),
            "loss": self._loss,
            "moments": self._moments,
        }

    @override
    def state_dict(self) -> dict[str, Any]:
        self._save_step_under_way()
        state = super().state_dict()
        if not state:
            return state
        moments = None if state["moments"] is None else asdict(state["moments"])
        return {**state, "moments": moments, "throughput": self._throughput.state_dict()}

    def _save_step_under_way(self) -> None:
        """Take down an optimizer step that has been taken while its batch has not ended, as in another's hook.

        The weights of a checkpoint have it: its examples must not be trained on again.
        """
        resizer, saved = self._resizer, self._saved
        if resizer is None or not saved or resizer.global_step <= saved["global_step"]:
            return
        self._saved = {
            **saved,
            "global_step": resizer.global_step,
            "optimizer_steps": saved["optimizer_steps"] + 1,
            "examples_seen": saved["examples_seen"] + sum(resizer.window.sizes) * resizer.plan.world_size,
            "owed": resizer.base_steps,
            "measurements": self.measurements,
            "is_due": self._is_due,
            "window": copy.copy(self._window),
            "position": resizer.position(after_window=True),
            "random": resizer.random_states(),
            "learning_rate": self._scale.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if not state_dict:
            return
        self.batch_size = state_dict["batch_size"]
        self.history = [Growth.from_state_dict(growth) for growth in state_dict["history"]]
        pending, position, random = state_dict["pending"], state_dict["position"], state_dict["random"]
        self._pending = None if pending is None else Growth.from_state_dict(pending)
        self._position = None if position is None else EpochPosition.from_state_dict(position)
        self._random = None if random is None else RandomStates.from_state_dict(random)
        self._owed = state_dict["owed"]
        self._measured_since_growth = state_dict["measured_since_growth"]
        is_untried = state_dict.get("micro_batch_cap_is_untried", False)
        self._micro_batches.load(state_dict.get("micro_batch_cap"), is_untried=is_untried)
        self._scale.load_state_dict(state_dict["learning_rate"])
        self._clock.load_state_dict(state_dict["clock"])
        self._loss = state_dict["loss"]
        moments = state_dict["moments"]
        self._moments = None if moments is None else GradientMoments(**moments)
        self._throughput.load_state_dict(state_dict["throughput"])

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_resizer": None}

    def _let_go(self) -> None:
        self._scale.detach()
        self._clock.release()
        if self._resizer is not None:
            self._resizer.remove()
            self._resizer = None

    def _size_to_go_on_with(self) -> int | None:
        if self._pending is not None:
            return self._pending.to_batch_size
        return self.batch_size if self.history else None

    def _take_size(self, trainer: Trainer) -> None:
        """Take over the batch size that training starts with, where it is known."""
        resizer = self._running()
        if resizer.base is None:
            return
        require_one_size(resizer.base.micro_batch_size, trainer.strategy.root_device)
        self.batch_size = resizer.plan.batch_size

    def _decide(self, trainer: Trainer, estimate: DiversityEstimate, trial: MicroBatchTrial) -> None:
        """Prepare to grow if the policy allows the whole factor: from the first window that is not drawn yet."""
        resizer = self._running()
        if not self._has_measured_enough():
            return
        if not self.history:
            sure = self._window.estimate(self._dataset_size, max(self.confidence, _SURE))
            self._decision.warn_of_a_start_too_large(sure, self.batch_size, self._refusals)
        if self._pending is not None:
            return
        run, device = self._run_state(trainer), trainer.strategy.root_device
        at_most = self._stable_size(trainer, estimate)
        with self._stopwatch.measuring(device):
            taken = self._decision.take(
                estimate,
                run,
                resizer,
                device,
                self._refusals,
                at_most=at_most,
                sizes=self._micro_batches,
                trial=trial,
            )
        if taken is None:
            return
        offer, allowed = taken
        resizer.resize(offer)
        target = offer.plan.batch_size
        self._pending = Growth(
            step=self.optimizer_steps,
            epoch=trainer.current_epoch,
            examples_seen=self.examples_seen,
            from_batch_size=self.batch_size,
            to_batch_size=target,
            allowed=allowed,
            learning_rate_factor=1.0,
            estimate=estimate,
            why=explain(estimate, self.confidence, allowed, target),
        )

    def _has_measured_enough(self) -> bool:
        """A drop of the learning rate empties the window too, and the interval of a few probes is a gamble."""
        is_cool = not self.history or self._measured_since_growth >= self.cooldown
        return is_cool and len(self._window) >= min(self.cooldown, self._window.size, MIN_PROBES_KEPT_BY_AGE)

    def _take_effect(self, trainer: Trainer, pending: Growth) -> None:
        """The first micro-batch of the new size is about to be trained on."""
        first = self.history[0] if self.history else pending
        self._scale.set(
            batch_size=pending.to_batch_size,
            base_batch_size=first.from_batch_size,
            bound=pending.estimate.lower,
            optimizer=trainer.optimizers[0],
        )
        self._clock.take_over(trainer)
        growth = replace(
            pending,
            step=self.optimizer_steps,
            epoch=trainer.current_epoch,
            examples_seen=self.examples_seen,
            learning_rate_factor=self._scale.factor,
        )
        self.history.append(growth)
        rank_zero_info(
            f"AdaptiveBatchSize: {growth.from_batch_size} -> {growth.to_batch_size} from step {growth.step} in epoch "
            f"{growth.epoch} on ({self._running().plan}), because {growth.why}; learning rate x "
            f"{growth.learning_rate_factor:.3g}"
        )
        self.batch_size, self._pending = growth.to_batch_size, None
        self._measured_since_growth = 0
        self._window.clear()
        self._measurer.close()  # it may be waiting for a step to compare with one of the old size

    def _stable_size(self, trainer: Trainer, estimate: DiversityEstimate) -> float:
        """Return the size that the second cap allows: the present one, or any."""
        if self.stability is None:
            return math.inf
        target = self.batch_size * self.growth_factor
        rate = self._scale.largest_at(
            trainer.optimizers[0],
            batch_size=target,
            base_batch_size=self.history[0].from_batch_size if self.history else self.batch_size,
            bound=estimate.lower,
        )
        cap = self.stability.learning_rate_cap(target)
        if rate <= cap.lower:
            return math.inf
        if self._refusals.is_new("stability"):
            rank_zero_info(
                f"AdaptiveBatchSize: the batch stays at {self.batch_size} for now: {target} examples would be trained "
                f"on with a learning rate of {rate:.3g}, and {cap.lower:.3g} to {cap.upper:.3g} is what is stable."
            )
        return float(self.batch_size)

    def _run_state(self, trainer: Trainer) -> RunState:
        return RunState(
            batch_size=self.batch_size,
            learning_rate=self._scale.largest(trainer.optimizers[0]),
            loss=self._loss,
            throughput=self._throughput.per_second(),
            moments=self._moments,
            step=self.optimizer_steps,
            examples_seen=self.examples_seen,
            epoch=trainer.current_epoch,
        )

    @override
    def _drawn_examples(self, trainer: Trainer, batch_idx: int) -> int:
        resizer = self._running()
        return resizer.trained_on or super()._drawn_examples(trainer, batch_idx) or resizer.plan.micro_batch_size

    @override
    def _restart_if_resized(self, trainer: Trainer) -> None:
        """An epoch's last window may hold fewer micro-batches: that is no other batch size."""

    @override
    def _effective_batch_size(self, trainer: Trainer) -> int:
        return self.batch_size

    @override
    def _learning_rate_factor(self) -> float:
        return self._scale.applied

    def _running(self) -> ResumableResizer:
        if self._resizer is None:
            raise RuntimeError("AdaptiveBatchSize resizes batches only while `fit` runs.")
        return self._resizer
