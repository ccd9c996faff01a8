"""The callback that measures how large a learning rate is still stable, between two weight vectors."""

from collections import deque
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_graddiv.batching.dataset_size import distinct_examples
from lightning_graddiv.batching.learning_rate import largest_learning_rate
from lightning_graddiv.batching.loops import single_train_loader
from lightning_graddiv.batching.sampler import drawn_batch_size
from lightning_graddiv.callbacks.checks import (
    require,
    require_automatic_optimization,
    require_one_optimizer,
    require_own_prefix,
)
from lightning_graddiv.callbacks.mechanism import require_whole_gradients
from lightning_graddiv.callbacks.monitor import GradientDiversityMonitor
from lightning_graddiv.callbacks.reference import Reference, Weights, trained_parameters
from lightning_graddiv.callbacks.refusals import Refusals
from lightning_graddiv.callbacks.replay import SeenStep
from lightning_graddiv.callbacks.report import report
from lightning_graddiv.callbacks.stopwatch import Stopwatch
from lightning_graddiv.callbacks.tap import TrainingStepTap
from lightning_graddiv.differential import (
    MIN_PROBES_FOR_CAP,
    DifferentialMoments,
    LearningRateCap,
    StabilityEstimate,
    estimate_stability,
)
from lightning_graddiv.distributed import agreed_over_ranks, pool_over_ranks, summed_over_ranks
from lightning_graddiv.diversity import GradientMoments, GradientSums
from lightning_graddiv.errors import MeasurementError
from lightning_graddiv.per_example.differential import DifferentialEngine


