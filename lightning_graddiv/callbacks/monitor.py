"""The callback that measures gradient diversity while a model trains."""

import copy
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_graddiv.batching.dataset_size import distinct_examples
from lightning_graddiv.batching.learning_rate import largest_learning_rate
from lightning_graddiv.batching.loops import single_train_loader, updates_statistics
from lightning_graddiv.batching.sampler import drawn_batch_size, drawn_examples
from lightning_graddiv.callbacks.checks import (
    require,
    require_automatic_optimization,
    require_data_parallelism,
    require_known_strategy,
    require_one_optimizer,
    require_own_prefix,
)
from lightning_graddiv.callbacks.measurer import StepMeasurer
from lightning_graddiv.callbacks.outcome import Outcome
from lightning_graddiv.callbacks.refusals import Refusals
from lightning_graddiv.callbacks.report import mechanism_metrics, metrics_of, report
from lightning_graddiv.callbacks.stopwatch import Stopwatch
from lightning_graddiv.distributed import agreed_over_ranks
from lightning_graddiv.diversity import (
    MIN_PROBES_FOR_INTERVAL,
    DiversityEstimate,
    GradientMoments,
)
from lightning_graddiv.errors import MeasurementError
from lightning_graddiv.per_example.select import check_engine_name
from lightning_graddiv.rank_check import between_rank_excess
from lightning_graddiv.window import ProbeWindow

_SAME_DATA_EXCESS = 4.0
"""Standard errors between the two estimates of |G|^2 above which ranks must be seeing the same examples."""

_PROBES_FOR_RANK_CHECK = 8
"""With fewer, independent shards exceed that too often: 1.6 % of the time with 4 probes, .3 % with 8."""


