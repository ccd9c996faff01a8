"""What a measurement says to loggers, progress bar and other callbacks."""

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch

from lightning_graddiv.diversity import DiversityEstimate, bound_from_pairs
from lightning_graddiv.theory import MechanismEffect, gain

_SHOWN = "batch_size_bound"
"""The one number that the progress bar has room for."""


def metrics_of(
    estimate: DiversityEstimate, *, batch_size: int, learning_rate: float, coverage: float, overhead: float
) -> dict[str, float]:
    """Return what is logged of an estimate, by name.

    Args:
        estimate: the estimate.
        batch_size: effective batch size, examples per optimizer step.
        learning_rate: the rate of the measured step.
        coverage: share of |gradient|^2 in the parameters that were measured.
        overhead: seconds of measuring over seconds of training without.
    """
    metrics = {
        "batch_size_bound": estimate.bound,
        "bound_lower": estimate.lower,
        "bound_upper": estimate.upper,
        "noise_scale": estimate.noise_scale,
        "grad_sq_norm": estimate.signal,
        "second_moment": estimate.second_moment,
        "batch_size": float(batch_size),
        "learning_rate": learning_rate,
        "sample_efficiency": gain(batch_size, estimate.bound) / batch_size,
        "coverage": coverage,
        "overhead": overhead,
    }
    return metrics if estimate.diversity is None else {**metrics, "diversity": estimate.diversity}


def mechanism_metrics(callbacks: Sequence[Any], estimate: DiversityEstimate) -> dict[str, float]:
    """Return what becomes of the estimate by the noise that mechanisms among the callbacks put into gradients.

    ``mechanism_bound`` is the bound of the noisy gradients (section 6 of the paper). It comes with their second moment
    and their squared mean, which show that a larger bound is more noise and no more signal.

    Args:
        callbacks: in the order in which they act, but those that act at the update come last.
        estimate: of gradients without it.

    Returns:
        Nothing where no mechanism acts, or one does not know what it did.
    """
    acting = sorted((c for c in callbacks if hasattr(c, "acts_at_update")), key=lambda c: bool(c.acts_at_update))
    effects = [callback.effect for callback in acting]
    if not effects or None in effects:
        return {}
    effect = reduce(MechanismEffect.then, effects)
    second_moment, signal = effect.second_moment(estimate.second_moment), effect.sq_norm(estimate.signal)
    return {
        "mechanism_bound": bound_from_pairs(signal, second_moment, estimate.dataset_size),
        "mechanism_second_moment": second_moment,
        "mechanism_grad_sq_norm": signal,
    }


def report(trainer: Any, metrics: Mapping[str, float], *, prefix: str, step: int) -> None:
    """Send metrics to every logger now, and to the progress bar and ``callback_metrics``.

    ``self.log`` alone would reach loggers only every ``log_every_n_steps``, and then repeat stale values.
    """
    if trainer.barebones:
        return
    named = {f"{prefix}/{name}": value for name, value in metrics.items()}
    for logger in trainer.loggers:
        logger.log_metrics(named, step=step)
    # Not by `log`: each call of that looks at all that was logged before, and takes as long as measuring a small net.
    trainer.callback_metrics.update(zip(named, torch.tensor(list(named.values()), device="cpu").unbind(), strict=True))
    trainer.progress_bar_metrics[f"{prefix}/{_SHOWN}"] = metrics[_SHOWN]