class DifferentialDiversityMonitor(Callback):
    """Measure the differential batch-size bound B_S(w, w') and the largest stable learning rate during training.

    Every ``every_n_steps`` optimizer steps, the per-example gradients of the next micro-batch are taken at the weights
    w and at a reference w', with the same noise, on copies: training is bit-identical with the monitor and without. The
    sums cross processes, so that all have the same numbers. The cap on the learning rate (derived;
    ``docs/stability.md``) is the one at which a step on the same batch would neither bring runs at w and w' closer nor
    drive them apart::

        lr_max(B) = 2 <Dw, DG> / |DG|^2 * B / (B_S(w, w') + B - 1),    Dw = w - w',  DG = G(w) - G(w')

    Logged to every logger at the measured step, under ``log_prefix``: ``batch_size_bound`` (B_S(w, w')),
    ``bound_lower``, ``bound_upper``, ``learning_rate_cap`` for the present effective batch, ``cap_lower``,
    ``cap_upper``, ``curvature`` (<Dw, DG> / |Dw|^2), ``distance`` (|Dw|), ``learning_rate`` and ``overhead``.

    Args:
        every_n_steps: optimizer steps from one measurement to the next.
        reference: w'. ``"snapshot"``: the weights ``lag`` steps before. ``"ema"``: their exponential moving average.
            Or a second run's weights by the names of parameters, such as the ``state_dict`` of a checkpoint, or a
            function without arguments that returns them.
        lag: steps between snapshot and measurement, at most ``every_n_steps``. None: ``every_n_steps``.
        decay: of the moving average, for each step; between 0 and 1.
        max_examples: measure at most so many examples of a process's micro-batch. None: all.
        window: measurements that one estimate pools, at least 4.
        confidence: of the two-sided intervals.
        log_prefix: first part of the logged names.

    Raises:
        ValueError: an argument out of range.
        MisconfigurationException: at the start of ``fit``, for several optimizers, manual optimization, strategies
            other than a single device and DDP, or a reference without a parameter or with one of another shape.

    Example::

        trainer = Trainer(callbacks=[DifferentialDiversityMonitor(every_n_steps=50)])
        trainer.fit(model, train_loader)

    Attributes:
        latest: the latest estimate, the same on every process; None before the first.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        reference: str | Weights | Callable[[], Weights] = "snapshot",
        *,
        lag: int | None = None,
        decay: float = 0.99,
        max_examples: int | None = 64,
        window: int = 16,
        confidence: float = 0.9,
        log_prefix: str = "stability",
    ) -> None:
        super().__init__()
        require(every_n_steps >= 1, "every_n_steps", "at least 1", every_n_steps)
        is_reference = reference in ("snapshot", "ema") if isinstance(reference, str) else True
        require(is_reference, "reference", "'snapshot', 'ema', weights by name or a function", reference)
        is_lag = lag is None or 1 <= lag <= every_n_steps
        require(is_lag, "lag", f"None or between 1 and every_n_steps = {every_n_steps}", lag)
        require(0 < decay < 1, "decay", "between 0 and 1", decay)
        require(max_examples is None or max_examples >= 2, "max_examples", "None or at least 2", max_examples)
        require(window >= MIN_PROBES_FOR_CAP, "window", f"at least {MIN_PROBES_FOR_CAP}", window)
        require(0 < confidence < 1, "confidence", "between 0 and 1", confidence)
        require(bool(log_prefix), "log_prefix", "a name", log_prefix)
        self.every_n_steps = every_n_steps
        self.reference = reference
        self.lag = every_n_steps if lag is None else lag
        self.decay = decay
        self.max_examples = max_examples
        self.confidence = confidence
        self.log_prefix = log_prefix
        self._probes: deque[DifferentialMoments] = deque(maxlen=window)
        self._dataset_size: int | None = None
        self._stopwatch = Stopwatch()
        self._forget()

    def _forget(self) -> None:
        """Begin a new training."""
        self.latest: StabilityEstimate | None = None
        self.optimizer_steps = 0
        self.measurements = 0
        self._probes.clear()
        self._reference = Reference(self.reference, self.lag, self.every_n_steps, self.decay)
        self._engine = DifferentialEngine(type(self).__name__, self.max_examples)
        self._refusals = Refusals()
        self._tap: TrainingStepTap | None = None
        self._stepped = False
        self._is_due = False
        self._measured_step: int | None = None

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(every_n_steps=self.every_n_steps, log_prefix=self.log_prefix)

    def learning_rate_cap(self, batch_size: float) -> LearningRateCap:
        """Return the largest stable learning rate at an effective batch size; the lower end is 0 before four probes."""
        if self.latest is None:
            return LearningRateCap(float("inf"), 0.0, float("inf"))
        return self.latest.learning_rate_cap(batch_size)

    def on_estimate(self, trainer: Trainer, pl_module: LightningModule, estimate: StabilityEstimate) -> None:
        """Override to use an estimate; called after the measured step, on every process with the same numbers."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        require_whole_gradients(trainer, type(self).__name__)
        require_own_prefix(trainer, self)
        if trainer.global_step == 0:  # a new training; a checkpoint's state is loaded after this
            self._forget()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        require_one_optimizer(trainer, pl_module, type(self).__name__)
        require_automatic_optimization(pl_module, type(self).__name__)
        if self._reference.is_given:
            self._reference.values(trained_parameters(pl_module, trainer.optimizers[0]))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._count_dataset(trainer)
        self._stopwatch = Stopwatch()
        self._stopwatch.resume()
        if self._probes:
            self.latest = self._estimate()

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._count_dataset(trainer)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stopwatch.pause()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._stopwatch.resume()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._disarm()
        self._stepped = False
        if batch_idx % trainer.accumulate_grad_batches:
            return
        # From nothing but what all processes share: they reduce their sums together.
        self._is_due |= self.optimizer_steps > 0 and self.optimizer_steps % self.every_n_steps == 0
        if not self._is_due or self._refusals.is_final:
            self._keep(trainer, pl_module)
            return

        def look(args: tuple[Any, ...]) -> None:
            """Measure what the step is about to be given."""
            self._tap = None
            with self._stopwatch.measuring(trainer.strategy.root_device):
                self._measure(trainer, pl_module, args)
            self._keep(trainer, pl_module)

        self._tap = TrainingStepTap(trainer.strategy, look)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._stepped = True

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._measured_step is not None and self.latest is not None:
            self._publish(trainer, self.latest, self._measured_step)
            self._measured_step = None
            self.on_estimate(trainer, pl_module, self.latest)
        self.optimizer_steps += self._stepped

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._disarm()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._disarm()

    @override
    def state_dict(self) -> dict[str, Any]:
        """A snapshot or moving average makes a checkpoint larger by the size of the weights."""
        return {
            "optimizer_steps": self.optimizer_steps,
            "measurements": self.measurements,
            "is_due": self._is_due,
            "probes": [probe.state_dict() for probe in self._probes],
            "reference": self._reference.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        self.optimizer_steps = state_dict["optimizer_steps"]
        self.measurements = state_dict["measurements"]
        self._is_due = state_dict["is_due"]
        self._probes.extend(DifferentialMoments.from_state_dict(probe) for probe in state_dict["probes"])
        self._reference.load_state_dict(state_dict["reference"])

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running trainer; Lightning puts ``log`` and ``log_dict`` on every callback."""
        kept = {name: value for name, value in self.__dict__.items() if name not in {"log", "log_dict"}}
        return {**kept, "_tap": None}

    def _count_dataset(self, trainer: Trainer) -> None:
        examples = distinct_examples(single_train_loader(trainer), trainer.num_training_batches, trainer.world_size)
        self._dataset_size = agreed_over_ranks(examples, trainer.strategy.root_device)

    def _keep(self, trainer: Trainer, module: LightningModule) -> None:
        self._reference.keep(trained_parameters(module, trainer.optimizers[0]), self.optimizer_steps)

    def _measure(self, trainer: Trainer, module: LightningModule, args: tuple[Any, ...]) -> None:
        """Take one probe, or the reason why there is none; on every process alike."""
        device = trainer.strategy.root_device
        found: tuple[GradientSums, float, float] | None = None
        refusal: Exception | None = None
        try:
            found = self._sums(trainer, module, args)
            found[0].moments()  # refuses what is not finite before other processes count on it
        except Exception as error:  # measuring must never end a training run
            found, refusal = None, error
        is_lasting = isinstance(refusal, MeasurementError) and refusal.lasting
        try:
            moments, is_lasting = pool_over_ranks(found[0] if found else None, device, lasting=is_lasting)
        except ValueError as error:  # the pooled sums are not finite, on every process alike
            moments, refusal = None, error
        self._is_due = False
        self._refusals.count(lasting=is_lasting)
        if moments is None or found is None:
            self._refusals.say(type(self).__name__, self.optimizer_steps, refusal)
            return
        _, alignment, distance = found
        (alignment,) = summed_over_ranks([alignment], device)  # the distance is the same everywhere
        self._take(moments, alignment, distance)

    def _take(self, moments: GradientMoments, alignment: float, distance: float) -> None:
        if moments.count < 2 or moments.sum_sq_norms == 0:
            reason = "The batch holds one example." if moments.count < 2 else "No gradient differs between w and w'."
            self._refusals.say(type(self).__name__, self.optimizer_steps, MeasurementError(reason))
            return
        self._probes.append(DifferentialMoments(moments, alignment, distance))
        self.measurements += 1
        self.latest = self._estimate()
        self._measured_step = self.optimizer_steps

    def _sums(
        self, trainer: Trainer, module: LightningModule, args: tuple[Any, ...]
    ) -> tuple[GradientSums, float, float]:
        """Return this process's sums of ``Dg_i / |Dw|``, its sum of ``<Dw, Dg_i> / |Dw|^2``, and ``|Dw|``."""
        seed = self.measurements * int(trainer.world_size) + int(trainer.global_rank)  # other noise on each process
        seen = SeenStep(module, trainer.optimizers[0], args, drawn_batch_size(single_train_loader(trainer)), seed)
        loss = seen.loss()
        reference = self._reference.values(trained_parameters(module, trainer.optimizers[0]))
        return self._engine.measure(loss, args[0], reference, at_most=seen.at_most, seed=seed)

    def _estimate(self) -> StabilityEstimate:
        return estimate_stability(self._probes, dataset_size=self._dataset_size, confidence=self.confidence)

    def _publish(self, trainer: Trainer, estimate: StabilityEstimate, step: int) -> None:
        drawn = drawn_batch_size(single_train_loader(trainer))
        micro_batch = drawn if drawn is not None else self._probes[-1].moments.count / trainer.world_size
        batch_size = max(1, round(micro_batch * trainer.accumulate_grad_batches * trainer.world_size))
        cap = estimate.learning_rate_cap(batch_size)
        metrics = {
            "batch_size_bound": estimate.diversity.bound,
            "bound_lower": estimate.diversity.lower,
            "bound_upper": estimate.diversity.upper,
            "learning_rate_cap": cap.cap,
            "cap_lower": cap.lower,
            "cap_upper": cap.upper,
            "curvature": estimate.curvature,
            "distance": estimate.distance,
            "learning_rate": self._learning_rate(trainer),
            "overhead": self._stopwatch.overhead,
        }
        report(trainer, metrics, prefix=self.log_prefix, step=step)

    def _learning_rate(self, trainer: Any) -> float:
        """Return the rate that the optimizer uses, scaled by whoever scales it."""
        rate = largest_learning_rate(trainer.optimizers[0])
        for callback in trainer.callbacks:
            rate *= callback._learning_rate_factor() if isinstance(callback, GradientDiversityMonitor) else 1.0
        return rate

    def _disarm(self) -> None:
        if self._tap is not None:
            self._tap.remove()
            self._tap = None