class GradientDiversityMonitor(Callback):
    """Measure the batch-size bound B_S(w) of Yin et al. (Definition 5) during training, with a confidence interval.

    Every ``every_n_steps`` optimizer steps, the gradients of a step's examples are measured on all processes, at the
    weights of that step. With ``engine="auto"`` this happens in the forward and backward pass that training makes, for
    the whole effective batch; what that does not cover is measured by running the step again on copies, and what cannot
    be split into examples between groups of them (``docs/engines.md``). The estimate pools the last ``window``
    measurements. Training is not touched: with the monitor the weights are bit-identical to those without it.

    Logged to every logger at the measured step, under ``log_prefix``: ``batch_size_bound``, ``bound_lower``,
    ``bound_upper``, ``diversity`` (not for a stream), ``noise_scale``, ``grad_sq_norm`` (unbiased |G|^2, may be
    negative), ``second_moment``, ``batch_size``, ``learning_rate``, ``sample_efficiency``, ``coverage`` (share of
    |gradient|^2 in the parameters measured) and ``overhead`` (seconds spent measuring over seconds of training without
    them). The progress bar shows the bound; ``trainer.callback_metrics`` has all.

    Args:
        every_n_steps: optimizer steps from one measurement to the next. At 200, measuring took less than 2 % of the
            time of every network that we measured (``docs/performance.md``); a run of a few hundred wants fewer.
        engine: ``"auto"``, ``"ghost"`` (in-band), ``"functional"``, ``"loop"`` or ``"microbatch"`` (between groups).
        max_examples: measure at most so many examples per process, where the step is run again. None: the whole
            micro-batch.
        window: measurements that one estimate pools, at least 2. It restarts when the learning rate falls by half.
        confidence: of the two-sided interval.
        log_prefix: first part of the logged names.

    Raises:
        ValueError: an argument out of range.
        MisconfigurationException: at the start of ``fit``, for several optimizers, tensor parallelism, strategies other
            than a single device, DDP and FSDP2, or an engine that cannot run a manual optimization again.

    Example::

        trainer = Trainer(callbacks=[GradientDiversityMonitor(every_n_steps=100)])
        trainer.fit(model, train_loader)

    Attributes:
        latest: the latest estimate, the same on every process; None before the first.
        optimizer_steps: taken, by the callback's own count.
        examples_seen: trained on, over all processes.
        measurements: that were good.
        dropped: measurements that were not, for example of gradients that are not finite.
    """

    def __init__(
        self,
        every_n_steps: int = 200,
        engine: str = "auto",
        max_examples: int | None = None,
        window: int = 16,
        confidence: float = 0.9,
        log_prefix: str = "graddiv",
    ) -> None:
        super().__init__()
        require(every_n_steps >= 1, "every_n_steps", "at least 1", every_n_steps)
        require(max_examples is None or max_examples >= 2, "max_examples", "None or at least 2", max_examples)
        require(window >= MIN_PROBES_FOR_INTERVAL, "window", f"at least {MIN_PROBES_FOR_INTERVAL}", window)
        require(0 < confidence < 1, "confidence", "between 0 and 1", confidence)
        require(bool(log_prefix), "log_prefix", "a name", log_prefix)
        self.every_n_steps = every_n_steps
        self.engine = check_engine_name(engine)
        self.max_examples = max_examples
        self.confidence = confidence
        self.log_prefix = log_prefix
        self._dataset_size: int | None = None
        self._stopwatch = Stopwatch()
        self._window = ProbeWindow(window)
        self._forget()

    def _forget(self) -> None:
        """Begin a new training."""
        self.latest: DiversityEstimate | None = None
        self.optimizer_steps = 0
        self.examples_seen = 0.0
        self.measurements = 0
        self.dropped = 0
        self._window.clear()
        self._measurer = StepMeasurer(self.engine, self.max_examples, type(self).__name__)
        self._measured: GradientMoments | None = None
        self._coverage = 1.0
        self._basis = 0
        self._opened_step = 0
        self._opened_learning_rate = 0.0
        self._stepped = False
        self._is_between_steps = True
        self._is_measured_step = False
        self._is_due = False
        self._size: tuple[int | None, int] | None = None
        self._refusals = Refusals()
        self._saved: dict[str, Any] = {}

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(
            every_n_steps=self.every_n_steps, engine=self.engine, log_prefix=self.log_prefix
        )

    @property
    def watches_gradients(self) -> bool:
        """Whether it is about to look at the gradient of the present optimizer step."""
        return self._measurer.is_open

    def on_estimate(self, trainer: Trainer, pl_module: LightningModule, estimate: DiversityEstimate) -> None:
        """Override to use an estimate; called after the measured step, on every process with the same numbers."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        require_known_strategy(trainer.strategy, type(self).__name__)
        require_own_prefix(trainer, self)
        if trainer.global_step == 0:  # a new training; a checkpoint's state is loaded after this
            self._forget()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        require_one_optimizer(trainer, pl_module, type(self).__name__)
        require_data_parallelism(trainer, type(self).__name__)
        if self.engine in {"functional", "loop"}:
            require_automatic_optimization(pl_module, f"The engine `{self.engine}`")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._count_dataset(trainer)
        if len(self._window) > 0:
            self.latest = self._window.estimate(self._dataset_size, self.confidence)
        self._stopwatch = Stopwatch()
        self._stopwatch.resume()
        self._save(trainer)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._count_dataset(trainer)  # a limit in batches reaches more examples after growth
        self._save(trainer)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stopwatch.pause()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._stopwatch.resume()
        if self._is_between_steps:
            self._save(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if updates_statistics(trainer):
            return
        opens = self._opens_a_step(trainer, pl_module, batch_idx)
        if opens and not self._measurer.spans_steps:
            self._measurer.close()  # a hook that skipped the last batch has skipped on_train_batch_end too
            # From nothing but what all processes share: they reduce their sums together.
            self._is_due |= (self.optimizer_steps + 1) % self.every_n_steps == 0
            if self._is_due and not self._refusals.is_final:
                self._opened_step = trainer.global_step
                self._opened_learning_rate = largest_learning_rate(trainer.optimizers[0])
                self._measurer.open(lambda outcome: self._take(trainer, outcome), self._stopwatch)
        self._stepped = False
        if opens:
            self._is_measured_step = self._measurer.is_open
            self._stopwatch.begin_step(trainer.strategy.root_device, is_measured=self._is_measured_step)
        if self._measurer.is_open:
            self._measurer.micro_batch(trainer, pl_module, batch_idx)

    def _opens_a_step(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> bool:
        begins, self._is_between_steps = self._is_between_steps, False
        if pl_module.automatic_optimization:
            return batch_idx % trainer.accumulate_grad_batches == 0
        return begins

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._measurer.before_backward(trainer, loss)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measurer.after_backward(trainer)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._stepped = self._is_between_steps = True
        self._measurer.before_optimizer_step(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if updates_statistics(trainer):
            return
        examples = self._drawn_examples(trainer, batch_idx) * trainer.world_size
        self._end_batch(trainer, pl_module, outputs, (batch, batch_idx), examples)
        if self._stepped:
            self._save(trainer)

    def _end_batch(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ARG002 - for those who do more, as the next
        seen: tuple[Any, int],  # noqa: ARG002
        examples: int,
    ) -> None:
        self.examples_seen += examples
        self.optimizer_steps += self._stepped
        if self._stepped:
            self._stopwatch.end_step(trainer.strategy.root_device, is_measured=self._is_measured_step)
        moments, self._measured = self._measured, None
        if moments is not None and self.latest is not None:
            with self._stopwatch.measuring(trainer.strategy.root_device):
                self._publish(trainer, self.latest)
            self.on_estimate(trainer, pl_module, self.latest)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._measurer.close()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._measurer.close()

    def _save(self, trainer: Trainer) -> None:
        """Take down the state as it is now: between two optimizer steps, where training can go on after a checkpoint.

        Checkpoints are asked for at any time, by a signal handler too, and on one process alone.
        """
        self._saved = self._snapshot(trainer)

    def _snapshot(self, trainer: Trainer) -> dict[str, Any]:
        """Return the state, quickly: what takes time is left to :meth:`state_dict`."""
        return {
            "global_step": trainer.global_step,
            "optimizer_steps": self.optimizer_steps,
            "examples_seen": self.examples_seen,
            "measurements": self.measurements,
            "dropped": self.dropped,
            "is_due": self._is_due,
            "basis": self._basis,
            "measurer": self._measurer.state_dict(),
            "window": copy.copy(self._window),
        }

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the state after the latest optimizer step, as tensors and primitives; empty before training."""
        return {name: _primitive(value) for name, value in self._saved.items()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        self.optimizer_steps = state_dict["optimizer_steps"]
        self.examples_seen = state_dict["examples_seen"]
        self.measurements = state_dict["measurements"]
        self.dropped = state_dict["dropped"]
        self._is_due = state_dict["is_due"]
        self._basis = state_dict["basis"]
        self._measurer.load_state_dict(state_dict["measurer"])
        self._window.load_state_dict(state_dict["window"])

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running trainer; Lightning puts ``log`` and ``log_dict`` on every callback."""
        return {name: value for name, value in self.__dict__.items() if name not in {"log", "log_dict"}}

    def _count_dataset(self, trainer: Trainer) -> None:
        examples = distinct_examples(single_train_loader(trainer), trainer.num_training_batches, trainer.world_size)
        self._dataset_size = agreed_over_ranks(examples, trainer.strategy.root_device)
        self._window.max_age_examples = float(self._dataset_size or "inf")

    def _take(self, trainer: Trainer, outcome: Outcome) -> None:
        """Take in one probe, or the reason why there is none; on every process alike."""
        moments, refusal = outcome.moments, outcome.refusal
        if moments is not None and moments.count < 2 and drawn_batch_size(single_train_loader(trainer)) != 1:
            return  # a last batch of one example holds no pairs: the next is due
        self._refusals.count(lasting=outcome.is_lasting and not outcome.is_retried)
        if outcome.basis != self._basis:  # what was measured before it may have been wrong, or something else
            self._basis = outcome.basis
            self._window.clear()
        if outcome.is_retried:
            return  # the next step is due
        self._is_due = False
        if moments is not None and moments.count < 2:
            moments, refusal = None, MeasurementError("The batch holds one example, and diversity is about pairs.")
        if moments is not None and moments.sum_sq_norms == 0:
            refusal = MeasurementError("Every per-example gradient is exactly zero: their diversity is undefined.")
            moments = None
        if moments is None:
            self.dropped += 1
            self._refusals.say(type(self).__name__, self._opened_step, refusal)
            return
        self._restart_if_resized(trainer)
        self.measurements += 1
        self._measured = moments
        self._coverage = outcome.coverage
        self._window.append(moments, learning_rate=self._opened_learning_rate, examples_seen=self.examples_seen)
        self.latest = self._window.estimate(self._dataset_size, self.confidence)
        self._check_ranks()

    def _drawn_examples(self, trainer: Trainer, batch_idx: int) -> int:
        """Return how many examples this process's micro-batch holds; 0 where the loader does not tell."""
        return drawn_examples(single_train_loader(trainer), batch_idx) or 0

    def _restart_if_resized(self, trainer: Trainer) -> None:
        """Begin a new window where somebody else has changed the size of the batch."""
        size = (drawn_batch_size(single_train_loader(trainer)), trainer.accumulate_grad_batches)
        if self._size is not None and size != self._size:
            self._window.clear()
        self._size = size

    def _check_ranks(self) -> None:
        if len(self._window) < _PROBES_FOR_RANK_CHECK:
            return
        if between_rank_excess(self._window.probes) > _SAME_DATA_EXCESS and self._refusals.is_new("ranks"):
            rank_zero_warn(
                f"{type(self).__name__}: the processes see the same examples (gradients of different processes are "
                "more alike than those within one), so B_S comes out wrong. Let Lightning inject a DistributedSampler "
                "(use_distributed_sampler=True), or shard the data by process."
            )

    def _publish(self, trainer: Any, estimate: DiversityEstimate) -> None:
        metrics = metrics_of(
            estimate,
            batch_size=self._effective_batch_size(trainer),
            learning_rate=self._opened_learning_rate * self._learning_rate_factor(),
            coverage=self._coverage,
            overhead=self._stopwatch.overhead,
        )
        metrics |= mechanism_metrics(trainer.callbacks, estimate)
        report(trainer, metrics, prefix=self.log_prefix, step=self._opened_step)

    def _effective_batch_size(self, trainer: Trainer) -> int:
        drawn = drawn_batch_size(single_train_loader(trainer))
        micro_batch = drawn if drawn is not None else self._window.probes[-1].count / trainer.world_size
        return round(micro_batch * trainer.accumulate_grad_batches * trainer.world_size)

    def _learning_rate_factor(self) -> float:
        """How much faster the optimizer steps than its learning rate says."""
        return 1.0


def _primitive(value: Any) -> Any:
    """Return what ``torch.load`` takes with its defaults."""
    if isinstance(value, tuple):
        return [_primitive(item) for item in value]
    return value.state_dict() if hasattr(value, "state_dict") else value
